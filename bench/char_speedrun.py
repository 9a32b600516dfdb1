"""
How long until a character model knows a text as well as nanoGPT's CPU recipe does? Whole commands, side by side.

    python bench/char_speedrun.py --data tinyshakespeare.txt            (about 2 minutes on 2 cores)

Whole commands: imports, training, the loss over the last 10% of the file, and for ours a story. The baseline is GPT-2's
architecture from transformers in a plain loop at nanoGPT's recipe for CPUs (2,000 steps of AdamW); ours is
train_char.py with the flags below, three seeds. `ratio: X` is the baseline's time over the median of ours.
"""

import argparse
import statistics
import tempfile

import torch
from common import evaluate, gpt2, read_rows, run, show, train

SPRINT = (
    "--n_layer 1 --n_head 2 --n_embd 64 --block_size 80 --batch_size 12 --max_iters 540 --warmdown_frac 0.5 "
    "--matrix_lr 0.03 --embed_lr 0.3 --momentum 0.9 --val_loss_every 0 --max_new_tokens 100 --device cpu --overwrite"
).split()
STEPS, B, T = 2000, 12, 64  # of the baseline


def baseline(path):
    """Train the baseline, and print its validation loss."""
    with open(path, encoding="utf-8") as f:
        text = f.read()
    index = {c: i for i, c in enumerate(sorted(set(text)))}
    data = torch.tensor([index[c] for c in text])
    split = int(0.9 * len(data))

    def batch(_):
        rows = torch.stack([data[i : i + T + 1] for i in torch.randint(split - T, (B,))])
        return rows[:, :-1], rows[:, 1:]

    torch.manual_seed(1337)
    model = gpt2(len(index), T, 4, 4, 128)
    train(model, batch, STEPS, 100, 1e-3, (0.9, 0.99))
    print(evaluate(model, data[split:], T))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the text; the published figures are for tinyshakespeare")
    parser.add_argument("--baseline", action="store_true", help="run the baseline alone, in this process")
    flags = parser.parse_args()
    if flags.baseline:
        return baseline(flags.data)
    ours = []
    with tempfile.TemporaryDirectory() as out_dir:
        for seed in (1, 2, 3):
            where = "--data", flags.data, "--out_dir", out_dir, "--prompt", "The ", "--seed", seed
            seconds, _ = run("train_char.py", *SPRINT, *where)
            ours.append((f"train_char.py, seed {seed}", seconds, read_rows(out_dir, "log.jsonl")[-1]["val_loss"]))
            if seed == 1:
                theirs, loss = run(__file__, "--data", flags.data, "--baseline")
    show(("whole command", "seconds", "validation loss"), ("nanoGPT's CPU recipe", theirs, float(loss)), *ours)
    print(f"mean loss of ours: {statistics.mean(row[2] for row in ours):.4f}")
    print(f"ratio: {theirs / statistics.median(row[1] for row in ours):.2f}")


if __name__ == "__main__":
    main()
