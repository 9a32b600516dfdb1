"""Checkpoints of every kind: opened without executing anything, whole or not at all, refused by name."""

import os

import pytest
import torch

import finetune as script


def checkpoint_of(**changes):
    torch.manual_seed(0)
    config = dict(vocab_size=257, block_size=24, n_layer=3, n_head=2, n_embd=32)
    model = script.GPT(config | dict(tie_weights=False, embed_norm=True, logit_softcap=15.0) | changes)
    return dict(format=1, config=config | changes, tokenizer="bytes", model=model.state_dict())


@pytest.mark.parametrize("changes", [{}, dict(tie_weights=True), dict(embed_norm=False, logit_softcap=0.0)])
def test_a_model_is_opened_as_what_it_was(tmp_path, changes):
    good = checkpoint_of(**changes)
    torch.save(good, tmp_path / "ckpt.pt")
    path, _, model, tokenizer = script.open_checkpoint(str(tmp_path / "ckpt.pt"))
    assert path == str(tmp_path / "ckpt.pt") and tokenizer.n_vocab == 257
    assert model.config == dict(tie_weights=False, embed_norm=True, logit_softcap=15.0) | good["config"]
    torch.testing.assert_close(dict(model.state_dict()), dict(good["model"]), atol=0, rtol=0)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch executed",)


def refused(capsys, path):
    with pytest.raises(SystemExit) as stop:
        script.open_checkpoint(str(path))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and str(path) in message


def test_code_is_not_executed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint_of() | dict(model=Bomb()), tmp_path / "bomb.pt")
    refused(capsys, tmp_path / "bomb.pt")
    assert not (tmp_path / "executed").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    good = checkpoint_of()
    torch.save(good, tmp_path / "good.pt")
    data = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("It was a dark and stormy night")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, changes in {
        "layers": dict(config=good["config"] | dict(n_layer=5)),
        "width": dict(config=good["config"] | dict(n_embd=30)),
        "number": dict(config=5),
        "characters": dict(tokenizer={"chars": "abc"}),
        "tokens": dict(tokenizer="gpt2"),
        "weights": dict(model={}),
        "step": dict(train=7),
    }.items():
        torch.save(good | changes, tmp_path / f"{name}.pt")
    torch.save({key: value for key, value in good.items() if key != "model"}, tmp_path / "weightless.pt")
    for path in sorted(set(tmp_path.iterdir()) - {tmp_path / "good.pt"}):
        refused(capsys, path)
    with pytest.raises(FileNotFoundError):  # run() makes a line of it
        script.open_checkpoint(str(tmp_path / "missing.pt"))


def test_the_folder_of_a_run_stands_for_its_checkpoint(tmp_path):
    torch.save(checkpoint_of(), tmp_path / "ckpt.pt")
    (tmp_path / "milestone_000999.pt").touch()
    assert script.open_checkpoint(str(tmp_path))[0] == str(tmp_path / "ckpt.pt")
