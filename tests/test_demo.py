"""The whole journey at its smallest, in a copy of the repository: killed on the way, it goes on to its end."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def demo(folder, *flags, until=None):
    """Run the demo; kill it, and all that it has started, when a line of its output has `until` in it."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    environment, output = dict(os.environ, OPENAI_API_KEY=""), ""
    with subprocess.Popen(["bash", "runs/demo.sh", *flags], cwd=folder, env=environment, **pipes) as process:
        for line in process.stdout:
            output += line
            if until and until in line:
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def test_the_journey_is_killed_and_goes_on(tmp_path):
    folder = tmp_path / "with a space"
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.*"), *ROOT.glob("runs/*.*")]:
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, folder / path.relative_to(ROOT))
    os.symlink(sys.prefix, folder / ".venv")
    assert demo(folder, "fast")[0] == 2
    code, output = demo(folder, "--quick", "--api", until="step:6/20")  # the first validation of pretraining
    assert code == -signal.SIGKILL and "no key" in output
    code, output = demo(folder, "--quick")
    assert code == 0 and output.count("is there already") == 9, output
    out = folder / "out" / "demo"
    text = (out / "timeline.md").read_text(encoding="utf-8")
    assert text in output and text.count("\n## ") == 6 and len(list((out / "gpt").glob("milestone_*.pt"))) == 4
    for row in map(json.loads, (out / "gpt" / "log.jsonl").open(encoding="utf-8")):
        if "val_loss" in row and (row["step"] % 6 == 0 or row["step"] == 20):  # those of the milestones
            assert f"step {row['step']}, validation loss {row['val_loss']:.4f} nats a token" in text
    assert [len((out / name).read_bytes().splitlines()) for name in ("stories.jsonl", "best.jsonl")] == [40, 10]
    assert (out / "curves.png").exists() and set(os.listdir(folder)) - {path.name for path in ROOT.iterdir()} <= {"out"}
