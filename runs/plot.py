"""
Draw what runs have logged: losses, HellaSwag beside GPT-2 and GPT-3, margin and accuracy of preferences (DPO).

    pip install matplotlib
    python runs/plot.py out/gpt out/finetune --out out/curves
    python runs/plot.py a.jsonl b.jsonl --units character byte --labels "one run" another

Writes OUT.png and OUT.svg, with a panel for each quantity: a loss in nats a character, a byte or a token is not the
same, nor is one of a pair (DPO). The checkpoint beside a log tells which it is, or --units, where there is none.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests", "matplotlib"]
# ///

import argparse
import glob
import json
import os
import sys

import torch

COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"  # Okabe and Ito, 2002
GPT2_LOSS = {"GPT-2 124M\nof llm.c": 3.28}  # on FineWeb: the loss that speedruns are timed to
HELLASWAG = {"chance": 0.25, "GPT-2 124M": 0.2955, "GPT-2 1.5B": 0.4893}  # as train_gpt.py scores it
HELLASWAG |= {"GPT-3 125M\n(its paper)": 0.337, "GPT-3 1.3B\n(its paper)": 0.547}
LOGGED = [  # what is drawn thin, what is drawn bold, and the axis of both
    ("train_loss", "val_loss", "loss, nats a {unit}"),
    ("train_margin", "val_margin", "reward margin of the winner, nats"),
    ("train_accuracy", "val_accuracy", "share of pairs, winner ahead"),
    (None, "hellaswag_norm", "HellaSwag, acc_norm, {questions:,} questions"),
]


def get_flags():
    form, usage = argparse.RawDescriptionHelpFormatter, argparse.SUPPRESS  # a mistake gets one line
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, usage=usage)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="folders of runs, or their log.jsonl")
    add("--out", default="out/curves", help="the pictures: this and .png, this and .svg (default: out/curves)")
    add("--labels", nargs="+", help="names of the runs, in their order; not given: those of folders and files")
    add("--units", nargs="+", help="of what a loss is (character, byte, token), run by run; not given: see above")
    return parser.parse_args()


def fail(message, code=2):
    print(f"plot.py: {message}", file=sys.stderr)
    raise SystemExit(code)


def read_log(path):
    """The rows of a log, {step: {name: value}}: of a step that was logged twice, after a resume, the later counts."""
    rows = {}
    with open(path, encoding="utf-8") as f:
        for line in f:
            if line.endswith("\n"):  # a run that was killed leaves half a line
                row = json.loads(line)
                rows.setdefault(row["step"], {}).update(row)
    return dict(sorted(rows.items()))


def read_checkpoint(folder):
    """Of what the losses of a folder's run are, and whether they are of FineWeb; None when no checkpoint tells."""
    for path in glob.glob(os.path.join(glob.escape(folder), "*.pt")):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tokenizer, flags = checkpoint["tokenizer"], checkpoint.get("train", {}).get("flags", {})
        unit = "character" if "chars" in tokenizer else "byte" if tokenizer == "bytes" else "token"
        if "bpe" in tokenizer:
            unit = f"token of {len(tokenizer['bpe']):,} kinds"
        return unit, unit == "token" and "fineweb" in str(flags.get("val_files"))
    return None, False


def draw(ax, axis, curves, marks):
    """Draw curves [(run, thin points, bold points)], points being (step, value), and marks {name: value} of others."""
    ax.set_ylabel(axis, fontsize=9)
    ax.set_xlabel("steps", fontsize=9)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.spines[["top", "right"]].set_visible(False)
    for i, thin, bold in curves:
        colour = COLOURS[i % len(COLOURS)]
        ax.plot(*zip(*thin), color=colour, linewidth=0.7, alpha=0.45)
        ax.plot(*zip(*bold), color=colour, linewidth=1.8, marker="o" if len(bold) < 30 else "", markersize=3)
    for name, y in marks.items():
        ax.axhline(y, color="#777777", linewidth=0.9, linestyle="--")
        where = dict(xycoords=("axes fraction", "data"), textcoords="offset points", annotation_clip=False)
        ax.annotate(name, (1, y), (4, 0), va="center", fontsize=7, color="#555555", **where)
    # without the fall of training's first steps, which would press all else flat
    seen = [y for _, thin, _ in curves for step, y in thin if step >= thin[-1][0] / 20]
    seen += [y for _, _, bold in curves for _, y in bold] + list(marks.values())
    margin = 0.05 * (max(seen) - min(seen)) or 0.1
    ax.set_ylim(min(seen) - margin, max(seen) + margin)


def main():
    flags = get_flags()
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    for name, given in (("--labels", flags.labels), ("--units", flags.units)):
        if given and len(given) != len(flags.runs):
            fail(f"{name}: {len(given)} for {len(flags.runs)} runs")

    panels, fineweb = {}, False  # {axis: curves}
    for i, path in enumerate(flags.runs):
        path = os.path.join(path, "log.jsonl") if os.path.isdir(path) else path
        try:
            rows, (unit, on_fineweb) = read_log(path), read_checkpoint(os.path.dirname(path))
        except Exception as error:  # damaged files raise nearly everything
            fail(f"{path}: not a log, or a damaged one, or the checkpoint beside it is: {error!r:.200}")
        pairs = any("val_margin" in row for row in rows.values())
        unit = "pair" if pairs else flags.units[i] if flags.units else unit
        if not unit:
            fail(f"{path}: no checkpoint beside it says of what its losses are; give --units")
        fineweb = fineweb or on_fineweb
        questions = max([row.get("questions", 0) for row in rows.values()], default=0)
        for thin, bold, axis in LOGGED:
            points = [[(s, row[name]) for s, row in rows.items() if row.get(name) is not None] for name in (thin, bold)]
            if any(points):
                panels.setdefault(axis.format(unit=unit, questions=questions), []).append((i, *points))
    if not panels:
        fail(f"{', '.join(flags.runs)}: nothing to draw is logged there")

    columns = min(2, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 0.6 + 3 * height), dpi=150, layout="constrained")
    for k, (axis, curves) in enumerate(panels.items(), 1):
        marks = HELLASWAG if axis.startswith("HellaSwag") else GPT2_LOSS if fineweb and axis.endswith("token") else {}
        draw(figure.add_subplot(height, columns, k), axis, curves, marks)
    lines = [Line2D([], [], color=COLOURS[i % len(COLOURS)]) for i in range(len(flags.runs))]
    about = "thin: training, bold: held out"
    figure.legend(lines, flags.labels or flags.runs, loc="outside upper left", ncols=3, frameon=False, title=about)
    os.makedirs(os.path.dirname(flags.out) or ".", exist_ok=True)
    for kind in ("png", "svg"):
        figure.savefig(f"{flags.out}.{kind}")
    print(f"{flags.out}.png, {flags.out}.svg: {', '.join(panels)}")


if __name__ == "__main__":
    try:
        main()
    except ImportError:
        fail("needs matplotlib: pip install matplotlib")
    except OSError as error:
        fail(f"{error.filename or 'the work stopped'}: {error.strerror or error}", 2 if error.filename else 1)
