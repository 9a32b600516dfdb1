"""
How fast is a whole training step? Tokens per second beside transformers' GPT-2 of the same size, on this machine's CPU.

    python bench/throughput.py               (about 7 minutes on 2 cores)

Both train 4 layers of width 768 with a vocabulary of 4,096: 16 micro-batches of 4 x 512 tokens, then the optimizer.
Ours is train_gpt.py's model and its Muon and AdamW. The baseline is GPT2LMHeadModel with torch.optim.AdamW(fused=True)
in a plain loop. Each is tried compiled and not, in fp32 and in bf16 (the baseline under autocast), and its fastest way
is timed against the other's in turns. FLOPs are counted as 6 a weight that multiplies and token, and 12 * layers *
width * context a token for attention; the optimizer's are not counted, its time is. The last line is `ratio: X`: our
tokens/s over the baseline's.
"""

import contextlib
import os
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
B, T, C, L, H, V, MICRO_STEPS = 4, 512, 768, 4, 6, 4096, 16


def ours(dtype, compiled):
    import torch

    from train_gpt import GPT, adamw_step, muon_step

    torch.manual_seed(0)
    config = dict(vocab_size=V, block_size=T, n_layer=L, n_head=H, n_embd=C)
    model = GPT(config | dict(tie_weights=False, embed_norm=True, logit_softcap=15.0), dtype)
    forward = torch.compile(model, dynamic=False) if compiled else model
    square = [p for block in model.blocks for p in (block.qkv, block.o)]
    matrices = square, [block.up for block in model.blocks], [block.down for block in model.blocks]
    moments = {p: torch.zeros_like(p) for p in model.parameters()}
    squares = {p: torch.zeros_like(p) for p in (model.embed, model.head)}

    def step(micro_steps):
        for _ in range(micro_steps):
            tokens = torch.randint(V, (B, T + 1))
            (forward(tokens[:, :-1], tokens[:, 1:]) / micro_steps).backward()
        for params in matrices:
            muon_step(params, [moments[p] for p in params], 0.025, 0.95, 0.05, dtype)
        for p in squares:
            adamw_step(p, moments[p], squares[p], 1, 0.004)
        model.zero_grad()

    return step


def theirs(dtype, compiled):
    import torch
    import torch.nn.functional as F
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V,
        n_positions=T,
        n_embd=C,
        n_layer=L,
        n_head=H,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if compiled else model
    autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()

    def step(micro_steps):
        for _ in range(micro_steps):
            tokens = torch.randint(V, (B, T + 1))
            with autocast:
                logits = forward(tokens[:, :-1]).logits
                loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            (loss / micro_steps).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step, micro_steps):
    start = time.perf_counter()
    step(micro_steps)
    return time.perf_counter() - start


def peak(dtype):
    """GFLOP/s of the product of two matrices of 2048 x 2048, the best of 20."""
    import torch

    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)

    def product(_):
        return a @ b

    return 2 * 2048**3 / min(seconds(product, 1) for _ in range(20)) / 1e9


def main():
    import torch

    import train_gpt

    dtypes = [torch.float32]
    if train_gpt.get_device("cpu", "auto")[1] == torch.bfloat16:
        dtypes.append(torch.bfloat16)  # elsewhere a CPU takes a hundred times as long in it
    flops = (6 * (12 * L * C**2 + V * C) + 12 * L * C * T) * B * T * MICRO_STEPS
    peaks = {dtype: peak(dtype) for dtype in dtypes}
    print(f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}; a step: {B * T * MICRO_STEPS:,} tokens")
    print("largest product: " + ", ".join(f"{p:.0f} GFLOP/s in {str(dtype)[6:]}" for dtype, p in peaks.items()))
    print("\nseconds for 2 micro-batches and the optimizer, best of 2")
    best = {}
    for name, build in (("ours", ours), ("transformers", theirs)):
        tried = []
        for dtype in dtypes:
            for compiled in (False, True):
                step = build(dtype, compiled)
                step(1)
                tried.append((min(seconds(step, 2) for _ in range(2)), str(dtype)[6:], compiled, step))
                print(
                    f"  {name:13} {tried[-1][1]:9} {'compiled' if compiled else 'eager':9} {tried[-1][0]:.2f}",
                    flush=True,
                )
        best[name] = min(tried, key=lambda row: row[0])
        del tried
    times = {name: [] for name in best}
    for _ in range(3):
        for name, (*_, step) in best.items():
            times[name].append(seconds(step, MICRO_STEPS))
    top = max(peaks.values())
    print(f"\n{'':14}{'fastest as':20}{'tokens/s':>10}{'GFLOP/s':>10}{'of peak':>9}   seconds a step, three in turns")
    for name, (_, dtype, compiled, _) in best.items():
        middle = statistics.median(times[name])
        way = f"{dtype}, {'compiled' if compiled else 'eager'}"
        print(
            f"{name:14}{way:20}{B * T * MICRO_STEPS / middle:10,.0f}{flops / middle / 1e9:10.0f}"
            f"{flops / middle / 1e9 / top:9.0%}   {', '.join(f'{t:.1f}' for t in times[name])}"
        )
    print(f"ratio: {statistics.median(times['transformers']) / statistics.median(times['ours']):.2f}")


if __name__ == "__main__":
    main()
