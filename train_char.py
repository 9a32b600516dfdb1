"""
Train a language model on the characters of a text, and let it write a story.

    python train_char.py                                              a small transformer on data/tales.txt
    python train_char.py --data my.txt --out_dir out/my               your own text, UTF-8
    python train_char.py --model bigram --out_dir out/bigram          the simplest model there is
    python train_char.py --init out/char --out_dir out/more           goes on from a checkpoint of this script
    python train_char.py --init out/char --max_iters 0 --seed 2       only writes a story

Prints statistics of the text, learns from its first 90%, shows the loss on the rest in nats a character, and writes
log.txt, log.jsonl, stories.jsonl and ckpt.pt into --out_dir. With --init model and sizes are the checkpoint's.
The original post: --n_layer 4 --n_head 4 --n_embd 64 --block_size 32 --batch_size 32 --max_iters 5000
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import collections
import ctypes
import json
import math
import os
import re
import signal
import sys
import time
import zipfile

import torch
import torch.nn.functional as F
from torch import nn

PROMPT = "It was a dark and stormy night"


def get_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, usage=argparse.SUPPRESS)
    add, yes_no = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", default="data/tales.txt", help="text to learn from; documents between lines <|endoftext|>")
    add("--out_dir", default="out/char", help="where logs, stories and the checkpoint go")
    add("--overwrite", action=yes_no, default=False, help="replace an earlier run in --out_dir")
    add("--init", default="", help="go on from this checkpoint, or from that in the folder of a run")
    add("--model", default="gpt", choices=["bigram", "gpt", "split", "flat"], help="what learns: see class Model")
    add("--n_layer", type=int, default=4, help="blocks")
    add("--n_head", type=int, default=2, help="attention heads")
    add("--n_embd", type=int, default=128, help="width")
    add("--block_size", type=int, default=128, help="context length in characters")
    add("--head_dropout", type=float, default=0.0, help="leave out whole heads with this probability")
    add("--batch_size", type=int, default=16, help="rows of --block_size characters in a step")
    add("--max_iters", type=int, default=1050, help="training steps; 0: with --init, only write a story")
    add("--warmdown_frac", type=float, default=1.0, help="share of the steps over which the learning rates fall to 0")
    add("--matrix_lr", type=float, default=0.04, help="Muon's learning rate, for the matrices in the blocks")
    add("--embed_lr", type=float, default=0.1, help="AdamW's for the embedding, or the bigram's table")
    add("--head_lr", type=float, default=0.02, help="AdamW's for the head")
    add("--momentum", type=float, default=0.95, help="Muon's momentum")
    add("--val_loss_every", type=int, default=250, help="steps between validations; 0: at the end only")
    add("--prompt", default=PROMPT, help="how the story begins; the text's first words, if it lacks letters of this")
    add("--max_new_tokens", type=int, default=500, help="length of the story in characters")
    add("--temperature", type=float, default=0.8, help="0 is greedy")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    add("--dtype", default="float32", choices=["auto", "float32", "bfloat16"], help="of the activations")
    add("--seed", type=int, default=1337, help="of everything random")
    return parser.parse_args()


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


# --- model ---
def norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)  # Zhang and Sennrich 2019, without parameters


def linear(x, weight):
    return F.linear(x, weight.to(x.dtype))  # weights stay in fp32, products are in the dtype of the activations


class Block(nn.Module):
    """split: each head sees only its own slice of x. head_dropout: in training, whole heads are left out at random."""

    def __init__(self, C, n_head, split, head_dropout):
        super().__init__()
        self.n_head, self.split, self.head_dropout = n_head, split, head_dropout
        shape = (3, n_head, C // n_head, C // n_head) if split else (3, C, C)
        self.qkv = nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)
        self.o = nn.Parameter(torch.zeros(C, C))
        self.up = nn.Parameter(torch.randn(4 * C, C) * C**-0.5)
        self.down = nn.Parameter(torch.zeros(C, 4 * C))

    def forward(self, x, cos, sin):
        (B, T, C), H = x.shape, self.n_head
        if self.split:
            qkv = torch.einsum("bthd,nhed->nbhte", norm(x).view(B, T, H, -1), self.qkv.to(x.dtype))
        else:
            qkv = linear(norm(x), self.qkv.flatten(0, 1)).view(B, T, 3, H, -1).permute(2, 0, 3, 1, 4)
        x1, x2 = qkv[:2].chunk(2, dim=-1)  # (2, B, H, T, D / 2) each, for the rotary embedding (Su et al. 2021)
        q, k = norm(torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)).type_as(x)  # rotated in fp32
        y = F.scaled_dot_product_attention(q, k, qkv[2], is_causal=True)  # (B, H, T, D)
        if self.training and self.head_dropout:
            kept = torch.rand(B, H, 1, 1, device=x.device) >= self.head_dropout
            y = y * kept / (1 - self.head_dropout)
        x = x + linear(y.transpose(1, 2).reshape(B, T, C), self.o)
        return x + linear(linear(norm(x), self.up).relu().square(), self.down)


class Model(nn.Module):
    """gpt: the model of train_gpt.py. split: the same with split heads. flat: the mean of blocks side by side.
    bigram: the logits of the next character are a row of a table, looked up by the last character alone."""

    def __init__(self, config, head_dropout=0.0, dtype=torch.float32):
        super().__init__()
        self.config, self.kind, self.dtype = config, config.get("kind", "gpt"), dtype
        V, C, H = config["vocab_size"], config["n_embd"], config["n_head"]
        if self.kind == "bigram":
            self.embed = nn.Parameter(torch.zeros(V, V))
            return
        self.embed = nn.Parameter(torch.randn((V + 63) // 64 * 64, C))  # padded, as in the other scripts
        blocks = [Block(C, H, self.kind == "split", head_dropout) for _ in range(config["n_layer"])]
        self.blocks, self.head = nn.ModuleList(blocks), nn.Parameter(torch.zeros_like(self.embed))

    def forward(self, idx):
        """Logits (B, T, V) of characters idx (B, T)."""
        x = F.embedding(idx, self.embed)  # (B, T, C)
        if self.kind == "bigram":
            return x
        x, D = norm(x.to(self.dtype)), self.config["n_embd"] // self.config["n_head"]
        frequencies = 1 / 10000 ** (torch.arange(0, D, 2, device=idx.device).float() / D)
        angles = torch.outer(torch.arange(idx.size(1), device=idx.device).float(), frequencies)  # (T, D / 2)
        cos, sin = angles.cos(), angles.sin()
        if self.kind == "flat":
            x = torch.stack([block(x, cos, sin) for block in self.blocks]).mean(0)
        else:
            for block in self.blocks:
                x = block(x, cos, sin)
        logits = linear(norm(x), self.head)[..., : self.config["vocab_size"]].float()
        return 15 * torch.tanh(logits / 15)


# --- optimizer ---
# The Polar Express (Amsel et al. 2025, arXiv 2505.16932), of whose five steps three are enough for matrices this small.
POLAR_EXPRESS = (
    (8.156554524902461 / 1.01, -22.48329292557795 / 1.01**3, 15.878769915207462 / 1.01**5),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
)


@torch.no_grad()
def muon_step(p, m, lr, momentum):
    """A step of Muon (Jordan et al. 2024), as in train_gpt.py: p is a matrix, or a stack (..., rows, cols) of them."""
    m.lerp_(p.grad, 1 - momentum)
    X = p.grad.lerp(m, momentum)  # Nesterov
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value above 1
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    p.sub_(X.mT if tall else X, alpha=lr * max(1, p.size(-2) / p.size(-1)) ** 0.5)


@torch.no_grad()
def adamw_step(p, m, v, step, lr, betas=(0.8, 0.95), eps=1e-10):
    """Step 1, 2, ... of AdamW without weight decay, written out because the first use of torch.optim takes 2.5 s."""
    m.lerp_(p.grad, 1 - betas[0])
    v.lerp_(p.grad.square(), 1 - betas[1])
    correction = (1 - betas[1] ** step) ** 0.5  # both means begin at 0
    p.addcdiv_(m, v.sqrt().add_(eps * correction), value=-lr * correction / (1 - betas[0] ** step))


# --- data ---
def read_text(path):
    """The text of a UTF-8 file, with an empty line between its documents. A byte order mark is no part of it."""
    try:
        text = open(path, encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        fail(f"--data {path}: not UTF-8 text (byte {error.start:,})")
    return re.sub(r"(?:^<\|endoftext\|>[^\S\n]*(?:\n|\Z))+", "\n", text, flags=re.M)


def encode(flag, text, chars):
    """The number of each character; exits when one is not among chars, or there is none."""
    unknown, numbers = set(text) - set(chars), {c: i for i, c in enumerate(chars)}
    if unknown or not text:
        fail(f"{flag}: empty, or with characters that the model does not know: {''.join(sorted(unknown))!r}")
    return [numbers[c] for c in text]


def describe(text, tokens, chars):
    """The statistics of a text, one a line."""
    counts, words = collections.Counter(text).most_common(), text.split()
    decoded = "".join([chars[i] for i in tokens])
    return f"""characters: {len(text):,}
vocabulary: {len(chars)} different characters: {chars!r}
most common: {counts[0][0]!r}, {counts[0][1]:,} times
least common: {counts[-1][0]!r}, {counts[-1][1]:,} times
average word length: {sum(map(len, words)) / max(1, len(words)):.2f} characters, over {len(words):,} words
first 200 characters: {text[:200]!r}
encoded: {tokens[:20]}
decoded: {decoded[:20]!r}; the whole text {"comes back the same" if decoded == text else "DOES NOT come back"}
"""


# --- evaluation ---
@torch.no_grad()
def validate(model, data, T):
    """Mean loss in nats of the characters of data but the first, read in whole windows of T, one after another."""
    model.eval()
    n = (len(data) - 1) // T * T
    pairs = zip(data[:n].view(-1, T).split(256), data[1 : n + 1].view(-1, T).split(256))
    total = sum(F.cross_entropy(model(x).mT, y, reduction="sum").item() for x, y in pairs)
    model.train()
    return total / n


@torch.no_grad()
def write_story(model, prompt, args, chars, T, device):
    """A story that begins with these tokens. Each new one reads the whole context again; sample.py has a cache."""
    model.eval()
    generator, tokens = torch.Generator().manual_seed(args.seed), list(prompt)
    for _ in range(args.max_new_tokens):
        logits = model(torch.tensor([tokens[-T:]], device=device))[0, -1].cpu()
        p = F.softmax(logits / max(args.temperature, 1e-5), dim=-1)
        tokens.append(torch.multinomial(p, 1, generator=generator).item())
    return "".join([chars[i] for i in tokens])


# --- log and checkpoint ---
files = []  # log.txt, log.jsonl, stories.jsonl


def log(line, file=1, **values):
    """A line to stdout and log.txt, values to files[file]: log.jsonl, or stories.jsonl."""
    print(line, flush=True)
    print(line, file=files[0], flush=True)
    if values:
        print(json.dumps(values), file=files[file], flush=True)


def load(path, head_dropout, dtype):
    """Open a checkpoint, or that in the folder of a run: (model, characters, prompt). Nothing of it is executed."""
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    try:
        assert zipfile.ZipFile(path).testzip() is None  # torch.load() does not verify the checksums
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = Model(saved["config"], head_dropout, dtype)
        model.load_state_dict(saved["model"])
        return model, saved["tokenizer"]["chars"], saved["train"]["flags"]["prompt"]
    except Exception:  # damaged files raise nearly everything
        fail(f"--init {path}: no checkpoint of train_char.py is there, or a damaged one")


# --- training ---
def main():
    args = get_flags()
    device, dtype = get_device(args.device, args.dtype)
    path, steps, B = os.path.join(args.out_dir, "ckpt.pt"), args.max_iters, args.batch_size
    torch.manual_seed(args.seed)
    text = read_text(args.data) if steps or not args.init else ""
    if args.init:
        model, chars, opening = load(args.init, args.head_dropout, dtype)
    else:
        chars, opening = "".join(sorted(set(text))), "".join(re.findall(r"\s*\S+", text)[:5]).strip()[:40]
        config = dict(vocab_size=len(chars), block_size=args.block_size, n_layer=args.n_layer, n_head=args.n_head)
        config |= dict(n_embd=args.n_embd, tie_weights=False, embed_norm=True, logit_softcap=15.0)
        config |= {} if args.model == "gpt" else dict(kind=args.model)  # with which no other script opens it
        if args.n_embd % (2 * args.n_head):
            fail(f"--n_embd {args.n_embd}: not an even multiple of --n_head {args.n_head}")
        model = Model(config, args.head_dropout, dtype)
    T, split = model.to(device).config["block_size"], int(0.9 * len(text))  # the first 90% are for training
    if args.prompt == PROMPT and set(PROMPT) - set(chars):
        args.prompt = opening
    if steps == 0:
        return print(write_story(model, encode("--prompt", args.prompt, chars), args, chars, T, device))
    tokens, prompt = encode("--data", text, chars), encode("--prompt", args.prompt, chars)
    if len(text) - split <= T:
        fail(f"--data {args.data}: {len(text)} characters are too few for a --block_size of {T}")

    os.makedirs(args.out_dir, exist_ok=True)
    for name in ("log.txt", "log.jsonl", "stories.jsonl"):
        files.append(open(os.path.join(args.out_dir, name), "a", encoding="utf-8"))
    earlier = os.path.exists(path)  # a checkpoint that is worth more than one of a few steps
    if earlier and not args.overwrite:
        fail(f"--out_dir {args.out_dir}: holds an earlier run; name another folder, or --overwrite replaces it")
    for file in files:
        file.truncate(0)
    print(open(sys.argv[0], encoding="utf-8").read() + "=" * 100, " ".join(sys.argv), sep="\n", file=files[0])
    log(f"{describe(text, tokens, chars)}PyTorch {torch.__version__} on {device.type}\n")
    size = sum(p.numel() for p in model.parameters())
    log(f"{model.kind}: {size:,} parameters, {steps} steps of {B} x {T} characters")

    moments = [torch.zeros_like(p) for p in model.parameters()]  # running means of the gradients,
    squares = [torch.zeros_like(p) for p in model.parameters()]  # and of their squares
    data, window = torch.tensor(tokens, device=device), torch.arange(T + 1, device=device)
    step, loss, train_time, signals, kept = 0, 0.0, 0.0, [], "nothing is saved"
    for number in (signal.SIGINT, signal.SIGTERM):  # the step under way is finished, so that what is saved is whole
        signal.signal(number, lambda number, frame: signals.append(number))
    while True:
        if step and (step == steps or step % (args.val_loss_every or steps) == 0 or (signals and not earlier)):
            val_loss = validate(model, data[split:], T)
            if not math.isfinite(val_loss):
                fail(f"the validation loss is {val_loss} at step {step}: lower the learning rates; {kept}", 1)
            ms = round(1000 * train_time)
            line = f"step:{step}/{steps} val_loss:{val_loss:.4f} train_time:{ms}ms step_avg:{ms / step:.2f}ms"
            log(line, step=step, train_loss=loss, val_loss=val_loss, train_time_ms=ms)
            checkpoint = dict(format=1, config=model.config, tokenizer={"chars": chars}, model=model.state_dict())
            with open(path + ".tmp", "wb") as f:  # renamed when it is whole, so that the one before it survives
                torch.save(dict(checkpoint, train=dict(step=step, flags=vars(args))), f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(path + ".tmp", path)
            earlier, kept = False, f"{path} holds step {step}"
        if signals:
            fail(f"interrupted; {kept}", 128 + signals[0])
        if step == steps:
            break
        start = time.perf_counter()
        batch = data[torch.randint(split - T, (B, 1), device=device) + window]  # (B, T + 1)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        lr = min(1.0, (steps - step) / max(1, args.warmdown_frac * steps))
        for (name, p), m, v in zip(model.named_parameters(), moments, squares):
            if name.startswith("blocks."):
                muon_step(p, m, lr * args.matrix_lr, args.momentum)
            else:
                adamw_step(p, m, v, step + 1, lr * (args.head_lr if name == "head" else args.embed_lr))
        model.zero_grad()
        loss = loss.item()  # waits for the GPU
        step, train_time = step + 1, train_time + time.perf_counter() - start
        if not math.isfinite(loss):
            fail(f"the loss is {loss} at step {step}: lower the learning rates; {kept}", 1)
        if step % 50 == 1:
            left = train_time / step * (steps - step)
            print(f"step {step}/{steps}  loss {loss:.4f}  {left:.0f} s left", file=sys.stderr)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    story = write_story(model, prompt, args, chars, T, device)
    row = dict(id=0, step=step, prompt=args.prompt, text=story, tokens=args.max_new_tokens, seed=args.seed)
    log(f"\n{story}\n", file=2, checkpoint=path, **row)
    more = f"sample.py {args.out_dir}" if model.kind == "gpt" else f"train_char.py --init {args.out_dir} --max_iters 0"
    log(f"{path} is saved; more stories: python {more} --seed 2")


if __name__ == "__main__":
    run(main)
