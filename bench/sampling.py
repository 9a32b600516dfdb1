"""
How fast are stories written? Tokens per second beside transformers' `generate`, on this machine's CPU.

    python bench/sampling.py                   (about 2 minutes on 2 cores)

Both sides write with the same random weights of GPT-2's 124M, with a cache of keys and values, at temperature 0.8,
after 10 tokens. They take turns, three times, after one that is not counted; a rate is the median, without the reading
of the prompt. `ratio: X` is the tokens/s of sample.py over those of transformers for one story.
"""

import argparse
import os
import statistics
import tempfile
import time

import torch
from common import as_transformers, show, write_random

import sample

TOKENS = 64  # of a story, in a turn


def ours(model, prompts, new=TOKENS):
    """Seconds a step of sample.py, from the first token on."""
    times = []
    settings = new, (0.8,), 1, len(prompts), set()  # new tokens, temperature, seed, stories at once, those that ended
    for _ in sample.generate(*model, prompts, range(len(prompts)), *settings):  # a step
        times.append(time.perf_counter())
    return (times[-1] - times[0]) / (new - 1)


def theirs(model, prompts):
    """The same of transformers' generate: the time of a whole story, less that to the first token."""
    from transformers import GenerationConfig

    idx, times = torch.tensor(prompts), []
    for new in (1, TOKENS):
        config = GenerationConfig(do_sample=True, temperature=0.8, top_k=0, pad_token_id=50256, max_new_tokens=new)
        start = time.perf_counter()
        model.generate(idx, attention_mask=torch.ones_like(idx), generation_config=config)
        times.append(time.perf_counter() - start)
    return (times[1] - times[0]) / (TOKENS - 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of both sides")
    flags = parser.parse_args()
    dtype = getattr(torch, flags.dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "random.pt")
        write_random(path, 12, 2048)
        hf = as_transformers(path, dtype)
        _, *model, _ = sample.load(path, torch.device("cpu"), dtype)
    prompt = torch.randint(50257, (1000,), generator=torch.Generator().manual_seed(1)).tolist()
    turns = []
    for _ in range(4):
        rates = []
        for prompts in ([prompt[:10]], [prompt[:10]] * 16):
            rates += [theirs(hf, prompts), ours(model, prompts)]
        turns.append((*rates, *(ours(model, [prompt[:context]], 25) for context in (10, 1000))))
    theirs_1, ours_1, theirs_16, ours_16, short, long = map(statistics.median, zip(*turns[1:]))
    show(
        (f"tokens/s, {flags.dtype}", "one story", "16 at once", "ms a token: context 10", "context 1,000"),
        ("transformers", 1 / theirs_1, 16 / theirs_16, "", ""),
        ("sample.py", 1 / ours_1, 16 / ours_16, 1000 * short, 1000 * long),
    )
    print(f"times as fast with 16 at once: {theirs_16 / ours_16:.2f}")
    print(f"ratio: {theirs_1 / ours_1:.2f}")


if __name__ == "__main__":
    main()
