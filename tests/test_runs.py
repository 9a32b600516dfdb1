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
    """Exit code, stdout and stderr of a script."""
    environment = {**os.environ, "PYTHON": "python", "GPUS": "8", "OPENAI_API_KEY": "key", **environment}
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


def printed(script, *arguments):
    """The commands of a dry run, which needs neither key nor GPUs; torchrun under its name."""
    _, said, _ = call(RUNS / script, "--dry_run", *arguments, GPUS="0", OPENAI_API_KEY="")
    return [line.replace("python -m torch.distributed.run", "torchrun") for line in said.splitlines()]


@pytest.mark.parametrize("script, at", [("ghoul.sh --dpo", 4), ("speedrun.sh 7", 1)])
def test_every_command_of_a_dry_run_is_understood(monkeypatch, script, at):
    lines = printed(*script.split())
    for line in lines:
        if not line.startswith(("mkdir ", "grep ")):
            commands.parse(line)
    words = shlex.split(lines[at])
    monkeypatch.setattr(sys, "argv", words[words.index("train_gpt.py") :])
    flags, shards = train_gpt.get_flags(), [int(line.split()[-1]) for line in lines if "fineweb.py" in line]
    assert shards[0] * 10**8 > flags.max_iters * flags.total_batch_size
    if flags.tie_weights:
        assert 12 * flags.n_layer * flags.n_embd**2 + 50304 * flags.n_embd == 1_549_467_648


def test_the_journey_has_all_stages_and_each_reads_what_one_before_has_written():
    lines, made, stages = printed("ghoul.sh", "--dpo"), {"out/ghoul/best.jsonl"}, []
    assert printed("ghoul.sh") == [line for line in lines if "--method dpo" not in line]
    for line in lines[1:]:
        words = shlex.split(line)
        stages.append(next(word for word in words if word.endswith(".py")).split("/")[-1][:-3])
        for flag, word in zip(words, words[1:]):
            if flag in ("--text", "--out", "--out_dir", "--details", "--narrate"):
                made.add(word)
            elif word.startswith("out/"):
                assert word in made or os.path.dirname(word) in made, line
    expected = "prepare fineweb hellaswag train_gpt hellaswag finetune sample rank finetune finetune sample"
    assert stages == expected.split()


def test_what_is_missing_is_said_before_anything_is_done_until_a_stage_fails(tmp_path):
    """ghoul.sh where nothing else is but its input, and a Python that only notes what it is asked to do."""
    (tmp_path / "runs").mkdir()
    ghoul, stub = shutil.copy(RUNS / "ghoul.sh", tmp_path / "runs"), tmp_path / "python"
    stub.write_text(f'#!/bin/bash\n[ "$1" = -c ] && exit\necho "$*" >> {tmp_path}/calls\n[[ "$*" != *rank.py* ]]\n')
    stub.chmod(0o755)
    for arguments in ("gpu-1:29500", "gpu-1 2", "gpu-1:29500 two"):
        assert call(RUNS / "nodes.sh", *arguments.split())[0] == 2
    for name, value in [("xlsx", ""), ("OPENAI_API_KEY", ""), ("PYTHON", "false"), ("GPUS", "0"), ("GPUS", "7")]:
        code, said, complaints = call(ghoul, **{"PYTHON": str(stub), name: value})
        assert (code, said) == (2, "") and complaints.count("\n") == 1, (name, complaints)
        (tmp_path / "creepypastas.xlsx").touch()
    assert not (tmp_path / "out").exists() and not (tmp_path / "calls").exists()
    code, said, _ = call(ghoul, PYTHON=str(stub))
    done = [" ".join(shlex.split(line)[1:]) for line in said.splitlines()[1:]]
    assert code == 1 and (tmp_path / "calls").read_text().splitlines() == done and "rank.py" in done[-1]
