"""
Write stories from a checkpoint of any of these scripts.

    python sample.py out/gpt/ckpt_004600.pt --prompt "The house was empty" --temperature 0.7 --seed 2
    python sample.py out/gpt/ckpt_004600.pt --num 400 --max_new_tokens 300 --out stories.jsonl
    python sample.py out/gpt/ckpt_004600.pt --interactive
    python sample.py out/gpt/ckpt_004600.pt --narrate story.mp3      (with the key of OpenAI in OPENAI_API_KEY)

One story appears on stdout as it is written; several, each when it is complete. With --out they are added to a file, a
line a story ({id, prompt, text, tokens, seed, checkpoint, sampling}); the same command goes on with those missing.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import codecs
import contextlib
import dataclasses
import email.utils
import functools
import itertools
import json
import os
import random
import re
import sys
import time
import urllib.parse

import numpy as np
import requests
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute


def get_flags():
    flags, yes_no = Flags(), argparse.BooleanOptionalAction
    add = flags.add_argument
    add("checkpoint", type=checkpoint_path, help="a .pt file, or the folder of a run: its newest")
    add("--prompt", default="It was a dark and stormy night", help="how the story begins; - is standard input")
    add("--prompt_file", help="openings of several stories, one a line; - is standard input")
    add("--num", type=number(int, 1), default=1, help="stories for each opening")
    add("--out", help="a .jsonl file to add the stories to")
    add("--interactive", default=False, action=yes_no, help="keep the model loaded and ask for openings")
    add("--max_new_tokens", type=number(int, 1), default=500, help="tokens of a story at most")
    add("--temperature", type=number(float, 0), default=0.8, help="0 is greedy")
    add("--top_k", type=number(int, 0), default=0, help="sample from the k likeliest tokens; 0 is no limit")
    add("--top_p", type=number(float, 0, 1), default=1.0, help="sample from the likeliest of this total probability")
    add("--stop", action="append", default=[], metavar="TEXT", help="end a story before this text (may be repeated)")
    add("--batch_size", type=number(int, 0), default=0, help="stories at once; 0: what the memory allows")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of weights and activations")
    add("--compile", default=False, action=yes_no, help="faster after half a minute; on a CPU, one story at a time")
    add("--seed", type=int, default=1337, help="one seed, one story for each id")
    add("--narrate", metavar="FILE.mp3", help="have the story read aloud into this file")
    add("--speech_model", default="gpt-4o-mini-tts", help="narrate: with this model")
    add("--voice", default="onyx", help="narrate: in this voice")
    add("--base_url", type=web_address, default="https://api.openai.com/v1", help="narrate: the server to ask")
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


# --- api: the same in every script (tests/test_copies.py) ---

ADVICE = {  # refusals after which every other request would be refused too
    **dict.fromkeys((301, 302, 303, 307, 308), "no redirect is followed; is --base_url right?"),
    401: "is OPENAI_API_KEY right?",
    402: "the account needs credit",
    403: "this key may not do that",
    404: "are --base_url and the model's name right?",
}


class ApiError(Exception):
    """A request that failed for good. status: the server's, None without an answer; hopeless: every other one would."""

    def __init__(self, message, status=None, hopeless=False):
        super().__init__(message)
        self.status, self.hopeless = status, hopeless


def web_address(text):
    """The type of --base_url: an address of http or https to which a path can be added."""
    try:
        parts = urllib.parse.urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not re.search(r"\s", text)
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment or parts.username is not None:
        raise argparse.ArgumentTypeError("not an address like http://localhost:8000/v1, without ?, # and password")
    return text.rstrip("/")


def api_session(base_url, connections=1):
    """A requests.Session with so many kept connections that sends the key of OPENAI_API_KEY, if there is one."""
    key, host = os.environ.get("OPENAI_API_KEY", "").strip(), urllib.parse.urlsplit(base_url).hostname
    if not key and f".{host}".endswith(".openai.com"):
        fail(f"{host} wants a key, and the environment variable OPENAI_API_KEY is not set")
    if not (key.isascii() and key.isprintable()):
        fail("OPENAI_API_KEY holds characters that no key has")  # requests would show it

    def authorise(request):  # set even without a key: requests would take a password from ~/.netrc
        request.headers.update({"Authorization": f"Bearer {key}"} if key else {})
        return request

    session = requests.Session()
    session.auth, session.trust_env = authorise, host not in ("localhost", "127.0.0.1", "::1")  # no proxy to oneself
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=connections))
    return session


def hide_key(text):
    """A text without the key, which some servers repeat; a short one is a word like "none" for a server at home."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    return text.replace(key, "[key]") if len(key) > 7 else text


def complaint(response):
    """What a refusal says is wrong, in one short line."""
    text = response.text
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        error = response.json().get("error") or response.json()
        text = error if isinstance(error, str) else error.get("message") or error.get("detail") or text
    return "".join(c for c in " ".join(hide_key(str(text)).split()) if c.isprintable())[:300]


def asked_wait(response):
    """Seconds that a refusal asks to wait, or 0: Retry-After's, or for a 429 until the rate limits are whole again."""

    def seconds(text):  # "6m0s", "20ms", "1.5"
        units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001, "": 1}
        return sum(float(n) * units[unit] for n, unit in re.findall(r"(\d+\.?\d*)(ms|[hms]|$)", text))

    headers = response.headers
    if "retry-after-ms" in headers:
        return seconds(headers["retry-after-ms"] + "ms")
    if after := headers.get("retry-after"):
        with contextlib.suppress(ValueError, OverflowError):
            date = email.utils.parsedate_tz(after)
            return max(0, email.utils.mktime_tz(date) - time.time()) if date else seconds(after)
    resets = [seconds(headers.get(f"x-ratelimit-reset-{kind}", "")) for kind in ("requests", "tokens")]
    return min(60, max(resets)) if response.status_code == 429 else 0  # there is room for one request sooner


def post(session, url, body, timeout=60, retries=5, turn=lambda seconds, status: time.sleep(seconds)):
    """POST body as JSON; the requests.Response of success, or ApiError with one line: what is wrong, and what to do.

    After 408, 409, 429, 5xx, time-outs and lost connections it is sent again, `retries` times at most: when the headers
    say, or after 0.5, 1, 2, ... seconds, and a random part more. turn(seconds, status) is called before every request
    to do the waiting, and may raise: 0 and None at first, then the status that was the answer (None: there was none).
    """
    host, wait, status = urllib.parse.urlsplit(url).netloc, 0.0, None
    for attempt in range(retries + 1):
        turn(wait, status)
        status, wait = None, min(0.5 * 2**attempt, 30) * random.uniform(1, 1.25)
        try:
            response = session.post(url, json=body, timeout=timeout, allow_redirects=False)
        except (requests.RequestException, ValueError) as error:
            problem = f"{host} cannot be reached, or hangs up ({type(error).__name__})"
            if isinstance(error, requests.Timeout):
                problem = f"{host} gives no answer within {timeout:g} s"
            if isinstance(error, ValueError):  # an address that is none, or a proxy's
                raise ApiError(problem, hopeless=True) from None
            continue
        status = response.status_code
        if 200 <= status < 300:
            return response
        problem = f"{host} answers {status} ({complaint(response)})"
        if status in ADVICE or "insufficient_quota" in response.text:
            raise ApiError(f"{problem}; {ADVICE.get(status, ADVICE[402])}", status, hopeless=True)
        if status < 500 and status not in (408, 409, 429):
            raise ApiError(problem, status)
        if (asked := asked_wait(response)) > 600:
            raise ApiError(f"{problem} and asks to wait {asked:,.0f} s", status, hopeless=True)
        wait = asked + random.uniform(0, wait) if asked else wait
    raise ApiError(f"{problem}, {retries + 1} times", status)


# --- end of api ---


# --- progress: the same in every script (tests/test_copies.py) ---


def progress(text):
    """One line on stderr, written over on a terminal, else every 5 seconds."""
    now, live = time.perf_counter(), sys.stderr.isatty()
    if now >= progress.next:
        progress.next = now + (0.1 if live else 5)
        print(f"\r{text}\033[K" if live else text, end="" if live else "\n", file=sys.stderr, flush=True)


progress.next = 0.0


# --- end of progress ---


@functools.cache
def say_once(text):
    print(f"sample.py: {text}", file=sys.stderr)


def read_openings(flags):
    """The texts that stories begin with: one, or those of --prompt_file."""

    def read(path, flag):
        try:
            with open(0 if path == "-" else path, encoding="utf-8-sig", closefd=path != "-") as f:
                return f.read()
        except OSError as error:
            fail(f"{flag} {path}: {error.strerror}")
        except UnicodeDecodeError:
            fail(f"{flag} {path}: not text in UTF-8")

    if flags.prompt_file is None:
        return [read("-", "--prompt").rstrip("\n") if flags.prompt == "-" else flags.prompt]
    openings = [line for line in read(flags.prompt_file, "--prompt_file").split("\n") if line.strip()]
    return openings or fail(f"--prompt_file {flags.prompt_file}: holds no opening")


def to_tokens(tokenizer, opening, flags):
    """Token ids that a story begins with: it stands behind the end of another."""
    name = "--prompt" if flags.prompt_file is None else f"--prompt_file {flags.prompt_file}"
    name = "the opening" if flags.interactive else name
    try:
        opening.encode()
    except UnicodeEncodeError:  # of the command line
        fail(f"{name}: not text in UTF-8")
    tokens = encode(tokenizer, opening, name)
    tokens = [tokenizer.eot_token] + tokens if tokenizer.special_tokens_set else tokens
    return tokens or fail(f"{name}: empty, and this checkpoint needs a character to begin with")


def tell(model, tokenizer, prompts, indices, flags):
    """Continue prompts (lists of token ids) together: yields (row, new text, tokens of the whole continuation).

    tokens is None until the row ends. A text comes in whole characters; what may turn out to be the beginning of a
    --stop text is held back until it is known.
    """
    eot = [tokenizer.eot_token] if tokenizer.special_tokens_set else []
    utf8 = [codecs.getincrementaldecoder("utf-8")("replace") for _ in prompts]  # a character may take several tokens
    held, tokens, ended = [""] * len(prompts), [0] * len(prompts), set()
    settings = dict(temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p, seed=flags.seed)
    settings.update(indices=indices, stop=eot, ended=ended)
    for pairs in generate(model, prompts, flags.max_new_tokens, **settings):
        for row, token in pairs:
            full = len(prompts[row]) + tokens[row] > model.config.block_size  # so this token came after a half of it
            last = token in eot
            if not last:
                held[row] += utf8[row].decode(tokenizer.decode_single_token_bytes(token))
                tokens[row] += 1
                last = tokens[row] == flags.max_new_tokens
            found = [held[row].index(stop) for stop in flags.stop if stop in held[row]]
            if found:
                held[row], last = held[row][: min(found)], True
                ended.add(row)
            ready = len(held[row])
            if not last:
                begins = [i for i in range(ready) if any(stop.startswith(held[row][i:]) for stop in flags.stop)]
                ready = begins[0] if begins else ready
            text, held[row] = held[row][:ready], held[row][ready:]
            yield row, text, tokens[row] if last else None
            if last and full:
                say_once(f"the window of {model.config.block_size} tokens was full: stories went on from its last half")


def stream(model, tokenizer, opening, index, flags):
    """Print a story as it is written, and return it."""
    story = opening
    prompt = to_tokens(tokenizer, opening, flags)
    print(opening, end="", flush=True)
    for _, text, _ in tell(model, tokenizer, [prompt], [index], flags):
        story += text
        print(text, end="", flush=True)
    print()
    return story


def converse(model, tokenizer, flags):
    """Ask for openings until there are no more. Ctrl-C ends a story; at the question, it ends all."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  the arrow keys
    sys.stdin.reconfigure(errors="replace")
    for index in itertools.count():
        try:
            opening = input("opening> " if sys.stdin.isatty() else "")
        except EOFError:
            return print(end="\n" if sys.stdin.isatty() else "")
        try:
            stream(model, tokenizer, opening or flags.prompt, index, flags)
        except KeyboardInterrupt:
            print()
        except SystemExit:  # characters that the model does not know: that was said
            continue


def rows_at_once(model, length):
    """How many stories of this many tokens half of the free memory holds."""
    config, device = model.config, model.embed.device
    if device.type == "cuda":
        free, itemsize = torch.cuda.mem_get_info()[0], model.dtype.itemsize
    elif device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
        itemsize = model.dtype.itemsize
    else:
        free, itemsize = 2**33, 4
        with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo") as f:
            free = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    row = 2 * config.n_layer * config.n_embd * min(length, config.block_size) * itemsize  # keys and values
    row += 6 * 4 * config.vocab_size  # logits, and what sampling makes of them
    return max(1, min(free // 2 // row, 64 if device.type == "cpu" else 256))


def open_stories(path, expected):
    """Open --out to add to it: (file, ids of the stories that it holds). expected(id): what is known of a story.

    A last line that was cut short is removed; a file that another process writes to, or of another run, is refused.
    """
    have = set()
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        file = open(path, "ab+", buffering=0)  # noqa: SIM115
    except OSError as error:
        fail(f"--out {path}: {error.strerror}")
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError:
        fail(f"--out {path}: another process is writing to it")
    if not os.path.isfile(path):
        fail(f"--out {path}: not a file that lines can be added to")
    file.seek(0)
    whole = 0
    for line_number, line in enumerate(file.readlines(), 1):
        try:
            row = json.loads(line)
            known = expected(row["id"])
            other = [key for key in known if row.get(key) != known[key]]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError, AttributeError):
            if not line.endswith(b"\n") and b'{"id": '.startswith(line[:7]):
                break
            fail(f"--out {path}: line {line_number} is not a story of this script; name a new file")
        if other:
            was, here = json.dumps(row.get(other[0])), json.dumps(known[other[0]])
            fail(f"--out {path}: line {line_number} is of another run ({other[0]} {was}, not {here}); name a new file")
        if not line.endswith(b"\n"):
            break
        have.add(row["id"])
        whole += len(line)
    file.truncate(whole)
    return file, have


def add_story(file, row):
    """Add a line to the file, or nothing: exits with code 1 when the disk refuses."""
    line = (json.dumps(row) + "\n").encode()
    whole = file.seek(0, os.SEEK_END)
    try:
        while line:  # a disk that is nearly full takes a part
            line = line[file.write(line) :]
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(whole)
        fail(f"--out {file.name}: {error.strerror}; the stories before are whole, the same command goes on", code=1)


def write_stories(model, tokenizer, openings, flags):
    """Write --num stories for each opening, in batches: to --out, or to stdout."""
    sampling = {key: getattr(flags, key) for key in ("max_new_tokens", "temperature", "top_k", "top_p", "stop")}
    about = dict(seed=flags.seed, checkpoint=flags.checkpoint, sampling=sampling)
    prompts = [to_tokens(tokenizer, opening, flags) for opening in openings]
    total, have, file = flags.num * len(openings), set(), None
    if flags.out:
        file, have = open_stories(flags.out, lambda i: dict(prompt=openings[i % len(openings)], **about))
    todo = [i for i in range(total) if i not in have]
    B = flags.batch_size or rows_at_once(model, max(map(len, prompts)) + flags.max_new_tokens)
    done, written, start = total - len(todo), 0, time.perf_counter()
    for batch in (todo[i : i + B] for i in range(0, len(todo), B)):
        stories = [openings[i % len(openings)] for i in batch]
        for row, text, tokens in tell(model, tokenizer, [prompts[i % len(openings)] for i in batch], batch, flags):
            stories[row] += text
            written += 1
            if tokens is not None:
                done, i = done + 1, batch[row]
                story = dict(id=i, prompt=openings[i % len(openings)], text=stories[row], tokens=tokens, **about)
                end = "\n\n---\n\n" if done < total else "\n"
                add_story(file, story) if file else print(stories[row], end=end, flush=True)
            if file:
                speed = written / (time.perf_counter() - start)
                progress(f"{done:,} of {total:,} stories, {speed:,.0f} tokens a second")
    if file:
        end = "\r\033[K" if sys.stderr.isatty() else ""
        print(f"{end}{flags.out}: {total:,} stories, {len(todo):,} of them new", file=sys.stderr)


def pieces(text, most=4000):
    """A text in pieces of so many characters at most (OpenAI takes 4,096), cut where a sentence ends, or a word."""
    found, text = [], text.strip()
    while len(text) > most:
        head = text[: most + 1]
        ends = [m.end() for m in re.finditer(r"[.!?…][\"'”’)]*(?=\s)", head)] or [
            m.start() for m in re.finditer(r"\s", head)
        ]
        cut = ends[-1] if ends else most
        found, text = [*found, text[:cut].rstrip()], text[cut:].lstrip()
    return [*found, text] if text else found


def narrate(session, story, flags):
    """Have a text read aloud, piece by piece, and join the pieces into one mp3 file (frames follow one another)."""
    sound = b""
    if not story.strip():
        fail(f"--narrate {flags.narrate}: the story is empty")
    for i, piece in enumerate(texts := pieces(story)):
        progress(f"narrating piece {i + 1} of {len(texts)}")
        body = dict(model=flags.speech_model, voice=flags.voice, input=piece, response_format="mp3")
        try:
            data = post(session, f"{flags.base_url}/audio/speech", body, timeout=300).content
        except ApiError as error:
            fail(f"--narrate {flags.narrate}: {error}", code=2 if error.hopeless else 1)
        if data[:3] == b"ID3" and len(data) > 10:  # a tag: in the middle of a file it would click
            size = sum((byte & 127) << 7 * (3 - k) for k, byte in enumerate(data[6:10]))
            data = data[size + (20 if data[5] & 16 else 10) :]  # a header, and a footer where that bit says so
        if len(data) < 4 or data[0] != 0xFF or data[1] < 0xE0:
            fail(f"--narrate {flags.narrate}: {flags.base_url} answered with something that is not mp3", code=1)
        sound += data
    temporary = f"{flags.narrate}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(sound)
        os.replace(temporary, flags.narrate)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        fail(f"--narrate {flags.narrate}: {error.strerror}", code=1)


def main():
    flags = get_flags()
    several = flags.out or flags.prompt_file or flags.num > 1
    if flags.interactive and (several or flags.narrate or flags.prompt == "-"):
        fail("--interactive: goes without --out, --num, --prompt_file, --narrate and --prompt -")
    if flags.interactive and not sys.stdin:
        fail("--interactive: standard input is closed")
    if flags.narrate and several:
        fail("--narrate: one story, so without --out, --num and --prompt_file")
    if "" in flags.stop:
        fail("--stop: an empty text is everywhere")
    if flags.narrate:  # found out before it costs anything
        folder = os.path.dirname(os.path.abspath(flags.narrate))
        if os.path.isdir(flags.narrate) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            fail(f"--narrate {flags.narrate}: not a file in a folder that is there and can be written to")
    session = api_session(flags.base_url) if flags.narrate else None
    openings = [] if flags.interactive else read_openings(flags)
    if sys.stdout:  # not every output can hold every character
        sys.stdout.reconfigure(errors="replace")
    device, dtype = get_device(flags.device, flags.dtype)
    checkpoint = load_checkpoint(flags.checkpoint)
    model = load_model(flags.checkpoint, checkpoint, device, dtype, weights=dtype)
    if flags.compile and not (several and device.type == "cpu"):
        model.compile_decoding()
    else:
        model.pack()
    tokenizer = get_tokenizer(checkpoint["tokenizer"])
    if flags.interactive:
        converse(model, tokenizer, flags)
    elif several:
        write_stories(model, tokenizer, openings, flags)
    else:
        story = stream(model, tokenizer, openings[0], 0, flags)
        if flags.narrate:
            narrate(session, story, flags)


if __name__ == "__main__":
    run(main)
