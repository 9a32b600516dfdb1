"""
How fast is HellaSwag scored? Questions per second beside the plain way, on this machine's CPU, and the same answers?

    python bench/hellaswag_speed.py --data data/hellaswag_val.jsonl     (about 4 minutes on 2 cores)

The model is train_gpt.py's at GPT-2's 124M with random weights everywhere, so that its answers differ. The plain way is
that of build-nanogpt: a question at a time, its context before each of the four endings, rows padded to the longest,
logits of every position, fp32. Ours is hellaswag.py as a whole command, less the time that it takes for one question;
in fp32 and in the type that --dtype auto takes here. The plain way takes half of the questions before ours and half
after. Checked: in fp32 no loss is further from the plain way's than 1e-4 a token and every prediction is the same; in
the other type 99% of predictions are. The last line is `ratio: X`: our questions/s, in the type of --dtype auto, over
the plain way's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


def write_model(path):
    """A checkpoint of 124M random weights; returns it."""
    import torch

    torch.manual_seed(0)
    V, L, C = 50257, 12, 768
    config = dict(vocab_size=V, block_size=1024, n_layer=L, n_head=6, n_embd=C)
    model = dict(embed=torch.randn(50304, C), head=0.02 * torch.randn(50304, C))
    for i in range(L):
        for name, shape in dict(qkv=(3, C, C), o=(C, C), up=(4 * C, C), down=(C, 4 * C)).items():
            std = C**-0.5 if name in ("qkv", "up") else 0.02 / 24**0.5
            model[f"blocks.{i}.{name}"] = std * torch.randn(shape)
    checkpoint = dict(format=1, config=config, tokenizer="gpt2", model=model)
    torch.save(checkpoint, path)
    return checkpoint


def plain(hellaswag, checkpoint, encode, rows):
    """Losses of the four endings of each row, summed over tokens (n, 4)."""
    import torch
    import torch.nn.functional as F

    losses = torch.zeros(len(rows), 4)
    weights = {name: weight.flatten(0, -2) for name, weight in checkpoint["model"].items()}
    for i, row in enumerate(rows):
        context, endings = encode(row["ctx"]), [encode(" " + ending) for ending in row["endings"]]
        T = len(context) + max(map(len, endings))
        tokens, counted = torch.zeros(4, T, dtype=torch.long), torch.zeros(4, T)
        for j, ending in enumerate(endings):
            tokens[j, : len(context) + len(ending)] = torch.tensor(context + ending)
            counted[j, len(context) : len(context) + len(ending)] = 1
        causal, wanted = torch.ones(1, 1, T, T, dtype=torch.bool).tril(), torch.ones(4, T, dtype=torch.bool)
        with torch.no_grad():
            positions = torch.arange(T).expand(4, T)
            logits = hellaswag.forward(checkpoint["config"], weights, tokens, positions, causal, wanted).view(4, T, -1)
            each = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        losses[i] = (each.view(4, T - 1) * counted[:, 1:]).sum(1)
    return losses


def ours(work, checkpoint, data, dtype, questions):
    """(losses, seconds) of hellaswag.py as a command."""
    import torch

    details = os.path.join(work, f"{dtype}_{questions}.jsonl")
    command = [sys.executable, os.path.join(ROOT, "hellaswag.py"), checkpoint, "--device", "cpu", "--dtype", dtype]
    command += ["--data", data, "--details", details, "--questions", str(questions)]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    with open(details, encoding="utf-8") as f:
        rows = sorted(map(json.loads, f), key=lambda row: row["question"])
    return torch.tensor([row["losses"] for row in rows]), seconds


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", required=True, help="HellaSwag's validation set: python data/hellaswag.py")
    flags.add_argument("--questions", type=int, default=300, help="how many, from the first on (default: 300)")
    flags = flags.parse_args()
    import torch

    import hellaswag

    rows = hellaswag.read_questions(flags.data)[: flags.questions]
    encode = hellaswag.get_tokenizer("gpt2").encode_ordinary
    auto = str(hellaswag.get_device("cpu", "auto")[1])[6:]
    with tempfile.TemporaryDirectory() as work:
        path = os.path.join(work, "124m.pt")
        checkpoint = write_model(path)
        plain(hellaswag, checkpoint, encode, rows[:2])  # the first products are slow
        half, table, expected, plain_seconds = len(rows) // 2, [], [], 0.0
        for part in (rows[:half], rows[half:]):
            start = time.perf_counter()
            expected.append(plain(hellaswag, checkpoint, encode, part))
            plain_seconds += time.perf_counter() - start
            if not table:
                for dtype in dict.fromkeys(("float32", auto)):
                    first = ours(work, path, flags.data, dtype, 1)[1]
                    found, seconds = ours(work, path, flags.data, dtype, len(rows))
                    table.append((dtype, found, seconds - first))
    expected = torch.cat(expected)
    sizes = torch.tensor([[len(encode(" " + ending)) for ending in row["endings"]] for row in rows])
    print(f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}; {len(rows)} questions\n")
    print(f"{'way':14}{'dtype':10}{'questions/s':>12}{'same predictions':>18}{'loss differs':>14}")
    print(f"{'plain':14}{'float32':10}{len(rows) / plain_seconds:12.2f}")
    good = True
    for dtype, found, seconds in table:
        same = [(found / n).argmin(1) == (expected / n).argmin(1) for n in (1, sizes)]  # acc's and acc_norm's
        share, worst = torch.cat(same).float().mean().item(), ((found - expected).abs() / sizes).max().item()
        print(f"{'hellaswag.py':14}{dtype:10}{len(rows) / seconds:12.2f}{share:18.1%}{worst:14.1e}")
        good &= (share == 1 and worst < 1e-4) if dtype == "float32" else share >= 0.99
    print("loss differs: at most, a token. " + ("As it should be." if good else "NOT AS IT SHOULD BE."))
    print(f"ratio: {plain_seconds / table[-1][2]:.2f}")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
