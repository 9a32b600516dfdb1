"""
Draw what runs have logged: losses, fine-tuning, preferences (DPO), HellaSwag beside GPT-2 and GPT-3.

    python runs/plot.py out/gpt out/finetune --out out/curves                      needs `pip install matplotlib`
    python runs/plot.py out/a out/b --labels "rate 0.02" "rate 0.04" --x tokens    two runs in one picture
    python runs/plot.py out/gpt out/hellaswag.jsonl                                with the answers of hellaswag.py

It takes folders of train_char.py, train_gpt.py and finetune.py, their log.jsonl, and the --details of hellaswag.py, and
writes the same picture as OUT.png and OUT.svg: a panel for each kind of quantity that is there. Thin lines are of
training, bold ones of what is held out. Of a step that was logged twice, as by a run that was killed and resumed, the
later row counts. A character is a token of train_char.py.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests", "matplotlib"]
# ///

import argparse
import contextlib
import glob
import io
import itertools
import json
import math
import os
import re
import sys
import warnings

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
except ImportError:
    matplotlib = None  # main() says so

COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"  # Okabe and Ito, 2002
STROKES = "-", (0, (5, 1.5)), (0, (1, 1))  # when there are more runs than colours
LOOK = {
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelsize": 8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.unicode_minus": False,
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "svg.hashsalt": "runs/plot.py",  # the same file from the same logs
    "text.parse_math": False,  # a folder may be called $x$
}
GPT2_LOSS = 3.28, "3.28: GPT-2 124M\nof llm.c on FineWeb"  # the loss that speedruns are timed to
HELLASWAG = {  # acc_norm, as hellaswag.py has it
    "completion": {
        "GPT-2 124M": 0.2955,
        "GPT-2 1.5B": 0.4893,
        "GPT-3 125M (its paper)": 0.337,
        "GPT-3 1.3B (its paper)": 0.547,
    },
    "harness": {"GPT-2 124M": 0.3114, "GPT-2 1.5B": 0.5089},
}
LOSS = "loss, nats a token"
PANELS = [  # kind of run, quantity, title, axis
    ("pretraining", "loss", "Training", LOSS),
    ("fine-tuning", "loss", "Fine-tuning", LOSS),
    ("preferences", "loss", "Preferences (DPO): loss", "DPO loss, nats a pair"),
    ("preferences", "margin", "Preferences: reward margin", "winner's reward - loser's, nats"),
    ("preferences", "accuracy", "Preferences: accuracy", "share of pairs, winner ahead"),
]
LOGGED = [f"{part}_{name}" for name in ("loss", "margin", "accuracy") for part in ("train", "val")]
LOGGED += ["hellaswag_norm", "questions", "train_time_ms"]
STEP = re.compile(  # how log.txt tells the size of a step
    r"^[\d,]+ parameters on .*; a step: ([\d,]+) tokens |^\w+: [\d,]+ parameters, \d+ steps of (\d+) x (\d+) char", re.M
)
UNITS = {  # of the x axis: the largest that the data reach
    "steps": [(1, "steps")],
    "tokens": [(1e9, "billions of tokens"), (1e6, "millions of tokens"), (1, "tokens")],
    "time": [(3600, "hours of training"), (60, "minutes of training"), (1, "seconds of training")],
}


def get_flags():
    flags = Flags()
    add = flags.add_argument
    add("runs", metavar="RUN", nargs="+", help="folders of runs, their log.jsonl, or --details of hellaswag.py")
    add("--out", default="out/curves", help="the pictures: this and .png, this and .svg")
    add("--labels", nargs="+", help="names of the runs, in their order; not given: those of the folders")
    add("--x", default="steps", choices=list(UNITS), help="what the curves are over")
    add(
        "--gpt2_line",
        action=argparse.BooleanOptionalAction,
        help="the loss of GPT-2 124M; not given: when the checkpoints say GPT-2's tokens, and FineWeb to validate on",
    )
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


def warn(message):
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)


def read_rows(path):
    """The objects of a .jsonl with the numbers of their lines; a last line that was cut short is left out."""
    try:
        with open(path, "rb") as f:
            for line_number, line in enumerate(f, 1):
                try:
                    row = json.loads(line)
                    good = isinstance(row, dict)
                except (ValueError, RecursionError):
                    good = False
                if not good and not line.endswith(b"\n") and line[:2] == b'{"'[: len(line)]:
                    warn(f"{path}: line {line_number}, the last, was cut short; it is left out")
                elif not good:
                    fail(f"{path}: line {line_number} is not an object of JSON")
                else:
                    yield line_number, row
    except OSError as error:
        fail(f"{path}: {error.strerror}")


def read_log(path, rows):
    """{quantity: {step: value}} of the rows of a log, and "kind", which names a panel of PANELS."""
    log, dropped = {name: {} for name in LOGGED} | {"kind": "pretraining"}, 0
    for line_number, row in rows:
        values = {name: row[name] for name in LOGGED if row.get(name) is not None}
        try:
            good = type(row["step"]) is int and 0 <= row["step"] < 2**53
            good = good and all(type(value) in (int, float) for value in values.values())
            values = {name: float(value) for name, value in values.items()}
        except (KeyError, TypeError, ValueError, OverflowError):
            good = False
        if not good:
            fail(f"{path}: line {line_number} is not a row of a log (a step, and numbers)")
        for name, value in values.items():
            if abs(value) < 1e30:
                log[name][row["step"]] = value
            else:
                dropped += 1
        if values.keys() & {"train_margin", "val_margin"}:
            log["kind"] = "preferences"
        elif "tokens_per_s" in row and not row.keys() & {"mfu", "val_loss"}:  # what finetune.py's rows have
            log["kind"] = "fine-tuning"
    if dropped:
        warn(f"{path}: {dropped} values that are not finite are left out")
    if not any(log[name] for name in LOGGED[:-2]):
        fail(f"{path}: holds no loss and no HellaSwag score to draw")
    return log


def read_details(path, rows):
    """{(folder, style): {step: (acc_norm, questions)}} of the answers that hellaswag.py has left."""
    answers = {}
    for line_number, row in rows:
        try:
            model, _, style, *_ = json.loads(row["run"])
            right = int(row["prediction_norm"]) == int(row["label"])
            answers.setdefault((model, style, row["step"]), {}).setdefault(row["run"], {})[int(row["question"])] = right
            good = isinstance(model, str) and style in HELLASWAG and type(row["step"]) in (int, type(None))
        except (KeyError, TypeError, ValueError, RecursionError):
            good = False
        if not good:
            fail(f"{path}: line {line_number} is not an answer of hellaswag.py")
    most, scores = max(len(found) for runs in answers.values() for found in runs.values()), {}
    for (model, style, step), runs in answers.items():
        found = max(reversed(runs.values()), key=len)
        if step is None:
            warn(f"{path}: {model} names no step; it is left out")
        elif len(found) < most:  # those with the longest context are answered first: not a fair sample
            warn(f"{path}: {model}: {len(found):,} of {most:,} questions are answered; it is left out")
        else:
            scores.setdefault((os.path.dirname(model), style), {})[step] = sum(found.values()) / most, most
    if not scores:
        fail(f"{path}: holds no checkpoint to draw")
    return scores


def tokens_a_step(path):
    """What the log.txt beside a log.jsonl says of the size of a step."""
    try:
        with open(os.path.join(os.path.dirname(path), "log.txt"), encoding="utf-8", errors="replace") as f:
            found = {tuple(int(n.replace(",", "")) for n in match.groups() if n) for match in STEP.finditer(f.read())}
    except OSError:
        found = ()
    if len(found) != 1:
        fail(f"{path}: no log.txt beside it tells the tokens of a step; --x steps needs none")
    return math.prod(*found)


def trained_on_fineweb(path):
    """Whether the newest checkpoint beside a log.jsonl names GPT-2's tokens and FineWeb's shards for validation."""
    checkpoints = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "*.pt"))
    if not checkpoints:
        return False
    import torch  # it takes a second or two

    try:
        checkpoint = torch.load(
            max(checkpoints, key=os.path.getmtime), map_location="cpu", weights_only=True, mmap=True
        )
        return checkpoint["tokenizer"] == "gpt2" and "fineweb" in checkpoint["train"]["flags"]["val_files"]
    except Exception:  # damaged files raise nearly everything
        return False


def gather(paths, over):
    """The runs: {"path": of the log, "kind", "curves": {name: (xs, ys)}, "questions": {style: numbers of them}}."""
    logs, details = {}, {}
    for path in paths:
        path = os.path.join(path, "log.jsonl") if os.path.isdir(path) else path
        rows = read_rows(path)
        first = next(rows, None)
        if first is None:
            fail(f"{path}: holds no rows")
        if "prediction_norm" in first[1]:
            details |= read_details(path, itertools.chain([first], rows))
        else:
            logs[os.path.realpath(path)] = {"path": path, **read_log(path, itertools.chain([first], rows))}
    for log in logs.values():
        scores = log["hellaswag_norm"].items()
        log["completion"] = {step: (score, int(log["questions"].get(step, 10_042))) for step, score in scores}
    for (folder, style), scores in details.items():
        path = os.path.join(folder, "log.jsonl")
        log = logs.setdefault(os.path.realpath(path), {"path": path, "kind": "pretraining"})
        log[style] = log.get(style, {}) | scores
    runs = []
    for log in logs.values():
        run = {"path": log["path"], "kind": log["kind"], "curves": {}, "questions": {}}
        tokens = tokens_a_step(log["path"]) if over == "tokens" else None
        for name in [*LOGGED[:-3], *HELLASWAG]:
            points = sorted(log.get(name, {}).items())
            if name in HELLASWAG:
                run["questions"][name] = {n for _, (_, n) in points}
                points = [(step, score) for step, (score, _) in points]
            xs = [step for step, _ in points]
            if over == "tokens":
                xs = [step * tokens for step in xs]
            elif over == "time":
                times = {0: 0.0} | log.get("train_time_ms", {})
                if unknown := [step for step in xs if step not in times]:
                    fail(f"{log['path']}: tells no train_time_ms of step {unknown[0]}; --x steps needs none")
                xs = [times[step] / 1000 for step in xs]
            if points:
                run["curves"][name] = xs, [y for _, y in points]
        runs.append(run)
    return runs


def names_of(paths):
    """A name for each log: its folder's, or as much of the path as tells it from the others."""
    paths = [os.path.dirname(path) if os.path.basename(path) == "log.jsonl" else path for path in paths]
    paths = [os.path.normpath(path or ".") for path in paths]
    names = [os.path.basename(os.path.abspath(path)) for path in paths]
    return [path if names.count(name) > 1 else name for path, name in zip(paths, names)]


def stroke(i):
    return dict(color=COLOURS[i % len(COLOURS)], linestyle=STROKES[i // len(COLOURS) % len(STROKES)])


def draw_panel(ax, kind, lines, marks, over):
    """Lines [(run, part, (xs, ys))], and marks {name: y}, dashed over the whole width, named at the right edge."""
    size, unit = next(item for item in UNITS[over] if item[0] <= max(1, *(xs[-1] for _, _, (xs, _) in lines)))
    for i, part, (xs, ys) in lines:
        few = len(xs) < 2 or (part == "val" and len(xs) <= 30)
        style = dict(linewidth=1.8, alpha=1.0, zorder=3) if part == "val" else dict(linewidth=0.7, alpha=0.45)
        marker = dict(marker="o", markersize=3) if few else {}
        ax.plot(
            [x / size for x in xs], ys, **style, **marker, **stroke(i), gid=f"{ax.get_title('left')}, {part}, run {i}"
        )
    for name, y in marks.items():
        ax.axhline(y, color="#777777", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        where = dict(xycoords=("axes fraction", "data"), textcoords="offset points", annotation_clip=False)
        ax.annotate(name.replace(" (", "\n("), (1, y), (4, 0), va="center", fontsize=7, color="#555555", **where)
    if kind == "pretraining":  # the fall of the first steps would press all others flat
        late = [y for _, _, (xs, ys) in lines for x, y in zip(xs, ys) if x >= xs[-1] / 20]
        low, high = min(*late, *marks.values()), max(*late, *marks.values())
        margin = 0.05 * (high - low) or 0.1
        ax.set_ylim(low - margin, high + margin)
    ax.set_xlabel(unit)
    ax.xaxis.get_major_locator().set_params(integer=over == "steps")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.10g}")


def draw(runs, labels, over, gpt2_line):
    """The figure: a panel for each quantity that some run has."""
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(LOOK)
    panels = []
    for kind, name, title, axis in PANELS:
        keys = [
            (i, part, f"{part}_{name}")
            for i, run in enumerate(runs)
            if run["kind"] == kind
            for part in ("train", "val")
        ]
        marks = {GPT2_LOSS[1]: GPT2_LOSS[0]} if gpt2_line and kind == "pretraining" else {}
        panels.append((kind, title, axis, keys, marks))
    for style, published in HELLASWAG.items():
        asked = sorted(set().union(*(run["questions"][style] for run in runs)))
        axis = "acc_norm" + (
            f", {' to '.join(f'{n:,}' for n in asked[:: len(asked) - 1 or 1])} questions" if asked else ""
        )
        keys = [(i, "val", style) for i in range(len(runs))]
        panels.append(("HellaSwag", f"HellaSwag, {style} style", axis, keys, {"chance": 0.25, **published}))
    panels = [
        (kind, title, axis, lines, marks)
        for kind, title, axis, keys, marks in panels
        if (lines := [(i, part, runs[i]["curves"][key]) for i, part, key in keys if key in runs[i]["curves"]])
    ]
    rows, columns = -(-len(panels) // 2), min(2, len(panels))
    figure = Figure(figsize=(8, 0.4 + (4 if len(panels) == 1 else 2.8 * rows)), dpi=150)
    grid, odd = figure.add_gridspec(rows, columns), len(panels) % 2
    for k, (kind, title, axis, lines, marks) in enumerate(panels):
        place = (
            grid[0, :] if odd and k == 0 else grid[(k + odd) // 2, (k + odd) % 2]
        )  # of an odd number the first is wide
        ax = figure.add_subplot(place)
        ax.set_title(title)
        ax.set_ylabel(axis)
        draw_panel(ax, kind, lines, marks, over)
    handles = [Line2D([], [], linewidth=1.8, **stroke(i)) for i in range(len(runs))]
    texts = [os.fsencode(label).decode(errors="replace") for label in labels]
    texts = [text if len(text) <= 50 else f"…{text[-49:]}" for text in texts]
    if any(part == "train" for _, _, _, lines, _ in panels for _, part, _ in lines):
        handles += [Line2D([], [], color="#888888", linewidth=width) for width in (0.7, 1.8)]
        texts += ["training", "held out"]
    ncols = min(len(texts), max(1, 115 // (8 + max(map(len, texts)))))
    figure.legend(handles, texts, loc="outside upper left", ncols=ncols, handlelength=2.2)
    return figure


def write(figure, out):
    """OUT.png and OUT.svg, each whole or as it was before."""
    files = {}
    warnings.filterwarnings("ignore", "Glyph")  # a name in letters that the font lacks is drawn as boxes
    for kind, about in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        file = io.BytesIO()
        figure.savefig(file, format=kind, metadata=about, facecolor="white")
        files[f"{out}.{kind}"] = file.getvalue()
    temporary = {path: f"{path}.{os.getpid()}.tmp" for path in files}
    try:
        os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
        for path, content in files.items():
            with open(temporary[path], "wb") as f:
                f.write(content)
        for path in files:
            os.replace(temporary[path], path)
    except OSError as error:
        theirs = isinstance(error, (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError))
        fail(f"--out {out}: could not be written ({error.strerror})", code=2 if theirs else 1)
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                os.remove(path)
    return list(files)


def main():
    flags = get_flags()
    if matplotlib is None:
        fail("needs matplotlib: pip install matplotlib")
    out = re.sub(r"\.(png|svg)$", "", flags.out)
    if not os.path.basename(out):
        fail(f"--out {flags.out}: names no picture; a path such as out/curves does")
    runs = gather(flags.runs, flags.x)
    labels = flags.labels or names_of([run["path"] for run in runs])
    if len(labels) != len(runs):
        fail(f"--labels: {len(labels)} names for {len(runs)} runs")
    line = flags.gpt2_line
    if line is None:  # only where every loss is one of those tokens
        line = all(trained_on_fineweb(run["path"]) for run in runs if run["kind"] == "pretraining")
    files = write(draw(runs, labels, flags.x, line), out)
    print(f"{', '.join(files)}: {len(runs)} run{'s' * (len(runs) > 1)}")


if __name__ == "__main__":
    run(main)
