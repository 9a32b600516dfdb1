"""
What pretraining costs beside arithmetic: memory, the loader, and several processes instead of one. On a CPU.

    python bench/pretrain_costs.py           (about 7 minutes on 2 cores, 15 GiB of memory)

Memory: one step of 8 x 1,024 tokens at GPT-2's 124M, as the peak of the whole process, of train_gpt.py and of
transformers' GPT-2 with torch.optim.AdamW(fused=True) in a plain loop (under autocast in bf16). Loader: the time of
reading a batch beside that of a step, and starting with 103 shards of 100 M tokens (sparse files) beside one.
Processes: two of one thread each under torchrun beside one of two threads. `ratio: X` is the baseline's memory over
ours, in the type that --dtype auto takes here.
"""

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
TRAIN = os.path.join(ROOT, "train_gpt.py")
MEDIUM = "--n_layer 4 --n_head 4 --n_embd 256 --block_size 256 --batch_size 16 --total_batch_size 16384".split()
QUIET = "--hellaswag_every 0 --sample_every 0 --save_every 0 --val_loss_every 0 --milestone_every 0 --overwrite".split()


def write_shard(path, tokens, sparse=0):
    """A shard of random tokens, or of as many zeros that take no room on the disk."""
    with open(path, "wb") as f:
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, sparse or len(tokens)
        f.write(header.tobytes())
        if sparse:
            f.truncate(1024 + 2 * sparse)
        else:
            f.write(tokens.astype("<u2").tobytes())


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def baseline_memory(dtype):
    """One step of the baseline at 124M; prints the peak memory in GiB."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=True)
    idx = torch.randint(50257, (8, 1024))
    with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext():
        loss = model(idx, labels=idx).loss
    loss.backward()
    optimizer.step()
    print(json.dumps(peak()))


def startup(pattern):
    """Open shards and read one batch; prints the seconds and the memory that this took."""
    from train_gpt import Shards

    before, start = peak(), time.perf_counter()
    Shards(pattern, "--train_files", 50257).read(0, 65537)
    print(json.dumps([time.perf_counter() - start, peak() - before]))


def train(out_dir, *arguments, processes=1):
    """Run train_gpt.py; returns its log's rows, and what it printed."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, TRAIN, *QUIET, "--out_dir", out_dir, "--device", "cpu", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with open(os.path.join(out_dir, "log.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f], done.stdout


def call(*arguments):
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    if sys.argv[1:2] == ["baseline_memory"]:
        return baseline_memory(sys.argv[2])
    if sys.argv[1:2] == ["startup"]:
        return startup(sys.argv[2])

    import torch

    from train_gpt import Shards, get_batch, get_device

    auto = str(get_device("cpu", "auto")[1])[6:]
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: os.path.join(folder, f"{name}.bin") for name in ("gpt2", "bytes")}
        write_shard(paths["gpt2"], random.integers(50257, size=300_000))
        write_shard(paths["bytes"], random.integers(257, size=300_000))
        out_dir = os.path.join(folder, "run")

        print("peak memory at 124M, a step of 8 x 1,024 tokens, GiB")
        ratios = {}
        for dtype in dict.fromkeys(("float32", auto)):
            files = ["--train_files", paths["gpt2"], "--val_files", paths["gpt2"], "--val_tokens", "1024"]
            size = ["--preset", "124M", "--batch_size", "8", "--total_batch_size", "8192", "--max_iters", "1"]
            _, said = train(out_dir, *files, *size, "--dtype", dtype)
            ours = float(said.split("peak memory ")[1].split()[0])
            theirs = call("baseline_memory", dtype)
            ratios[dtype] = theirs / ours
            print(
                f"  {dtype:9} train_gpt.py {ours:5.1f}   transformers {theirs:5.1f}   {ratios[dtype]:.2f} times",
                flush=True,
            )

        print("two processes of one thread each, and one of two threads: tokens/s at width 256, in turns")
        speeds = {1: [], 2: []}
        files = [
            "--preset",
            "demo",
            "--train_files",
            paths["bytes"],
            "--val_files",
            paths["bytes"],
            "--val_tokens",
            "256",
        ]
        for processes in (1, 2) * 3:
            rows, _ = train(out_dir, *files, *MEDIUM, "--max_iters", "8", processes=processes)
            speeds[processes].append(statistics.median(row["tokens_per_s"] for row in rows[2:] if "train_loss" in row))
        one, two = (statistics.median(speeds[n]) for n in (1, 2))
        print(f"  one {one:,.0f}   two {two:,.0f}   {two / one:.2f} of it   {speeds}", flush=True)

        print("loader")
        shards, times = Shards(paths["bytes"], "--train_files", 257), []
        for i in range(200):
            start = time.perf_counter()
            get_batch(shards, i * 4096, 16, 256, torch.device("cpu"))
            times.append(time.perf_counter() - start)
        share = statistics.median(times) / (4096 / one)
        print(f"  a batch of 16 x 256: {1e6 * statistics.median(times):.0f} us, {share:.3%} of its step above")
        for i in range(103):
            write_shard(os.path.join(folder, f"sparse_{i:06d}.bin"), None, sparse=100_000_000)
        for name in ("sparse_000000.bin", "sparse_*.bin"):
            took, more = call("startup", os.path.join(folder, name))
            print(f"  opening {name} and a first batch of 65,536 tokens: {took:.3f} s, {1024 * more:.1f} MiB")
    print(f"ratio: {ratios[auto]:.2f}")


if __name__ == "__main__":
    main()
