"""
How long until a small GPT knows English prose as well as one trained the usual way? Bytes, the same data and batch.

    python bench/pretrain.py                          (about 3 minutes on 2 cores)

The baseline is GPT-2's architecture from transformers by AdamW in a plain loop, 4 passes over the texts in data/; ours
is train_gpt.py as in runs/demo.sh: the same batches in the same order, 15% of the steps. Losses are means over the last
5% of each text's documents, times those of training steps. `ratio: X` is the baseline's time over ours.
"""

import argparse
import glob
import os
import tempfile

import numpy as np
import torch
from common import BF16, ROOT, evaluate, gpt2, pretrain, run, show, train

B, T, PASSES, SHARE = 16, 256, 4, 0.15  # B and T as in common.DEMO


def read(pattern):
    """The tokens of all shards of a pattern."""
    parts = [np.fromfile(path, "<u2", offset=1024) for path in sorted(glob.glob(pattern))]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tales", "plain"):  # of each text the last documents are held out
            text = os.path.join(ROOT, "data", f"{name}.txt")
            run("data/prepare.py", text, "--tokenizer", "bytes", "--out", name, folder=folder)
        learned, held_out = (read(os.path.join(folder, f"*_{split}_*.bin")) for split in ("train", "val"))

        def batch(step):
            rows = learned[(step * B * T + torch.arange(B * T + 1)) % len(learned)]
            return rows[:-1].view(B, T), rows[1:].view(B, T)

        torch.manual_seed(1337)
        steps, model = PASSES * len(learned) // (B * T), gpt2(257, T, 4, 4, 256)
        theirs = train(model, batch, steps, 40, 2e-3, (0.9, 0.95), fused=True, bf16=BF16)
        loss = evaluate(model, held_out, T, BF16)
        settings = f"--max_iters {int(steps * SHARE)} --warmdown_frac 0.6667 --val_tokens {2**40} --save_every 0"
        last = pretrain(folder, "*", "run", *settings.split())
    ours = last["train_time_ms"] / 1000
    show(
        ("", "steps", "bytes", "seconds", "held-out loss"),
        ("GPT-2 of transformers, AdamW", steps, steps * B * T, theirs, loss),
        ("train_gpt.py", last["step"], last["step"] * B * T, ours, last["val_loss"]),
    )
    print("the baseline's loss: " + ("reached" if last["val_loss"] <= loss else "NOT REACHED"))
    print(f"ratio: {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
