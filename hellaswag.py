"""
Score checkpoints on HellaSwag, beside the published figures for GPT-2 and GPT-3.

    python hellaswag.py out/gpt/ckpt_004600.pt
    python hellaswag.py out/gpt/milestone_*.pt --style harness     accuracy over the steps of a run
    python hellaswag.py --hf openai-community/gpt2                 a model of transformers (pip install transformers)
    torchrun --standalone --nproc_per_node=8 hellaswag.py out/gpt/milestone_*.pt

Four endings, one of them right: acc takes the ending with the least loss, acc_norm the one with the least loss per
token (--style completion: the text as it stands) or per character (--style harness: as EleutherAI's
lm-evaluation-harness cleans and counts it). The 10,042 questions are downloaded once. Every answer goes to --details at
once, and what is there is not computed again: stopped, the same command goes on where it was.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import dataclasses
import json
import os
import re
import sys
import threading
import time
import urllib.parse

import requests
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

PUBLISHED = {  # acc, acc_norm
    "completion": {
        "GPT-2 124M": (0.2859, 0.2955),
        "GPT-2 1.5B": (0.3842, 0.4893),
        "GPT-3 125M (its paper)": (None, 0.337),
        "GPT-3 1.3B (its paper)": (None, 0.547),
    },
    "harness": {"GPT-2 124M": (0.2892, 0.3114), "GPT-2 1.5B": (0.4004, 0.5089)},
}


def get_flags():
    here = os.path.dirname(os.path.abspath(__file__))
    flags = Flags()
    add = flags.add_argument
    add("checkpoints", type=checkpoint_path, metavar="CHECKPOINT", nargs="*", help=".pt files, or folders of runs")
    add("--hf", metavar="NAME_OR_DIR", help="a causal language model of transformers")
    add("--style", default="completion", choices=["completion", "harness"], help="how questions become text")
    add("--data", default=os.path.join(here, "data", "hellaswag_val.jsonl"), help="downloaded when not there")
    add("--questions", type=number(int, 1), default=10_042, help="how many, from the first on")
    add("--details", default="out/hellaswag.jsonl", help="a line for each answer: losses, prediction, label")
    add("--tokens_at_once", type=number(int, 1), default=0, help="of a batch; not given: what suits the device")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of weights and activations")
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


# --- progress: the same in every script (tests/test_copies.py) ---


def progress(text):
    """One line on stderr, written over on a terminal, else every 5 seconds."""
    now, live = time.perf_counter(), sys.stderr.isatty()
    if now >= progress.next:
        progress.next = now + (0.1 if live else 5)
        print(f"\r{text}\033[K" if live else text, end="" if live else "\n", file=sys.stderr, flush=True)


progress.next = 0.0


# --- end of progress ---


def harness_question(encode, row, block_size):
    """(context, endings, their sizes in characters) as lm-evaluation-harness makes them: "activity: context", brackets
    and double spaces removed, an ending's tokens being those that the whole text has more than the context."""

    def clean(text):
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    query = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    context = encode(query.rstrip())  # spaces at its end belong to the endings
    texts = [clean(ending) for ending in row["endings"]]
    endings = [encode(f"{query} {text}")[len(context) :][:block_size] for text in texts]
    return context[-(block_size + 1 - max(map(len, endings))) :], endings, list(map(len, texts))


@torch.no_grad()
def score_plain(model, questions, tokens_at_once):
    """What `score` yields, for a model of transformers: whole rows, right-padded, which a causal model does not see."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i][0]))
    while order:
        longest = len(questions[order[-1]][0]) + max(len(e) for i in order for e in questions[i][1])
        chosen = [order.pop() for _ in range(min(len(order), max(1, tokens_at_once // (4 * longest))))]
        rows = [(questions[i][0] + ending, len(ending)) for i in chosen for ending in questions[i][1]]
        T = max(len(row) for row, _ in rows)
        idx = torch.tensor([row + [0] * (T - len(row)) for row, _ in rows], device=model.device)
        logits, sums = model(input_ids=idx).logits, []  # (4 n, T, V)
        for r, (row, n) in enumerate(rows):
            predicting = logits[r, len(row) - n - 1 : len(row) - 1].float()  # the others are never copied to fp32
            sums.append(F.cross_entropy(predicting, idx[r, len(row) - n : len(row)], reduction="sum"))
        yield chosen, torch.stack(sums).view(-1, 4).cpu()


def load_hf(name, device, dtype, special):
    """A causal language model of transformers, its encoder and its window.

    special: texts begin with what the tokenizer puts before them, as they do in lm-evaluation-harness.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        fail("--hf needs transformers: pip install transformers")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    except Exception as error:  # damaged files raise nearly everything
        fail(f"--hf {name}: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
    window = getattr(model.config, "max_position_embeddings", None) or 2**20
    return model, (lambda text: tokenizer.encode(text, add_special_tokens=special)), window


def read_details(path):
    """What earlier runs left in the details: {run: {question: row}}; a last line that was cut short is dropped."""
    found, start = {}, b'{"run": '  # of every line
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(path, "ab+") as f:
            f.seek(0)
            whole = 0
            for line_number, line in enumerate(f, 1):
                if not line.endswith(b"\n") and line[: len(start)] == start[: len(line)]:
                    break
                whole += len(line)
                try:
                    row = json.loads(line)
                    good = all(type(row[key]) is int for key in ("question", "prediction", "prediction_norm", "label"))
                    found.setdefault(row["run"], {})[row["question"]] = row
                except (ValueError, KeyError, TypeError, RecursionError):
                    good = False
                if not good or row["question"] < 0 or not line.endswith(b"\n"):
                    fail(f"--details {path}: line {line_number} is not an answer; name a new file, or remove it")
            f.truncate(whole)
    except OSError as error:
        fail(f"--details {path}: {error.strerror}")
    return found


def append(path, rows):
    """Write answers to the details; exits with code 1 when the disk refuses."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    try:
        with open(path, "ab", buffering=0) as f:
            while lines:  # a disk that is nearly full takes a part
                lines = lines[f.write(lines) :]
    except OSError as error:
        fail(f"--details {path}: {error.strerror}; the answers before are kept, and the same command goes on", code=1)


def show(name, rows):
    """A line of the table: accuracies with their standard errors."""
    cells = []
    for key in ("prediction", "prediction_norm"):
        p = sum(row[key] == row["label"] for row in rows) / len(rows)
        cells.append(f"{p:.4f} ± {(p * (1 - p) / len(rows)) ** 0.5:.4f}")
    start = "\r\033[K" if sys.stderr.isatty() else ""  # over the progress line
    print(f"{start}{name:40}{len(rows):>10,}   {cells[0]:19}{cells[1]}", flush=True)


def answer(flags, path, tests, details, device, dtype, rank, ranks):
    """Every question's row of the details for one model, from the file or computed now; on rank 0, else None."""
    make = completion_question if flags.style == "completion" else harness_question
    if flags.hf:
        model, encode, window = load_hf(flags.hf, device, dtype, flags.style == "harness")
        step, scorer = None, score_plain
    else:
        checkpoint = load_checkpoint(path)
        if checkpoint["tokenizer"] not in ("gpt2", "bytes"):
            fail(f"{path}: knows only the characters of its own text, and the questions hold others")
        model = load_model(path, checkpoint, device, dtype, weights=dtype).pack()
        encode, window = get_tokenizer(checkpoint["tokenizer"]).encode_ordinary, model.config.block_size
        step, scorer = checkpoint.get("train", {}).get("step"), score
    files = sorted(entry.path for entry in os.scandir(path)) if os.path.isdir(path) else [path]
    identity = [[os.path.getsize(file), os.stat(file).st_mtime_ns] for file in files if os.path.exists(file)]
    run = json.dumps([path, identity, flags.style, str(dtype)[6:], flags.data, os.path.getsize(flags.data)])
    have = [run, details.get(run, {})]
    if ranks > 1:
        dist.broadcast_object_list(have, src=0)  # the times of files may differ between machines
    run, rows = have[0], {i: row for i, row in have[1].items() if i < len(tests)}
    mine = [i for i in range(len(tests)) if i not in rows][rank::ranks]
    questions = [make(encode, tests[i], window) for i in mine]
    most = 16_384 if flags.hf else 65_536  # there all logits exist at once
    tokens_at_once = flags.tokens_at_once or (most if device.type == "cuda" else 1024)
    batches, start, before = scorer(model, questions, tokens_at_once), time.perf_counter(), len(rows)
    while True:
        found = []
        for n, four in zip(*next(batches, ((), ()))):
            row = dict(run=run, question=mine[n], model=path, step=step, losses=[round(x, 5) for x in four.tolist()])
            row["prediction"] = four.argmin().item()
            row["prediction_norm"] = (four / torch.tensor(questions[n][2])).argmin().item()
            found.append({**row, "label": tests[mine[n]]["label"]})
        everyone = [found] * ranks
        if ranks > 1:
            dist.all_gather_object(everyone, found)
        if not any(everyone):
            break
        for row in sum(everyone, []):
            rows[row["question"]] = row
        if rank == 0:
            append(flags.details, sum(everyone, []))
            speed = (len(rows) - before) / (time.perf_counter() - start)
            progress(f"{path}: {len(rows):,} of {len(tests):,} questions, {speed:.1f} a second")
    return [rows[i] for i in range(len(tests))]


def main():
    flags = get_flags()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if bool(flags.checkpoints) == bool(flags.hf):
        fail("name one checkpoint or more, or a model of transformers with --hf")
    device, dtype = get_device(flags.device, flags.dtype)
    if ranks > 1:
        dist.init_process_group("gloo")  # only answers are passed on, on the CPU
    tests = get_hellaswag(flags.data, "--data names a file that is there")[: flags.questions]
    details = read_details(flags.details) if rank == 0 else {}
    if rank == 0:
        print(f"{flags.style + ' style':40}{'questions':>10}   {'acc':19}acc_norm")
    for path in flags.checkpoints or [flags.hf]:
        answers = answer(flags, path, tests, details, device, dtype, rank, ranks)
        if rank == 0:
            show(path, answers)
    if rank == 0:
        print()
        for name, published in PUBLISHED[flags.style].items():
            cells = [f"{p:.4f}" if p else "" for p in published]
            print(f"{name + ', published':40}{10042:>10,}   {cells[0]:19}{cells[1]}")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
