"""
How fast is all of it on one CUDA GPU? Random tokens and weights, nothing to download; a line for each measurement.

    python bench/gpu.py                          every part: some 10 minutes, most of them compiling
    python bench/gpu.py --part step sample       these; each takes 200 s at most. --tiny tries it on a CPU

step and large are train_gpt.py at 124M and 1.5B; transformers (pip install transformers) is its NanoChat, compiled,
forward and backward only, and its generate. `ratio: X` is sample.py's tokens/s for one story over those of generate.
"""

import argparse
import os
import random
import sys

import torch
from torch.utils.benchmark import Timer

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import hellaswag  # noqa: E402
import sample  # noqa: E402
import train_gpt  # noqa: E402

PARTS = "step large sample hellaswag transformers".split()
cuda = torch.cuda.is_available()
device = torch.device("cuda" if cuda else "cpu")


def seconds(function, *arguments, repeats=3):
    """Mean time of a call, after two that compile and allocate."""
    timer = Timer("function(*arguments)", globals=locals(), num_threads=torch.get_num_threads())
    return timer.timeit(repeats).mean


def show(name, per_second, unit, flops=0):
    """A line: so many units a second, and the MFU when one takes so many flops."""
    gpu, memory = torch.cuda.get_device_name() if cuda else "CPU", torch.cuda.max_memory_allocated() / 2**30
    peak = next((peak for part, peak in train_gpt.PEAK_TFLOPS.items() if part in gpu), None)
    mfu = f"   MFU {flops * per_second / peak / 1e12:.1%}" if flops and peak else ""
    print(f"{name:46}{per_second:12,.1f} {unit}/s   {memory:.1f} GiB{mfu}", flush=True)
    return per_second


def build(tiny, large=False, blocks=True):
    """train_gpt.py's model with random weights everywhere, and the FLOPs of a token, forward and backward."""
    L, H, C, T, V = (
        (2, 2, 64, 128, 500) if tiny else (52, 12, 1536, 1024, 50257) if large else (12, 6, 768, 1024, 50257)
    )
    config = dict(vocab_size=V, block_size=T, n_layer=L if blocks else 0, n_head=H, n_embd=C, tie_weights=large)
    model = train_gpt.GPT(config | dict(embed_norm=not large, logit_softcap=0 if large else 15), torch.bfloat16)
    for p in model.to(device).parameters():
        torch.nn.init.normal_(p, std=0.02)
    multiplied = sum(p.numel() for p in model.parameters()) - (0 if large else model.embed.numel())
    return model, 6 * multiplied + 12 * L * C * T


def weights_of(model):
    weights = {name: p.detach().bfloat16().flatten(0, -2) for name, p in model.named_parameters()}
    return weights | {"head": weights.get("head", weights["embed"])}


def measure_step(tiny, large):
    (model, flops), (ends, _) = build(tiny, large), build(tiny, large, blocks=False)  # ends: embedding, head and loss
    B, micro_steps = (2, 2) if tiny else (12, 40) if large else (32, 16)
    idx = torch.randint(model.config["vocab_size"], (B, model.config["block_size"]), device=device)
    moments = {p: [torch.zeros_like(p), torch.zeros_like(p)] for p in model.parameters()}
    matrices = [[getattr(block, name) for block in model.blocks] for name in ("qkv", "o", "up", "down")]

    def optimize():
        for params in matrices:
            train_gpt.muon_step(params, [moments[p][0] for p in params], 1e-6, 0.95, 0.05, torch.bfloat16)
        for p in [model.embed] + ([] if large else [model.head]):
            train_gpt.adamw_step(p, *moments[p], 1, 1e-6)

    compiled = [torch.compile(m, dynamic=False) for m in (model, ends)]
    micro, head = (seconds(lambda f: f(idx, idx).backward(), f, repeats=8) for f in compiled)
    optimizer = seconds(optimize)
    rate = micro_steps * idx.numel() / (micro_steps * micro + optimizer)
    show(f"train_gpt.py, {'1.5B' if large else '124M'}, {micro_steps} x {B} rows", rate, "tokens", flops)
    print(f"  ms: micro-batch {1000 * micro:.1f}, head and loss {1000 * head:.1f}; optimizer {1000 * optimizer:.1f}")


def measure_sample(tiny):
    model, rates, new = build(tiny)[0], [], 20 if tiny else 300

    def write(stories, compiled):
        settings = [[1, 2, 3]] * stories, range(stories), new, (0.8,), 1, stories, set(), compiled
        return list(sample.generate(model.config, weights_of(model), *settings))

    for compiled in (False, True):
        for stories in (1, 4) if tiny else (1, 16, 256):
            rate = stories * new / seconds(write, stories, compiled)
            rates.append(show(f"sample.py{' --compile' if compiled else ''}, {stories} at once", rate, "tokens"))
    return rates[0]


def measure_hellaswag(tiny):
    model, chance, n = build(tiny)[0], random.Random(0), 16 if tiny else 512
    lengths = [[chance.randint(10, 90), *(chance.randint(5, 35) for _ in range(4))] for _ in range(n)]
    questions = [([1] * context, [[2] * length for length in endings], None) for context, *endings in lengths]
    checkpoint = dict(config=model.config, model=weights_of(model))

    batches, window = [questions[i : i + 64] for i in range(0, n, 64)], model.config["block_size"]
    taken = seconds(lambda: [hellaswag.score(checkpoint, batch, window, device) for batch in batches])
    show("hellaswag.py", n / taken, "questions")


def measure_transformers(tiny):
    from transformers import NanoChatConfig, NanoChatForCausalLM

    (model, flops), new = build(tiny), 20 if tiny else 300
    V, T, L, H, C = list(model.config.values())[:5]
    sizes = dict(vocab_size=V, hidden_size=C, intermediate_size=4 * C, num_hidden_layers=L, num_attention_heads=H)
    theirs = NanoChatForCausalLM(NanoChatConfig(**sizes, max_position_embeddings=T, pad_token_id=None)).to(device)
    tokens, compiled = torch.randint(V, (2 if tiny else 32, T), device=device), torch.compile(theirs, dynamic=False)

    def forward_backward():
        with torch.autocast(device.type, torch.bfloat16):
            compiled(tokens, labels=tokens).loss.backward()

    def write(prompt):
        theirs.generate(prompt, do_sample=True, top_k=0, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)

    show("NanoChat compiled, forward and backward", tokens.numel() / seconds(forward_backward), "tokens", flops)
    theirs.to(torch.bfloat16).eval()
    for n in (16, 1):
        rate = n * new / seconds(write, tokens[:1, :3].expand(n, -1), repeats=1)
        show(f"transformers' generate, {n} at once", rate, "tokens")
    return rate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=PARTS, choices=PARTS, help="what to measure")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on a CPU too")
    flags = parser.parse_args()
    if not cuda and not flags.tiny:
        parser.error("needs a CUDA GPU; --tiny tries it on a CPU")
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, PyTorch {torch.__version__}")
    for part in sorted({"step", "large"} & set(flags.part), reverse=True):
        measure_step(flags.tiny, part == "large")
    if "hellaswag" in flags.part:
        measure_hellaswag(flags.tiny)
    ours = measure_sample(flags.tiny) if "sample" in flags.part else None
    theirs = measure_transformers(flags.tiny) if "transformers" in flags.part else None
    print(f"ratio: {ours / theirs:.2f}" if ours and theirs else "")


if __name__ == "__main__":
    main()
