"""train_gpt.py: its parts against other people's; then as a user runs it, on several processes, killed and resumed."""

import contextlib
import itertools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model import as_nanochat as nanochat_of

import train_gpt as script

ROOT = pathlib.Path(__file__).resolve().parent.parent
CPU, T, V = torch.device("cpu"), 32, 257
TINY = (
    "--device cpu --dtype float32 --train_files train_*.bin --val_files val_*.bin --tokenizer bytes "
    "--n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --batch_size 4 --total_batch_size 512 --max_iters 20 "
    "--warmdown_frac 0.5 --matrix_lr 0.03 --embed_lr 0.3 --head_lr 0.01 --val_tokens 1000 --val_loss_every 0 "
    "--sample_every 0 --save_every 0"
).split()
SLOW = "--sample_every 1 --max_new_tokens 60".split()  # a story after each step leaves time to interrupt the run
COUNTS = (3000, 1, 2500, 700)  # fewer tokens than 20 steps take: the stream goes round
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def write_shard(path, tokens, magic=20240520, version=1):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


def random_questions(count):
    chance = random.Random(0)

    def text(most):
        return " ".join("".join(chance.choices("aeioulnrst", k=chance.randint(1, 6))) for _ in range(most))

    return [
        dict(ctx=text(chance.randint(2, 14)), endings=[text(chance.randint(1, 4)) for _ in range(4)], label=i % 4)
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder in which everything runs: shards and questions, then a folder for each run."""
    work = tmp_path_factory.mktemp("gpt")
    lines = (ROOT / "data" / "plain.txt").read_bytes().splitlines()
    tokens = np.concatenate([np.frombuffer(line, np.uint8).astype("<u2") for line in lines])
    tokens[::100] = 256
    ends = np.cumsum([*COUNTS, 900, 600])
    parts = np.split(tokens[: ends[-1]], ends[:-1])
    names = [f"train_{i}.bin" for i in range(4)] + ["val_0.bin", "val_1.bin"]
    for name, part in zip(names, parts):
        write_shard(work / name, part)
    (work / "data").mkdir()
    (work / "data" / "hellaswag_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in random_questions(7)))
    return work


def start(work, out, *flags, ranks=1, launcher=(), **settings):
    """A run in the background; what it says goes to OUT.txt."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *launcher]
    command = [sys.executable, *(torchrun if ranks > 1 else ()), ROOT / "train_gpt.py", *TINY, "--out_dir", out, *flags]
    with open(work / f"{out}.txt", "w") as said:
        settings = dict(env=ENVIRONMENT) | settings
        return subprocess.Popen(list(map(str, command)), cwd=work, stdout=said, stderr=subprocess.STDOUT, **settings)


def train(work, out, *flags, code=0, **settings):
    """A run from start to end; returns what it said."""
    with start(work, out, *flags, **settings) as process:
        try:
            process.wait(300)
        finally:
            process.kill()
    said = (work / f"{out}.txt").read_text()
    assert process.returncode == code, said
    return said


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.0005)


def load(out):
    return torch.load(out / "ckpt.pt", weights_only=True)


def step_of(out):
    with contextlib.suppress(FileNotFoundError):
        return load(out)["train"]["step"]
    return 0


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    """By step: a resumed run may have logged one twice."""
    found = {row["step"]: row["train_loss"] for row in rows(out) if "train_loss" in row}
    return [found[step] for step in sorted(found)]


def last_val_loss(out):
    return [row["val_loss"] for row in rows(out) if "val_loss" in row][-1]


def assert_same_end(out, reference):
    ours, theirs = load(out), load(reference)
    assert ours["train"]["step"] == theirs["train"]["step"]
    for key in ("moments", "squares"):
        torch.testing.assert_close(ours["train"][key], theirs["train"][key], atol=0, rtol=0)
    torch.testing.assert_close(ours["model"], theirs["model"], atol=0, rtol=0)
    assert losses(out) == losses(reference) and last_val_loss(out) == last_val_loss(reference)


def assert_near(out, reference):
    np.testing.assert_allclose(losses(out), losses(reference), atol=1e-4, rtol=0)
    assert abs(last_val_loss(out) - last_val_loss(reference)) < 1e-4 and len(losses(out)) == 20


@pytest.fixture(scope="module")
def runs(work):
    """The same training four ways, never interrupted."""
    train(work, "one")
    train(work, "smaller", "--batch_size", 3, env={**ENVIRONMENT, "WORLD_SIZE": "8"})  # as some shells have it set
    train(work, "two", ranks=2)
    train(work, "four", ranks=4)
    return work


@pytest.fixture(scope="module")
def halfway(work):
    """A folder as a run leaves it that is told to stop after some steps."""
    with start(work, "halfway", *SLOW) as process:
        wait_for(lambda: (work / "halfway/log.jsonl").exists() and len(rows(work / "halfway")) > 8, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    return work / "halfway"


# --- model and optimizer ---


def as_nanochat(model):
    """The same weights in transformers' own implementation."""
    parts = dict(embed=model.embed, head=model.head, blocks=model.blocks)
    return nanochat_of(types.SimpleNamespace(config=types.SimpleNamespace(**model.config), **parts))


def random_model(**changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, block_size=T, n_layer=2, n_head=2, n_embd=32)
    model = script.GPT(sizes | dict(tie_weights=False, embed_norm=True, logit_softcap=15.0) | changes)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


@pytest.mark.parametrize("tie_weights, softcap", [(False, 15.0), (True, 0.0)])
def test_logits_loss_and_gradients_are_those_of_transformers(tie_weights, softcap):
    model = random_model(tie_weights=tie_weights, logit_softcap=softcap)
    theirs = as_nanochat(model)
    idx, targets = torch.randint(V, (4, T)), torch.randint(V, (4, T))
    targets[0, :7] = -1
    logits = theirs(idx).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    expected.backward()
    loss = model(idx, targets)
    loss.backward()
    ours = model(idx)
    assert (ours[..., :V] - logits).abs().max() < 1e-4 and logits.std() > 0.1
    assert (ours[..., V:] == -torch.inf).all() and abs(loss - expected) < 1e-5
    each = model(idx, targets, reduction="none").view(4, T)
    assert abs(each.sum() / (4 * T - 7) - expected) < 1e-5 and (each[0, :7] == 0).all()
    for found, reference in [
        (model.embed.grad[:V], theirs.model.embed_tokens.weight.grad),
        (model.blocks[0].up.grad, theirs.model.layers[0].mlp.fc1.weight.grad),
        (model.blocks[-1].qkv.grad[1], theirs.model.layers[-1].self_attn.k_proj.weight.grad),
        ((model.embed if tie_weights else model.head).grad[:V], theirs.lm_head.weight.grad),
    ]:
        torch.testing.assert_close(found, reference, atol=1e-5, rtol=1e-4)


def test_without_embed_norm_it_is_transformers_without_that_norm():
    model = random_model(embed_norm=False)
    with torch.no_grad():  # NanoChat always normalizes: hand both rows on which that does nothing
        model.embed.mul_(torch.rsqrt(model.embed.square().mean(-1, keepdim=True)))
        idx = torch.randint(V, (2, T))
        assert (model(idx)[..., :V] - as_nanochat(model)(idx).logits).abs().max() < 1e-4


def parameters(*shapes):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("shape", [(24, 24), (96, 24), (24, 96)])
def test_muon_is_that_of_torch(shape, monkeypatch):
    monkeypatch.setattr(script, "POLAR_EXPRESS", [(3.4445, -4.7750, 2.0315)] * 5)  # what torch.optim.Muon repeats
    ours, theirs = parameters(shape, shape), parameters(shape, shape)
    moments = [torch.zeros_like(p) for p in ours]
    reference = torch.optim.Muon(theirs, lr=0.05, momentum=0.9, weight_decay=0.1)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        before = [p.detach().clone() for p in ours]
        script.muon_step(ours, moments, 0.05, 0.9, 0.1, torch.bfloat16)
        reference.step()
        for p, q, m, old in zip(ours, theirs, moments, before):
            assert (p - q).norm() < 0.02 * (q - old).norm(), "bf16 rounding explains a hundredth, no more"
            torch.testing.assert_close(m, reference.state[q]["momentum_buffer"])
            p.data.copy_(q)  # differences of rounding shall not add up


@pytest.mark.parametrize("dtype, low, high", [(torch.float32, 0.85, 1.15), (torch.bfloat16, 0.8, 1.2)])
@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 256, 64), (2, 64, 256)])
def test_orthogonalized_matrices_have_singular_values_near_one(dtype, low, high, shape):
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    X = script.orthogonalize((1e-4 * U @ torch.diag(torch.logspace(0, -2, 64)) @ Vh).to(dtype))
    values = torch.linalg.svdvals(X.float())
    assert low < values.min() and values.max() < high
    assert (X.float() - U @ Vh).norm() < 0.15 * (U @ Vh).norm()
    assert not script.orthogonalize(torch.zeros(shape)).any()


def test_adamw_is_that_of_torch():
    ours, theirs = parameters((40, 8)), parameters((40, 8))
    m, v = torch.zeros(40, 8), torch.zeros(40, 8)
    reference = torch.optim.AdamW(theirs, lr=0.3, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        script.adamw_step(ours[0], m, v, step + 1, 0.3)
        reference.step()
        torch.testing.assert_close(ours, theirs)


# --- shards ---


def test_shards_are_one_stream_that_goes_round(tmp_path):
    tokens = np.random.default_rng(0).integers(V, size=2300)
    for i, part in enumerate(np.split(tokens, [1000, 1001, 2000])):
        write_shard(tmp_path / f"a_{i}.bin", part)
    shards = script.Shards(str(tmp_path / "a_*.bin"), "--train_files", V)
    assert shards.total == 2300
    endless = np.concatenate([tokens] * 6)
    starts = 0, 1, 998, 999, 1000, 1001, 1999, 2000, 2299, 2300, 4601
    for position, (B, length) in itertools.product(starts, ((1, 1), (2, 1), (3, 500), (2, 2500))):
        x, y = shards.batch(position, B, length, CPU)
        assert np.array_equal(x.flatten(), endless[position : position + B * length])
        assert np.array_equal(y.flatten(), endless[position + 1 : position + B * length + 1])


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
    write_shard(tmp_path / "beyond.bin", [5, V, 5])
    for name in ("magic", "version", "header", "nothing", "short", "odd", "long", "beyond", "none"):
        with pytest.raises(SystemExit) as stop:
            script.Shards(str(tmp_path / f"{name}.bin"), "--val_files", V)
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.count("\n") == 1
        assert "--val_files" in message and f"{name}.bin" in message


# --- the same losses ---


def test_any_number_of_processes_and_rows_gives_the_same_losses(runs):
    reference = losses(runs / "one")
    assert len(reference) == 20 and reference[0] == pytest.approx(np.log(V), abs=1e-4) and reference[-1] < 4
    for out in ("smaller", "two", "four"):
        assert_near(runs / out, runs / "one")
    assert "on 4 x cpu" in (runs / "four.txt").read_text() and "8 x 2 rows" in (runs / "smaller.txt").read_text()


def test_a_run_says_what_it_does(runs):
    said = (runs / "one.txt").read_text()
    assert "step 1/20  loss 5.54" in said and "python sample.py one" in said.splitlines()[-1]
    assert f"step:20/20 val_loss:{last_val_loss(runs / 'one'):.4f} train_time:" in said
    log = (runs / "one" / "log.txt").read_text(encoding="utf-8")
    assert log.startswith((ROOT / "train_gpt.py").read_text(encoding="utf-8")) and "step:20/20 val_loss" in log
    steps = [row for row in rows(runs / "one") if "train_loss" in row]
    assert all(row["mfu"] is None and row["tokens_per_s"] > 0 for row in steps)
    assert [round(row["lr"] / 0.03, 6) for row in steps] == [1.0] * 11 + [n / 10 for n in range(9, 0, -1)]


# --- evaluation ---


@pytest.fixture(scope="module")
def evaluated(runs):
    cadences = "--val_loss_every 3 --hellaswag_every 4 --sample_every 5 --max_new_tokens 9 --milestone_every 6"
    train(runs, "evaluated", *cadences.split(), "--save_every", 2)
    return runs / "evaluated"


def test_evaluation_changes_nothing(runs, evaluated):
    assert_same_end(evaluated, runs / "one")


def test_evaluation_leaves_rows_stories_and_milestones(evaluated):
    found = {key: [row["step"] for row in rows(evaluated) if key in row] for key in ("val_loss", "hellaswag_norm")}
    assert found == {"val_loss": [3, 6, 9, 12, 15, 18, 20], "hellaswag_norm": [4, 8, 12, 16, 20]}
    stories = [json.loads(line) for line in (evaluated / "stories.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [story["step"] for story in stories] == [5, 10, 15, 20]
    assert all(story["text"].startswith(story["prompt"]) and 0 < story["tokens"] <= 9 for story in stories)
    assert all(set(story) == {"id", "step", "prompt", "text", "tokens", "seed", "checkpoint"} for story in stories)
    files = {"log.txt", "log.jsonl", "stories.jsonl", "ckpt.pt"}
    assert set(os.listdir(evaluated)) == files | {f"milestone_{step:06d}.pt" for step in (6, 12, 18, 20)}
    last = torch.load(evaluated / "milestone_000020.pt", weights_only=True)
    assert "moments" not in last["train"] and last["train"]["step"] == 20
    torch.testing.assert_close(last["model"], load(evaluated)["model"], atol=0, rtol=0)


def trained(out):
    model = script.GPT(load(out)["config"])
    model.load_state_dict(load(out)["model"])
    return model


def test_validation_loss_is_the_mean_over_the_first_tokens(runs):
    model = trained(runs / "one")
    theirs = as_nanochat(model)
    stream = np.concatenate([np.fromfile(runs / f"val_{i}.bin", "<u2", offset=1024) for i in (0, 1)]).astype(np.int64)
    tokens, shards = torch.from_numpy(stream), script.Shards(str(runs / "val_*.bin"), "--val_files", V)

    def expected(n):
        total = 0.0
        for begin in range(0, n, T):
            end = min(begin + T, n)
            logits = theirs(tokens[None, begin:end]).logits[0]
            total += F.cross_entropy(logits, tokens[begin + 1 : end + 1], reduction="sum").item()
        return total / n

    with torch.no_grad():
        assert abs(last_val_loss(runs / "one") - expected(1000)) < 1e-5
        assert expected(1000) != pytest.approx(expected(992), abs=1e-5), "the last part of a batch counts"
        for val_tokens, n in ((1, 1), (33, 33), (512, 512), (1499, 1499), (10**9, 1499)):
            assert abs(script.validate(model, shards, val_tokens, 4, T, CPU, 0, 1) - expected(n)) < 1e-5


@torch.no_grad()
def test_hellaswag_is_that_of_transformers():
    model, questions = random_model(block_size=96), random_questions(40)
    theirs, right = as_nanochat(model), 0
    for question in questions:
        means = []
        for ending in question["endings"]:
            ending = list(f" {ending}".encode())
            context = list(question["ctx"].encode())[-(97 - max(1 + len(e) for e in question["endings"])) :]
            logits = theirs(torch.tensor([context + ending[:-1]])).logits[0, len(context) - 1 :]
            means.append(F.cross_entropy(logits, torch.tensor(ending)).item())
        right += np.argmin(means) == question["label"]
    assert 0 < right < 40
    tokenizer = script.get_tokenizer("bytes")
    assert script.hellaswag(model, tokenizer, questions, CPU, 0, 1) == right / 40
    parts = [script.hellaswag(model, tokenizer, questions, CPU, rank, 3) for rank in range(3)]
    assert sum(parts) == pytest.approx(right / 40)
    short = random_model(block_size=3)  # endings that are longer than the context length are cut
    assert 0 <= script.hellaswag(short, tokenizer, questions, CPU, 0, 1) <= 1


def test_a_target_that_is_reached_ends_the_run(runs, evaluated):
    target = next(row["val_loss"] for row in rows(evaluated) if row["step"] == 6 and "val_loss" in row)
    train(runs, "target", "--val_loss_every", 3, "--target_loss", target)
    assert step_of(runs / "target") == 6 and losses(runs / "target") == losses(runs / "one")[:6]


# --- interrupted and resumed ---


def test_kills_at_any_moment_change_nothing(runs):
    chance, saves = random.Random(0), "--save_every 1 --resume".split()
    for kill in range(8):
        before = step_of(runs / "killed")
        with start(runs, "killed", *saves, *SLOW) as process:
            temporary = runs / "killed" / "ckpt.pt.tmp"
            wait_for(lambda least=before: step_of(runs / "killed") > least, process)
            if kill % 2:
                wait_for(temporary.exists, process)  # in the middle of a save
            else:
                time.sleep(chance.uniform(0, 0.1))
            process.kill()
        assert process.returncode == -signal.SIGKILL
    assert "resumed from" in train(runs, "killed", *saves)
    assert_same_end(runs / "killed", runs / "one")


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_run_goes_on_with_another_number_of_processes(runs, halfway, ranks):
    out = shutil.copytree(halfway, runs / f"on_{ranks}")
    assert "resumed from" in train(runs, out.name, "--resume", ranks=ranks)
    assert_near(out, runs / "one")


@pytest.mark.parametrize("number, ranks", [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_later(runs, number, ranks):
    out = runs / f"stopped_{ranks}"
    with start(runs, out.name, *SLOW, ranks=ranks) as process:
        wait_for(lambda: (out / "log.jsonl").exists() and len(rows(out)) > 3, process)
        process.send_signal(number)
        code = process.wait(60)
    assert code == 128 + number if ranks == 1 else code != 0
    step = step_of(out)
    assert 3 < step < 20 and len(losses(out)) == step
    assert f"interrupted; {out.name}/ckpt.pt holds step {step}" in (runs / f"{out.name}.txt").read_text()
    train(runs, out.name, "--resume", ranks=ranks)
    assert_same_end(out, runs / ("one" if ranks == 1 else "two"))


def test_a_compiled_run_goes_on_with_the_same_bits(work):
    flags = "--n_layer", 1, "--compile"
    settings = dict(env={**ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")})
    train(work, "compiled", *flags, **settings)
    with start(work, "compiled_killed", *flags, *SLOW, "--save_every", 1, **settings) as process:
        wait_for(lambda: step_of(work / "compiled_killed") > 3, process)
        process.kill()
    assert "resumed from" in train(work, "compiled_killed", *flags, "--resume", **settings)
    assert_same_end(work / "compiled_killed", work / "compiled")


def worker(out, rank):
    """The id of the process that runs a rank."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # other people's processes, and those that have just ended
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
            if out.encode() in arguments and b"RANK=%d" % rank in variables:
                return int(folder.name)


def test_torchrun_starts_a_lost_worker_again(runs):
    flags = *SLOW, "--save_every", 1, "--resume"
    # as runs/ghoul.sh and runs/nodes.sh set it: otherwise the new workers may read addresses of the old ones
    settings = dict(env={**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    with start(runs, "restarted", *flags, ranks=2, launcher=["--max-restarts=2"], **settings) as process:
        wait_for(lambda: step_of(runs / "restarted") > 2, process)
        os.kill(worker("restarted", 1), signal.SIGKILL)
        assert process.wait(120) == 0
    assert "resumed from" in (runs / "restarted.txt").read_text()
    assert_same_end(runs / "restarted", runs / "two")


def test_workers_whose_torchrun_is_killed_end_and_until_then_hold_the_folder(runs):
    with start(runs, "orphans", *SLOW, "--hellaswag_every", 1, "--save_every", 1, ranks=2) as process:
        wait_for(lambda: step_of(runs / "orphans") > 1, process)
        workers = [worker("orphans", rank) for rank in (0, 1)]
        os.kill(workers[0], signal.SIGSTOP)  # it still has the folder when the second run comes
        process.kill()
    second = subprocess.run(
        [sys.executable, ROOT / "train_gpt.py", *TINY, "--out_dir", "orphans", "--resume"],
        cwd=runs, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert second.returncode == 2 and "another run is at work there" in second.stderr, second.stderr
    os.kill(workers[0], signal.SIGCONT)
    deadline = time.time() + 60
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in workers) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in workers) and step_of(runs / "orphans") < 20
    train(runs, "orphans", "--resume", ranks=2)
    assert_same_end(runs / "orphans", runs / "two")


# --- what goes wrong ---


def test_a_loss_that_is_not_finite_ends_the_run(runs):
    rates = "--matrix_lr", 1e38, "--embed_lr", 1e38, "--head_lr", 1e38
    said = train(runs, "infinite", *rates, "--save_every", 1, code=1)
    last = said.splitlines()[-1]
    assert (
        last.startswith("train_gpt.py: the loss is nan at step")
        and "learning rates" in last
        and "Traceback" not in said
    )
    if (runs / "infinite" / "ckpt.pt").exists():
        assert all(p.isfinite().all() for p in load(runs / "infinite")["model"].values())


def test_a_full_disk_is_called_one_and_leaves_the_last_checkpoint(runs, halfway):
    """A limit on the size of files stands in for the full disk: it fails at the same place."""
    out = shutil.copytree(halfway, runs / "full")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    said = train(runs, "full", "--resume", code=1, preexec_fn=limit)
    last = said.splitlines()[-1]
    assert "File too large" in last and "after step 20; full/ckpt.pt holds step" in last and "Traceback" not in said
    assert (out / "ckpt.pt").read_bytes() == (halfway / "ckpt.pt").read_bytes()


def test_a_checkpoint_with_a_flipped_bit_is_not_resumed(runs, halfway, capsys):
    data, chance = (halfway / "ckpt.pt").read_bytes(), random.Random(0)
    refused = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_gpt.py", *TINY, "--out_dir", str(halfway)])
        flags = script.get_flags()
    flags.down_lr = flags.matrix_lr
    whole = script.load_for_resume(str(halfway / "ckpt.pt"), flags)
    for _ in range(60):
        place = chance.randrange(len(data))
        damaged = data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
        (runs / "flipped.pt").write_bytes(damaged)
        try:
            found = script.load_for_resume(str(runs / "flipped.pt"), flags)
            for key in ("moments", "squares", "step"):  # between the parts of the archive nothing is lost
                torch.testing.assert_close(found["train"][key], whole["train"][key], atol=0, rtol=0)
            torch.testing.assert_close(found["model"], whole["model"], atol=0, rtol=0)
        except SystemExit as stop:
            assert stop.code == 2
            refused += 1
    assert refused > 40 and capsys.readouterr().err.count("\n") == refused


def test_a_mistake_gets_one_line(runs, halfway):
    (runs / "old").mkdir()
    torch.save({"format": 1}, runs / "old" / "ckpt_000010.pt")
    (runs / "other").mkdir()
    torch.save({"format": 1, "train": {"step": 1, "flags": {}}}, runs / "other" / "ckpt.pt")
    (runs / "file").write_text("")
    before = (halfway / "ckpt.pt").read_bytes()
    for out, flags, named in [
        ("halfway", [], "--resume goes on with it, --overwrite replaces it"),
        ("halfway", ["--resume", "--matrix_lr", "0.3"], "matrix_lr 0.03, not 0.3"),
        ("halfway", ["--resume", "--n_embd", "64"], "n_embd 32, not 64"),
        ("halfway", ["--resume", "--train_files", "train_0.bin"], "train_files train_*.bin, not train_0.bin"),
        ("halfway", ["--resume", "--seed", "7"], "seed 1337, not 7"),
        ("old", ["--resume"], "another script or version"),
        ("other", ["--resume"], "another script or version"),
        ("uneven", ["--total_batch_size", "500"], "--total_batch_size 500"),
        ("heads", ["--n_head", "3"], "--n_head 3"),
        ("file", [], "file"),
        ("flag", ["--layers", "3"], "--layers"),
    ]:
        said = train(runs, out, *flags, code=2)
        assert said.startswith("train_gpt.py: ") and said.count("\n") == 1 and named in said, said
    assert (halfway / "ckpt.pt").read_bytes() == before
    (runs / "data").rename(runs / "elsewhere")
    assert "python data/hellaswag.py downloads it" in train(runs, "no_questions", "--hellaswag_every", 5, code=2)
    (runs / "elsewhere").rename(runs / "data")
    train(runs, "halfway", "--overwrite", "--max_iters", 1)
    assert step_of(halfway) == 1
