"""
How fast are stories written? Tokens per second beside transformers' `generate`, on this machine's CPU.

    pip install transformers
    python bench/sampling.py                   (about 2 minutes on 2 cores)

Both sides write with the same weights: sample.py's model at GPT-2's 124M, random everywhere, and what runs/export_hf.py
makes of it for transformers, in bf16 (or --dtype float32), each with its cache of keys and values, sampling at
temperature 0.8 after a prompt of 10 tokens. They take turns, three times, after a turn that is not counted; a rate is
the median of a side's turns, without the reading of the prompt. Then, for sample.py alone: the milliseconds for a token
with 10 and with 1,000 tokens of context, the time to the first token, and how near it comes to the machine's limit:
every weight that multiplies must be read once for a token, at the bandwidth of the maximum of 800 MB, taken in every
turn. The last line is `ratio: X`: the tokens/s of sample.py over those of transformers for one story.
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


def write_checkpoint(path, block_size):
    """A 124M checkpoint with random weights."""
    import torch

    torch.manual_seed(0)
    config = dict(vocab_size=50257, block_size=block_size, n_layer=12, n_head=12, n_embd=768)
    model = {"embed": torch.randn(50304, 768), "head": torch.randn(50304, 768) * 0.02}
    for i in range(12):
        model[f"blocks.{i}.qkv"] = torch.randn(3, 768, 768) * 768**-0.5
        model[f"blocks.{i}.o"] = torch.randn(768, 768) * 0.004
        model[f"blocks.{i}.up"] = torch.randn(3072, 768) * 768**-0.5
        model[f"blocks.{i}.down"] = torch.randn(768, 3072) * 0.004
    torch.save(dict(format=1, config=config, tokenizer="gpt2", model=model), path)


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
    write_checkpoint(path, block_size=2048)
    subprocess.run([sys.executable, os.path.join(ROOT, "runs", "export_hf.py"), path, theirs], check=True)
    hf = AutoModelForCausalLM.from_pretrained(theirs, dtype=dtype).eval()
    start = time.perf_counter()
    model = script.load(path, cpu, dtype)[1:3]
    load = time.perf_counter() - start
    multiplied = sum(weight.numel() for name, weight in model[1].items() if name != "embed")
    prompt = torch.randint(50257, (1000,), generator=torch.Generator().manual_seed(1)).tolist()

    def ours(stories, context, tokens=flags.tokens):
        """(seconds to the first token, seconds from there to the last)"""
        start, times = time.perf_counter(), []
        settings = tokens, (0.8,), 1, stories, set()  # new tokens, temperature, seed, stories at once, those that ended
        for _ in script.generate(*model, [prompt[:context]] * stories, range(stories), *settings):  # a step
            times.append(time.perf_counter() - start)
        return times[0], times[-1] - times[0]

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
    rates, bandwidth, contexts = {}, [], {10: [], 1000: []}
    for turn in range(4):
        for side, stories in ((transformers, 1), (ours, 1), (transformers, 16), (ours, 16)):
            seconds = side(stories, 10)[1]
            rates.setdefault((side.__name__, stories), []).append(stories * (flags.tokens - 1) / seconds)
        for context, times in contexts.items():
            times.append(1000 * ours(1, context, 25)[1] / 24)
        start = time.perf_counter()
        big.amax()
        bandwidth.append(big.numel() * 4 / (time.perf_counter() - start) / 1e9)
        print(f"turn {turn} of 3", file=sys.stderr)
    rates = {key: statistics.median(found[1:]) for key, found in rates.items()}
    short, long = [statistics.median(times[1:]) for times in contexts.values()]
    bandwidth = statistics.median(bandwidth)
    limit = bandwidth * 1e9 / (multiplied * dtype.itemsize)
    one, many = [rates["ours", n] / rates["transformers", n] for n in (1, 16)]
    print(f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}, {flags.dtype}\n")
    print(f"{'tokens/s':25}one story   16 at once   ms a token: context 10   1,000   times")
    print(f"{'transformers generate':25}{rates['transformers', 1]:9.1f}{rates['transformers', 16]:13.1f}")
    print(
        f"{'sample.py':25}{rates['ours', 1]:9.1f}{rates['ours', 16]:13.1f}{short:26.1f}{long:8.1f}{long / short:8.2f}"
    )
    print(f"\nloaded in {load:.2f} s; first token {first:.3f} s later")
    print(f"{bandwidth:.1f} GB/s read the weights {limit:.1f} times a second, one story reaches ", end="")
    print(f"{rates['ours', 1] / limit:.0%}")
    print(f"times as fast: one story {one:.2f}; 16 at once {many:.2f}")
    print(f"ratio: {one:.2f}")


if __name__ == "__main__":
    main()
