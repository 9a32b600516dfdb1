"""
Pretrain a GPT on token shards, on one device or many.

    python train_gpt.py --preset demo                            a small model of bytes on a CPU (shards: see below)
    python train_gpt.py                                          GPT-2's 124M on FineWeb, on one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py        the same on eight: the same losses, sooner
    torchrun --standalone --nproc_per_node=8 train_gpt.py --preset 1.5B --resume

Shards come from `python data/fineweb.py`, or from your own texts by `python data/prepare.py`. While it trains it shows
the loss, the validation loss, the HellaSwag score and a story. Killed at any moment, the same command with --resume
goes on from the newest whole checkpoint as if nothing had happened, on the same number of processes or another.
In --out_dir: log.txt, log.jsonl, stories.jsonl, ckpt_*.pt (the newest --keep) and, for good, milestone_*.pt.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import contextlib
import dataclasses
import datetime
import glob
import json
import math
import os
import platform
import re
import signal
import sys
import threading
import time
import urllib.parse

import numpy as np
import requests
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")
FINEWEB = dict(
    tokenizer="gpt2",
    train_files=os.path.join(DATA, "fineweb10B", "fineweb_train_*.bin"),
    val_files=os.path.join(DATA, "fineweb10B", "fineweb_val_*.bin"),
    val_tokens=10_485_760,
    val_loss_every=250,
    hellaswag_every=1000,
    sample_every=1000,
    save_every=1000,
)
PRESETS = {
    "demo": dict(  # for a CPU: bytes of everyday prose
        **dict(tokenizer="bytes", train_files=os.path.join(DATA, "plain_train_*.bin")),
        **dict(val_files=os.path.join(DATA, "plain_val_*.bin"), val_tokens=2**20),
        **dict(n_layer=4, n_head=4, n_embd=256, block_size=256, batch_size=16, total_batch_size=4096),
        **dict(max_iters=300, warmup_iters=0, warmdown_iters=200),
        **dict(matrix_lr=0.03, embed_lr=0.3, head_lr=0.01, weight_decay=0.0),
        **dict(val_loss_every=100, hellaswag_every=0, sample_every=100, save_every=100, milestone_every=0),
    ),
    "124M": dict(  # GPT-2's size, for FineWeb's 3.28
        **FINEWEB,
        **dict(n_layer=12, n_head=6, n_embd=768, block_size=1024, batch_size=64, total_batch_size=2**19),
        **dict(max_iters=4600, warmup_iters=0, warmdown_iters=2760),
        **dict(matrix_lr=0.02, embed_lr=0.3, head_lr=0.008, weight_decay=0.0, milestone_every=0),
    ),
    "1.5B": dict(  # the original post's model and schedule
        **FINEWEB,
        **dict(n_layer=52, n_head=12, n_embd=1536, block_size=1024, batch_size=12, total_batch_size=491_520),
        **dict(tie_weights=True, embed_norm=False, logit_softcap=0.0),
        **dict(max_iters=15_258, warmup_iters=0, warmdown_iters=4359),
        **dict(matrix_lr=0.00705, down_lr=0.0141, embed_lr=0.0018, weight_decay=0.0, milestone_every=1000),
    ),
}
# Peak TFLOP/s of dense bf16 products with fp32 accumulation, from the makers' data sheets, by torch's device name.
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
    "NVIDIA B200": 2250,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A10G": 70,
    "NVIDIA L4": 121,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165,
}


def get_flags():
    flags, yes_no = Flags(), argparse.BooleanOptionalAction
    add = flags.add_argument
    add("--preset", default="124M", choices=list(PRESETS), help="the defaults of what follows")
    add("--train_files", help="token shards to learn from: a pattern, read in the order of their names")
    add("--val_files", help="token shards for the validation loss")
    add("--tokenizer", choices=["gpt2", "bytes"], help="what the shards' tokens are")
    add("--out_dir", default="out/gpt", help="where logs, stories and checkpoints go")
    add("--n_layer", type=number(int, 1), help="blocks")
    add("--n_head", type=number(int, 1), help="attention heads")
    add("--n_embd", type=number(int, 2), help="width")
    add("--block_size", type=number(int, 1), help="context window, in tokens")
    add("--tie_weights", default=False, action=yes_no, help="the head is the embedding")
    add("--embed_norm", default=True, action=yes_no, help="RMSNorm right after the embedding")
    add("--logit_softcap", type=number(float, 0), default=15.0, help="logits are squeezed into this; 0: not at all")
    add("--batch_size", type=number(int, 1), help="most rows of block_size tokens that a device takes at once")
    add("--total_batch_size", type=number(int, 1), help="tokens a step, over all devices and micro-batches")
    add("--max_iters", type=number(int, 1), help="training steps")
    add("--matrix_lr", type=number(float, 0), help="Muon's rate, for the matrices in the blocks")
    add("--down_lr", type=number(float, 0), help="Muon's rate for the MLP's second matrix; not given: --matrix_lr")
    add("--embed_lr", type=number(float, 0), help="AdamW's rate for the embedding")
    add("--head_lr", type=number(float, 0), default=0.008, help="AdamW's rate for the head, unless it is tied")
    add("--weight_decay", type=number(float, 0), help="of the matrices, times their rate")
    add("--momentum", type=number(float, 0, 0.9999), default=0.95, help="Muon's")
    add("--beta1", type=number(float, 0, 0.9999), default=0.8, help="AdamW's")
    add("--beta2", type=number(float, 0, 0.99999), default=0.95, help="AdamW's")
    add("--ns_steps", type=number(int, 1, 5), default=5, help="Muon's iterations")
    add("--warmup_iters", type=number(int, 0), help="steps in which the rates rise")
    add("--warmdown_iters", type=number(int, 0), help="last steps, in which the rates fall to 0")
    add("--val_loss_every", type=number(int, 0), help="steps between validations; 0: at the end only")
    add("--val_tokens", type=number(int, 1), help="tokens of a validation, at most")
    add("--target_loss", type=number(float, 0), default=0.0, help="end when the validation loss is as low as this")
    add("--hellaswag_every", type=number(int, 0), help="steps between HellaSwag scores; 0: never")
    add("--hellaswag_data", default=os.path.join(DATA, "hellaswag_val.jsonl"), help="downloaded when not there")
    add("--hellaswag_questions", type=number(int, 1), default=10_042, help="how many of them, from the first on")
    add("--sample_every", type=number(int, 0), help="steps between stories; 0: never")
    add("--prompt", default="It was a dark and stormy night", help="how a story begins")
    add("--max_new_tokens", type=number(int, 0), default=200, help="length of a story")
    add("--temperature", type=number(float, 0), default=0.8, help="0 is greedy")
    add("--save_every", type=number(int, 0), help="steps between checkpoints; 0: at the end only")
    add("--keep", type=number(int, 1), default=2, help="how many checkpoints, the newest, stay")
    add("--milestone_every", type=number(int, 0), help="steps between weights that stay for good; 0: none")
    add("--resume", default=False, action=yes_no, help="go on from the newest checkpoint in --out_dir, if any")
    add("--overwrite", default=False, action=yes_no, help="remove the checkpoints of an earlier run in --out_dir")
    add("--recompute", default=False, action=yes_no, help="activation checkpointing: less memory, a third slower")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the activations")
    add("--compile", action=yes_no, help="compile the blocks; not given: on CUDA only")
    add("--seed", type=int, default=1337, help="of the first weights and the stories")
    chosen = flags.parse_args([argument for argument in sys.argv[1:] if argument not in ("-h", "--help")])
    flags.set_defaults(**PRESETS[chosen.preset])
    flags = flags.parse_args()
    flags.down_lr = flags.matrix_lr if flags.down_lr is None else flags.down_lr
    return flags


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


# --- download: the same in every script (tests/test_copies.py) ---


class Progress:
    """One line on stderr about all downloads together: written over on a terminal, else a new one every 5 seconds."""

    def __init__(self, files=1):
        self.files, self.whole, self.done, self.sizes, self.fresh = files, 0, {}, {}, 0
        self.live, self.shown, self.start, self.next = sys.stderr.isatty(), 0, time.perf_counter(), 0.0
        self.lock = threading.Lock()  # downloads may run in threads

    def __call__(self, path, done, size, fresh=0, whole=False, note=""):
        """`done` of the `size` bytes (None: not known) of `path` are here, `fresh` of them since the last call."""
        with self.lock:
            self.done[path], self.sizes[path] = done, size
            self.fresh += fresh
            self.whole += whole
            now, last = time.perf_counter(), self.whole == self.files
            if now < self.next and not last:
                return
            done, rate = sum(self.done.values()), self.fresh / (now - self.start)
            text = f"{self.whole} of {self.files} files  {done / 1e6:,.1f} MB  {rate / 1e6:.1f} MB/s  "
            if sizes := [size for size in self.sizes.values() if size is not None]:
                total = sum(sizes) / len(sizes) * self.files  # the others are taken to be as long as these
                text = text.replace(" MB ", f" of {total / 1e6:,.1f} MB ")
                text += f"ETA {max(0, total - done) / rate:.0f} s  " if rate else ""
            text += note
            start, end = ("\r", "\n" if last else "") if self.live else ("", "\n")
            print(f"{start}{text:<{self.shown}}", end=end, file=sys.stderr, flush=True)
            self.next, self.shown = now + (0.1 if self.live else 5), 0 if end else len(text)

    def stop(self):
        """Leave the line, for good: a thread that still downloads can show nothing more."""
        self.lock.acquire()
        if self.shown:
            print(file=sys.stderr)


def download(url, path, check=None, retries=5, progress=None):
    """Fetch `url` to `path` over HTTP; raises OSError with one line that says why it could not.

    check(file) raises ValueError with what is wrong with a whole file. A `path` that is there and passes is left alone.
    What arrives is kept in path.part, where the next attempt, or the next call, goes on. `retries` failures in a row
    are forgiven, after waits of 1, 2, 4, ... seconds.
    """
    progress, check, part = progress or Progress(), check or (lambda file: None), f"{path}.part"
    name, host = os.path.basename(path), urllib.parse.urlsplit(url).netloc
    if os.path.exists(path):
        try:
            check(path)
            return progress(path, os.path.getsize(path), os.path.getsize(path), whole=True)
        except ValueError:
            pass  # fetched anew, and replaced when that is whole
    size, most, failures = None, 0, 0
    while True:
        have = os.path.getsize(part) if os.path.exists(part) else 0
        problem = f"cannot reach {host} (is there a network?)"
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-" if have else None}
        try:
            with requests.get(url, headers=headers, stream=True, timeout=30) as response:
                problem = f"{host} answers {response.status_code} {response.reason}"
                if response.status_code in (200, 206):
                    problem = "the connection was lost"
                    have = have if response.status_code == 206 else 0  # 200: all of it, whatever was asked for
                    length = response.headers.get("Content-Length")
                    size = have + int(length) if length else None
                    with open(part, "ab") as f:
                        f.truncate(have)
                        for piece in response.iter_content(2**16):
                            f.write(piece)
                            have += len(piece)
                            progress(path, have, size, len(piece))
                            if have > most:  # a server that starts again each time must not be asked for ever
                                most, failures = have, 0
                        f.flush()
                        os.fsync(f.fileno())
                    if size in (None, have):
                        break
                elif response.status_code == 416 and have:
                    if response.headers.get("Content-Range") == f"bytes */{have}":
                        break  # nothing is missing
                    os.remove(part)  # longer than the file: something else
                    continue
                elif response.status_code < 500 and response.status_code not in (408, 429):
                    failures = retries  # asking again would not help
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
            pass
        except OSError as error:  # of the disk, or an address that is none
            problem, failures = error.strerror or f"{url}: {type(error).__name__}", retries
        failures += 1
        if failures > retries:
            raise OSError(f"{name}: {problem}")
        wait = 2 ** (failures - 1)
        progress(path, have, size, note=f"{problem}, again in {wait} s")
        time.sleep(wait)
    try:
        check(part)
    except ValueError as error:
        os.remove(part)
        raise OSError(f"{name}: {error}") from None
    os.replace(part, path)
    progress(path, have, have, whole=True)


# --- end of download ---


# --- scorer: the same in every script (tests/test_copies.py) ---

HELLASWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"  # Zellers et al. 2019


def check_hellaswag(path):
    """Raises ValueError when a file is not as long as the validation set that is published."""
    size = os.path.getsize(path)
    if size != 12_246_618:
        raise ValueError(f"{size:,} bytes instead of 12,246,618")


def read_hellaswag(path):
    """The rows of HellaSwag's validation set, from a .jsonl file; exits naming the line that breaks the format."""
    rows = []
    try:
        with open(path, "rb") as f:
            for line_number, line in enumerate(f, 1):
                try:
                    row = json.loads(line)
                    texts = [row[key] for key in ("activity_label", "ctx_a", "ctx_b", "ctx")] + row["endings"]
                    good = len(texts) == 8 and all(isinstance(text, str) for text in texts) and all(texts[3:])
                    good = good and type(row["label"]) is int and 0 <= row["label"] <= 3
                except (ValueError, KeyError, TypeError, RecursionError):
                    good = False
                if not good:
                    fail(f"{path}:{line_number}: not a HellaSwag question (ctx, four endings, label from 0 to 3)")
                rows.append(row)
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    if not rows:
        fail(f"{path}: empty")
    return rows


def get_hellaswag(path, hint):
    """The rows of the file, which the first process of a machine downloads when it is not there."""
    if not os.path.exists(path) and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            download(HELLASWAG, path, check_hellaswag)
        except OSError as error:
            fail(f"{error}; {hint}")
    if dist.is_initialized():
        dist.barrier()
    return read_hellaswag(path)


def completion_question(encode, row, block_size):
    """(context, endings, their sizes in tokens): token ids of the text as it stands, each ending after a space.

    What is longer than the window loses the beginning of its context.
    """
    endings = [encode(" " + ending)[:block_size] for ending in row["endings"]]
    room = block_size + 1 - max(map(len, endings))  # the last token is predicted, never read
    return encode(row["ctx"])[-room:], endings, list(map(len, endings))


@torch.no_grad()
def score(model, questions, tokens_at_once=8192):
    """Cross-entropies of endings: yields (indices of some questions, losses (n, 4) in nats, summed over tokens).

    A context is run once and its endings go on from its keys and values. Questions come in the order of their lengths,
    endings in that of theirs, so that batches hold little padding; the head runs on what predicts an ending's token.
    """
    device, order = model.embed.device, sorted(range(len(questions)), key=lambda i: len(questions[i][0]))
    while order:
        longest = len(questions[order[-1]][0])  # longest first: what does not fit fails at once
        chosen = [order.pop() for _ in range(min(len(order), max(1, tokens_at_once // longest)))]
        contexts, lengths = [questions[i][0] for i in chosen], [len(questions[i][0]) for i in chosen]
        room = longest + max(len(ending) for i in chosen for ending in questions[i][1])
        cache = KVCache(model.config, len(chosen), room, device, model.dtype)
        idx = torch.tensor([context + [0] * (longest - len(context)) for context in contexts], device=device)
        logp = model(idx, cache=cache, lengths=lengths).log_softmax(-1)  # (n, V), after each context
        first = torch.tensor([[ending[0] for ending in questions[i][1]] for i in chosen], device=device)
        losses = -logp.gather(-1, first)  # (n, 4)
        rest = [(len(e) - 1, row, j) for row, i in enumerate(chosen) for j, e in enumerate(questions[i][1])]
        rest = sorted(item for item in rest if item[0])
        while rest:
            T = rest[-1][0]
            batch = [rest.pop() for _ in range(min(len(rest), max(1, tokens_at_once // (longest + T))))]
            rows, lengths = [row for _, row, _ in batch], [length for length, _, _ in batch]
            endings = [questions[chosen[row]][1][j] for _, row, j in batch]
            idx = torch.tensor([e[:-1] + [0] * (T + 1 - len(e)) for e in endings], device=device)  # (B, T)
            targets = torch.tensor([e[1:] + [-1] * (T + 1 - len(e)) for e in endings], device=device)
            found = model(idx, targets, cache=cache.rows(rows), lengths=lengths, reduction="none")
            sums = torch.stack([part.sum() for part in found.split(lengths)])
            losses[rows, [j for _, _, j in batch]] += sums
        yield chosen, losses.cpu()


# --- end of scorer ---


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


def hellaswag(model, questions, labels, rank, ranks):
    """Accuracies over completion-style questions, by the endings' summed losses and by their means over tokens."""
    mine, right = range(rank, len(questions), ranks), [0, 0]
    model.eval()
    for chosen, losses in score(model, [questions[i] for i in mine]):
        for n, four in zip(chosen, losses):
            sizes, label = torch.tensor(questions[mine[n]][2]), labels[mine[n]]
            right[0] += four.argmin().item() == label
            right[1] += (four / sizes).argmin().item() == label
    model.train()
    return [n / len(questions) for n in add_up(right, model.embed.device)]


def train(flags):
    device, dtype = get_device(flags.device, flags.dtype)
    rank, ranks = join_ranks(device)
    T, steps, out_dir, total = flags.block_size, flags.max_iters, flags.out_dir, flags.total_batch_size
    if total % (T * ranks):
        fail(f"--total_batch_size {total}: not a multiple of {T * ranks} (--block_size, times the processes)")
    rows = total // (T * ranks)  # of this rank, in a step
    B = max(n for n in range(1, min(rows, flags.batch_size) + 1) if rows % n == 0)
    vocab_size = {"gpt2": 50257, "bytes": 257}[flags.tokenizer]
    train_shards = Shards(flags.train_files, "--train_files", vocab_size)
    val_shards = Shards(flags.val_files, "--val_files", vocab_size)
    take_folder(flags)
    tokenizer = get_tokenizer(flags.tokenizer) if flags.sample_every or flags.hellaswag_every else None
    if flags.hellaswag_every:
        tests = get_hellaswag(flags.hellaswag_data, "--hellaswag_every 0 trains without it")
        tests = tests[: flags.hellaswag_questions]
        questions = [completion_question(tokenizer.encode_ordinary, row, T) for row in tests]
        labels = [row["label"] for row in tests]

    torch.manual_seed(flags.seed)
    sizes = vocab_size, T, flags.n_layer, flags.n_head, flags.n_embd
    try:
        model = GPT(Config(*sizes, flags.tie_weights, flags.embed_norm, flags.logit_softcap), dtype)
    except ValueError as error:
        fail(f"--n_embd {flags.n_embd}: {error}")
    model.to(device).recompute = flags.recompute
    rates = flags.matrix_lr, flags.down_lr, flags.embed_lr, flags.head_lr
    settings = flags.momentum, flags.weight_decay, (flags.beta1, flags.beta2), dtype, flags.ns_steps
    optimizer = Optimizer(model, *rates, *settings)

    pending, last_micro_step = [], False

    def reduce_gradient(p):  # is sent to the other ranks while backward goes on
        if last_micro_step:
            pending.append(dist.all_reduce(p.grad, async_op=True))

    for p in model.parameters() if ranks > 1 else ():
        p.register_post_accumulate_grad_hook(reduce_gradient)

    def train_step(position, micro_steps):
        """One step on the tokens from `position` on; returns this rank's part of the mean loss."""
        nonlocal last_micro_step
        loss = 0.0
        for i in range(micro_steps):
            x, y = get_batch(train_shards, position + (rank * rows + i * B) * T, B, T, device)
            last_micro_step = i == micro_steps - 1
            part = model(x, y) / (micro_steps * ranks)
            part.backward()
            loss = loss + part.detach()
        while pending:
            pending.pop().wait()
        optimizer.step()
        model.zero_grad()
        return loss

    warmup_time = warm_up(model, optimizer, flags, lambda: train_step(0, 1))
    resumed = resume(model, optimizer, flags.tokenizer, checkpoints(out_dir) if flags.resume else [])
    step, position, train_time = resumed["next"] if resumed else (0, 0, 0.0)
    if rank == 0:
        clear_folder(flags, resumed, step)
    log = Log(out_dir, device, "a" if resumed else "w")
    matrices = sum(p.numel() for name, p in model.named_parameters() if name != "embed" or flags.tie_weights)
    flops = 6 * matrices + 12 * flags.n_layer * flags.n_embd * T  # a token; attention counted in full, as is usual
    peak = PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" and dtype == torch.bfloat16 else None
    log.line(
        f"{sum(p.numel() for p in model.parameters()):,} parameters on {ranks} x {device.type} in {str(dtype)[6:]}; "
        f"a step: {total:,} tokens in {rows // B} x {B} rows of {T} on each; warm-up {warmup_time:.1f} s"
    )
    for shards in (train_shards, val_shards):
        if shards.counts[-1] < shards.counts[0]:
            path, count = shards.paths[-1], shards.counts[-1]
            log.line(f"{path} is shorter than those before it: {count:,} tokens, all of them used")
    if resumed:
        log.line(f"resumed from {resumed['path']} at step {step}")

    def save(name, train):
        save_model(name, model, flags.tokenizer, flags, step, train)

    def due(every):
        return step >= steps or (every and step and step % every == 0)

    stopped = catch_signals()
    first, first_time, stopping, reached = step, train_time, 0, False
    while True:
        everything = dict(optimizer=optimizer.state, next=[step, position, train_time])
        if step > first and (stopping or due(flags.save_every)):
            save(f"ckpt_{step:06d}.pt", everything)
        if stopping:  # some rank was told to
            end_interrupted(stopped, out_dir)
        if flags.milestone_every and due(flags.milestone_every):
            save(f"milestone_{step:06d}.pt", {})
        if due(flags.val_loss_every):
            val_loss = validate(model, val_shards, flags.val_tokens, B, T, rank, ranks)
            reached, took = val_loss <= flags.target_loss, 1000 * train_time
            log.line(
                f"step:{step}/{steps} val_loss:{val_loss:.4f} train_time:{took:.0f}ms "
                f"step_avg:{took / max(1, step):.2f}ms" + (" target reached" if reached else "")
            )
            log.row(step=step, val_loss=val_loss, train_time_ms=round(took))
        if flags.hellaswag_every and due(flags.hellaswag_every):
            acc, acc_norm = hellaswag(model, questions, labels, rank, ranks)
            log.line(f"step:{step}/{steps} hellaswag:{acc:.4f} acc_norm:{acc_norm:.4f} questions:{len(labels)}")
            log.row(step=step, hellaswag=acc, hellaswag_norm=acc_norm, questions=len(labels))
        if flags.sample_every and due(flags.sample_every) and rank == 0:
            show_story(model, tokenizer, flags, log, step)
        if reached and not due(flags.save_every):
            save(f"ckpt_{step:06d}.pt", everything)
        if reached or step >= steps:
            break

        start = time.perf_counter()
        up, down = (step + 1) / max(1, flags.warmup_iters), (steps - step) / max(1, flags.warmdown_iters)
        optimizer.set_lr(min(1.0, up, down))
        loss, stopping = add_up([train_step(position, rows // B).item(), len(stopped)], device)
        seconds = time.perf_counter() - start
        check_loss(loss, step + 1, out_dir)
        step, position, train_time = step + 1, position + total, train_time + seconds
        mean = (train_time - first_time) / (step - first)
        mfu = flops * total / mean / (peak * 1e12 * ranks) if peak else None
        rate = dict(lr=optimizer.groups[0]["lr"], tokens_per_s=round(total / seconds), mfu=mfu)
        log.row(step=step, train_loss=loss, train_time_ms=round(1000 * train_time), **rate)
        log.progress(
            f"step {step}/{steps}  loss {loss:.4f}  {total / mean:,.0f} tokens/s  "
            f"MFU {f'{mfu:.1%}' if peak else 'n/a'}  {memory(device):.1f} GiB  "
            f"ETA {datetime.timedelta(seconds=round(mean * (steps - step)))}"
        )
    last = checkpoints(out_dir)[0] if rank == 0 else None
    log.line(f"peak memory {memory(device):.1f} GiB; more stories: python sample.py {last}")
    if ranks > 1:
        dist.destroy_process_group()


def main():
    run_training(train, get_flags())


if __name__ == "__main__":
    run(main)
