"""runs/plot.py and runs/timeline.py: what is shown is what was logged, each loss under the name of its unit."""

import json

import matplotlib.figure
import torch
from test_export_hf import main

import hellaswag
import runs.plot as script
import runs.timeline as timeline


def write(folder, rows, tokenizer=None, end="", name="log.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    if tokenizer:
        train = dict(flags=dict(val_files="data/fineweb10B/fineweb_val_*.bin"))
        torch.save(dict(format=1, tokenizer=tokenizer, train=train), folder / "ckpt.pt")
    return folder


def pretraining(steps, shift=0.0):
    """Rows as train_gpt.py writes them."""
    for step in range(1, steps + 1):
        yield dict(step=step, train_loss=5 / step + shift, train_time_ms=100 * step, lr=0.01, mfu=None)
        if step % 5 == 0:
            yield dict(step=step, val_loss=6 / step + shift, train_time_ms=100 * step)
            yield dict(step=step, hellaswag_norm=0.25 + step / 1000, questions=500)


PREFERENCES = [  # as finetune.py writes them with --method dpo
    dict(step=0, val_loss=0.7, val_margin=0.0, val_accuracy=0.5, train_time_ms=0),
    dict(step=1, train_loss=0.6, train_margin=0.1, train_accuracy=0.25, pairs_per_s=10.0),
    dict(step=1, val_loss=0.5, val_margin=0.5, val_accuracy=0.75, train_time_ms=10),
]


def test_each_unit_has_its_axis(tmp_path, monkeypatch):
    saved, steps = [], list(range(1, 11))
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path: saved.append(figure))
    char = [dict(step=40, train_loss=2.5, val_loss=2.25), dict(step=80, train_loss=2.0, val_loss=2.125)]
    resumed = [*pretraining(9), *(row for row in pretraining(10, shift=1.0) if row["step"] > 7)]
    runs = [
        write(tmp_path / "char", char, tokenizer={"chars": "ab"}),
        write(tmp_path / "bytes", pretraining(3), tokenizer="bytes", end='{"step": 4, "train_lo'),
        write(tmp_path / "gpt", resumed, tokenizer="gpt2"),
        write(tmp_path / "own", pretraining(2), tokenizer={"bpe": ["a"] * 2000}),
        write(tmp_path / "dpo", PREFERENCES, tokenizer="bytes") / "log.jsonl",
    ]
    assert main(script, *runs, "--out", tmp_path / "c") == 0
    curves = {}
    for ax in saved[0].axes:
        lines = [line for line in ax.get_lines() if line.get_linestyle() == "-" and len(line.get_xdata())]
        curves[ax.get_ylabel()] = [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]
    assert curves == {
        "loss, nats a character": [([40, 80], [2.5, 2.0]), ([40, 80], [2.25, 2.125])],
        "loss, nats a byte": [([1, 2, 3], [5 / step for step in (1, 2, 3)])],
        "loss, nats a token": [(steps, [5 / step + (step > 7) for step in steps]), ([5, 10], [1.2, 1.6])],
        "HellaSwag, acc_norm, 500 questions": [([5, 10], [0.255, 0.26])],
        "loss, nats a token of 2,000 kinds": [([1, 2], [5, 2.5])],
        "loss, nats a pair": [([1], [0.6]), ([0, 1], [0.7, 0.5])],
        "reward margin of the winner, nats": [([1], [0.1]), ([0, 1], [0.0, 0.5])],
        "share of pairs, winner ahead": [([1], [0.25]), ([0, 1], [0.5, 0.75])],
    }
    marks = {ax.get_ylabel(): {text.get_text(): text.xy[1] for text in ax.texts} for ax in saved[0].axes}
    published = {name.replace("\n", " "): y for name, y in marks.pop("HellaSwag, acc_norm, 500 questions").items()}
    assert published.pop("chance") == 0.25 and len(published) == 4
    assert published in [{name: y for name, (_, y) in style.items()} for style in hellaswag.PUBLISHED.values()]
    assert [axis for axis, found in marks.items() if found] == ["loss, nats a token"]


def test_pictures_are_written_and_mistakes_get_one_line(tmp_path, capsys):
    run, out = write(tmp_path / "a", pretraining(9)), tmp_path / "new" / "c"
    write(tmp_path / "text", [], end="It was\n")
    for flags, word in [
        ([tmp_path / "none"], "No such file"),
        ([tmp_path / "text"], "log.jsonl: not a log"),
        ([run], "give --units"),
        ([run, "--units", "byte", "token"], "2 for 1 runs"),
    ]:
        assert main(script, *flags, "--out", out) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and word in said and not out.parent.exists()
    assert main(script, run, "--units", "byte", "--labels", "one", "--out", out) == 0
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG" and b"</svg>" in out.with_suffix(".svg").read_bytes()


def test_timeline(tmp_path, capsys):
    run, dpo, out = tmp_path / "run", tmp_path / "dpo", tmp_path / "new" / "timeline.md"
    write(run, [dict(step=0, val_loss=5.5), dict(step=9, val_loss=1.25)], tokenizer="bytes", end='{"step": 9, "va')
    stories = [dict(step=step, prompt="Once", text=f"Once {step}\nthen") for step in (0, 9, 20, 9)]
    write(run, [*stories, dict(step=20, prompt="Twice", text="Twice")], name="stories.jsonl")
    write(dpo, PREFERENCES, tokenizer="bytes")
    write(dpo, [dict(prompt="Once", text="Once upon")], name="stories.jsonl")
    (run / "milestone_000009.pt").write_bytes((run / "ckpt.pt").read_bytes())
    assert main(timeline, run, "--out", out) == 2 and "no story" in capsys.readouterr().err and not out.exists()
    assert main(timeline, run, f"judged={dpo}", "--prompt", "Once", "--out", out) == 0
    assert out.read_text() == (
        "# Once ...\n\n## run\n\nstep 9, validation loss 1.2500 nats a byte\n\n> **Once** 9\n> then\n\n"
        "step 20, validation loss 1.2500 nats a byte at step 9\n\n> **Once** 20\n> then\n\n## judged\n\n"
        "step 1, validation loss 0.5000 nats a pair, the winner ahead in 75% of the held-out pairs\n\n> **Once** upon\n"
    )
    assert main(timeline, run, "--prompt", "Once", "--all", "--out", out) == 0
    assert out.read_text().count("**Once**") == 3
