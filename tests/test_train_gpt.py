"""train_gpt.py: its parts against other people's; then as a user runs it, on several processes, killed and resumed."""

import fcntl
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call
from test_model import as_nanochat, random_model

import train_gpt as script

CPU, T, V = torch.device("cpu"), 32, 257
TINY = (
    "--device cpu --dtype float32 --train_files train_*.bin --val_files val_*.bin --tokenizer bytes "
    "--n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --batch_size 4 --total_batch_size 512 --max_iters 20 "
    "--warmdown_frac 0.5 --matrix_lr 0.03 --embed_lr 0.3 --head_lr 0.01 --val_tokens 1000 --val_loss_every 0 "
    "--sample_every 0 --save_every 0"
).split()
SLOW = "--sample_every 1 --max_new_tokens 60".split()  # a story after each step leaves time to interrupt the run
ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1"}
WORDS = "tea the a kettle she boils, then pours. it slowly; naïve Über cups — and walks away [step] now".split()


# --- what other tests use, too ---


def write_shard(path, tokens):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


def random_questions(count, longest):
    """Questions of HellaSwag's form, their endings of so many words and their contexts of twice as many at most."""
    chance, rows = random.Random(0), []
    for _ in range(count):
        lengths = [chance.randint(1, most) for most in (2 * longest, *[longest] * 4)]
        ctx, *endings = [" ".join(chance.choices(WORDS, k=length)) + str(i) for i, length in enumerate(lengths)]
        row = dict(activity_label="Tea", ctx=ctx, ctx_a=ctx, ctx_b="", endings=endings, label=chance.randrange(4))
        rows.append(json.dumps(row) + "\n")
    return rows


def popen(script, *arguments, ranks=1, **settings):
    """`python SCRIPT ARGUMENTS` in the background, or torchrun with so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else ()), ROOT / script, *arguments]
    return subprocess.Popen(list(map(str, command)), **dict(env=ENVIRONMENT) | settings)


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.0005)


# --- runs ---


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder in which everything runs: shards and questions, then a folder for each run."""
    work = tmp_path_factory.mktemp("gpt")
    tokens = np.fromfile(ROOT / "data" / "plain.txt", np.uint8).astype("<u2")
    tokens[::100] = 256
    parts = np.split(tokens, np.cumsum([3000, 1, 2500, 700, 900, 600]))  # 20 steps go round
    for name, part in zip("train_0 train_1 train_2 train_3 val_0 val_1".split(), parts):
        write_shard(work / f"{name}.bin", part)
    (work / "data").mkdir()
    (work / "data" / "hellaswag_val.jsonl").write_text("".join(random_questions(7, 6)))
    return work


def start(work, out, *flags, script=("train_gpt.py", *TINY), **settings):
    """A run in the background; what it says goes to OUT.txt."""
    with open(work / f"{out}.txt", "w") as said:
        pipes = dict(stdout=said, stderr=subprocess.STDOUT)
        return popen(*script, "--out_dir", out, *flags, cwd=work, **pipes, **settings)


def train(work, out, *flags, code=0, script=("train_gpt.py", *TINY), **settings):
    """A run from start to end, in this process if no other is asked for; returns what it said."""
    if not settings:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(work)
            return "".join(call(*script, "--out_dir", out, *flags, code=code))
    with start(work, out, *flags, script=script, **settings) as process:
        ended = process.wait()
    said = (work / f"{out}.txt").read_text()
    assert ended == code, said
    return said


def load(out):
    return torch.load(out / "ckpt.pt", weights_only=True)


def step_of(out):
    return load(out)["train"]["step"] if (out / "ckpt.pt").exists() else 0


def rows(out, key):
    """The values of a key in log.jsonl by step: a resumed run may have logged one twice."""
    lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    found = {row["step"]: row[key] for row in map(json.loads, lines) if key in row}
    return dict(sorted(found.items()))


def losses(out):
    """The training loss of each step, then the last validation loss."""
    return [*rows(out, "train_loss").values(), *[*rows(out, "val_loss").values()][-1:]]


def assert_same_end(out, reference):
    ours, theirs = load(out), load(reference)
    assert ours["train"]["step"] == theirs["train"]["step"] and losses(out) == losses(reference)
    torch.testing.assert_close(ours["model"], theirs["model"], atol=0, rtol=0)
    for key in ("moments", "squares"):
        torch.testing.assert_close(ours["train"][key], theirs["train"][key], atol=0, rtol=0)


@pytest.fixture(scope="module")
def runs(work):
    """The same training four ways, never interrupted."""
    train(work, "one")
    train(work, "smaller", "--batch_size", 3, env={**ENVIRONMENT, "WORLD_SIZE": "8"})  # as some shells have it set
    train(work, "two", "--hellaswag_every", 20, ranks=2)
    train(work, "four", ranks=4)
    return work


def stop(work, out, number, ranks=1):
    """The folder of a run that is told to stop after some steps."""
    out = work / out
    with start(work, out.name, *SLOW, ranks=ranks) as process:
        wait_for(lambda: len(rows(out, "step")) > 3, process)
        process.send_signal(number)
        code = process.wait()
    assert code == 128 + number if ranks == 1 else code != 0
    step = step_of(out)
    assert 3 < step < 20 and len(losses(out)) == step
    assert f"interrupted; {out.name}/ckpt.pt holds step {step}" in (work / f"{out.name}.txt").read_text()
    return out


@pytest.fixture(scope="module")
def halfway(work):
    return stop(work, "halfway", signal.SIGINT)


# --- parts ---


@pytest.mark.parametrize("shape", [(24, 24), (96, 24), (24, 96)])
def test_muon_and_adamw_are_those_of_torch(shape, monkeypatch):
    monkeypatch.setattr(script, "POLAR_EXPRESS", [(3.4445, -4.7750, 2.0315)] * 5)  # what torch.optim.Muon repeats
    torch.manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    moments, squares = [torch.zeros(shape) for _ in range(3)], torch.zeros(shape)
    muon = torch.optim.Muon(theirs[:2], lr=0.05, momentum=0.9, weight_decay=0.1)
    adamw = torch.optim.AdamW(theirs[2:], lr=0.3, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
    for step in range(5):
        before = [p.detach().clone() for p in ours]
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(shape)
            q.grad = p.grad.clone()
        script.muon_step(ours[:2], moments[:2], 0.05, 0.9, 0.1, torch.bfloat16)
        script.adamw_step(ours[2], moments[2], squares, step + 1, 0.3)
        muon.step()
        adamw.step()
        torch.testing.assert_close(ours[2], theirs[2])
        for p, q, m, old in zip(ours[:2], theirs, moments, before):
            assert (p - q).norm() < 0.02 * (q - old).norm(), "bf16 rounding explains a hundredth, no more"
            torch.testing.assert_close(m, muon.state[q]["momentum_buffer"])
            p.data.copy_(q)  # differences of rounding shall not add up


def test_shards_are_one_stream_that_goes_round(tmp_path):
    tokens = np.random.default_rng(0).integers(V, size=2300)
    for i, part in enumerate(np.split(tokens, [1000, 1001, 2000])):
        write_shard(tmp_path / f"a_{i}.bin", part)
    shards, endless = script.Shards(str(tmp_path / "a_*.bin"), "--train_files", V), np.concatenate([tokens] * 6)
    starts = 0, 1, 998, 999, 1000, 1001, 1999, 2000, 2299, 2300, 4601
    for position, (B, length) in itertools.product(starts, ((1, 1), (2, 1), (3, 500), (2, 2500))):
        x, y = shards.batch(position, B, length, CPU)
        assert np.array_equal(x.flatten(), endless[position : position + B * length])
        assert np.array_equal(y.flatten(), endless[position + 1 : position + B * length + 1])


# --- training and evaluation ---


def test_any_number_of_processes_and_rows_gives_the_same_losses(runs):
    reference = losses(runs / "one")
    assert len(reference) == 21 and reference[0] == pytest.approx(np.log(V), abs=1e-4) and reference[-1] < 4
    for out in ("smaller", "two", "four"):
        np.testing.assert_allclose(losses(runs / out), reference, atol=1e-4, rtol=0)
    log = (runs / "one" / "log.txt").read_text(encoding="utf-8")
    assert log.startswith((ROOT / "train_gpt.py").read_text(encoding="utf-8"))
    assert f"step:20/20 val_loss:{reference[-1]:.4f} train_time:" in log
    rates = [round(lr / 0.03, 6) for lr in rows(runs / "one", "lr").values()]
    assert rates == [1.0] * 11 + [n / 10 for n in range(9, 0, -1)]


def test_evaluation_changes_nothing_and_leaves_rows_stories_and_milestones(runs):
    cadences = "--val_loss_every 3 --hellaswag_every 4 --sample_every 5 --max_new_tokens 9 --milestone_every 6"
    train(runs, "evaluated", *cadences.split(), "--save_every", 2)
    out = runs / "evaluated"
    assert_same_end(out, runs / "one")
    assert [*rows(out, "val_loss")] == [3, 6, 9, 12, 15, 18, 20]
    accuracies = rows(out, "hellaswag_norm")
    assert [*accuracies] == [4, 8, 12, 16, 20] and rows(runs / "two", "hellaswag_norm") == {20: accuracies[20]}
    stories = [json.loads(line) for line in (out / "stories.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [story["step"] for story in stories] == [5, 10, 15, 20]
    assert all(story["text"].startswith(story["prompt"]) and 0 < story["tokens"] <= 9 for story in stories)
    assert all({"id", "prompt", "text", "tokens", "seed", "checkpoint"} < set(story) for story in stories)
    assert sorted(path.name[-5:-3] for path in out.glob("milestone_*.pt")) == ["06", "12", "18", "20"]
    last = torch.load(out / "milestone_000020.pt", weights_only=True)
    torch.testing.assert_close(last["model"], load(out)["model"], atol=0, rtol=0)
    train(runs, "target", "--val_loss_every", 3, "--target_loss", rows(out, "val_loss")[6])
    assert step_of(runs / "target") == 6 and losses(runs / "target")[:6] == losses(out)[:6]


@torch.no_grad()
def test_validation_loss_is_the_mean_over_the_first_tokens(runs):
    model = script.GPT(load(runs / "one")["config"])
    model.load_state_dict(load(runs / "one")["model"])
    theirs, shards = as_nanochat(model), script.Shards(str(runs / "val_*.bin"), "--val_files", V)
    files = [np.fromfile(runs / f"val_{i}.bin", "<u2", offset=1024) for i in (0, 1)]
    tokens = torch.from_numpy(np.concatenate(files).astype(np.int64))
    each = [theirs(tokens[None, i : i + T]).logits[0] for i in range(0, 1500, T)]
    each = F.cross_entropy(torch.cat(each)[:-1], tokens[1:], reduction="none")  # (1499,)
    assert abs(losses(runs / "one")[-1] - each[:1000].mean()) < 1e-5 < abs(each[:1000].mean() - each[:992].mean())
    for val_tokens in (1, 33, 512, 10**9):
        assert abs(script.validate(model, shards, val_tokens, 4, T, CPU, 0, 1) - each[:val_tokens].mean()) < 1e-5


@torch.no_grad()
def test_hellaswag_is_that_of_transformers():
    model, questions = random_model(block_size=96), list(map(json.loads, random_questions(40, 4)))
    theirs, right = as_nanochat(model), 0
    for question in questions:
        means, endings = [], [list(f" {ending}".encode()) for ending in question["endings"]]
        context = list(question["ctx"].encode())[-(97 - max(map(len, endings))) :]
        for ending in endings:
            logits = theirs(torch.tensor([context + ending[:-1]])).logits[0, len(context) - 1 :]
            means.append(F.cross_entropy(logits, torch.tensor(ending)).item())
        right += np.argmin(means) == question["label"]
    assert 0 < right < 40
    arguments = model, script.get_tokenizer("bytes"), questions, CPU
    assert script.hellaswag(*arguments, 0, 1) == right / 40
    assert sum(script.hellaswag(*arguments, rank, 3) for rank in range(3)) == pytest.approx(right / 40)


# --- interrupted and resumed ---


def test_kills_at_any_moment_change_nothing(runs):
    chance, out = random.Random(0), runs / "killed"
    for kill in range(8):
        before = step_of(out)
        with start(runs, "killed", "--save_every", 1, "--resume", *SLOW) as process:
            wait_for(lambda least=before: step_of(out) > least, process)
            if kill % 2:
                wait_for((out / "ckpt.pt.tmp").exists, process)  # in the middle of a save
            else:
                time.sleep(chance.uniform(0, 0.1))
            process.kill()
        assert process.returncode == -signal.SIGKILL
    assert "resumed from" in train(runs, "killed", "--resume")
    assert_same_end(out, runs / "one")


def test_a_run_that_was_told_to_stop_goes_on_with_any_number_of_processes(runs, halfway):
    for ranks in (1, 4):
        out = shutil.copytree(halfway, runs / f"on_{ranks}")
        assert "resumed from" in train(runs, out.name, "--resume", ranks=ranks)
    np.testing.assert_allclose(losses(runs / "on_4"), losses(runs / "one"), atol=1e-4, rtol=0)
    assert_same_end(runs / "on_1", runs / "one")
    out = stop(runs, "stopped", signal.SIGTERM, ranks=2)
    train(runs, "stopped", "--resume", ranks=2)
    assert_same_end(out, runs / "two")


def test_a_compiled_run_goes_on_with_the_same_bits(work):
    flags, settings = ("--n_layer", 1, "--compile"), dict(env={**ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": str(work)})
    with start(work, "compiled", *flags, *SLOW, "--save_every", 1, **settings) as process:
        wait_for(lambda: step_of(work / "compiled") > 3, process)
        shutil.copytree(work / "compiled", work / "compiled_half")
        assert process.wait() == 0
    assert "resumed from" in train(work, "compiled_half", *flags, "--resume", **settings)
    assert_same_end(work / "compiled_half", work / "compiled")


# --- what goes wrong ---


def test_a_full_disk_is_called_one_and_leaves_the_last_checkpoint(runs, halfway):
    """A limit on the size of files stands in for the full disk: it fails at the same place."""
    out = shutil.copytree(halfway, runs / "full")
    limit = resource.RLIMIT_FSIZE, (100_000, 100_000)
    said = train(runs, "full", "--resume", code=1, preexec_fn=lambda: resource.setrlimit(*limit))
    last = said.splitlines()[-1]
    assert "File too large" in last and "after step 20; full/ckpt.pt holds step" in last and "Traceback" not in said
    assert (out / "ckpt.pt").read_bytes() == (halfway / "ckpt.pt").read_bytes()


def test_a_mistake_gets_one_line(runs, halfway):
    before = (halfway / "ckpt.pt").read_bytes()
    flipped, moment = bytearray(before), load(halfway)["train"]["moments"][0]
    flipped[flipped.index(moment.numpy().tobytes()) + 5] ^= 64
    (shutil.copytree(halfway, runs / "flipped") / "ckpt.pt").write_bytes(flipped)
    (runs / "old").mkdir()
    torch.save({"format": 1}, runs / "old" / "ckpt_000010.pt")
    good = (runs / "val_0.bin").read_bytes()
    shards = dict(header=good[:1000], short=good[:-2], long=good + b"\0\0", magic=b"!" + good[1:])
    shards["beyond"] = good[:1024] + b"\xff" * (len(good) - 1024)
    for name, data in shards.items():
        (runs / f"{name}.bin").write_bytes(data)
    for out, flags, named in [
        ("halfway", "", "--resume goes on with it, --overwrite replaces it"),
        ("halfway", "--resume --matrix_lr 0.3", "matrix_lr 0.03, not 0.3"),
        ("halfway", "--resume --train_files train_0.bin", "train_files train_*.bin, not train_0.bin"),
        ("flipped", "--resume", "damaged"),
        ("old", "--resume", "another script or version"),
        ("new", "--total_batch_size 500", "--total_batch_size 500"),
        ("new", "--n_head 3", "--n_head 3"),
        *[("new", f"--val_files {name}.bin", f"{name}.bin") for name in (*shards, "none")],
    ]:
        said = train(runs, out, *flags.split(), code=2)
        assert said.startswith("train_gpt.py: ") and said.count("\n") == 1 and named in said, said
    with open(halfway / "log.txt", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # as a run does
        assert "another run is at work there" in train(runs, "halfway", "--overwrite", code=2)
    assert (halfway / "ckpt.pt").read_bytes() == before and not (runs / "new").exists()
    rates = "--overwrite", "--matrix_lr", 1e38, "--embed_lr", 1e38, "--head_lr", 1e38
    assert "the loss is nan at step" in train(runs, "old", *rates, code=1)
    assert not (runs / "old" / "ckpt.pt").exists()
