"""
The same opening line, continued by every stage: what runs wrote while they trained, one story under the other.

    python runs/timeline.py out/char out/gpt out/finetune --out out/timeline.md
    python runs/timeline.py "pretraining=out/gpt" "after the horror=out/finetune" --prompt "Once upon a time"

Of the stories that begin with --prompt those of milestones and of the last step are shown, or --all, each with the last
validation loss before it, in nats a character, byte, token or pair, as the run's checkpoint tells. Writes Markdown.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import json
import os
import re
import sys

import torch


def get_flags():
    form, usage = argparse.RawDescriptionHelpFormatter, argparse.SUPPRESS  # a mistake gets one line
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, usage=usage)
    add, prompt = parser.add_argument, "It was a dark and stormy night"
    add("runs", nargs="+", metavar="[NAME=]FOLDER", help="folders of runs, in the order of the stages")
    add("--prompt", default=prompt, help=f"the opening; other stories are passed over (default: {prompt})")
    add("--all", action="store_true", help="also stories between the milestones")
    add("--out", default="out/timeline.md", help="what to write (default: out/timeline.md)")
    return parser.parse_args()


def fail(message, code=2):
    print(f"timeline.py: {message}", file=sys.stderr)
    raise SystemExit(code)


def read(path):
    """The objects of a .jsonl, without the half line that a run leaves when it is killed."""
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def unit_of(folder):
    """Of what the losses of a folder's run are, as its checkpoint tells."""
    path = os.path.join(folder, "ckpt.pt")
    tokenizer = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["tokenizer"]
    return "character" if "chars" in tokenizer else "byte" if tokenizer == "bytes" else "token"


def stage(folder, prompt, everything):
    """The stories of a run in Markdown, each below what the log says of its step."""
    validated = {row["step"]: row for row in read(os.path.join(folder, "log.jsonl")) if "val_loss" in row}
    told, stories, unit = {}, [], unit_of(folder)
    for row in read(os.path.join(folder, "stories.jsonl")):
        if row["prompt"] == prompt:  # of a step that was repeated, after a resume, the later one
            told[row.get("step", max(validated, default=0))] = row["text"]
    for step, text in sorted(told.items()):
        milestone = os.path.exists(os.path.join(folder, f"milestone_{step:06d}.pt"))
        if not (everything or milestone or step == max(told)):
            continue
        about, last = f"step {step}", max((s for s in validated if s <= step), default=None)
        if last is not None:
            loss, accuracy = validated[last]["val_loss"], validated[last].get("val_accuracy")
            about += f", validation loss {loss:.4f} nats a {unit if accuracy is None else 'pair'}"
            about += f" at step {last}" if last < step else ""
            about += f", the winner ahead in {accuracy:.0%} of the held-out pairs" if accuracy is not None else ""
        whole = re.match(r'[\s\S]*[.!?]"?|[\s\S]*', text[len(prompt) :])[0]  # to the end of its last sentence
        continued = whole.strip("\n").replace("\n", "\n> ")
        stories.append(f"{about}\n\n> **{prompt}**{continued}\n")
    return stories


def main():
    flags = get_flags()
    parts = [f"# {flags.prompt} ...\n"]
    for run in flags.runs:
        name, _, folder = run.rpartition("=")
        try:
            stories = stage(folder, flags.prompt, flags.all)
        except (KeyError, TypeError, ValueError, AttributeError):
            fail(f"{folder}: log.jsonl or stories.jsonl is not as the training scripts write it")
        if not stories:
            fail(f"{folder}: no story there has the prompt {flags.prompt!r}")
        parts += [f"## {name or os.path.basename(os.path.normpath(folder))}\n", *stories]
    os.makedirs(os.path.dirname(flags.out) or ".", exist_ok=True)
    with open(flags.out, "w", encoding="utf-8") as f:
        f.write("\n".join(parts))
    print(f"{flags.out}: {len(parts) - 1 - len(flags.runs)} stories")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail(f"{error.filename or 'the work stopped'}: {error.strerror or error}", 2 if error.filename else 1)
