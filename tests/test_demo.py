"""The whole journey at its smallest, in a copy of the repository: killed on the way, it goes on to its end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from test_rank import judge  # noqa: F401
from test_readme import ROOT, listed

STAGES = "bigram char shards gpt tales stories ranked best dpo".split()


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "with a space"
    for name in listed():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    os.symlink(sys.prefix, folder / ".venv")
    return folder


def demo(folder, *flags, key=None, until=None):
    """Run the demo; kill it, and all that it has started, when a line of its output has `until` in it."""
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    environment.update({"OPENAI_API_KEY": key} if key else {})
    command = ["bash", "runs/demo.sh", "--quick", *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if until and until in line:
                os.killpg(process.pid, signal.SIGKILL)
                until = None
    return process.returncode, "".join(lines)


def last_of_the_alphabet(handler):
    """A judge that likes the story best that sorts last, wherever it stands."""
    shown = dict(re.findall(r"--- Story (.) ---\n(.*?)(?=\n\n--- Story|\Z)", handler.content, re.S))
    handler.say(f"BEST_ANSWER:[{max(shown, key=shown.get)}]\nREASONING:[It is cold there.]")


def done(folder):
    return [name for name in STAGES if (folder / "out" / "demo" / f"{name}.done").exists()]


def test_the_journey_is_killed_and_goes_on(copy, judge):  # noqa: F811
    code, output = demo(copy, until="step:6/20")  # the first validation of pretraining
    assert code == -signal.SIGKILL and done(copy) == ["bigram", "char", "shards"], output
    code, output = demo(copy, until="== fine-tuning on the winners")
    assert code == -signal.SIGKILL and done(copy) == STAGES[:7] and output.count("is there already") == 3, output
    code, output = demo(copy)
    assert code == 0 and done(copy) == STAGES and output.count("is there already") == 7, output
    out = copy / "out" / "demo"
    text = (out / "timeline.md").read_text(encoding="utf-8")
    assert text in output and text.count("\n## ") == 6
    milestones = len(list((out / "gpt").glob("milestone_*.pt")))
    assert milestones == 4 and text.count("**It was a dark and stormy night**") == 6 + milestones - 1
    log = [json.loads(line) for line in (out / "gpt" / "log.jsonl").open(encoding="utf-8")]
    for row in log:
        if row.get("val_loss") and (row["step"] % 6 == 0 or row["step"] == 20):  # that of each milestone
            assert f"step {row['step']}, validation loss {row['val_loss']:.4f}\n" in text
    assert sum(1 for _ in (out / "stories.jsonl").open(encoding="utf-8")) == 40
    assert sum(1 for _ in (out / "best.jsonl").open(encoding="utf-8")) == 10

    for name in ("ranked.done", "ranked.jsonl", "ranked.jsonl.answers", "best.jsonl"):
        (out / name).unlink(missing_ok=True)
    judge.faults.extend(100 * [last_of_the_alphabet])
    code, output = demo(copy, "--api", "--base_url", judge.url, "--retries", "1", key="sk-test")
    assert code == 0 and len(judge.asked) >= 20, output
    rows = [json.loads(line) for line in (out / "ranked.jsonl").open(encoding="utf-8")]
    assert len(rows) == 10 and all(row["best"] and "It is cold there." in row["reasoning"] for row in rows)


def test_what_the_demo_does_not_know_is_said(copy):
    for flags in (["fast"], ["--help"]):
        ended = subprocess.run(["bash", "runs/demo.sh", *flags], cwd=copy, capture_output=True, text=True)
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and flags[0] in ended.stderr
    environment = {**os.environ, "PYTHON": "false"}
    ended = subprocess.run(["bash", "runs/demo.sh"], cwd=copy, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and "3.10" in ended.stderr


def test_timeline_of_bad_runs(tmp_path):
    """One line on stderr, nothing written; what a run that was killed has half written is passed over."""
    run, out = tmp_path / "run", tmp_path / "timeline.md"

    def timeline(*flags):
        command = [sys.executable, str(ROOT / "runs" / "timeline.py"), str(run), "--out", str(out), *flags]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert not ended.returncode or (ended.stderr.count("\n") == 1 and not out.exists()), ended.stderr
        return ended.returncode, ended.stderr

    assert timeline() == (2, f"timeline.py: {run}/log.jsonl: No such file or directory\n")
    run.mkdir()
    (run / "log.jsonl").write_text('{"step": 0, "val_loss": 5.5}\n{"step": 9, "val_loss": 1.25}\n{"step": 9, "va')
    (run / "stories.jsonl").write_bytes(b"\xff\xfe\n")
    assert timeline() == (2, f"timeline.py: {run}/stories.jsonl: is not UTF-8\n")
    (run / "stories.jsonl").write_text("[]\n{}\n")
    assert timeline()[0] == 2
    (run / "stories.jsonl").write_text('{"prompt": "Once", "text": 5}\n')
    assert timeline()[0] == 2
    (run / "stories.jsonl").write_text("")
    assert "no story" in timeline()[1]
    rows = [dict(step=step, prompt="Once", text=f"Once {step}\n\nthen") for step in (0, 9, 20, 9)]
    (run / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "no story" in timeline()[1]
    assert timeline("--prompt", "Once") == (0, "") and out.read_text().count("**Once**") == 1
    (run / "milestone_000009.pt").touch()
    assert timeline("--prompt", "Once") == (0, "") and out.read_text().count("**Once**") == 2
    assert timeline("--prompt", "Once", "--all") == (0, "")
    assert out.read_text() == (
        "# Once ...\n\n## run\n\nstep 0, validation loss 5.5000\n\n> **Once** 0\n>\n> then\n\n"
        "step 9, validation loss 1.2500\n\n> **Once** 9\n>\n> then\n\n"
        "step 20, validation loss 1.2500 at step 9\n\n> **Once** 20\n>\n> then\n"
    )
    out.unlink()
    out.mkdir()
    command = [sys.executable, ROOT / "runs" / "timeline.py", run, "--out", out, "--prompt", "Once"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "Is a directory" in ended.stderr and ended.stderr.count("\n") == 1
