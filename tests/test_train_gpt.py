"""train_gpt.py as a user runs it: on several processes, killed and resumed, evaluated against other implementations."""

import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model import as_nanochat

import sample
import train_gpt as script

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = (
    "--preset demo --device cpu --dtype float32 --train_files train_*.bin --val_files val_*.bin "
    "--n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --batch_size 4 --total_batch_size 512 --max_iters 20 "
    "--warmdown_iters 10 --val_tokens 1000 --val_loss_every 0 --sample_every 0 --save_every 0"
).split()
LARGER = "--n_layer 3 --n_embd 128 --block_size 64 --total_batch_size 1024 --max_iters 60".split()
SLOW = "--sample_every 1 --max_new_tokens 60".split()  # a story after each step leaves time to interrupt the run
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
T, V = 32, 257
COUNTS = (3000, 0, 2500, 700)  # fewer tokens than 20 steps take: the stream goes round
QUESTION = dict(
    activity_label="Tea", ctx="She boils", ctx_a="She boils", ctx_b="", endings=["a", "b", "c", "d"], label=2
)


def write_shard(path, tokens, magic=20240520, version=1):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


def write_questions(path, count):
    chance = random.Random(0)

    def text(most):
        return " ".join("".join(chance.choices("aeioulnrst", k=chance.randint(1, 6))) for _ in range(most))

    rows = []
    for _ in range(count):
        ctx, endings = text(chance.randint(2, 14)), [text(chance.randint(1, 4)) for _ in range(4)]
        rows.append(
            dict(activity_label="Tea", ctx=ctx, ctx_a=ctx, ctx_b="", endings=endings, label=chance.randrange(4))
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder in which everything runs: shards and questions, then one folder for each run."""
    work = tmp_path_factory.mktemp("gpt")
    lines = (ROOT / "data" / "plain.txt").read_bytes().splitlines()
    tokens = np.concatenate([np.frombuffer(line, np.uint8).astype("<u2") for line in lines])
    tokens[::100] = 256
    start = 0
    for i, count in enumerate(COUNTS):
        write_shard(work / f"train_{i}.bin", tokens[start : start + count])
        start += count
    write_shard(work / "val_0.bin", tokens[start : start + 900])
    write_shard(work / "val_1.bin", tokens[start + 900 : start + 1500])
    write_questions(work / "questions.jsonl", 7)
    return work


def start(work, out, *flags, ranks=1, launcher=(), **environment):
    """A run in the background; what it says goes to OUT.txt."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *launcher]
    command = [sys.executable, *(torchrun if ranks > 1 else ()), ROOT / "train_gpt.py", *TINY, "--out_dir", out, *flags]
    with open(work / f"{out}.txt", "w") as said:
        environment = {**ENVIRONMENT, **environment}
        return subprocess.Popen(
            list(map(str, command)), cwd=work, stdout=said, stderr=subprocess.STDOUT, env=environment
        )


def train(work, out, *flags, code=0, timeout=300, **settings):
    """A run from start to end; returns what it said. A code of None: any."""
    with start(work, out, *flags, **settings) as process:
        try:
            process.wait(timeout)
        finally:
            process.kill()
    said = (work / f"{out}.txt").read_text()
    assert code in (None, process.returncode), said
    return said


@pytest.fixture(scope="module", autouse=True)
def offline(work):
    """A run whose questions cannot be downloaded, begun before all else: it tries for half a minute."""
    proxies = {name: "http://127.0.0.1:9" for name in ("HTTPS_PROXY", "https_proxy")} | {"NO_PROXY": "", "no_proxy": ""}
    with start(work, "offline", "--hellaswag_every", 1, "--hellaswag_data", "none.jsonl", **proxies) as process:
        yield process
        process.kill()


def at_once(*calls):
    """The results of calls that share the processors."""
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        return [future.result() for future in [pool.submit(*call) for call in calls]]


def wait_for(condition, process):
    """Until the condition holds; what it gives."""
    while not (found := condition()):
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.0005)
    return found


def steps_saved(out):
    return sorted(int(path.stem[5:]) for path in out.glob("ckpt_*.pt"))


def newest(out):
    return max(steps_saved(out), default=0)


def load(out, step=20):
    return torch.load(out / f"ckpt_{step:06d}.pt", weights_only=True)


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    found = [(row["step"], row["train_loss"]) for row in rows(out) if "train_loss" in row]
    assert [step for step, _ in found] == list(range(1, len(found) + 1)), "each step once, in order"
    return [loss for _, loss in found]


def last_val_loss(out):
    return [row["val_loss"] for row in rows(out) if "val_loss" in row][-1]


def assert_same_end(out, reference, step=20):
    ours, theirs = load(out, step), load(reference, step)
    assert ours["train"]["next"][:2] == theirs["train"]["next"][:2]  # step and place in the stream
    for a, b in (ours["model"], theirs["model"]), (ours["train"]["optimizer"], theirs["train"]["optimizer"]):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert losses(out) == losses(reference) and len(losses(out)) == step
    assert last_val_loss(out) == last_val_loss(reference)


def assert_near(out, reference):
    np.testing.assert_allclose(losses(out), losses(reference), atol=1e-4, rtol=0)
    assert abs(last_val_loss(out) - last_val_loss(reference)) < 1e-4 and len(losses(out)) == 20


@pytest.fixture(scope="module")
def runs(work):
    """The same training four ways, never interrupted."""

    def on(out, ranks, *flags):
        train(work, out, *flags, ranks=ranks)

    at_once((on, "one", 1), (on, "smaller", 1, "--batch_size", 3, "--save_every", 10))
    at_once((on, "two", 2, "--save_every", 10), (on, "four", 4))
    return work


def begin_at(runs, source, out, step=10):
    """A folder as if the run `source` had been stopped after a step."""
    (runs / out).mkdir()
    for name in (f"ckpt_{step:06d}.pt", "log.jsonl", "log.txt"):
        shutil.copy(runs / source / name, runs / out / name)
    return runs / out


# --- shards ---


def refused(capsys, code, call, *arguments):
    """The one line that a mistake gets."""
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    message = capsys.readouterr().err
    assert stop.value.code == code and message.count("\n") == 1, message
    return message


def test_shards_are_one_stream_that_goes_round(tmp_path):
    tokens = np.random.default_rng(0).integers(V, size=2300)
    for i, part in enumerate(np.split(tokens, [1000, 1000, 1001, 2000])):  # the second is empty
        write_shard(tmp_path / f"a_{i}.bin", part)
    shards = script.Shards(str(tmp_path / "a_*.bin"), "--train_files", V)
    assert shards.counts == [1000, 0, 1, 999, 300]
    endless = np.concatenate([tokens] * 5)
    for position, n in itertools.product(
        (0, 1, 998, 999, 1000, 1001, 1999, 2000, 2299, 2300, 4601), (1, 2, 3, 1500, 5000)
    ):
        assert np.array_equal(shards.read(position, n).numpy(), endless[position : position + n])
    chunks = [shards.read(position, 77).numpy() for position in range(0, 77 * 100, 77)]
    assert np.array_equal(np.concatenate(chunks), endless[:7700])


def test_batches_are_inputs_and_the_tokens_after_them(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(50))
    x, y = script.get_batch(script.Shards(str(tmp_path / "a.bin"), "", V), 45, 2, 4, torch.device("cpu"))
    assert x.tolist() == [[45, 46, 47, 48], [49, 0, 1, 2]] and y.tolist() == [[46, 47, 48, 49], [0, 1, 2, 3]]


def test_a_token_outside_the_vocabulary_is_named_when_it_is_read(tmp_path, capsys):
    write_shard(tmp_path / "a_0.bin", np.arange(100))
    write_shard(tmp_path / "a_1.bin", [5, V, 5])
    shards = script.Shards(str(tmp_path / "a_*.bin"), "--train_files", V)
    assert len(shards.read(0, 101)) == 101
    assert "a_1.bin: token 257 " in refused(capsys, 2, shards.read, 90, 12)


def test_what_is_no_shard_is_named(tmp_path, capsys):
    write_shard(tmp_path / "magic.bin", np.arange(9), magic=20240521)
    write_shard(tmp_path / "version.bin", np.arange(9), version=2)
    write_shard(tmp_path / "good.bin", np.arange(9))
    good = (tmp_path / "good.bin").read_bytes()
    (tmp_path / "header.bin").write_bytes(good[:1000])
    (tmp_path / "nothing.bin").write_bytes(b"")
    (tmp_path / "short.bin").write_bytes(good[:-2])
    (tmp_path / "odd.bin").write_bytes(good[:-1])
    (tmp_path / "long.bin").write_bytes(good + b"\0\0")
    (tmp_path / "folder.bin").mkdir()
    (tmp_path / "gone.bin").symlink_to(tmp_path / "elsewhere.bin")
    bad = sorted(set(tmp_path.iterdir()) - {tmp_path / "good.bin"})
    assert len(bad) == 9
    for path in bad:
        message = refused(capsys, 2, script.Shards, str(path), "--val_files", V)
        assert str(path) in message and "--val_files" in message
    assert "folder.bin" in refused(capsys, 2, script.Shards, str(tmp_path / "*.bin"), "--val_files", V)


def test_without_tokens_a_message_says_how_to_make_some(tmp_path, capsys):
    write_shard(tmp_path / "empty.bin", [])
    for name in ("no.bin", "no_*.bin", "empty.bin"):
        message = refused(capsys, 2, script.Shards, str(tmp_path / name), "--train_files", V)
        assert name in message and "data/fineweb.py" in message and "data/prepare.py" in message


# --- the same losses ---


def test_any_number_of_processes_and_rows_gives_the_same_losses(runs):
    reference = losses(runs / "one")
    assert len(reference) == 20 and reference[0] == pytest.approx(np.log(V), abs=1e-4) and reference[-1] < 4
    for out in ("smaller", "two", "four"):
        assert_near(runs / out, runs / "one")
    assert "on 4 x cpu" in (runs / "four.txt").read_text() and "8 x 2 rows" in (runs / "smaller.txt").read_text()


@pytest.mark.parametrize("source, ranks", [("two", 1), ("smaller", 2)])
def test_a_run_goes_on_with_another_number_of_processes(runs, source, ranks):
    out = begin_at(runs, source, f"{source}_on_{ranks}")
    assert "resumed from" in train(runs, out.name, "--resume", ranks=ranks)
    assert losses(out)[:10] == losses(runs / source)[:10] and steps_saved(out) == [10, 20]
    assert_near(out, runs / "one")


def test_a_run_says_what_it_does(runs):
    said = (runs / "one.txt").read_text()
    assert "train_3.bin is shorter than those before it: 700 tokens, all of them used" in said
    assert "val_1.bin is shorter than those before it: 600 tokens" in said
    assert "step 1/20  loss 5.54" in said and "MFU n/a" in said and "ckpt_000020.pt" in said.splitlines()[-1]
    assert f"step:20/20 val_loss:{last_val_loss(runs / 'one'):.4f} train_time:" in said
    log = (runs / "one" / "log.txt").read_text(encoding="utf-8")
    assert log.startswith((ROOT / "train_gpt.py").read_text(encoding="utf-8")) and "step:20/20 val_loss" in log
    steps = [row for row in rows(runs / "one") if "train_loss" in row]
    assert all(row["mfu"] is None and row["tokens_per_s"] > 0 for row in steps)
    assert [round(row["lr"] / 0.03, 6) for row in steps] == [1.0] * 11 + [n / 10 for n in range(9, 0, -1)]


def test_known_peaks_are_positive():
    assert all(peak > 0 for peak in script.PEAKS.values()) and script.PEAKS["NVIDIA H200"] == 989
    assert script.PEAKS.get("cpu") is None and script.PEAKS.get("") is None


# --- evaluation ---

EVALUATED = (
    "--val_loss_every 3 --hellaswag_every 4 --hellaswag_data questions.jsonl --sample_every 5 --max_new_tokens 9 "
    "--save_every 2 --milestone_every 6"
).split()


@pytest.fixture(scope="module")
def evaluated(runs):
    train(runs, "evaluated", *EVALUATED)
    return runs / "evaluated"


def test_evaluation_changes_nothing(runs, evaluated):
    assert_same_end(evaluated, runs / "one")


def test_evaluation_leaves_rows_stories_and_checkpoints(evaluated):
    found = {key: [row["step"] for row in rows(evaluated) if key in row] for key in ("val_loss", "hellaswag")}
    assert found == {"val_loss": [3, 6, 9, 12, 15, 18, 20], "hellaswag": [4, 8, 12, 16, 20]}
    for row in rows(evaluated):
        if "hellaswag" in row:
            assert row["questions"] == 7
            assert all((7 * row[key]) % 1 == pytest.approx(0) for key in ("hellaswag", "hellaswag_norm"))
    stories = [json.loads(line) for line in (evaluated / "stories.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [story["step"] for story in stories] == [5, 10, 15, 20] and stories[0]["prompt"] == stories[3]["prompt"]
    assert all(story["text"].startswith(story["prompt"]) and 0 < story["tokens"] <= 9 for story in stories)
    assert all(set(story) == {"id", "step", "prompt", "text", "tokens", "seed", "checkpoint"} for story in stories)
    files = {"log.txt", "log.jsonl", "stories.jsonl", "ckpt_000018.pt", "ckpt_000020.pt"}
    assert set(os.listdir(evaluated)) == files | {f"milestone_{step:06d}.pt" for step in (6, 12, 18, 20)}


def test_milestones_are_weights_that_sample_opens(evaluated):
    path = evaluated / "milestone_000018.pt"
    milestone = torch.load(path, weights_only=True)
    assert "optimizer" not in milestone["train"] and milestone["train"]["step"] == 18
    torch.testing.assert_close(milestone["model"], load(evaluated, 18)["model"], atol=0, rtol=0)
    command = [sys.executable, ROOT / "sample.py", path, "--max_new_tokens", "5", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=ENVIRONMENT)
    assert done.returncode == 0 and done.stdout.startswith("It was a dark and stormy night"), done.stderr


def test_validation_loss_is_the_mean_over_the_first_tokens(runs):
    path = str(runs / "one" / "ckpt_000020.pt")
    model = sample.load_model(path, sample.load_checkpoint(path), torch.device("cpu"), torch.float32)
    theirs = as_nanochat(model)
    stream = np.concatenate([np.fromfile(runs / f"val_{i}.bin", "<u2", offset=1024) for i in (0, 1)]).astype(np.int64)
    tokens = torch.from_numpy(stream)
    shards = script.Shards(str(runs / "val_*.bin"), "--val_files", V)

    def expected(n):
        total = 0.0
        for begin in range(0, n, T):
            end = min(begin + T, n)
            logits = theirs(tokens[None, begin:end]).logits[0]
            total += F.cross_entropy(logits, tokens[begin + 1 : end + 1], reduction="sum").item()
        return total / n

    with torch.no_grad():
        assert abs(last_val_loss(runs / "one") - expected(1000)) < 1e-5
        assert expected(1000) != pytest.approx(expected(992), abs=1e-5), "the last window counts"
        for val_tokens, n in ((1, 1), (33, 33), (512, 512), (1499, 1499), (1500, 1499), (10**9, 1499)):
            assert abs(script.validate(model, shards, val_tokens, 4, T, 0, 1) - expected(n)) < 1e-5
        halves = [script.validate(model, shards, 1000, 4, T, rank, 2) for rank in (0, 1)]
        assert abs(sum(halves) - expected(1000)) < 1e-5 and min(halves) > 0


def test_a_target_that_is_reached_ends_the_run(runs, evaluated):
    target = next(row["val_loss"] for row in rows(evaluated) if row.get("step") == 6 and "val_loss" in row)
    said = train(runs, "target", "--val_loss_every", 3, "--save_every", 5, "--target_loss", target)
    assert "step:6/20 val_loss" in said and said.count("target reached") == 1
    assert steps_saved(runs / "target") == [5, 6] and losses(runs / "target") == losses(runs / "one")[:6]


# --- interrupted and resumed ---


def kill_ten_times(work, out, in_a_save):
    """kill -9 at moments decided by chance, or while a checkpoint is written; then let the run come to its end."""
    chance, kills, starts = random.Random(in_a_save), 0, 0
    while kills < 10:
        starts += 1
        assert starts < 30, "saves are over before they can be met"
        before = newest(work / out)
        with start(work, out, *LARGER, "--save_every", 1, "--resume") as process:
            try:
                wait_for((work / f"{out}.txt").read_text, process)
                more = before + chance.randrange(4)
                wait_for(lambda least=more: newest(work / out) >= least, process)
                unfinished = f"ckpt_*.{process.pid}.tmp"
                if in_a_save:
                    wait_for(lambda pattern=unfinished: list((work / out).glob(pattern)), process)
                else:
                    time.sleep(chance.uniform(0, 0.1))
                assert process.poll() is None, "the run ended before it could be killed"
            finally:
                process.kill()
        assert process.returncode == -signal.SIGKILL
        kills += not in_a_save or bool(list((work / out).glob(unfinished)))  # was still being written
    said = train(work, out, *LARGER, "--save_every", 1, "--resume")
    assert "resumed from" in said and newest(work / out) == 60


def test_twenty_kills_change_nothing(work):
    at_once(
        (train, work, "larger", *LARGER),
        (kill_ten_times, work, "killed", False),
        (kill_ten_times, work, "killed_in_saves", True),
    )
    for out in ("killed", "killed_in_saves"):
        assert_same_end(work / out, work / "larger", 60)
        assert steps_saved(work / out) == [59, 60]


def test_what_a_kill_left_of_a_save_is_removed(runs):
    out = begin_at(runs, "smaller", "left")
    (out / "ckpt_000011.pt.4194305.tmp").write_bytes(b"half")  # no process has this id
    train(runs, "left", "--batch_size", 3, "--resume")
    assert not list(out.glob("*.tmp"))


def test_a_damaged_checkpoint_is_passed_over(runs):
    out = begin_at(runs, "smaller", "damaged")
    whole = (runs / "smaller" / "ckpt_000020.pt").read_bytes()
    (out / "ckpt_000020.pt").write_bytes(whole[: len(whole) // 2])
    said = train(runs, "damaged", "--batch_size", 3, "--resume")
    assert "ckpt_000020.pt: is not a checkpoint" in said and "ckpt_000010.pt at step 10" in said
    assert_same_end(out, runs / "smaller")


def test_a_damaged_checkpoint_takes_no_place_of_a_new_one(runs):
    out = begin_at(runs, "smaller", "damaged_later")
    (out / "ckpt_000020.pt").write_bytes(b"")
    train(runs, out.name, "--resume", "--keep", 1, "--max_iters", 12)
    assert 12 in steps_saved(out) and load(out, 12)["train"]["step"] == 12


def test_checkpoints_that_cannot_be_opened_are_not_removed(runs):
    out = begin_at(runs, "smaller", "unknown")
    torch.save({**load(out, 10), "format": 2}, out / "ckpt_000010.pt")
    before = (out / "ckpt_000010.pt").read_bytes()
    train(runs, out.name, "--resume", code=None)
    assert (out / "ckpt_000010.pt").exists() and (out / "ckpt_000010.pt").read_bytes() == before


def test_a_checkpoint_without_its_optimizer_gets_one_line(runs):
    out = begin_at(runs, "smaller", "stateless")
    checkpoint = load(out, 10)
    del checkpoint["train"]["optimizer"]
    torch.save(checkpoint, out / "ckpt_000010.pt")
    said = train(runs, out.name, "--resume", code=None)
    assert "stateless/ckpt_000010.pt" in said.splitlines()[0] and "Traceback" not in said


def test_a_run_that_is_past_its_last_step_ends(runs):
    out = begin_at(runs, "smaller", "past")
    train(runs, "past", "--resume", "--max_iters", 8, code=None, timeout=30)
    assert steps_saved(out) == [10] and len(losses(out)) <= 20


def interrupt(runs, out, number):
    with start(runs, out, *SLOW) as process:
        try:
            wait_for(lambda: (runs / out / "log.jsonl").exists() and len(rows(runs / out)) > 3, process)
            process.send_signal(number)
            process.wait(60)
        finally:
            process.kill()
    [step] = steps_saved(runs / out)
    last = (runs / f"{out}.txt").read_text().splitlines()[-1]
    assert process.returncode == 128 + number
    assert last.startswith("train_gpt.py: interrupted") and f"{out}/ckpt_{step:06d}.pt" in last
    assert 3 < step < 20 and len(losses(runs / out)) == step
    train(runs, out, "--resume")
    assert_same_end(runs / out, runs / "one")


def test_a_run_that_is_told_to_stop_saves_and_goes_on_later(runs):
    at_once((interrupt, runs, "sigterm", signal.SIGTERM), (interrupt, runs, "sigint", signal.SIGINT))


def test_a_compiled_run_goes_on_with_the_same_bits(work):
    flags, cache = ("--n_layer", 1, "--compile"), {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
    train(work, "compiled", *flags, **cache)
    with start(work, "compiled_killed", *flags, *SLOW, "--save_every", 1, **cache) as process:
        try:
            wait_for(lambda: newest(work / "compiled_killed") > 3, process)
        finally:
            process.kill()
    assert newest(work / "compiled_killed") < 20
    assert "resumed from" in train(work, "compiled_killed", *flags, "--resume", **cache)
    assert_same_end(work / "compiled_killed", work / "compiled")


def worker(out, rank):
    """The id of the process that runs a rank."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # others' processes, and those that have just ended
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
            if out.encode() in arguments and b"RANK=%d" % rank in variables:
                return int(folder.name)


def kill_a_worker(work, out, *launcher):
    """kill -9 the second of two workers; the exit code of the command that started them."""
    with start(work, out, *SLOW, "--save_every", 1, "--resume", ranks=2, launcher=launcher) as process:
        try:
            wait_for(lambda: newest(work / out) > 2, process)
            os.kill(worker(out, 1), signal.SIGKILL)
            assert newest(work / out) < 18
            return process.wait(120)
        finally:
            process.terminate()


def test_torchrun_starts_a_lost_worker_again(runs):
    assert kill_a_worker(runs, "restarted", "--max-restarts=2") == 0
    assert "resumed from" in (runs / "restarted.txt").read_text()
    assert_same_end(runs / "restarted", runs / "two")


def test_a_lost_worker_ends_the_others(runs):
    assert kill_a_worker(runs, "lost") != 0
    step = newest(runs / "lost")
    checkpoint = load(runs / "lost", step)
    assert 2 < step < 20 and checkpoint["train"]["step"] == step and "ckpt_0000" in (runs / "lost.txt").read_text()
    assert all(p.isfinite().all() for p in checkpoint["model"].values())


def test_a_loss_that_is_not_finite_ends_the_run(runs):
    out = begin_at(runs, "smaller", "infinite")
    rates = "--matrix_lr", 1e38, "--embed_lr", 1e38, "--head_lr", 1e38
    said = train(runs, "infinite", "--resume", "--max_iters", 40, *rates, code=1)
    message = said.splitlines()[-1]
    assert message.startswith("train_gpt.py: the loss is nan at step 1") and "lower the rates" in message
    assert "infinite/ckpt_000010.pt is the last good checkpoint" in message and "Traceback" not in said
    assert steps_saved(out) == [10] and all(p.isfinite().all() for p in load(out, 10)["model"].values())


def test_weights_that_are_not_finite_are_not_saved(runs):
    out = begin_at(runs, "smaller", "infinite_weights")
    rates = "--matrix_lr", 1e38, "--embed_lr", 1e38, "--head_lr", 1e38
    said = train(
        runs, "infinite_weights", "--resume", "--save_every", 1, "--keep", 9, "--max_iters", 40, *rates, code=1
    )
    assert "last good checkpoint" in said.splitlines()[-1] and "Traceback" not in said
    for step in steps_saved(out):
        assert all(p.isfinite().all() for p in load(out, step)["model"].values())


# --- refused ---


@pytest.fixture(scope="module")
def mistakes(runs):
    """What each mistake gets, all of them tried at once."""
    for out in ("earlier", "overwritten", "wider", "words"):
        shutil.copytree(runs / "smaller", runs / out)
    (runs / "file").write_text("")
    (runs / "milestones").mkdir()
    (runs / "milestones" / "milestone_000010.pt").write_bytes(b"weights")
    tries = {
        "earlier": [],
        "milestones": [],
        "wider": ["--resume", "--n_embd", 64],
        "words": ["--resume", "--tokenizer", "gpt2"],
        "uneven": ["--total_batch_size", 500],
        "heads": ["--n_head", 3],
        "file": [],
    }

    def attempt(out, flags):
        return train(runs, out, *flags, code=2)

    said = at_once(*((attempt, out, flags) for out, flags in tries.items()))
    assert all(text.startswith("train_gpt.py: ") and text.count("\n") == 1 for text in said), said
    return dict(zip(tries, said))


def test_an_earlier_run_is_not_overwritten_unasked(runs, mistakes):
    for out in ("earlier", "milestones"):
        assert all(word in mistakes[out] for word in ("earlier", "--resume", "--overwrite"))
    assert (runs / "milestones" / "milestone_000010.pt").read_bytes() == b"weights"
    for name in os.listdir(runs / "smaller"):
        for out in ("earlier", "wider", "words"):
            assert (runs / out / name).read_bytes() == (runs / "smaller" / name).read_bytes()
    for name in ("ckpt_000099.pt", "milestone_000010.pt"):
        (runs / "overwritten" / name).write_bytes(b"")
    train(runs, "overwritten", "--overwrite")
    assert steps_saved(runs / "overwritten") == [20] and "resumed" not in (runs / "overwritten.txt").read_text()
    assert not list((runs / "overwritten").glob("milestone_*"))
    assert_same_end(runs / "overwritten", runs / "one")


def test_a_run_is_resumed_as_what_it_was(mistakes):
    assert "wider/ckpt_000020.pt has n_embd 32, the flags say 64" in mistakes["wider"]
    assert (
        "words/ckpt_000020.pt has" in mistakes["words"] and "257" in mistakes["words"] and "50257" in mistakes["words"]
    )


def test_sizes_that_do_not_fit_are_named(mistakes):
    assert "--total_batch_size 500: not a multiple of 32" in mistakes["uneven"]
    assert "--n_embd 32" in mistakes["heads"] and "n_head 3" in mistakes["heads"]
    assert "--out_dir file" in mistakes["file"]


def test_without_a_network_hellaswag_can_be_left_out(work, offline):
    assert offline.wait(120) == 2
    said = (work / "offline.txt").read_text()
    message = said.splitlines()[-1]
    assert message.startswith("train_gpt.py: ") and "none.jsonl: cannot reach raw.githubusercontent.com" in message
    assert "--hellaswag_every 0" in message and "Traceback" not in said and not (work / "none.jsonl").exists()


# --- presets ---


def model_of(preset, **changes):
    """A preset's model without memory behind it."""
    settings = {**script.PRESETS[preset], **changes}
    vocab_size = {"gpt2": 50257, "bytes": V}[settings["tokenizer"]]
    names = {"block_size", "n_layer", "n_head", "n_embd", "tie_weights", "embed_norm", "logit_softcap"} & set(settings)
    with torch.device("meta"):
        return script.GPT(script.Config(vocab_size, **{name: settings[name] for name in names}))


def test_presets_have_the_sizes_of_their_names():
    size = {preset: sum(p.numel() for p in model_of(preset).parameters()) for preset in script.PRESETS}
    assert size["1.5B"] == 52 * 12 * 1536**2 + 50304 * 1536
    assert 120e6 < size["124M"] < 170e6 and size["demo"] < 5e6
    for preset in script.PRESETS.values():
        assert preset["total_batch_size"] % preset["block_size"] == 0
        assert preset["warmup_iters"] + preset["warmdown_iters"] <= preset["max_iters"]


def test_the_large_preset_takes_the_steps_of_the_original():
    preset, names = script.PRESETS["1.5B"], ("matrix_lr", "down_lr", "embed_lr")
    model = model_of("1.5B", n_layer=1)
    rates = [preset[name] for name in names] + [0.0]
    optimizer = script.Optimizer(model, *rates, 0.95, preset["weight_decay"], (0.8, 0.95), torch.float32)
    muon = [group for group in optimizer.groups if group["step"] is script.muon_step]
    matrices = {name: (p.shape[-2:], group["lr"]) for group in muon for name, p in zip(group["names"], group["params"])}
    assert set(matrices) == {f"blocks.0.{name}" for name in ("qkv", "o", "up", "down")}
    for (height, width), lr in matrices.values():
        original = 0.1 * 0.0018 * max(height, width) ** 0.5
        assert lr * max(1, height / width) ** 0.5 == pytest.approx(original, rel=0.01)


# --- HellaSwag ---


def random_model(window=24):
    torch.manual_seed(0)
    model = script.GPT(script.Config(V, window, 2, 2, 32))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.eval()


def questions_of_all_lengths(count, window=24):
    """Contexts and endings from one token to as many as the window holds."""
    chance = random.Random(1)
    questions = []
    for _ in range(count):
        lengths = [chance.choice((1, 1, 2, 3, 5, 9)) for _ in range(4)]
        context = chance.choice((1, 2, 7, window + 1 - max(lengths)))
        endings = [chance.choices(range(V), k=length) for length in lengths]
        questions.append((chance.choices(range(V), k=context), endings, lengths))
    return questions


@torch.no_grad()
def losses_of_transformers(model, questions):
    """Each ending after its context, one row at a time, without a cache."""
    theirs, expected = as_nanochat(model), torch.zeros(len(questions), 4)
    for i, (context, endings, _) in enumerate(questions):
        for j, ending in enumerate(endings):
            logits = theirs(torch.tensor([context + ending[:-1]])).logits[0, len(context) - 1 :]
            expected[i, j] = F.cross_entropy(logits, torch.tensor(ending), reduction="sum")
    return expected


@pytest.mark.parametrize("tokens_at_once", [1, 40, 8192])
def test_endings_have_the_losses_of_transformers(tokens_at_once):
    model, questions = random_model(), questions_of_all_lengths(30)
    expected, found = losses_of_transformers(model, questions), torch.full((30, 4), torch.nan)
    for chosen, four in script.score(model, questions, tokens_at_once):
        found[chosen] = four
    assert (found - expected).abs().max() < 1e-4 and expected.std() > 1


def test_accuracies_are_those_of_transformers():
    model, questions = random_model(), questions_of_all_lengths(41)
    losses = losses_of_transformers(model, questions).numpy()
    sizes = np.array([[len(ending) for ending in endings] for _, endings, _ in questions])
    by_sum, by_mean = losses.argmin(1), (losses / sizes).argmin(1)
    labels = np.where(np.arange(41) % 3 == 0, by_sum, by_mean).tolist()
    expected = (by_sum == labels).mean(), (by_mean == labels).mean()
    assert 0 < expected[0] < expected[1] < 1
    assert script.hellaswag(model, questions, labels, 0, 1) == pytest.approx(expected)
    parts = [script.hellaswag(model, questions, labels, rank, 3) for rank in range(3)]
    assert np.sum(parts, axis=0) == pytest.approx(expected)


def test_a_context_too_long_loses_its_beginning(tmp_path):
    path = tmp_path / "questions.jsonl"
    encode = script.get_tokenizer("bytes").encode_ordinary
    invented = write_questions(path, 20)
    long = 0
    for row, wanted in zip(script.read_hellaswag(str(path)), invented):
        context, endings, sizes = script.completion_question(encode, row, 40)
        assert [bytes(ending).decode() for ending in endings] == [" " + ending for ending in wanted["endings"]]
        assert wanted["ctx"].endswith(bytes(context).decode()) and row["label"] == wanted["label"]
        assert sizes == [1 + len(ending) for ending in wanted["endings"]]
        room = 41 - max(sizes)
        assert len(context) == min(room, len(wanted["ctx"]))
        long += len(context) < len(wanted["ctx"])
    assert 0 < long < 20
    context, endings, sizes = script.completion_question(encode, QUESTION | {"endings": ["x" * 99, "b", "c", "d"]}, 24)
    assert len(context) == 1 and list(map(len, endings)) == sizes == [24, 2, 2, 2]


def test_what_is_no_question_is_named_by_its_line(tmp_path, capsys):
    def line(**changes):
        return json.dumps({**QUESTION, **changes}).encode()

    path = tmp_path / "questions.jsonl"
    for bad in (
        line()[:-5],
        line(endings=["a", "b", "c"]),
        line(endings=["a", "b", "c", "d", "e"]),
        line(endings=["a", "b", "c", 4]),
        line(endings=["a", "b", "", "d"]),
        line(endings="abcd"),
        line(label=4),
        line(label=-1),
        line(label="2"),
        line(ctx=7),
        line(ctx=""),
        line(ctx_b=None),
        line().replace(b"boils", b"\xff\xfe"),
        json.dumps({key: value for key, value in QUESTION.items() if key != "label"}).encode(),
        b"[]",
        b"7",
        b"",
    ):
        path.write_bytes(line() + b"\n" + line() + b"\n" + bad + b"\n" + line() + b"\n")
        assert f"{path}:3:" in refused(capsys, 2, script.read_hellaswag, str(path)), bad
    path.write_bytes(b"")
    assert f"{path}: empty" in refused(capsys, 2, script.read_hellaswag, str(path))
    assert "none.jsonl: No such file" in refused(capsys, 2, script.read_hellaswag, str(tmp_path / "none.jsonl"))
    path.write_bytes(line() + b"\n" + line(label=0, ctx="Ünder") + b"\n")
    assert [row["label"] for row in script.read_hellaswag(str(path))] == [2, 0]
