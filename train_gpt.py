"""
Pretrain a GPT on token shards: on a GPU, on several under torchrun, or on a CPU.

    python data/fineweb.py 19                                     1.9 B tokens of FineWeb
    python train_gpt.py                                           GPT-2's size (124M)
    torchrun --standalone --nproc_per_node=8 train_gpt.py         the same on eight GPUs: the same losses, sooner
    python train_gpt.py --resume                                  continues from OUT_DIR/ckpt.pt

runs/demo.sh has flags for a laptop, runs/nodes.sh is for several machines, runs/ghoul.sh for 1.5B parameters:
--n_layer 52 --n_embd 1536 --n_head 12 --tie_weights --no-embed_norm --logit_softcap 0, and their learning rates.
Writes log.txt, log.jsonl, stories.jsonl, ckpt.pt and, with --milestone_every, milestone_*.pt into --out_dir.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import ctypes
import glob
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
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def get_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, usage=argparse.SUPPRESS)
    add, yes_no = parser.add_argument, argparse.BooleanOptionalAction
    # data
    add("--train_files", default="data/fineweb10B/fineweb_train_*.bin", help="token shards to learn from")
    add("--val_files", default="data/fineweb10B/fineweb_val_*.bin", help="token shards for the validation loss")
    add("--tokenizer", default="gpt2", help="of the shards: gpt2, bytes, or the .json that data/prepare.py has made")
    add("--out_dir", default="out/gpt", help="where logs, stories and checkpoints go")
    # model
    add("--n_layer", type=int, default=12, help="blocks")
    add("--n_head", type=int, default=6, help="attention heads")
    add("--n_embd", type=int, default=768, help="width")
    add("--block_size", type=int, default=1024, help="context length in tokens")
    add("--tie_weights", action=yes_no, default=False, help="one matrix for the embedding and the head")
    add("--embed_norm", action=yes_no, default=True, help="RMSNorm after the embedding")
    add("--logit_softcap", type=float, default=15.0, help="squeeze logits into this range; 0 turns it off")
    # optimization
    add("--total_batch_size", type=int, default=2**19, help="tokens per step, over all GPUs and micro-batches")
    add("--batch_size", type=int, default=32, help="rows per micro-batch, at most; fewer take less memory")
    add("--max_iters", type=int, default=3600, help="training steps")
    add("--warmup_iters", type=int, default=0, help="steps of linear warm-up")
    add("--warmdown_frac", type=float, default=0.7, help="share of the steps over which the learning rates fall to 0")
    add("--matrix_lr", type=float, default=0.025, help="Muon's learning rate, for the matrices in the blocks")
    add("--down_lr", type=float, help="Muon's for the MLP's output matrix; not given: --matrix_lr")
    add("--embed_lr", type=float, default=0.7, help="AdamW's learning rate for the embedding")
    add("--head_lr", type=float, default=0.004, help="AdamW's for the head, when it is not tied")
    add("--weight_decay", type=float, default=0.05, help="of the matrices, decoupled, scaled by their learning rate")
    add("--momentum", type=float, default=0.95, help="Muon's momentum")
    # evaluation
    add("--val_loss_every", type=int, default=250, help="steps between validations; 0: at the end only")
    add("--val_tokens", type=int, default=10_485_760, help="tokens of a validation, at most")
    add("--target_loss", type=float, default=0.0, help="end the run at this validation loss")
    add("--hellaswag_every", type=int, default=0, help="steps between HellaSwag scores; 0: none")
    add("--hellaswag_questions", type=int, default=10_042, help="number of questions, from the first on")
    add("--sample_every", type=int, default=1000, help="steps between stories; 0: none")
    add("--prompt", default="It was a dark and stormy night", help="how a story begins")
    add("--max_new_tokens", type=int, default=200, help="length of a story in tokens")
    # system
    add("--save_every", type=int, default=1000, help="steps between checkpoints; 0: at the end only")
    add("--milestone_every", type=int, default=0, help="steps between weights that stay, without optimizer; 0: none")
    add("--resume", action=yes_no, default=False, help="continue from OUT_DIR/ckpt.pt, if it is there")
    add("--overwrite", action=yes_no, default=False, help="replace an earlier run in --out_dir")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the activations")
    add("--compile", action=yes_no, help="compile the model; not given: on CUDA only")
    add("--seed", type=int, default=1337, help="of the initial weights and the stories")
    return parser.parse_args()


HELLASWAG = "data/hellaswag_val.jsonl"
# The flags that decide what is learned: they must equal the checkpoint's to resume.
DECISIVE = """train_files tokenizer n_layer n_head n_embd block_size tie_weights embed_norm logit_softcap seed momentum
    total_batch_size max_iters warmup_iters warmdown_frac matrix_lr down_lr embed_lr head_lr weight_decay""".split()
# Peak dense bf16 TFLOP/s by the makers' data sheets. The first name found in that of the GPU counts.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "NVIDIA B200": 2250, "A100": 312}


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


# --- data ---
class Shards:
    """Token shards as one endless stream: after the last comes the first again.

    A shard is 256 little-endian int32 (20240520, 1, number of tokens, zeros), then uint16 tokens.
    """

    def __init__(self, pattern, flag, vocab_size):
        self.shards, (folder, names) = [], os.path.split(pattern)
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), names))):  # a folder may be called gpt [v1]
            header, size = np.fromfile(path, "<i4", 256), os.path.getsize(path)
            if size <= 1024 or tuple(header[:2]) != (20240520, 1) or size != 1024 + 2 * int(header[2]):
                fail(f"{flag}: {path} is not a whole token shard")
            self.shards.append(np.memmap(path, "<u2", "r", offset=1024))
            if self.shards[-1].max() >= vocab_size:
                fail(f"{flag}: {path} holds tokens beyond the {vocab_size:,} of --tokenizer")
        self.total = sum(map(len, self.shards))
        if self.total < 2:
            fail(f"{flag} {pattern}: no tokens there; data/fineweb.py and data/prepare.py make shards")

    def batch(self, position, B, T, device):
        """Inputs and targets (B, T) from `position` of the stream on."""
        parts, missing, position = [], B * T + 1, position % self.total
        while missing:
            for shard in self.shards:
                parts.append(shard[position : position + missing])
                missing -= len(parts[-1])
                position = max(0, position - len(shard))
        tokens = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        if device.type == "cuda":
            tokens = tokens.pin_memory()  # to be copied while the GPU still works on what came before
        tokens = tokens.to(device, non_blocking=True)
        return tokens[:-1].view(B, T), tokens[1:].view(B, T)


# --- evaluation ---
@torch.no_grad()
def validate(model, shards, val_tokens, B, T, device, rank, world_size):
    """Mean loss in nats over the first val_tokens targets of the shards; batches are dealt out to the ranks."""
    n, losses = min(val_tokens, shards.total - 1), [torch.zeros((), device=device)]
    for start in range(rank * B * T, n, world_size * B * T):
        x, y = shards.batch(start, B, T, device)
        counted = torch.arange(start, start + B * T, device=device).view(B, T) < n
        losses.append(model(x, y.where(counted, -1)) * min(B * T, n - start))
    return add_up([torch.stack(losses).sum().item()], device)[0] / n


@torch.no_grad()
def hellaswag(model, tokenizer, questions, device, rank, world_size):
    """Accuracy over HellaSwag (Zellers et al. 2019): the right ending has the least loss per token."""
    right, T = 0, model.config["block_size"]
    for question in questions[rank::world_size]:
        context = tokenizer.encode_ordinary(question["ctx"])
        endings = [tokenizer.encode_ordinary(" " + ending)[:T] for ending in question["endings"]]
        longest = max(map(len, endings))
        context = context[-(T + 1 - longest) :]
        length = min(T + 1, -(-(len(context) + longest) // 64) * 64)  # few shapes: cuDNN builds a plan for each
        rows = [context + ending + [0] * (length - len(context) - len(ending)) for ending in endings]
        idx = torch.tensor(rows, device=device)  # (4, length)
        losses = model(idx[:, :-1], idx[:, 1:], reduction="none").view(4, -1)[:, len(context) - 1 :].tolist()
        means = [sum(row[: len(ending)]) / len(ending) for row, ending in zip(losses, endings)]
        right += means.index(min(means)) == question["label"]
    return add_up([right], device)[0] / len(questions)


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
    args.down_lr = args.matrix_lr if args.down_lr is None else args.down_lr
    device, dtype = get_device(args.device, args.dtype)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    T, steps, path = args.block_size, args.max_iters, os.path.join(args.out_dir, "ckpt.pt")

    rank = int(os.environ.get("RANK", 0))  # set by torchrun, as is WORLD_SIZE
    world_size = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
    ddp, parent = world_size > 1, os.getppid()
    if ddp:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        everyone = [None] * world_size
        dist.all_gather_object(everyone, vars(args))
        for name, value in vars(args).items():
            if any(other[name] != value for other in everyone):
                fail(f"--{name} is not the same for all processes: {', '.join(str(other[name]) for other in everyone)}")

    # a step is `rows` rows of T tokens on each rank, B at a time
    rows = args.total_batch_size // (T * world_size)
    if rows * T * world_size != args.total_batch_size:
        fail(f"--total_batch_size {args.total_batch_size}: not a multiple of --block_size times processes")
    if args.n_embd % (2 * args.n_head):
        fail(f"--n_embd {args.n_embd}: not an even multiple of --n_head {args.n_head}")
    B = max(n for n in range(1, min(args.batch_size, rows) + 1) if rows % n == 0)

    spec = args.tokenizer
    if spec not in ("gpt2", "bytes"):
        with open(spec, encoding="utf-8") as f:
            spec = json.load(f)
    tokenizer = get_tokenizer(spec)
    train_data = Shards(args.train_files, "--train_files", tokenizer.n_vocab)
    val_data = Shards(args.val_files, "--val_files", tokenizer.n_vocab)
    if args.hellaswag_every:
        if not os.path.exists(HELLASWAG):
            fail(f"--hellaswag_every: there is no {HELLASWAG}; python data/hellaswag.py downloads it")
        with open(HELLASWAG, encoding="utf-8") as f:
            questions = [json.loads(line) for line in f][: args.hellaswag_questions]

    torch.manual_seed(args.seed)
    names = "block_size n_layer n_head n_embd tie_weights embed_norm logit_softcap".split()
    model = GPT(dict(vocab_size=tokenizer.n_vocab) | {name: getattr(args, name) for name in names}, dtype).to(device)
    train_model = torch.compile(model, dynamic=False) if compiled else model  # stories use the uncompiled model

    # Muon for the matrices in the blocks, those of one shape together; AdamW for embedding and head
    square = [p for block in model.blocks for p in (block.qkv, block.o)]
    up, down = [block.up for block in model.blocks], [block.down for block in model.blocks]
    muon = [(square, args.matrix_lr), (up, args.matrix_lr), (down, args.down_lr)]
    adamw = [(model.embed, args.embed_lr)] + ([] if args.tie_weights else [(model.head, args.head_lr)])
    assert {*square, *up, *down, *(p for p, _ in adamw)} == set(model.parameters())
    moments = {p: torch.zeros_like(p) for p in model.parameters()}  # running means of the gradients,
    squares = {p: torch.zeros_like(p) for p, _ in adamw}  # and of their squares

    saved = open_out_dir(args) if rank == 0 else None
    step, train_time = 0, 0.0
    if saved:
        model.load_state_dict(saved["model"])
        moments = {p: m.to(device) for p, m in zip(moments, saved["train"]["moments"])}
        squares = {p: v.to(device) for p, v in zip(squares, saved["train"]["squares"])}
        step, train_time = saved["train"]["step"], saved["train"]["train_time"]
    if ddp:  # all ranks begin where rank 0 does
        step, train_time = add_up([step, train_time], device)  # theirs are 0
        for tensor in [*model.parameters(), *moments.values(), *squares.values()]:
            dist.broadcast(tensor.data, src=0)
    step = first_step = int(step)
    first_time, next_progress, stopping = train_time, 0.0, 0
    kept = f"{path} holds step {step}" if saved else "nothing is saved yet"

    parameters = sum(p.numel() for p in model.parameters())
    flops = 6 * (parameters - (0 if args.tie_weights else model.embed.numel()))  # of a token, forward and backward
    flops += 12 * args.n_layer * args.n_embd * T  # attention, counted in full, as is usual
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.platform()
    peak = next((peak for name, peak in PEAK_TFLOPS.items() if name in machine and dtype == torch.bfloat16), None)
    log(f"Python {platform.python_version()}, PyTorch {torch.__version__}, {machine}")
    a_step = f"a step: {args.total_batch_size:,} tokens in {rows // B} x {B} rows of {T} on each"
    log(f"{parameters:,} parameters on {world_size} x {device.type} in {str(dtype)[6:]}; {a_step}")
    if saved:
        log(f"resumed from {path} at step {step}")
    if compiled:  # before the clock starts
        train_model(*train_data.batch(0, B, T, device)).backward()
        model.zero_grad()
    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)

    while True:
        last, where[0] = step == steps, f" (after step {step}; {kept})"

        # validate, then save, before anything else can fail
        if not stopping and (last or (args.val_loss_every and step and step % args.val_loss_every == 0)):
            val_loss = validate(train_model, val_data, args.val_tokens, B, T, device, rank, world_size)
            timing = f"train_time:{1000 * train_time:.0f}ms step_avg:{1000 * train_time / max(1, step):.2f}ms"
            row = dict(step=step, val_loss=val_loss, train_time_ms=round(1000 * train_time))
            log(f"step:{step}/{steps} val_loss:{val_loss:.4f} {timing}", **row)
            last = last or val_loss <= args.target_loss
        if step > first_step and (last or stopping or (args.save_every and step % args.save_every == 0)):
            if rank == 0:
                state = dict(moments=[*moments.values()], squares=[*squares.values()])
                save(path, model, spec, args, step=step, train_time=train_time, **state)
            kept = f"{path} holds step {step}"
        where[0] = f" (after step {step}; {kept})"
        if stopping:
            break
        if rank == 0 and args.milestone_every and step and (last or step % args.milestone_every == 0):
            save(os.path.join(args.out_dir, f"milestone_{step:06d}.pt"), model, spec, args, step=step)
        if args.hellaswag_every and (last or (step and step % args.hellaswag_every == 0)):
            acc_norm = hellaswag(model, tokenizer, questions, device, rank, world_size)
            row = dict(step=step, hellaswag_norm=acc_norm, questions=len(questions))
            log(f"step:{step}/{steps} hellaswag_norm:{acc_norm:.4f} questions:{len(questions)}", **row)
        if rank == 0 and args.sample_every and (last or (step and step % args.sample_every == 0)):
            story, length = write_story(model, tokenizer, args.prompt, args.max_new_tokens, args.seed, device)
            row = dict(id=step, step=step, prompt=args.prompt, text=story, tokens=length, seed=args.seed)
            log(f"\n{story}\n", file=2, checkpoint=f"{args.out_dir}, step {step}", **row)
        if last:
            break

        # a step
        start = time.perf_counter()
        loss = torch.zeros((), device=device)
        for i in range(rows // B):
            position = step * args.total_batch_size + (rank * rows + i * B) * T
            part = train_model(*train_data.batch(position, B, T, device)) * (B / (rows * world_size))
            part.backward()
            loss += part.detach()
        if ddp:
            for p in model.parameters():
                dist.all_reduce(p.grad)
        lr = min(1.0, (step + 1) / max(1, args.warmup_iters), (steps - step) / max(1, args.warmdown_frac * steps))
        for params, matrix_lr in muon:
            muon_step(params, [moments[p] for p in params], lr * matrix_lr, args.momentum, args.weight_decay, dtype)
        for p, adamw_lr in adamw:
            adamw_step(p, moments[p], squares[p], step + 1, lr * adamw_lr)
        model.zero_grad()
        orphaned = ddp and os.getppid() != parent  # torchrun was killed, and nothing else would stop us
        loss, stopping = add_up([loss.item(), len(signals) + orphaned], device)  # item() waits for the GPU
        seconds = time.perf_counter() - start
        step, train_time = step + 1, train_time + seconds

        if not math.isfinite(loss):
            fail(f"the loss is {loss} at step {step}: lower the learning rates; {kept}", 1)
        mean = (train_time - first_time) / (step - first_step)
        mfu = flops * args.total_batch_size / mean / (peak * 1e12 * world_size) if peak else None
        speed = dict(tokens_per_s=round(args.total_batch_size / seconds), mfu=mfu)
        log(step=step, train_loss=loss, lr=lr * args.matrix_lr, train_time_ms=round(1000 * train_time), **speed)
        live = sys.stderr.isatty()
        if rank == 0 and (live or time.perf_counter() > next_progress):
            next_progress = time.perf_counter() + 10  # few lines in a file
            gpu = f"MFU {mfu:.1%}  " if mfu else ""
            gpu += f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB  " if device.type == "cuda" else ""
            eta = f"{mean * (steps - step) / 60:.1f} minutes left"
            text = f"step {step}/{steps}  loss {loss:.4f}  {args.total_batch_size / mean:,.0f} tokens/s  {gpu}{eta}"
            print(f"\r{text}\033[K" if live else text, end="" if live else "\n", file=sys.stderr, flush=True)

    if ddp:
        add_up([0], device)  # wait for each other: the first to leave would have torchrun end the rest
        dist.destroy_process_group()
    if stopping:
        fail(f"interrupted; {kept}", 128 + (signals[0] if signals else signal.SIGTERM))
    log(f"more stories: python sample.py {args.out_dir}")


if __name__ == "__main__":
    run(main, where)
