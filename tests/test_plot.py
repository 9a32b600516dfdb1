"""runs/plot.py: what is drawn is what was logged, several runs, resumed runs, HellaSwag, mistakes."""

import json
import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

import hellaswag
import runs.plot as script

ROOT = pathlib.Path(__file__).resolve().parent.parent


def write(path, rows, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + end)
    return path


def pretraining(steps=20, shift=0.0):
    """Rows as train_gpt.py writes them."""
    rows = []
    for step in range(1, steps + 1):
        rate = dict(lr=0.01, tokens_per_s=1000, mfu=None)
        rows.append(dict(step=step, train_loss=5 / step + shift, train_time_ms=100 * step, **rate))
        if step % 5 == 0:
            rows.append(dict(step=step, val_loss=6 / step + shift, train_time_ms=100 * step))
            rows.append(dict(step=step, hellaswag=0.2, hellaswag_norm=0.25 + step / 1000, questions=500))
    return rows


def finetuning(dpo=False):
    """Rows as finetune.py writes them."""
    more = ["margin", "accuracy"] if dpo else []
    rows = [dict(step=0, val_loss=2.5, **{f"val_{name}": 0.5 for name in more}, train_time_ms=0)]
    for step in (1, 2, 3):
        rate = {"lr": 0.01, "pairs_per_s" if dpo else "tokens_per_s": 10.0}
        found = {f"train_{name}": step / 10 for name in ["loss", *more]}
        rows.append(dict(step=step, **found, train_time_ms=10 * step, **rate))
    return rows + [dict(step=3, val_loss=2.25, **{f"val_{name}": 0.75 for name in more}, train_time_ms=30)]


def answers(folder, steps, right, questions=10, style="completion"):
    """Rows as hellaswag.py writes them: the first `right` of the questions are answered rightly."""
    for step in steps:
        path = f"{folder}/milestone_{step:06d}.pt"
        about = dict(
            run=json.dumps([path, [[1, 2]], style, "float32", "x", 3]), model=path, step=step, losses=[1, 2, 3, 4]
        )
        for i in range(questions):
            yield about | dict(question=i, prediction=3, prediction_norm=0 if i < right else 1, label=0)


def main(*flags):
    """plot.py in this process: its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["plot.py", *map(str, flags)])
        script.run(script.main)
    return stop.value.code


def lines(paths, over="steps", gpt2_line=False):
    """{gid: (xs, ys)} of what is drawn of logs, and the figure."""
    runs = script.gather(list(map(str, paths)), over)
    figure = script.draw(runs, [str(i) for i in range(len(runs))], over, gpt2_line)
    drawn = [line for ax in figure.axes for line in ax.get_lines() if line.get_gid()]
    return {line.get_gid(): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn}, figure


def titles(figure):
    return [ax.get_title("left") for ax in figure.axes]


def test_what_is_drawn_is_what_was_logged(tmp_path):
    write(tmp_path / "gpt/log.jsonl", pretraining())
    write(tmp_path / "sft/log.jsonl", finetuning())
    write(tmp_path / "dpo/log.jsonl", finetuning(dpo=True))
    drawn, figure = lines([tmp_path / "gpt", tmp_path / "sft", tmp_path / "dpo"])
    steps = list(range(1, 21))
    assert drawn == {
        "Training, train, run 0": (steps, [5 / step for step in steps]),
        "Training, val, run 0": ([5, 10, 15, 20], [6 / step for step in (5, 10, 15, 20)]),
        "Fine-tuning, train, run 1": ([1, 2, 3], [0.1, 0.2, 0.3]),
        "Fine-tuning, val, run 1": ([0, 3], [2.5, 2.25]),
        "Preferences (DPO): loss, train, run 2": ([1, 2, 3], [0.1, 0.2, 0.3]),
        "Preferences (DPO): loss, val, run 2": ([0, 3], [2.5, 2.25]),
        "Preferences: reward margin, train, run 2": ([1, 2, 3], [0.1, 0.2, 0.3]),
        "Preferences: reward margin, val, run 2": ([0, 3], [0.5, 0.75]),
        "Preferences: accuracy, train, run 2": ([1, 2, 3], [0.1, 0.2, 0.3]),
        "Preferences: accuracy, val, run 2": ([0, 3], [0.5, 0.75]),
        "HellaSwag, completion style, val, run 0": ([5, 10, 15, 20], [0.255, 0.26, 0.265, 0.27]),
    }
    assert len(figure.axes) == 6 and figure.axes[-1].get_ylabel() == "acc_norm, 500 questions"


def test_char_rows_hold_both_losses(tmp_path):
    row = dict(train_loss=2.5, val_loss=2.25, train_time_ms=1500, lr=0.1, tokens_per_s=9)
    write(tmp_path / "log.jsonl", [row | dict(step=40), row | dict(step=80)])
    (tmp_path / "log.txt").write_text("bigram: 3,600 parameters, 80 steps of 32 x 64 characters on cpu\n")
    drawn, figure = lines([tmp_path], over="tokens")
    assert drawn["Training, val, run 0"] == ([40 * 2048, 80 * 2048], [2.25, 2.25])
    assert titles(figure) == ["Training"] and figure.axes[0].get_xlabel() == "tokens"


def test_over_tokens_and_time(tmp_path):
    write(tmp_path / "log.jsonl", pretraining())
    (tmp_path / "log.txt").write_text(
        'f"{n:,} parameters on {x}; a step: {total:,} tokens in"\n'
        "1,200 parameters on 8 x cuda in bfloat16; a step: 524,288 tokens in 1 x 4 rows of 1,024 on each\n" * 2
    )
    drawn, figure = lines([tmp_path], over="tokens")
    assert drawn["Training, val, run 0"][0] == [step * 524288 / 1e6 for step in (5, 10, 15, 20)]
    assert figure.axes[0].get_xlabel() == "millions of tokens"
    drawn, _ = lines([tmp_path], over="time")
    assert drawn["HellaSwag, completion style, val, run 0"][0] == [0.5, 1, 1.5, 2]


def test_the_picture_holds_the_lines(tmp_path):
    """The points in the SVG are the values, up to the scale of the axes."""
    write(tmp_path / "a/log.jsonl", finetuning())
    assert main(tmp_path / "a", "--out", tmp_path / "new/c.png") == 0
    assert sorted(os.listdir(tmp_path / "new")) == ["c.png", "c.svg"]
    assert (tmp_path / "new/c.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    svg = "{http://www.w3.org/2000/svg}"
    groups = {group.get("id"): group for group in ET.parse(tmp_path / "new/c.svg").iter(f"{svg}g")}
    points = []
    for part in ("train", "val"):
        found = re.findall(r"[ML] (\S+) (\S+)", groups[f"Fine-tuning, {part}, run 0"].find(f"{svg}path").get("d"))
        points += [tuple(map(float, point)) for point in found]
    values = [(1, 0.1), (2, 0.2), (3, 0.3), (0, 2.5), (3, 2.25)]
    assert len(points) == len(values)
    for axis in (0, 1):
        there, here = [point[axis] for point in points], [value[axis] for value in values]
        slope = (there[3] - there[0]) / (here[3] - here[0])
        assert there == pytest.approx([there[0] + slope * (v - here[0]) for v in here], abs=1e-3)


def test_the_same_logs_give_the_same_files(tmp_path):
    write(tmp_path / "a/log.jsonl", pretraining())
    for out in ("1", "2"):
        done = subprocess.run([sys.executable, ROOT / "runs/plot.py", tmp_path / "a", "--out", tmp_path / out])
        assert done.returncode == 0
    for kind in ("png", "svg"):
        assert (tmp_path / f"1.{kind}").read_bytes() == (tmp_path / f"2.{kind}").read_bytes()
    assert b"<dc:date>" not in (tmp_path / "1.svg").read_bytes()


def test_later_rows_of_a_step_count(tmp_path):
    rows = pretraining(10) + [row for row in pretraining(12, shift=1.0) if row["step"] > 7]
    write(tmp_path / "log.jsonl", rows)
    drawn, _ = lines([tmp_path])
    xs, ys = drawn["Training, train, run 0"]
    assert xs == list(range(1, 13))
    assert ys == [5 / step + (step > 7) for step in xs]


def test_names_and_colours_of_several_runs(tmp_path):
    for name in ("x/gpt", "y/gpt", "$_1$"):
        write(tmp_path / name / "log.jsonl", pretraining())
    paths = [str(tmp_path / name) for name in ("x/gpt", "y/gpt", "$_1$")]
    names = script.names_of([f"{path}/log.jsonl" for path in paths])
    assert names == [*paths[:2], "$_1$"]
    figure = script.draw(script.gather(paths, "steps"), names, "steps", False)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[2:] == ["$_1$", "training", "held out"] and texts[0].endswith("x/gpt")
    assert len({line.get_color() for line in figure.axes[0].get_lines()}) == 3
    assert main(*paths, "--out", tmp_path / "c", "--labels", "_a", "$\\foo", "日本") == 0


def test_published_lines_are_those_of_hellaswag(tmp_path):
    both = {style: {name: p[1] for name, p in rows.items()} for style, rows in hellaswag.PUBLISHED.items()}
    assert script.HELLASWAG == both
    details = write(tmp_path / "d.jsonl", answers("out/gpt", [100], 4, style="harness"))
    figure = lines([details])[1]
    marks = {text.get_text(): text.xy[1] for text in figure.axes[0].texts}
    assert marks == {"chance": 0.25, **both["harness"]}
    assert {line.get_ydata()[0] for line in figure.axes[0].get_lines()} == {0.4, *marks.values()}


def test_answers_of_hellaswag_join_their_run(tmp_path, capsys):
    log = write(tmp_path / "gpt/log.jsonl", [row for row in pretraining() if "hellaswag" not in row])
    rows = [*answers(tmp_path / "gpt", [5], 3), *answers(tmp_path / "gpt", [10], 6), *answers(tmp_path / "b", [5], 8)]
    rows += list(answers(tmp_path / "b", [10], 4, questions=7))  # hellaswag.py is still at it
    rows += [row | dict(step=None) for row in answers("openai-community/gpt2", [1], 2)]
    rows = rows + rows[:4]  # twice the same answer
    details = write(tmp_path / "d.jsonl", rows, end='\n{"run": "[\\"out')
    drawn, _ = lines([log, details])
    assert drawn["HellaSwag, completion style, val, run 0"] == ([5, 10], [0.3, 0.6])
    assert drawn["HellaSwag, completion style, val, run 1"] == ([5], [0.8])
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 3 and "cut short" in warned[0] and "7 of 10" in warned[1] and "no step" in warned[2]


@pytest.mark.parametrize(
    "tokens,files,drawn", [("gpt2", "fineweb10B", 1), ("gpt2", "prose", 0), ("bytes", "fineweb", 0)]
)
def test_gpt2_line_is_for_its_tokens_and_fineweb(tmp_path, tokens, files, drawn):
    write(tmp_path / "log.jsonl", pretraining())
    assert not script.trained_on_fineweb(str(tmp_path / "log.jsonl"))
    flags = dict(val_files=f"data/{files}/*_val_*.bin")
    torch.save(dict(format=1, tokenizer=tokens, train=dict(flags=flags)), tmp_path / "ckpt.pt")
    assert script.trained_on_fineweb(str(tmp_path / "log.jsonl")) == bool(drawn)
    ax = lines([tmp_path], gpt2_line=bool(drawn))[1].axes[0]
    assert [text.xy[1] for text in ax.texts] == [3.28] * drawn


def test_a_cut_line_and_values_that_are_not_finite(tmp_path, capsys):
    rows = pretraining(3) + [dict(step=4, train_loss=float("nan")), dict(step=5, train_loss=float("inf"))]
    write(tmp_path / "log.jsonl", rows, end='\n{"step": 6, "train_lo')
    drawn, _ = lines([tmp_path])
    assert drawn["Training, train, run 0"][0] == [1, 2, 3]
    assert capsys.readouterr().err.count("\n") == 2


ROW = '{"step": 1, "train_loss": 2.0}\n'
BAD = {
    "empty": ("", "holds no rows"),
    "only a cut line": ('{"st', "holds no rows"),
    "binary": ("\x89PNG\r\n\0\1\udc80\n", "line 1 is not an object"),
    "not JSON": (ROW + "{\n" + ROW, "line 2 is not an object"),
    "a list": ("[1]\n", "line 1 is not an object"),
    "deep": ("[" * 100_000 + "\n", "line 1 is not an object"),
    "no step": ('{"train_loss": 2.0}\n', "line 1 is not a row"),
    "step below 0": ('{"step": -1, "train_loss": 2.0}\n', "line 1 is not a row"),
    "step a float": (ROW + '{"step": 1.5, "train_loss": 2.0}\n', "line 2 is not a row"),
    "step huge": ('{"step": 1' + "0" * 400 + ', "train_loss": 2.0}\n', "line 1 is not a row"),
    "loss a text": ('{"step": 1, "train_loss": "2"}\n', "line 1 is not a row"),
    "loss true": ('{"step": 1, "val_loss": true}\n', "line 1 is not a row"),
    "loss huge": ('{"step": 1, "val_loss": 1' + "0" * 400 + "}\n", "line 1 is not a row"),
    "no losses": ('{"step": 1, "text": "It was"}\n', "no loss"),
    "only nan": ('{"step": 1, "val_loss": NaN}\n', "no loss"),
    "not an answer": ('{"prediction_norm": 1}\n', "line 1 is not an answer"),
    "a bad run": (
        '{"prediction_norm": 1, "label": 1, "run": "[1", "question": 1, "step": 1}\n',
        "line 1 is not an answer",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_logs_get_one_line(tmp_path, capsys, name):
    text, said = BAD[name]
    (tmp_path / "log.jsonl").write_text(text, errors="surrogateescape")
    assert main(tmp_path, "--out", tmp_path / "c") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"plot.py: {tmp_path / 'log.jsonl'}: ") and said in last
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_bad_flags_get_one_line(tmp_path, capsys):
    write(tmp_path / "log.jsonl", pretraining())
    (tmp_path / "file").write_text("")
    (tmp_path / "d.png").mkdir()
    out = "--out", tmp_path / "c"
    for flags, said in [
        ([tmp_path / "none", *out], "No such file"),
        ([tmp_path / "d.png", *out], "No such file"),
        ([tmp_path, *out, "--labels", "a", "b"], "2 names for 1 runs"),
        ([tmp_path, *out, "--x", "tokens"], "no log.txt"),
        ([tmp_path, *out, "--x", "miles"], "invalid choice"),
        ([tmp_path, "--out", f"{tmp_path}/"], "names no picture"),
        ([tmp_path, "--out", tmp_path / "file/c"], "could not be written"),
        ([tmp_path, "--out", tmp_path / "d"], "could not be written"),
    ]:
        assert main(*flags) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
        assert sorted(os.listdir(tmp_path)) == ["d.png", "file", "log.jsonl"]


def test_without_matplotlib(tmp_path):
    write(tmp_path / "log.jsonl", pretraining())
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/matplotlib.py").write_text("raise ImportError('no')\n")
    command = [sys.executable, ROOT / "runs/plot.py", tmp_path, "--out", tmp_path / "c"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "stub")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (2, "plot.py: needs matplotlib: pip install matplotlib\n")
    assert not (tmp_path / "c.png").exists()
