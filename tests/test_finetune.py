"""finetune.py: what it learns from, beside other implementations, on several processes, killed, resumed, refused."""

import hashlib
import json
import math
import os
import pathlib
import random
import resource
import signal
import string
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model import as_nanochat
from test_train_gpt import wait_for, write_shard

import finetune as script
from bench import dpo_oracle

ROOT = pathlib.Path(__file__).resolve().parent.parent
T, V, END = 32, 257, 256
PROMPT = "It was dark"
TOLD = dict(matrix_lr=0.02, down_lr=0.03, embed_lr=0.3, head_lr=0.01, weight_decay=0.1, momentum=0.9)
TOLD |= dict(beta1=0.7, beta2=0.9, ns_steps=4, batch_size=3, total_batch_size=256)
QUIET = "--device cpu --dtype float32 --sample_every 0".split()
SFT = "--data stories.txt --total_batch_size 32 --epochs 2".split()
DPO = "--method dpo --data ranked.jsonl --pairs 5 --epochs 2 --lr_scale 0.05".split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
# Made by `python bench/dpo_oracle.py` with trl 1.16.0, transformers 5.23.0, torch 2.13.0.
TRL = """
loss 0.6676239 winners 0.1756265 losers 0.1003512
embed.size 2.1307026 embed.along 2.8234479 head.size 2.2464062 head.along 1.0361209
blocks.0.qkv.size 0.4541154 blocks.0.qkv.along 0.0199904 blocks.0.o.size 0.329742 blocks.0.o.along 0.1118622
blocks.0.up.size 1.0881702 blocks.0.up.along -0.5859354 blocks.0.down.size 0.9025846 blocks.0.down.along -0.9397056
blocks.1.qkv.size 0.3785119 blocks.1.qkv.along 0.1004635 blocks.1.o.size 0.2790381 blocks.1.o.along -0.2579589
blocks.1.up.size 0.8074928 blocks.1.up.along 0.0522598 blocks.1.down.size 0.9630203 blocks.1.down.along -0.087882
"""


def write_base(path, tokenizer="bytes", train=None, **config):
    """A checkpoint with no zero anywhere in it."""
    torch.manual_seed(0)
    config = {**dict(vocab_size=V, block_size=T, n_layer=2, n_head=2, n_embd=32), **config}
    model = script.GPT(script.Config(**config))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    train = dict(step=7, flags=TOLD) if train is None else train
    torch.save(dict(format=1, config=config, tokenizer=tokenizer, model=model.state_dict(), train=train), path)


def write_stories(path, count=20):
    """Stories of one window and of several, each with a letter that no other has."""
    chance = random.Random(0)
    texts = [
        f"{letter} " + "".join(chance.choices("aeiou nrst\n", k=chance.randint(5, 70))) + "."
        for letter in string.ascii_uppercase[:count]
    ]
    path.write_text("\n<|endoftext|>\n".join(texts) + "\n")
    return texts


def write_rankings(path, count=24):
    """Groups whose winners are full of a, and whose losers are not; every eighth is undecided."""
    chance, rows = random.Random(0), []
    for number in range(count):
        best = chance.choice("ABCD")
        stories = {}
        for key in "ABCD":
            text = "".join(chance.choices("aaab" if key == best else "bcde", k=chance.randint(5, 30)))
            stories[key] = dict(id=len(stories), prompt=PROMPT, text=PROMPT + text)
        rows.append(dict(group=number, stories=stories, best=None if number % 8 == 7 else best, reasoning="", votes=[]))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder in which everything runs: a checkpoint, stories and rankings, then one folder for each run."""
    work = tmp_path_factory.mktemp("finetune")
    write_base(work / "base.pt")
    write_stories(work / "stories.txt")
    write_rankings(work / "ranked.jsonl")
    return work


def start(work, out, *flags, ranks=1, **settings):
    """A run in the background; what it says goes to OUT.txt."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, ROOT / "finetune.py", *QUIET, "--init", "base.pt", "--out_dir", out, *flags]
    with open(work / f"{out}.txt", "w") as said:
        settings = dict(stdout=said, stderr=subprocess.STDOUT, env=ENVIRONMENT) | settings
        return subprocess.Popen(list(map(str, command)), cwd=work, **settings)


def tune(work, out, *flags, code=0, **settings):
    """A run from start to end; returns what it said."""
    with start(work, out, *flags, **settings) as process:
        try:
            process.wait(200)
        finally:
            process.kill()
    said = (work / f"{out}.txt").read_text()
    assert process.returncode == code, said
    return said


def saved(out):
    return sorted(int(path.stem[5:]) for path in out.glob("ckpt_*.pt"))


def load(path):
    return torch.load(path, weights_only=True)


def last(out):
    return load(out / f"ckpt_{saved(out)[-1]:06d}.pt")


def values(out, key):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def assert_same_end(out, reference):
    ours, theirs = last(out), last(reference)
    for a, b in (ours["model"], theirs["model"]), (ours["train"]["optimizer"], theirs["train"]["optimizer"]):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    (step, _, *rest), (wanted, _, *others) = ours["train"]["next"], theirs["train"]["next"]
    assert step == wanted and rest == others and ours["train"]["reference"] == theirs["train"]["reference"]
    for key in ("train_loss", "val_loss", "val_margin"):
        assert values(out, key) == values(reference, key), key
    assert list(values(out, "train_loss")) == list(range(1, step + 1))


@pytest.fixture(scope="module")
def runs(work):
    """Both methods on one process and on two, never interrupted."""

    before = (work / "base.pt").read_bytes()
    for ranks, end in ((1, ""), (2, "_on_two")):
        tune(work, f"sft{end}", *SFT, ranks=ranks)
        tune(work, f"dpo{end}", *DPO, ranks=ranks)
    assert (work / "base.pt").read_bytes() == before
    return work


# --- what it learns from ---


def test_each_pass_holds_each_story_once():
    chance = np.random.default_rng(0)
    stories = [np.concatenate([[END], chance.integers(256, size=n)]) for n in (1, 7, 30, 2, 100, 7)]
    passes, size = script.Passes(stories, 5), sum(map(len, stories))
    stream = np.concatenate([passes.read(position, 13).numpy() for position in range(0, 13 * 40, 13)])
    found = set()
    for number in range(3):
        whole = passes.read(number * size, size).numpy()
        assert np.array_equal(whole, stream[number * size : (number + 1) * size])
        parts = np.split(whole, np.flatnonzero(whole == END))[1:]
        assert sorted(map(bytes, (part[1:].astype(np.uint8) for part in parts))) == sorted(
            map(bytes, (story[1:].astype(np.uint8) for story in stories))
        )
        found.add(whole.tobytes())
    assert len(found) == 3, "each pass has an order of its own"
    assert script.Passes(stories, 5).read(2 * size, size).numpy().tobytes() in found
    assert script.Passes(stories, 6).read(0, size).numpy().tobytes() not in found
    assert script.Passes(stories, -1).read(size - 1, 2).shape == (2,)


@pytest.mark.parametrize("count, share, held", [(2, 0.0, 1), (2, 0.9, 1), (20, 0.05, 1), (100, 0.05, 5), (3, 0.9, 2)])
def test_a_share_is_held_out(count, share, held):
    learn, validate = script.hold_out(list(range(count)), share, 1)
    assert len(validate) == held and sorted(learn + validate) == list(range(count))
    assert script.hold_out(list(range(count)), share, 1) == (learn, validate)


def test_stories_are_the_same_from_every_kind_of_file(tmp_path):
    texts = write_stories(tmp_path / "a.txt")
    expected = [[END, *text.encode()] for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, " \n", texts[3]]))
    tokens = [token for story in expected for token in story]
    write_shard(tmp_path / "a_1.bin", tokens[:500])
    write_shard(tmp_path / "a_2.bin", [*tokens[500:], END, *expected[5]])
    tokenizer = script.get_tokenizer("bytes")
    for name in ("a.txt", "a.jsonl", "a_*.bin"):
        found = script.read_stories(str(tmp_path / name), tokenizer)
        assert [story.tolist() for story in found] == expected, name


def test_what_is_held_out_is_never_learned_from(runs):
    """A byte of one story alone keeps its embedding, to the bit, when that story is not read."""
    texts = (runs / "stories.txt").read_text().split("\n<|endoftext|>\n")
    before, after = load(runs / "base.pt")["model"]["embed"], last(runs / "sft")["model"]["embed"]
    kept = [text for text in texts if torch.equal(before[ord(text[0])], after[ord(text[0])])]
    assert (
        len(texts) == 20 and len(kept) == 1 and "19 different stories to learn from" in (runs / "sft.txt").read_text()
    )
    path = str(runs / "base.pt")
    model = script.load_model(path, script.load_checkpoint(path), torch.device("cpu"), torch.float32)
    tokens = torch.tensor([END, *kept[0].strip().encode()])
    total = 0.0
    with torch.no_grad():
        for x, y in zip(tokens[:-1].split(T), tokens[1:].split(T)):
            total += F.cross_entropy(as_nanochat(model)(x[None]).logits[0], y, reduction="sum").item()
    assert values(runs / "sft", "val_loss")[0] == pytest.approx(total / (len(tokens) - 1), abs=1e-5)


def test_pairs_are_a_winner_and_each_of_its_losers(tmp_path):
    rows = write_rankings(tmp_path / "ranked.jsonl")
    rows[0]["stories"]["A"]["text"] = PROMPT + "é" * 30  # longer than the window
    rows[1]["stories"] = {
        key: {**story, "text": PROMPT} for key, story in rows[1]["stories"].items()
    }  # nothing follows
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    decided = [row for row in rows if row["best"] and row is not rows[1]]
    tokenizer = script.get_tokenizer("bytes")
    stories, groups, left_out = script.read_groups(str(tmp_path / "ranked.jsonl"), tokenizer, T, "all", 0)
    assert left_out == 4 and len(groups) == len(decided) == 20

    def text(place):
        tokens, begin = stories[place]
        assert tokens[0] == END and bytes(tokens[1:begin].tolist()).decode() == PROMPT
        return bytes(tokens[1:].tolist())

    for row, pairs in zip(decided, groups):
        told = {key: story["text"].encode()[:T] for key, story in row["stories"].items()}  # T tokens after the first
        winner = told.pop(row["best"])
        assert [text(place) for place in pairs[:, 0]] == [winner] * 3
        assert [text(place) for place in pairs[:, 1]] == list(told.values())
    _, one, _ = script.read_groups(str(tmp_path / "ranked.jsonl"), tokenizer, T, "one", 0)
    assert all(len(few) == 1 and few[0].tolist() in many.tolist() for few, many in zip(one, groups))
    assert len({few[0, 1] - many[0, 1] for few, many in zip(one, groups)}) > 1


def test_a_continuation_follows_the_tokens_of_its_prompt(tmp_path):
    stories = {key: dict(prompt="A dark and stor", text=f"A dark and stormy {key}") for key in "AB"}
    (tmp_path / "ranked.jsonl").write_text(json.dumps(dict(group=0, stories=stories, best="B")))
    tokenizer = script.get_tokenizer("gpt2")
    found, [[[winner, _]]], _ = script.read_groups(str(tmp_path / "ranked.jsonl"), tokenizer, T, "all", 0)
    tokens, begin = found[winner]
    assert tokenizer.decode(tokens[:begin].tolist()) == "<|endoftext|>A dark and stor"
    assert tokens[begin:].tolist() == tokenizer.encode_ordinary("my B")


# --- what it computes ---


def test_dpo_is_that_of_trl():
    words = TRL.split()
    _, found = dpo_oracle.ours()
    assert list(found) == words[::2]
    for name, value in zip(words[::2], map(float, words[1::2])):
        assert found[name] == pytest.approx(value, abs=2e-5, rel=2e-5), name


def test_sft_is_a_plain_loop(work):
    """With the matrices at rest: transformers' model, torch.optim.AdamW, the schedule as --help tells it."""
    flags = "--data stories.txt --matrix_lr 0 --block_size 16 --total_batch_size 64 --epochs 2 --lr_scale 0.2".split()
    tune(work, "plain", *flags, "--warmup_share", 0.2, "--warmdown_share", 0.6)
    losses = values(work / "plain", "train_loss")
    path = str(work / "base.pt")
    theirs = as_nanochat(script.load_model(path, script.load_checkpoint(path), torch.device("cpu"), torch.float32))
    parts = script.read_stories(str(work / "stories.txt"), script.get_tokenizer("bytes"))
    learn, _ = script.hold_out(parts, 0.05, 1337)
    size, stream = sum(map(len, learn)), script.Passes(learn, 1337)
    steps = math.ceil(2 * size / 64)
    weights = [dict(params=theirs.model.embed_tokens.weight, lr=0.06), dict(params=theirs.lm_head.weight, lr=0.002)]
    optimizer = torch.optim.AdamW(weights, betas=(0.7, 0.9), eps=1e-10, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / (0.2 * steps), (steps - s) / (0.6 * steps))
    )
    assert len(losses) == steps > 20
    for step in range(steps):
        tokens = stream.read(64 * step, 65)
        logits = theirs(tokens[:-1].view(4, 16)).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[1:])
        assert losses[step + 1] == pytest.approx(loss.item(), abs=1e-4), step
        loss.backward()
        optimizer.step()
        schedule.step()
        theirs.zero_grad()
    assert losses[steps] < losses[1] - 0.5


def test_stories_are_learned(runs):
    val_loss = values(runs / "sft", "val_loss")
    assert val_loss[max(val_loss)] < val_loss[0] - 0.5 and len(val_loss) == 11


def test_winners_become_likelier_than_losers(runs):
    loss, margin, accuracy = (values(runs / "dpo", f"val_{key}") for key in ("loss", "margin", "accuracy"))
    end = max(loss)
    assert loss[0] == pytest.approx(math.log(2)) and margin[0] == 0 and accuracy[0] == 0.5
    assert loss[end] < 0.6 and margin[end] > 0.2 and accuracy[end] == 1
    assert values(runs / "dpo", "train_accuracy")[end] == 1 and values(runs / "dpo", "train_margin")[end] > 0.2
    assert "20 groups with a winner to learn from (60 pairs), 1 held out (3), 3 other" in (runs / "dpo.txt").read_text()


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_two_processes_have_the_same_losses(runs, method):
    for key in ("train_loss", "val_loss", "train_margin", "val_accuracy"):
        one, two = values(runs / method, key), values(runs / f"{method}_on_two", key)
        assert list(one) == list(two)
        np.testing.assert_allclose(list(two.values()), list(one.values()), atol=1e-4, rtol=0)
    assert "on 2 x cpu" in (runs / f"{method}_on_two.txt").read_text()


# --- settings ---


def settled(monkeypatch, base, *flags, data="x.txt", size=1000, tie_weights=False):
    arguments = ["finetune.py", "--init", "base.pt", "--data", str(data), "--block_size", "32", *map(str, flags)]
    monkeypatch.setattr(sys, "argv", arguments)
    flags = script.get_flags()
    steps, taken = script.settle(flags, base, script.Config(V, T, 1, 1, 2, tie_weights=tie_weights), size)
    return flags, steps, taken


def test_rates_are_those_of_pretraining_times_the_scale(runs, monkeypatch):
    flags, _, taken = settled(monkeypatch, load(runs / "base.pt"), "--head_lr", 0.5)
    assert flags.lr_scale == 0.1 and taken == []
    assert {key: getattr(flags, key) for key in TOLD} == TOLD | dict(head_lr=0.5, total_batch_size=32)
    lr = list(values(runs / "sft", "lr").values())
    assert max(lr) == pytest.approx(0.1 * 0.02, rel=0.1) and lr[-1] < 0.05 * max(lr)
    flags, _, _ = settled(monkeypatch, load(runs / "base.pt"), "--method", "dpo", "--matrix_lr", 0.5)
    assert flags.lr_scale == 0.2 and flags.matrix_lr == flags.down_lr == 0.5


def test_what_was_fine_tuned_is_not_scaled_twice(runs, monkeypatch):
    flags, _, taken = settled(monkeypatch, last(runs / "dpo"))
    assert flags.lr_scale == 0.1 and flags.matrix_lr == 0.02 and flags.embed_lr == 0.3 and taken == []


def test_rates_that_a_checkpoint_does_not_tell_are_those_of_a_preset(monkeypatch):
    flags, _, taken = settled(monkeypatch, {})
    assert (flags.matrix_lr, flags.down_lr, flags.embed_lr, flags.head_lr) == (0.02, 0.02, 0.3, 0.008)
    assert {"matrix_lr", "down_lr", "embed_lr", "head_lr", "momentum"} < set(taken)
    flags, _, _ = settled(monkeypatch, {}, tie_weights=True)
    assert (flags.matrix_lr, flags.down_lr, flags.embed_lr) == (0.00705, 0.0141, 0.0018)
    char = dict(matrix_lr=0.04, embed_lr=0.1, head_lr=0.02, down_lr="?", weight_decay=0.0, momentum=0.95, ns_steps=3)
    flags, _, taken = settled(monkeypatch, {"train": {"flags": char}})
    assert flags.down_lr == 0.04 and flags.ns_steps == 3 and taken == ["beta1", "beta2", "batch_size"]


def test_how_long_it_learns(tmp_path, monkeypatch):
    (tmp_path / "best.jsonl").write_text('\n{"id": 0, "prompt": "It", "text": "It was", "tokens": 1}\n')
    (tmp_path / "web.jsonl").write_text('{"text": "It was"}\n')
    base = {"train": {"flags": TOLD}}
    flags, steps, _ = settled(monkeypatch, base, data=tmp_path / "best.jsonl")
    assert (flags.max_tokens, flags.epochs, flags.total_batch_size, steps) == (50_000, None, 256, 196)
    for data in (tmp_path / "web.jsonl", "x.txt", "x_*.bin"):
        flags, steps, _ = settled(monkeypatch, base, data=data, size=100_000)
        assert (flags.max_tokens, flags.epochs, flags.total_batch_size, steps) == (None, 3, 256, 1172)
    flags, steps, _ = settled(monkeypatch, base, "--epochs", 0.5, data=tmp_path / "best.jsonl", size=20_000)
    assert (flags.max_tokens, flags.total_batch_size, steps) == (None, 64, 157)
    flags, steps, _ = settled(monkeypatch, {}, "--max_tokens", 10**9)
    assert flags.total_batch_size == 2**19 and flags.val_loss_every == 191
    assert settled(monkeypatch, base, "--method", "dpo", "--pairs", 7, size=30)[1] == 9


# --- what it leaves ---


def test_a_checkpoint_names_its_parent(runs):
    for method in ("sft", "dpo"):
        parent = last(runs / method)["train"]["parent"]
        digest = hashlib.sha256()
        for tensor in load(runs / "base.pt")["model"].values():
            digest.update(tensor.numpy().tobytes())
        assert parent == dict(path="base.pt", step=7, sha256=digest.hexdigest())
        assert saved(runs / method) == [max(values(runs / method, "train_loss"))]


def test_it_shows_stories_that_sample_goes_on_with(work):
    flags = "--data stories.txt --max_tokens 300 --sample_every 4 --max_new_tokens 5 --val_loss_every 3".split()
    said = tune(work, "told", *flags, "--prompt", "Dark")
    stories = [json.loads(line) for line in (work / "told" / "stories.jsonl").read_text().splitlines()]
    assert [story["step"] for story in stories] == [0, 4, 8, 10] and list(values(work / "told", "val_loss")) == [
        0,
        3,
        6,
        9,
        10,
    ]
    assert all(story["text"].startswith("Dark") and story["tokens"] <= 5 for story in stories)
    assert said.splitlines()[-1].endswith("python sample.py told/ckpt_000010.pt") and "step 1/10  loss" in said
    command = [sys.executable, ROOT / "sample.py", "told/ckpt_000010.pt", "--max_new_tokens", "5", "--device", "cpu"]
    assert subprocess.run(command, cwd=work, capture_output=True, env=ENVIRONMENT).returncode == 0


def test_patience_keeps_the_best(work):
    said = tune(work, "patient", *SFT, "--lr_scale", 3, "--val_loss_every", 2, "--patience", 3, "--save_every", 2)
    val_loss = values(work / "patient", "val_loss")
    best = min(val_loss, key=val_loss.get)
    assert 0 < max(val_loss) == best + 6 == saved(work / "patient")[-1] < 50
    checkpoint = load(work / "patient" / "best.pt")
    assert checkpoint["train"]["step"] == best and "optimizer" not in checkpoint["train"]
    assert "the end)" in said and said.splitlines()[-1].endswith("python sample.py patient/best.pt")
    again = tune(work, "patient", *SFT, "--lr_scale", 3, "--val_loss_every", 2, "--patience", 3, "--resume")
    assert "resumed from" in again and values(work / "patient", "val_loss") == val_loss
    torch.testing.assert_close(load(work / "patient" / "best.pt")["model"], checkpoint["model"], atol=0, rtol=0)


def test_a_character_model_can_be_fine_tuned(work):
    texts = (work / "stories.txt").read_text().split("\n<|endoftext|>\n")
    chars = "".join(sorted(set("".join(texts) + PROMPT)))
    write_base(work / "chars.pt", tokenizer={"chars": chars}, vocab_size=len(chars), train=dict(step=1, flags={}))
    said = tune(work, "chars", *SFT, "--init", "chars.pt", "--epochs", 1, "--sample_every", 99, "--prompt", PROMPT)
    val_loss = list(values(work / "chars", "val_loss").values())
    assert val_loss[-1] < val_loss[0] and "chars.pt does not tell matrix_lr, " in said
    learn = script.read_stories(str(work / "stories.txt"), script.get_tokenizer({"chars": chars}))
    assert all("".join(chars[i] for i in story) == "\n\n" + text.strip() for story, text in zip(learn, texts))


# --- interrupted and resumed ---


def interrupt_often(work, out, flags):
    """kill -9, or SIGTERM, at moments decided by chance; then let the run come to its end."""
    chance = random.Random(out)
    flags = *flags, "--save_every", 2, "--resume"
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        before = max(saved(work / out), default=0)
        with start(work, out, *flags) as process:
            try:
                more = before + chance.randint(1, 6)
                wait_for(lambda least=more: max(saved(work / out), default=0) >= least, process)
                time.sleep(chance.uniform(0, 0.02))
                process.send_signal(number)
                process.wait(60)
            finally:
                process.kill()
        said = (work / f"{out}.txt").read_text()
        assert process.returncode == (-9 if number == signal.SIGKILL else 143), said
        assert number == signal.SIGKILL or said.splitlines()[-1].startswith("finetune.py: interrupted; ")
    assert "resumed from" in tune(work, out, *flags)


def test_interruptions_change_nothing(runs):
    for method, flags in (("sft", SFT), ("dpo", DPO)):
        interrupt_often(runs, f"{method}_killed", flags)
        assert_same_end(runs / f"{method}_killed", runs / method)


def test_a_full_disk_leaves_all_as_it_was(work):
    """A limit on the size of files stands in for the full disk: it fails at the same place."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    before = (work / "base.pt").read_bytes()
    message = tune(work, "full", *SFT, "--save_every", 5, code=1, preexec_fn=limit).splitlines()[-1]
    assert message.startswith("finetune.py: full/ckpt_000005.pt: could not be written")
    assert sorted(os.listdir(work / "full")) == ["log.jsonl", "log.txt", "stories.jsonl"]
    assert (work / "base.pt").read_bytes() == before


# --- refused ---


def refused(monkeypatch, capsys, *flags):
    """The one line that a mistake gets."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / "finetune.py"), *QUIET, *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        script.run(script.main)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("finetune.py: ") and message.count("\n") == 1, message
    return message


def test_data_that_nothing_can_be_learned_from_is_named(work, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_base("base.pt")
    group = json.loads((work / "ranked.jsonl").read_text().splitlines()[0])
    files = {
        "one.txt": b"One story.",
        "same.txt": b"One story.\n<|endoftext|>\nOne story.\n",
        "empty.txt": b"",
        "broken.txt": b"Two\n<|endoftext|>\nst\xffries",
        "broken.jsonl": b'{"text": "a"}\n{"text": "b"',
        "numbers.jsonl": b'{"text": "a"}\n{"text": 3}',
        "one_of_two.jsonl": b'{"text": "a"}\n\n{"text": " "}',
        "stories.csv": b"a,b",
    }
    rankings = {
        "empty.jsonl": [],
        "undecided.jsonl": [{**group, "best": None}] * 3,
        "one_group.jsonl": [group],
        "no_stories.jsonl": [group, {"group": 1, "best": "A"}],
        "no_texts.jsonl": [group, {**group, "stories": {key: {"prompt": PROMPT} for key in "ABCD"}}],
        "numbers.jsonl": [group, {**group, "stories": {key: {"prompt": 1, "text": 2} for key in "ABCD"}}],
        "strangers.jsonl": [group, {**group, "stories": {key: {"prompt": "x", "text": "y"} for key in "ABCD"}}],
        "nobody.jsonl": [group, {**group, "best": "E"}],
        "list.jsonl": [group, {**group, "best": ["A"]}],
        "alone.jsonl": [group, {**group, "best": "A", "stories": {"A": group["stories"]["A"]}}],
        "best.jsonl": [group, {"id": 0, "prompt": PROMPT, "text": PROMPT}],
        "rows.jsonl": [group, []],
    }
    for name, data in files.items():
        pathlib.Path(name).write_bytes(data)
        message = refused(monkeypatch, capsys, "--init", "base.pt", "--data", name)
        assert name in message and not os.path.exists("out"), message
    for name, rows in rankings.items():
        pathlib.Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        message = refused(monkeypatch, capsys, "--init", "base.pt", "--data", name, "--method", "dpo")
        assert (f"{name}:2: " if rows[1:] and rows[0] != rows[1] else f"{name}: ") in message, message
    write_shard(tmp_path / "gpt2.bin", [50256, 11, 12, 50256, 13, 14])
    write_shard(tmp_path / "one.bin", [END, 11, 12, 13])
    for name, words in (
        ("gpt2.bin", "50256 is outside the vocabulary of 257"),
        ("one.bin", "one.bin: fewer than two different stories"),
        ("no", ".txt"),
    ):
        assert words in refused(monkeypatch, capsys, "--init", "base.pt", "--data", name)
    assert "no.txt: No such file" in refused(monkeypatch, capsys, "--init", "base.pt", "--data", "no.txt")


def test_checkpoints_and_flags_that_do_not_do_are_named(work, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, stories = work / "base.pt", work / "stories.txt"
    whole = load(base)
    for name, changes in {
        "weightless": dict(model={}),
        "kind": dict(config={**whole["config"], "kind": "bigram"}),
    }.items():
        torch.save({**whole, **changes}, f"{name}.pt")
        assert f"{name}.pt: " in refused(monkeypatch, capsys, "--init", f"{name}.pt", "--data", stories)
    torch.save({key: value for key, value in whole.items() if key != "model"}, "no_model.pt")
    assert "without 'model'" in refused(monkeypatch, capsys, "--init", "no_model.pt", "--data", stories)
    assert "no.pt: No such file" in refused(monkeypatch, capsys, "--init", "no.pt", "--data", stories)
    assert "--init" in refused(monkeypatch, capsys, "--data", stories)
    write_base("chars.pt", tokenizer={"chars": "abc"}, vocab_size=3)
    assert "does not know the characters" in refused(monkeypatch, capsys, "--init", "chars.pt", "--data", stories)
    write_base("tied.pt", tie_weights=True)
    flags = ["--init", "tied.pt", "--data", stories, "--matrix_lr", 0, "--embed_lr", 0]
    assert "nothing would be learned" in refused(monkeypatch, capsys, *flags)
    rates = "--matrix_lr 0 --embed_lr 0 --head_lr 0".split()
    for flags, words in (
        (["--lr_scale", 0], "--lr_scale 0: nothing would be learned"),
        (rates, "nothing would be learned"),
        (["--epochs", 0], "--epochs 0: nothing would be learned"),
        (["--epochs", "nan"], "--epochs"),
        (["--epochs", 1, "--max_tokens", 9], "--max_tokens"),
        (["--block_size", 33], "--block_size 33"),
        (["--total_batch_size", 33], "--total_batch_size 33: not a multiple of 32"),
        (["--val_share", 1], "--val_share"),
        (["--method", "ppo"], "--method"),
    ):
        assert words in refused(monkeypatch, capsys, "--init", base, "--data", stories, *flags), flags
    assert os.listdir(tmp_path) and not os.path.exists("out"), "nothing is begun"


def test_the_first_checkpoint_is_never_in_the_way(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    [path] = (runs / "sft").glob("ckpt_*.pt")
    before = {name: path.parent.joinpath(name).read_bytes() for name in os.listdir(path.parent)}
    for flags in (["--overwrite"], ["--resume"], []):
        for out in ("sft", "../" + runs.name + "/sft/"):
            command = "--init", path, "--data", "stories.txt", "--out_dir", out, *flags
            assert "give another folder" in refused(monkeypatch, capsys, *command)
    os.symlink(path, "link.pt")
    command = "--init", "link.pt", "--data", "stories.txt", "--out_dir", "sft", "--overwrite"
    assert "give another folder" in refused(monkeypatch, capsys, *command)
    assert "holds an earlier run" in refused(
        monkeypatch, capsys, "--init", "base.pt", "--data", "stories.txt", "--out_dir", "sft"
    )
    assert {name: path.parent.joinpath(name).read_bytes() for name in os.listdir(path.parent)} == before


def test_a_run_is_resumed_as_what_it_was(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    other = load("base.pt")
    other["model"]["head"][0, 0] += 1
    torch.save(other, "other.pt")
    texts = (runs / "stories.txt").read_text()
    (runs / "more.txt").write_text(texts + "<|endoftext|>\nOne more.\n")
    (runs / "moved.txt").write_text(texts)
    before = {name: (runs / "sft" / name).read_bytes() for name in os.listdir(runs / "sft")}
    command = [*SFT, "--init", "base.pt", "--out_dir", "sft", "--resume"]
    for flags, words in (
        (["--init", "other.pt"], "was not fine-tuned from the weights in other.pt"),
        (["--data", "more.txt"], "has learned from something else than what more.txt holds"),
        (["--epochs", 3], "has --epochs 2.0, the flags say 3.0"),
        (["--lr_scale", 0.2], "has --lr_scale 0.1, the flags say 0.2"),
        (["--seed", 1], "has --seed 1337, the flags say 1"),
        (["--val_share", 0.5], "has --val_share 0.05, the flags say 0.5"),
        (["--total_batch_size", 64], "has --total_batch_size 32, the flags say 64"),
    ):
        assert words in refused(monkeypatch, capsys, *command, *flags), flags
    os.mkdir("pretrained")
    pretrained = last(runs / "sft")
    del pretrained["train"]["parent"]
    torch.save(pretrained, "pretrained/ckpt_000001.pt")
    assert "was not fine-tuned" in refused(monkeypatch, capsys, *command, "--out_dir", "pretrained")
    assert {name: (runs / "sft" / name).read_bytes() for name in os.listdir(runs / "sft")} == before
    assert "resumed from" in tune(runs, "sft", *SFT, "--data", "moved.txt", "--resume", "--batch_size", 1)
