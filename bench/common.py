"""What several benches share."""

import json
import math
import os
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)  # for the benches that import a script of ours
# A small model of bytes for a CPU, and its learning rates; no stories are written on the way.
DEMO = (
    "--tokenizer bytes --n_layer 4 --n_head 4 --n_embd 256 --block_size 256 --total_batch_size 4096 --batch_size 16 "
    "--matrix_lr 0.03 --embed_lr 0.3 --head_lr 0.01 --weight_decay 0 --device cpu --sample_every 0 --overwrite"
).split()
# where --dtype auto takes bf16 on a CPU; elsewhere it takes a hundred times as long
BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def run(script, *arguments, folder=None):
    """Run a script as a command in a folder; returns its seconds and what it printed to stdout."""
    command = [sys.executable, os.path.join(ROOT, script), *map(str, arguments)]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    print(f"{seconds:6.1f} s: {' '.join(command[1:])}"[:120], file=sys.stderr)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:], "it failed", sep="\n", file=sys.stderr)
        raise SystemExit(1)
    return seconds, done.stdout


def read_rows(*path):
    """The objects of a .jsonl file, given by the parts of its path."""
    with open(os.path.join(*path), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def show(*rows):
    """Print a table, the first row its head; floats get one digit after the point, those below 10 four."""
    print(f"\n{torch.get_num_threads()} threads, PyTorch {torch.__version__}\n")
    form = {int: "{:,}".format, float: lambda x: f"{x:.4f}" if abs(x) < 10 else f"{x:,.1f}"}
    rows = [[form.get(type(cell), str)(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        print(first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:])), sep="   ")
    print()


def pretrain(folder, name, out_dir, *settings):
    """Run train_gpt.py with DEMO on the shards NAME_*.bin of a folder; returns the last row of its log."""
    files = "--train_files", f"{name}_train_*.bin", "--val_files", f"{name}_val_*.bin"
    run("train_gpt.py", *DEMO, *files, *settings, "--val_loss_every", 0, "--out_dir", out_dir, folder=folder)
    return read_rows(folder, out_dir, "log.jsonl")[-1]


def write_random(path, n_head, block_size, n_layer=12, n_embd=768, std=None):
    """Write a checkpoint of random weights, of one std or of sizes as after training; returns its config and model."""
    torch.manual_seed(0)
    C, config = n_embd, dict(vocab_size=50257, block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    model = {"embed": torch.randn(50304, C), "head": torch.randn(50304, C) * (std or 0.02)}
    for i in range(n_layer):
        model[f"blocks.{i}.qkv"] = torch.randn(3, C, C) * (std or C**-0.5)
        model[f"blocks.{i}.o"] = torch.randn(C, C) * (std or 0.004)
        model[f"blocks.{i}.up"] = torch.randn(4 * C, C) * (std or C**-0.5)
        model[f"blocks.{i}.down"] = torch.randn(C, 4 * C) * (std or 0.004)
    config |= dict(tie_weights=False, embed_norm=True, logit_softcap=15.0)
    torch.save(dict(format=1, config=config, tokenizer="gpt2", model=model), path)
    return config, model


def as_transformers(path, dtype=torch.float32):
    """The model of transformers that runs/export_hf.py makes of a checkpoint, in the folder PATH_hf."""
    from transformers import AutoModelForCausalLM

    run("runs/export_hf.py", path, f"{path}_hf", "--overwrite")
    return AutoModelForCausalLM.from_pretrained(f"{path}_hf", dtype=dtype)


def gpt2(V, T, L, H, C):
    """GPT-2's architecture from transformers, without dropout: vocabulary V, context T, L layers, H heads, width C."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(vocab_size=V, n_positions=T, n_layer=L, n_head=H, n_embd=C, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))


def loss_of(model, x, y, bf16, reduction="mean"):
    """The loss of a model of transformers on tokens x against y (B, T), in nats."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return F.cross_entropy(model(x).logits.flatten(0, 1).float(), y.flatten(), reduction=reduction)


def train(model, batch, steps, warmup, lr, betas, fused=False, bf16=False):
    """Train by AdamW in a plain loop, on the (x, y) of batch(step), to a tenth of lr; returns the seconds."""
    groups = [dict(params=[p for p in model.parameters() if p.ndim >= 2], weight_decay=0.1)]
    groups.append(dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0))
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
    start = time.perf_counter()
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = lr * ((step + 1) / (warmup + 1) if step < warmup else 0.1 + 0.9 * cosine)
        loss_of(model, *batch(step), bf16).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


@torch.no_grad()
def evaluate(model, tokens, T, bf16=False):
    """Mean loss of a model of transformers on all tokens (a 1D tensor) but the first, in windows of T."""
    x, y, n = tokens[:-1], tokens[1:], (len(tokens) - 1) // T * T
    pieces = list(zip(x[:n].view(-1, T).split(64), y[:n].view(-1, T).split(64)))
    if n < len(y):
        pieces.append((x[None, n:], y[None, n:]))  # the last window is shorter
    return sum(loss_of(model, *piece, bf16, "sum").item() for piece in pieces) / len(y)
