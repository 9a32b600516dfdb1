"""hellaswag.py as a user runs it: beside transformers row by row, stopped, shared, with mistakes; and its download."""

import contextlib
import http.server
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import data.hellaswag as fetch
import hellaswag as script

ROOT = pathlib.Path(__file__).resolve().parent.parent
FEW, MANY = 12, 250
WORDS = "tea the a kettle she boils, then pours. it slowly; naïve Über cups — and walks away [step] now".split()
QUESTION = dict(
    activity_label="Tea", ctx="She boils", ctx_a="She boils", ctx_b="", endings=["a", "b", "c", "d"], label=2
)


def write_questions(path, count, longest):
    """Questions of which some have contexts or endings of so many words."""
    chance = random.Random(0)
    rows = []
    for _ in range(count):
        lengths = [chance.randint(1, most) for most in (2 * longest, *[longest] * 4)]
        ctx, *endings = [" ".join(chance.choices(WORDS, k=length)) for length in lengths]
        rows.append({**QUESTION, "ctx": ctx, "ctx_a": ctx, "endings": endings, "label": chance.randrange(4)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write_checkpoint(path, tokenizer, step, window=500, tied=False):
    """A small model of random weights in the form of train_gpt.py's checkpoints."""
    torch.manual_seed(step)
    V, L, C = {"bytes": 257, "gpt2": 50257}[tokenizer], 2, 16
    config = dict(vocab_size=V, block_size=window, n_layer=L, n_head=2, n_embd=C, tie_weights=tied)
    padded = (V + 63) // 64 * 64, C
    shapes = {"embed": padded} if tied else {"embed": padded, "head": padded}
    for i in range(L):
        for name, shape in dict(qkv=(3, C, C), o=(C, C), up=(4 * C, C), down=(C, 4 * C)).items():
            shapes[f"blocks.{i}.{name}"] = shape
    model = {name: 0.5 * torch.randn(shape) for name, shape in shapes.items()}
    torch.save(dict(format=1, config=config, tokenizer=tokenizer, model=model, train=dict(step=step)), path)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder in which everything runs: questions, checkpoints, and exports of these for transformers."""
    work = tmp_path_factory.mktemp("hellaswag")
    write_questions(work / "few.jsonl", FEW, 36)
    write_questions(work / "many.jsonl", MANY, 6)
    write_checkpoint(work / "bytes.pt", "bytes", 100)
    write_checkpoint(work / "gpt2.pt", "gpt2", 200, tied=True)
    write_checkpoint(work / "short.pt", "gpt2", 300, window=100)
    for name in ("bytes", "gpt2", "short"):
        command = [sys.executable, ROOT / "runs" / "export_hf.py", f"{name}.pt", f"hf_{name}"]
        subprocess.run(command, check=True, cwd=work, stdout=subprocess.DEVNULL)
    return work


def main(monkeypatch, *flags):
    """hellaswag.py in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", "--device", "cpu", "--dtype", "float32", *map(str, flags)])
    try:
        script.run(script.main)
    except SystemExit as end:
        return end.code
    return 0


def table(stdout):
    """{name: (questions, acc, its error, acc_norm, its error)} of the lines that a run computed."""
    cell = r" +([\d.]+) ± ([\d.]+)"
    found = re.findall(rf"^(\S+) +([\d,]+){cell}{cell}$", stdout, re.M)
    return {name: (int(count.replace(",", "")), *map(float, numbers)) for name, count, *numbers in found}


def answers(path, model):
    """The details' rows of a model, in the order of the questions."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted((row for row in rows if row["model"] == model), key=lambda row: row["question"])


def losses(rows):
    return torch.tensor([row["losses"] for row in rows])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- answers ---


@torch.no_grad()
def row_by_row(folder, texts, special):
    """Losses of endings after contexts in nats (n, 4), as lm-evaluation-harness has them: each row by itself, and the
    last window + 1 tokens of it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    window, found = model.config.max_position_embeddings, torch.zeros(len(texts), 4)
    for i, (context, endings) in enumerate(texts):
        for j, ending in enumerate(endings):
            before = tokenizer.encode(context, add_special_tokens=special)
            row = tokenizer.encode(context + ending, add_special_tokens=special)
            n, row = len(row) - len(before), torch.tensor(row)[-window - 1 :]
            logits = model(row[None, :-1]).logits[0]
            found[i, j] = F.cross_entropy(logits[-n:], row[-n:], reduction="sum")
    return found


@pytest.mark.parametrize("style", ["completion", "harness"])
@pytest.mark.parametrize("name", ["bytes", "gpt2", "short"])
def test_checkpoint_and_export_get_the_losses_of_transformers_row_by_row(work, tmp_path, monkeypatch, name, style):
    """short's window of 100 tokens cuts rows, each ending's by itself; the harness style begins with <|endoftext|>."""
    monkeypatch.chdir(work)
    flags = ["--data", "few.jsonl", "--style", style, "--details", tmp_path / "x.jsonl"]
    assert main(monkeypatch, f"{name}.pt", *flags) == main(monkeypatch, "--hf", f"hf_{name}", *flags) == 0
    ours, theirs = answers(tmp_path / "x.jsonl", f"{name}.pt"), answers(tmp_path / "x.jsonl", f"hf_{name}")
    questions = read(work / "few.jsonl")
    encode = in_bytes if name == "bytes" else in_gpt2
    made = [script.tokenize(row, style, encode, [], 10**6) for row in questions]
    decode = (lambda tokens: bytes(tokens).decode()) if name == "bytes" else tiktoken.get_encoding("gpt2").decode
    texts = [(decode(context), [decode(ending) for ending in endings]) for context, endings, _ in made]
    expected = row_by_row(work / f"hf_{name}", texts, special=style == "harness")
    for rows in (ours, theirs):
        assert [row["question"] for row in rows] == list(range(FEW))
        assert (losses(rows) - expected).abs().max() < 1e-3 and expected.std() > 1
        assert [row["prediction"] for row in rows] == expected.argmin(1).tolist()
        sizes = torch.tensor([sizes for _, _, sizes in made])
        assert [row["prediction_norm"] for row in rows] == (expected / sizes).argmin(1).tolist()
        assert [row["label"] for row in rows] == [row["label"] for row in questions]
    lengths = [max(len(a) + len(e) for e in b) for a, b, _ in made]
    assert name != "short" or min(lengths) < 90 < 110 < max(lengths)  # some rows are cut, some are not
    step = dict(bytes=100, gpt2=200, short=300)[name]
    assert {row["step"] for row in ours} == {step} and {row["step"] for row in theirs} == {None}


def in_bytes(text):
    return list(text.encode())


def in_gpt2(text):
    return tiktoken.get_encoding("gpt2").encode_ordinary(text)


HARNESS = [  # a question's texts, and what becomes of them, written by hand: context, then (ending, its characters)
    (
        ("Roof", "A man sits.", "the man in Rome", ["waves.", " turns  round ", "a   b", "is 20 m high."]),
        "Roof: A man sits. The man in rome",
        [(" waves.", 6), (" turns round", 11), (" a  b", 4), (" is 20 m high.", 13)],
    ),
    (
        (
            "Home and Garden",
            "[header] How to sharpen a knife [title] Find a stone. [step] Wet it.",
            "",
            ["[substeps] Stop.", "Rub it. [title] Dry it. [step] Now.", "Café — très chaud.", "日本 🙂"],
        ),
        "Home and Garden: How to sharpen a knife. Find a stone. Wet it.",
        [("  Stop.", 6), (" Rub it.. Dry it. Now.", 21), (" Café — très chaud.", 18), (" 日本 🙂", 4)],
    ),
    (
        ("Rest", "Lie down. [step]", "", ["Sleep.", "[x]", "a [b] [c] d", "[open"]),
        "Rest: Lie down.",
        [("  Sleep.", 6), ("  ", 0), ("  a  d", 4), ("  [open", 5)],
    ),
]


@pytest.mark.parametrize("encode", [in_bytes, in_gpt2])
@pytest.mark.parametrize("texts, context, expected", HARNESS, ids=["plain", "wikihow", "space"])
def test_harness_questions_are_cleaned_and_split_as_written_by_hand(encode, texts, context, expected):
    row = dict(zip(("activity_label", "ctx_a", "ctx_b", "endings"), texts), ctx="another text", label=0)
    before, endings, sizes = script.tokenize(row, "harness", encode, [7], 1024)
    assert before == [7] + encode(context) and sizes == [size for _, size in expected]
    assert [before[1:] + ending for ending in endings] == [encode(context + ending) for ending, _ in expected]


# --- the table, details, several processes ---


@pytest.fixture(scope="module")
def whole(work):
    """A run of many questions that nothing interrupts: what it printed."""
    flags = ["bytes.pt", "--data", "many.jsonl", "--details", "whole.jsonl"]
    return start(work, *flags).communicate(timeout=120)[0]


def start(work, *flags, ranks=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, ROOT / "hellaswag.py", "--device", "cpu", "--dtype", "float32", *flags]
    settings = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=work)
    return subprocess.Popen(list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"}, **settings)


def test_table_has_accuracies_with_errors_above_the_published_figures(work, whole):
    rows, expected = answers(work / "whole.jsonl", "bytes.pt"), []
    for key in ("prediction", "prediction_norm"):
        p = sum(row[key] == row["label"] for row in rows) / MANY
        expected += [p, (p * (1 - p) / MANY) ** 0.5]
    count, *numbers = table(whole)["bytes.pt"]
    assert count == MANY == len(rows) and numbers == pytest.approx(expected, abs=5e-5) and numbers[1] > 0
    head, line, empty, *published = whole.splitlines()
    assert "completion" in head and "acc_norm" in head and not empty and len(published) == 4
    assert re.search(r"GPT-2 124M, published +10,042 +0\.2859 +0\.2955", whole)


def test_a_folder_stands_for_its_checkpoint_and_several_are_scored(work, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    write_checkpoint(tmp_path / "run" / "ckpt.pt", "bytes", 1)
    monkeypatch.chdir(tmp_path)
    flags = ["--data", work / "few.jsonl", "--details", "new/folder/x.jsonl"]
    assert main(monkeypatch, "run", work / "bytes.pt", *flags) == 0
    assert list(table(capsys.readouterr().out)) == ["run/ckpt.pt", str(work / "bytes.pt")]
    write_checkpoint(tmp_path / "run" / "ckpt.pt", "bytes", 2)  # another one of that name is scored anew
    assert main(monkeypatch, "run", *flags) == main(monkeypatch, "run", *flags, "--style", "harness") == 0
    rows = answers(tmp_path / "new" / "folder" / "x.jsonl", "run/ckpt.pt")
    assert sorted(row["step"] for row in rows) == [1] * FEW + [2] * 2 * FEW


def test_two_processes_share_the_questions(work, whole):
    process = start(work, "bytes.pt", "--data", "many.jsonl", "--details", "shared.jsonl", "--batch_size", 40, ranks=2)
    assert process.communicate(timeout=120)[0] == whole
    shared, alone = answers(work / "shared.jsonl", "bytes.pt"), answers(work / "whole.jsonl", "bytes.pt")
    assert [row["question"] for row in shared] == list(range(MANY))
    assert (losses(shared) - losses(alone)).abs().max() < 1e-3
    assert [{**row, "losses": 0} for row in shared] == [{**row, "losses": 0} for row in alone]


def test_killed_it_goes_on_where_it_was(work, whole, monkeypatch, capsys):
    path = work / "killed.jsonl"
    flags = ["bytes.pt", "--data", "many.jsonl", "--details", path]
    process = start(work, *flags, "--batch_size", 1)
    while not path.exists() or path.read_bytes().count(b"\n") < 20:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    old = path.read_bytes().splitlines(keepends=True)
    assert 20 <= len(old) < MANY
    old[0] = json.dumps({**json.loads(old[0]), "losses": [7.0] * 4}).encode() + b"\n"  # computed again: another
    path.write_bytes(b"".join(old) + old[-1][: len(old[-1]) // 2])
    monkeypatch.chdir(work)
    assert main(monkeypatch, *flags) == 0 and capsys.readouterr().out == whole
    assert path.read_bytes().splitlines(keepends=True)[: len(old)] == old
    assert [row["question"] for row in answers(path, "bytes.pt")] == list(range(MANY))
    monkeypatch.setattr(script, "score", None)  # nothing is left to compute
    assert main(monkeypatch, *flags) == main(monkeypatch, *flags, "--questions", 100) == 0
    assert table(capsys.readouterr().out)["bytes.pt"][0] == 100


# --- mistakes ---


def test_mistakes_get_one_line(work, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(work)
    checkpoint = torch.load(work / "bytes.pt", weights_only=True)
    torch.save({**checkpoint, "tokenizer": {"chars": "abc"}}, tmp_path / "chars.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").write_text("notes")
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(QUESTION)}\n{json.dumps({**QUESTION, 'label': 4})}\n")
    cases = {
        (): "name one checkpoint or more",
        ("bytes.pt", "--hf", "hf_bytes"): "name one checkpoint or more",
        ("bytes.pt", "--style", "other"): "--style",
        ("few.jsonl",): "few.jsonl: not a checkpoint",
        (tmp_path / "chars.pt",): "chars.pt: knows only the characters of its own text",
        ("none.pt",): "No such file or directory: 'none.pt'",
        (tmp_path / "empty",): "ckpt.pt",
        ("--hf", tmp_path / "empty"): f"--hf {tmp_path / 'empty'}: ",
        ("bytes.pt", "--data", tmp_path / "none.jsonl"): "python data/hellaswag.py fetches it",
        ("bytes.pt", "--data", tmp_path / "data.jsonl"): f"{tmp_path / 'data.jsonl'}:2: not a HellaSwag question",
        ("bytes.pt", "--details", tmp_path / "notes"): "notes: not a file of --details",
        ("bytes.pt", "--details", tmp_path): f"Is a directory: '{tmp_path}'",
    }
    for flags, message in cases.items():
        assert main(monkeypatch, "--data", "few.jsonl", "--details", tmp_path / "x.jsonl", *flags) == 2, flags
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and said[0].startswith("hellaswag.py: ") and message in said[0], said
    assert (tmp_path / "notes").read_text() == "notes" and not read(tmp_path / "x.jsonl")


# --- data/hellaswag.py ---


@contextlib.contextmanager
def served(body, ranges=True, lost_after=None):
    """A server of one file: its address, and the ranges that were asked for. lost_after: bytes, then it hangs up."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers["Range"])
            first = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) if ranges else 0
            self.send_response(206 if ranges else 200)
            self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            self.wfile.write(body[first : len(body) if lost_after is None else first + lost_after])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/hellaswag_val.jsonl", asked
        server.shutdown()


def test_download_resumes_is_checked_and_renamed(tmp_path, monkeypatch, capsys):
    body = os.urandom(300_000)
    path, part = tmp_path / "val.jsonl", tmp_path / "val.jsonl.part"
    monkeypatch.setattr(fetch, "PATH", str(path))
    monkeypatch.setattr(fetch, "SIZE", len(body))
    for ranges in (True, False):
        with served(body, ranges, lost_after=100_000) as (url, _):
            monkeypatch.setattr(fetch, "URL", url)
            with pytest.raises(SystemExit, match="no connection to .*the same command goes on"):
                fetch.main()
        have = part.stat().st_size
        assert not path.exists() and have > 50_000 and part.read_bytes() == body[:have]
        with served(body, ranges) as (url, asked):
            monkeypatch.setattr(fetch, "URL", url)
            fetch.main()
            fetch.main()  # it is there: nobody is asked
        assert asked == [f"bytes={have}-"] and path.read_bytes() == body and not part.exists()
        path.unlink()
    with served(body[:-1]) as (url, _):
        monkeypatch.setattr(fetch, "URL", url)
        with pytest.raises(SystemExit, match="299,999 bytes instead of 300,000"):
            fetch.main()
    with pytest.raises(SystemExit, match="no connection"):  # the server has gone
        fetch.main()
    assert list(tmp_path.iterdir()) == []
