"""data/prepare.py: every format there and back, shards to the token, and what wrong input gets."""

import collections
import csv
import functools
import itertools
import json
import os
import pathlib
import signal
import sys
import time
import types

import numpy as np
import openpyxl
import pytest
import test_fineweb
import tiktoken
from conftest import refused

import data.prepare as script

CASES = pathlib.Path(__file__).parent / "cases"
TEXTS = [
    "It was a dark and stormy night.\n\nNobody came.",
    "Ночь была тёмной; 暗い夜だった 🦉\nÜber alles: naïve café",
    '"Who is there?" she asked, and the walls\tsaid "I, am".\n',
    "x" * 200_000,  # more than csv takes by default
    "The end.",
]
run = functools.partial(test_fineweb.run, name="prepare.py")


def read_shard(path):
    header, tokens = np.fromfile(path, "<i4", 256), np.fromfile(path, "<u2", offset=1024)
    assert header[:3].tolist() == [20240520, 1, len(tokens)] and not header[3:].any()
    return tokens.tolist()


def read_shards(prefix, tokenizer):
    """All documents of the shards, the last being validation, decoded without the script's help."""
    paths = [*sorted(prefix.parent.glob(f"{prefix.name}_train_??????.bin")), f"{prefix}_val_000000.bin"]
    tokens, bpe = list(itertools.chain(*map(read_shard, paths))), tiktoken.get_encoding("gpt2")
    eot = {"gpt2": 50256, "bytes": 256}[tokenizer]
    assert tokens[0] == eot
    pieces = [list(piece) for is_eot, piece in itertools.groupby(tokens, lambda token: token == eot) if not is_eot]
    return [bpe.decode(piece) if tokenizer == "gpt2" else bytes(piece).decode() for piece in pieces]


def write(path, texts=TEXTS):
    """An input with these texts, in the format that its name says."""
    book = openpyxl.Workbook()
    if path.suffix == ".txt":
        path.write_text("\n<|endoftext|>\n".join(texts) + "\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts), encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as f:  # with a byte order mark, as Excel does
            csv.writer(f).writerows([["title", "body"], *(["a title", text] for text in texts)])
    else:
        for row in [["title", "body", "rating"], *(["a title", text[:32_000], 4.5] for text in texts)]:
            book.active.append(row)
        book.save(path)
    return path


def read(*paths, column=None, skip_bad=False):
    flags = types.SimpleNamespace(inputs=[str(path) for path in paths], column=column, skip_bad=skip_bad)
    return list(script.documents(flags, collections.Counter()))


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".xlsx"])
def test_every_format_comes_back(tmp_path, suffix, tokenizer):
    path, out = write(tmp_path / f"input{suffix}"), tmp_path / "new" / "set"
    texts = [text[:32_000] for text in TEXTS] if suffix == ".xlsx" else TEXTS
    assert "documents: 5, " in run(path, "--tokenizer", tokenizer, "--out", out)
    assert read_shards(out, tokenizer) == texts and len(list(out.parent.iterdir())) == 2


@pytest.mark.parametrize("size, texts", [(7, TEXTS), (10**6, [str(i) * (i % 99 + 1) for i in range(2500)])], ids="ab")
def test_shards_are_one_stream_and_replace_those_of_an_earlier_run(tmp_path, size, texts):
    inputs = write(tmp_path / "1.txt", texts[:3]), write(tmp_path / "2.jsonl", texts[3:])
    expected = [[50256, *tiktoken.get_encoding("gpt2").encode_ordinary(text)] for text in texts]
    prefix = tmp_path / "[x]" / "s"
    prefix.parent.mkdir()
    for name in ("s_train_999999.bin", "s_train_000009.bin.tmp", "s2_train_000999.bin"):
        (prefix.parent / name).write_bytes(b"old")
    arguments = ["--val_fraction", 0.4, "--shard_tokens", size, "--out", f"{prefix.parent}//s", "--workers", 3]
    assert "--overwrite" in run(*inputs, *arguments, code=2) and len(os.listdir(prefix.parent)) == 3
    run(*inputs, *arguments, "--overwrite")
    train = [read_shard(path) for path in sorted(prefix.parent.glob("s_train_??????.bin"))]
    val, n = read_shard(f"{prefix}_val_000000.bin"), round(len(texts) * 0.6)
    assert sum(train, []) == sum(expected[:n], []) and val == sum(expected[n:], [])
    assert {len(tokens) for tokens in train[:-1]} <= {size} and 0 < len(train[-1]) <= size
    assert len(os.listdir(prefix.parent)) == len(train) + 2, "validation, and the shards of s2"


def test_text_and_empty_documents(tmp_path):
    path, out = write(tmp_path / "x.xlsx", ["", "a", "", " \n ", "b"]), tmp_path / "out.txt"
    (tmp_path / "y.txt").write_text("<|endoftext|>\nc\n<|endoftext|>\n<|endoftext|>\nd\n<|endoftext|>\n")
    (tmp_path / "z.jsonl").write_text('{"text": ""}\n\n{"text": "e"}\n')
    assert "documents: 5, 5 bytes; 6 empty" in run(path, tmp_path / "y.txt", tmp_path / "z.jsonl", "--text", out)
    assert out.read_text() == "\n<|endoftext|>\n".join("abcde") + "\n"
    assert "--overwrite" in run(out, "--text", out, code=2)
    run(out, "--text", out, "--overwrite")
    assert read(out) == list("abcde") and sorted(os.listdir(tmp_path)) == ["out.txt", "x.xlsx", "y.txt", "z.jsonl"]


def test_lines_of_windows_and_oddities_of_formats(tmp_path):
    (tmp_path / "x.TXT").write_bytes("\ufeffein\r\nText\r\n<|endoftext|>\r\nzwei".encode())
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b \\ud83e"}\r\n')  # half of an owl
    (tmp_path / "x.csv").write_bytes(b'body,n\r\n"one\r\ntwo",1\r\n\r\nthree,2\r\n')
    write(tmp_path / "x.xlsx", ["one_x000D_\ntwo"])  # so does Excel write a carriage return
    assert read(tmp_path / "x.TXT", tmp_path / "x.jsonl") == ["ein\nText", "zwei", "a", "b ?"]
    assert read(tmp_path / "x.csv", tmp_path / "x.xlsx") == ["one\ntwo", "three", "one\ntwo"]


def test_markers_and_columns(tmp_path):
    assert read(CASES / "gpt2simple.txt") == ["One story.\nIts end.", "Two story.", "Three."]
    path, out = write(tmp_path / "x.jsonl", ["one\n<|endoftext|>\nend", "two"]), tmp_path / "out.txt"
    assert "became a blank: in 1 of" in run(path, "--text", out)
    assert out.read_text() == "one\n \nend\n<|endoftext|>\ntwo\n"
    assert read(CASES / "both.jsonl") == ["summary one", "summary two"]
    assert read(CASES / "both.jsonl", column="body") == ["Body one", "Body two"]


def test_a_cell_that_lost_its_text_is_named(tmp_path):
    out, error = tmp_path / "out.txt", write(tmp_path / "error.xlsx", ["one", "#NAME?", "two"])  # which is an error
    for path in (CASES / "equals.xlsx", error):
        assert f"{path.name}: row 3: " in run(path, "--text", out, code=2) and not out.exists()
        assert "1 bad ones" in run(path, "--text", out, "--skip_bad")
        out.unlink()
    assert read(CASES / "equals.xlsx", skip_bad=True) == ["First story.", "Third story.", "Fourth."]


def test_a_million_blanks(tmp_path):
    texts = ["a" + " " * 1_000_000 + "b", "a" + "\n" * 3_000_000 + "b", "a" + " " * 999 + "b"]
    run(write(tmp_path / "x.jsonl", texts), "--out", tmp_path / "s")
    assert read_shards(tmp_path / "s", "gpt2") == texts
    assert read_shard(tmp_path / "s_val_000000.bin")[1:] == tiktoken.get_encoding("gpt2").encode_ordinary(texts[2])


WORDS, ROW = "a stürmisch word\n", b'{"text": "a"}\n'
WRONG = {
    ("x.xlsx", b""): "x.xlsx: no .xlsx file",
    ("x.txt", b"\n \n<|endoftext|>\n"): "x.txt: empty",
    ("x.txt", b"gut\n" + WORDS.encode("cp1252")): "x.txt:2: not UTF-8 but perhaps CP1252; `iconv -f CP1252 -t UTF-8",
    ("x.txt", "a word\n".encode("utf-16-le")): "x.txt:1: not UTF-8 but perhaps UTF-16LE",
    ("x.jsonl", ROW + b'{"text": "a"\n' + ROW): "x.jsonl:2: ",
    ("x.jsonl", ROW + b"[" * 100_000): "x.jsonl:2: ",
    ("x.jsonl", ROW + b'{"body": "a"}\n'): "x.jsonl:2: no text in the field 'text', which --column",
    ("x.csv", b"title,story\na,b\n"): "x.csv: no column 'body'; --column can be 'title', 'story'",
    ("x.csv", b"title,body\na,b\nc\n"): "x.csv:3: ",
    ("x.csv", b'title,body\na,"b\nc\n'): "x.csv:3: broken CSV",
    ("x.doc", b"a"): "x.doc: the name must end in .txt, .jsonl, .csv or .xlsx",
    ("x.txt", b"a story"): "one document only",
}


def test_bad_input_gets_one_line_that_names_the_place(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)
    for (name, content), message in WRONG.items():
        (tmp_path / name).write_bytes(content)
        said = refused("data/prepare.py", tmp_path / name, "--tokenizer", "bytes", "--out", tmp_path / "out" / "s")
        assert message in said
    assert not (tmp_path / "out").exists()


def test_mistakes_get_one_line(tmp_path):
    path, out = write(tmp_path / "x.xlsx"), tmp_path / "s"
    assert "'rating' is 4.5, not text" in run(path, "--out", out, "--column", "rating", code=2)
    assert "no.txt: No such file" in run(tmp_path / "no.txt", "--out", out, code=2)
    assert str(path) in run(path, "--out", path / "s", code=2) and os.listdir(tmp_path) == ["x.xlsx"]
    run(path, "--out", out, "--tokenizer", "bytes", "--val_fraction", 0)
    assert sorted(os.listdir(tmp_path)) == ["s_train_000001.bin", "x.xlsx"]
    (tmp_path / "openpyxl.py").write_text("raise ImportError")
    without = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert "pip install openpyxl" in run(path, "--text", out, env=without, code=2)


@pytest.mark.parametrize("target", ["--out", "--text"])
def test_a_full_disk_leaves_what_was_there(tmp_path, target):
    path, out = write(tmp_path / "x.txt"), tmp_path / "out"
    for name in ("out", "out_train_000001.bin"):
        (tmp_path / name).write_bytes(b"old")
    flags = path, target, out, "--tokenizer", "bytes", "--overwrite"
    assert "File too large" in run(*flags, code=1, preexec_fn=test_fineweb.LIMIT)
    assert sorted(os.listdir(tmp_path)) == ["out", "out_train_000001.bin", "x.txt"]
    assert out.read_bytes() == (tmp_path / "out_train_000001.bin").read_bytes() == b"old"


@pytest.mark.parametrize("victim, code", [("all", 130), ("parent", -9), ("a worker", 1)])
def test_workers_end_with_the_run(tmp_path, victim, code):
    path, out = write(tmp_path / "x.jsonl", ["x" * 20_000_000] * 3), tmp_path / "out"  # which take a worker long
    process = test_fineweb.start("prepare.py", path, "--out", out / "s", "--workers", 2, start_new_session=True)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text():
        time.sleep(0.01)
    time.sleep(0.5)
    if victim == "all":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        os.kill(process.pid if victim == "parent" else int(children.read_text().split()[0]), signal.SIGKILL)
    said = process.communicate(timeout=20)[1]  # which ends when no process is left to say something
    assert process.returncode == code and said.count("\n") == (victim != "parent") and os.listdir(out) == []
