"""
How long until a small GPT knows English prose as well as one trained the usual way? Bytes, the same data and batch.

    python bench/pretrain.py                          (about 7 minutes on 2 cores: the tales and the plain prose)
    python bench/pretrain.py --input a.txt b.txt
    python bench/pretrain.py --tune                   the baseline's final loss at other learning rates (15 minutes)

The baseline is GPT-2's architecture from transformers, 4 layers of width 256, context 256, trained by AdamW in a plain
loop: 4 passes over the text in batches of 16 x 256 bytes, betas 0.9 and 0.95, weight decay 0.1, 40 steps of warm-up,
cosine to a tenth of a learning rate of 0.002 (--tune tries others), bf16 autocast where the CPU has bf16.
Ours is train_gpt.py with the sizes and rates of runs/demo.sh, the same batches in the same order, and --share of the
baseline's steps; in the last two thirds of them the rates fall. Both losses are means over all targets of the last 5%
of each text's documents, in windows of 256; both times are those of training steps. The last line is `ratio: X`: the
baseline's time over ours.
"""

import argparse
import contextlib
import glob
import json
import math
import os
import subprocess
import sys
import tempfile
import time

from common import DEMO

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
TEXTS = [os.path.join(ROOT, "data", name) for name in ("tales.txt", "plain.txt")]
B, T, PASSES, RATE = 16, 256, 4, 2e-3  # B and T as in DEMO


def baseline(prefix, rate):
    """Train the baseline on the shards of `prefix`; prints its losses and time as JSON."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from transformers import GPT2Config, GPT2LMHeadModel

    from train_gpt import get_device

    def read(pattern):
        parts = [np.fromfile(path, "<u2", offset=1024) for path in sorted(glob.glob(prefix + pattern))]
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    train, val = read("_*_train_*.bin"), read("_*_val_*.bin")
    torch.manual_seed(1337)
    config = GPT2Config(
        vocab_size=257,
        n_positions=T,
        n_embd=256,
        n_layer=4,
        n_head=4,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    _, dtype = get_device("cpu", "auto")
    autocast = torch.autocast("cpu", dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()

    def losses(x, y, reduction):
        with autocast:
            return F.cross_entropy(model(x).logits.flatten(0, 1).float(), y.flatten(), reduction=reduction)

    steps, warmup, seconds = PASSES * len(train) // (B * T), 40, 0.0
    for step in range(steps):
        start = time.perf_counter()
        decay = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = rate * (step + 1) / (warmup + 1) if step < warmup else rate * (0.1 + 0.9 * decay)
        at = (step * B * T + torch.arange(B * T + 1)) % len(train)
        tokens = train[at]
        loss = losses(tokens[:-1].view(B, T), tokens[1:].view(B, T), "mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds += time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        total, n = 0.0, len(val) - 1
        for i in range(0, n, T):
            x, y = val[i : min(i + T, n)], val[i + 1 : min(i + T, n) + 1]
            total += losses(x[None], y, "sum").item()
    print(json.dumps({"val_loss": total / n, "seconds": seconds, "steps": steps}))


def ours(prefix, out_dir, steps):
    """Train ours; returns its losses and time."""
    files = "--train_files", prefix + "_*_train_*.bin", "--val_files", prefix + "_*_val_*.bin", "--out_dir", out_dir
    settings = f"--max_iters {steps} --warmdown_frac 0.6667 --val_loss_every 0 --val_tokens {2**40} --save_every 0"
    command = [sys.executable, os.path.join(ROOT, "train_gpt.py"), *DEMO, *files, *settings.split()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with open(os.path.join(out_dir, "log.jsonl"), encoding="utf-8") as f:
        last = [json.loads(line) for line in f][-1]
    return {"val_loss": last["val_loss"], "seconds": last["train_time_ms"] / 1000, "steps": last["step"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", default=TEXTS, help=".txt or .jsonl files")
    parser.add_argument("--share", type=float, default=0.15, help="our share of the baseline's steps, 0.5 at most")
    parser.add_argument("--tune", action="store_true", help="only the baseline, at four learning rates")
    parser.add_argument("--baseline", nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.baseline:
        return baseline(flags.baseline[0], float(flags.baseline[1]))

    with tempfile.TemporaryDirectory() as folder:
        prefix = os.path.join(folder, "prose")
        for i, path in enumerate(flags.input):  # of each text the last documents are held out
            prepare = [sys.executable, os.path.join(ROOT, "data", "prepare.py"), path, "--tokenizer", "bytes"]
            subprocess.run([*prepare, "--out", f"{prefix}_{i}"], check=True)

        def run_baseline(rate):
            command = [sys.executable, __file__, "--baseline", prefix, str(rate)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            return json.loads(done.stdout.splitlines()[-1])

        if flags.tune:
            for rate in (1e-3, 2e-3, 3e-3, 5e-3):
                print(f"rate {rate:g}: loss {run_baseline(rate)['val_loss']:.4f}", flush=True)
            return
        theirs = run_baseline(RATE)
        mine = ours(prefix, os.path.join(folder, "run"), int(theirs["steps"] * min(flags.share, 0.5)))
    print(f"\n{'':34}{'steps':>7}{'bytes':>12}{'seconds':>9}{'held-out loss':>15}")
    for name, row in ((f"GPT-2 by AdamW, rate {RATE:g}", theirs), ("train_gpt.py, as in runs/demo.sh", mine)):
        print(f"{name:34}{row['steps']:7}{row['steps'] * B * T:12,}{row['seconds']:9.1f}{row['val_loss']:15.4f}")
    reached = "reached" if mine["val_loss"] <= theirs["val_loss"] else "NOT REACHED"
    print(f"the baseline's loss: {reached}, with {mine['steps'] / theirs['steps']:.2f} of its bytes")
    print(f"ratio: {theirs['seconds'] / mine['seconds']:.2f}")


if __name__ == "__main__":
    main()
