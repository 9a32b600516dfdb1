"""
How long until a character model knows a text as well as nanoGPT's CPU recipe does? Whole commands, side by side.

    python bench/char_speedrun.py --data tinyshakespeare.txt            (about 4 minutes on 2 cores)
    python bench/char_speedrun.py --data tinyshakespeare.txt --long     (3 more: the default flags in the same time)

The baseline is GPT-2's architecture from transformers, trained in a plain loop at nanoGPT's recipe for CPUs: 4 layers,
4 heads, width 128, context 64, batch 12, AdamW at 1e-3 with betas 0.9 and 0.99, 100 steps of warm-up, cosine to 1e-4,
2,000 iterations. Ours is train_char.py with the flags below, three seeds. Both learn from the first 90% of the file,
and both losses are means over the whole last 10%. Times are those of whole commands: imports, training, evaluation, and
for ours a story. The last line is `ratio: X`: the baseline's time over the median of ours.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SPRINT = "--n_layer 1 --n_head 2 --n_embd 64 --block_size 80 --batch_size 12 --max_iters 540 --warmdown_frac 0.5"
SPRINT = [
    *SPRINT.split(),
    *"--matrix_lr 0.03 --embed_lr 0.3 --momentum 0.9 --val_loss_every 0 --max_new_tokens 100 --prompt".split(),
    "The ",
]


def baseline(path):
    """Train the baseline; prints its validation loss as JSON."""
    import torch
    import torch.nn.functional as F
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1337)
    with open(path, encoding="utf-8") as f:
        text = f.read()
    chars = sorted(set(text))
    index = {c: i for i, c in enumerate(chars)}
    data = torch.tensor([index[c] for c in text])
    split = int(0.9 * len(data))
    train, val = data[:split], data[split:]
    B, T, V, steps, warmup = 12, 64, len(chars), 2000, 100
    config = GPT2Config(
        vocab_size=V,
        n_positions=T,
        n_embd=128,
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
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1) / (warmup + 1) if step < warmup else 1e-4 + decay * 9e-4
        starts = torch.randint(len(train) - T, (B,))
        x = torch.stack([train[i : i + T] for i in starts])
        y = torch.stack([train[i + 1 : i + 1 + T] for i in starts])
        loss = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0:
            print(f"baseline {step}/{steps} loss {loss.item():.4f}", file=sys.stderr, flush=True)
    total, n = 0.0, (len(val) - 1) // T * T
    with torch.no_grad():
        for x, y in zip(val[:n].view(-1, T).split(256), val[1 : n + 1].view(-1, T).split(256)):
            total += F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    print(json.dumps({"val_loss": total / n}))


def timed(command):
    """Seconds that a command takes and what it printed, with an empty compile cache."""
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        return time.perf_counter() - start, done.stdout


def ours(path, arguments):
    """(seconds, validation loss) of train_char.py."""
    with tempfile.TemporaryDirectory() as out:
        script = os.path.join(ROOT, "train_char.py")
        seconds, _ = timed([sys.executable, script, "--data", path, "--out_dir", out, "--device", "cpu", *arguments])
        with open(os.path.join(out, "log.jsonl"), encoding="utf-8") as f:
            return seconds, json.loads(f.readlines()[-1])["val_loss"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the text; the published figures are for tinyshakespeare")
    parser.add_argument("--long", action="store_true", help="also run the default flags")
    parser.add_argument("--baseline", action="store_true", help="run the baseline alone, in this process")
    flags = parser.parse_args()
    if flags.baseline:
        return baseline(flags.data)
    rows = [("sprint, seed 1", *ours(flags.data, [*SPRINT, "--seed", "1"]))]
    seconds, printed = timed([sys.executable, __file__, "--data", flags.data, "--baseline"])
    rows.append(("baseline", seconds, json.loads(printed.splitlines()[-1])["val_loss"]))
    for seed in ("2", "3"):
        rows.append((f"sprint, seed {seed}", *ours(flags.data, [*SPRINT, "--seed", seed])))
    if flags.long:
        rows.append(("default flags", *ours(flags.data, ["--prompt", "The ", "--val_loss_every", "0"])))
    print(f"{'whole command':<20}{'seconds':>10}{'val_loss':>10}")
    for name, taken, loss in rows:
        print(f"{name:<20}{taken:>10.1f}{loss:>10.4f}")
    sprints = [row for row in rows if row[0].startswith("sprint")]
    print(f"mean val_loss of the sprints: {statistics.mean(row[2] for row in sprints):.4f}")
    print(f"ratio: {seconds / statistics.median(row[1] for row in sprints):.2f}")


if __name__ == "__main__":
    main()
