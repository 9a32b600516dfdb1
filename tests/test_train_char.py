"""train_char.py and sample.py as a user runs them."""

import json
import os
import pathlib
import pty
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import train_char as script

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = "--n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --max_iters 6 --max_new_tokens 40".split()
PROMPT = "It was a dark and stormy night"


def run(name, *arguments, code=0, cwd=ROOT, **settings):
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=300, **settings)
    assert done.returncode == code, done.stderr
    return done


def refuse(name, *arguments, **settings):
    """The one line that a mistake gets."""
    done = run(name, *arguments, code=2, **settings)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(name), done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("char")
    done = run("train_char.py", "--out_dir", out, *TINY, "--val_loss_every", 4)
    return out, done


def test_a_run_leaves_what_the_design_promises(trained):
    out, done = trained
    text = (ROOT / "data" / "tales.txt").read_text(encoding="utf-8").replace("\n<|endoftext|>\n", "\n\n")
    for line in (
        f"characters: {len(text):,}",
        f"vocabulary: {len(set(text))} ",
        f"first 200 characters: {text[:200]!r}",
    ):
        assert line in done.stdout
    assert f"most common: ' ', {text.count(' '):,} times" in done.stdout and "comes back the same" in done.stdout
    words = text.split()
    assert f"average word length: {sum(map(len, words)) / len(words):.2f} " in done.stdout
    assert "step 1/6  loss " in done.stderr and "\r" not in done.stderr
    log = (out / "log.txt").read_text(encoding="utf-8")
    assert log.startswith((ROOT / "train_char.py").read_text(encoding="utf-8")) and "PyTorch" in log
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [4, 6] and f"step:6/6 val_loss:{rows[1]['val_loss']:.4f} train_time" in log
    [story] = [json.loads(line) for line in (out / "stories.jsonl").read_text(encoding="utf-8").splitlines()]
    assert story["text"].startswith(PROMPT) and len(story["text"]) == len(PROMPT) + 40 and story["text"] in done.stdout
    assert set(story) == {"id", "prompt", "text", "tokens", "seed", "checkpoint"} and story["tokens"] == 40


def test_sample_goes_on_from_the_checkpoint(trained):
    out, done = trained
    story = json.loads((out / "stories.jsonl").read_text(encoding="utf-8"))
    settings = "--max_new_tokens", 40, "--dtype", "float32"  # auto is another type on some machines
    again = run("sample.py", out / "ckpt.pt", *settings, "--seed", story["seed"])
    assert again.stdout == story["text"] + "\n"
    limits = "--max_new_tokens", 30
    greedy = run("sample.py", out / "ckpt.pt", "--temperature", 0, *limits).stdout
    assert greedy == run("sample.py", out / "ckpt.pt", "--top_k", 1, "--seed", 5, *limits).stdout
    unlimited = run("sample.py", out / "ckpt.pt", "--top_k", 0, *limits).stdout
    assert unlimited == run("sample.py", out / "ckpt.pt", "--top_k", 500, *limits).stdout != greedy


def test_validation_is_the_mean_over_every_character_once():
    model = script.GPT(script.Config(5, 8, 1, 2, 8))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    data = torch.randint(5, (8 * 300 + 4,))
    total = 0.0
    for start in range(0, len(data) - 1, 8):
        x, y = data[start : start + 8], data[start + 1 : start + 9]
        logits = model(x[None, : len(y)])[0].detach()
        total += torch.nn.functional.cross_entropy(logits, y, reduction="sum").item()
    assert abs(script.validate(model, data, 8) - total / (len(data) - 1)) < 1e-5


@pytest.mark.parametrize("model", ["bigram", "split", "flat"])
def test_every_kind_of_model_learns_and_writes(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the owl and the fox. " * 300, encoding="utf-8")
    rest = ["--head_dropout", 0.2] if model != "bigram" else []
    arguments = ["--input", text, "--model", model, "--out_dir", tmp_path / "out", "--prompt", "the owl", *TINY, *rest]
    done = run("train_char.py", *arguments, "--max_iters", 60, "--embed_lr", 0.3)
    losses = [json.loads(line)["val_loss"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 1.2 < torch.tensor(15.0).log(), "15 characters, guessed better than blindly"
    assert "the owl" in done.stdout.splitlines()[-1]
    assert "only train_char.py runs" in refuse("sample.py", tmp_path / "out" / "ckpt.pt", "--prompt", "the")


def test_bigram_reaches_the_entropy_of_its_pairs(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcd" * 2000, encoding="utf-8")  # each character is followed by one other only
    run("train_char.py", "--input", text, "--model", "bigram", "--out_dir", tmp_path, "--prompt", "ab")
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["val_loss"] < 0.01
    assert json.loads((tmp_path / "stories.jsonl").read_text())["text"][:8] == "abcdabcd"


def test_head_dropout_drops_whole_heads_while_training_only():
    torch.manual_seed(0)
    block = script.DropHeads(script.Config(5, 8, 1, 4, 32))
    block.p = 0.5
    q = k = v = torch.randn(64, 4, 8, 8)
    kept = block.attend(q, k, v, None).abs().sum((-2, -1)) > 0
    assert 0.4 < kept.float().mean() < 0.6 and kept.any(1).any()
    plain = script.Block.attend(block, q, k, v, None)
    assert torch.equal(block.eval().attend(q, k, v, None), plain)
    block.train()
    assert (block.attend(q, k, v, None)[kept := block.attend(q, k, v, None).abs().sum((-2, -1)) > 0] != 0).any()


def test_split_heads_see_only_their_slice():
    torch.manual_seed(0)
    block = script.SplitBlock(script.Config(5, 8, 1, 4, 32))
    x = torch.randn(1, 3, 32)
    other = x.clone()
    other[..., :8] += 1.0  # the first head's slice
    changed = (block.project(x) != block.project(other)).view(3, 3, 4, 8).any(-1)  # (T, q k v, H)
    assert changed[..., 0].all() and not changed[..., 1:].any()


def test_flat_blocks_are_averaged_in_any_order():
    torch.manual_seed(0)
    model = script.FlatGPT(script.Config(5, 8, 3, 2, 16))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    idx = torch.randint(5, (2, 8))
    before = model(idx)
    model.blocks = model.blocks[::-1]
    torch.testing.assert_close(model(idx), before)


def test_presets_are_the_settings_of_the_post():
    post = script.PRESETS["post"]
    assert {k: post["gpt"][k] for k in ("n_embd", "block_size", "n_layer", "n_head", "max_iters")} == {
        "n_embd": 64,
        "block_size": 32,
        "n_layer": 4,
        "n_head": 4,
        "max_iters": 5000,
    }
    assert post["bigram"]["max_iters"] == 10000


def test_mistakes_get_one_line(tmp_path, trained):
    def train(*arguments):
        return refuse("train_char.py", "--out_dir", tmp_path / "out", *arguments)

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text(PROMPT)
    (tmp_path / "latin.txt").write_bytes("Die Nacht war stürmisch. ".encode("latin-1") * 100)
    assert "no.txt: No such file" in train("--input", tmp_path / "no.txt")
    assert "empty" in train("--input", tmp_path / "empty.txt")
    assert "too few" in train("--input", tmp_path / "short.txt")
    assert "UTF-8" in train("--input", tmp_path / "latin.txt")
    assert "directory" in train("--input", tmp_path)
    assert "--prompt" in train("--prompt", "Снег") and "--prompt" in train("--prompt", "")
    assert "--n_embd" in train("--n_embd", 30, "--n_head", 4)
    assert "--max_iters" in train("--max_iters", 0) and "--temperature" in train("--temperature", -1)
    assert "--batch_size" in train("--batch_size", "many") and "--model" in train("--model", "rnn")
    assert "--colour" in train("--colour", "red")
    assert not (tmp_path / "out").exists(), "a mistake leaves nothing behind"
    (tmp_path / "file").write_text("")
    assert "--out_dir" in refuse("train_char.py", "--out_dir", tmp_path / "file" / "out", *TINY)
    if not torch.cuda.is_available():
        assert "--device cuda" in train("--device", "cuda")

    ckpt = trained[0] / "ckpt.pt"
    assert "'é'" in refuse("sample.py", ckpt, "--prompt", "café") and "--prompt" in refuse(
        "sample.py", ckpt, "--prompt", ""
    )
    assert "not a checkpoint" in refuse("sample.py", tmp_path / "short.txt")
    assert "checkpoint" in refuse("sample.py")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    done = run("train_char.py", "--out_dir", tmp_path, *TINY, "--embed_lr", 1e38, "--matrix_lr", 1e30, code=1)
    assert "lower --matrix_lr" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_its_checkpoint(tmp_path, name):
    command = [sys.executable, "train_char.py", "--out_dir", tmp_path, *TINY, "--max_iters", "1000000"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert "step 1/" in process.stderr.readline()
        time.sleep(0.2)
        process.send_signal(name)
        rest = process.stderr.read()
    assert process.returncode == 130 and str(tmp_path / "ckpt.pt") in rest.splitlines()[-1] and "Traceback" not in rest
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["train"]["step"] > 0
    assert not list(tmp_path.glob("*.tmp"))
    run("sample.py", tmp_path / "ckpt.pt", "--max_new_tokens", 5)


def test_a_terminal_gets_one_line_that_is_written_over(tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "train_char.py", "--out_dir", tmp_path, *TINY]
    process = subprocess.Popen(command, cwd=ROOT, stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 1000)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    assert process.wait() == 0 and b"\rstep 1/6" in shown and b"tokens/s" in shown and b"ETA" in shown


def test_a_reader_that_leaves_is_no_error(trained):
    command = f"{sys.executable} sample.py {trained[0] / 'ckpt.pt'} --max_new_tokens 3000 | head -c 5"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == PROMPT[:5] and done.stderr == ""


def test_a_full_disk_behind_the_output_gets_one_line(trained):
    for flags in (["--max_new_tokens", "3"], ["--max_new_tokens", "3", "--num", "2"]):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "sample.py", trained[0] / "ckpt.pt", *flags]
            done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
        assert done.returncode == 1 and done.stderr == "sample.py: No space left on device\n"


def test_a_script_copied_elsewhere_still_works(tmp_path, trained):
    (tmp_path / "sample.py").write_bytes((ROOT / "sample.py").read_bytes())
    command = [sys.executable, "sample.py", str(trained[0] / "ckpt.pt"), "--max_new_tokens", "3"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300).returncode == 0


def test_help_shows_the_defaults():
    text = run("train_char.py", "--help").stdout
    assert "python train_char.py --model bigram" in text and "(default: 0.8)" in text and "None" not in text
    assert "(default: 128)" in text and "(default: 32)" in run("train_char.py", "--preset", "post", "--help").stdout
    assert "python sample.py" in run("sample.py", "--help").stdout


def test_compiled_and_plain_runs_agree(tmp_path):
    losses = []
    for i, flag in enumerate(("--compile", "--no-compile")):
        run("train_char.py", "--out_dir", tmp_path / str(i), *TINY, flag)
        losses.append(json.loads((tmp_path / str(i) / "log.jsonl").read_text())["val_loss"])
    assert abs(losses[0] - losses[1]) < 1e-3


def test_a_full_disk_gets_one_line(tmp_path):
    """A limit on the size of files stands in for the full disk: the log is the first to feel it."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = run("train_char.py", "--out_dir", tmp_path, *TINY, code=1, preexec_fn=limit)
    assert "File too large" in done.stderr and "Traceback" not in done.stderr
