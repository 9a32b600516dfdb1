"""
Fine-tune a checkpoint: on stories, on the best stories of a ranking, or on the judgements themselves.

    python finetune.py --init out/gpt/ckpt_004600.pt --data stories.txt                   three passes over stories
    python finetune.py --init out/finetune/ckpt_000300.pt --data best.jsonl --out_dir out/best      rank.py's winners
    python finetune.py --init out/finetune/ckpt_000300.pt --data ranked.jsonl --method dpo --out_dir out/dpo
    torchrun --standalone --nproc_per_node=8 finetune.py --init ... --data ... --resume   on eight GPUs, and again

--data is a .txt (stories between lines <|endoftext|>), a .jsonl (field "text") or the pattern of token shards. It takes
the rates of pretraining, which a checkpoint names, times --lr_scale, and shows both losses and a story as it goes.
Stories that a model wrote (their lines have a "prompt") get 50,000 tokens, everything else three passes. --method dpo
is direct preference optimisation: a group's winner against each of the losers. --init is never written to.
In --out_dir: log.txt, log.jsonl, stories.jsonl, ckpt_*.pt (the newest --keep), and with --patience best.pt.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import codecs
import contextlib
import dataclasses
import datetime
import glob
import hashlib
import json
import math
import os
import platform
import re
import signal
import sys
import time

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

# What pretraining is taken to have used where the checkpoint does not say: train_gpt.py's preset 124M, or, when the
# head is tied, 1.5B.
PRETRAINING = dict(matrix_lr=0.02, down_lr=0.02, embed_lr=0.3, head_lr=0.008, weight_decay=0.0, momentum=0.95)
PRETRAINING.update(beta1=0.8, beta2=0.95, ns_steps=5, batch_size=16)
TIED = dict(matrix_lr=0.00705, down_lr=0.0141, embed_lr=0.0018)
# Flags that may change when a run is resumed: it learns the same all the same.
FREE = (
    "init data out_dir batch_size val_loss_every sample_every prompt max_new_tokens temperature save_every keep resume "
    "overwrite recompute device dtype compile"
).split()


def get_flags():
    flags, yes_no = Flags(), argparse.BooleanOptionalAction
    add = flags.add_argument
    add("--init", type=checkpoint_path, required=True, help="the .pt to begin with, or the folder of a run: its newest")
    add("--data", required=True, help="stories: .txt, .jsonl or a pattern of shards (*.bin); a ranked .jsonl for dpo")
    add("--method", default="sft", choices=["sft", "dpo"], help="learn to write such stories, or learn from judgements")
    add("--out_dir", default="out/finetune", help="where logs, stories and checkpoints go")
    add("--epochs", type=number(float, 0, 10_000), help="passes over the data; not given: 3 in sft, 2 in dpo")
    add("--max_tokens", type=number(int, 1), help="of sft, instead of passes; not given: 50,000 for stories by a model")
    add("--lr_scale", type=number(float, 0, 1000), help="times pretraining's rates; not given: 0.1 in sft, 0.2 in dpo")
    add("--matrix_lr", type=number(float, 0), help="Muon's rate; down to --ns_steps, not given means as in pretraining")
    add("--down_lr", type=number(float, 0), help="Muon's rate for the MLP's second matrix")
    add("--embed_lr", type=number(float, 0), help="AdamW's rate for the embedding")
    add("--head_lr", type=number(float, 0), help="AdamW's rate for the head, unless it is tied")
    add("--weight_decay", type=number(float, 0), help="of the matrices, times their rate")
    add("--momentum", type=number(float, 0, 0.9999), help="Muon's")
    add("--beta1", type=number(float, 0, 0.9999), help="AdamW's")
    add("--beta2", type=number(float, 0, 0.99999), help="AdamW's")
    add("--ns_steps", type=number(int, 1, 5), help="Muon's iterations")
    add("--warmup_share", type=number(float, 0, 1), default=0.05, help="first share of the steps: the rates rise")
    add("--warmdown_share", type=number(float, 0, 1), default=1.0, help="last share of them: the rates fall to 0")
    add("--block_size", type=number(int, 1), help="tokens in a row; not given: the whole window of the checkpoint")
    add("--batch_size", type=number(int, 1), help="most rows that a device takes at once; not given: as in pretraining")
    add("--total_batch_size", type=number(int, 1), help="tokens a step of sft; not given: for 100 steps or more")
    add("--pairs", type=number(int, 1), default=24, help="pairs of stories a step of dpo")
    add("--beta", type=number(float, 0), default=0.03, help="of dpo: the larger, the closer to the first weights")
    add("--against", default="all", choices=["all", "one"], help="dpo: the winner against each loser, or one by chance")
    add("--val_share", type=number(float, 0, 0.9), default=0.05, help="of the stories or groups, held out: one or more")
    add("--val_loss_every", type=number(int, 0), help="steps between validations; 0: at the end; not given: 10 in all")
    add("--patience", type=number(int, 0), default=0, help="end when so many validations bring no lower loss; 0: never")
    add("--sample_every", type=number(int, 0), help="steps between stories; 0: never; not given: 3 in all")
    add("--prompt", default="It was a dark and stormy night", help="how a story begins")
    add("--max_new_tokens", type=number(int, 0), default=200, help="length of a story")
    add("--temperature", type=number(float, 0), default=0.8, help="0 is greedy")
    add("--save_every", type=number(int, 0), default=0, help="steps between checkpoints; 0: at the end only")
    add("--keep", type=number(int, 1), default=2, help="how many checkpoints, the newest, stay")
    add("--resume", default=False, action=yes_no, help="go on from the newest checkpoint in --out_dir, if any")
    add("--overwrite", default=False, action=yes_no, help="remove the checkpoints of an earlier run in --out_dir")
    add("--recompute", default=False, action=yes_no, help="activation checkpointing: less memory, a third slower")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the activations")
    add("--compile", action=yes_no, help="compile the blocks; not given: on CUDA only")
    add("--seed", type=int, default=1337, help="of what is held out, the order of the data, and the stories")
    return flags.parse_args()


# --- command line: the same in every script (tests/test_copies.py) ---


def fail(message, code=2):
    """End with one line on stderr: code 2 for what the user can put right, 1 when the work itself failed."""
    if code != 2 or int(os.environ.get("LOCAL_RANK", 0)) == 0:  # under torchrun all ranks see the same mistake
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    raise SystemExit(code)


class Flags(argparse.ArgumentParser):
    """Flat flags: --help shows the script's docstring and every default, a mistake gets one line."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default is None else super()._get_help_string(action)

    def __init__(self):
        super().__init__(description=sys.modules["__main__"].__doc__, formatter_class=self.Help, allow_abbrev=False)

    def error(self, message):
        fail(message)


def number(kind, low, high=float("inf")):
    """The type of a flag that takes an int or a float from low to high."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            bounds = f"of {low} or more" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number {bounds}")
        return value

    return parse


def run(main):
    """Call main(); Ctrl-C, a full disk, and a reader of the output that has left (`| head`) leave no traceback."""
    code, said = 0, None
    try:
        try:
            main()
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code, said = 130, "interrupted"
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what stdout still holds would fail again
        code, said = 1, f"{error.filename or 'the work stopped'}: {error.strerror or error}"
        if isinstance(error, BrokenPipeError):
            code, said = 141, None
    if said:
        print(f"{os.path.basename(sys.argv[0])}: {said}", file=sys.stderr)
    if "WORLD_SIZE" in os.environ:  # gloo's threads may abort Python's own shutdown (PyTorch issue 190489)
        os._exit(code)
    raise SystemExit(code)


# --- end of command line ---


# --- device: the same in every script (tests/test_copies.py) ---


def get_device(device, dtype):
    """The torch.device and torch.dtype that --device and --dtype mean here: auto takes the fastest there is.

    bfloat16 is the fastest only where the hardware multiplies in it: elsewhere a CPU is some 100 times slower in it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: PyTorch finds no CUDA device here; use --device cpu, or install a CUDA build of torch")
    if device == "mps" and not torch.backends.mps.is_available():
        fail("--device mps: PyTorch finds no Apple GPU here; use --device cpu")
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
        torch.cuda.set_device(device)
    if dtype == "auto":
        if device == "cpu":
            has = [getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile")]
            fast_bf16 = any(has)
        else:
            fast_bf16 = device != "mps" and torch.cuda.get_device_capability() >= (8, 0)
        dtype = "bfloat16" if fast_bf16 else "float32"
    return torch.device(device), getattr(torch, dtype)


# --- end of device ---


# --- tokenizer: the same in every script (tests/test_copies.py) ---


def get_tokenizer(spec):
    """The tiktoken.Encoding that a checkpoint's "tokenizer" means: "gpt2", "bytes" or {"chars": "abc…"}.

    bytes: token i is byte i, 256 is <|endoftext|>. chars: token i is the i-th character, and there is no other token.
    """
    if spec == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:  # requests' errors are OSErrors too
            fail(f"cannot fetch the GPT-2 tokenizer ({type(error).__name__}); see TIKTOKEN_CACHE_DIR in README.md")
    if spec != "bytes" and not (isinstance(spec, dict) and isinstance(spec.get("chars"), str)):
        fail(f"the checkpoint names a tokenizer that is unknown here: {spec!r}")
    chars = [bytes([i]) for i in range(256)] if spec == "bytes" else [c.encode() for c in spec["chars"]]
    if len(set(chars)) < len(chars):
        fail("the checkpoint's tokenizer has a character twice")
    name, special = ("bytes", {"<|endoftext|>": 256}) if spec == "bytes" else ("chars", {})
    ranks = {c: i for i, c in enumerate(chars)}
    return tiktoken.Encoding(name, pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special)


def encode(tokenizer, text, name):
    """Token ids of a text; exits when it holds characters that a character tokenizer does not know."""
    if tokenizer.name == "chars":
        unknown = sorted(set(text) - set(tokenizer.decode(list(range(tokenizer.n_vocab)))))
        if unknown:
            fail(f"{name}: the checkpoint does not know the characters {''.join(unknown)!r}")
    return tokenizer.encode_ordinary(text)


# --- end of tokenizer ---


# --- documents: the same in every script (tests/test_copies.py) ---


def read_lines(path):
    """The lines of a UTF-8 file one by one, each ending in a plain newline whatever system wrote it."""
    line_number = 0
    try:
        with open(path, "rb") as f:
            for line_number, line in enumerate(f, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if line_number == 1 else line
                yield line.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        fail(f"{path}:{line_number}: not UTF-8 text (byte {error.start + 1} of the line)")
    except OSError as error:
        fail(f"{path}: {error.strerror}")


def documents(path):
    """The documents of a .txt (between lines <|endoftext|>) or a .jsonl (field "text") one by one, empty ones too."""
    if path.lower().endswith(".jsonl"):
        for line_number, line in enumerate(read_lines(path), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                fail(f"{path}:{line_number}: broken JSON ({error})")
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                fail(f'{path}:{line_number}: no field "text" with a string')
            yield row["text"].encode("utf-8", "replace").decode()  # JSON can hold halves of characters
    elif path.lower().endswith(".txt"):
        lines = []
        for line in read_lines(path):
            if line.rstrip() == "<|endoftext|>":
                yield "".join(lines).removesuffix("\n")
                lines = []
            else:
                lines.append(line)
        if lines:
            yield "".join(lines).removesuffix("\n")
    else:
        fail(f"{path}: neither .txt nor .jsonl")


# --- end of documents ---


# --- model: the same in every script (tests/test_copies.py) ---


@dataclasses.dataclass
class Config:
    """The fields of a checkpoint's config: sizes, and three switches that also give the model of the original post."""

    vocab_size: int
    block_size: int  # context window, in tokens
    n_layer: int
    n_head: int
    n_embd: int
    tie_weights: bool = False  # the head is the embedding
    embed_norm: bool = True  # RMSNorm right after the embedding
    logit_softcap: float = 15.0  # logits become cap * tanh(logits / cap); 0 leaves them as they are


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + 1e-6) over the last dimension, in fp32, returned in `dtype`: Zhang and Sennrich 2019.

    What F.rms_norm computes, but its backward is a chain of elementwise operations on a CPU: this saves 7% of a step.
    """

    @staticmethod
    def forward(ctx, x, dtype):
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square() / x.size(-1)
        scale = torch.rsqrt(mean_square + 1e-6)
        y, ctx.dtype = (x * scale).to(dtype), x.dtype
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True, dtype=torch.float32)  # the part of the gradient that changes the size
        return (torch.addcmul(grad.float(), y.float(), along, value=-1) * scale).to(ctx.dtype), None


def norm(x, dtype=None):
    if torch.is_grad_enabled():
        return RMSNorm.apply(x, dtype or x.dtype)
    return F.rms_norm(x, x.shape[-1:], eps=1e-6).to(dtype or x.dtype)


def linear(x, weight):
    """x (..., C) by a weight (rows, C) or a stack (n, rows, C), which GPT.pack may have packed, in the dtype of x."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    weight = weight.flatten(0, -2).to(x.dtype)
    if torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == x.size(-1):
        # one row: compiled, a sum reads the weights about twice as fast as PyTorch's product
        return (weight.float() * x.flatten().float()).sum(-1).to(x.dtype).expand(*x.shape[:-1], -1)
    return F.linear(x, weight)


def rotary_tables(length, head_size):
    """cos and signed sin of position * 10000^(-2i / head_size), each (length, head_size): RoPE, Su et al. 2021."""
    frequencies = 1 / 10000 ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.cos()), dim=-1), torch.cat((angles.sin(), -angles.sin()), dim=-1)


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_i+D/2) of x (B, H, T, D) by the angle of its position, in fp32."""
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


def attend_in_strips(q, k, v, rows=128):
    """Causal attention of q, k, v (B, H, T, D), some queries at a time over the keys that they may see.

    Plain products: on a CPU a training step takes 15% less time so than with PyTorch's own kernel.
    """
    (B, H, T, D), strips = q.shape, []
    q, k, v = (t.reshape(B * H, T, D) for t in (q, k, v))
    ahead = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
    for i in range(0, T, rows):
        j = min(i + rows, T)
        scores = torch.baddbmm(ahead[i:j, :j], q[:, i:j], k[:, :j].mT, alpha=D**-0.5)  # (B H, j - i, j)
        strips.append(scores.softmax(-1) @ v[:, :j])
    return torch.cat(strips, 1).view(B, H, T, D)


class KVCache:
    """Keys and values of every layer for a batch of texts, each with its own length.

    k, v: (L, B, H, S, D), S the most tokens a row can hold. lengths: tokens that each row holds, on the host; what
    stands behind them is never looked at, so right-padded prompts of different lengths can share a batch.
    """

    def __init__(self, config, batch_size, max_length, device, dtype):
        if torch.device(device).type == "cpu":  # PyTorch's attention of one query is thrice as fast in fp32
            dtype = torch.float32
        shape = config.n_layer, batch_size, config.n_head, max_length, config.n_embd // config.n_head
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.lengths = [0] * batch_size

    def copy(self, i, other, j):
        """Let row i hold what row j of the other cache holds."""
        n = self.lengths[i] = other.lengths[j]
        self.k[:, i, :, :n], self.v[:, i, :, :n] = other.k[:, j, :, :n], other.v[:, j, :, :n]

    def keep(self, n):
        """Only the first n rows."""
        self.k, self.v, self.lengths = self.k[:, :n], self.v[:, :n], self.lengths[:n]

    def rows(self, index):
        """A new cache of these rows: a row may be left out, or taken many times."""
        new = object.__new__(KVCache)
        chosen = torch.tensor(index, device=self.k.device)
        new.k, new.v = self.k[:, chosen], self.v[:, chosen]
        new.lengths = [self.lengths[i] for i in index]
        return new


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). q, k and v are one matrix stack (3, C, C): one product, and
    Muon sees three matrices."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.qkv = nn.Parameter(torch.empty(3, C, C).normal_(std=C**-0.5))
        self.o = nn.Parameter(torch.zeros(C, C))
        self.up = nn.Parameter(torch.empty(4 * C, C).normal_(std=C**-0.5))
        self.down = nn.Parameter(torch.zeros(C, 4 * C))

    def decode(self, *step):  # what compile_decoding replaces
        return self.forward(*step)

    def project(self, x):
        return linear(x, self.qkv)  # (B, T, 3 C)

    def attend(self, q, k, v, mask):
        if mask is None and q.device.type == "cpu":
            return attend_in_strips(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)  # (B, H, T, D)

    def forward(self, x, cos, sin, k_cache=None, v_cache=None, positions=None, mask=None):
        B, T, C = x.shape
        H = self.n_head
        qk, v = self.project(norm(x)).view(B, T, 3 * H, C // H).transpose(1, 2).split((2 * H, H), dim=1)
        v = v if v_cache is None else v.to(v_cache.dtype)
        q, k = norm(rotate(qk, cos, sin), v.dtype).chunk(2, dim=1)  # q, k, v: (B, H, T, D)
        if k_cache is not None:
            rows = torch.arange(B, device=x.device)[:, None]
            k_cache[rows, :, positions] = k.transpose(1, 2)
            v_cache[rows, :, positions] = v.transpose(1, 2)
            if mask is not None:  # something was there before: look at all of it
                k, v = k_cache[:, :, : mask.size(-1)], v_cache[:, :, : mask.size(-1)]
        y = self.attend(q, k, v, mask).transpose(1, 2).reshape(B, T, C)
        x = x + linear(y.to(x.dtype), self.o)
        h = linear(norm(x), self.up).relu()  # (B, T, 4 C)
        return x + linear(h * h, self.down)  # ReLU^2


class ChunkedLoss(torch.autograd.Function):
    """Sum of the cross-entropies of many rows, some rows at a time, so that all the logits never exist at once.

    Each chunk's gradients are taken in the forward pass, where its logits are at hand, and only scaled in the backward.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, loss_and_gradients, chunk):
        total, dx, dweight = 0.0, [], torch.zeros_like(weight)
        w = weight.to(x.dtype)
        for xi, t in zip(x.split(chunk), targets.split(chunk)):
            loss, dxi, dw = loss_and_gradients(xi, w, t)
            total, dweight = total + loss, dweight.add_(dw)
            dx.append(dxi)
        ctx.save_for_backward(torch.cat(dx), dweight)
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors
        return dx * grad.to(dx.dtype), dweight * grad, None, None, None


class GPT(nn.Module):
    """The decoder-only transformer of every script. It computes what NanoChatForCausalLM of transformers computes.

    Weights are kept in fp32; activations take `dtype`. Compile `model.blocks`, each by itself, never the whole model.
    """

    # While the loss is taken: few logits at once, which stay in a CPU's cache, but enough rows for fast products.
    logits_at_once, least_rows = {"cpu": 2**20, "cuda": 2**29, "mps": 2**25}, 512

    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        C, H = config.n_embd, config.n_head
        if C % H or C // H % 2:
            raise ValueError(f"n_embd {C} must be an even multiple of n_head {H}")
        self.config, self.dtype, self.recompute = config, dtype, False  # recompute: activation checkpointing
        rows = -(-config.vocab_size // 64) * 64  # padded for the hardware; the padding gets no logits
        self.embed = nn.Parameter(torch.empty(rows, C).normal_(std=0.02 if config.tie_weights else 1.0))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.head = None if config.tie_weights else nn.Parameter(torch.zeros(rows, C))
        cos, sin = rotary_tables(config.block_size, C // H)
        self.register_buffer("cos", cos, persistent=False)  # (block_size, D)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def head_weight(self):
        return self.embed if self.head is None else self.head  # (rows, C)

    def trunk(self, x, cos, sin, cache, positions, mask):
        for i, block in enumerate(self.blocks):
            if self.recompute and self.training:
                x = recompute(block, x, cos, sin, use_reentrant=False)
            elif cache:  # many shapes, each of which would be compiled anew, but for a token a row
                step = block.decode if x.size(1) == 1 else block.forward
                x = step(x, cos, sin, cache.k[i], cache.v[i], positions, mask)
            else:
                x = block(x, cos, sin)
        return x

    def compile_blocks(self):
        """Compile what training spends its time in: each block by itself, and the loss. Sampling stays as it was."""
        for block in self.blocks:
            block.compile()
        self.row_losses, self.loss_and_gradients = map(torch.compile, (self.row_losses, self.loss_and_gradients))

    def compile_decoding(self):
        """Compile the step of one token a row: on a CPU for one row at a time, where that is faster than `pack`."""
        for block in self.blocks:
            block.decode = torch.compile(block.forward)
        self.logits = torch.compile(self.logits)

    def pack(self):
        """Give up training for speed: on a CPU the weights take the layout in which oneDNN reads them fastest, once and
        for all, where F.linear would find them as they were at every call. A token takes about 0.7 of the time.
        """
        mkldnn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn
        usable = mkldnn and (self.dtype.itemsize == 4 or mkldnn._is_mkldnn_bf16_supported())
        if self.embed.device.type != "cpu" or not usable:
            return self

        def packed(weight):
            weight = weight.detach().flatten(0, -2).to(self.dtype)
            return nn.Parameter(mkldnn._reorder_linear_weight(weight, 16), requires_grad=False)

        for block in self.blocks:
            for name, weight in block.named_parameters():
                setattr(block, name, packed(weight))
        self.head = packed(self.head_weight)
        return self

    def hidden(self, idx, cache=None, lengths=None):
        """Tokens (B, T) to the last normalised activations (B, T, C). With a cache the tokens follow what it holds,
        and it grows by `lengths`: how many of each row's tokens are real, the rest being padding on the right."""
        B, T = idx.shape
        positions, mask = None, None
        if cache is None:
            cos, sin = self.cos[:T], self.sin[:T]
        else:
            start, lengths = torch.tensor(cache.lengths, device=idx.device), lengths or [T] * B
            positions = start[:, None] + torch.arange(T, device=idx.device)  # (B, T)
            if any(cache.lengths):
                S = max(cache.lengths) + T
                mask = torch.arange(S, device=idx.device) <= positions[:, None, :, None]  # (B, 1, T, S)
            angles = positions.clamp(max=self.config.block_size - 1)  # only padding is ever beyond the window
            cos, sin = self.cos[angles][:, None], self.sin[angles][:, None]  # (B, 1, T, D)
            cache.lengths = [n + new for n, new in zip(cache.lengths, lengths)]
        x = F.embedding(idx, self.embed).to(self.dtype)  # (B, T, C)
        x = norm(x) if self.config.embed_norm else x
        return norm(self.trunk(x, cos, sin, cache, positions, mask))

    def logits(self, x):
        """Activations (..., C) to logits (..., vocab_size) in fp32."""
        cap = self.config.logit_softcap
        logits = linear(x, self.head_weight)[..., : self.config.vocab_size].float()
        if cap and torch.is_grad_enabled():
            return cap * torch.tanh(logits / cap)
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits  # in place

    def row_losses(self, x, targets):
        return F.cross_entropy(self.logits(x), targets, ignore_index=-1, reduction="none")

    def loss_and_gradients(self, x, weight, targets):
        """Sum of the cross-entropies of rows x (N, C), and its gradients with respect to x and weight (rows, C)."""
        V, cap = self.config.vocab_size, self.config.logit_softcap
        grads, total, slope = F.linear(x, weight), 0.0, 1.0  # first the logits (N, rows); their gradients replace them
        few = max(1, self.logits_at_once[x.device.type] // V)
        if torch.compiler.is_compiling():  # then it is one pass over the logits anyway
            few = len(x)
        for grad, t in zip(grads.split(few), targets.split(few)):
            logits = grad[:, :V].float()  # (n, V)
            if cap:
                tanh = logits.div_(cap).tanh_()
                logits, slope = tanh * cap, tanh.square_().neg_().add_(1)
            logp = logits.log_softmax(-1)
            t, counted = t[:, None].clamp(min=0), t[:, None] >= 0  # (n, 1)
            total = total - (logp.gather(-1, t) * counted).sum()
            p, right = logp.exp_(), torch.arange(V, device=x.device) == t  # (n, V)
            grad[:, :V] = torch.where(right, p - 1, p).mul_(counted).mul_(slope)
            grad[:, V:] = 0
        return total, grads @ weight, grads.mT @ x

    def forward(self, idx, targets=None, cache=None, lengths=None, reduction="mean"):
        """Logits of tokens idx (B, T), or with targets (B, T) their loss in nats; targets of -1 are passed over.

        Without targets: (B, T, V), or (B, V) of each row's last real token when `lengths` are given.
        With targets: the mean, or with reduction="none" the loss of each target that counts, one after another.
        Positions reach block_size at most; a cache goes on where it stands.
        """
        x = self.hidden(idx, cache, lengths)
        if targets is None:
            if lengths is not None:
                x = x[torch.arange(len(x), device=x.device), torch.tensor(lengths, device=x.device) - 1]  # (B, C)
            return self.logits(x)
        x, targets = x.flatten(0, 1), targets.flatten()  # (B T, C), (B T)
        if reduction == "none":
            x, targets = x[targets >= 0], targets[targets >= 0]
        most = max(self.least_rows, self.logits_at_once[x.device.type] // self.config.vocab_size)
        chunk = -(-len(x) // -(-len(x) // most)) if len(x) else 1  # as many rows in each: a shape is compiled once
        if reduction == "mean" and torch.is_grad_enabled():
            total = ChunkedLoss.apply(x, self.head_weight, targets, self.loss_and_gradients, chunk)
            return total / (targets >= 0).sum()
        losses = torch.cat([self.row_losses(a, t) for a, t in zip(x.split(chunk), targets.split(chunk))])
        return losses if reduction == "none" else losses.sum() / (targets >= 0).sum()


# --- end of model ---


# --- optimizer: the same in every script (tests/test_copies.py) ---

# Coefficients of five odd quintic polynomials that together take singular values in [0.001, 1] close to 1: the Polar
# Express of Amsel et al. 2025 (arXiv 2505.16932). The first also divides by 1.01: a norm in bf16 may be too small.
POLAR_EXPRESS = (
    (8.156554524902461 / 1.01, -22.48329292557795 / 1.01**3, 15.878769915207462 / 1.01**5),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(G, dtype=torch.bfloat16, coefficients=POLAR_EXPRESS):
    """The nearest (semi-)orthogonal matrix to each of G (..., rows, cols), nearly: U S V^T becomes about U V^T.

    One matrix polynomial a X + b (X X^T) X + c (X X^T)^2 X for each triple (a, b, c), computed in `dtype`.
    """
    X = G.to(dtype)
    if G.size(-2) > G.size(-1):
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value above 1
    for a, b, c in coefficients:
        A = X @ X.mT
        A = torch.baddbmm(A, A, A, beta=b, alpha=c) if A.ndim == 3 else b * A + c * (A @ A)
        X = torch.baddbmm(X, A, X, beta=a) if A.ndim == 3 else a * X + A @ X
    return X.mT if G.size(-2) > G.size(-1) else X


def orthogonalize_shared(stack, dtype, coefficients):
    """orthogonalize a stack (N, rows, cols) that every rank holds: each rank does its share, all get the whole."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return orthogonalize(stack, dtype, coefficients)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    share = -(-len(stack) // ranks)
    padded = torch.cat([stack, stack.new_zeros(share * ranks - len(stack), *stack.shape[1:])])
    mine = orthogonalize(padded[rank * share : (rank + 1) * share], dtype, coefficients)
    shares = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(shares, mine.contiguous())
    return torch.cat(shares)[: len(stack)]


def muon_step(params, states, lr, momentum, weight_decay, dtype=torch.bfloat16, coefficients=POLAR_EXPRESS):
    """Step along the orthogonalised Nesterov momentum: Muon, Jordan et al. 2024, kellerjordan.github.io/posts/muon.

    The last two dimensions of a parameter are a matrix, those before them stack several. The step is
    lr * sqrt(max(1, rows / cols)) long; weight decay is decoupled and scaled by lr. Matrices of one shape are
    orthogonalised in one call. Under torchrun the gradients must be the same on all ranks.
    """
    shapes = {}
    for p, state in zip(params, states):
        shapes.setdefault(p.shape[-2:], []).append((p, state.setdefault("momentum", torch.zeros_like(p))))
    for (rows, cols), pairs in shapes.items():
        params, momenta = map(list, zip(*pairs))
        grads = [p.grad for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, momenta, momentum)  # Nesterov
        stack = torch.cat([u.view(-1, rows, cols).to(dtype) for u in updates])  # (N, rows, cols)
        stack = orthogonalize_shared(stack, dtype, coefficients).to(params[0].dtype)
        updates = stack.split([p.numel() // (rows * cols) for p in params])
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        scale = lr * max(1, rows / cols) ** 0.5
        torch._foreach_add_(params, [u.view_as(p) for u, p in zip(updates, params)], alpha=-scale)


def adamw_step(params, states, lr, betas, eps=1e-10, weight_decay=0.0):
    """AdamW (Loshchilov and Hutter 2019) by PyTorch's own kernel, without the imports that torch.optim needs."""
    for p, state in zip(params, states):
        if not state:
            state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] = torch.zeros((), device=p.device)
        state["step"] += 1
    moments = [[state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")]
    steps = [state["step"] for state in states]
    settings = dict(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
    torch._fused_adamw_(
        params, [p.grad for p in params], *moments, [], steps, amsgrad=False, maximize=False, **settings
    )


class Optimizer:
    """Muon for the matrices inside the blocks, AdamW for embedding and head.

    groups: dicts of names, params, lr and the step's other settings, to change at will between steps.
    state: {parameter name: {tensor name: tensor}}, the same for any number of ranks; what a checkpoint keeps.
    """

    def __init__(self, model, matrix_lr, down_lr, embed_lr, head_lr, momentum, weight_decay, betas, dtype, ns_steps=5):
        named = dict(model.named_parameters())
        down = [name for name in named if name.startswith("blocks.") and name.endswith(".down")]
        matrices = [name for name in named if name.startswith("blocks.") and name not in down]
        muon = dict(momentum=momentum, weight_decay=weight_decay, dtype=dtype, coefficients=POLAR_EXPRESS[:ns_steps])
        self.groups = [
            dict(step=muon_step, names=matrices, lr=matrix_lr, **muon),
            dict(step=muon_step, names=down, lr=down_lr, **muon),  # the MLP's second matrix
            dict(step=adamw_step, names=["embed"], lr=embed_lr, betas=betas),
            dict(step=adamw_step, names=["head"], lr=head_lr, betas=betas),
        ]
        for group in self.groups:
            group["names"] = [name for name in group["names"] if name in named]  # a tied head is the embedding
            group["params"], group["base_lr"] = [named[name] for name in group["names"]], group["lr"]
        self.groups = [group for group in self.groups if group["names"]]
        names = [name for group in self.groups for name in group["names"]]
        assert sorted(names) == sorted(named), "each parameter belongs to exactly one group"
        self.state = {name: {} for name in named}

    def set_lr(self, factor):
        for group in self.groups:
            group["lr"] = group["base_lr"] * factor

    @torch.no_grad()
    def step(self):
        for group in self.groups:
            settings = {k: v for k, v in group.items() if k not in ("step", "names", "params", "base_lr")}
            group["step"](group["params"], [self.state[name] for name in group["names"]], **settings)


# --- end of optimizer ---


# --- save checkpoint: the same in every script (tests/test_copies.py) ---


def save_checkpoint(path, checkpoint):
    """Write a dict of plain values and tensors so that `path` is at every moment either the old file or the new one.

    Exits with code 1 when the disk refuses; the old file then still stands.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        fail(f"{path}: could not be written ({str(error).splitlines()[0]}); what was saved before is whole", code=1)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


# --- end of save checkpoint ---


# --- load checkpoint: the same in every script (tests/test_copies.py) ---


def load_checkpoint(path):
    """Open a checkpoint (format 1) without executing anything that it may hold; on the CPU, mapped from the disk."""
    try:
        open(path, "rb").close()
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged files raise nearly everything
        unsafe = "weights_only" in str(error).lower() and "unsupported" in str(error).lower()
        fail(f"{path}: {'holds code to execute, so it was not opened' if unsafe else 'is not a checkpoint'}")
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != 1:
        fail(f"{path}: is not a checkpoint of these scripts (no 'format': 1)")
    for key in ("config", "tokenizer", "model"):
        if key not in checkpoint:
            fail(f"{path}: is a checkpoint without '{key}'")
    return checkpoint


# --- end of load checkpoint ---


# --- load model: the same in every script (tests/test_copies.py) ---


def checkpoint_path(path):
    """The type of a flag that takes a checkpoint, or the folder of a run: its best.pt, or else its newest ckpt_*.pt."""
    if not os.path.isdir(path):
        return path
    try:
        names = [name for name in os.listdir(path) if name.endswith(".pt") and name.startswith(("best", "ckpt"))]
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}") from None
    if not names:
        raise argparse.ArgumentTypeError(f"{path}: no checkpoint in this folder")
    return os.path.join(path, max(names, key=lambda name: (name == "best.pt", len(name), name)))


def load_model(path, checkpoint, device, dtype, weights=torch.float32):
    """The GPT of a checkpoint opened from `path`: activations in dtype, weights in `weights`, evaluation mode."""
    try:
        config = dict(checkpoint["config"])
        if "kind" in config:
            fail(f"{path}: a {config['kind']} model, which only train_char.py runs; this takes those of --model gpt")
        with torch.device("meta"):  # nothing is initialised only to be replaced
            model = GPT(Config(**config), dtype)
        model.load_state_dict(checkpoint["model"], assign=True)
        model.cos, model.sin = rotary_tables(model.config.block_size, model.config.n_embd // model.config.n_head)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        fail(f"{path}: its config and weights do not fit together ({str(error).splitlines()[0]})")
    tokens = get_tokenizer(checkpoint["tokenizer"]).n_vocab
    if tokens != model.config.vocab_size:
        fail(f"{path}: the model has {model.config.vocab_size} tokens, its tokenizer {tokens}")
    for p in model.parameters():
        p.data = p.data.to(device, weights)
    model.cos, model.sin = model.cos.to(device), model.sin.to(device)
    return model.eval()


# --- end of load model ---


# --- generate: the same in every script (tests/test_copies.py) ---


def sample(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Next tokens (B,) from logits (B, V) and uniform numbers u (B,): where the cumulative distribution passes u.

    temperature 0 is greedy; top_k 0 and top_p 1 leave every token possible.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)
        p = p.masked_fill(p.cumsum(-1) - p > top_p, 0)  # the first token always stays
        logits = torch.zeros_like(p).scatter(-1, order, p).log()
    cdf = logits.softmax(-1).cumsum(-1)  # (B, V), ends near 1
    target = u[:, None] * cdf[:, -1:]
    return torch.minimum((cdf <= target).sum(-1), (cdf < cdf[:, -1:]).sum(-1))  # never one of probability 0


@torch.inference_mode()
def generate(
    model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=0, indices=None, stop=(), ended=()
):
    """Continue prompts (lists of token ids, none empty); yields after each step a list of (row, new token).

    The number that decides the token at a position is drawn from (seed, index of the row, position) alone, so that a
    row's text does not depend on its batch. Rows end at a token in `stop`, which is still yielded, or when the caller
    puts them into `ended`. A row whose context window is full keeps the last half of it, and reads that again.
    """
    device, window = model.embed.device, model.config.block_size
    indices = range(len(prompts)) if indices is None else indices
    chances = [np.random.Philox(key=np.array([seed % 2**64, i], dtype=np.uint64)) for i in indices]
    texts, rows = [list(p) for p in prompts], list(range(len(prompts)))
    space = min(window, max(map(len, texts)) + max_new_tokens)
    cache = KVCache(model.config, len(rows), space, device, model.dtype)
    for step in range(max_new_tokens):
        if step % 1024 == 0:
            draws = np.stack([chance.random_raw(1024) for chance in chances])
            draws = torch.from_numpy((draws >> np.uint64(40)).astype(np.float32) / 2**24).to(device)  # in [0, 1)
        unread = {}  # {text: its rows}: each different text is read once, all but its last token
        for i, r in enumerate(rows):
            if step == 0 or cache.lengths[i] == window:
                text = texts[r] if len(texts[r]) <= window else texts[r][-max(1, window // 2) :]
                unread.setdefault(tuple(text[:-1]), []).append(i)
        if unread:
            lengths = list(map(len, unread))
            read = KVCache(model.config, len(unread), max(lengths), device, model.dtype)
            if max(lengths):
                idx = torch.tensor([text + (0,) * (max(lengths) - len(text)) for text in unread], device=device)
                model(idx, cache=read, lengths=lengths)
            for j, copies in enumerate(unread.values()):
                for i in copies:
                    cache.copy(i, read, j)
        idx = torch.tensor([[texts[r][-1]] for r in rows], device=device)
        logits = model(idx, cache=cache)[:, -1]
        tokens = sample(logits, draws[rows, step % 1024], temperature, top_k, top_p).tolist()
        for r, token in zip(rows, tokens):
            texts[r].append(token)
        yield list(zip(rows, tokens))
        for i in reversed(range(len(rows))):
            if tokens[i] in stop or rows[i] in ended:  # the last row takes its place
                cache.copy(i, cache, len(rows) - 1)
                rows[i] = rows[-1]
                rows.pop()
        if not rows:
            return
        cache.keep(len(rows))


# --- end of generate ---


# --- log: the same in every script (tests/test_copies.py) ---


class Log:
    """What a run leaves behind: log.txt (first the script itself and the machine), log.jsonl, and a progress line.

    mode "a" goes on with the files of a run that was interrupted. Of several ranks only the first says anything.
    """

    def __init__(self, out_dir, device, mode="w"):
        self.silent, self.live, self.shown, self.next = int(os.environ.get("RANK", 0)) > 0, sys.stderr.isatty(), 0, 0.0
        names = "log.txt", "log.jsonl", "stories.jsonl"
        paths = [os.devnull if self.silent else os.path.join(out_dir, name) for name in names]
        try:
            os.makedirs(out_dir, exist_ok=True)
            self.txt, self.jsonl, self.stories = (open(path, mode, encoding="utf-8") for path in paths)
        except OSError as error:
            fail(f"--out_dir {out_dir}: {error.strerror}")
        with open(sys.argv[0], encoding="utf-8") as f:
            self.txt.write(f.read() + "=" * 100 + "\n")
        cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
        versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
        self.txt.write(f"{' '.join(sys.argv)}\n{versions}, {name}\n")

    def line(self, text):
        """A line on the terminal and in log.txt."""
        if self.silent:
            return
        if self.shown:
            print("\r" + " " * self.shown + "\r", end="", file=sys.stderr, flush=True)
            self.shown = 0
        print(text, flush=True)
        self.txt.write(text + "\n")
        self.txt.flush()

    def row(self, file=None, **values):
        """A line of log.jsonl, or of another of the files."""
        file = file or self.jsonl
        file.write(json.dumps(values) + "\n")
        file.flush()

    def progress(self, text, every=5.0):
        """One line on stderr that is written over; plain lines, `every` seconds at most, when that is no terminal."""
        if self.silent or time.perf_counter() < self.next:
            return
        self.next = time.perf_counter() + (0.1 if self.live else every)
        start, end = ("\r", "") if self.live else ("", "\n")
        print(f"{start}{text:<{self.shown}}", end=end, file=sys.stderr, flush=True)
        self.shown = len(text) if self.live else 0


# --- end of log ---


# --- shards: the same in every script (tests/test_copies.py) ---


class Shards:
    """Token shards as one endless stream, read through memory maps: after the last comes the first again.

    A shard is 256 little-endian int32 (20240520, 1, number of tokens, zeros), then uint16 tokens. Exits at the start
    when there is none, or when a file is not one or is not as long as its header says.
    """

    def __init__(self, pattern, flag, vocab_size):
        self.paths, self.vocab_size, self.counts = sorted(glob.glob(pattern)), vocab_size, []
        for path in self.paths:
            try:
                size, header = os.path.getsize(path), np.fromfile(path, "<i4", 256)
            except OSError as error:
                fail(f"{flag}: {path}: {error.strerror}")
            if len(header) < 256 or tuple(header[:2]) != (20240520, 1):
                fail(f"{flag}: {path}: not a token shard (it should begin with the int32 20240520 and 1)")
            if size != 1024 + 2 * int(header[2]):
                fail(f"{flag}: {path}: {size:,} bytes, but {header[2]:,} tokens take {1024 + 2 * int(header[2]):,}")
            self.counts.append(int(header[2]))
        self.ends = np.cumsum(self.counts)  # where in the stream each shard ends
        if sum(self.counts) < 2:
            demo = "python data/prepare.py data/plain.txt --tokenizer bytes --out data/plain"
            fail(f"{flag} {pattern}: no tokens there; make some by: python data/fineweb.py (or, for the demo: {demo})")

    def read(self, position, n):
        """n tokens from `position` of the stream on: (n,) int64 on the CPU."""
        parts = []
        while n:
            position %= int(self.ends[-1])
            i = int(np.searchsorted(self.ends, position, side="right"))
            left = int(self.ends[i]) - position
            start = 1024 + 2 * (self.counts[i] - left)
            part = np.memmap(self.paths[i], "<u2", "r", offset=start, shape=min(n, left))
            if part.max() >= self.vocab_size:
                code = 1 if dist.is_initialized() else 2  # of several ranks, only this one may have met it
                fail(f"{self.paths[i]}: token {part.max()} is outside the vocabulary of {self.vocab_size}", code)
            parts.append(part)
            position, n = position + len(part), n - len(part)
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def get_batch(shards, position, B, T, device):
    """Inputs and targets (B, T) from the stream; copied to a GPU while that still works on what came before."""
    tokens = shards.read(position, B * T + 1)
    tokens = tokens.pin_memory() if device.type == "cuda" else tokens
    tokens = tokens.to(device, non_blocking=True)
    return tokens[:-1].view(B, T), tokens[1:].view(B, T)


# --- end of shards ---


# --- resume: the same in every script (tests/test_copies.py) ---


def add_up(values, device):
    """The sum of each number over all ranks."""
    if dist.is_initialized():
        values = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(values)
        values = values.tolist()
    return values


def checkpoints(out_dir):
    """The checkpoints of a run, the newest first."""
    paths = glob.glob(os.path.join(glob.escape(out_dir), "ckpt_*.pt"))
    steps = {path: int(found[1]) for path in paths if (found := re.search(r"ckpt_(\d+)\.pt$", path))}
    return sorted(steps, key=steps.get, reverse=True)


def weights_of(out_dir):
    """All files of weights that runs left in a folder."""
    names = glob.glob("*.pt", root_dir=out_dir)
    return [os.path.join(out_dir, name) for name in names if re.fullmatch(r"((ckpt|milestone)_\d+|best)\.pt", name)]


def last_good(out_dir):
    """How a message ends that says why the run has ended."""
    newest = checkpoints(out_dir)[:1]
    return f"{newest[0]} is the last good checkpoint, --resume goes on from it" if newest else "nothing was saved"


def rewind(out_dir, step):
    """Drop from the logs what came after the checkpoint of `step`: it will come again."""
    for name in ("log.jsonl", "stories.jsonl"):
        path, kept = os.path.join(out_dir, name), []
        with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                with contextlib.suppress(ValueError):  # a line that the end of the run cut short
                    row = json.loads(line)
                    if row["step"] < step or (row["step"] == step and "train_loss" in row):
                        kept.append(line)
            with open(f"{path}.tmp", "w", encoding="utf-8") as new:
                new.writelines(kept)
            os.replace(f"{path}.tmp", path)


def resume(model, optimizer, tokenizer, paths):
    """Load the first whole one of the checkpoints `paths` for going on with it; returns its `train`, or None.

    Rank 0 chooses and reads, the other ranks receive. Without a checkpoint they receive rank 0's weights all the same.
    Damaged checkpoints are named on stderr and renamed. Exits when none of them is whole, or when the config or the
    tokenizer is not the one that is to be trained.
    """
    checkpoint, head, damaged = None, [None], []
    if paths and int(os.environ.get("RANK", 0)) == 0:
        for path in paths:
            with contextlib.suppress(SystemExit):  # load_checkpoint says why
                found = load_checkpoint(path)
                if "optimizer" in found.get("train", {}):
                    checkpoint = found
                    break
                print(f"{path}: holds no state of the optimizer", file=sys.stderr)
            damaged.append(path)
        head = [f"--resume: none of {', '.join(paths)} can be gone on with"]
    if checkpoint:
        for old in damaged:
            os.replace(old, f"{old}.damaged")  # it would count as one of the newest
        train = checkpoint["train"]
        shapes = {name: {key: t.shape for key, t in state.items()} for name, state in train["optimizer"].items()}
        head = [{**checkpoint, "model": None, "train": {**train, "optimizer": None}, "path": path, "shapes": shapes}]
    if dist.is_initialized():
        dist.broadcast_object_list(head, src=0)
    if isinstance(head[0], str):
        fail(head[0])
    if head[0]:
        theirs, ours = head[0]["config"], dataclasses.asdict(model.config)
        for key in ours:
            if ours[key] != theirs.get(key):
                fail(f"--resume: {head[0]['path']} has {key} {theirs.get(key)}, the flags say {ours[key]}")
        if head[0]["tokenizer"] != tokenizer:
            fail(f"--resume: {head[0]['path']} has tokenizer {head[0]['tokenizer']}, the flags say {tokenizer}")
        for name, p in model.named_parameters():
            shapes = head[0]["shapes"][name]
            optimizer.state[name] = {key: torch.empty(shape, device=p.device) for key, shape in shapes.items()}
    for name, p in model.named_parameters():
        for key, tensor in (("", p.data), *optimizer.state[name].items()):
            if checkpoint:
                tensor.copy_(checkpoint["train"]["optimizer"][name][key] if key else checkpoint["model"][name])
            if dist.is_initialized():
                dist.broadcast(tensor, src=0)
    return head[0] and {**head[0]["train"], "path": head[0]["path"]}


# --- end of resume ---


# --- training: the same in every script (tests/test_copies.py) ---


def join_ranks(device):
    """This process's rank and their number; under torchrun they find each other here, else it is (0, 1)."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        on_gpu = device.type == "cuda"
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun keeps one store: a restart must not read old names
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        settings = dict(store=store, rank=rank, world_size=ranks, device_id=device if on_gpu else None)
        dist.init_process_group("nccl" if on_gpu else "gloo", **settings)
    return rank, ranks


def take_folder(flags):
    """Make --out_dir; exits when nothing can be written there, or when it holds a run that flags leave in peace."""
    try:
        os.makedirs(flags.out_dir, exist_ok=True)
    except OSError as error:
        fail(f"--out_dir {flags.out_dir}: {error.strerror}")
    if not os.access(flags.out_dir, os.W_OK):
        fail(f"--out_dir {flags.out_dir}: nothing can be written there")
    if weights_of(flags.out_dir) and not (flags.resume or flags.overwrite):
        fail(f"--out_dir {flags.out_dir}: holds an earlier run; --resume goes on with it, --overwrite removes it")


def clear_folder(flags, resumed, step):
    """Remove what an interrupted save left, and of an earlier run what came after `step`, or with --overwrite all."""
    for path in glob.glob(os.path.join(glob.escape(flags.out_dir), "*.pt.*.tmp")):
        os.remove(path)
    if resumed:
        rewind(flags.out_dir, step)
    elif flags.overwrite:
        for path in weights_of(flags.out_dir):
            os.remove(path)


def warm_up(model, optimizer, flags, train_step):
    """Compile, and take two steps at a rate of 0, before the clock starts: nothing is learned. Returns the seconds."""
    start, on_gpu = time.perf_counter(), model.embed.device.type == "cuda"
    compiled = on_gpu if flags.compile is None else flags.compile
    if compiled:
        model.compile_blocks()
    if compiled or on_gpu:
        optimizer.set_lr(0)
        for _ in range(2):
            train_step()
        optimizer.state = {name: {} for name in optimizer.state}
    return time.perf_counter() - start


def save_model(name, model, tokenizer, flags, step, train):
    """Write a checkpoint from rank 0, and remove the oldest; weights that are not finite end the run instead."""
    if int(os.environ.get("RANK", 0)) > 0:
        return
    if not all(p.isfinite().all() for p in model.parameters()):
        fail(f"the weights after step {step} are not finite; {last_good(flags.out_dir)}", code=1)
    whole = dict(format=1, config=dataclasses.asdict(model.config), tokenizer=tokenizer, model=model.state_dict())
    train = {**train, "step": step, "flags": vars(flags)}
    save_checkpoint(os.path.join(flags.out_dir, name), {**whole, "train": train})
    for old in checkpoints(flags.out_dir)[flags.keep :]:
        os.remove(old)


def catch_signals():
    """A list that Ctrl-C and SIGTERM are added to from now on, so that the step under way can be finished."""
    stopped = []

    def stop(number, _):
        stopped.append(number)
        if number == signal.SIGINT:  # a second Ctrl-C does not wait for the step to end
            signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return stopped


def check_loss(loss, step, out_dir):
    """End the run when the loss of a step is not finite."""
    if not math.isfinite(loss):
        if int(os.environ.get("RANK", 0)) == 0:
            fail(f"the loss is {loss} at step {step}: lower the rates; {last_good(out_dir)}", code=1)
        raise SystemExit(1)


def end_interrupted(stopped, out_dir):
    """End a run that was told to, and has saved."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{os.path.basename(sys.argv[0])}: interrupted; {last_good(out_dir)}", file=sys.stderr)
    if dist.is_initialized():
        dist.barrier()  # the first process to end would have torchrun end the others
    raise SystemExit(128 + (stopped or [signal.SIGTERM])[0])


@torch.no_grad()
def validate(model, shards, val_tokens, B, T, rank, ranks):
    """Mean loss in nats over the first val_tokens targets of the validation shards, or all when there are fewer."""
    n, device, losses = min(val_tokens, sum(shards.counts) - 1), model.embed.device, []
    model.eval()
    for start in range(rank * B * T, n, ranks * B * T):
        x, y = get_batch(shards, start, B, T, device)  # always the same shape: compiled once
        if start + B * T > n:
            y = y.flatten().index_fill(0, torch.arange(n - start, B * T, device=device), -1).view(B, T)
        losses.append(model(x, y) * min(B * T, n - start))
    model.train()
    return add_up([sum(torch.stack(losses).tolist()) if losses else 0.0], device)[0] / n


def show_story(model, tokenizer, flags, log, step):
    """Write a story from flags.prompt, and show it."""
    stop = [tokenizer.eot_token] if tokenizer.special_tokens_set else []
    story = stop + encode(tokenizer, flags.prompt, "--prompt")
    start = len(story)
    settings = dict(temperature=flags.temperature, seed=flags.seed, stop=stop)
    model.eval()
    for [(_, token)] in generate(model, [story], flags.max_new_tokens, **settings):
        story.append(token)
    model.train()
    text = tokenizer.decode([token for token in story if token not in stop])
    log.line(f"\n{text}\n")
    about = dict(tokens=len(story) - start, seed=flags.seed, checkpoint=f"{flags.out_dir}, step {step}")
    log.row(log.stories, id=step, step=step, prompt=flags.prompt, text=text, **about)


def memory(device):
    """Peak memory of this process in GiB: of the GPU's, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def run_training(train, flags):
    """train(flags); too little memory, and another process that has gone, get one line."""
    try:
        train(flags)
    except torch.OutOfMemoryError:
        why = f"out of memory: a --batch_size below {flags.batch_size}, or --recompute, takes less"
        fail(f"{why}; {last_good(flags.out_dir)}", code=1)
    except RuntimeError as error:  # what gloo and NCCL raise when another process has gone
        if "WORLD_SIZE" not in os.environ or not re.search("gloo|nccl|connection|peer", str(error), re.I):
            raise
        fail(f"another process was lost ({str(error).splitlines()[0]}); {last_good(flags.out_dir)}", code=1)


# --- end of training ---


class Passes:
    """Arrays joined to one endless stream: each pass holds all of them once, in an order drawn from (seed, pass)."""

    def __init__(self, parts, seed):
        self.parts, self.counts, self.seed, self.number = parts, list(map(len, parts)), seed % 2**64, None

    def read(self, position, n):
        """n rows from `position` of the stream on: (n, ...) int64 on the CPU."""
        found = []
        while n:
            number, start = divmod(position, sum(self.counts))
            if number != self.number:
                order = np.random.default_rng([self.seed, number]).permutation(len(self.parts))
                self.number, self.rows = number, np.concatenate([self.parts[i] for i in order])
            found.append(self.rows[start : start + n])
            position, n = position + len(found[-1]), n - len(found[-1])
        return torch.from_numpy(np.concatenate(found).astype(np.int64))


def hold_out(parts, share, seed):
    """(what to learn from, what to validate on): a share of the parts, one at least, drawn by the seed."""
    order = np.random.default_rng(seed % 2**64).permutation(len(parts)).tolist()
    n = min(max(1, round(share * len(parts))), len(parts) - 1)
    return [parts[i] for i in sorted(order[n:])], [parts[i] for i in sorted(order[:n])]


def fingerprint(arrays):
    """The sha256 of the bytes of arrays, one after another."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def tokenize(tokenizer, text, name):
    """The tokens of a text: (n,) int32."""
    if tokenizer.name == "bytes":  # tiktoken looks each byte up as if it were a word, which takes 1000 times as long
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return np.array(encode(tokenizer, text, name), np.int32)


def opening(tokenizer):
    """What every story stands behind: <|endoftext|>, or the empty line that train_char.py has between documents."""
    if tokenizer.special_tokens_set:
        return np.array([tokenizer.eot_token], np.int32)
    newline = "\n" in tokenizer.decode(list(range(tokenizer.n_vocab)))
    return tokenize(tokenizer, "\n\n" if newline else "", "--data")


def read_stories(path, tokenizer):
    """The stories of a .txt, a .jsonl or token shards: arrays of tokens, without empty ones and repetitions."""
    start = opening(tokenizer)
    if path.endswith(".bin"):
        if not tokenizer.special_tokens_set:
            fail(f"--data {path}: this checkpoint knows characters, it takes a .txt or a .jsonl")
        shards = Shards(path, "--data", 2**16)
        tokens = shards.read(0, sum(shards.counts)).numpy().astype(np.int32)
        texts = [part[part != start] for part in np.split(tokens, np.flatnonzero(tokens == start))]
    else:
        texts = [tokenize(tokenizer, text, path) for text in documents(path) if text.strip()]
    different = {text.tobytes(): text for text in texts if len(text)}  # what is held out must not be learned from
    return [np.concatenate([start, text]) for text in different.values()]


def written_by_a_model(path):
    """Whether a file holds stories that were sampled: a .jsonl whose lines have a prompt."""
    if not path.lower().endswith(".jsonl"):
        return False
    return "prompt" in json.loads(next(line for line in read_lines(path) if line.strip()))


def read_groups(path, tokenizer, window, against, seed):
    """The groups of a ranking that have a winner.

    Returns stories, [(tokens, where the continuation begins)], each up to the end of the window; (n, 2) arrays of the
    places of winner and loser in that list, one array a group; and how many groups were left out: undecided ones, and
    those where nothing follows the prompt. That a story ends is not learned from: a ranking does not say whether it
    ended by itself or was cut.
    """
    stories, groups, left_out, start = [], [], 0, opening(tokenizer)
    chance = np.random.default_rng(seed % 2**64)
    for line_number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            best, told = row["best"], {key: (story["prompt"], story["text"]) for key, story in row["stories"].items()}
            good = len(told) > 1 and (best is None or best in told)
            good = good and all(text.startswith(prompt) for prompt, text in told.values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            good = False
        if not good:
            wanted = '"best", and "stories" that have "prompt" and "text"; best.jsonl is for --method sft'
            fail(f"{path}:{line_number}: not a group of a ranking ({wanted})")
        places = {}
        for key, (prompt, text) in told.items() if best else ():
            pieces = [piece.encode("utf-8", "replace").decode() for piece in (prompt, text[len(prompt) :])]
            before, after = (tokenize(tokenizer, piece, f"{path}:{line_number}") for piece in pieces)
            tokens, begin = np.concatenate([start, before, after])[: window + 1], max(1, len(start) + len(before))
            if len(tokens) > begin:
                places[key] = len(stories)
                stories.append((tokens, begin))
        losers = [place for key, place in places.items() if key != best]
        if best in places and losers:
            losers = losers if against == "all" else [losers[chance.integers(len(losers))]]
            groups.append(np.array([(places[best], loser) for loser in losers]))
        else:
            left_out += 1
    return stories, groups, left_out


def story_logps(model, stories):
    """Log-probabilities of the continuations of stories (tokens, where they begin), summed over tokens: (stories,)."""
    T, device = max(len(tokens) for tokens, _ in stories) - 1, model.embed.device
    idx, targets = np.zeros((len(stories), T), np.int64), np.full((len(stories), T), -1)
    for row, (tokens, begin) in enumerate(stories):
        idx[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, begin - 1 : len(tokens) - 1] = tokens[begin:]
    idx, targets = torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device)  # (B, T)
    x, y = model.hidden(idx)[targets >= 0], targets[targets >= 0]  # (N, C), (N,)
    chunk = max(model.least_rows, model.logits_at_once[device.type] // model.config.vocab_size)
    losses = torch.cat(  # the logits of a chunk are not kept, but computed again in the backward pass
        [recompute(model.row_losses, a, b, use_reentrant=False) for a, b in zip(x.split(chunk), y.split(chunk))]
    )
    return -torch.stack([part.sum() for part in losses.split([len(tokens) - begin for tokens, begin in stories])])


def preferences(logps, reference, pairs, beta):
    """Of pairs (n, 2) of winner and loser, places in `logps` and `reference`: losses, reward margins, and 1 where the
    winner's reward is the higher, 0.5 where both are equal (n,).

    Direct preference optimisation, equation 7 of Rafailov et al. 2023: the reward of a continuation is beta times how
    much likelier it has become than it was to the first weights.
    """
    rewards = beta * (logps - reference)
    margins = rewards[pairs[:, 0]] - rewards[pairs[:, 1]]
    return -F.logsigmoid(margins), margins, (margins.sign() + 1) / 2


@torch.no_grad()
def score_stories(model, stories, chosen, B, rank, ranks):
    """story_logps of the chosen ones among all stories, B at a time, shared by the ranks: (stories,), 0 elsewhere."""
    order, logps = sorted(chosen, key=lambda i: len(stories[i][0])), [0.0] * len(stories)
    model.eval()
    for some in [order[i : i + B] for i in range(0, len(order), B)][rank::ranks]:
        for i, logp in zip(some, story_logps(model, [stories[i] for i in some]).tolist()):
            logps[i] = logp
    model.train()
    return torch.tensor(add_up(logps, model.embed.device), device=model.embed.device)


def settle(flags, base, config, size):
    """Decide on what no flag says, for `size` tokens or pairs in a pass: settings of pretraining as in the checkpoint.

    Rates stay as they were before --lr_scale, so that what was fine-tuned can be fine-tuned again at the same rates.
    Returns the number of steps, and the names of the settings that were taken from PRETRAINING.
    """
    sft, theirs = flags.method == "sft", base.get("train", {}).get("flags", {})
    theirs = {key: value for key, value in theirs.items() if isinstance(value, (int, float))}
    if flags.down_lr is None:  # as in train_gpt.py; train_char.py has one rate for both
        flags.down_lr = theirs.get("down_lr", theirs.get("matrix_lr")) if flags.matrix_lr is None else flags.matrix_lr
    usual, taken = {**PRETRAINING, **(TIED if config.tie_weights else {})}, []
    for key, value in usual.items():
        if getattr(flags, key) is None:
            taken += [key] if key not in theirs else []
            setattr(flags, key, theirs.get(key, value))
    flags.lr_scale = (0.1 if sft else 0.2) if flags.lr_scale is None else flags.lr_scale
    used = ("matrix_lr", "down_lr", "embed_lr") + (() if config.tie_weights else ("head_lr",))
    if not flags.lr_scale or not any(getattr(flags, key) for key in used):
        fail(f"--lr_scale {flags.lr_scale:g}: nothing would be learned; rates and scale must be above 0")

    if flags.max_tokens and (flags.epochs is not None or not sft):
        fail("--max_tokens: is for sft, and takes the place of --epochs")
    if sft and flags.epochs is None and flags.max_tokens is None and written_by_a_model(flags.data):
        flags.max_tokens = 50_000
    if flags.max_tokens is None and flags.epochs is None:
        flags.epochs = 3.0 if sft else 2.0
    amount, T = flags.max_tokens or flags.epochs * size, flags.block_size
    if sft and flags.total_batch_size is None:  # a power of two suits most numbers of processes
        most = min(amount / 100, theirs.get("total_batch_size", 2**19))
        flags.total_batch_size = T * 2 ** int(math.log2(max(1, most / T)))
    if sft and flags.total_batch_size % T:
        fail(f"--total_batch_size {flags.total_batch_size}: not a multiple of {T} (--block_size)")
    steps = math.ceil(amount / (flags.total_batch_size if sft else flags.pairs))
    if not steps:
        fail(f"--epochs {flags.epochs:g}: nothing would be learned")
    for key, times in (("val_loss_every", 10), ("sample_every", 3)):
        if getattr(flags, key) is None:
            setattr(flags, key, -(-steps // times))
    return steps, taken


def check_resumed(flags, resumed, about):
    """Exit when a checkpoint is of a run that did something else."""
    path = resumed["path"]
    if resumed.get("parent", {}).get("sha256") != about["parent"]["sha256"]:
        fail(f"--resume: {path} was not fine-tuned from the weights in {flags.init}")
    if resumed["data"] != about["data"]:
        fail(f"--resume: {path} has learned from something else than what {flags.data} holds now")
    for key, value in vars(flags).items():
        if key not in FREE and resumed["flags"].get(key) != value:
            fail(f"--resume: {path} has --{key} {resumed['flags'].get(key)}, the flags say {value}")


def train(flags):
    device, dtype = get_device(flags.device, flags.dtype)
    rank, ranks = join_ranks(device)
    out_dir, sft = flags.out_dir, flags.method == "sft"
    base = load_checkpoint(flags.init)
    model = load_model(flags.init, base, device, dtype).train()
    model.recompute = flags.recompute
    for p in model.parameters():
        p.data = p.data.clone()  # in memory, no longer in the file
    if os.path.dirname(os.path.realpath(flags.init)) == os.path.realpath(out_dir):
        fail(f"--out_dir {out_dir}: is where {flags.init} lies, which is never written over; give another folder")
    T = flags.block_size = flags.block_size or model.config.block_size
    if T > model.config.block_size:
        fail(f"--block_size {T}: {flags.init} has a window of {model.config.block_size}")
    tokenizer = get_tokenizer(base["tokenizer"])
    if not flags.prompt and not tokenizer.special_tokens_set:
        fail("--prompt: empty, and this checkpoint needs a character to begin with")

    if sft:
        stories, parts, left_out, unit = [], read_stories(flags.data, tokenizer), 0, "different stories"
    else:
        stories, parts, left_out = read_groups(flags.data, tokenizer, T, flags.against, flags.seed)
        unit = "groups with a winner"
    largest = max((tokens.max() for tokens in (parts if sft else [tokens for tokens, _ in stories])), default=0)
    if largest >= model.config.vocab_size:
        fail(f"--data {flags.data}: token {largest} is outside the vocabulary of {model.config.vocab_size}")
    if len(parts) < 2:
        fail(f"--data {flags.data}: fewer than two {unit}; one is learned from and one validated on, at least")
    learned, held = (Passes(some, flags.seed) for some in hold_out(parts, flags.val_share, flags.seed))
    size, held_size = sum(learned.counts), sum(held.counts)  # tokens or pairs
    steps, taken = settle(flags, base, model.config, size)
    weights = (tensor.contiguous().view(torch.uint8).numpy() for tensor in base["model"].values())
    parent = dict(path=flags.init, step=base.get("train", {}).get("step"), sha256=fingerprint(weights))
    about = dict(parent=parent, data=fingerprint([*parts, *(piece for story in stories for piece in story)]))
    take_folder(flags)

    rates = [flags.lr_scale * rate for rate in (flags.matrix_lr, flags.down_lr, flags.embed_lr, flags.head_lr)]
    settings = flags.momentum, flags.weight_decay, (flags.beta1, flags.beta2), dtype, flags.ns_steps
    optimizer = Optimizer(model, *rates, *settings)
    B, total = flags.batch_size, flags.total_batch_size if sft else flags.pairs
    names, noun = (["loss"], "tokens") if sft else (["loss", "margin", "accuracy"], "pairs")
    reference = torch.zeros(len(stories), device=device)  # log-probabilities by the first weights

    def parts_of_sft(step):
        """This rank's rows of a step, B at a time: their part of the step's mean loss."""
        rows = total // T
        first, last = rank * rows // ranks, (rank + 1) * rows // ranks
        for i in range(first, last, B):
            n = min(B, last - i)
            yield [model(*get_batch(learned, step * total + i * T, n, T, device)) * (n / rows)]

    def parts_of_dpo(step):
        """This rank's pairs of a step, B // 2 at a time: their parts of the step's mean loss, margin and accuracy."""
        pairs = learned.read(step * total, total).tensor_split(ranks)[rank]  # (n, 2)
        for some in pairs.split(max(1, B // 2)) if len(pairs) else ():
            found, places = some.unique(return_inverse=True)  # a winner of several pairs is run once
            logps = story_logps(model, [stories[i] for i in found])
            yield [part.sum() / total for part in preferences(logps, reference[found.to(device)], places, flags.beta)]

    def train_step(step):
        """One step; returns this rank's parts of the means."""
        means = torch.zeros(len(names), device=device)
        for part in (parts_of_sft if sft else parts_of_dpo)(step):
            part[0].backward()
            means += torch.stack(part).detach()
        for p in model.parameters() if ranks > 1 else ():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # there can be fewer rows than ranks
            dist.all_reduce(p.grad)
        optimizer.step()
        model.zero_grad()
        return means.tolist()

    def evaluate():
        """The means over all that is held out."""
        if sft:
            rows = -(-held_size // (T * ranks))
            return [validate(model, held, held_size, min(B, rows), T, rank, ranks)]
        pairs = held.read(0, held_size)
        logps = score_stories(model, stories, pairs.unique().tolist(), B, rank, ranks)
        return [part.mean().item() for part in preferences(logps, reference, pairs.to(device), flags.beta)]

    warmup_time = warm_up(model, optimizer, flags, lambda: train_step(0))
    resumed = resume(model, optimizer, base["tokenizer"], checkpoints(out_dir) if flags.resume else [])
    if resumed:
        check_resumed(flags, resumed, about)
    nothing = [0] * (1 + len(names))  # steps since the last validation, and the sums of their means
    step, train_time, best_loss, waited, since = resumed["next"] if resumed else (0, 0.0, math.inf, 0, nothing)
    if rank == 0:
        clear_folder(flags, resumed, step)
    log = Log(out_dir, device, "a" if resumed else "w")
    log.line(
        f"{sum(p.numel() for p in model.parameters()):,} parameters on {ranks} x {device.type} in {str(dtype)[6:]}; "
        f"a step: {total:,} {noun}{f' in rows of {T}' if sft else ''}; warm-up {warmup_time:.1f} s"
    )
    log.line(
        f"{len(learned.parts):,} {unit} to learn from ({size:,} {noun}), {len(held.parts):,} held out ({held_size:,})"
        + (f", {left_out:,} other groups left out" if left_out else "")
    )
    log.line(
        f"{steps} steps, {steps * total / size:.2f} passes; rates of pretraining x {flags.lr_scale:g}: "
        + ", ".join(f"{key} {getattr(flags, key):g}" for key in ("matrix_lr", "down_lr", "embed_lr", "head_lr"))
    )
    if taken:
        log.line(f"{flags.init} does not tell {', '.join(taken)}: taken from train_gpt.py's presets")
    if resumed:
        log.line(f"resumed from {resumed['path']} at step {step}")
        reference = torch.tensor(resumed["reference"], device=device)
    elif not sft:
        log.line("scoring all stories by the first weights")
        for some in (held, learned):  # in the batches in which what is held out will be scored again
            chosen = some.read(0, sum(some.counts)).unique().tolist()
            reference += score_stories(model, stories, chosen, B, rank, ranks)

    def save(name, train):
        save_model(name, model, base["tokenizer"], flags, step, {**train, **about})

    def due(every):
        return step >= steps or (every and step % every == 0)

    stopped = catch_signals()
    first, first_time, stopping, done = step, train_time, 0, False
    while True:
        state = [step, train_time, best_loss, waited, since]
        everything = dict(optimizer=optimizer.state, next=state, reference=reference.tolist())
        if step > first and (stopping or due(flags.save_every)):
            save(f"ckpt_{step:06d}.pt", everything)
        if stopping:  # some rank was told to
            end_interrupted(stopped, out_dir)
        if due(flags.val_loss_every):
            (val_loss, *rest), took = evaluate(), 1000 * train_time
            better, best_loss = val_loss < best_loss, min(val_loss, best_loss)
            waited = 0 if better else waited + 1
            done = 0 < flags.patience <= waited
            more = {f"val_{name}": value for name, value in zip(names[1:], rest)}
            means = {f"train_{name}": value / max(1, since[0]) for name, value in zip(names, since[1:])}
            shown = {**more, **(means if since[0] else {})}
            log.line(
                f"step:{step}/{steps} val_loss:{val_loss:.4f} train_time:{took:.0f}ms "
                f"step_avg:{took / max(1, step):.2f}ms"
                + "".join(f" {name}:{value:.4f}" for name, value in shown.items())
                + f" (not below {best_loss:.4f} in {waited} validations: the end)" * done
            )
            log.row(step=step, val_loss=val_loss, **more, train_time_ms=round(took))
            if better and flags.patience:
                save("best.pt", {})
            since = nothing
        if flags.sample_every and due(flags.sample_every) and rank == 0:
            show_story(model, tokenizer, flags, log, step)
        if done and not due(flags.save_every):
            save(f"ckpt_{step:06d}.pt", everything)
        if done or step >= steps:
            break

        start = time.perf_counter()
        warmup, warmdown = max(1, flags.warmup_share * steps), max(1, flags.warmdown_share * steps)
        optimizer.set_lr(min(1.0, (step + 1) / warmup, (steps - step) / warmdown))
        *means, stopping = add_up([*train_step(step), len(stopped)], device)
        seconds = time.perf_counter() - start
        check_loss(means[0], step + 1, out_dir)
        step, train_time, since = step + 1, train_time + seconds, [a + b for a, b in zip(since, [1, *means])]
        average = (train_time - first_time) / (step - first)
        found = {f"train_{name}": value for name, value in zip(names, means)}
        rate = {"lr": optimizer.groups[0]["lr"], f"{noun}_per_s": round(total / seconds, 1)}
        log.row(step=step, **found, train_time_ms=round(1000 * train_time), **rate)
        log.progress(
            f"step {step}/{steps}  {'  '.join(f'{name} {value:.4f}' for name, value in zip(names, means))}  "
            f"{total / average:,.{0 if sft else 1}f} {noun}/s  {memory(device):.1f} GiB  "
            f"ETA {datetime.timedelta(seconds=round(average * (steps - step)))}"
        )
    if rank == 0:
        last = os.path.join(out_dir, "best.pt") if flags.patience else checkpoints(out_dir)[0]
        log.line(f"peak memory {memory(device):.1f} GiB; more stories: python sample.py {last}")
    if ranks > 1:
        dist.destroy_process_group()


def main():
    run_training(train, get_flags())


if __name__ == "__main__":
    run(main)
