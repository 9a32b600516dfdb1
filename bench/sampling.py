"""
How fast are stories written? Tokens per second beside transformers' `generate`, on this machine's CPU.

    pip install transformers
    python bench/sampling.py                   (about 3 minutes on 2 cores)

Both sides write with the same weights: sample.py's model at GPT-2's 124M, random everywhere, and what runs/export_hf.py
makes of it for transformers, in bf16 (or --dtype float32), each with its cache of keys and values, sampling at
temperature 0.8 after a prompt of 10 tokens. sample.py does so as it is, and for one story with --compile. They take
turns, three times, after a turn that is not counted; a rate is the median of a side's turns, without the reading of the
prompt. Then, for sample.py alone: the milliseconds for a token with 10 and with 1,000 tokens of context, the time to
the first token without --compile, and how near it comes to the machine's limit: every weight that multiplies must be
read once for a token, at the bandwidth of the maximum of 800 MB, taken in every turn. The last line is `ratio: X`:
the tokens/s of sample.py --compile over those of transformers for one story.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


def write_checkpoint(script, path, block_size):
    """A 124M checkpoint with random weights: the rows of the head that are padding too."""
    import torch

    torch.manual_seed(0)
    config = script.Config(50257, block_size, 12, 12, 768)
    model = script.GPT(config)
    with torch.no_grad():
        model.head.normal_(std=0.02)
        for block in model.blocks:
            block.o.normal_(std=0.02 / 24**0.5)
            block.down.normal_(std=0.02 / 24**0.5)
    checkpoint = dict(format=1, config=vars(config), tokenizer="gpt2", model=model.state_dict())
    torch.save(checkpoint, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="of a story, in a turn")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of both sides")
    flags = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    import sample as script

    dtype, cpu, folder = getattr(torch, flags.dtype), torch.device("cpu"), tempfile.TemporaryDirectory()
    path, theirs = os.path.join(folder.name, "random.pt"), os.path.join(folder.name, "hf")
    write_checkpoint(script, path, block_size=2048)
    subprocess.run([sys.executable, os.path.join(ROOT, "runs", "export_hf.py"), path, theirs], check=True)
    hf = AutoModelForCausalLM.from_pretrained(theirs, dtype=dtype).eval()
    start = time.perf_counter()
    model = script.load_model(path, script.load_checkpoint(path), cpu, dtype, weights=dtype).pack()
    load = time.perf_counter() - start
    compiled = script.load_model(path, script.load_checkpoint(path), cpu, dtype, weights=dtype)
    compiled.compile_decoding()
    multiplied = sum(p.numel() for p in [compiled.head, *compiled.blocks.parameters()])
    prompt = torch.randint(50257, (1000,), generator=torch.Generator().manual_seed(1)).tolist()

    def ours(stories, context, tokens=flags.tokens, model=model):
        """(seconds to the first token, seconds from there to the last)"""
        start, times = time.perf_counter(), []
        for _ in script.generate(model, [prompt[:context]] * stories, tokens, temperature=0.8, seed=1):
            times.append(time.perf_counter() - start)
        return times[0], times[-1] - times[0]

    def ours_compiled(stories, context, tokens=flags.tokens):
        return ours(stories, context, tokens, compiled)

    class Clock:  # as a streamer is called: with the prompt, then with every token
        def __init__(self):
            self.times = []

        def put(self, _):
            self.times.append(time.perf_counter())

        def end(self):
            pass

    def transformers(stories, context):
        clock = Clock()
        settings = dict(do_sample=True, temperature=0.8, top_k=0, max_new_tokens=flags.tokens)
        config = GenerationConfig(**settings, pad_token_id=50256, use_cache=True)
        start = time.perf_counter()
        idx = torch.tensor([prompt[:context]] * stories)
        one = {"streamer": clock} if stories == 1 else {}  # streamers take one story
        out = hf.generate(idx, attention_mask=torch.ones_like(idx), generation_config=config, **one)
        assert out.shape == (stories, context + flags.tokens)
        if stories == 1:
            return clock.times[1] - start, clock.times[-1] - clock.times[1]
        whole = time.perf_counter() - start
        return 0.0, whole * (flags.tokens - 1) / flags.tokens  # its prompt is as short as a step

    first = ours(1, 10)[0]  # before all else ran: what a user waits for
    big = torch.ones(200_000_000)
    rates, bandwidth, contexts = (
        {},
        [],
        {(side, context): [] for side in (ours, ours_compiled) for context in (10, 1000)},
    )
    for turn in range(4):
        for side, stories in ((transformers, 1), (ours, 1), (ours_compiled, 1), (transformers, 16), (ours, 16)):
            seconds = side(stories, 10)[1]
            rates.setdefault((side.__name__, stories), []).append(stories * (flags.tokens - 1) / seconds)
        for (side, context), times in contexts.items():
            times.append(1000 * side(1, context, 25)[1] / 24)
        start = time.perf_counter()
        big.amax()
        bandwidth.append(big.numel() * 4 / (time.perf_counter() - start) / 1e9)
        print(f"turn {turn} of 3", file=sys.stderr)
    rates = {key: statistics.median(found[1:]) for key, found in rates.items()}
    contexts = {(side.__name__, context): statistics.median(times[1:]) for (side, context), times in contexts.items()}
    bandwidth = statistics.median(bandwidth)
    limit = bandwidth * 1e9 / (multiplied * dtype.itemsize)
    print(f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}, {flags.dtype}\n")
    print(f"{'tokens/s':25}one story   16 at once   ms a token: context 10   1,000   times")
    for name, side in (
        ("transformers' generate", "transformers"),
        ("sample.py", "ours"),
        ("--compile", "ours_compiled"),
    ):
        many = f"{rates[side, 16]:13.1f}" if (side, 16) in rates else " " * 13
        short, long = contexts.get((side, 10)), contexts.get((side, 1000))
        print(
            f"{name:25}{rates[side, 1]:9.1f}{many}" + (f"{short:26.1f}{long:8.1f}{long / short:8.2f}" if short else "")
        )
    gains = [rates[side, n] / rates["transformers", n] for side, n in (("ours", 1), ("ours", 16), ("ours_compiled", 1))]
    print(f"\nloaded in {load:.2f} s; first token {first:.3f} s later")
    print(f"{bandwidth:.1f} GB/s read the weights {limit:.1f} times a second, one story reaches ", end="")
    print(f"{rates['ours', 1] / limit:.0%}, with --compile {rates['ours_compiled', 1] / limit:.0%}")
    print(f"times as fast: one story {gains[0]:.2f}, with --compile {gains[2]:.2f}; 16 at once {gains[1]:.2f}")
    print(f"ratio: {gains[2]:.2f}")


if __name__ == "__main__":
    main()
