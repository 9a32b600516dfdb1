"""
Is each stage of runs/demo.sh better than the one before it? The same measures for the models of all stages.

    bash runs/demo.sh && python bench/stages.py      (half a minute on 2 cores)

Nats a byte: the loss of frightening stories that no stage has learned from. Each model then writes 200 stories to
openings that are held out, too. Consistent: no third name, second relative or second thing of the grammar's lists is
in a story. Frightening: it ends so by the lists of data/stories.py, which the judge does not see. Preferred: how often
the offline judge takes the story of this stage for scarier than one to the same opening by its parent, the stage that
it began with. Unknown: words that the training text does not have. Copied: the largest share of a story's runs of 8
words that stand together in one training story. In brackets are 95% intervals: Wilson's (1927) of a share, Newcombe's
(1998, method 10) of the difference to the parent, in points. `ratio: X` is the loss after pretraining over that after
fine-tuning.
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
import rank
import train_char
from data import stories as grammar

STAGES = "bigram char gpt tuned best dpo".split()
PARENT = dict(tuned="gpt", best="tuned", dpo="tuned")  # what a stage began with
KINDS = "pocket broken gift goods picture".split()  # the grammar's lists of things


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


def share(hits, z=1.96):
    """The share of True, and Wilson's interval of it."""
    n, p = len(hits), sum(hits) / len(hits)
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return p, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def difference(after, before):
    """How much larger the first share is than the second, in points, with Newcombe's interval."""
    (p, low, high), (q, q_low, q_high) = share(after), share(before)
    less, more = ((p - low) ** 2 + (q_high - q) ** 2) ** 0.5, ((high - p) ** 2 + (q - q_low) ** 2) ** 0.5
    return f"{100 * (p - q):+.0f} ({100 * (p - q - less):+.0f} to {100 * (p - q + more):+.0f})"


def with_interval(hits):
    return "{:.0%} ({:.0%} to {:.0%})".format(*share(hits))


def is_consistent(story):
    """Are there no more people, relatives and things of the grammar's lists than a story of the grammar has?"""
    words, lists = set(re.findall(r"\w+", story)), grammar.WORDS
    things = {thing.split(" from ")[0].split()[-1] for kind in KINDS for thing in lists[kind]}
    people, relatives = set(lists["girl"] + lists["boy"]), set(lists["woman"] + lists["man"])
    return len(words & people) <= 2 and len(words & relatives) <= 1 and len(words & things) <= 1


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
    judge = argparse.Namespace(scary=f"{folder}/tuned", plain=f"{folder}/gpt", device="cpu", dtype="float32")
    judge.repetition_penalty = 1.0
    models, tokenizer = rank.load_judges(judge)

    head = "stage, nats a byte, consistent, frightening, than its parent, preferred, unknown, copied: most, median"
    table, losses, measured = [tuple(head.split(", "))], {}, {}
    for stage in [*STAGES, "grammar"]:
        told = [dict(text=text, prompt="") for text in held_out]
        if stage != "grammar":
            losses[stage] = nats_a_byte(f"{folder}/{stage}", held_out)
            if stage in ("bigram", "char"):
                table.append((stage, losses[stage], *[""] * 7))
                continue
            path = f"{folder}/{stage}_200.jsonl"
            run("sample.py", f"{folder}/{stage}", "--prompt_file", f"{folder}/openings.txt", "--num", 2, "--out", path)
            told = sorted(read_rows(path), key=lambda story: story["id"])[:200]
        texts = [story["text"] for story in told]
        shares, words = [], [word for text in texts for word in re.findall(r"[\w'’]+", text.lower())]
        for text in texts:
            found = collections.Counter()
            mine = runs_of(text)
            for run_ in mine:
                first, last = np.searchsorted(runs, run_), np.searchsorted(runs, run_, "right")
                found.update(set(owners[first:last].tolist()))
            shares.append(max(found.values(), default=0) / max(1, len(mine)))
        frightening = [grammar.is_frightening(text) for text in texts]
        scores = [rank.score(judge, models, tokenizer, [story])[0][0] for story in told]
        measured[stage] = frightening, scores
        compared = ["", ""]
        if stage in PARENT:
            frightening_before, scores_before = measured[PARENT[stage]]
            preferred = [after > before for after, before in zip(scores, scores_before)]
            compared = difference(frightening, frightening_before), with_interval(preferred)
        unknown = f"{sum(word not in known for word in words) / len(words):.2%}"
        consistent = f"{sum(map(is_consistent, texts)) / len(texts):.0%}"
        cells = consistent, with_interval(frightening), *compared, unknown
        table.append((stage, losses.get(stage, ""), *cells, f"{max(shares):.0%}", f"{np.median(shares):.0%}"))
    show(*table)
    after, before = measured["dpo"], measured["best"]
    preferred = with_interval([a > b for a, b in zip(after[1], before[1])])
    print(f"dpo beside best: frightening {difference(after[0], before[0])} points, preferred {preferred}")
    print(f"ratio: {losses['gpt'] / losses['tuned']:.2f}")


if __name__ == "__main__":
    main()
