"""
Is each stage of runs/demo.sh better than the one before it? The same measures for the models of all stages.

    bash runs/demo.sh && python bench/stages.py      (half a minute on 2 cores)

Nats a byte: the loss of frightening stories that no stage has learned from. From the same openings each model then
writes 200 stories; of them are told the share that ends frighteningly by the lists of data/stories.py, with its 95%
interval (Wilson), the share of words that the training text does not have, and how much of a story stands in one
training story: the largest share of its runs of 8 words. The last row is that of 200 held-out stories of the grammar.
`ratio: X` is the loss after pretraining over that after fine-tuning.
"""

import argparse
import collections
import os
import re

import numpy as np
import torch
import torch.nn.functional as F
from common import ROOT, read_rows, run, show

import finetune
import train_char
from data import stories as grammar

STAGES = "bigram char gpt tuned best dpo".split()


def read_stories(path):
    with open(path, encoding="utf-8") as f:
        return f.read().removesuffix("\n").split("\n<|endoftext|>\n")


@torch.no_grad()
def nats_a_byte(folder, stories):
    """The mean loss of the stories' bytes by the checkpoint in a folder, each story read in windows of its context."""
    path, total = os.path.join(folder, "ckpt.pt"), 0.0
    spec = torch.load(path, weights_only=True)["tokenizer"]
    if "chars" in spec:
        model, chars, _ = train_char.load(path, 0.0, torch.float32)
        number = {c: i for i, c in enumerate(chars)}
        T, rows = model.eval().config["block_size"], [[number[c] for c in f"\n{story}"] for story in stories]
    else:
        _, _, model, tokenizer = finetune.open_checkpoint(path)
        rows = [[tokenizer.eot_token, *tokenizer.encode_ordinary(story)] for story in stories]
        T = model.config["block_size"]
    for row in rows:
        for i in range(0, len(row) - 1, T):
            x, y = torch.tensor([row[i : i + T]]), torch.tensor(row[i + 1 : i + T + 1])
            total += F.cross_entropy(model(x)[0, : len(y)], y, reduction="sum").item()
    return total / sum(len(story.encode()) for story in stories)


def interval(p, n, z=1.96):
    """Wilson's interval (1927) of a share p of n."""
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def runs_of(story):
    words = re.findall(r"[\w'’]+", story.lower())
    return [hash(tuple(words[i : i + 8])) for i in range(len(words) - 7)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", default=os.path.join(ROOT, "out/demo"), help="what runs/demo.sh has written")
    folder = parser.parse_args().demo
    held_out = read_stories(f"{folder}/held_out.txt")[:200]
    learned = read_stories(f"{folder}/plain.txt") + read_stories(f"{folder}/scary.txt")
    known = {word for story in learned for word in re.findall(r"[\w'’]+", story.lower())}
    parts = [runs_of(story) for story in learned]
    runs, owners = np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.argsort(runs)
    runs, owners = runs[order], owners[order]

    table = [("stage", "nats a byte", "frightening", "95% interval", "unknown words", "copied: most", "median")]
    losses = {}
    for stage in [*STAGES, "grammar"]:
        texts, name = held_out, stage
        if stage != "grammar":
            losses[stage] = nats_a_byte(f"{folder}/{stage}", held_out)
            if stage in ("bigram", "char"):
                table.append((stage, losses[stage], "", "", "", "", ""))
                continue
            path = f"{folder}/{stage}_200.jsonl"
            run("sample.py", f"{folder}/{stage}", "--prompt_file", f"{folder}/openings.txt", "--num", 2, "--out", path)
            texts = [story["text"] for story in read_rows(path)][:200]
        shares, words = [], [word for text in texts for word in re.findall(r"[\w'’]+", text.lower())]
        for text in texts:
            found = collections.Counter()
            mine = runs_of(text)
            for run_ in mine:
                first, last = np.searchsorted(runs, run_), np.searchsorted(runs, run_, "right")
                found.update(set(owners[first:last].tolist()))
            shares.append(max(found.values(), default=0) / max(1, len(mine)))
        p = sum(map(grammar.is_frightening, texts)) / len(texts)
        low, high = interval(p, len(texts))
        unknown = sum(word not in known for word in words) / len(words)
        cells = f"{p:.0%}", f"{low:.0%} to {high:.0%}", f"{unknown:.2%}"
        table.append((name, losses.get(stage, ""), *cells, f"{max(shares):.0%}", f"{np.median(shares):.0%}"))
    show(*table)
    print(f"ratio: {losses['gpt'] / losses['tuned']:.2f}")


if __name__ == "__main__":
    main()
