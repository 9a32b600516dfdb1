"""
What pretraining costs beside arithmetic: memory, the loader, and several processes instead of one. On a CPU.

    python bench/pretrain_costs.py           (about 7 minutes on 2 cores, 16 GiB of memory)

Memory: one step of 8 x 1,024 tokens at GPT-2's 124M, as the peak of the whole process, of train_gpt.py and of
transformers' GPT-2 with torch.optim.AdamW(fused=True) in a plain loop (under autocast in bf16). Loader: the time of
reading a batch beside that of a step, and opening 103 shards of 100 M tokens (sparse files) beside one.
Processes: two of one thread each under torchrun beside one of two threads. `ratio: X` is the baseline's memory over
ours, in the type that --dtype auto takes here.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from common import DEMO

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


def write_shard(path, tokens, sparse=0):
    """A shard of tokens, or of as many zeros that take no room on the disk."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, sparse or len(tokens)
    with open(path, "wb") as f:
        f.write(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
        f.truncate(1024 + 2 * header[2])


def call(*command):
    """Run a script to its end; returns the peak of its memory in GiB."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss / 2**20


def train(folder, name, *arguments, processes=1):
    """Run train_gpt.py on the shard of that name; returns the peak of its memory in GiB."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    shard, out_dir = os.path.join(folder, f"{name}.bin"), os.path.join(folder, "run")
    files = "--train_files", shard, "--val_files", shard, "--val_tokens", "1024", "--out_dir", out_dir
    more = "--device cpu --val_loss_every 0 --sample_every 0 --save_every 0 --overwrite".split()
    return call(*launch, os.path.join(ROOT, "train_gpt.py"), *files, *more, *arguments)


def baseline(dtype):
    """One step of transformers' GPT-2 at 124M."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=True)
    idx = torch.randint(50257, (8, 1024))
    with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext():
        loss = model(idx, labels=idx).loss
    loss.backward()
    optimizer.step()


def main():
    if sys.argv[1:2] == ["--baseline"]:
        return baseline(sys.argv[2])

    import torch

    from train_gpt import Shards, get_device

    auto, cpu = str(get_device("cpu", "auto")[1])[6:], torch.device("cpu")
    random, ratios = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, vocab_size in (("gpt2", 50257), ("bytes", 257)):
            write_shard(os.path.join(folder, f"{name}.bin"), random.integers(vocab_size, size=300_000))

        print("peak memory at 124M, a step of 8 x 1,024 tokens, GiB")
        for dtype in dict.fromkeys(("float32", auto)):
            step = "--batch_size 8 --total_batch_size 8192 --max_iters 1".split()
            ours, theirs = train(folder, "gpt2", *step, "--dtype", dtype), call(__file__, "--baseline", dtype)
            ratios[dtype] = theirs / ours
            print(f"  {dtype:9} train_gpt.py {ours:5.1f}   transformers {theirs:5.1f}   {ratios[dtype]:.2f} times")

        print("two processes of one thread each, and one of two threads: tokens/s at width 256, in turns", flush=True)
        speeds = {1: [], 2: []}
        for processes in (1, 2) * 3:
            step = *DEMO, "--total_batch_size", "16384", "--max_iters", "8"
            train(folder, "bytes", *step, processes=processes)
            with open(os.path.join(folder, "run", "log.jsonl"), encoding="utf-8") as f:
                found = [row["tokens_per_s"] for row in map(json.loads, f) if "train_loss" in row]
            speeds[processes].append(statistics.median(found[2:]))
        one, two = (statistics.median(speeds[n]) for n in (1, 2))
        print(f"  one {one:,.0f}   two {two:,.0f}   {two / one:.2f} of it   {speeds}", flush=True)

        print("loader")
        shards, times = Shards(os.path.join(folder, "bytes.bin"), "--train_files", 257), []
        for i in range(200):
            start = time.perf_counter()
            shards.batch(i * 4096, 16, 256, cpu)
            times.append(time.perf_counter() - start)
        share = statistics.median(times) / (4096 / one)
        print(f"  a batch of 16 x 256: {1e6 * statistics.median(times):.0f} us, {share:.3%} of its step above")
        for i in range(103):
            write_shard(os.path.join(folder, f"sparse_{i:06d}.bin"), [], sparse=100_000_000)
        for name in ("sparse_000000.bin", "sparse_*.bin"):
            start = time.perf_counter()
            Shards(os.path.join(folder, name), "--train_files", 50257).batch(0, 64, 1024, cpu)
            print(
                f"  opening {name} and a first batch of 65,536 tokens: {time.perf_counter() - start:.3f} s", flush=True
            )
    print(f"ratio: {ratios[auto]:.2f}")


if __name__ == "__main__":
    main()
