"""train_char.py as a user runs it, its variants, and its optimizer against torch.optim."""

import codecs
import contextlib
import inspect
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

import train_char as script
import train_gpt

ROOT = pathlib.Path(__file__).resolve().parent.parent
TALES = ROOT / "data" / "tales.txt"
TINY = "--n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --max_iters 6 --max_new_tokens 40".split()
PROMPT = "It was a dark and stormy night"


def run(name, *arguments, code=0, cwd=ROOT, **settings):
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=300, **settings)
    assert done.returncode == code, done.stderr
    return done


def refuse(*arguments, **settings):
    """The one line that a mistake gets."""
    done = run("train_char.py", *arguments, code=2, **settings)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("train_char.py: "), done.stderr
    return done.stderr


def train(out, *arguments, **settings):
    return run("train_char.py", "--out_dir", out, *TINY, *arguments, **settings)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run [v1]") / "char"
    return out, train(out, "--val_loss_every", 4)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "owl.txt"
    path.write_text("the owl and the fox. " * 300, encoding="utf-8")
    return path


def test_a_run_says_what_the_text_is_and_leaves_its_files(trained):
    out, done = trained
    text = TALES.read_text(encoding="utf-8").replace("\n<|endoftext|>\n", "\n\n")
    words = text.split()
    for line in (
        f"characters: {len(text):,}\nvocabulary: {len(set(text))} different characters: ",
        f"most common: ' ', {text.count(' '):,} times\nleast common: ",
        f"average word length: {sum(map(len, words)) / len(words):.2f} characters, over {len(words):,} words",
        f"first 200 characters: {text[:200]!r}\nencoded: [",
        f"decoded: {text[:20]!r}; the whole text comes back the same",
        f"{out}/ckpt.pt is saved; more stories: python sample.py {out} ",
    ):
        assert line in done.stdout
    assert "step 1/6  loss " in done.stderr
    log = (out / "log.txt").read_text(encoding="utf-8")
    assert log.startswith((ROOT / "train_char.py").read_text(encoding="utf-8")) and "PyTorch" in log
    rows = lines(out / "log.jsonl")
    assert [row["step"] for row in rows] == [4, 6] and f"step:6/6 val_loss:{rows[1]['val_loss']:.4f} train_time" in log
    [story] = lines(out / "stories.jsonl")
    assert story["text"].startswith(PROMPT) and len(story["text"]) == len(PROMPT) + 40 and story["text"] in done.stdout
    assert {"id", "prompt", "text", "tokens", "seed", "checkpoint"} <= set(story) and story["tokens"] == 40
    assert sorted(os.listdir(out)) == ["ckpt.pt", "log.jsonl", "log.txt", "stories.jsonl"]


def test_other_scripts_open_the_checkpoint(trained):
    out, _ = trained
    saved = torch.load(out / "ckpt.pt", weights_only=True)
    assert set(saved) == {"format", "config", "tokenizer", "model", "train"} and saved["train"]["step"] == 6
    ours, theirs = script.load(str(out), 0.0, torch.float32)[0], train_gpt.GPT(saved["config"])
    theirs.load_state_dict(saved["model"])
    idx = torch.randint(saved["config"]["vocab_size"], (3, 16))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx)[..., : saved["config"]["vocab_size"]], ours(idx))
    limits = "--max_new_tokens", 12, "--temperature", 0, "--dtype", "float32", "--prompt", "The "  # no more than fits
    greedy = run("train_char.py", "--init", out, "--max_iters", 0, *limits)
    assert run("sample.py", out, *limits).stdout == greedy.stdout and greedy.stdout.startswith("The ")


def test_validation_is_the_mean_over_every_whole_window():
    torch.manual_seed(0)
    model = script.Model(dict(vocab_size=5, block_size=8, n_layer=1, n_head=2, n_embd=8))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    data, total = torch.randint(5, (8 * 300 + 4,)), 0.0
    for start in range(0, 8 * 300, 8):
        logits = model(data[None, start : start + 8])[0].detach()
        total += F.cross_entropy(logits, data[start + 1 : start + 9], reduction="sum").item()
    assert abs(script.validate(model, data, 8) - total / (8 * 300)) < 1e-5


@pytest.mark.parametrize("model", ["bigram", "gpt", "split", "flat"])
def test_every_kind_of_model_learns_and_goes_on(model, short, tmp_path):
    flags = "--data", short, "--model", model, "--head_dropout", 0.2, "--embed_lr", 0.3, "--max_iters"
    done = train(tmp_path / "out", *flags, 60)
    loss = lines(tmp_path / "out" / "log.jsonl")[-1]["val_loss"]
    assert loss < 1.2 < torch.tensor(15.0).log(), "15 characters, guessed better than blindly"
    story = done.stdout.split("\n\n")[-2]
    assert story.startswith("the owl and the fox."), "the default prompt has letters that the text lacks"
    again = run("train_char.py", "--init", tmp_path / "out", "--max_iters", 0, "--max_new_tokens", 40)
    assert again.stdout == story + "\n" and again.stderr == ""
    run("sample.py", tmp_path / "out", "--prompt", "the", "--max_new_tokens", 3, code=0 if model == "gpt" else 2)
    train(tmp_path / "more", "--init", tmp_path / "out", *flags, 1, "--matrix_lr", 0, "--embed_lr", 0, "--head_lr", 0)
    assert lines(tmp_path / "more" / "log.jsonl")[0]["val_loss"] == pytest.approx(loss, abs=1e-6)


def test_bigram_reaches_the_entropy_of_its_pairs(tmp_path):
    (tmp_path / "text.txt").write_text("abcd" * 2000, encoding="utf-8")  # each is followed by one other only
    run("train_char.py", "--data", tmp_path / "text.txt", "--model", "bigram", "--out_dir", tmp_path / "o")
    assert lines(tmp_path / "o" / "log.jsonl")[-1]["val_loss"] < 0.01
    assert lines(tmp_path / "o" / "stories.jsonl")[0]["text"][:200] == "abcd" * 50


def block(split=False, head_dropout=0.0):
    torch.manual_seed(0)
    made = script.Block(32, 4, split, head_dropout)
    with torch.no_grad():
        made.o.copy_(torch.eye(32))  # so that each head's output stays in its slice
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
    torch.manual_seed(0)
    model = script.Model(dict(vocab_size=5, block_size=8, n_layer=3, n_head=2, n_embd=16, kind="flat"))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    idx = torch.randint(5, (2, 8))
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


def test_mistakes_get_one_line_and_leave_nothing(tmp_path, trained, short):
    def train(*arguments):
        return refuse("--out_dir", tmp_path / "out", *arguments)

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "few.txt").write_text(PROMPT)
    (tmp_path / "latin.txt").write_bytes("Die Nacht war stürmisch. ".encode("latin-1") * 100)
    assert "No such file" in train("--data", tmp_path / "no.txt") and "directory" in train("--data", tmp_path)
    assert "empty" in train("--data", tmp_path / "empty.txt") and "too few" in train("--data", tmp_path / "few.txt")
    assert "UTF-8" in train("--data", tmp_path / "latin.txt")
    assert "'Сген'" in train("--prompt", "Снег") and "--prompt" in train("--prompt", "")
    assert "--n_embd" in train("--n_embd", 30, "--n_head", 4)
    assert "'@'" in train("--init", trained[0], "--data", write(tmp_path / "at.txt", "a@ " * 999))
    for name, data in {"cut.pt": (trained[0] / "ckpt.pt").read_bytes()[:-999], "text.pt": b"It was"}.items():
        (tmp_path / name).write_bytes(data)
        assert f"{name}: no checkpoint" in train("--init", tmp_path / name)
    assert "no checkpoint" in train("--init", tmp_path / "nowhere")
    flipped = bytearray((trained[0] / "ckpt.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 64
    (tmp_path / "flipped.pt").write_bytes(flipped)
    assert "no checkpoint" in train("--init", tmp_path / "flipped.pt")
    assert not (tmp_path / "out").exists()


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_there_is_replaced_only_when_that_is_asked_for(tmp_path):
    out = tmp_path / "out"
    train(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "--overwrite" in refuse("--out_dir", out, "--model", "bigram", *TINY)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    # not with a model that is no longer any good, nor with one that has learned nothing yet
    done = train(out, "--overwrite", "--embed_lr", 1e38, "--matrix_lr", 1e30, "--val_loss_every", 3, code=1)
    assert "lower the learning rates; nothing is saved" in done.stderr and "Traceback" not in done.stderr
    with started(out, "--overwrite", "--val_loss_every", "0") as process:
        process.terminate()
        assert process.stderr.read().endswith("interrupted; nothing is saved\n")
    assert process.returncode == 143 and (out / "ckpt.pt").read_bytes() == before["ckpt.pt"]
    train(out, "--overwrite", "--model", "bigram")
    assert (out / "ckpt.pt").read_bytes() != before["ckpt.pt"]


@contextlib.contextmanager
def started(out, *flags):
    command = [sys.executable, "train_char.py", "--out_dir", out, *TINY, "--max_iters", "1000000", *flags]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert "step 1/" in process.stderr.readline()
        time.sleep(0.2)
        yield process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_holds_its_folder_until_then(tmp_path, number):
    with started(tmp_path, "--val_loss_every", "0") as process:
        assert "another run" in refuse("--out_dir", tmp_path, "--overwrite", *TINY)
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == 128 + number and "Traceback" not in rest
    step = torch.load(tmp_path / "ckpt.pt", weights_only=True)["train"]["step"]
    assert rest.splitlines()[-1] == f"train_char.py: interrupted; {tmp_path}/ckpt.pt holds step {step}" and step > 0
    assert not list(tmp_path.glob("*.tmp"))


def test_an_output_that_cannot_hold_a_character_does_not_end_the_run(tmp_path):
    text = write(tmp_path / "snow.txt", "Снег шёл всю ночь. " * 50)
    flags = "--data", str(text), "--out_dir", str(tmp_path / "o"), *TINY
    environment = os.environ | dict(PYTHONIOENCODING="cp1252")
    command = [sys.executable, "train_char.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "o" / "stories.jsonl")[0]["text"].startswith("Снег шёл всю ночь.")
