"""
Score checkpoints on HellaSwag (Zellers et al. 2019), beside the published figures for GPT-2 and GPT-3.

    python data/hellaswag.py                                       fetches the 10,042 questions
    python hellaswag.py out/gpt out/gpt/milestone_*.pt             a run: its checkpoint, and accuracy over its steps
    python hellaswag.py --hf openai-community/gpt2                 a model of transformers (pip install transformers)
    torchrun --standalone --nproc_per_node=8 hellaswag.py out/gpt/milestone_*.pt

One of four endings is right. acc takes the one with the least loss, acc_norm the least loss per token (--style
completion, the text as it stands) or per character (--style harness, text and tokens as in lm-evaluation-harness).
Every answer is a line of --details, and what is there is not computed again.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import ctypes
import functools
import json
import os
import re
import sys
import zipfile

import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F

PUBLISHED = {  # acc, acc_norm; of GPT-3 its paper has only the second
    "completion": {"GPT-2 124M": (0.2859, 0.2955), "GPT-2 1.5B": (0.3842, 0.4893)},
    "harness": {"GPT-2 124M": (0.2892, 0.3114), "GPT-2 1.5B": (0.4004, 0.5089)},
}
PUBLISHED["completion"] |= {"GPT-3 125M (its paper)": (None, 0.337), "GPT-3 1.3B (its paper)": (None, 0.547)}


def get_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("checkpoints", metavar="CHECKPOINT", nargs="*", help=".pt files, or folders of runs")
    add("--hf", metavar="NAME_OR_DIR", help="a causal language model of transformers")
    add("--style", default="completion", choices=["completion", "harness"], help="how questions become text")
    add("--data", default="data/hellaswag_val.jsonl", help="python data/hellaswag.py fetches it")
    add("--questions", type=int, default=10_042, help="how many, from the first on")
    add("--details", default="out/hellaswag.jsonl", help="a line for each answer: losses, prediction, label")
    add("--batch_size", type=int, default=64 if torch.cuda.is_available() else 4, help="rows at once")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of weights and activations")
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
    """RMSNorm without parameters (Zhang and Sennrich 2019)."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def linear(x, weight):
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def forward(config, weights, idx, positions, mask, wanted):
    """The model of train_gpt.py: logits (N, vocab_size) in fp32 after the N tokens that are `wanted` (B, T).

    Tokens idx (B, T) stand at `positions` (B, T) and see what mask (B, 1, T, T) says.
    """
    (B, T), H, D = idx.shape, config["n_head"], config["n_embd"] // config["n_head"]
    frequencies = 1 / 10000 ** (torch.arange(0, D, 2, dtype=torch.float32, device=idx.device) / D)
    angles = positions[:, None, :, None] * frequencies  # (B, 1, T, D / 2)
    cos, sin = angles.cos(), angles.sin()
    x = F.embedding(idx, weights["embed"])  # (B, T, C)
    if config.get("embed_norm", True):
        x = norm(x)
    for i in range(config["n_layer"]):
        qkv, o, up, down = [weights[f"blocks.{i}.{name}"] for name in ("qkv", "o", "up", "down")]
        qkv = linear(norm(x), qkv).view(B, T, 3 * H, D).transpose(1, 2)
        qk, v = qkv.split((2 * H, H), dim=1)
        x1, x2 = qk.chunk(2, dim=-1)  # rotary position embedding (Su et al. 2021), in fp32
        qk = norm(torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1))
        q, k = qk.type_as(v).chunk(2, dim=1)  # q, k, v: (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + linear(y.transpose(1, 2).flatten(2), o)
        x = x + linear(linear(norm(x), up).relu().square(), down)
    logits = linear(norm(x[wanted]), weights["head"])[:, : config["vocab_size"]].float()  # the padding is cut off
    cap = config.get("logit_softcap", 15.0)
    return logits.div_(cap).tanh_().mul_(cap) if cap else logits


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


# --- checkpoint, questions and details ---
def load_checkpoint(path, device, dtype):
    """Open a checkpoint, executing nothing of it: a dict, its "model" in `dtype` on `device` as 2D matrices."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load() does not verify the checksum of what is not a weight
            archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        weights = {name: weight.to(device, dtype).flatten(0, -2) for name, weight in checkpoint["model"].items()}
        assert all(weight.abs().max() < 2**16 for weight in weights.values())  # none that was trained is larger
    except (FileNotFoundError, PermissionError, torch.OutOfMemoryError):
        raise
    except Exception:  # damaged files raise nearly everything
        fail(f"{path}: not a checkpoint of these scripts, or a damaged one")
    if "chars" in checkpoint["tokenizer"]:
        fail(f"{path}: knows only the characters of its own text, and the questions hold others")
    weights.setdefault("head", weights["embed"])  # tied
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # F.linear makes this layout anew at every call, in twice the time; PyTorch has no public call for it
        for name in set(weights) - {"embed"}:
            weights[name] = torch.ops.mkldnn._reorder_linear_weight(weights[name], 16)
    return dict(checkpoint, model=weights)


def read_questions(path):
    """The questions of a .jsonl file; exits naming the first line that is none."""
    if not os.path.exists(path):
        fail(f"{path}: not there; python data/hellaswag.py fetches it")
    questions = []
    for number, line in enumerate(open(path, "rb"), 1):
        try:
            question = json.loads(line)
            texts = [question[key] for key in ("activity_label", "ctx_a", "ctx_b", "ctx")] + question["endings"]
            if [type(text) for text in texts] != [str] * 8 or not all(texts[3:]) or question["label"] not in range(4):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            fail(f"{path}:{number}: not a HellaSwag question (ctx, four endings, a label from 0 to 3)")
        questions.append(question)
    return questions


def tokenize(question, style, encode, start, window):
    """A question as (tokens of its context after `start`, of its endings, the lengths that acc_norm divides by)."""
    context, endings = question["ctx"], question["endings"]
    if style == "harness":
        texts = [f"{question['activity_label']}: {question['ctx_a']} {question['ctx_b'].capitalize()}", *endings]
        texts = [re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")) for text in texts]
        context, *endings = [text.replace("  ", " ") for text in texts]
    before = encode(context.rstrip())  # spaces at its end belong to the endings
    after = [encode(f"{context} {ending}")[len(before) :][:window] for ending in endings]
    return start + before, after, [len(ending) for ending in (endings if style == "harness" else after)]


@torch.no_grad()
def score(model, questions, window, device):
    """Losses (n, 4) of the endings of n tokenized questions, in nats, summed over tokens.

    A context is run once: its endings follow in the same row, each at the position where the context ends, and the mask
    lets each see the context and itself. What is longer than the window gets a row for each ending, which cuts off the
    context's beginning for itself, as in lm-evaluation-harness; a model of transformers gets such rows for all.
    """
    rows, ours = [], isinstance(model, dict)
    for n, (context, endings, _) in enumerate(questions):
        parts, room = list(enumerate(endings, 4 * n)), window + 1 - len(context)  # the last token is never read
        for row_parts in [parts] if ours and max(map(len, endings)) <= room else [[part] for part in parts]:
            *before, last = context[max(0, max(len(ending) for _, ending in row_parts) - room) :]
            row = [(token, i, -1, -1) for i, token in enumerate(before)]  # token, position, part, what comes next
            for part, ending in row_parts:
                pairs = enumerate(zip([last, *ending], ending), len(before))
                row += [(token, i, part, target) for i, (token, target) in pairs]
            rows.append(torch.tensor(row))
    rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-2).to(device)  # (B, T, 4)
    idx, positions, part, targets = rows.unbind(-1)
    idx, wanted = idx.clamp(min=0), targets >= 0
    if ours:
        seen = (part[:, None, :] == -1) | (part[:, None, :] == part[:, :, None])  # (B, T, T)
        logits = forward(model["config"], model["model"], idx, positions, seen.tril()[:, None], wanted)
    else:
        logits = model(input_ids=idx).logits[wanted].float()
    losses = F.cross_entropy(logits, targets[wanted], reduction="none")
    return torch.zeros(4 * len(questions)).index_add(0, part[wanted].cpu(), losses.cpu()).view(-1, 4)


def read_details(path):
    """{run: {question: row}} of what is in the details; a last line that was cut short is dropped."""
    found = {}
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "a+b") as f:
        f.seek(0)
        *lines, cut = f.read().split(b"\n")
        try:
            for row in map(json.loads, lines or filter(None, [cut])):
                found.setdefault(row["run"], {})[row["question"]] = row
        except (ValueError, KeyError, TypeError):
            fail(f"{path}: not a file of --details; name another")
        f.truncate(f.tell() - len(cut))
    return found


def main():
    flags = get_flags()
    if bool(flags.checkpoints) == bool(flags.hf):
        fail("name one checkpoint or more, or a model of transformers with --hf")
    device, dtype = get_device(flags.device, flags.dtype)
    torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper cuDNN builds a plan, some 50 ms, for each new shape
    rank = int(os.environ.get("RANK", 0))  # set by torchrun, as is WORLD_SIZE
    ranks = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
    if ranks > 1:
        dist.init_process_group("gloo")  # only losses are passed on
        sys.stdout = sys.stdout if rank == 0 else open(os.devnull, "w")
    questions, details = read_questions(flags.data)[: flags.questions], read_details(flags.details)
    print(f"{flags.style + ' style':40}{'questions':>10}   {'acc':19}acc_norm")
    for path in flags.checkpoints or [flags.hf]:
        path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) and not flags.hf else path
        if flags.hf:
            try:
                import transformers

                transformers.utils.logging.disable_progress_bar()
                tokenizer = transformers.AutoTokenizer.from_pretrained(path)
                model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
            except Exception as error:  # there is no transformers, no such model, or it is damaged
                fail(f"--hf {path}: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
            encode = functools.partial(tokenizer.encode, add_special_tokens=flags.style == "harness")
            step, start, window = None, [], getattr(model.config, "max_position_embeddings", None) or 2048
        else:
            model = load_checkpoint(path, device, dtype)
            tokenizer = get_tokenizer(model["tokenizer"])
            encode, start = tokenizer.encode_ordinary, [tokenizer.eot_token] if flags.style == "harness" else []
            step, window = model.get("train", {}).get("step"), model["config"]["block_size"]
        changed = os.stat(path).st_mtime_ns if os.path.exists(path) else None
        run = json.dumps([path, changed, flags.style, str(dtype)[6:], flags.data, os.path.getsize(flags.data)])
        answers = details.setdefault(run, {})
        todo = [i for i in range(len(questions)) if i not in answers]
        texts = {i: tokenize(questions[i], flags.style, encode, start, window) for i in todo}
        order = sorted(todo, key=lambda i: -len(sum(texts[i][1], texts[i][0])))  # too little memory shows at once
        while order:
            chosen, order = order[: flags.batch_size * ranks], order[flags.batch_size * ranks :]
            losses, mine = torch.zeros(len(chosen), 4), [texts[i] for i in chosen[rank::ranks]]
            if mine:
                losses[rank::ranks] = score(model, mine, window, device)
            if ranks > 1:
                dist.all_reduce(losses)
            with open(flags.details if rank == 0 else os.devnull, "a", encoding="utf-8") as f:
                for i, four in zip(chosen, losses):
                    row = dict(run=run, question=i, model=path, step=step, losses=[round(x, 5) for x in four.tolist()])
                    row["prediction"] = four.argmin().item()
                    row["prediction_norm"] = (four / torch.tensor(texts[i][2])).argmin().item()
                    answers[i] = row | {"label": questions[i]["label"]}
                    f.write(json.dumps(answers[i]) + "\n")
            if sys.stderr.isatty() and rank == 0:
                print(f"{path}: {len(answers):,} of {len(questions):,} questions", end="\r", file=sys.stderr)
        cells = []
        for key in ("prediction", "prediction_norm"):
            p = sum(answers[i][key] == questions[i]["label"] for i in range(len(questions))) / len(questions)
            cells.append(f"{p:.4f} ± {(p * (1 - p) / len(questions)) ** 0.5:.4f}")
        print(f"{path:40}{len(questions):>10,}   {cells[0]:19}{cells[1]}", flush=True)
    print()
    for name, (acc, acc_norm) in PUBLISHED[flags.style].items():
        print(f"{name + ', published':40}{10042:>10,}   {acc or '':<19}{acc_norm}")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
