"""
The same opening line, continued by every stage: what the runs wrote while they trained, one story under the other.

    python runs/timeline.py out/char out/gpt out/finetune --out timeline.md
    python runs/timeline.py "pretraining=out/gpt" "after the horror=out/finetune" --prompt "Once upon a time"

Each argument is the folder of a run of train_char.py, train_gpt.py or finetune.py, with a name for it, if you like. Of
its stories.jsonl those are shown that begin with --prompt and that milestones wrote or the last model (--all: all of
them), each with the validation loss that its log.jsonl has for that step or, failing that, the last one before it.
Writes --out, Markdown.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import contextlib
import json
import os
import sys


def get_flags():
    flags = Flags()
    add = flags.add_argument
    add("runs", nargs="+", metavar="[NAME=]FOLDER", help="folders of runs, in the order of the stages")
    add("--prompt", default="It was a dark and stormy night", help="the opening; other stories are passed over")
    add("--all", action="store_true", help="also stories between the milestones")
    add("--out", default="timeline.md", help="what to write")
    return flags.parse_args()


# --- command line: the same in every script (tests/test_copies.py) ---


def fail(message, code=2):
    """End with one line on stderr: code 2 for what the user can put right, 1 when the work itself failed."""
    if code != 2 or int(os.environ.get("LOCAL_RANK", 0)) == 0:  # under torchrun all ranks see the same mistake
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    raise SystemExit(code)


class Flags(argparse.ArgumentParser):
    """Flat flags: --help shows the script's docstring and every default, a mistake gets one line."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default is None else super()._get_help_string(action)

    def __init__(self):
        super().__init__(description=sys.modules["__main__"].__doc__, formatter_class=self.Help, allow_abbrev=False)

    def error(self, message):
        fail(message)


def number(kind, low, high=float("inf")):
    """The type of a flag that takes an int or a float from low to high."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            bounds = f"of {low} or more" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number {bounds}")
        return value

    return parse


def run(main):
    """Call main(); Ctrl-C, a full disk, and a reader of the output that has left (`| head`) leave no traceback."""
    code, said = 0, None
    try:
        try:
            main()
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code, said = 130, "interrupted"
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what stdout still holds would fail again
        code, said = 1, f"{error.filename or 'the work stopped'}: {error.strerror or error}"
        if isinstance(error, BrokenPipeError):
            code, said = 141, None
    if said:
        print(f"{os.path.basename(sys.argv[0])}: {said}", file=sys.stderr)
    if "WORLD_SIZE" in os.environ:  # gloo's threads may abort Python's own shutdown (PyTorch issue 190489)
        os._exit(code)
    raise SystemExit(code)


# --- end of command line ---


def read(path):
    """The objects of a .jsonl; a last line that was cut short, by a run that was killed, is passed over."""
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: {getattr(error, 'strerror', None) or 'is not UTF-8'}")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            if number < len(lines):
                fail(f"{path}:{number}: is not a JSON object")
    return rows


def stages(folder, prompt, everything):
    """[(what the log says of a step, story)] of a run: of a step that was repeated, after a resume, the later."""
    validated, told = {}, {}
    for row in read(os.path.join(folder, "log.jsonl")):
        if "val_loss" in row:
            validated[row["step"]] = row
    for row in read(os.path.join(folder, "stories.jsonl")):
        if row.get("text", "").startswith(prompt) and row.get("prompt") == prompt:
            told[row.get("step", max(validated, default=0))] = row["text"]
    found = []
    for step, text in sorted(told.items()):
        milestone = os.path.exists(os.path.join(folder, f"milestone_{step:06d}.pt"))
        if not (everything or milestone or step == max(told)):
            continue
        about = validated.get(max((s for s in validated if s <= step), default=None), {})
        words = [f"step {step}"]
        if about:
            earlier = f" at step {about['step']}" if about["step"] < step else ""
            words.append(f"validation loss {about['val_loss']:.4f}{earlier}")
        words += [f"accuracy on held-out pairs {about['val_accuracy']:.0%}"] if "val_accuracy" in about else []
        found.append((", ".join(words), text))
    return found


def main():
    flags = get_flags()
    parts = [f"# {flags.prompt} ...\n"]
    for run in flags.runs:
        name, _, folder = run.rpartition("=")
        try:
            found = stages(folder, flags.prompt, flags.all)
        except (KeyError, TypeError, ValueError, AttributeError):
            fail(f"{folder}: log.jsonl or stories.jsonl is not as the training scripts write it")
        if not found:
            fail(f"{folder}: no story there begins with {flags.prompt!r}")
        parts.append(f"## {name or os.path.basename(os.path.normpath(folder))}\n")
        for about, text in found:
            continued = text[len(flags.prompt) :].strip("\n")
            quoted = "\n".join(f"> {line}".rstrip() for line in f"**{flags.prompt}**{continued}".split("\n"))
            parts.append(f"{about}\n\n{quoted}\n")
    try:
        with open(flags.out + ".tmp", "w", encoding="utf-8") as f:
            f.write("\n".join(parts))
        os.replace(flags.out + ".tmp", flags.out)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(flags.out + ".tmp")
        fail(f"{flags.out}: {error.strerror}")
    print(f"{flags.out}: {sum('> **' in part for part in parts)} stories")


if __name__ == "__main__":
    run(main)
