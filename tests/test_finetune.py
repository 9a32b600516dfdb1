"""finetune.py: what it learns from, beside other implementations, on several processes, killed, resumed, refused."""

import hashlib
import json
import math
import os
import pathlib
import random
import signal
import string
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_train_gpt import as_nanochat, wait_for, write_shard

import finetune as script
from bench import dpo_oracle

ROOT = pathlib.Path(__file__).resolve().parent.parent
T, V, END = 32, 257, 256
PROMPT = "It was dark"
TOLD = dict(matrix_lr=0.02, down_lr=0.03, embed_lr=0.3, head_lr=0.01, weight_decay=0.1, momentum=0.9, batch_size=3)
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


def random_model(**changes):
    """A model with no zero anywhere in it."""
    torch.manual_seed(0)
    config = dict(vocab_size=V, block_size=T, n_layer=2, n_head=2, n_embd=32)
    model = script.GPT(config | dict(tie_weights=False, embed_norm=True, logit_softcap=15.0) | changes)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def write_base(path, tokenizer="bytes", told=TOLD, **changes):
    model = random_model(**changes)
    train = dict(step=7, flags=told | dict(total_batch_size=256, data="x"))
    torch.save(dict(format=1, config=model.config, tokenizer=tokenizer, model=model.state_dict(), train=train), path)


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


def load(path):
    return torch.load(path, weights_only=True)


def values(out, key):
    """By step: a resumed run may have logged one twice."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


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


def test_each_epoch_holds_each_story_once():
    chance = np.random.default_rng(0)
    stories = [np.concatenate([[END], chance.integers(256, size=n)]) for n in (1, 7, 30, 2, 100, 7)]
    size = sum(map(len, stories))
    stream, found = script.in_epochs(stories, 3 * size + 5, 5).numpy(), set()
    assert stream.shape == (3 * size + 5,)
    for epoch in range(3):
        whole = stream[epoch * size : (epoch + 1) * size]
        parts = np.split(whole, np.flatnonzero(whole == END))[1:]
        assert sorted(map(tuple, parts)) == sorted(map(tuple, stories))
        found.add(whole.tobytes())
    assert len(found) == 3, "each epoch has an order of its own"
    assert script.in_epochs(stories, size, 6).numpy().tobytes() not in found
    assert np.array_equal(script.in_epochs(stories, 9, 5).numpy(), stream[:9])


def test_every_token_but_the_first_is_a_target_once():
    for n in (2, 8, 9, 10):
        x, y = script.in_rows(torch.arange(n), 4)
        assert x[y >= 0].tolist() == list(range(n - 1)) and y[y >= 0].tolist() == list(range(1, n)), n
        assert x.shape == y.shape == (math.ceil((n - 1) / 4), 4)


@pytest.mark.parametrize("count, share, held", [(2, 0.0, 1), (2, 0.9, 1), (20, 0.05, 1), (100, 0.05, 5), (3, 0.9, 2)])
def test_a_share_is_held_out(count, share, held):
    learned, validated = script.hold_out(list(range(count)), share, 1)
    assert len(validated) == held and sorted(learned + validated) == list(range(count))


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
    before, after = load(runs / "base.pt")["model"]["embed"], load(runs / "sft/ckpt.pt")["model"]["embed"]
    kept = [text for text in texts if torch.equal(before[ord(text[0])], after[ord(text[0])])]
    assert len(texts) == 20 and len(kept) == 1
    assert "19 different stories to learn from" in (runs / "sft.txt").read_text()
    theirs, total = as_nanochat(random_model()), 0.0
    tokens = torch.tensor([END, *kept[0].strip().encode()])
    with torch.no_grad():
        for x, y in zip(tokens[:-1].split(T), tokens[1:].split(T)):
            total += F.cross_entropy(theirs(x[None]).logits[0], y, reduction="sum").item()
    assert values(runs / "sft", "val_loss")[0] == pytest.approx(total / (len(tokens) - 1), abs=1e-5)


def test_pairs_are_a_winner_and_each_of_its_losers(tmp_path):
    rows = write_rankings(tmp_path / "ranked.jsonl")
    rows[0]["stories"]["A"]["text"] = PROMPT + "é" * 30  # longer than the context
    for story in rows[1]["stories"].values():
        story["text"] = PROMPT  # nothing was written
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    decided = [row for row in rows if row["best"] and row is not rows[1]]
    tokenizer = script.get_tokenizer("bytes")
    stories, groups = script.read_groups(str(tmp_path / "ranked.jsonl"), tokenizer, T, "all", 0)
    assert len(groups) == len(decided) == 20

    def text(index):
        tokens, begin = stories[index]
        assert tokens[0] == END and bytes(tokens[1:begin].tolist()).decode() == PROMPT
        return bytes(tokens[1:].tolist())

    for row, pairs in zip(decided, groups):
        told = {key: story["text"].encode()[:T] for key, story in row["stories"].items()}  # T tokens after the first
        winner = told.pop(row["best"])
        assert [text(index) for index in pairs[:, 0]] == [winner] * 3
        assert [text(index) for index in pairs[:, 1]] == list(told.values())
    _, one = script.read_groups(str(tmp_path / "ranked.jsonl"), tokenizer, T, "one", 0)
    assert all(len(few) == 1 and few[0].tolist() in many.tolist() for few, many in zip(one, groups))
    assert len({few[0, 1] - many[0, 1] for few, many in zip(one, groups)}) > 1


def test_a_continuation_follows_the_tokens_of_its_prompt(tmp_path):
    stories = {key: dict(prompt="A dark and stor", text=f"A dark and stormy {key}") for key in "AB"}
    (tmp_path / "ranked.jsonl").write_text(json.dumps(dict(group=0, stories=stories, best="B")))
    tokenizer = script.get_tokenizer("gpt2")
    found, [[[winner, _]]] = script.read_groups(str(tmp_path / "ranked.jsonl"), tokenizer, T, "all", 0)
    tokens, begin = found[winner]
    assert tokenizer.decode(tokens[:begin].tolist()) == "<|endoftext|>A dark and stor"
    assert tokens[begin:].tolist() == tokenizer.encode_ordinary("my B")


# --- what it computes ---


@pytest.mark.parametrize("changes", [{}, dict(tie_weights=True), dict(logit_softcap=0.0, vocab_size=50257, n_embd=16)])
def test_the_loss_in_slices_has_the_gradients_of_transformers(changes):
    """Over 50,257 tokens a slice has 20 rows, and the last one fewer."""
    model = random_model(**changes)
    theirs = as_nanochat(model)
    idx, targets = torch.randint(V, (2, 2, T - 3))
    loss = script.backward_in_slices(model, idx, targets, 0.25)
    logits = theirs(idx).logits.flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten()) / 4
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
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
    """With the matrices at rest: transformers' model, torch.optim.AdamW, the schedule as --help tells it."""
    flags = "--data stories.txt --matrix_lr 0 --down_lr 0 --total_batch_size 64 --epochs 2 --lr_scale 0.2".split()
    tune(work, "plain", *flags, "--warmup_frac", 0.2, "--warmdown_frac", 0.6)
    losses = values(work / "plain", "train_loss")
    theirs = as_nanochat(random_model())
    parts, _ = script.read_stories(str(work / "stories.txt"), script.get_tokenizer("bytes"))
    learned, _ = script.hold_out(parts, 0.05, 1337)
    steps = math.ceil(2 * sum(map(len, learned)) / 64)
    stream = script.in_epochs(learned, steps * 64 + 1, 1337).long()
    weights = [dict(params=theirs.model.embed_tokens.weight, lr=0.06), dict(params=theirs.lm_head.weight, lr=0.002)]
    optimizer = torch.optim.AdamW(weights, betas=(0.8, 0.95), eps=1e-10, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / (0.2 * steps), (steps - s) / (0.6 * steps))
    )
    assert len(losses) == steps > 20
    for step in range(steps):
        tokens = stream[64 * step : 64 * step + 65]
        logits = theirs(tokens[:-1].view(2, T)).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[1:])
        assert losses[step + 1] == pytest.approx(loss.item(), abs=1e-4), step
        loss.backward()
        optimizer.step()
        schedule.step()
        theirs.zero_grad()
    assert losses[steps] < losses[1] - 0.5


def test_winners_become_likelier_than_losers(runs):
    loss, margin, accuracy = (values(runs / "dpo", f"val_{key}") for key in ("loss", "margin", "accuracy"))
    end = max(loss)
    assert loss[0] == pytest.approx(math.log(2)) and margin[0] == 0 and accuracy[0] == 0.5
    assert loss[end] < 0.6 and margin[end] > 0.2 and accuracy[end] == 1
    assert values(runs / "dpo", "train_accuracy")[end] == 1 and values(runs / "dpo", "train_margin")[end] > 0.2
    assert "20 groups with a winner to learn from (60 pairs), 1 held out (3)" in (runs / "dpo.txt").read_text()


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_two_processes_have_the_same_losses(runs, method):
    for key in ("train_loss", "val_loss", "train_margin", "val_accuracy"):
        one, two = values(runs / method, key), values(runs / f"{method}_on_two", key)
        assert list(one) == list(two)
        np.testing.assert_allclose(list(two.values()), list(one.values()), atol=1e-4, rtol=0)
    assert "on 2 x cpu" in (runs / f"{method}_on_two.txt").read_text()


def test_rates_and_length_are_those_of_the_checkpoint_or_of_a_flag(runs, tmp_path):
    lr = list(values(runs / "sft", "lr").values())
    assert max(lr) == pytest.approx(0.1 * 0.02, rel=0.1) and lr[-1] < 0.05 * max(lr)
    write_base(tmp_path / "base.pt", told={})
    (tmp_path / "web.jsonl").write_text("".join(json.dumps({"text": f"{i}" * 40}) + "\n" for i in range(10, 90)))
    (tmp_path / "best.jsonl").write_text('{"text": "It was", "prompt": "It"}\n{"text": "It is", "prompt": "It"}\n')
    said = tune(tmp_path, "web", "--data", "web.jsonl", "--head_lr", 0.5, "--epochs", 0.2)
    assert "0.1 x matrix_lr 0.025, down_lr 0.025, embed_lr 0.7, head_lr 0.5" in said and "a step: 32 tokens" in said
    assert "step:39/39" in said  # 76 stories of 81 tokens, a fifth of them, 32 a step
    said = tune(tmp_path, "best", "--data", "best.jsonl", "--init", runs / "dpo", "--val_loss_every", 0)
    assert "0.1 x matrix_lr 0.02, down_lr 0.03," in said, "what was fine-tuned is not scaled twice"
    assert "step:196/196" in said and "a step: 256 tokens" in said  # 50,000 tokens, as in pretraining's steps


# --- what it leaves ---


def test_a_checkpoint_names_its_parent(runs):
    for method in ("sft", "dpo"):
        checkpoint = load(runs / method / "ckpt.pt")
        digest = hashlib.sha256()
        for tensor in load(runs / "base.pt")["model"].values():
            digest.update(tensor.numpy().tobytes())
        assert checkpoint["train"]["parent"] == dict(path="base.pt", step=7, sha256=digest.hexdigest())
        assert checkpoint["train"]["step"] == max(values(runs / method, "train_loss"))


def test_it_shows_stories_that_sample_goes_on_with(work):
    flags = "--data stories.txt --max_tokens 300 --sample_every 4 --max_new_tokens 5 --val_loss_every 3".split()
    said = tune(work, "told", *flags, "--prompt", "Dark")
    stories = [json.loads(line) for line in (work / "told" / "stories.jsonl").read_text().splitlines()]
    assert [story["step"] for story in stories] == [0, 4, 8, 10]
    assert list(values(work / "told", "val_loss")) == [0, 3, 6, 9, 10]
    assert all(story["text"].startswith("Dark") and story["tokens"] <= 5 for story in stories)
    assert said.splitlines()[-1].endswith("python sample.py told") and "step 1/10  loss" in said
    command = [sys.executable, ROOT / "sample.py", "told", "--max_new_tokens", "5", "--device", "cpu"]
    assert subprocess.run(command, cwd=work, capture_output=True, env=ENVIRONMENT).returncode == 0


def test_a_character_model_can_be_fine_tuned(work):
    texts = (work / "stories.txt").read_text().split("\n<|endoftext|>\n")
    chars = "".join(sorted(set("".join(texts) + PROMPT)))
    write_base(work / "chars.pt", tokenizer={"chars": chars}, vocab_size=len(chars), told={})
    said = tune(work, "chars", *SFT, "--init", "chars.pt", "--epochs", 1, "--sample_every", 99, "--prompt", PROMPT)
    val_loss = list(values(work / "chars", "val_loss").values())
    assert val_loss[-1] < val_loss[0] and f"\n{PROMPT}" in said
    stories, _ = script.read_stories(str(work / "stories.txt"), script.get_tokenizer({"chars": chars}))
    assert all("".join(chars[i] for i in story) == "\n\n" + text.strip() for story, text in zip(stories, texts))


# --- interrupted and resumed ---


@pytest.mark.parametrize("method, flags", [("sft", SFT), ("dpo", DPO)])
def test_interruptions_change_nothing(runs, method, flags):
    """kill -9, or SIGTERM, at moments decided by chance; then the run comes to its end."""
    out, chance = f"{method}_killed", random.Random(method)
    log, flags = runs / out / "log.jsonl", (*flags, "--save_every", 2, "--resume")
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        size = log.stat().st_size if log.exists() else 0
        with start(runs, out, *flags) as process:
            try:
                wait_for(lambda before=size: log.exists() and log.stat().st_size > before + 600, process)
                time.sleep(chance.uniform(0, 0.02))
                process.send_signal(number)
                process.wait(60)
            finally:
                process.kill()
        said = (runs / f"{out}.txt").read_text()
        assert process.returncode == (-9 if number == signal.SIGKILL else 143), said
        assert number == signal.SIGKILL or said.splitlines()[-1].startswith("finetune.py: interrupted; ")
    assert "resumed from" in tune(runs, out, *flags)
    ours, theirs = load(runs / out / "ckpt.pt"), load(runs / method / "ckpt.pt")
    assert ours["train"]["step"] == theirs["train"]["step"]
    for key in ("moments", "squares"):
        torch.testing.assert_close(ours["train"][key], theirs["train"][key], atol=0, rtol=0)
    torch.testing.assert_close(ours["model"], theirs["model"], atol=0, rtol=0)
    for key in ("train_loss", "val_loss", "val_margin"):
        assert values(runs / out, key) == values(runs / method, key), key


# --- refused ---


def refused(monkeypatch, capsys, *flags):
    """The one line that a mistake gets."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / "finetune.py"), *QUIET, *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        script.run(script.main)
    message = capsys.readouterr().err
    for file in script.files:  # and with them the lock
        file.close()
    script.files.clear()
    assert stop.value.code == 2 and message.startswith("finetune.py: ") and message.count("\n") == 1, message
    return message


def test_data_that_nothing_can_be_learned_from_is_named(work, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_base("base.pt")
    group = json.loads((work / "ranked.jsonl").read_text().splitlines()[0])
    files = {
        "one.txt": b"One story.",
        "empty.txt": b"",
        "broken.txt": b"Two\n<|endoftext|>\nst\xffries",
        "broken.jsonl": b'{"text": "a"}\n{"text": "b"',
        "stories.csv": b"a,b",
    }
    for name, data in files.items():
        pathlib.Path(name).write_bytes(data)
        message = refused(monkeypatch, capsys, "--init", "base.pt", "--data", name)
        assert name in message and not os.path.exists("out"), message
    rankings = {
        "empty": [],
        "one_group": [group],
        "numbers": [group, {**group, "stories": {key: {"prompt": 1, "text": 2} for key in "ABCD"}}],
        "strangers": [group, {**group, "stories": {key: {"prompt": "x", "text": "y"} for key in "ABCD"}}],
        "list": [group, {**group, "best": ["A"]}],
        "best": [group, {"id": 0, "prompt": PROMPT, "text": PROMPT}],
    }
    for name, rows in rankings.items():
        pathlib.Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        message = refused(monkeypatch, capsys, "--init", "base.pt", "--data", f"{name}.jsonl", "--method", "dpo")
        wanted = f"{name}.jsonl, line 2: " if rows[1:] and rows[0] != rows[1] else f"{name}.jsonl: fewer than two"
        assert wanted in message, message
    write_shard(tmp_path / "gpt2.bin", [50256, 11, 12, 50256, 13, 14])
    write_shard(tmp_path / "one.bin", [END, 11, 12, 13])
    pathlib.Path("cut.bin").write_bytes(pathlib.Path("one.bin").read_bytes()[:-1])
    for name in ("gpt2.bin", "one.bin", "cut.bin", "none_*.bin", "no.txt"):
        assert name in refused(monkeypatch, capsys, "--init", "base.pt", "--data", name)


def test_flags_that_do_not_do_are_named(work, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, stories = work / "base.pt", work / "stories.txt"
    assert "no.pt" in refused(monkeypatch, capsys, "--init", "no.pt", "--data", stories)
    write_base("chars.pt", tokenizer={"chars": "abc"}, vocab_size=3)
    assert "does not know the characters" in refused(monkeypatch, capsys, "--init", "chars.pt", "--data", stories)
    for flags in (["--lr_scale", 0], ["--epochs", 0], ["--max_tokens", 0]):
        message = refused(monkeypatch, capsys, "--init", base, "--data", stories, *flags)
        assert flags[0] in message and "nothing would be learned" in message
    message = refused(monkeypatch, capsys, "--init", base, "--data", stories, "--total_batch_size", 33)
    assert "--total_batch_size 33: not a multiple of 32" in message
    assert not os.path.exists("out"), "nothing is begun"


def test_the_first_checkpoint_is_never_in_the_way(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    before = {name: (runs / "sft" / name).read_bytes() for name in os.listdir(runs / "sft")}
    os.symlink("sft/ckpt.pt", "link.pt")
    for init in ("sft", "sft/ckpt.pt", "link.pt"):
        for flag in ("--overwrite", "--resume"):
            command = "--init", init, "--data", "stories.txt", "--out_dir", f"../{runs.name}/sft/", flag
            assert "give another folder" in refused(monkeypatch, capsys, *command)
    command = "--init", "base.pt", "--data", "stories.txt", "--out_dir", "sft"
    assert "holds an earlier run" in refused(monkeypatch, capsys, *command)
    assert {name: (runs / "sft" / name).read_bytes() for name in os.listdir(runs / "sft")} == before


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
        (["--init", "other.pt"], "was trained with --init sha256:"),
        (["--data", "more.txt"], "was trained with --data sha256:"),
        (["--epochs", 3], "was trained with --epochs 2.0, not 3.0"),
        (["--lr_scale", 0.2], "was trained with --lr_scale 0.1, not 0.2"),
        (["--seed", 1], "was trained with --seed 1337, not 1"),
        (["--val_share", 0.5], "was trained with --val_share 0.05, not 0.5"),
        (["--total_batch_size", 64], "was trained with --total_batch_size 32, not 64"),
    ):
        assert words in refused(monkeypatch, capsys, *command, *flags), flags
    os.mkdir("pretrained")
    pretrained = load("sft/ckpt.pt")
    del pretrained["train"]["decisive"]
    torch.save(pretrained, "pretrained/ckpt.pt")
    assert "can't be resumed" in refused(monkeypatch, capsys, *command, "--out_dir", "pretrained")
    assert {name: (runs / "sft" / name).read_bytes() for name in os.listdir(runs / "sft")} == before
    assert "resumed from" in tune(runs, "sft", *SFT, "--data", "moved.txt", "--resume", "--batch_size", 1)
