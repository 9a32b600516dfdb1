"""
How fast is a whole training step? Tokens per second beside transformers' GPT-2 of the same size, on this machine's CPU.

    python bench/throughput.py               (about 7 minutes on 2 cores)

A step of 16 micro-batches of 4 x 512 tokens and the optimizer: Muon and AdamW, theirs with AdamW(fused=True). Each side
is tried compiled and not, in fp32 and in bf16 (theirs under autocast), and its fastest way is timed against the other's
in turns, three times. `ratio: X` is our tokens/s over the baseline's.
"""

import argparse
import statistics
import time

import torch
from common import BF16, gpt2, loss_of, show

from train_gpt import GPT, adamw_step, muon_step

B, T, C, L, H, V, MICRO_STEPS = 4, 512, 768, 4, 6, 4096, 16


def ours(bf16):
    """A model of train_gpt.py, the loss of tokens, and a function that takes a step of the optimizers."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    config = dict(vocab_size=V, block_size=T, n_layer=L, n_head=H, n_embd=C)
    model = GPT(config | dict(tie_weights=False, embed_norm=True, logit_softcap=15.0), dtype)
    square = [p for block in model.blocks for p in (block.qkv, block.o)]
    matrices = square, [block.up for block in model.blocks], [block.down for block in model.blocks]
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()}

    def optimize():
        for params in matrices:
            muon_step(params, [moments[p][0] for p in params], 0.025, 0.95, 0.05, dtype)
        for p in (model.embed, model.head):
            adamw_step(p, *moments[p], 1, 0.004)

    return model, lambda model, x, y: model(x, y), optimize


def theirs(bf16):
    model = gpt2(V, T, L, H, C)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return model, lambda model, x, y: loss_of(model, x, y, bf16), optimizer.step


def seconds(model, loss, optimize, micro_steps):
    """The time of a step."""
    start = time.perf_counter()
    for _ in range(micro_steps):
        tokens = torch.randint(V, (B, T + 1))
        (loss(model, tokens[:, :-1], tokens[:, 1:]) / micro_steps).backward()
    optimize()
    model.zero_grad()
    return time.perf_counter() - start


def fastest(build):
    """(seconds, way in words, what seconds() takes) of the fastest way to take a step of 2 micro-batches."""
    ways = []
    for bf16 in (False, True) if BF16 else (False,):
        for compiled in (False, True):
            model, *functions = build(bf16)
            step = torch.compile(model, dynamic=False) if compiled else model, *functions
            seconds(*step, 1)
            way = ("bf16" if bf16 else "fp32") + (", compiled" if compiled else "")
            ways.append((min(seconds(*step, 2) for _ in range(2)), way, step))
    return min(ways, key=lambda row: row[0])


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    (_, their_way, their_step), (_, our_way, our_step) = fastest(theirs), fastest(ours)
    turns = [(seconds(*their_step, MICRO_STEPS), seconds(*our_step, MICRO_STEPS)) for _ in range(3)]
    their_time, our_time = map(statistics.median, zip(*turns))
    show(
        ("", "fastest as", "tokens/s", "seconds a step"),
        ("GPT-2 of transformers", their_way, B * T * MICRO_STEPS / their_time, their_time),
        ("train_gpt.py", our_way, B * T * MICRO_STEPS / our_time, our_time),
    )
    print(f"ratio: {their_time / our_time:.2f}")


if __name__ == "__main__":
    main()
