"""Checkpoints: opened without executing anything, whole or not at all, refused by name."""

import argparse
import dataclasses
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from test_model import random_model

import finetune as script

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def checkpoint_of(model):
    chars = "".join(chr(200 + i) for i in range(model.config.vocab_size))
    return {
        "format": 1,
        "config": dataclasses.asdict(model.config),
        "tokenizer": {"chars": chars},
        "model": model.state_dict(),
    }


@pytest.mark.parametrize("tie_weights", [False, True])
def test_saved_and_loaded_models_agree(tmp_path, tie_weights):
    model, path = random_model(tie_weights=tie_weights), str(tmp_path / "ckpt.pt")
    script.save_checkpoint(path, checkpoint_of(model))
    assert os.listdir(tmp_path) == ["ckpt.pt"]
    plain = torch.load(path, weights_only=True)
    assert not any("_orig_mod" in name for name in plain["model"]) and ("head" in plain["model"]) != tie_weights
    loaded = script.load_model(path, script.load_checkpoint(path), torch.device("cpu"), torch.float32)
    idx = torch.randint(100, (2, 10))
    with torch.no_grad():
        assert torch.equal(loaded(idx), model(idx))


def test_a_compiled_model_is_saved_under_the_same_names():
    model = random_model()
    names = list(model.state_dict())
    for block in model.blocks:
        block.compile()
    assert list(model.state_dict()) == names


class Bomb:
    def __reduce__(self):
        return os.system, ("touch executed",)


def refused(capsys, path):
    with pytest.raises(SystemExit) as stop:
        checkpoint = script.load_checkpoint(str(path))
        script.load_model(str(path), checkpoint, torch.device("cpu"), torch.float32)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and str(path) in message
    return message


def test_code_is_not_executed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "model": Bomb()}, tmp_path / "bomb.pt")
    assert "code" in refused(capsys, tmp_path / "bomb.pt")
    assert not (tmp_path / "executed").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    good = checkpoint_of(random_model())
    script.save_checkpoint(str(tmp_path / "good.pt"), good)
    data = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("It was a dark and stormy night")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({**good, "format": 2}, tmp_path / "future.pt")
    torch.save({**good, "config": {**good["config"], "n_layer": 5}}, tmp_path / "layers.pt")
    torch.save({**good, "config": {**good["config"], "colour": 1}}, tmp_path / "field.pt")
    torch.save({**good, "config": 5}, tmp_path / "number.pt")
    torch.save({k: v for k, v in good.items() if k != "model"}, tmp_path / "weightless.pt")
    torch.save({**good, "config": {**good["config"], "kind": "bigram"}}, tmp_path / "bigram.pt")
    for path in sorted(set(tmp_path.iterdir()) - {tmp_path / "good.pt"}):
        refused(capsys, path)
    refused(capsys, tmp_path / "missing.pt")
    refused(capsys, tmp_path)
    assert "bigram" in refused(capsys, tmp_path / "bigram.pt")


def test_the_folder_of_a_run_stands_for_its_best_or_newest_checkpoint(tmp_path):
    path = str(tmp_path)
    with pytest.raises(argparse.ArgumentTypeError, match="no checkpoint"):
        script.checkpoint_path(path)
    for name in ("ckpt_000999.pt", "ckpt_001000.pt", "ckpt_1000001.pt", "best.pt"):  # by steps, not by the alphabet
        (tmp_path / name).touch()
        (tmp_path / "ckpt_000001.pt.77.tmp").touch()
        assert script.checkpoint_path(path) == str(tmp_path / name)
    assert script.checkpoint_path("not there.pt") == "not there.pt"  # whoever opens it says so


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path):
    """A limit on the size of files stands in for the full disk: it fails at the same place."""
    path = tmp_path / "ckpt.pt"
    script.save_checkpoint(str(path), checkpoint_of(random_model()))
    before = path.read_bytes()
    code = f"import finetune, torch; finetune.save_checkpoint({str(path)!r}, {{'x': torch.zeros(1000000)}})"

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "whole" in done.stderr, done.stderr
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["ckpt.pt"]
