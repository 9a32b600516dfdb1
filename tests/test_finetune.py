"""finetune.py: what it learns from, beside other implementations, on two processes, killed, resumed, refused."""

import functools
import json
import math
import os
import random
import signal

import numpy as np
import pytest
import test_train_gpt
import torch
import torch.nn.functional as F
from conftest import refused
from test_model import as_nanochat, random_model
from test_train_gpt import assert_same_end, load, rows, wait_for, write_shard

import finetune as script
from bench import dpo_oracle

T, V, END = 32, 257, 256
PROMPT, LETTERS = "It was dark", "ABCDEFGHIJKLMNOPQRST"
TOLD = dict(matrix_lr=0.02, down_lr=0.03, embed_lr=0.3, head_lr=0.01, batch_size=3, total_batch_size=256)
SCRIPT = "finetune.py --device cpu --dtype float32 --sample_every 0 --init base".split()
start = functools.partial(test_train_gpt.start, script=SCRIPT)
tune = functools.partial(test_train_gpt.train, script=SCRIPT)
SFT = "--data stories.txt --total_batch_size 32 --epochs 2".split()
DPO = "--method dpo --data ranked.jsonl --pairs 5 --epochs 2 --lr_scale 0.05".split()
# Made by `python bench/dpo_oracle.py` with trl 1.16.0, transformers 5.23.0, torch 2.13.0.
TRL = """
loss 0.6676239 winners 0.1756265 losers 0.1003512
embed.size 2.1307026 embed.along 2.8234479 head.size 2.2464062 head.along 1.0361209
blocks.0.qkv.size 0.4541154 blocks.0.qkv.along 0.0199904 blocks.0.o.size 0.329742 blocks.0.o.along 0.1118622
blocks.0.up.size 1.0881702 blocks.0.up.along -0.5859354 blocks.0.down.size 0.9025846 blocks.0.down.along -0.9397056
blocks.1.qkv.size 0.3785119 blocks.1.qkv.along 0.1004635 blocks.1.o.size 0.2790381 blocks.1.o.along -0.2579589
blocks.1.up.size 0.8074928 blocks.1.up.along 0.0522598 blocks.1.down.size 0.9630203 blocks.1.down.along -0.087882
"""


def make_model(**changes):
    return random_model(**dict(block_size=T, n_layer=2) | changes)


def write_stories(path):
    """Stories of one window and of several, each with a letter that no other has."""
    chance = random.Random(0)
    texts = [f"{letter} {''.join(chance.choices('aeiou nrst', k=chance.randint(5, 70)))}." for letter in LETTERS]
    path.write_text("\n<|endoftext|>\n".join(texts) + "\n")
    return texts


def write_rankings(path):
    """24 groups whose winners are full of a, and whose losers are not; every eighth is undecided."""
    chance, rows = random.Random(0), []
    for number in range(24):
        best, stories = chance.choice("ABCD"), {}
        for key in "ABCD":
            text = PROMPT + "".join(chance.choices("aaab" if key == best else "bcde", k=chance.randint(5, 30)))
            stories[key] = dict(id=len(stories), prompt=PROMPT, text=text)
        rows.append(dict(group=number, stories=stories, best=None if number % 8 == 7 else best))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder in which everything runs: a checkpoint, stories and rankings, then one folder for each run."""
    work = tmp_path_factory.mktemp("finetune")
    model, train = make_model(), dict(step=7, flags=TOLD)
    base = dict(format=1, config=model.config, tokenizer="bytes", model=model.state_dict(), train=train)
    (work / "base").mkdir()
    torch.save(base, work / "base" / "ckpt.pt")
    write_stories(work / "stories.txt")
    write_rankings(work / "ranked.jsonl")
    return work


@pytest.fixture(scope="module")
def runs(work):
    """Both methods on one process and on two, never interrupted."""
    for ranks, end in ((1, ""), (2, "_on_two")):
        tune(work, f"sft{end}", *SFT, ranks=ranks)
        tune(work, f"dpo{end}", *DPO, ranks=ranks)
    return work


# --- what it learns from ---


def test_each_epoch_holds_each_story_once_in_an_order_of_its_own():
    chance = np.random.default_rng(0)
    stories = [np.concatenate([[END], chance.integers(256, size=n)]) for n in (1, 7, 30, 2, 100, 7)]
    size = sum(map(len, stories))
    first, second, _ = script.in_epochs(stories, 2 * size + 5, 5).split([size, size, 5])
    for epoch in (first.numpy(), second.numpy()):
        parts = np.split(epoch, np.flatnonzero(epoch == END))[1:]
        assert sorted(map(tuple, parts)) == sorted(map(tuple, stories))
    assert not first.equal(second)
    assert [len(script.hold_out(stories, share, 1)[1]) for share in (0.0, 0.34, 0.99)] == [1, 2, 5]  # one is learned


def test_stories_are_the_same_from_every_kind_of_file(tmp_path):
    texts = write_stories(tmp_path / "a.txt")
    expected = [[END, *text.encode()] for text in texts]
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.txt").read_bytes().replace(b"\n", b"\r\n"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, " \n", texts[3]]))
    tokens = [token for story in expected for token in story]
    write_shard(tmp_path / "a_1.bin", tokens[:500])
    write_shard(tmp_path / "a_2.bin", [*tokens[500:], END, *expected[5]])
    tokenizer = script.get_tokenizer("bytes")
    for name in ("a.txt", "b.txt", "a.jsonl", "a_*.bin"):
        found, by_a_model = script.read_stories(str(tmp_path / name), tokenizer)
        assert [story.tolist() for story in found] == expected and not by_a_model, name


def test_what_is_held_out_is_never_learned_from(runs):
    """A byte of one story alone keeps its embedding, to the bit, when that story is not read."""
    texts = (runs / "stories.txt").read_text().split("\n<|endoftext|>\n")
    before, after = load(runs / "base")["model"]["embed"], load(runs / "sft")["model"]["embed"]
    kept = [text for text in texts if torch.equal(before[ord(text[0])], after[ord(text[0])])]
    assert len(texts) == 20 and len(kept) == 1
    theirs, tokens = as_nanochat(make_model()), torch.tensor([END, *kept[0].strip().encode()])
    logits = torch.cat([theirs(x[None]).logits[0] for x in tokens[:-1].split(T)])
    assert rows(runs / "sft", "val_loss")[0] == pytest.approx(F.cross_entropy(logits, tokens[1:]).item(), abs=1e-5)


def test_tokens_of_gpt2(tmp_path):
    """Those of a prompt are never changed by what follows; blanks have no end; an <|endoftext|> in a line is text."""
    tokenizer, path = script.get_tokenizer("gpt2"), tmp_path / "a.jsonl"
    told = {key: dict(prompt="A dark and stor", text=f"A dark and stormy {key}") for key in "AB"}
    path.write_text(json.dumps(dict(group=0, stories=told, best="B")))
    stories, [[[winner, _]]] = script.read_groups(str(path), tokenizer, T)
    prompt = [50256, *tokenizer.encode_ordinary("A dark and stor")]
    assert stories[winner][0].tolist() == prompt + tokenizer.encode_ordinary("my B")
    assert stories[winner][1] == len(prompt)
    texts = [" " * 1_000_000 + "a", "a" + "\n" * 1_000_000, "It was<|endoftext|>dark  and \n\n stormy."]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found, _ = script.read_stories(str(path), tokenizer)
    assert [tokenizer.decode(story[1:].tolist()) for story in found] == texts
    assert found[2].tolist() == [50256, *tokenizer.encode_ordinary(texts[2])]


# --- what it computes ---


@pytest.mark.parametrize("changes", [{}, dict(tie_weights=True), dict(logit_softcap=0.0, vocab_size=50257, n_embd=16)])
def test_the_loss_whole_and_in_slices_has_the_gradients_of_transformers(changes):
    """Over 50,257 tokens a slice has 20 rows, and the last one fewer."""
    model = make_model(**changes)
    theirs = as_nanochat(model)
    idx, targets = torch.randint(V, (2, 2, T - 3))
    loss, whole = script.backward_in_slices(model, idx, targets, 0.25), model(idx, targets)
    (0.75 * whole).backward()  # as in pretraining
    expected = F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
    expected.backward()
    assert (4 * loss.item(), whole.item()) == pytest.approx(2 * (expected.item(),), abs=1e-5)
    vocab_size, layer = model.config["vocab_size"], theirs.model.layers[1]
    for ours, reference in [
        (model.embed.grad[:vocab_size], theirs.model.embed_tokens.weight.grad),
        ((model.embed if model.head is None else model.head).grad[:vocab_size], theirs.lm_head.weight.grad),
        (model.blocks[1].down.grad, layer.mlp.fc2.weight.grad),
        (model.blocks[1].qkv.grad[1], layer.self_attn.k_proj.weight.grad),
    ]:
        torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-4)
        assert reference.abs().max() > 1e-4


def test_dpo_is_that_of_trl():
    words = TRL.split()
    _, found = dpo_oracle.ours()
    assert list(found) == words[::2]
    for name, value in zip(words[::2], map(float, words[1::2])):
        assert found[name] == pytest.approx(value, abs=2e-5, rel=2e-5), name


def test_sft_is_a_plain_loop(work):
    """With the matrices at rest: transformers' model, torch.optim.AdamW, a twentieth of the steps up, then down."""
    tune(work, "plain", *"--data stories.txt --matrix_lr 0 --down_lr 0 --total_batch_size 64 --lr_scale 0.2".split())
    losses = rows(work / "plain", "train_loss")
    theirs = as_nanochat(make_model())
    parts, _ = script.read_stories(str(work / "stories.txt"), script.get_tokenizer("bytes"))
    learned, _ = script.hold_out(parts, 0.05, 1337)
    steps = math.ceil(3 * sum(map(len, learned)) / 64)  # three passes
    stream = script.in_epochs(learned, steps * 64 + 1, 1337).long()
    weights = [dict(params=theirs.model.embed_tokens.weight, lr=0.06), dict(params=theirs.lm_head.weight, lr=0.002)]
    optimizer = torch.optim.AdamW(weights, betas=(0.8, 0.95), eps=1e-10, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / (0.05 * steps), 1 - s / steps))
    assert len(losses) == steps
    for step in range(steps):
        tokens = stream[64 * step : 64 * step + 65]
        loss = F.cross_entropy(theirs(tokens[:-1].view(2, T)).logits.flatten(0, 1), tokens[1:])
        assert losses[step + 1] == pytest.approx(loss.item(), abs=1e-4), step
        loss.backward()
        optimizer.step()
        schedule.step()
        theirs.zero_grad()


def test_winners_become_likelier_than_losers(runs):
    first, *_, last = zip(*(rows(runs / "dpo", f"val_{key}").values() for key in ("loss", "margin", "accuracy")))
    assert first == (pytest.approx(math.log(2)), 0, 0.5)
    assert last[0] < 0.6 and last[1] > 0.2 and last[2] == 1
    assert "20 groups with a winner to learn from (60 pairs), 1 held out (3)" in (runs / "dpo/log.txt").read_text()


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_two_processes_have_the_same_losses(runs, method):
    for key in ("train_loss", "val_loss", "train_margin", "val_accuracy"):
        one, two = rows(runs / method, key), rows(runs / f"{method}_on_two", key)
        assert list(one) == list(two)
        np.testing.assert_allclose(list(two.values()), list(one.values()), atol=1e-4, rtol=0)


def test_rates_and_length_are_those_of_the_checkpoint_or_of_a_flag(runs, tmp_path):
    parent = load(runs / "sft")["train"]["parent"]
    assert (parent["path"], parent["step"]) == ("base/ckpt.pt", 7)
    assert max(rows(runs / "sft", "lr").values()) == pytest.approx(0.1 * 0.02, rel=0.1)
    (tmp_path / "best.jsonl").write_text('{"text": "It was", "prompt": "It"}\n{"text": "It is", "prompt": "It"}\n')
    flags = "--data", "best.jsonl", "--val_loss_every", 0, "--head_lr", 0.5
    said = tune(tmp_path, "best", *flags, "--init", runs / "dpo")
    assert "0.1 x matrix_lr 0.02, down_lr 0.03, embed_lr 0.3, head_lr 0.5" in said, "nothing is scaled twice"
    assert "step:196/196" in said and "a step: 256 tokens" in said  # 50,000 tokens, as in pretraining's steps


# --- what it leaves ---


def test_it_shows_stories_and_losses_on_the_way(work):
    flags = "--data stories.txt --max_tokens 300 --sample_every 4 --max_new_tokens 5 --val_loss_every 3".split()
    said = tune(work, "told", *flags, "--prompt", "Dark")
    stories = [json.loads(line) for line in (work / "told" / "stories.jsonl").read_text().splitlines()]
    assert [story["step"] for story in stories] == [0, 4, 8, 10]
    assert all(story["text"].startswith("Dark") and story["tokens"] <= 5 for story in stories)
    assert list(rows(work / "told", "val_loss")) == [0, 3, 6, 9, 10] and "step 1/10  loss" in said


# --- interrupted and resumed ---


@pytest.mark.parametrize("method, flags", [("sft", SFT), ("dpo", DPO)])
def test_interruptions_change_nothing(runs, method, flags):
    """kill -9, or SIGTERM, in the middle; then the run comes to its end."""
    out, flags = f"{method}_killed", (*flags, "--save_every", 2, "--resume")
    log = runs / out / "log.jsonl"
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        size = log.stat().st_size if log.exists() else 0
        with start(runs, out, *flags) as process:
            wait_for(lambda before=size: log.exists() and log.stat().st_size > before + 600, process)
            process.send_signal(number)
        assert process.returncode == (-9 if number == signal.SIGKILL else 143)
    assert "resumed from" in tune(runs, out, *flags)
    assert_same_end(runs / out, runs / method)


# --- refused ---


def test_mistakes_are_named(work, monkeypatch):
    monkeypatch.chdir(work)
    torch.save(load(work / "base") | dict(tokenizer={"chars": "abc"}), "chars.pt")
    (work / "latin.txt").write_bytes(b"Two\n<|endoftext|>\nst\xf6ries")
    (work / "broken.jsonl").write_text('{"text": "a"}\n{"text": "b"')
    (work / "group.jsonl").write_text((work / "ranked.jsonl").read_text().splitlines()[0])
    write_shard(work / "gpt2.bin", [50256, 11, 12, 50256, 13, 14])
    for flags, words in {
        "--data latin.txt": "latin.txt",
        "--data broken.jsonl": "broken.jsonl, line 2: ",
        "--data group.jsonl": 'group.jsonl, line 1: no "text"',
        "--data group.jsonl --method dpo": "group.jsonl: fewer than two groups",
        "--data gpt2.bin": "gpt2.bin",
        "--data none_*.bin": "none_*.bin: fewer than two different stories",
        "--init no.pt": "no.pt",
        "--init chars.pt": "chars.pt: a model of characters; train_char.py",
        "--total_batch_size 33": "--total_batch_size 33: not a multiple of 32",
    }.items():
        assert words in refused(*SCRIPT, *SFT, "--out_dir", "none", *flags.split()), flags
    assert not os.path.exists("none"), "nothing is begun"


def test_a_run_is_resumed_as_what_it_was_and_never_replaced_by_its_child(runs, monkeypatch):
    monkeypatch.chdir(runs)
    (runs / "more.txt").write_text((runs / "stories.txt").read_text() + "<|endoftext|>\nOne more.\n")
    before = {path.name: path.read_bytes() for path in (runs / "sft").iterdir()}
    for flags, words in {
        "--overwrite --init sft": "give another folder",
        "--overwrite --init sft/ckpt.pt": "give another folder",
        "--resume --init dpo": "was trained with init_sha256 ",
        "--resume --data more.txt": "was trained with data_sha256 ",
        "--resume --epochs 3": "was trained with epochs 2.0, not 3.0",
    }.items():
        assert words in refused(*SCRIPT, *SFT, "--out_dir", f"../{runs.name}/sft/", *flags.split()), flags
    assert {path.name: path.read_bytes() for path in (runs / "sft").iterdir()} == before
    assert "resumed from" in tune(runs, "sft", *SFT, "--resume", "--batch_size", 1)
