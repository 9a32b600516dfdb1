"""
Fine-tune a checkpoint: on stories, on the winners of a ranking, on its judgements (DPO), or with a judge (GRPO).

    python finetune.py --init out/gpt --data stories.txt                              three epochs over the stories
    python finetune.py --init out/finetune --data best.jsonl --out_dir out/best       50,000 tokens of rank.py's winners
    python finetune.py --init out/finetune --data ranked.jsonl --method dpo --out_dir out/dpo       winners and losers
    python finetune.py --init out/dpo --method grpo --prompts runs/openings.txt --judge openai --out_dir out/grpo
    torchrun --standalone --nproc_per_node=8 finetune.py --init out/gpt --data stories.txt --resume      on eight GPUs

Stories are a .txt (between lines <|endoftext|>), a .jsonl (field "text"; lines with a "prompt" were written by a model)
or token shards. Some are held out for the validation loss. With GRPO the model writes stories to prompts, and learns
from what a model behind an API makes of them, or two checkpoints (--judge local --scary out/finetune --plain out/gpt).
Learning rates are those of the checkpoint's pretraining, where it names them, times --lr_scale. Writes log.txt,
log.jsonl, stories.jsonl and ckpt.pt into --out_dir.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import concurrent.futures
import copy
import ctypes
import glob
import hashlib
import itertools
import json
import math
import os
import platform
import re
import signal
import sys
import time
import zipfile

import numpy as np
import requests
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def get_flags(pretraining=()):
    """The flags. What a checkpoint's flags, `pretraining`, say about those in PRETRAINED takes the defaults' place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, usage=argparse.SUPPRESS)
    add, yes_no = parser.add_argument, argparse.BooleanOptionalAction
    # data
    add("--init", required=True, help="the checkpoint to begin with: a .pt file, or the folder of a run")
    add("--data", help="stories: .txt, .jsonl or shards (*.bin); for dpo rank.py's ranked.jsonl")
    add("--prompts", help="grpo, instead of --data: a text file with a prompt a line")
    add("--val_share", type=float, default=0.05, help="share of stories, groups or prompts held out; one at least")
    add("--out_dir", default="out/finetune", help="where logs, stories and checkpoints go")
    # optimization
    add("--method", default="sft", choices=["sft", "dpo", "grpo"], help="from stories, from judgements, with a judge")
    add("--epochs", type=float, help="times that all the data is learned from; not given: 3, with --method dpo 2")
    add("--max_tokens", type=int, help="sft: instead of --epochs; not given: 50,000 for stories that a model wrote")
    add("--total_batch_size", type=int, help="tokens per step of sft; not given: few enough for 100 steps")
    add("--batch_size", type=int, default=16, help="rows, or stories, per micro-batch, at most; fewer take less memory")
    add("--lr_scale", type=float, help="times the learning rates; not given: 0.1, for dpo 0.2, for grpo 0.1")
    add("--matrix_lr", type=float, default=0.025, help="Muon's learning rate, for the matrices in the blocks")
    add("--down_lr", type=float, help="Muon's for the MLP's output matrix; not given: --matrix_lr")
    add("--embed_lr", type=float, default=0.7, help="AdamW's learning rate for the embedding")
    add("--head_lr", type=float, default=0.004, help="AdamW's for the head, when it is not tied")
    add("--weight_decay", type=float, default=0.05, help="of the matrices, decoupled, scaled by their learning rate")
    add("--momentum", type=float, default=0.95, help="Muon's momentum")
    add("--pairs", type=int, default=24, help="dpo: pairs of stories per step")
    add("--beta", type=float, help="the larger, the closer to the first weights; not given: 0.03, for grpo 0")
    # grpo
    add("--max_iters", type=int, default=50, help="grpo: steps")
    add("--prompts_per_step", type=int, default=8, help="grpo: prompts that stories are written to at a time")
    add("--group", type=int, default=8, help="grpo: stories per prompt, compared with each other")
    add("--passes", type=int, default=1, help="grpo: steps that learn from the same stories")
    add("--clip", type=float, default=0.2, help="grpo: how far they may move a token's probability, as a share")
    add("--norm_spread", action=yes_no, default=False, help="grpo: divide rewards by their spread in a group")
    add("--judge", choices=["local", "openai"], help="grpo: two checkpoints, or a model behind an API")
    add("--scary", help="local: a model trained on scary stories, .pt or the folder of a run")
    add("--plain", help="local: the model that it was trained from")
    add("--model", default="gpt-4o", help="openai: the judge; the key comes from OPENAI_API_KEY")
    add("--base_url", default="https://api.openai.com/v1", help="openai: where it answers")
    add("--max_requests", type=int, default=math.inf, help="openai: at most this many, those before --resume included")
    add("--max_cost", type=float, default=math.inf, help="openai: spend no more dollars, at gpt-4o's prices")
    # evaluation
    add("--val_loss_every", type=int, default=10, help="steps between validations; 0: at the end only")
    add("--sample_every", type=int, default=50, help="steps between stories; 0: none")
    add("--prompt", default="It was a dark and stormy night", help="how a story begins")
    add("--max_new_tokens", type=int, default=200, help="length of a story in tokens")
    # system
    add("--save_every", type=int, default=0, help="steps between checkpoints; 0: at the end only")
    add("--resume", action=yes_no, default=False, help="continue from OUT_DIR/ckpt.pt, if it is there")
    add("--overwrite", action=yes_no, default=False, help="replace an earlier run in --out_dir")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the activations")
    add("--compile", action=yes_no, help="compile the model (for sft); not given: on CUDA only")
    add("--seed", type=int, default=1337, help="of what is held out, the order of the data, and the stories")
    parser.set_defaults(**{name: pretraining[name] for name in PRETRAINED if name in pretraining})
    return parser.parse_args()


PRETRAINED = "matrix_lr down_lr embed_lr head_lr weight_decay momentum batch_size".split()
# What decides what is learned: it must equal the checkpoint's to resume.
DECISIVE = """init_sha256 data_sha256 method epochs max_tokens val_share total_batch_size lr_scale matrix_lr
    down_lr embed_lr head_lr weight_decay momentum pairs beta max_iters prompts_per_step group passes clip norm_spread
    judge scary plain model max_new_tokens seed""".split()


# --- start, the same in every script (tests/test_copies.py) ---
def fail(message, code=2):
    """Exit with one line on stderr: code 2 for what the user can put right, 1 when the work itself failed."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun all processes find the same
        clear = "\r\033[K" if sys.stderr.isatty() else ""  # the progress line
        print(f"{clear}{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    raise SystemExit(code)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows the script's docstring as it stands, and every default."""


def run(main, where=("",)):
    """Call main(); out of memory and errors of the system get one line. It ends with where[0], which main() may set."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # an unprintable character must not end the work
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch.save() hides a full disk
        no_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        advice = "; try a smaller --batch_size" * no_memory + "; try --no-compile" * ("compiler" in str(error))
        script, line = os.path.basename(sys.argv[0]), str(cause).split("\n")[0]
        print(f"{script}: {line}{advice}{where[0]}", file=sys.stderr)
        if not isinstance(cause, OSError) and not advice:
            raise
        raise SystemExit(2 if getattr(cause, "filename", None) else 1) from None  # a file that the user has named


def get_device(device, dtype):
    """The torch.device and the torch.dtype of --device and --dtype; auto takes the fastest that is there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda":
        if torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
            fail(f"--device cuda: PyTorch finds {torch.cuda.device_count()} GPUs here, fewer than processes")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if device == "cpu" and sys.platform == "linux":
        malloc_option = ctypes.CDLL(None).mallopt
        malloc_option(-4, 0)  # no mmap, and
        malloc_option(-1, -1)  # no trimming: getting freed memory back from the kernel took up to half of a step
    fast_bf16 = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    if device == "cpu":  # without native bf16 it is a hundred times slower in it
        fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype == "auto":
        dtype = "bfloat16" if fast_bf16 else "float32"
    return torch.device(device), getattr(torch, dtype)


# --- encoding, the same in every script (tests/test_copies.py) ---
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # GPT-2's, into words


def get_tokenizer(spec):
    """The tiktoken.Encoding of a checkpoint's "tokenizer"; <|endoftext|> is its last token.

    spec: "gpt2", "bytes", whose token i is byte i, or {"bpe": the tokens, byte i of them as chr(i)}.
    """
    if spec == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError):  # of requests, too, or a page to log in came instead
            fail("cannot fetch the GPT-2 tokenizer; see TIKTOKEN_CACHE_DIR in README.md")
    tokens = [chr(i) for i in range(256)] if spec == "bytes" else spec["bpe"]
    ranks, special = {token.encode("latin-1"): i for i, token in enumerate(tokens)}, {"<|endoftext|>": len(tokens)}
    name = "bytes" if spec == "bytes" else "bpe"
    return tiktoken.Encoding(name, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)


# --- trained model, the same in every script (tests/test_copies.py) ---
def norm(x):
    """RMSNorm without parameters (Zhang and Sennrich 2019)."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def linear(x, weight):
    return F.linear(x, weight.to(x.dtype))  # weights stay in fp32, products are in the dtype of the activations


def rotate(x, cos, sin):
    """Rotary position embedding (Su et al. 2021) of x (B, H, T, D): in fp32, since cos and sin are."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def attend_in_strips(q, k, v, strip=128):
    """Causal attention of q, k, v (B, H, T, D), some queries at a time: on a CPU a step takes 15 to 30% less."""
    (B, H, T, D), strips = q.shape, []
    q, k, v = q.reshape(B * H, T, D), k.reshape(B * H, T, D), v.reshape(B * H, T, D)
    ahead = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
    for i in range(0, T, strip):
        j = min(i + strip, T)
        scores = torch.baddbmm(ahead[i:j, :j], q[:, i:j], k[:, :j].mT, alpha=D**-0.5)  # (B H, j - i, j)
        strips.append(scores.softmax(-1) @ v[:, :j])
    return torch.cat(strips, dim=1).view(B, H, T, D)


class Block(nn.Module):
    def __init__(self, C, n_head):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Parameter(torch.randn(3, C, C) * C**-0.5)
        self.o = nn.Parameter(torch.zeros(C, C))
        self.up = nn.Parameter(torch.randn(4 * C, C) * C**-0.5)
        self.down = nn.Parameter(torch.zeros(C, 4 * C))

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        qkv = linear(norm(x), self.qkv.flatten(0, 1)).view(B, T, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        q, k = norm(rotate(q, cos, sin)).type_as(v), norm(rotate(k, cos, sin)).type_as(v)
        if x.device.type == "cpu":
            y = attend_in_strips(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(y.transpose(1, 2).reshape(B, T, C), self.o)
        return x + linear(linear(norm(x), self.up).relu().square(), self.down)


class GPT(nn.Module):
    """The same function as transformers' NanoChatForCausalLM. Weights are in fp32, activations in `dtype`.

    config: a dict of vocab_size, block_size, n_layer, n_head, n_embd, tie_weights, embed_norm and logit_softcap.
    """

    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        T, C, H, V = config["block_size"], config["n_embd"], config["n_head"], config["vocab_size"]
        rows = (V + 63) // 64 * 64  # padded for speed
        self.embed = nn.Parameter(torch.randn(rows, C) * (0.02 if config["tie_weights"] else 1.0))
        self.blocks = nn.ModuleList([Block(C, H) for _ in range(config["n_layer"])])
        self.head = None if config["tie_weights"] else nn.Parameter(torch.zeros(rows, C))
        frequencies = 1 / 10000 ** (torch.arange(0, C // H, 2).float() / (C // H))
        angles = torch.outer(torch.arange(T).float(), frequencies)  # (T, D / 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        padding = torch.zeros(rows).index_fill(0, torch.arange(V, rows), -torch.inf)
        self.register_buffer("padding", padding, persistent=False)  # 0 for every token, -inf behind them

    def forward(self, idx, targets=None, reduction="mean"):
        """Logits (B, T, rows) of tokens idx (B, T), or the loss in nats against targets (B, T); -1 is ignored."""
        T = idx.size(1)
        x = F.embedding(idx, self.embed).to(self.dtype)  # (B, T, C)
        if self.config["embed_norm"]:
            x = norm(x)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = linear(norm(x), self.embed if self.head is None else self.head).float()
        if cap := self.config["logit_softcap"]:
            logits = cap * torch.tanh(logits / cap)
        logits = logits + self.padding  # a slice would leave unaligned rows and cost extra passes
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)


# --- muon and adamw, the same in every script (tests/test_copies.py) ---
# The Polar Express (Amsel et al. 2025, arXiv 2505.16932): quintic polynomials that push singular values towards 1.
# The first also divides by 1.01, since a norm in bf16 may be a little too small.
POLAR_EXPRESS = (
    (8.156554524902461 / 1.01, -22.48329292557795 / 1.01**3, 15.878769915207462 / 1.01**5),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(X):
    """The nearest (semi-)orthogonal matrix to each of X (n, rows, cols), nearly: U S V^T becomes about U V^T."""
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value above 1
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        S = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, S, X, beta=a)  # a X + S X
    return X.mT if tall else X


@torch.no_grad()
def muon_step(params, moments, lr, momentum, weight_decay, dtype):
    """A step of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), orthogonalizing in `dtype`.

    params: matrices of one shape, or stacks (n, rows, cols) of them. Weight decay is decoupled and scaled by lr. Under
    torchrun all ranks hold the same gradients; each orthogonalizes its share, then they exchange the results.
    """
    rows, cols = params[0].shape[-2:]
    for p, m in zip(params, moments):
        m.lerp_(p.grad, 1 - momentum)
    updates = [p.grad.lerp(m, momentum).to(dtype).view(-1, rows, cols) for p, m in zip(params, moments)]  # Nesterov
    stack = torch.cat(updates)  # (n, rows, cols)
    if dist.is_initialized():
        share = slice(dist.get_rank(), None, dist.get_world_size())
        mine = orthogonalize(stack[share])
        stack.zero_()[share] = mine  # zeros elsewhere, so that the sum puts all shares together
        dist.all_reduce(stack)
    else:
        stack = orthogonalize(stack)
    for p, update in zip(params, stack.split([len(u) for u in updates])):
        p.mul_(1 - lr * weight_decay).sub_(update.view_as(p), alpha=lr * max(1, rows / cols) ** 0.5)


@torch.no_grad()
def adamw_step(p, m, v, step, lr, betas=(0.8, 0.95), eps=1e-10):
    """Step 1, 2, ... of AdamW without weight decay, written out because the first use of torch.optim takes 2.5 s."""
    m.lerp_(p.grad, 1 - betas[0])
    v.lerp_(p.grad.square(), 1 - betas[1])
    correction = (1 - betas[1] ** step) ** 0.5  # both means begin at 0
    p.addcdiv_(m, v.sqrt().add_(eps * correction), value=-lr * correction / (1 - betas[0] ** step))


# --- checkpoint to begin with ---
def open_checkpoint(path):
    """Open a checkpoint, or that in a folder, executing nothing of it: (path, checkpoint, model, tokenizer)."""
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    try:
        assert zipfile.ZipFile(path).testzip() is None  # torch.load() does not verify the checksums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if "chars" in checkpoint["tokenizer"]:
            fail(f"{path}: a model of characters; train_char.py --init goes on with those")
        # earlier versions left out what was as usual
        model = GPT(dict(tie_weights=False, embed_norm=True, logit_softcap=15.0) | checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
        tokenizer = get_tokenizer(checkpoint["tokenizer"])
        train = dict(step=None, flags={}) | checkpoint.get("train", {})
        assert tokenizer.n_vocab == model.config["vocab_size"]
    except (FileNotFoundError, PermissionError):
        raise
    except Exception:  # damaged files raise nearly everything
        fail(f"{path}: damaged, or not a checkpoint of these scripts")
    return path, dict(checkpoint, train=train), model, tokenizer


# --- losses ---
def backward_in_slices(model, idx, targets, share):
    """What loss = share * model(idx, targets); loss.backward() does; returns the loss. All targets count.

    Over GPT-2's vocabulary on a CPU a step takes a third of the time: cross-entropy and its gradient are computed for
    so few rows at once that they stay in the cache, and the gradients take the place of the logits.
    """
    T, cap = idx.size(1), model.config["logit_softcap"]
    x = F.embedding(idx, model.embed).to(model.dtype)  # as in GPT.forward(), up to the softcap
    x = norm(x) if model.config["embed_norm"] else x
    for block in model.blocks:
        x = block(x, model.cos[:T], model.sin[:T])
    logits = linear(norm(x), model.embed if model.head is None else model.head).flatten(0, 1)
    grads, targets, total = logits.detach(), targets.reshape(-1, 1), 0.0
    few = max(1, 2**20 // logits.size(1))
    for grad, target in zip(grads.split(few), targets.split(few)):
        capped, slope = grad.float(), 1.0
        if cap:
            tanh = torch.tanh(capped / cap)
            capped, slope = cap * tanh, 1 - tanh.square()
        logp = (capped + model.padding).log_softmax(-1)
        total -= logp.gather(-1, target).sum()
        p = logp.exp_().scatter_add_(-1, target, -torch.ones(target.shape))  # less 1 at the target
        grad.copy_(p * slope * (share / len(grads)))
    logits.backward(grads)
    return total * (share / len(grads))


def story_logps(model, stories, device):
    """Log-probabilities (n,) of the continuations of n stories (tokens, where the continuation begins)."""
    longest = max(len(tokens) for tokens, _ in stories) - 1
    length = min(model.config["block_size"], -(-longest // 64) * 64)  # few shapes: cuDNN builds a plan for each
    idx, targets = torch.zeros(len(stories), length, dtype=torch.long), torch.full((len(stories), length), -1)
    for row, (tokens, begin) in enumerate(stories):
        idx[row, : len(tokens) - 1] = torch.from_numpy(tokens[:-1])
        targets[row, begin - 1 : len(tokens) - 1] = torch.from_numpy(tokens[begin:])
    losses = model(idx.to(device), targets.to(device), reduction="none")
    return -losses.view(len(stories), length).sum(-1)


def compare(model, first_model, stories, pairs, n, beta, share):
    """Direct preference optimization, equation 7 of Rafailov et al. 2023 (arXiv 2305.18290), n pairs at a time.

    pairs (..., 2): indices of winners and losers in stories. first_model: the reference. Returns sums (3,), times
    share, of losses, reward margins and accuracies: 1 where the winner has the higher reward, 0.5 where both are equal.
    Unless under torch.no_grad(), the gradients of the loss are added to those of the model.
    """
    device = model.embed.device
    sums = torch.zeros(3, device=device)
    for i in range(0, len(pairs), n):
        found, yw_yl = pairs[i : i + n].unique(return_inverse=True)  # a story of several pairs is run once
        some = [stories[j] for j in found]
        with torch.no_grad():
            ref_logps = story_logps(first_model, some, device)
        rewards = beta * (story_logps(model, some, device) - ref_logps)
        margins = rewards[yw_yl[:, 0]] - rewards[yw_yl[:, 1]]
        parts = torch.stack((-F.logsigmoid(margins), margins, (margins.sign() + 1) / 2)).sum(1) * share
        if torch.is_grad_enabled():
            parts[0].backward()
        sums += parts.detach()
    return sums


# --- grpo: stories, their judges, and the loss ---
def forward_with_cache(model, idx, cache, t):
    """What GPT.forward() makes of tokens idx (N, n) at places t, t + 1, ...: logits (N, rows) behind the last of them.

    cache: keys and values (2, N, H, S, D) of each block, those of the places before t, to which these are added.
    """
    (N, n), H = idx.shape, model.config["n_head"]
    cos, sin = model.cos[t : t + n], model.sin[t : t + n]
    x = F.embedding(idx, model.embed).to(model.dtype)  # (N, n, C)
    x = norm(x) if model.config["embed_norm"] else x
    for block, kv in zip(model.blocks, cache):
        qkv = linear(norm(x), block.qkv.flatten(0, 1)).view(N, n, 3, H, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, H, n, D) each
        kv[:, :, :, t : t + n] = torch.stack((norm(rotate(k, cos, sin)).type_as(v), v))
        q, (k, v) = norm(rotate(q, cos, sin)).type_as(kv), kv[:, :, :, : t + n]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=n > 1)  # more than one only in the first call
        x = x + linear(y.transpose(1, 2).reshape(N, n, -1).type_as(x), block.o)
        x = x + linear(linear(norm(x), block.up).relu().square(), block.down)
    logits = linear(norm(x[:, -1]), model.embed if model.head is None else model.head).float()
    if cap := model.config["logit_softcap"]:
        logits = cap * torch.tanh(logits / cap)
    return logits + model.padding


@torch.no_grad()
def write_groups(args, model, tokenizer, prompts, seed):
    """Continue each of P prompts (tokens, text) G times, at temperature 1, up to <|endoftext|>: (groups, batch).

    groups: P lists of G stories. batch: idx (N, S) and targets (N, S) for the model, N = P * G, with targets of -1
    where it has not written, and the log-probabilities (N, S) of what it has. All rows advance together: those with
    longer prompts are still reading when others already write.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper it builds a plan, 50 ms, for every new length
    device, config, eot, G = model.embed.device, model.config, tokenizer.eot_token, args.group
    prompts = [prompt for prompt in prompts for _ in range(G)]
    begins = torch.tensor([[len(start)] for start, _ in prompts], device=device)  # (N, 1)
    N, S = len(prompts), min(config["block_size"] + 1, begins.max().item() + args.max_new_tokens)
    draws = torch.from_numpy(np.random.default_rng(seed).random((N, S), np.float32)).to(device)  # in [0, 1)
    tokens = torch.tensor([(start.tolist() + [eot] * S)[:S] for start, _ in prompts], device=device)
    mine, logps = torch.arange(S, device=device) - begins, torch.zeros(N, S, device=device)
    mine = (mine >= 0) & (mine < args.max_new_tokens)  # (N, S): the tokens that the model is to write
    shape = 2, N, config["n_head"], S, config["n_embd"] // config["n_head"]
    dtype = torch.float32 if device.type == "cpu" else model.dtype  # attention in bf16 is slow on a CPU
    cache, read = [torch.zeros(shape, dtype=dtype, device=device) for _ in model.blocks], 0
    for t in range(begins.min().item(), S):
        if not mine[:, t:].any():
            break
        logp = forward_with_cache(model, tokens[:, read:t], cache, read).log_softmax(-1)  # (N, rows)
        cdf = logp.exp().cumsum(-1, dtype=torch.float64 if logp.is_cuda else None)  # in fp32 a GPU's may decrease
        token = torch.searchsorted(cdf, draws[:, t, None] * cdf[:, -1:], right=True)  # (N, 1)
        tokens[:, t], logps[:, t] = token[:, 0].where(mine[:, t], tokens[:, t]), logp.gather(-1, token)[:, 0]
        mine[:, t + 1 :] &= tokens[:, t, None] != eot
        read = t
    batch = [tokens[:, :read], tokens.where(mine, -1)[:, 1 : read + 1], (logps * mine)[:, 1 : read + 1]]
    stories, n = [], 16 if tokenizer.name == "bytes" else 4
    for row, length, (start, prompt) in zip(tokens.cpu().numpy(), (mine & (tokens != eot)).sum(1).tolist(), prompts):
        new = row[len(start) : len(start) + length].tolist()
        runs = [tuple(new[i : i + n]) for i in range(length - n + 1)]
        repetition = 1 - len(set(runs)) / max(1, len(runs))  # seq-rep-n of Welleck et al. 2020; 1 for a few tokens
        story = dict(prompt=prompt, text=prompt + tokenizer.decode(new), tokens=row[: len(start) + length])
        stories.append(story | dict(begin=len(start), length=length, repetition=repetition))
    return [stories[i : i + G] for i in range(0, N, G)], [tensor.cpu() for tensor in batch]


PAIR = """Which of two stories is the scarier: which would leave a reader who is alone at night the more uneasy? What
makes no sense, or says the same thing again and again, is not scary. A story may end in the middle of a sentence: do
not hold that against it. Answer with one letter, A or B.\n\n--- Story A ---\n{}\n\n--- Story B ---\n{}"""
spent = dict(requests=0, answered=0, dollars=0.0)
ended = []  # why no more stories can be judged


def judge(args, judges, groups):
    """Rewards (P, G) of P groups of G stories that write_groups() returns; put your own judge here."""
    return judge_by_models(args, judges, groups) if judges else judge_by_api(args, groups)


@torch.no_grad()
def judge_by_models(args, judges, groups):
    """Rewards (P, G), the score of rank.py: a difference of cross-entropies (Moore and Lewis 2010), less repetition.

    The former is the nats a token that a story, without its end, is likelier under --scary than under --plain.
    """
    stories, rewards = [story for group in groups for story in group], []
    for i in range(0, len(stories), args.batch_size):
        some = stories[i : i + args.batch_size]
        texts = [(story["tokens"], story["begin"]) for story in some]
        scary, plain = [story_logps(model, texts, model.embed.device).tolist() for model in judges]
        rewards += [(a - b) / max(1, x["length"]) - x["repetition"] for a, b, x in zip(scary, plain, some)]
    return torch.tensor(rewards).view(len(groups), -1)


def ask(args, session, message):
    """The judge's answer, or what came instead, and what it costs in dollars."""
    body = dict(model=args.model, messages=[dict(role="user", content=message)], max_tokens=4, temperature=0)
    try:
        url = f"{args.base_url.rstrip('/')}/chat/completions"
        response = session.post(url, json=body, timeout=60, allow_redirects=False)
        response.raise_for_status()
        answer, usage = response.json(), response.json()["usage"]
        dollars = (2.5 * usage["prompt_tokens"] + 10 * usage["completion_tokens"]) / 1e6  # GPT-4o's prices
        return str(answer["choices"][0]["message"]["content"]), dollars
    except (requests.RequestException, ValueError, KeyError, IndexError, TypeError) as error:
        return f"{type(error).__name__}: {error}", 0.0


def judge_by_api(args, groups):
    """Rewards (P, G): the share of the others in its group that a story beats before a model behind an API.

    Which comes first is random. A pair without an answer is left out, a story with no answers gets its group's mean.
    """
    P, G, chance = len(groups), len(groups[0]), np.random.default_rng([args.seed, spent["requests"]])
    pairs = [(g, *chance.permutation(two)) for g in range(P) for two in itertools.combinations(range(G), 2)]
    messages = [PAIR.format(groups[g][a]["text"], groups[g][b]["text"]) for g, a, b in pairs]
    dollars = spent["dollars"] + sum(map(len, messages)) / 3 * 2.5e-6  # most tokens have more than three characters
    if spent["requests"] + len(pairs) > args.max_requests or dollars > args.max_cost:
        ended.append("--max_requests or --max_cost is reached: {requests} requests, ${dollars:.4f}".format(**spent))
        return torch.zeros(P, G)
    session, key = requests.Session(), "".join(os.environ.get("OPENAI_API_KEY", "").split())
    session.headers.update({"Authorization": f"Bearer {key}"} if key else {})
    again = requests.adapters.Retry(2, status_forcelist=(429, *range(500, 600)), allowed_methods=None, backoff_factor=1)
    session.mount(args.base_url, requests.adapters.HTTPAdapter(max_retries=again, pool_maxsize=8))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [args] * len(pairs), [session] * len(pairs), messages))
    spent["requests"] += len(pairs)
    spent["dollars"] += sum(dollars for _, dollars in answers)
    wins, answered = torch.zeros(2, P, G)
    for (g, a, b), (answer, _) in zip(pairs, answers):
        if letter := re.fullmatch(r"\W*([AB])\W*", answer):
            spent["answered"] += 1
            answered[g, [a, b]] += 1
            wins[g, a if letter[1] == "A" else b] += 1
    if not answered.any():
        ended.append(f"{args.base_url} answers neither A nor B but {answers[0][0]!r:.200}")
    rewards = wins / answered
    return rewards.where(answered > 0, rewards.nanmean(1, keepdim=True)).nan_to_num()


def policy_loss(args, model, first_model, batch, rewards):
    """Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300) on a batch of write_groups().

    A story's advantage is its reward, of rewards (P, G), less the mean of its group. The losses of tokens are divided
    by the same number however long their story is (Dr. GRPO: Liu et al. 2025, arXiv 2503.20783). Returns sums (2,): the
    loss, and the divergence from first_model per token. Adds the gradients of the loss to those of the model.
    """
    device, sums, written = model.embed.device, 0.0, (batch[1] >= 0).sum().item()
    advantages = rewards - rewards.mean(1, keepdim=True)  # (P, G)
    if args.norm_spread:
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    for some in zip(*(tensor.split(args.batch_size) for tensor in (*batch, advantages.view(-1, 1)))):
        idx, targets, old_logps, advantage = [tensor.to(device) for tensor in some]
        with torch.no_grad():
            ref_logps = -first_model(idx, targets, reduction="none").view_as(old_logps)
        logps = -model(idx, targets, reduction="none").view_as(old_logps)  # 0 where targets are -1
        ratio = (logps - old_logps).exp()
        gain = torch.min(ratio * advantage, ratio.clamp(1 - args.clip, 1 + args.clip) * advantage) * (targets >= 0)
        kl = (ref_logps - logps).exp() - (ref_logps - logps) - 1  # k3 of Schulman (joschu.net/blog/kl-approx.html)
        loss = (args.beta * kl - gain).sum() / (rewards.numel() * args.max_new_tokens)
        loss.backward()
        sums += torch.stack((loss, kl.sum() / written)).detach()
    return sums


# --- data ---
def encode(tokenizer, text):
    """The tokens (n,) of a text; an <|endoftext|> in it is text like any other."""
    if tokenizer.name == "bytes":  # tiktoken would take a thousand times as long
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)
    pieces = re.split(r"(\s{1000})", text)  # a million blanks in a row overflow tiktoken's stack
    return np.array([token for piece in pieces for token in tokenizer.encode_ordinary(piece)], np.int32)


def read_rows(path, key):
    """The objects on the lines of a .jsonl, which all have the key; {"text": ...} for each story of a .txt."""
    number, rows = 0, []
    try:
        with open(path, encoding="utf-8-sig") as f:
            if path.endswith(".txt"):  # stories stand between lines <|endoftext|>
                texts = re.split(r"^<\|endoftext\|>[^\S\n]*(?:\n|\Z)", f.read(), flags=re.M)
                return [dict(text=text.removesuffix("\n")) for text in texts]
            for line in f:
                number += 1
                if line.strip():
                    rows.append(json.loads(line))
                    if key not in rows[-1]:
                        raise ValueError(f'no "{key}"')
    except ValueError as error:  # of UTF-8, or of JSON, too
        fail(f"--data {path}, line {number}: {error}")
    return rows


def read_stories(path, tokenizer):
    """The stories of a .txt, a .jsonl or token shards as arrays of tokens, and whether a model wrote them."""
    eot, rows, shards = np.int32(tokenizer.eot_token), [], []
    if path.endswith(".bin"):
        folder, names = os.path.split(path)
        for name in sorted(glob.glob(os.path.join(glob.escape(folder), names))):  # a folder may be called gpt [v1]
            # 256 little-endian int32 (20240520, 1, number of tokens, zeros), then uint16 tokens
            header, tokens = np.fromfile(name, "<i4", 256), np.fromfile(name, "<u2", offset=1024)
            if (*header[:3],) != (20240520, 1, len(tokens)) or tokens.max(initial=0) >= tokenizer.n_vocab:
                fail(f"--data: {name} is not a whole token shard, or not of the checkpoint's tokens")
            shards.append(tokens.astype(np.int32))
        tokens = np.concatenate([[eot], *shards])
        stories = np.split(tokens, np.flatnonzero(tokens == eot))
    else:
        rows = read_rows(path, "text")
        stories = [np.append(eot, encode(tokenizer, row["text"])) for row in rows if row["text"].strip()]
    different = {story.tobytes(): story for story in stories if len(story) > 1}  # none learned from and held out, too
    return list(different.values()), any("prompt" in row for row in rows)


def read_groups(path, tokenizer, T):
    """The groups of rank.py that have a winner: (stories, groups).

    stories: (tokens, where the continuation begins), no longer than the context. groups: arrays (n, 2) of the indices
    of the winner and each loser. That a story ends is not learned from: it may have been cut.
    """
    stories, groups = [], []
    for row in read_rows(path, "best"):
        index = {}
        for key, story in row["stories"].items():
            before = np.append(np.int32(tokenizer.eot_token), encode(tokenizer, story["prompt"]))
            rest = encode(tokenizer, story["text"].removeprefix(story["prompt"]))
            tokens = np.append(before, rest)[: T + 1]
            if len(tokens) > len(before):  # something was written
                index[key] = len(stories)
                stories.append((tokens, len(before)))
        winner = index.pop(row["best"], None)
        if index and winner is not None:
            groups.append(np.array([(winner, loser) for loser in index.values()]))
    return stories, groups


def read_prompts(path, tokenizer, T):
    """The different lines of a file: (prompts, parts). prompts: (tokens, text). parts: arrays (1,) of their indices."""
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        texts = list(dict.fromkeys(line.rstrip("\n") for line in f if line.strip()))
    prompts = [(np.append(np.int32(tokenizer.eot_token), encode(tokenizer, text)), text) for text in texts]
    if max((len(tokens) for tokens, _ in prompts), default=0) > T:
        fail(f"--prompts {path}: one fills the whole context of {T} tokens")
    return prompts, [np.array([i]) for i in range(len(prompts))]


def hold_out(parts, share, seed):
    """(parts to learn from, parts to validate on): the latter a share of all, at least one, drawn by the seed."""
    order = np.random.default_rng(seed).permutation(len(parts)).tolist()
    n = min(max(1, round(share * len(parts))), len(parts) - 1)
    return [parts[i] for i in sorted(order[n:])], [parts[i] for i in sorted(order[:n])]


def in_epochs(parts, n, seed):
    """n elements (n, ...) of the arrays: each epoch holds all of them once, in an order drawn from (seed, epoch)."""
    epochs = range(-(-n // sum(map(len, parts))))
    orders = [np.random.default_rng([seed, epoch]).permutation(len(parts)) for epoch in epochs]
    return torch.from_numpy(np.concatenate([parts[i] for order in orders for i in order])[:n])


def in_rows(tokens, T):
    """Inputs and targets (rows, T) of a stream of tokens; the last row is filled up with targets of -1."""
    missing = -(len(tokens) - 1) % T
    return F.pad(tokens[:-1], (0, missing)).view(-1, T), F.pad(tokens[1:], (0, missing), value=-1).view(-1, T)


@torch.no_grad()
def validate(model, x, y, B, device, rank, world_size):
    """Mean loss in nats over the targets y (rows, T) of inputs x; batches are dealt out to the ranks."""
    total = torch.zeros((), device=device)
    for i in range(rank * B, len(x), world_size * B):
        total += model(x[i : i + B].to(device), y[i : i + B].to(device).long(), reduction="sum")
    return add_up([total.item()], device)[0] / (y >= 0).sum().item()


# --- log and checkpoint, the same in every script (tests/test_copies.py) ---
files = []  # on rank 0: log.txt, log.jsonl, stories.jsonl
signals = []  # received: a request to stop
where = [""]  # the step and the last checkpoint, for error messages


def add_up(values, device):
    """The sum of each number over all ranks."""
    if not dist.is_initialized():
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


@torch.no_grad()
def write_story(model, tokenizer, prompt, max_new_tokens, seed, device, temperature=0.8):
    """A story and the number of its new tokens. Each reads the whole context again; sample.py has a cache."""
    generator, T = torch.Generator().manual_seed(seed), model.config["block_size"]
    tokens = [tokenizer.eot_token] + tokenizer.encode_ordinary(prompt)
    start = len(tokens)
    while len(tokens) < start + max_new_tokens:
        context = tokens[-T:]
        length = min(T, -(-len(context) // 64) * 64)  # few shapes: cuDNN builds a plan for each
        idx = torch.tensor([context + [0] * (length - len(context))], device=device)
        p = F.softmax(model(idx)[0, len(context) - 1] / temperature, dim=-1).cpu()
        token = torch.multinomial(p, 1, generator=generator).item()
        if token == tokenizer.eot_token:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[1:]), len(tokens) - start


def log(line=None, file=1, **values):
    """On rank 0: a line to stdout and log.txt, values to files[file]: log.jsonl, or stories.jsonl."""
    if files and line:
        print(f"\r\033[K{line}" if sys.stdout.isatty() else line, flush=True)  # over the progress line
        print(line, file=files[0], flush=True)
    if files and values:
        print(json.dumps(values), file=files[file], flush=True)


def save(path, model, tokenizer, args, **train):
    """Write a checkpoint to a temporary file and rename it, so that the one before it survives whatever happens."""
    if not all(p.isfinite().all() for p in model.parameters()):
        fail(f"{path} is not written, since the weights are no longer finite: lower the learning rates", 1)
    checkpoint = dict(format=1, config=model.config, tokenizer=tokenizer, model=model.state_dict())
    with open(path + ".tmp", "wb") as f:
        torch.save(dict(checkpoint, train=dict(train, flags=vars(args))), f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def load_for_resume(path, args):
    """The checkpoint to go on from; exits when it is damaged, or DECISIVE flags differ from `args`."""
    try:
        assert zipfile.ZipFile(path).testzip() is None  # torch.load() does not verify the checksums
        saved = torch.load(path, map_location="cpu", weights_only=True)
        flags = {name: saved["train"]["flags"][name] for name in DECISIVE}
        assert "moments" in saved["train"]
    except Exception:  # damaged files raise nearly everything
        fail(f"--resume: {path} is damaged, or of another script or version, and can't be resumed")
    for name, value in flags.items():
        if value != getattr(args, name):
            fail(f"--resume: {path} was trained with {name} {value}, not {getattr(args, name)}")
    return saved


def open_out_dir(args):
    """On rank 0: open the logs in --out_dir and lock it. The checkpoint to resume, or None: the run is a new one."""
    os.makedirs(args.out_dir, exist_ok=True)
    for name in ("log.txt", "log.jsonl", "stories.jsonl"):
        files.append(open(os.path.join(args.out_dir, name), "a", encoding="utf-8"))
    try:
        import fcntl

        fcntl.flock(files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, even if it is killed
    except ImportError:  # Windows
        pass
    except BlockingIOError:
        fail(f"--out_dir {args.out_dir}: another run is at work there")
    earlier = [name for name in os.listdir(args.out_dir) if re.match(r"(ckpt|best|milestone).*\.pt$", name)]
    if earlier and not args.resume and not args.overwrite:
        fail(f"--out_dir {args.out_dir}: holds an earlier run; --resume goes on with it, --overwrite replaces it")
    if args.resume and any(name.startswith("ckpt") for name in earlier):
        return load_for_resume(os.path.join(args.out_dir, "ckpt.pt"), args)
    for name in earlier if args.overwrite else []:
        os.remove(os.path.join(args.out_dir, name))
    for file in files:
        file.truncate(0)
    with open(sys.argv[0], encoding="utf-8") as f:  # log.txt begins with this script
        print(f.read() + "=" * 100, " ".join(sys.argv), sep="\n", file=files[0])
    return None


def ask_to_stop(number, frame):
    signals.append(number)
    signal.signal(number, signal.SIG_DFL)  # a second one kills at once


# --- training ---
def main():
    args = get_flags()
    grpo, rank = args.method == "grpo", int(os.environ.get("RANK", 0))  # set by torchrun, as is WORLD_SIZE
    world_size = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
    if not (args.prompts if grpo else args.data):
        fail(f"--method {args.method} learns from a file: name it with {'--prompts' if grpo else '--data'}")
    if grpo and (args.judge is None or args.judge == "local" and not (args.scary and args.plain)):
        fail("--method grpo needs a judge: --judge openai, or --judge local with --scary and --plain")
    api = grpo and args.judge == "openai"
    if api and "//api.openai.com/" in args.base_url and not os.environ.get("OPENAI_API_KEY"):
        fail("OpenAI wants a key, and the environment variable OPENAI_API_KEY is not set")
    if grpo and min(args.group - 1, args.passes, args.max_iters, args.prompts_per_step, args.max_new_tokens) < 1:
        fail("--method grpo: --group must be 2 or more, --passes, --max_iters and the like 1 or more")
    if grpo and world_size > 1:
        fail("--method grpo runs in one process, without torchrun")
    init, base, model, tokenizer = open_checkpoint(args.init)
    args = get_flags(base["train"]["flags"])
    sft, T, B = args.method == "sft", model.config["block_size"], args.batch_size
    args.down_lr = args.matrix_lr if args.down_lr is None else args.down_lr
    args.lr_scale = dict(sft=0.1, dpo=0.2, grpo=0.1)[args.method] if args.lr_scale is None else args.lr_scale
    args.beta = (0.0 if grpo else 0.03) if args.beta is None else args.beta
    args.save_every = args.save_every or int(api)  # what was paid for is saved at every step
    path = os.path.join(args.out_dir, "ckpt.pt")
    if os.path.dirname(os.path.realpath(init)) == os.path.realpath(args.out_dir):
        fail(f"--out_dir {args.out_dir}: {init} lies there, and is never written to; give another folder")
    device, dtype = get_device(args.device, args.dtype)
    compiled = sft and (device.type == "cuda" if args.compile is None else args.compile)

    ddp = world_size > 1
    if ddp:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # what to learn from: stories of tokens, groups of pairs, or prompts
    if sft:
        noun, what, stories = "tokens", "different stories", []
        parts, by_a_model = read_stories(args.data, tokenizer)
        if by_a_model and args.epochs is None and args.max_tokens is None:
            args.max_tokens = 50_000
    elif grpo:
        noun, what = "prompts", "different prompts"
        stories, parts = read_prompts(args.prompts, tokenizer, T)
    else:
        noun, what = "pairs", "groups with a winner"
        stories, parts = read_groups(args.data, tokenizer, T)
    if len(parts) < 2:
        fail(f"{args.prompts if grpo else args.data}: fewer than two {what}, one to learn from and one to validate on")
    learned, held = hold_out(parts, args.val_share, args.seed)
    size, held_size = sum(map(len, learned)), sum(map(len, held))
    args.epochs = (3.0 if sft else 2.0) if args.epochs is None else args.epochs
    if sft:
        amount = args.epochs * size if args.max_tokens is None else args.max_tokens
        if args.total_batch_size is None:  # a power of two rows
            rows = min(amount / 100, base["train"]["flags"].get("total_batch_size") or 2**19) / T
            args.total_batch_size = T * 2 ** int(math.log2(max(1, rows)))
        total, steps = args.total_batch_size, math.ceil(amount / args.total_batch_size)
        if total % T:
            fail(f"--total_batch_size {total}: not a multiple of {T}, the checkpoint's context length")
        x, y = in_rows(in_epochs(learned, steps * total + 1, args.seed), T)
        val_x, val_y = in_rows(in_epochs(held, held_size, args.seed), T)
    else:
        total, steps = args.pairs, math.ceil(args.epochs * size / args.pairs)
        if grpo:
            total, steps = args.prompts_per_step, args.max_iters
        order, val_order = in_epochs(learned, steps * total, args.seed), in_epochs(held, held_size, args.seed)
    digest = hashlib.sha256()
    for weight in base["model"].values():
        digest.update(weight.contiguous().view(torch.uint8).numpy())
    parent = dict(path=init, step=base["train"]["step"], sha256=digest.hexdigest())
    data = np.concatenate([*map(np.ravel, parts), *(tokens for tokens, _ in stories)])
    args.init_sha256, args.data_sha256 = parent["sha256"], hashlib.sha256(data).hexdigest()

    model = model.to(device)
    model.dtype = dtype
    first_model = None if sft else copy.deepcopy(model)  # the reference
    judges = []
    for name in (args.scary, args.plain) if grpo and not api else ():
        name, checkpoint, judge_model, _ = open_checkpoint(name)
        if checkpoint["tokenizer"] != base["tokenizer"] or judge_model.config["block_size"] < T:
            fail(f"{name}: has another tokenizer, or a shorter context, than {init}")
        judge_model.dtype = dtype
        judges.append(judge_model.to(device))
    train_model = torch.compile(model, dynamic=False) if compiled else model  # stories use the uncompiled model

    # Muon for the matrices in the blocks, those of one shape together; AdamW for embedding and head
    square = [p for block in model.blocks for p in (block.qkv, block.o)]
    up, down = [block.up for block in model.blocks], [block.down for block in model.blocks]
    muon = [(square, args.matrix_lr), (up, args.matrix_lr), (down, args.down_lr)]
    adamw = [(model.embed, args.embed_lr)] + ([] if model.head is None else [(model.head, args.head_lr)])
    assert {*square, *up, *down, *(p for p, _ in adamw)} == set(model.parameters())
    moments = {p: torch.zeros_like(p) for p in model.parameters()}  # running means of the gradients,
    squares = {p: torch.zeros_like(p) for p, _ in adamw}  # and of their squares

    saved = open_out_dir(args) if rank == 0 else None
    step, train_time, batch, rewards, about = 0, 0.0, [], None, {}  # the last three: GRPO's
    if saved:
        model.load_state_dict(saved["model"])
        moments = {p: m.to(device) for p, m in zip(moments, saved["train"]["moments"])}
        squares = {p: v.to(device) for p, v in zip(squares, saved["train"]["squares"])}
        step, train_time = saved["train"]["step"], saved["train"]["train_time"]
        batch, rewards, about = saved["train"]["written"]
        spent.update(saved["train"]["spent"])
    if ddp:  # all ranks begin where rank 0 does
        step, train_time = add_up([step, train_time], device)  # theirs are 0
        for tensor in [*model.parameters(), *moments.values(), *squares.values()]:
            dist.broadcast(tensor.data, src=0)
    step = first_step = int(step)
    first_time, next_progress, stopping = train_time, 0.0, 0
    kept = f"{path} holds step {step}" if saved else "nothing is saved yet"

    parameters = sum(p.numel() for p in model.parameters())
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.platform()
    log(f"Python {platform.python_version()}, PyTorch {torch.__version__}, {machine}")
    log(f"{parameters:,} parameters on {world_size} x {device.type}, {dtype}; a step: {total:,} {noun} in rows of {T}")
    log(f"{len(learned):,} {what} to learn from ({size:,} {noun}), {len(held):,} held out ({held_size:,})")
    rates = ", ".join(f"{name} {getattr(args, name):g}" for name in ("matrix_lr", "down_lr", "embed_lr", "head_lr"))
    log(f"{steps} steps, {steps * total / size:.2f} epochs; {args.lr_scale:g} x {rates}")
    if saved:
        log(f"resumed from {path} at step {step}")
    rows, n = total // T, max(1, B // 2)  # rows of a step, and pairs of a micro-batch
    if compiled:  # before the clock starts
        some = slice(min(B, -(-rows // world_size)))
        train_model(x[some].to(device), y[some].to(device).long()).backward()
        model.zero_grad()
    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)

    while True:
        last, where[0] = step == steps, f" (after step {step}; {kept})"

        # validate, then save, before anything else can fail
        due = last or (args.val_loss_every and step % args.val_loss_every == 0)
        if due and not stopping and not api:
            if sft:
                row = dict(val_loss=validate(train_model, val_x, val_y, B, device, rank, world_size))
            elif grpo:
                prompts = [stories[i] for i in val_order[:total]]  # as many as a step has, at most
                groups, _ = write_groups(args, model, tokenizer, prompts, [args.seed, steps])
                row = dict(val_reward=judge(args, judges, groups).mean().item())
            else:
                mine, share = val_order[rank::world_size], 1 / held_size
                with torch.no_grad():
                    sums = compare(model, first_model, stories, mine, n, args.beta, share)
                row = dict(zip(("val_loss", "val_margin", "val_accuracy"), add_up(sums.tolist(), device)))
            timing = f"train_time:{1000 * train_time:.0f}ms step_avg:{1000 * train_time / max(1, step):.2f}ms"
            shown = " ".join(f"{name}:{value:.4f}" for name, value in row.items())
            log(f"step:{step}/{steps} {shown} {timing}", step=step, **row, train_time_ms=round(1000 * train_time))
        if step > first_step and (last or stopping or (args.save_every and step % args.save_every == 0)):
            if rank == 0:
                state = dict(moments=[*moments.values()], squares=[*squares.values()])
                state |= dict(written=(batch, rewards, about), spent=spent)
                save(path, model, base["tokenizer"], args, step=step, parent=parent, train_time=train_time, **state)
            kept = f"{path} holds step {step}"
        where[0] = f" (after step {step}; {kept})"
        if stopping:
            break
        if rank == 0 and args.sample_every and (last or step % args.sample_every == 0):
            story, length = write_story(model, tokenizer, args.prompt, args.max_new_tokens, args.seed, device)
            row = dict(id=step, step=step, prompt=args.prompt, text=story, tokens=length, seed=args.seed)
            log(f"\n{story}\n", file=2, checkpoint=f"{args.out_dir}, step {step}", **row)
        if last:
            break

        # a step
        start = time.perf_counter()
        if sft:
            sums, mine = torch.zeros(1, device=device), list(range(step * rows + rank, (step + 1) * rows, world_size))
            for some in [mine[i : i + B] for i in range(0, len(mine), B)]:
                idx, targets, share = x[some].to(device), y[some].to(device).long(), len(some) / rows
                if device.type == "cpu" and not compiled:
                    sums += backward_in_slices(model, idx, targets, share)
                else:
                    loss = train_model(idx, targets) * share
                    loss.backward()
                    sums += loss.detach()
        elif grpo:
            if step % args.passes == 0:
                prompts = [stories[i] for i in order[step // args.passes * total :][:total]]
                groups, batch = write_groups(args, model, tokenizer, prompts, [args.seed, step])
                rewards = judge(args, judges, groups)  # (P, G)
                if ended:
                    stopping = 1
                    continue
                about = dict(reward=rewards.mean().item(), spread=rewards.std(1).mean().item())
                for name in ("length", "repetition"):
                    about[name] = float(np.mean([story[name] for group in groups for story in group]))
                about |= spent if api else {}
            sums = policy_loss(args, model, first_model, batch, rewards)
        else:
            mine = order[step * total : (step + 1) * total][rank::world_size]
            sums = compare(model, first_model, stories, mine, n, args.beta, 1 / total)
        if ddp:
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # there may be fewer rows than ranks
                dist.all_reduce(p.grad)
        lr = args.lr_scale * min((step + 1) / max(1, 0.05 * steps), (steps - step) / steps)  # a twentieth up, then down
        for params, matrix_lr in muon:
            muon_step(params, [moments[p] for p in params], lr * matrix_lr, args.momentum, args.weight_decay, dtype)
        for p, adamw_lr in adamw:
            adamw_step(p, moments[p], squares[p], step + 1, lr * adamw_lr)
        model.zero_grad()
        *means, stopping = add_up([*sums.tolist(), len(signals)], device)  # tolist() waits for the GPU
        seconds = time.perf_counter() - start
        step, train_time, loss = step + 1, train_time + seconds, means[0]

        if not math.isfinite(loss):
            fail(f"the loss is {loss} at step {step}: lower the learning rates; {kept}", 1)
        names = ("train_loss", "kl") if grpo else ("train_loss", "train_margin", "train_accuracy")
        row = dict(zip(names, means)) | about | {"lr": lr * args.matrix_lr, f"{noun}_per_s": round(total / seconds, 1)}
        log(step=step, **row, train_time_ms=round(1000 * train_time))
        mean, live = (train_time - first_time) / (step - first_step), sys.stderr.isatty()
        if rank == 0 and (live or time.perf_counter() > next_progress):
            next_progress = time.perf_counter() + 10  # few lines in a file
            eta = f"{mean * (steps - step) / 60:.1f} minutes left"
            shown = f"reward {about['reward']:.4f}" if grpo else f"loss {loss:.4f}"
            text = f"step {step}/{steps}  {shown}  {total / mean:,.0f} {noun}/s  {eta}"
            print(f"\r{text}\033[K" if live else text, end="" if live else "\n", file=sys.stderr, flush=True)

    if ddp:
        add_up([0], device)  # wait for each other: the first to leave would have torchrun end the rest
        dist.destroy_process_group()
    if ended:
        fail(f"{ended[0]}; {kept}", 1)
    if stopping:
        fail(f"interrupted; {kept}", 128 + (signals[0] if signals else signal.SIGTERM))
    log(f"more stories: python sample.py {args.out_dir}")


if __name__ == "__main__":
    run(main, where)
