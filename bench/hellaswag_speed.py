"""
How fast is HellaSwag scored? Questions per second beside the plain way, on this machine's CPU, and the same answers?

    python bench/hellaswag_speed.py --data data/hellaswag_val.jsonl     (about 4 minutes on 2 cores)

The model is GPT-2's 124M with random weights. The plain way is that of build-nanogpt, in fp32: a question at a time,
its context before each of the four endings, rows padded to the longest; half of it before ours, half after. Ours is
hellaswag.py as a command, less its time for one question. Checked: in fp32 the same predictions, and losses within 1e-4
a token; in bf16 99% of the predictions. `ratio: X` is our questions/s, as --dtype auto has it, over the plain way's.
"""

import argparse
import os
import tempfile
import time

import tiktoken
import torch
import torch.nn.functional as F
from common import BF16, hellaswag, read_rows, show, write_random

from train_gpt import GPT


@torch.no_grad()
def plain(model, encode, rows):
    """(losses, tokens, seconds) of the four endings of each row; losses (n, 4) are sums over tokens (n, 4)."""
    losses, counts, start = torch.zeros(len(rows), 4), torch.zeros(len(rows), 4), time.perf_counter()
    for i, row in enumerate(rows):
        context, endings = encode(row["ctx"]), [encode(" " + ending) for ending in row["endings"]]
        T = len(context) + max(map(len, endings))
        tokens, counted = torch.zeros(4, T, dtype=torch.long), torch.zeros(4, T)
        for j, ending in enumerate(endings):
            tokens[j, : len(context) + len(ending)] = torch.tensor(context + ending)
            counted[j, len(context) : len(context) + len(ending)] = 1
        each = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        losses[i], counts[i] = (each.view(4, T - 1) * counted[:, 1:]).sum(1), counted.sum(1)
    return losses, counts, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="HellaSwag's validation set: python data/hellaswag.py")
    parser.add_argument("--questions", type=int, default=300, help="how many, from the first on (default: 300)")
    flags = parser.parse_args()
    rows = read_rows(flags.data)[: flags.questions]
    encode, n, found = tiktoken.get_encoding("gpt2").encode_ordinary, len(rows), {}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "124m.pt")
        config, weights = write_random(path, 6, 1024)
        model = GPT(config)
        model.load_state_dict(weights)
        plain(model, encode, rows[:2])  # the first products are slow
        before = plain(model, encode, rows[: n // 2])
        for dtype in ("float32", "bfloat16") if BF16 else ("float32",):
            first, _ = hellaswag(path, "--data", flags.data, "--dtype", dtype, "--questions", 1)
            seconds, answers = hellaswag(path, "--data", flags.data, "--dtype", dtype, "--questions", n)
            found[dtype] = torch.tensor([row["losses"] for row in answers]), seconds - first
        after = plain(model, encode, rows[n // 2 :])
    expected, counts = (torch.cat((before[i], after[i])) for i in (0, 1))
    good, plain_seconds = True, before[2] + after[2]
    table = [("", "questions/s", "same predictions", "losses differ by, a token")]
    table.append(("plain, float32", n / plain_seconds, "", ""))
    for dtype, (losses, seconds) in found.items():
        same = [(losses / size).argmin(1) == (expected / size).argmin(1) for size in (1, counts)]  # acc's, acc_norm's
        share, worst = torch.cat(same).float().mean().item(), ((losses - expected).abs() / counts).max().item()
        table.append((f"hellaswag.py, {dtype}", n / seconds, f"{share:.1%}", f"{worst:.1e}"))
        good &= (share == 1 and worst < 1e-4) if dtype == "float32" else share >= 0.99
    show(*table)
    print("as it should be" if good else "NOT AS IT SHOULD BE")
    print(f"ratio: {plain_seconds / seconds:.2f}")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
