"""
Choose the scariest of every four stories: by GPT-4o or another model behind its API, by two checkpoints, or by you.

    python rank.py stories.jsonl                  asks gpt-4o; the key comes from OPENAI_API_KEY
    python rank.py stories.jsonl --dry_run        sends nothing: shows the first request, and what to expect of all
    python rank.py stories.jsonl --base_url http://localhost:8000/v1 --model llama3      vLLM, llama.cpp, Ollama, ...
    python rank.py stories.jsonl --judge local --scary out/finetune/ckpt.pt --plain out/gpt/ckpt.pt        offline
    python rank.py stories.jsonl --judge human

Stories are objects with "id" and "text", one a line, as `sample.py --num 400 --out stories.jsonl` writes them; they are
sent to --base_url and nowhere else. ranked.jsonl gets an object a group (its stories A to D, the best, all votes),
best.jsonl the winners in the form of the stories. Every answer is kept in ranked.jsonl.answers as it comes: stopped at
any moment, the same command goes on, and asks for nothing twice.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import email.utils
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import urllib.parse

import requests
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

try:
    import fcntl
    import termios
    import tty
except ImportError:  # on Windows two runs do not exclude each other, and the human judge presses Enter too
    fcntl = termios = tty = None

PRICES = {  # US dollars for a million tokens read and written, as OpenAI listed them in August 2025
    "gpt-4o": (2.5, 10),
    "gpt-4o-2024-11-20": (2.5, 10),
    "gpt-4o-2024-08-06": (2.5, 10),
    "gpt-4o-mini": (0.15, 0.6),
    "gpt-4.1": (2, 8),
    "gpt-4.1-mini": (0.4, 1.6),
    "gpt-4.1-nano": (0.1, 0.4),
    "gpt-5": (1.25, 10),
    "gpt-5-mini": (0.25, 2),
    "o3": (2, 8),
    "o4-mini": (1.1, 4.4),
}
SYSTEM = "You judge scary stories: you read each to its end, compare them, and answer in the form that is asked for."
PROMPT = """Here are {count} stories, labelled {labels}. Which is the scariest: which would leave a reader who is
alone at night the most uneasy?

{stories}

Go by what is told and how, not by the place where a story stands. What makes no sense, or says the same thing again and
again, is not scary. A story may end in the middle of a sentence: do not hold that against it. Choose one even if all
are weak. Answer in this form and no other, where X is one of {labels}:

BEST_ANSWER:[X]
REASONING:[why, in one to three sentences]"""
# The labels as one vote after another shows them: each story takes each place once, and of four it also follows each
# other once (a square of Williams, 1949). The first two orders of four are each other reversed.
ORDERS = {2: ("AB", "BA"), 3: ("ABC", "BCA", "CAB"), 4: ("ABCD", "DCBA", "BDAC", "CADB")}
ANSWER = re.compile(
    r"best[\s_-]*answer[\s_\"']*(?:is\s)?(?:"
    r"\s*[:=：]?\s*[\[({<【\"']\s*(?:story\s+)?([a-z])\s*[\])}>】\"']"  # [B], whatever follows
    r"|\s*[:=：]\s*[\[({<【]?\s*(?:story\s+)?([a-z])(?=\s*(?:$|[\])}>】.;:!(—–-]|reasoning)))"  # or B at an end
    r"(?!\W*(?:and|or)\b|\s*[\])}>】\"']*\s*[,/&+-]+\s*[\[({<【\"']?[a-z]\b)",  # but not: B or C
    re.I | re.M,
)


def get_flags():
    flags, yes_no = Flags(), argparse.BooleanOptionalAction
    add = flags.add_argument
    add("stories", metavar="STORIES.jsonl", help="what sample.py --out wrote, or another file in that form")
    add("--judge", default="openai", choices=["openai", "local", "human"], help="who chooses")
    add("--out", default="ranked.jsonl", help="an object a group; the answers are kept in OUT.answers")
    add("--best", help="the winners; not given: best.jsonl beside ranked.jsonl, and x_best.jsonl beside x.jsonl")
    add("--overwrite", default=False, action=yes_no, help="forget the answers that are there")
    add("--seed", type=int, default=1337, help="decides in which order stories are shown")
    add("--model", default="gpt-4o", help="openai: the judge")
    add("--base_url", type=web_address, default="https://api.openai.com/v1", help="openai: where it answers")
    add("--votes", type=number(int, 1), default=2, help="openai: how often a group is asked, in different orders")
    add("--temperature", type=number(float, 0, 2), default=0.0, help="openai: the judge's")
    add("--max_new_tokens", type=number(int, 1), default=500, help="openai: of a reply; models that think need more")
    add("--concurrency", type=number(int, 1, 256), default=8, help="openai: requests at the same time")
    add("--timeout", type=number(float, 0.001), default=60.0, help="openai: seconds to wait for an answer")
    add("--retries", type=number(int, 0), default=5, help="openai: how often a vote that failed is asked for again")
    add("--max_requests", type=number(int, 0), help="openai: send no more, those of earlier runs on --out included")
    add("--max_cost", type=number(float, 0), help="openai: spend no more dollars, those of earlier runs included")
    add("--price", type=number(float, 0), nargs=2, metavar=("IN", "OUT"), help="openai: dollars for a million tokens")
    add("--dry_run", default=False, action=yes_no, help="openai: send nothing, show a request and what to expect")
    add("--scary", type=checkpoint_path, help="local: a model trained on scary stories, .pt or the folder of a run")
    add("--plain", type=checkpoint_path, help="local: the model that it was trained from")
    add("--repetition_penalty", type=number(float, 0), default=1.0, help="local: nats a token if all were repeated")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="local: where to compute")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="local: of weights and activations")
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


def read_stories(path):
    """The stories of a .jsonl file; exits naming the line that is none."""
    stories, seen = [], {}
    try:
        with open(path, "rb") as f:
            lines = f.read().split(b"\n")
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            story = {"prompt": "", **json.loads(line)}
            good = type(story["id"]) in (str, int) and isinstance(story["prompt"], str) and story["text"].strip()
            f"{story['id']}{story['prompt']}{story['text']}".encode()  # JSON can hold halves of characters
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            good = False
        if not good:
            fail(f'{path}:{line_number}: not a story (an object with "id" and "text", as sample.py --out writes it)')
        if story["id"] in seen:
            fail(f"{path}:{line_number}: the id {story['id']!r} again, which line {seen[story['id']]} has")
        seen[story["id"]] = line_number
        stories.append(story)
    if len(stories) < 2:
        fail(f"{path}: {'one story, and nothing to compare it with' if stories else 'no stories'}")
    return stories


def make_groups(stories, seed):
    """Groups {label: story}, labelled by lot; the last may be smaller.

    They are taken four after four in the order of the file, but stories with the same opening come together.
    """
    place, groups = {}, []
    for story in stories:
        place.setdefault(story["prompt"], len(place))
    stories = sorted(stories, key=lambda story: place[story["prompt"]])
    for i in range(0, len(stories), 4):
        four = stories[i : i + 4]
        random.Random(f"{seed} {i // 4}").shuffle(four)
        groups.append(dict(zip("ABCD", four)))
    if len(groups[-1]) < 4:
        said = f"the last group has {len(groups[-1])} stories"
        if len(groups[-1]) == 1:
            said = f"the last story, {groups.pop()['A']['id']!r}, has none to be compared with, and is passed over"
        print(f"{len(stories)} stories, no multiple of four: {said}", file=sys.stderr)
    return groups


def order_of(seed, g, vote, n):
    """The labels of the n stories of group g in the order in which a vote shows them."""
    labels = list("ABCD"[:n])
    if vote >= n:  # each square after the first has its letters exchanged
        random.Random(f"{seed} {g} {vote // n}").shuffle(labels)
    return "".join(labels["ABCD".index(label)] for label in ORDERS[n][vote % n])


def winner(rows):
    """The label with the most votes, or None when there is none or another has as many."""
    counts = collections.Counter(row["best"] for row in rows if row["best"]).most_common(2)
    return counts[0][0] if len(counts) == 1 or counts and counts[0][1] > counts[1][1] else None


def missing(rows, votes):
    """The votes that a group's answers lack: of the first ones, and when those are split, one more."""
    have = {row["vote"] for row in rows if row["best"]}
    return [v for v in range(votes) if v not in have] or [votes] * (votes not in have and winner(rows) is None)


class Stopped(Exception):
    """No request is to be sent any more; the message says why."""


class Answers:
    """OUT.answers: the settings, then every request before it is sent and every answer as it comes, one object a line.

    So a run knows what need not be asked again, how many requests were sent in all, and what they cost at most. One
    process has the file at a time; its threads share it, and what they have to tell each other.
    """

    def __init__(self, path, settings, overwrite=False):
        self.path, self.lock, self.stop, self.hold, self.note = path, threading.Condition(), threading.Event(), 0.0, ""
        self.groups, self.refused, self.settings = collections.defaultdict(list), set(), {}
        self.requests, self.tokens, self.cost, self.open = 0, [0, 0], 0.0, {}  # open: (group, vote) to dollars at most
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            self.file = open(path, "a+b", buffering=0)
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it ends with the process, however that ends
            if overwrite:
                self.file.truncate(0)
            self.file.seek(0)
            data, start = self.file.read(), b'{"settings": '
        except BlockingIOError:
            fail(f"{path}: another rank.py is at work on it")
        except OSError as error:
            fail(f"{path}: {error.strerror}")
        if not data.startswith(start) and not start.startswith(data):
            fail(f"{path}: not a file of rank.py's; name another --out")
        whole = data[: data.rfind(b"\n") + 1]
        self.file.truncate(len(whole))  # a crash can cut the last line short
        for line_number, line in enumerate(whole.splitlines(), 1):
            try:
                self.take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                fail(f"{path}:{line_number}: damaged; remove that line, or name another --out")
        self.cost, self.open = self.cost + sum(self.open.values()), {}  # sent by a run that was killed
        if self.groups and self.settings != settings:
            old = {key: self.settings.get(key) for key in settings if self.settings.get(key) != settings[key]}
            differ = ", ".join(f"{key} {value!r} (now {settings[key]!r})" for key, value in old.items())
            fail(f"{path} is of a run with {differ}: name another --out, or --overwrite this one")
        if self.settings != settings:  # and nothing was answered
            self.file.truncate(0)
            self.requests, self.cost, self.refused = 0, 0.0, set()
            self.write({"settings": settings})

    def take(self, row):
        """Account for a line of the file."""
        if "settings" in row:
            self.settings = row["settings"]
        elif "refused" in row:
            self.refused.add(row["refused"])
        else:
            earlier = self.open.pop((row["group"], row["vote"]), 0.0)
            if "sent" in row:
                self.requests += 1
                self.cost += earlier  # of a run that was killed
                self.open[row["group"], row["vote"]] = row["sent"]
            else:
                self.cost += row["cost"]
            if "best" in row:
                self.groups[row["group"]].append(row)
                usage = row["usage"] or {}
                self.tokens[0] += usage.get("prompt_tokens", 0)
                self.tokens[1] += usage.get("completion_tokens", 0)

    def write(self, row):
        """Append a line at once; raises OSError when the disk refuses, and leaves no half of it."""
        with self.lock:
            line, size = json.dumps(row).encode() + b"\n", os.fstat(self.file.fileno()).st_size
            try:
                while line:  # a disk that is nearly full takes a part
                    line = line[self.file.write(line) :]
            except OSError:
                self.file.truncate(size)
                raise
            self.take(row)
            self.lock.notify_all()

    def reserve(self, g, vote, most, flags):
        """Wait until a request that costs `most` dollars fits under the limits, and note that it is sent."""
        with self.lock:
            while not self.stop.is_set():
                if flags.max_requests is not None and self.requests >= flags.max_requests:
                    raise Stopped(f"--max_requests {flags.max_requests} is reached, and has to be raised to go on")
                if flags.max_cost is None or self.cost + sum(self.open.values()) + most <= flags.max_cost:
                    return self.write({"group": g, "vote": vote, "sent": most})
                if not self.open:  # what is under way may turn out cheaper than feared
                    said = f"the next request can cost ${most:.4f}, and ${self.cost:.4f} are spent"
                    raise Stopped(f"--max_cost {flags.max_cost:g} has to be raised to go on: {said}")
                self.lock.wait(0.2)
        raise Stopped("interrupted")

    def choose(self, g, group, best, reasoning=""):
        """Write the only vote of a judge that is not asked over HTTP."""
        row = dict(group=g, vote=0, order="".join(group), best=best, answer=best, reasoning=reasoning)
        self.write({**row, "problem": None, "usage": None, "cost": 0.0})

    def failed(self, g, vote, status):
        """Note that a request got no good answer. A refusal is free; without one it may have cost as much as it can."""
        self.write({"group": g, "vote": vote, "failed": status, "cost": 0.0 if status else self.open[g, vote]})


def make_body(flags, refused, group, order):
    """The request for one vote, without what the model has refused."""
    shown = "\n\n".join(f"--- Story {a} ---\n{group[label]['text'].strip()}" for a, label in zip("ABCD", order))
    labels, count = ", ".join("ABCD"[: len(order)]), ("two", "three", "four")[len(order) - 2]
    text = PROMPT.format(count=count, labels=labels, stories=shown)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    limit = "max_completion_tokens" if "max_tokens" in refused else "max_tokens"
    body = {"model": flags.model, "messages": messages, limit: flags.max_new_tokens, "temperature": flags.temperature}
    return {key: value for key, value in body.items() if key not in refused}


def dollars(flags, tokens_read, tokens_written):
    """What so many tokens cost; 0 when the price is not known."""
    price = flags.price or (0, 0)
    return (tokens_read * price[0] + tokens_written * price[1]) / 1e6


def read_reply(reply, labels):
    """(label, reasoning) from a judge's reply; label None unless one of the labels, and no other, is named as best."""
    text = re.sub(r"[*`\\]", "", reply.rpartition("</think>")[2])
    named = {(bracketed or bare).upper() for bracketed, bare in ANSWER.findall(text)}
    text = ANSWER.sub("", text)
    found = re.search(r"reasoning[\s_\"']*[:=：](.*)", text, re.I | re.S)
    reasoning = (found[1] if found else text).strip().removeprefix("[").removesuffix("]").strip()
    return (named.pop() if len(named) == 1 and named <= set(labels) else None), reasoning


def read_response(content, labels):
    """What a row of the answers takes from a chat completion's bytes; problem says why there is no answer in it."""
    text = hide_key(content.decode("utf-8", "replace"))
    row = dict(answer=None, reasoning="", problem="a reply that is no chat completion", reply=text[:10_000], usage=None)
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        data = json.loads(text)
        usage = {key: (data.get("usage") or {}).get(key) for key in ("prompt_tokens", "completion_tokens")}
        row["usage"] = usage if all(type(n) is int and n >= 0 for n in usage.values()) else None
        choice = data["choices"][0]
        reply = choice["message"].get("content") or choice["message"].get("refusal") or ""
        row["answer"], row["reasoning"] = read_reply(reply, labels)
        cut = choice.get("finish_reason") == "length"
        problem = "a reply cut off at --max_new_tokens" if cut else f"a reply that names none of {labels} as the best"
        row.update(reply=reply, problem=None if row["answer"] else problem)
    return row


def ask(flags, session, answers, groups, g, vote):
    """Ask for a vote of group g over HTTP; every answer goes to the file. Returns None, or why it could not be read.

    It takes 1 + --retries requests at most, failed and unreadable ones together, beside those that teach what a model
    refuses. Raises ApiError and Stopped.
    """
    order, sent = order_of(flags.seed, g, vote, len(groups[g])), 0

    def turn(seconds, status):  # before every request
        nonlocal sent
        if seconds:
            answers.failed(g, vote, status)
            answers.note = f"{status or 'no answer'}, again in {seconds:.1f} s"
        if status == 429:  # the others would be told the same
            answers.hold = max(answers.hold, time.monotonic() + seconds)
        answers.stop.wait(max(seconds, answers.hold - time.monotonic()))
        answers.reserve(g, vote, most, flags)
        sent += 1

    while True:
        body = make_body(flags, answers.refused, groups[g], order)
        size = sum(len(message["content"].encode()) for message in body["messages"])
        most = dollars(flags, size + 50, flags.max_new_tokens)  # no token is shorter than a byte; 50: for the roles
        try:
            url = f"{flags.base_url}/chat/completions"
            response = post(session, url, body, flags.timeout, flags.retries - sent, turn)
        except ApiError as error:
            answers.failed(g, vote, error.status)
            hints = {"max_tokens": "max_completion_tokens", "temperature": "temperature"}
            unwanted = [name for name, hint in hints.items() if name in body and hint in str(error)]
            if error.status not in (400, 422) or not unwanted:
                raise
            answers.write({"refused": unwanted[0]})
            sent -= 1
            continue
        row = read_response(response.content, "ABCD"[: len(order)])
        best = order["ABCD".index(row["answer"])] if row["answer"] else None
        cost = dollars(flags, *row["usage"].values()) if row["usage"] else most
        answers.write({"group": g, "vote": vote, "order": order, "best": best, **row, "cost": cost})
        answers.note = ""
        if best or sent > flags.retries:
            return row["problem"]


def judge_openai(flags, groups, answers, session):
    """Ask for every missing vote. Returns {group: why it is undecided}, and when it ended early (exit code, why)."""
    undecided, ended, votes, in_a_row, begun, before = {}, None, 0, 0, time.perf_counter(), answers.cost
    todo = collections.deque((g, v) for g in range(len(groups)) for v in missing(answers.groups[g], flags.votes))
    planned, signals = set(todo), []

    def interrupted(number, frame):
        if signals:
            os._exit(128 + number)  # nothing that came is lost
        signals.append(number)
        answers.stop.set()

    handlers = {number: signal.signal(number, interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
    with concurrent.futures.ThreadPoolExecutor(flags.concurrency) as pool:
        flying = {}
        while flying or todo and not answers.stop.is_set():
            room = flags.concurrency if votes else 1  # a wrong key or model costs one request, not eight
            while todo and len(flying) < room and not answers.stop.is_set():
                g, v = todo.popleft()
                flying[pool.submit(ask, flags, session, answers, groups, g, v)] = g
            for future in concurrent.futures.wait(flying, 0.2, concurrent.futures.FIRST_COMPLETED).done:
                g, code = flying.pop(future), 0
                try:
                    problem = future.result()
                except ApiError as error:  # without a single answer the server is taken to be out of reach
                    hopeless, unlucky = error.hopeless, not votes and error.status not in (400, 413, 422)
                    problem, code = str(error), 2 if hopeless else 1 if unlucky else 0
                except Stopped as error:
                    problem, code = str(error), 1
                except OSError as error:  # a disk that is full, most often
                    problem, code = f"{answers.path}: {error.strerror}", 1
                votes, in_a_row = (votes, in_a_row + 1) if problem else (votes + 1, 0)
                if problem and not code:
                    undecided[g] = problem
                if code or in_a_row == 10:
                    ended = ended or (code or 1, problem)
                    answers.stop.set()
                extra = g, flags.votes
                if extra not in planned and missing(answers.groups[g], flags.votes) == [flags.votes]:  # a tie
                    planned.add(extra)
                    todo.appendleft(extra)
            left, share = len(todo) + len(flying), (len(todo) + len(flying)) / max(1, votes)
            seconds, cost = share * (time.perf_counter() - begun), share * (answers.cost - before)
            ahead = f"; left: {seconds:,.0f} s, ${cost:.2f}" if votes else ""
            note = "waiting for what was sent; Ctrl-C again ends at once" if signals else answers.note
            so_far = f"{votes:,} of {votes + left:,} votes; {sum(answers.tokens):,} tokens, ${answers.cost:.4f}"
            progress(f"{so_far}{ahead}  {note}")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if signals:
        ended = 128 + signals[0], "interrupted"
    return undecided, ended


def load_judges(flags):
    """The models of --scary and --plain, and their tokenizer."""
    if not flags.scary or not flags.plain:
        fail("--judge local needs two checkpoints: --scary, and --plain, from which it was trained")
    device, dtype = get_device(flags.device, flags.dtype)
    checkpoints = [load_checkpoint(path) for path in (flags.scary, flags.plain)]
    scary, plain = (checkpoint["tokenizer"] for checkpoint in checkpoints)
    if scary != plain:
        scary, plain = ("characters" if isinstance(spec, dict) else spec for spec in (scary, plain))
        fail(f"{flags.scary} and {flags.plain} have different tokenizers ({scary}, {plain}), so no token to compare")
    models = [load_model(p, c, device, dtype, dtype).pack() for p, c in zip((flags.scary, flags.plain), checkpoints)]
    return models, get_tokenizer(checkpoints[0]["tokenizer"])


def prepare(story, tokenizer, window):
    """(context, tokens, cut): what a story continues, what is scored of it, and whether that goes beyond the window."""
    text, prompt = story["text"], story["prompt"] if story["text"].startswith(story["prompt"]) else ""
    start = [tokenizer.eot_token] if tokenizer.special_tokens_set else []  # a story begins where another ends
    name = f"the story {story['id']!r}"
    context = (start + encode(tokenizer, prompt, name))[-max(1, window // 2) :]
    tokens = encode(tokenizer, text[len(prompt) :], name)
    context, tokens = (context, tokens) if context else (tokens[:1], tokens[1:])
    room = window + 1 - len(context)  # the last token is predicted, never read
    return context, tokens[:room], len(tokens) > room


def repeated(tokens, n):
    """The share of the runs of n tokens that stood there before: seq-rep-n of Welleck et al. 2020."""
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


@torch.no_grad()
def mean_losses(model, rows):
    """The mean cross-entropy, in nats, of the tokens of each (context, tokens); the rows are one batch."""
    longest, device = max(len(c + t) for c, t in rows), model.embed.device
    idx = [(c + t)[:-1] + [0] * (longest - len(c + t)) for c, t in rows]
    targets = [[-1] * (len(c) - 1) + t + [-1] * (longest - len(c + t)) for c, t in rows]
    losses = model(torch.tensor(idx, device=device), torch.tensor(targets, device=device), reduction="none")
    return [part.mean().item() for part in losses.split([len(t) for _, t in rows])]


def judge_local(flags, groups, answers, models, tokenizer):
    """Choose by the cross-entropy difference of Moore and Lewis (2010), a group at a time: nats a token that a story is
    likelier under --scary than under --plain, less --repetition_penalty times the share of it that is repetition."""
    window, n = min(model.config.block_size for model in models), 4 if tokenizer.name == "gpt2" else 16  # 16 characters
    todo, undecided, cut = [g for g in range(len(groups)) if missing(answers.groups[g], 1)], {}, 0
    for i, g in enumerate(todo, 1):
        rows = {label: prepare(story, tokenizer, window) for label, story in groups[g].items()}
        cut += sum(longer for _, _, longer in rows.values())
        rows = {label: (context, tokens) for label, (context, tokens, _) in rows.items() if tokens}
        if not rows:
            undecided[g] = "nothing after their prompts"
            continue
        scary, plain = (mean_losses(model, list(rows.values())) for model in models)
        again = [repeated(tokens, n) for _, tokens in rows.values()]
        scores = [round(b - a - flags.repetition_penalty * r, 5) for a, b, r in zip(scary, plain, again)]
        if not all(map(math.isfinite, scores)):
            fail(f"{flags.scary}, {flags.plain}: a loss is not finite", code=1)
        best = list(rows)[scores.index(max(scores))]
        cells = ", ".join(f"{label} {x:.4f} ({r:.1%} repeated)" for label, x, r in zip(rows, scores, again))
        answers.choose(g, groups[g], best, f"Nats a token likelier under --scary, less repetition: {cells}.")
        progress(f"{i} of {len(todo)} groups")
    if cut:
        print(f"longer than the window of {window} tokens, judged by their beginning: {cut} stories", file=sys.stderr)
    return undecided, None


def read_key(question, keys):
    """One of the keys as it is pressed, or from a line where stdin is no terminal; q when the input ends."""
    key, live = " ", termios and sys.stdin.isatty()
    before = termios.tcgetattr(sys.stdin) if live else None
    try:
        if live:
            tty.setcbreak(sys.stdin)  # drops what was typed before the question
        print(question, end=" ", flush=True)
        while key.lower() not in list(keys):
            line = os.read(sys.stdin.fileno(), 1).decode("utf-8", "replace") if live else sys.stdin.readline()
            key = line.strip() if line else "q"
    finally:
        if live:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
    print(key.upper())
    return key.lower()


def judge_human(flags, groups, answers):
    """Show the stories of a group in the terminal, and take a key."""
    width, undecided = min(100, shutil.get_terminal_size().columns), {}
    todo = [g for g in range(len(groups)) if missing(answers.groups[g], 1)]
    for i, g in enumerate(todo, 1):
        for label, story in groups[g].items():
            lines = "".join(c if c.isprintable() or c == "\n" else " " for c in story["text"]).splitlines()
            print(f"\n{f'--- {label} ':-<{width}}", *(textwrap.fill(line, width) for line in lines), sep="\n")
        question = f"\nGroup {i} of {len(todo)}: which is the scariest, {', '.join(groups[g])}? (s skips, q ends)"
        key = read_key(question, "".join(groups[g]).lower() + "sq")
        if key == "q":
            return undecided, (0, "ended by q")
        if key == "s":
            undecided[g] = "skipped"
        else:
            answers.choose(g, groups[g], key.upper())
    return undecided, None


def write_lines(path, rows, answers):
    """Replace a .jsonl file whole and at once."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        fail(f"{path}: {error.strerror}; the answers are in {answers.path}, and the same command goes on", code=1)


def ranked_row(g, group, answers, best):
    """A line of ranked.jsonl."""
    rows = answers.groups[g]
    agrees = next((row for row in rows if best and row["best"] == best), None)
    reasoning = agrees["reasoning"] if agrees else ""
    if agrees and agrees["order"] != "".join(group):
        reasoning += f" (this vote was shown {agrees['order']} as {''.join(group)})"
    votes = [{key: row.get(key) for key in ("vote", "order", "answer", "best", "reasoning", "problem")} for row in rows]
    usage = {"prompt_tokens": 0, "completion_tokens": 0}
    usage = {key: sum(row["usage"][key] for row in rows if row["usage"]) for key in usage}
    stories = {label: {key: story[key] for key in ("id", "prompt", "text")} for label, story in group.items()}
    row = dict(group=g, stories=stories, best=best, reasoning=reasoning, votes=votes)
    return {**row, "judge": answers.settings, "usage": usage}


def report(flags, groups, answers):
    """Print how often votes agreed and which places won, beside chance."""
    pairs, agreed, chance, places, size = 0, 0, 0.0, collections.Counter(), len(groups[0])
    for g, group in enumerate(groups):
        rows = [row for row in answers.groups[g] if row["best"]]
        first = [row["best"] for row in rows if row["vote"] < flags.votes]  # the others come after disagreement
        n = len(first) * (len(first) - 1) // 2
        pairs, chance = pairs + n, chance + n / len(group)
        agreed += sum(a == b for i, a in enumerate(first) for b in first[:i])
        if len(group) == size:  # the last may have fewer places
            places.update(row["answer"] for row in rows)
    if pairs:
        print(f"agreement: {agreed / pairs:.0%} of {pairs} pairs of votes; by chance {chance / pairs:.0%}")
    if flags.judge != "local" and (total := places.total()):
        cells = ", ".join(f"{place} {places[place] / total:.0%}" for place in "ABCD"[:size])
        print(f"places: {cells} of {total} votes; by chance {1 / size:.0%} each")
        [(place, most)] = places.most_common(1)
        tail = sum(math.comb(total, i) * (size - 1) ** (total - i) for i in range(most, total + 1)) / size**total
        p = min(1.0, size * tail)  # the tail of the binomial distribution, for any of the places
        if p < 0.01:
            print(f"WARNING: {place} won {most} of {total} times. A judge without a favourite place does so with a")
            print(f"probability of {p:.1g}: this one goes by the place, and its choices mean as much less.")


def finish(flags, best, groups, answers, undecided, ended):
    """Write what is decided, print the report, and exit with the code of a run that ended early."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)  # the line of progress
    lacking = {g for g in range(len(groups)) if missing(answers.groups[g], flags.votes)}
    chosen = {g: None if g in lacking else winner(answers.groups[g]) for g in range(len(groups))}
    left = {g for g in lacking if g not in undecided}
    undecided = {g: undecided.get(g, "votes split") for g in chosen if chosen[g] is None and g not in left}
    if len(left) < len(groups):
        rows = [ranked_row(g, groups[g], answers, chosen[g]) for g in chosen if g not in left]
        write_lines(flags.out, rows, answers)
        write_lines(best, [groups[g][label] for g, label in chosen.items() if label], answers)
        print(f"{flags.out}: {len(rows):,} of {len(groups):,} groups; {best}: {len(rows) - len(undecided):,} stories")
        report(flags, groups, answers)
    for why in dict.fromkeys(undecided.values()):
        print(f"undecided, {why}: groups {', '.join(str(g) for g in undecided if undecided[g] == why)}")
    if flags.judge == "openai":
        cost, (read, written) = f"at most ${answers.cost:.4f}" if flags.price else "cost unknown", answers.tokens
        print(f"in all: {answers.requests:,} requests, {read:,} tokens in, {written:,} out, {cost}")
    if ended:
        fail(f"{ended[1]}; {len(left):,} groups are left, and the same command goes on", code=ended[0])


def dry_run(flags, groups, answered):
    """Print the first request, and what to expect of all."""
    todo = [(g, v) for g in range(len(groups)) for v in missing(answered.get(g, []), flags.votes)]
    bodies = [make_body(flags, (), groups[g], order_of(flags.seed, g, v, len(groups[g]))) for g, v in todo]
    if bodies:
        print(f"POST {flags.base_url}/chat/completions\n{json.dumps(bodies[0], indent=2, ensure_ascii=False)}\n")
    read, written = sum(len(m["content"]) for body in bodies for m in body["messages"]) // 4, 80 * len(bodies)
    print(f"requests: {len(bodies):,}, and one more for every group whose votes are split")
    print(f"tokens: about {read:,} read (4 characters each) and {written:,} written (80 a reply)")
    print(f"dollars: {f'about {dollars(flags, read, written):.2f}' if flags.price else 'unknown, see --price'}")


def main():
    flags = get_flags()
    if flags.dry_run and flags.judge != "openai":
        fail("--dry_run: only --judge openai sends anything")
    flags.price = flags.price or PRICES.get(flags.model)
    if flags.max_cost is not None and not flags.price:
        fail(f"--max_cost: the price of {flags.model} is not known here; say it with --price IN OUT")
    flags.votes = flags.votes if flags.judge == "openai" else 1
    stem, extension = os.path.splitext(os.path.basename(flags.out))
    stem = stem.replace("ranked", "best") if "ranked" in stem else f"{stem}_best"
    path = f"{flags.out}.answers"
    best = flags.best or os.path.join(os.path.dirname(flags.out), stem + extension)
    if len(set(map(os.path.realpath, (flags.stories, flags.out, best, path)))) < 4:
        fail("--out and --best must be files of their own, not each other or the stories")
    if not os.path.isdir(os.path.dirname(best) or ".") and flags.best:
        fail(f"--best {best}: there is no such folder")
    for file in (flags.out, best):
        if os.path.exists(file) and not os.path.exists(path) and not flags.overwrite:
            fail(f"{file}: is there, but not {path}; name another --out, or --overwrite it")
    stories = read_stories(flags.stories)
    groups = make_groups(stories, flags.seed)
    if flags.judge == "openai":
        judge, tools = judge_openai, () if flags.dry_run else (api_session(flags.base_url, flags.concurrency),)
        settings = dict(model=flags.model, base_url=flags.base_url, temperature=flags.temperature)
        settings["prompt"] = hashlib.sha256((SYSTEM + PROMPT).encode()).hexdigest()[:12]
    elif flags.judge == "local":
        judge, tools = judge_local, load_judges(flags)
        settings = dict(repetition_penalty=flags.repetition_penalty, dtype=str(tools[0][0].dtype)[6:])
        for name in ("scary", "plain"):
            file = getattr(flags, name)
            settings[name] = f"{file} of {time.ctime(os.path.getmtime(file))}"
    else:
        judge, tools, settings = judge_human, (), {}
    texts = json.dumps([[story["id"], story["prompt"], story["text"]] for story in stories])
    stories = f"{len(stories)} of {hashlib.sha256(texts.encode()).hexdigest()[:12]}"
    settings = {"judge": flags.judge, **settings, "seed": flags.seed, "stories": stories}
    if flags.dry_run and (flags.overwrite or not os.path.exists(path)):
        return dry_run(flags, groups, {})
    answers = Answers(path, settings, flags.overwrite and not flags.dry_run)
    with answers.file:
        if flags.dry_run:
            return dry_run(flags, groups, answers.groups)
        try:
            undecided, ended = judge(flags, groups, answers, *tools)
        except KeyboardInterrupt:
            undecided, ended = {}, (130, "interrupted")
        finish(flags, best, groups, answers, undecided, ended)


if __name__ == "__main__":
    run(main)
