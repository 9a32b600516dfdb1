"""hellaswag.py as a user runs it: beside transformers row by row, stopped, shared, with mistakes."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import call, refused
from test_model import QUESTION, as_nanochat, random_model, write_checkpoint
from test_train_gpt import popen, random_questions, wait_for

import hellaswag as script

FEW, MANY = 8, 250
PLAIN = "--device", "cpu", "--dtype", "float32"
MODELS = dict(bytes=dict(block_size=500, vocab_size=257), gpt2=dict(block_size=90, vocab_size=50257, n_embd=16))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder in which everything runs: questions, checkpoints, and exports of these for transformers."""
    work = tmp_path_factory.mktemp("hellaswag")
    (work / "few.jsonl").write_text("".join(random_questions(FEW, 36)))
    (work / "many.jsonl").write_text("".join(random_questions(MANY, 6)))
    for name, settings in MODELS.items():
        write_checkpoint(work / f"{name}.pt", random_model(**settings), name)
        call("runs/export_hf.py", work / f"{name}.pt", work / f"hf_{name}")
    return work


def answers(path, model):
    """The details' rows of a model, in the order of the questions."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted((row for row in rows if row["model"].endswith(model)), key=lambda row: row["question"])


def losses(rows):
    return torch.tensor([row["losses"] for row in rows])


# --- answers ---


@torch.no_grad()
@pytest.mark.parametrize("style", ["completion", "harness"])
@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_and_export_get_the_losses_of_transformers_row_by_row(work, tmp_path, name, style):
    """As lm-evaluation-harness has them: each row by itself, cut to its last window + 1 tokens (some of gpt2's are)."""
    flags = *PLAIN, "--data", work / "few.jsonl", "--style", style, "--details", tmp_path / "x.jsonl"
    call("hellaswag.py", work / f"{name}.pt", *flags)
    call("hellaswag.py", "--hf", work / f"hf_{name}", *flags)
    questions = [json.loads(line) for line in (work / "few.jsonl").read_text().splitlines()]
    encode, eot = script.get_tokenizer(name).encode_ordinary, MODELS[name]["vocab_size"] - 1
    made = [script.tokenize(row, style, encode, [eot] * (style == "harness"), 10**6) for row in questions]
    theirs, window = as_nanochat(random_model(**MODELS[name])), MODELS[name]["block_size"]
    expected = torch.zeros(FEW, 4)
    for i, (context, endings, _) in enumerate(made):
        for j, ending in enumerate(endings):
            row = torch.tensor(context + ending)[-window - 1 :]
            logits = theirs(row[None, :-1]).logits[0, -len(ending) :]
            expected[i, j] = F.cross_entropy(logits, row[-len(ending) :], reduction="sum")
    lengths = [len(context) + len(endings[0]) for context, endings, _ in made]
    assert expected.std() > 1 and min(lengths) < 90 < max(lengths) < 500
    for rows in (answers(tmp_path / "x.jsonl", f"{name}.pt"), answers(tmp_path / "x.jsonl", f"hf_{name}")):
        assert (losses(rows) - expected).abs().max() < 1e-3
        assert [row["prediction"] for row in rows] == expected.argmin(1).tolist()
        sizes = torch.tensor([sizes for _, _, sizes in made])
        assert [row["prediction_norm"] for row in rows] == (expected / sizes).argmin(1).tolist()
        assert [row["label"] for row in rows] == [row["label"] for row in questions]


@pytest.mark.parametrize("name", MODELS)
def test_harness_questions_are_cleaned_and_split_as_written_by_hand(name):
    encode = script.get_tokenizer(name).encode_ordinary
    row = dict(activity_label="Home", ctx_a="[header] Sharpen it [title] Find it.", ctx_b="the man in Rome [step]")
    row |= dict(ctx="another text", endings=["[s] Stop.", " a  b   c ", "[x]", "日 [title] 🙂 [step] m"])
    context = "Home: Sharpen it. Find it. The man in rome"
    expected = [("   Stop.", 6), ("  a b  c", 6), ("  ", 0), ("  日. 🙂 m", 6)]  # and their characters
    before, endings, sizes = script.tokenize(row, "harness", encode, [7], 1024)
    assert before == [7] + encode(context) and sizes == [size for _, size in expected]
    assert [before[1:] + ending for ending in endings] == [encode(context + ending) for ending, _ in expected]


# --- the table, details, several processes ---


@pytest.fixture(scope="module")
def whole(work):
    """A run of many questions that nothing interrupts: what it printed, its answers, its flags."""
    flags = *PLAIN, work / "bytes.pt", "--data", work / "many.jsonl"
    printed, _ = call("hellaswag.py", *flags, "--details", work / "whole.jsonl")
    return printed, answers(work / "whole.jsonl", "bytes.pt"), flags


def test_two_processes_share_the_questions_and_print_the_same_table(work, whole):
    printed, rows, flags = whole
    with popen("hellaswag.py", *flags, "--details", work / "shared.jsonl", "--batch_size", 40, ranks=2) as process:
        assert process.wait() == 0
    shared = answers(work / "shared.jsonl", "bytes.pt")
    assert (losses(shared) - losses(rows)).abs().max() < 1e-3
    assert [{**row, "losses": 0} for row in shared] == [{**row, "losses": 0} for row in rows]
    expected = [MANY]
    for key in ("prediction", "prediction_norm"):
        p = sum(row[key] == row["label"] for row in rows) / MANY
        expected += [p, (p * (1 - p) / MANY) ** 0.5]
    numbers = re.search(r"bytes\.pt +(\d+) +([\d.]+) ± ([\d.]+) +([\d.]+) ± ([\d.]+)$", printed, re.M).groups()
    assert list(map(float, numbers)) == pytest.approx(expected, abs=5e-5) and len(rows) == MANY
    assert re.search(r"GPT-2 124M, published +10,042 +0\.2859 +0\.2955", printed)


def test_killed_it_goes_on_where_it_was(work, whole):
    path, flags = work / "killed.jsonl", (*whole[2], "--details", work / "killed.jsonl")
    with popen("hellaswag.py", *flags, "--batch_size", 1) as process:
        wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= 20, process)
        process.kill()
    old = path.read_bytes().splitlines(keepends=True)
    old[0] = json.dumps({**json.loads(old[0]), "losses": [7.0] * 4}).encode() + b"\n"  # computed again: another
    path.write_bytes(b"".join(old) + old[-1][: len(old[-1]) // 2])
    assert call("hellaswag.py", *flags)[0] == whole[0]
    done = path.read_bytes()
    assert 20 <= len(old) < MANY and done.splitlines(keepends=True)[: len(old)] == old
    assert [row["question"] for row in answers(path, "bytes.pt")] == list(range(MANY))
    assert call("hellaswag.py", *flags)[0] == whole[0] and path.read_bytes() == done


def test_a_mistake_gets_one_line(work, tmp_path, monkeypatch):
    monkeypatch.chdir(work)
    write_checkpoint(work / "chars.pt", random_model(vocab_size=3), {"chars": "abc"})
    (work / "notes").write_text("notes")
    (work / "bad.jsonl").write_text(f"{json.dumps(QUESTION)}\n{json.dumps({**QUESTION, 'label': 4})}\n")
    for flags, message in {
        "": "name one checkpoint or more",
        "bytes.pt --hf hf_bytes": "name one checkpoint or more",
        "chars.pt": "chars.pt: knows only the characters of its own text",
        "--hf .": "--hf .: ",
        "bytes.pt --data none.jsonl": "python data/hellaswag.py fetches it",
        "bytes.pt --data bad.jsonl": "bad.jsonl:2: not a HellaSwag question",
        "bytes.pt --details notes": "notes: not a file of --details",
    }.items():
        assert message in refused("hellaswag.py", *PLAIN, "--data", "few.jsonl", "--details", "x", *flags.split())
    assert (work / "notes").read_text() == "notes" and (work / "x").read_text() == ""
