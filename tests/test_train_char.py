"""train_char.py as a user runs it, its variants, and its optimizer against torch.optim."""

import codecs
import contextlib
import inspect
import json
import signal
import subprocess
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call, refused
from test_train_gpt import popen

import train_char as script
import train_gpt

TALES = ROOT / "data" / "tales.txt"
PROMPT = "It was a dark and stormy night"
TINY = "--n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --max_iters 6 --max_new_tokens 40".split()


def train(out, *flags, **settings):
    return call("train_char.py", "--data", TALES, "--out_dir", out, *TINY, *flags, **settings)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_says_what_the_text_is_and_leaves_its_files(tmp_path):
    said = train(tmp_path, "--val_loss_every", 4)[0]
    text = TALES.read_text(encoding="utf-8").replace("\n<|endoftext|>\n", "\n\n")
    words = text.split()
    assert f"characters: {len(text):,}\nvocabulary: {len(set(text))} different characters: " in said
    assert f"most common: ' ', {text.count(' '):,} times\nleast common: " in said
    assert f"average word length: {sum(map(len, words)) / len(words):.2f} characters" in said
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert log.startswith((ROOT / "train_char.py").read_text(encoding="utf-8"))
    logged, [story] = rows(tmp_path / "log.jsonl"), rows(tmp_path / "stories.jsonl")
    assert [row["step"] for row in logged] == [4, 6]
    assert f"step:6/6 val_loss:{logged[1]['val_loss']:.4f} train_time" in log
    assert story["text"].startswith(PROMPT) and len(story["text"]) == len(PROMPT) + 40 and story["text"] in said
    assert {"id", "prompt", "text", "tokens", "seed", "checkpoint"} <= set(story)

    flags = "--max_new_tokens", 12, "--temperature", 0, "--dtype", "float32", "--prompt", "The "  # no more than fits
    story = call("train_char.py", "--init", tmp_path, "--max_iters", 0, *flags)[0]
    assert call("sample.py", tmp_path, *flags)[0] == story and story.startswith("The ")


def random_model(**changes):
    torch.manual_seed(0)
    model = script.Model(dict(vocab_size=5, block_size=8, n_layer=3, n_head=2, n_embd=16) | changes)
    for p in model.parameters():
        p.data.normal_(std=0.5)
    return model


@torch.no_grad()
def test_validation_is_the_mean_over_every_whole_window():
    model, data = random_model(), torch.randint(5, (8 * 300 + 4,))
    each = [F.cross_entropy(model(data[None, i : i + 8])[0], data[i + 1 : i + 9]) for i in range(0, 8 * 300, 8)]
    assert abs(script.validate(model, data, 8) - torch.stack(each).mean()) < 1e-5


@pytest.mark.parametrize("model", ["bigram", "gpt", "split", "flat"])
def test_every_kind_of_model_learns_and_goes_on(model, tmp_path):
    (tmp_path / "owl.txt").write_text("the owl and the fox. " * 300, encoding="utf-8")
    flags = "--data", tmp_path / "owl.txt", "--model", model, "--head_dropout", 0.2, "--embed_lr", 0.3, "--max_iters"
    said = train(tmp_path / "out", *flags, 60)[0]
    loss = rows(tmp_path / "out" / "log.jsonl")[-1]["val_loss"]
    assert loss < 1.2 < torch.tensor(15.0).log(), "15 characters, guessed better than blindly"
    story = said.split("\n\n")[-2]
    assert story.startswith("the owl and the fox."), "the default prompt has letters that the text lacks"
    again = call("train_char.py", "--init", tmp_path / "out", "--max_iters", 0, "--max_new_tokens", 40)
    assert again == [story + "\n", ""]
    call("sample.py", tmp_path / "out", "--prompt", "the", "--max_new_tokens", 3, code=0 if model == "gpt" else 2)
    train(tmp_path / "more", "--init", tmp_path / "out", *flags, 1, "--matrix_lr", 0, "--embed_lr", 0, "--head_lr", 0)
    assert rows(tmp_path / "more" / "log.jsonl")[0]["val_loss"] == pytest.approx(loss, abs=1e-6)


def block(split=False, head_dropout=0.0):
    torch.manual_seed(0)
    made = script.Block(32, 4, split, head_dropout)
    made.o.data.copy_(torch.eye(32))  # so that each head's output stays in its slice
    return made


def heads(block, x):
    """What each head adds to x (B, T, C): (B, T, H, D)."""
    still = torch.zeros(x.size(1), 4)
    return (block(x, still + 1, still) - x).unflatten(-1, (4, 8)).detach()  # not rotated


def test_head_dropout_drops_whole_heads_while_training_only():
    x, dropping = torch.randn(64, 8, 32), block(head_dropout=0.5)
    before = heads(block(), x)
    assert torch.equal(heads(dropping.eval(), x), before)
    after = heads(dropping.train(), x)
    kept = after.abs().sum((1, 3), keepdim=True) > 0  # (B, 1, H, 1)
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(after, 2 * before * kept, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_split_heads_see_only_their_slice(split):
    x = torch.randn(1, 3, 32)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    other = x.clone()
    other[..., :8] = -x[..., :8]  # the first head's slice; the norm of the whole is the same
    changed = ((heads(block(split), x) - heads(block(split), other)).abs() > 1e-4).any(-1)  # (1, 3, H)
    assert changed[..., 0].any() and changed[..., 1:].any() == (not split)


def test_flat_blocks_are_averaged_in_any_order():
    model, idx = random_model(kind="flat"), torch.randint(5, (2, 8))
    before = model(idx)
    model.blocks = model.blocks[::-1]
    torch.testing.assert_close(model(idx), before)


@pytest.mark.parametrize("shape", [(24, 24), (96, 24), (24, 96)])
def test_muon_is_that_of_torch(shape, monkeypatch):
    monkeypatch.setattr(script, "POLAR_EXPRESS", 5 * [(3.4445, -4.7750, 2.0315)])  # what torch.optim.Muon does
    torch.manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(shape)) for _ in range(2)]
    ours = torch.nn.Parameter(torch.stack([p.detach() for p in theirs]))  # a stack is stepped as its matrices are
    reference, m = torch.optim.Muon(theirs, lr=0.05, momentum=0.9, weight_decay=0.0), torch.zeros_like(ours)
    for _ in range(3):
        ours.grad = torch.randn(ours.shape)
        theirs[0].grad, theirs[1].grad = ours.grad.clone()
        before = ours.detach().clone()
        script.muon_step(ours, m, 0.05, 0.9)
        reference.step()
        expected = torch.stack([p.detach() for p in theirs])
        assert (ours - expected).norm() < 0.03 * (ours - before).norm(), "theirs is rounded to bf16"
        ours.data.copy_(expected)  # differences of rounding shall not add up


def test_adamw_is_that_of_train_gpt():
    assert inspect.getsource(script.adamw_step) == inspect.getsource(train_gpt.adamw_step)  # which is tested there


def test_documents_are_split_by_lines_of_endoftext(tmp_path):
    (tmp_path / "t.txt").write_bytes(codecs.BOM_UTF8 + b"one\r\n<|endoftext|>  \r\n<|endoftext|>\ntwo <|endoftext|>\n")
    assert script.read_text(tmp_path / "t.txt") == "one\n\ntwo <|endoftext|>\n"


def test_a_mistake_gets_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, data in dict(empty=b"", few=PROMPT.encode(), latin="stürmisch ".encode("latin-1") * 999).items():
        (tmp_path / f"{name}.txt").write_bytes(data)
    for flags, named in [
        ("--data no.txt", "No such file"),
        ("--data empty.txt", "empty"),
        ("--data few.txt", "too few"),
        ("--data latin.txt", "UTF-8"),
        ("--prompt Снег", "'Сген'"),
        ("--n_embd 30 --n_head 4", "--n_embd"),
    ]:
        assert named in refused("train_char.py", "--data", TALES, "--out_dir", "out", *flags.split())
    assert not (tmp_path / "out").exists()


@contextlib.contextmanager
def started(out, *flags):
    flags = "--data", TALES, "--out_dir", out, *TINY, "--max_iters", 10**6, "--val_loss_every", 0, *flags
    with popen("train_char.py", *flags, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert "step 1/" in process.stderr.readline()
        time.sleep(0.2)
        yield process


def test_an_interrupted_run_saves_and_a_run_is_replaced_only_by_a_good_one_that_is_asked_for(tmp_path):
    path, again = tmp_path / "ckpt.pt", ("--data", TALES, "--out_dir", tmp_path, *TINY)
    with started(tmp_path) as process:
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    step, before = torch.load(path, weights_only=True)["train"]["step"], path.read_bytes()
    assert rest.splitlines()[-1] == f"train_char.py: interrupted; {path} holds step {step}" and step > 0
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in rest
    assert "--overwrite" in refused("train_char.py", *again)
    said = train(tmp_path, "--overwrite", "--embed_lr", 1e38, "--matrix_lr", 1e30, "--val_loss_every", 3, code=1)[1]
    assert "lower the learning rates; nothing is saved" in said
    with started(tmp_path, "--overwrite") as process:  # it has learned nothing yet
        process.terminate()
        assert process.stderr.read().endswith("interrupted; nothing is saved\n")
    assert process.returncode == 143 and path.read_bytes() == before
    train(tmp_path, "--overwrite", "--model", "bigram")
    assert path.read_bytes() != before
