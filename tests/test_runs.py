"""The scripts in runs/: what they would carry out is understood, what is missing is said before anything is done."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import commands
import pytest

import train_gpt

RUNS = pathlib.Path(__file__).resolve().parent.parent / "runs"


def call(script, *arguments, **environment):
    """Exit code, stdout and stderr of a script; an environment of None: not set."""
    environment = {**os.environ, "PYTHON": "python", "GPUS": "8", "OPENAI_API_KEY": "key", **environment}
    environment = {name: str(value) for name, value in environment.items() if value is not None}
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


def printed(script, *arguments):
    """The commands of a dry run, which needs neither key nor GPUs; torchrun under its name."""
    code, said, complaints = call(RUNS / script, "--dry_run", *arguments, GPUS=None, OPENAI_API_KEY=None)
    assert code == 0 and not complaints
    return [line.replace("python -m torch.distributed.run", "torchrun") for line in said.splitlines()]


def scripts(lines):
    return [next((word for word in shlex.split(line) if word.endswith(".py")), line.split()[0]) for line in lines]


def value(line, flag):
    words = shlex.split(line)
    return words[words.index(flag) + 1]


def pretraining(monkeypatch, line):
    """The flags of train_gpt.py in a command."""
    words = shlex.split(line)
    monkeypatch.setattr(sys, "argv", words[words.index("train_gpt.py") :])
    return train_gpt.get_flags()


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_are_shell(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert "\nset -euo pipefail\n" in path.read_text()


@pytest.mark.parametrize("script, arguments", [("ghoul.sh", ["--dpo"]), ("speedrun.sh", []), ("speedrun.sh", ["7"])])
def test_every_command_of_a_dry_run_is_understood(script, arguments):
    for line in printed(script, *arguments):
        if not line.startswith(("mkdir ", "grep ")):
            commands.parse(line)


def test_the_journey_has_all_stages_and_each_reads_what_one_before_has_written(monkeypatch):
    lines, made = printed("ghoul.sh", "--dpo"), set()
    stages = "mkdir data/prepare.py data/fineweb.py data/hellaswag.py train_gpt.py hellaswag.py finetune.py sample.py "
    stages += "rank.py finetune.py finetune.py sample.py"
    assert scripts(lines) == stages.split()
    assert printed("ghoul.sh") == [line for line in lines if "--method dpo" not in line]
    for line in lines[1:]:
        words = shlex.split(line)
        for flag, word in zip(words, words[1:]):
            if flag in ("--text", "--out", "--out_dir", "--details", "--narrate"):
                made.add(word)
            elif word.startswith("out/"):
                assert word in made or os.path.dirname(word) in made, line
        if "rank.py" in words:
            made.add("out/ghoul/best.jsonl")
    flags = pretraining(monkeypatch, lines[4])
    assert int(lines[2].split()[-1]) * 10**8 > flags.max_iters * flags.total_batch_size == 7_499_612_160
    assert 12 * flags.n_layer * flags.n_embd**2 + 50304 * flags.n_embd == 1_549_467_648 and flags.tie_weights


def test_a_speedrun_is_of_the_seeds_that_are_named(monkeypatch):
    lines = printed("speedrun.sh", "7", "11")
    assert scripts(lines) == ["data/fineweb.py", "train_gpt.py", "train_gpt.py", "grep", "grep"]
    assert [value(line, "--seed") for line in lines[1:3]] == ["7", "11"]
    assert len({value(line, "--out_dir") for line in lines[1:3]}) == 2
    assert len(printed("speedrun.sh")) == 7
    flags = pretraining(monkeypatch, lines[1])
    assert int(lines[0].split()[-1]) * 10**8 > flags.max_iters * flags.total_batch_size


@pytest.fixture
def ghoul(tmp_path):
    """ghoul.sh where nothing else is but its input, and a Python that only notes what it is asked to do."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "creepypastas.xlsx").touch()
    (tmp_path / "python").write_text(
        f'#!/bin/bash\n[ "$1" = -c ] && exit\necho "$*" >> {tmp_path}/calls\n[[ "$*" != *$FAILS* ]]\n'
    )
    (tmp_path / "python").chmod(0o755)
    return pathlib.Path(shutil.copy(RUNS / "ghoul.sh", tmp_path / "runs"))


def calls(ghoul):
    return (ghoul.parent.parent / "calls").read_text().splitlines()


def test_what_is_printed_is_carried_out_until_a_stage_fails(ghoul):
    stub = ghoul.parent.parent / "python"
    code, said, _ = call(ghoul, PYTHON=stub, FAILS="train_gpt.py")
    assert code == 1 and len(said.splitlines()) == 5 and "train_gpt.py" in calls(ghoul)[-1]
    code, said, _ = call(ghoul, PYTHON=stub, FAILS="nothing")
    assert code == 0
    expected = [" ".join(shlex.split(line)[1:]) for line in said.splitlines()[1:]]
    assert calls(ghoul)[4:] == expected and len(expected) == 10
    assert [line.replace(f"{stub} -m torch.distributed.run", "torchrun") for line in said.splitlines()[1:]] == [
        line.replace("python ", f"{stub} ") for line in printed("ghoul.sh")[1:]
    ]


def test_what_is_made_once_is_not_made_again(ghoul):
    folder = ghoul.parent.parent
    (folder / "out" / "ghoul").mkdir(parents=True)
    for name in ("stories.txt", "story.mp3"):
        (folder / "out" / "ghoul" / name).touch()
    assert call(ghoul, PYTHON=folder / "python", FAILS="nothing")[0] == 0
    assert len(calls(ghoul)) == 8 and not any("prepare.py" in line or "--narrate" in line for line in calls(ghoul))


def test_what_is_missing_is_said_before_anything_is_done(ghoul):
    folder = ghoul.parent.parent
    stub, none = folder / "python", folder / "none"
    none.write_text("#!/bin/bash\nexit 1\n")
    none.chmod(0o755)

    def refused(word, *arguments, script=ghoul, **environment):
        code, said, complaints = call(script, *arguments, **{"PYTHON": stub, **environment})
        assert (code, said) == (2, "") and complaints.count("\n") == 1 and word in complaints, complaints

    refused("OPENAI_API_KEY", OPENAI_API_KEY=None)
    refused("OPENAI_API_KEY", OPENAI_API_KEY="")
    refused("pip install openpyxl", PYTHON=none)
    refused("no GPU", GPUS=0)
    refused("480", GPUS=7)
    refused("GPUS='all'", GPUS="all")
    refused("--dryrun", "--dryrun")
    refused("no GPU", script=RUNS / "speedrun.sh", GPUS=0)
    refused("'one' is not a seed", "one", script=RUNS / "speedrun.sh")
    (folder / "creepypastas.xlsx").unlink()
    refused("thomaskonstantin/3500-popular-creepypastas")
    assert not (folder / "out").exists() and not (folder / "calls").exists()
