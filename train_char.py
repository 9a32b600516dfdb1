"""
Train a language model on the characters of one text file, and let it write a story.

    python train_char.py                                     a small transformer on data/tales.txt
    python train_char.py --model bigram                      the simplest model there is
    python train_char.py --input my.txt --max_iters 4000     your own text
    python train_char.py --model split --head_dropout 0.1    ideas that were tried on the way
    python train_char.py --preset post                       the settings of the original post

Prints the statistics of the text, trains on its first 90%, shows the loss on the rest, and writes a story.
In --out_dir: log.txt, log.jsonl, ckpt.pt (sample.py writes more stories from that of a gpt) and stories.jsonl.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import collections
import contextlib
import dataclasses
import json
import math
import os
import platform
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

PRESETS = {
    "fast": {
        "gpt": dict(n_layer=4, n_head=2, n_embd=128, block_size=128, batch_size=16, max_iters=1050),
        "bigram": dict(block_size=64, batch_size=64, max_iters=500, embed_lr=0.3),
    },
    "post": {
        "gpt": dict(n_layer=4, n_head=4, n_embd=64, block_size=32, batch_size=32, max_iters=5000),
        "bigram": dict(block_size=32, batch_size=32, max_iters=10000, embed_lr=0.01),
    },
}


def get_flags():
    tales = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "tales.txt")
    flags, yes_no = Flags(), argparse.BooleanOptionalAction
    add = flags.add_argument
    add("--input", default=tales, help="UTF-8 text to learn from")
    add("--model", default="gpt", choices=["bigram", "gpt", "split", "flat"], help="split, flat: see their classes")
    add("--preset", default="fast", choices=list(PRESETS), help="fast: good text soon, on a CPU; post: the original's")
    add("--out_dir", default="out/char", help="where log, checkpoint and stories go")
    add("--prompt", default="It was a dark and stormy night", help="how the story begins")
    add("--max_new_tokens", type=number(int, 0), default=500, help="length of the story, in characters")
    add("--temperature", type=number(float, 0), default=0.8, help="0 is greedy")
    add("--top_k", type=number(int, 0), default=0, help="sample from the k likeliest characters; 0 is no limit")
    add("--n_layer", type=number(int, 1), help="blocks")
    add("--n_head", type=number(int, 1), help="attention heads")
    add("--n_embd", type=number(int, 2), help="width")
    add("--block_size", type=number(int, 1), help="context window, in characters")
    add("--head_dropout", type=number(float, 0, 0.99), default=0.0, help="drop whole heads with this probability")
    add("--batch_size", type=number(int, 1), help="windows a step")
    add("--max_iters", type=number(int, 1), help="training steps")
    add("--matrix_lr", type=number(float, 0), default=0.04, help="Muon's rate")
    add("--embed_lr", type=number(float, 0), default=0.1, help="AdamW's rate for the embedding, or the bigram's table")
    add("--head_lr", type=number(float, 0), default=0.02, help="AdamW's rate for the head")
    add("--weight_decay", type=number(float, 0), default=0.0, help="of the matrices, times their rate")
    add("--momentum", type=number(float, 0, 0.999), default=0.95, help="Muon's")
    add("--ns_steps", type=number(int, 1, 5), default=3, help="Muon's iterations; 5 for wide models")
    add("--warmup_iters", type=number(int, 0), default=0, help="steps in which the rates rise")
    add("--warmdown_iters", type=number(int, 0), help="last steps, in which the rates fall to 0; not given: all")
    add("--val_loss_every", type=number(int, 0), default=250, help="steps between validations; 0: at the end only")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    add("--dtype", default="float32", choices=["auto", "float32", "bfloat16"], help="of the activations")
    add("--compile", default=False, action=yes_no, help="compile the blocks")
    add("--seed", type=int, default=1337, help="of everything random")
    chosen = flags.parse_args([argument for argument in sys.argv[1:] if argument not in ("-h", "--help")])
    flags.set_defaults(**PRESETS[chosen.preset]["bigram" if chosen.model == "bigram" else "gpt"])
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


def read_text(path):
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
    except OSError as error:
        fail(f"--input {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"--input {path}: not UTF-8 text (byte {error.start:,})")
    if not text:
        fail(f"--input {path}: empty")
    return text.replace("\n<|endoftext|>\n", "\n\n")  # between two documents: an empty line


def describe(text, chars, encode, decode):
    """The statistics of a text, one a line."""
    counts, words = collections.Counter(text).most_common(), text.split()
    (most, n_most), (least, n_least) = counts[0], counts[-1]
    start, back = encode(text[:20]), decode(encode(text)) == text
    return (
        f"characters: {len(text):,}\n"
        f"vocabulary: {len(chars)} different characters: {''.join(chars)!r}\n"
        f"most common: {most!r}, {n_most:,} times\n"
        f"least common: {least!r}, {n_least:,} times\n"
        f"average word length: {sum(map(len, words)) / max(1, len(words)):.2f} characters, over {len(words):,} words\n"
        f"first 200 characters: {text[:200]!r}\n"
        f"encoded: {start}\n"
        f"decoded: {decode(start)!r}; the whole text {'comes back the same' if back else 'DOES NOT come back'}\n"
    )


class Bigram(nn.Module):
    """The next character's logits are a row of a table, looked up by the last character."""

    def __init__(self, config):
        super().__init__()
        self.config, self.dtype = config, torch.float32
        self.embed = nn.Parameter(torch.zeros(config.vocab_size, config.vocab_size))

    def forward(self, idx, targets=None, cache=None, lengths=None):
        logits = F.embedding(idx, self.embed)  # (B, T, V)
        if targets is not None:
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits[torch.arange(len(idx)), torch.tensor(lengths) - 1] if lengths else logits  # (B, V) or (B, T, V)


class DropHeads(Block):
    """A block that leaves out whole heads while it trains, each with probability p."""

    p = 0.0

    def attend(self, q, k, v, mask):
        y = super().attend(q, k, v, mask)  # (B, H, T, D)
        if not self.training or not self.p:
            return y
        return y * (torch.rand(*y.shape[:2], 1, 1, device=y.device) >= self.p) / (1 - self.p)


class SplitBlock(DropHeads):
    """A block whose heads each see only their own slice of the embedding."""

    def __init__(self, config):
        super().__init__(config)
        H, D = config.n_head, config.n_embd // config.n_head
        self.qkv = nn.Parameter(torch.empty(3, H, D, D).normal_(std=D**-0.5))

    def project(self, x):
        slices = x.unflatten(-1, (self.n_head, -1))  # (B, T, H, D)
        return torch.einsum("bthd,nhed->btnhe", slices, self.qkv.to(x.dtype)).flatten(2)  # (B, T, 3 C)


class FlatGPT(GPT):
    """Blocks side by side: all see the embedding, and their outputs are averaged instead of stacked."""

    def trunk(self, x, cos, sin, cache, positions, mask):
        kv = [(cache.k[i], cache.v[i], positions, mask) if cache else () for i in range(len(self.blocks))]
        return torch.stack([block(x, cos, sin, *rest) for block, rest in zip(self.blocks, kv)]).mean(0)


def get_model(flags, vocab_size, dtype):
    if flags.model == "bigram":
        return Bigram(Config(vocab_size, flags.block_size, n_layer=0, n_head=1, n_embd=1))
    config = Config(vocab_size, flags.block_size, flags.n_layer, flags.n_head, flags.n_embd)
    try:
        model = (FlatGPT if flags.model == "flat" else GPT)(config, dtype)
    except ValueError as error:
        fail(f"--n_embd {flags.n_embd}: {error}")
    if flags.model == "split" or flags.head_dropout:
        kind = SplitBlock if flags.model == "split" else DropHeads
        model.blocks = nn.ModuleList([kind(config) for _ in range(config.n_layer)])
        for block in model.blocks:
            block.p = flags.head_dropout
    return model


@torch.no_grad()
def validate(model, data, T):
    """Mean loss in nats of every character of `data` but the first, read in windows of T one after another."""
    n = (len(data) - 1) // T * T
    batches = list(zip(data[:n].view(-1, T).split(256), data[1 : n + 1].view(-1, T).split(256)))
    if n < len(data) - 1:  # the last window is shorter
        batches.append((data[None, n:-1], data[None, n + 1 :]))
    model.eval()
    total = sum(model(x, y).item() * y.numel() for x, y in batches)
    model.train()
    return total / (len(data) - 1)


def main():
    flags = get_flags()
    device, dtype = get_device(flags.device, flags.dtype)
    B, T, steps = flags.batch_size, flags.block_size, flags.max_iters
    text = read_text(flags.input)
    chars = sorted(set(text))
    index = {c: i for i, c in enumerate(chars)}

    def encode(string):
        return [index[c] for c in string]

    def decode(tokens):
        return "".join(chars[i] for i in tokens)

    split = int(0.9 * len(text))  # the first 90% is for training, the rest for validation
    if split <= T or len(text) - split < 2:
        fail(f"--input {flags.input}: {len(text)} characters are too few for a context of {T} (--block_size)")
    if not flags.prompt or set(flags.prompt) - set(chars):
        fail(f"--prompt {flags.prompt!r}: must be made of characters that are in the text, such as {text[:20]!r}")
    torch.manual_seed(flags.seed)
    model = get_model(flags, len(chars), dtype).to(device)
    log = Log(flags.out_dir, device)
    log.line(describe(text, chars, encode, decode))
    rates = flags.matrix_lr, flags.matrix_lr, flags.embed_lr, flags.head_lr
    optimizer = Optimizer(model, *rates, flags.momentum, flags.weight_decay, (0.8, 0.95), dtype, flags.ns_steps)
    parameters = sum(p.numel() for p in model.parameters())
    log.line(f"{flags.model}: {parameters:,} parameters, {steps} steps of {B} x {T} characters on {device}")

    path = os.path.join(flags.out_dir, "ckpt.pt")
    kind = {} if flags.model == "gpt" else {"kind": flags.model}  # other scripts open the plain gpt only
    checkpoint = {
        "format": 1,
        "config": {**dataclasses.asdict(model.config), **kind},
        "tokenizer": {"chars": "".join(chars)},
        "model": model.state_dict(),  # the weights themselves, not a copy
    }
    data = torch.tensor(encode(text), device=device)
    window = torch.arange(T + 1, device=device)
    if flags.compile and flags.model != "bigram":
        model.compile_blocks()
        with torch.random.fork_rng():  # compile before the clock starts, and leave no trace
            model(window.new_zeros(B, T), window.new_zeros(B, T)).backward()
        model.zero_grad()

    interrupted = []
    for name in (signal.SIGINT, signal.SIGTERM):  # the step under way is finished: no half step gets into a file
        signal.signal(name, lambda *_: interrupted.append(1))
    warmdown = steps if flags.warmdown_iters is None else flags.warmdown_iters
    loss, train_time, start = float("nan"), 0.0, time.perf_counter()
    for step in range(steps + 1):
        train_time, start = train_time + time.perf_counter() - start, time.perf_counter()
        if interrupted:
            save_checkpoint(path, {**checkpoint, "train": {"step": step, "flags": vars(flags)}})
            fail(f"interrupted; {path} holds the model after {step} steps", code=130)
        if step == steps or (flags.val_loss_every and step and step % flags.val_loss_every == 0):
            val_loss = validate(model, data[split:], T)
            milliseconds = 1000 * train_time
            log.line(
                f"step:{step}/{steps} val_loss:{val_loss:.4f} train_time:{milliseconds:.0f}ms "
                f"step_avg:{milliseconds / step:.2f}ms"
            )
            rates = dict(lr=optimizer.groups[0]["lr"], tokens_per_s=round(step * B * T / train_time))
            log.row(step=step, train_loss=loss, val_loss=val_loss, train_time_ms=round(milliseconds), **rates)
            save_checkpoint(path, {**checkpoint, "train": {"step": step, "flags": vars(flags), "val_loss": val_loss}})
            start = time.perf_counter()
        if step == steps:
            break
        optimizer.set_lr(min(1.0, (step + 1) / max(1, flags.warmup_iters), (steps - step) / max(1, warmdown)))
        tokens = data[torch.randint(split - T, (B, 1), device=device) + window]  # (B, T + 1)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        model.zero_grad()
        loss = loss.item()
        if not math.isfinite(loss):
            kept = f"; {path} is the last good checkpoint" if os.path.exists(path) else ""
            fail(f"the loss is {loss} at step {step + 1}: lower --matrix_lr, --embed_lr or --head_lr{kept}", code=1)
        elapsed = train_time + time.perf_counter() - start
        log.progress(
            f"step {step + 1}/{steps}  loss {loss:.4f}  {(step + 1) * B * T / elapsed:,.0f} tokens/s  "
            f"ETA {elapsed / (step + 1) * (steps - step - 1):.0f} s"
        )
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.default_int_handler)

    model.eval()
    story = encode(flags.prompt)
    print(f"\n{flags.prompt}", end="", flush=True)
    settings = dict(temperature=flags.temperature, top_k=flags.top_k, seed=flags.seed)
    for [(_, token)] in generate(model, [story], flags.max_new_tokens, **settings):
        story.append(token)
        print(chars[token], end="", flush=True)
    print()
    written = dict(prompt=flags.prompt, text=decode(story), tokens=flags.max_new_tokens, seed=flags.seed)
    log.row(log.stories, id=0, **written, checkpoint=path)


if __name__ == "__main__":
    run(main)
