"""data/prepare.py: every format there and back, shards to the token, and what wrong input gets."""

import concurrent.futures
import contextlib
import csv
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import openpyxl
import pytest
import tiktoken

import data.prepare as script

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXTS = [
    "It was a dark and stormy night.\n\nNobody came.",
    "Ночь была тёмной; 暗い夜だった 🦉\nÜber alles: naïve café",
    '"Who is there?" she asked, and the walls\tsaid "I, am".\n',
    "x" * 200_000,  # more than csv takes by default
    "one\nline <|endoftext|> of many\n\n\n",
    "The end.",
]


def run(*arguments, code=0, **settings):
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=100, **settings)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


def read_shard(path):
    header, tokens = np.fromfile(path, "<i4", 256), np.fromfile(path, "<u2", offset=1024)
    assert header[:3].tolist() == [20240520, 1, len(tokens)] and not header[3:].any()
    return tokens.tolist()


def read_shards(prefix):
    """All documents of the shards, the last being validation, decoded without the script's help."""
    train = [read_shard(path) for path in sorted(prefix.parent.glob(f"{prefix.name}_train_??????.bin"))]
    return sum(train, []) + read_shard(f"{prefix}_val_000000.bin")


def decode(tokens, tokenizer):
    eot = {"gpt2": 50256, "bytes": 256}[tokenizer]
    assert tokens[0] == eot
    starts = [i for i, token in enumerate(tokens) if token == eot] + [len(tokens)]
    pieces = [tokens[i + 1 : j] for i, j in zip(starts, starts[1:])]
    return [bytes(p).decode() if tokenizer == "bytes" else tiktoken.get_encoding("gpt2").decode(p) for p in pieces]


def write(path, texts=TEXTS):
    """An input with these texts, in the format that its name says."""
    if path.suffix == ".txt":
        path.write_text("\n<|endoftext|>\n".join(texts) + "\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts), encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as f:  # with a byte order mark, as Excel does
            csv.writer(f).writerows([["title", "body"], *(["a title", text] for text in texts)])
    else:
        book = openpyxl.Workbook()
        for row in [["title", "body", "rating"], *(["a title", text[:32_000], 4.5] for text in texts)]:
            book.active.append(row)
        book.save(path)
    return path


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".xlsx"])
def test_every_format_comes_back(tmp_path, suffix, tokenizer):
    path = write(tmp_path / f"input{suffix}")
    texts = [text[:32_000] for text in TEXTS] if suffix == ".xlsx" else TEXTS
    out = tmp_path / "new" / "set"
    done = run(path, "--tokenizer", tokenizer, "--out", out)
    tokens = read_shards(out)
    assert decode(tokens, tokenizer) == texts
    assert decode(read_shard(f"{out}_val_000000.bin"), tokenizer) == texts[-1:]
    size = sum(len(text.encode()) for text in texts)
    assert (
        f"documents: 6 (5 train, 1 val), {size:,} bytes; 0 empty" in done.stdout
        and f"tokens: {len(tokens):,} (" in done.stdout
    )
    assert f"{len(tokens) / size:.4f} per byte" in done.stdout and "shards: 2" in done.stdout
    assert len(list(out.parent.iterdir())) == 2


def test_many_small_shards_are_one_stream(tmp_path):
    bpe = tiktoken.get_encoding("gpt2")
    first, second = write(tmp_path / "1.txt", TEXTS[:3]), write(tmp_path / "2.jsonl", TEXTS[4:])
    texts = TEXTS[:3] + TEXTS[4:]
    expected = [[50256, *bpe.encode_ordinary(text)] for text in texts]
    for size in (1, 7, len(sum(expected[:3], [])), 10**6):  # the third cuts exactly between shards
        prefix = tmp_path / f"[{size}]" / "s"
        arguments = [
            first,
            second,
            "--val_fraction",
            0.4,
            "--shard_tokens",
            size,
            "--out",
            f"{prefix.parent}//s",
            "--workers",
            1,
        ]
        if size == 7:  # sets of an earlier run and of others are there already
            prefix.parent.mkdir()
            for name in ("s_train_000999.bin", "s_val_000001.bin", "s2_train_000999.bin", "s_train_9.bin"):
                (prefix.parent / name).write_bytes(b"old")
            assert "--overwrite" in run(*arguments, code=2).stderr and len(os.listdir(prefix.parent)) == 4
            arguments.append("--overwrite")
        removed = run(*arguments).stdout.count("removed: ")
        train = [read_shard(path) for path in sorted(prefix.parent.glob("s_train_??????.bin"))]
        assert sum(train, []) == sum(expected[:3], []) and read_shards(prefix) == sum(expected, [])
        assert {len(tokens) for tokens in train[:-1]} <= {size} and 0 < len(train[-1]) <= size
        names = {f"s_train_{i + 1:06d}.bin" for i in range(len(train))} | {"s_val_000000.bin"}
        others = {"s2_train_000999.bin", "s_train_9.bin"} if size == 7 else set()
        assert set(os.listdir(prefix.parent)) == names | others and removed == len(others)


def test_any_number_of_workers_writes_the_same(tmp_path):
    words = random.Random(0)
    texts = [" ".join(f"{words.random():.3g}" for _ in range(words.randrange(1, 20_000))) for _ in range(60)]
    assert sum(map(len, texts)) > 3 * 2**20, "several parts are under way at once"
    path = write(tmp_path / "x.jsonl", texts)
    for workers in (0, 1, 2):
        arguments = ["--tokenizer", "bytes", "--shard_tokens", 1_000_000]
        run(path, *arguments, "--workers", workers, "--out", tmp_path / str(workers) / "s")
    files = [{path.name: path.read_bytes() for path in (tmp_path / str(w)).iterdir()} for w in (0, 1, 2)]
    assert files[0] == files[1] == files[2] and len(files[0]) == 5
    assert decode(read_shards(tmp_path / "2" / "s"), "bytes") == texts


def test_only_some_parts_are_in_memory():
    texts = [chr(97 + i) * 2**20 for i in range(9)] + ["the", "end"]
    left = iter(texts)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        parts = script.tokenize_all(left, "bytes", pool, 4)
        first = next(parts)
        assert first[:2].tolist() == [256, 97] and len(first) == 1 + 2**20
        assert next(left)[0] == "e", "four were read, and the fifth we took away"
        tokens = np.concatenate([first, *parts]).tolist()
    assert decode(tokens, "bytes") == texts[:4] + texts[5:]


@pytest.mark.parametrize("fraction, val", [(0.05, 1), (0.29, 6), (0.99, 19), (0, 0)])
def test_the_last_documents_validate(tmp_path, fraction, val):
    texts = [str(i) for i in range(20)]
    path = write(tmp_path / "x.txt", texts)
    run(path, "--tokenizer", "bytes", "--val_fraction", fraction, "--out", tmp_path / "s")
    assert decode(read_shard(tmp_path / "s_train_000001.bin"), "bytes") == texts[: 20 - val]
    if val:
        assert decode(read_shard(tmp_path / "s_val_000000.bin"), "bytes") == texts[20 - val :]
    assert len(list(tmp_path.glob("*.bin"))) == 1 + bool(val)


def test_empty_documents_are_passed_over_and_counted(tmp_path):
    path = write(tmp_path / "x.xlsx", ["", "a", "", " \n ", "b"])
    other = tmp_path / "y.txt"
    other.write_text("<|endoftext|>\nc\n<|endoftext|>\n<|endoftext|>\nd\n<|endoftext|>\n")
    lines = tmp_path / "z.jsonl"
    lines.write_text('{"text": ""}\n\n{"text": "e"}\n')
    done = run(path, other, lines, "--tokenizer", "bytes", "--out", tmp_path / "s")
    assert decode(read_shards(tmp_path / "s"), "bytes") == ["a", "b", "c", "d", "e"]
    assert "documents: 5 (4 train, 1 val), 5 bytes; 6 empty" in done.stdout


def test_text_for_characters(tmp_path):
    path, out = write(tmp_path / "x.csv"), tmp_path / "out.txt"
    done = run(path, "--text", out)
    assert out.read_bytes().decode() == "\n<|endoftext|>\n".join(TEXTS) + "\n"
    assert str(out) in done.stdout and sorted(os.listdir(tmp_path)) == ["out.txt", "x.csv"]
    assert list(script.documents(str(out))) == TEXTS
    before = out.read_bytes()
    assert "--overwrite" in run(out, "--text", out, code=2).stderr
    run(out, "--text", out, "--overwrite")
    assert out.read_bytes() == before, "reading and writing change nothing"


def test_lines_of_windows_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "x.TXT"
    path.write_bytes("\ufeffein\r\nText\r\n<|endoftext|>\r\nzwei".encode())
    assert list(script.documents(str(path))) == ["ein\nText", "zwei"]
    path = tmp_path / "x.jsonl"
    path.write_bytes("\ufeff".encode() + b'{"text": "a"}\r\n{"text": "b \\ud83e"}\r\n')  # half of an owl
    assert list(script.documents(str(path))) == ["a", "b ?"]
    path = tmp_path / "x.csv"
    path.write_bytes(b'body,n\r\n"one\r\ntwo",1\r\n\r\nthree,2\r\n')
    assert list(script.read(str(path), "body")) == ["one\ntwo", "three"]
    write(tmp_path / "x.xlsx", ["one_x000D_\ntwo"])  # so does Excel write a carriage return
    assert list(script.read(str(tmp_path / "x.xlsx"), "body")) == ["one\ntwo"]


def test_a_workbook_may_lack_cells_and_be_wrong_about_its_size(tmp_path):
    book = openpyxl.Workbook()
    for row in [["title", "body"], ["only a title"], ["both", "a"], [], ["both", "b"]]:
        book.active.append(row)
    book.save(tmp_path / "right.xlsx")
    with zipfile.ZipFile(tmp_path / "right.xlsx") as right, zipfile.ZipFile(tmp_path / "x.xlsx", "w") as wrong:
        for name in right.namelist():
            wrong.writestr(name, right.read(name).replace(b'<dimension ref="A1:B5"', b'<dimension ref="A1:A2"'))
        assert wrong.read("xl/worksheets/sheet1.xml").count(b'ref="A1:A2"') == 1
    assert list(script.read(str(tmp_path / "x.xlsx"), "body")) == ["", "a", "", "b"]


def test_documents_come_before_the_file_is_read_to_its_end(tmp_path):
    pipe = tmp_path / "x.txt"
    os.mkfifo(pipe)
    go_on = threading.Event()

    def feed():
        with open(pipe, "wb", buffering=0) as f:
            f.write(b"one\n<|endoftext|>\ntwo\n")
            go_on.wait(20)

    threading.Thread(target=feed, daemon=True).start()
    texts = script.documents(str(pipe))
    assert next(texts) == "one" and not go_on.is_set()
    go_on.set()
    assert list(texts) == ["two"]


def test_bad_input_gets_one_line_that_names_the_place(tmp_path, capsys, monkeypatch):
    def wrong(name, content, *messages, arguments=()):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        prefix = tmp_path / "out" / "s"
        argv = ["prepare.py", str(path), "--tokenizer", "bytes", "--out", str(prefix), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            script.main()
        said = capsys.readouterr()
        assert stop.value.code == 2 and said.err.count("\n") == 1 and said.out == "", said
        assert said.err.startswith("prepare.py: ") and not prefix.parent.exists()
        for message in messages:
            assert message in said.err, said.err

    row = b'{"text": "a"}\n'
    for suffix in ("txt", "jsonl", "csv", "xlsx"):
        wrong(f"no.{suffix}", None, f"no.{suffix}: No such file")
        wrong(f"empty.{suffix}", b"", f"empty.{suffix}: ")
    wrong("blank.txt", b"\n \n<|endoftext|>\n", "blank.txt: empty")
    wrong("latin.txt", "gut\nstürmisch".encode("latin-1"), "latin.txt:2: not UTF-8", "byte 3")
    wrong("wide.txt", "text".encode("utf-16"), "wide.txt:1: not UTF-8")
    wrong("latin.csv", "body\na\nstürmisch".encode("latin-1"), "latin.csv:3: not UTF-8")
    wrong("x.jsonl", row + b'{"text": "a"\n' + row, "x.jsonl:2: broken JSON")
    wrong("deep.jsonl", row + b"[" * 100_000, "deep.jsonl:2: broken JSON")
    wrong("x.jsonl", row * 2 + b'{"body": "a"}\n', "x.jsonl:3: ", '"text"')
    wrong("x.jsonl", row + b'{"text": 3}\n', "x.jsonl:2: ", '"text"')
    wrong("x.jsonl", row + b'["text"]\n', "x.jsonl:2: ", '"text"')
    wrong("x.csv", b"title,story\na,b\n", "x.csv: no column 'body'", "'title', 'story'")
    wrong("x.csv", b"title,body\na,b\nc\n", "x.csv:3: only 1 cells")
    wrong("x.csv", b'title,body\na,"b\nc\n', "x.csv:3: broken CSV")
    wrong("x.csv", b"title,body\n", "x.csv: empty")
    wrong("x.xlsx", b"body\nno sheet\n", "x.xlsx: no .xlsx file")
    write(tmp_path / "good.xlsx")
    wrong("cut.xlsx", (tmp_path / "good.xlsx").read_bytes()[:2000], "cut.xlsx: no .xlsx file")
    wrong("good.xlsx", None, "no column 'text'", "'title', 'body', 'rating'", arguments=["--column", "text"])
    wrong("good.xlsx", None, "good.xlsx: row 2: 'rating' is 4.5, not text", arguments=["--column", "rating"])
    wrong("x.doc", b"a", "x.doc: the name must end in .txt, .jsonl, .csv or .xlsx")
    wrong("one.txt", b"a story", "one document only", "--val_fraction 0")
    write(tmp_path / "good.txt")
    wrong("good.txt", None, "--val_fraction", arguments=["--val_fraction", 1])
    wrong("good.txt", None, "--shard_tokens", arguments=["--shard_tokens", 2**31])
    wrong("good.txt", None, "--workers", arguments=["--workers", -1])
    wrong("good.txt", None, "--tokenizer", arguments=["--tokenizer", "words"])
    wrong("good.txt", None, "either --out", arguments=["--text", "x.txt"])
    wrong("good.txt", None, "either --out", arguments=["--out", ""])
    wrong("good.txt", None, "is a folder", arguments=["--out", f"{tmp_path}/out/"])
    wrong("good.txt", None, "is a folder", arguments=["--out", "", "--text", tmp_path])
    (tmp_path / "file").write_text("")
    wrong("good.txt", None, f"{tmp_path}/file/s: could not", arguments=["--out", tmp_path / "file" / "s"])
    wrong("good.txt", None, "could not be written", arguments=["--out", "", "--text", tmp_path / "file" / "s"])


def test_openpyxl_is_only_needed_for_xlsx(tmp_path):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "openpyxl.py").write_text("raise ImportError")
    without = {**os.environ, "PYTHONPATH": str(tmp_path / "stub")}
    run(write(tmp_path / "x.csv"), "--text", tmp_path / "out.txt", env=without)
    done = run(write(tmp_path / "x.xlsx"), "--text", tmp_path / "other.txt", env=without, code=2)
    assert "pip install openpyxl" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("target", ["--out", "--text"])
def test_a_full_disk_leaves_what_was_there(tmp_path, target):
    """A limit on the size of files stands in for the full disk: it fails at the same place."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    path, out = write(tmp_path / "x.txt"), tmp_path / "out"
    (tmp_path / "out_train_000001.bin").write_bytes(b"old")
    out.write_bytes(b"old")
    done = run(
        path, target, out, "--tokenizer", "bytes", "--val_fraction", 0.6, "--overwrite", code=1, preexec_fn=limit
    )
    said = done.stderr.splitlines()
    assert said[-1] == f"prepare.py: {out}: could not be written (File too large)"
    assert len(said) == (1 if target == "--text" else 2), "the training shard was whole when the other failed"
    assert sorted(os.listdir(tmp_path)) == ["out", "out_train_000001.bin", "x.txt"]
    assert out.read_bytes() == (tmp_path / "out_train_000001.bin").read_bytes() == b"old"


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing(tmp_path, name):
    path = write(tmp_path / "x.jsonl", ["words " * 200_000, "x" * 20_000_000, "end"])  # the second takes a worker long
    out, said = tmp_path / "out", tmp_path / "stderr"
    command = [sys.executable, ROOT / "data" / "prepare.py", path, "--out", out / "s", "--workers", "2"]
    with open(said, "w") as f:
        process = subprocess.Popen(command, stderr=f, start_new_session=True)
    try:
        end = time.monotonic() + 20
        while not list(out.glob("s_train_000001.bin.*.tmp")):
            assert time.monotonic() < end and process.poll() is None, "no shard was begun"
            time.sleep(0.01)
        if name == signal.SIGINT:
            os.killpg(process.pid, name)  # as a terminal does
        else:
            process.send_signal(name)
        assert process.wait(5) == 130 and said.read_text() == "prepare.py: interrupted\n", said.read_text()
        assert os.listdir(out) == []
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)  # the workers are gone as well
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_worker_that_dies_ends_the_run(tmp_path):
    path = write(tmp_path / "x.txt")
    code = (
        "import multiprocessing, os, data.prepare as script\n"
        "def die(*arguments): os._exit(9)\n"
        "multiprocessing.set_start_method('fork')\n"
        "script.tokenize = die\n"
        "script.run(script.main)\n"
    )
    command = [sys.executable, "-c", code, path, "--tokenizer", "bytes", "--out", tmp_path / "out" / "s"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "worker" in done.stderr, done.stderr
    assert os.listdir(tmp_path / "out") == []


def test_help_shows_the_defaults():
    text = run("--help").stdout
    assert "(default: 100000000)" in text and "(default: body)" in text and "python data/prepare.py" in text
