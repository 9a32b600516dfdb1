"""sample.py as a user runs it: against transformers, in batches, resumed, streamed, asked, read aloud, mistaken."""

import codecs
import contextlib
import fcntl
import http.server
import io
import itertools
import json
import os
import pathlib
import pty
import random
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import types

import mutagen.id3
import mutagen.mp3
import pytest
import tiktoken
import torch
from test_model import as_nanochat

import sample as script

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROMPT = "It was a dark and stormy night"
WINDOW = 64
CHARS = " ,.'\nITabcdefghijklmnopqrstuvwxyzéß"
KEY = "sk-of-this-test-and-of-no-other"


# --- checkpoints ---


def save(path, model, tokenizer):
    config = dict(vars(model.config))
    torch.save({"format": 1, "config": config, "tokenizer": tokenizer, "model": model.state_dict()}, path)
    return model.eval()


def write_checkpoint(path, tokenizer, vocab_size, **changes):
    """A model of random weights that writes many different texts; the padding of its vocabulary has large ones."""
    sizes = dict(vocab_size=vocab_size, block_size=WINDOW, n_layer=2, n_head=2, n_embd=16) | changes
    model = script.GPT(script.Config(**sizes))
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
        model.head_weight[vocab_size:] = 50.0
    return save(path, model, tokenizer)


def write_chain(path, follow):
    """A checkpoint of bytes that writes after each byte, whatever was before, one of those in follow[byte]."""
    model = script.GPT(script.Config(257, WINDOW, n_layer=1, n_head=1, n_embd=64, logit_softcap=0.0))
    with torch.no_grad():
        model.embed.zero_()
        for i, (byte, following) in enumerate(follow.items()):
            model.embed[byte, i] = 1.0
            model.head[list(following), i] = 100.0  # logits of 800: the others have probability 0
    return save(path, model, "bytes")


def phrases(*texts):
    """For write_chain: texts in any order, of which no two share a byte but the space before each."""
    follow = {}
    for text in texts:
        for a, b in itertools.pairwise(b" " + text.encode() + b" "):
            follow.setdefault(a, set()).add(b)
    assert all(len(following) == 1 for byte, following in follow.items() if byte != 32)
    return follow


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder in which everything runs."""
    return tmp_path_factory.mktemp("sample")


@pytest.fixture(scope="module", autouse=True)
def models(work):
    write_chain(work / "chain.pt", phrases("née", "夜", "👻"))
    return {
        "bytes": write_checkpoint(work / "bytes.pt", "bytes", 257),
        "chars": write_checkpoint(work / "chars.pt", {"chars": CHARS}, len(CHARS)),
        "gpt2": write_checkpoint(work / "gpt2.pt", "gpt2", 50257, tie_weights=True),
    }


# --- runs ---


@contextlib.contextmanager
def start(work, *flags, **settings):
    """A run in a process of its own, which is ended behind the with; its output is bytes."""
    command = [sys.executable, ROOT / "sample.py", "--device", "cpu", "--dtype", "float32", *flags]
    settings = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=work) | settings
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONUNBUFFERED", None)  # it would hide what is not flushed
    with subprocess.Popen(list(map(str, command)), env=environment, **settings) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def write(work, capsys, monkeypatch):
    """Runs sample.py in this process from start to end: what it printed, and what it said."""
    monkeypatch.chdir(work)

    def write(*flags, code=0):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", "--dtype", "float32", *map(str, flags)])
        script.say_once.cache_clear()
        script.progress.next, ended = 0.0, 0
        try:
            script.run(script.main)
        except SystemExit as end:
            ended = end.code or 0
        said = capsys.readouterr()
        assert ended == code, said.err
        return said.out, said.err

    return write


@pytest.fixture
def refused(write):
    """Runs sample.py with a mistake: the one line that it gets."""

    def refused(*flags):
        printed, said = write(*flags, code=2)
        assert printed == "" and said.startswith("sample.py: ") and said.count("\n") == 1 and said.endswith("\n"), said
        return said

    return refused


@contextlib.contextmanager
def standard_input(data):
    """These bytes on file descriptor 0."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        old = os.dup(0)
        os.dup2(file.fileno(), 0)
        try:
            yield
        finally:
            os.dup2(old, 0)
            os.close(old)


@contextlib.contextmanager
def small_disk(size):
    """No file can grow beyond so many bytes: what stands in for a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@contextlib.contextmanager
def no_root():
    """root may write everywhere, so it becomes somebody who may not."""
    if root := os.geteuid() == 0:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)


def lines(path):
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def rows(path):
    """The stories of a file by their ids, which must be there once each."""
    found = [json.loads(line) for line in lines(path)]
    assert sorted(row["id"] for row in found) == list(range(len(found)))
    return sorted(found, key=lambda row: row["id"])


# --- what is written ---


@torch.no_grad()
def greedily(model, prompt, n, eot):
    """The tokens that transformers' model continues a prompt with, nothing cached; a full window keeps a half."""
    theirs, text, start = as_nanochat(model), list(prompt), 0
    for _ in range(n):
        if len(text) - start > WINDOW:
            start = len(text) - WINDOW // 2
        token = theirs(torch.tensor([text[start:]])).logits[0, -1].argmax().item()
        if token == eot:
            break
        text.append(token)
    return text[len(prompt) :]


@pytest.mark.parametrize(
    "name, prompt", [("bytes", PROMPT), ("chars", PROMPT), ("chars", 3 * PROMPT), ("gpt2", PROMPT)]
)
def test_greedy_stories_are_those_of_transformers(write, models, name, prompt):
    if name == "bytes":
        eot, encode, decode = 256, lambda text: [256, *text.encode()], lambda t: bytes(t).decode("utf-8", "replace")
    elif name == "chars":
        eot, encode, decode = None, lambda text: list(map(CHARS.index, text)), lambda t: "".join(CHARS[i] for i in t)
    else:
        gpt2 = tiktoken.get_encoding("gpt2")
        eot, encode, decode = 50256, lambda text: [50256, *gpt2.encode_ordinary(text)], gpt2.decode
    tokens = greedily(models[name], encode(prompt), 90, eot)
    assert len(set(tokens)) > 7, "a model that repeats itself tests nothing"
    story, flags = prompt + decode(tokens), (f"{name}.pt", "--prompt", prompt, "--max_new_tokens", 90)
    assert write(*flags, "--temperature", 0)[0] == story + "\n"
    assert write(*flags, "--top_k", 1)[0] == story + "\n"
    assert write(*flags, "--top_p", 0)[0] == story + "\n"


@torch.inference_mode()
@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_packed_weights_compute_in_bfloat16_what_unpacked_ones_do(work, models, name):
    path, idx = str(work / f"{name}.pt"), torch.randint(257, (3, WINDOW), generator=torch.Generator().manual_seed(0))
    exact = as_nanochat(models[name])(idx).logits
    checkpoint = script.load_checkpoint(path)
    model = script.load_model(path, checkpoint, torch.device("cpu"), torch.bfloat16, weights=torch.bfloat16)
    plain = model(idx)
    model.pack()
    cache = script.KVCache(model.config, 3, WINDOW, "cpu", torch.bfloat16)
    packed = torch.cat([model(idx[:, t : t + 1], cache=cache) for t in range(WINDOW)], 1)
    error = (plain - exact).abs().mean()
    assert 0 < error < 0.1 * exact.std()
    for logits in (packed, model(idx)):
        assert (logits - exact).abs().mean() < 1.2 * error


def test_stories_are_written_in_bfloat16(write):
    story = write("chars.pt", "--dtype", "bfloat16", "--max_new_tokens", 2 * WINDOW)[0]
    assert len(story) == len(PROMPT) + 2 * WINDOW + 1 and len(set(story)) > 20


def test_padding_of_the_vocabulary_is_never_written(write, work):
    write_checkpoint(work / "few.pt", {"chars": "abcde"}, 5)  # and 59 rows of padding
    story = write("few.pt", "--prompt", "a", "--temperature", 50, "--max_new_tokens", 600)[0]
    assert set(story) == set("abcde\n") and len(story) == 602
    for name in ("bytes", "gpt2"):  # there it has no text and would end the run
        write(f"{name}.pt", "--temperature", 50, "--max_new_tokens", 200)


@pytest.mark.parametrize("tokens, notices", [(WINDOW - 6, 0), (WINDOW - 5, 0), (WINDOW - 4, 1), (4 * WINDOW, 1)])
def test_a_full_window_is_said_once(write, tokens, notices):
    flags = "chars.pt", "--prompt", "house ", "--max_new_tokens", tokens  # the last token is only written
    notice = f"sample.py: the window of {WINDOW} tokens was full: stories went on from its last half\n"
    assert write(*flags)[1] == notices * notice
    assert write(*flags, "--num", 3)[1] == notices * notice


# --- many stories ---


@pytest.fixture
def openings(work):
    (work / "openings.txt").write_text("The house was empty\nI\nIt was raining, and\n")
    return "--prompt_file", "openings.txt"


def test_one_seed_gives_one_story_for_each_id_whatever_the_batch(write, work, openings):
    flags = "bytes.pt", *openings, "--num", 3, "--max_new_tokens", 80
    for size in (1, 4, 0):
        write(*flags, "--batch_size", size, "--out", f"batch_{size}.jsonl")
    expected = rows(work / "batch_1.jsonl")
    assert len({row["text"] for row in expected}) == 9
    assert rows(work / "batch_4.jsonl") == rows(work / "batch_0.jsonl") == expected
    printed = write(*flags)[0]
    assert sorted(printed.removesuffix("\n").split("\n\n---\n\n")) == sorted(row["text"] for row in expected)
    alone = write("bytes.pt", "--prompt", "The house was empty", "--max_new_tokens", 80)[0]
    assert alone == expected[0]["text"] + "\n"
    other = write(*flags, "--seed", 1338)[0].removesuffix("\n").split("\n\n---\n\n")
    assert not set(other) & {row["text"] for row in expected}


def test_a_story_is_a_line_of_these_fields(write, work, openings):
    sampling = dict(max_new_tokens=12, temperature=0.9, top_k=20, top_p=0.95, stop=["zz", "\n"])
    flags = "--max_new_tokens 12 --temperature 0.9 --top_k 20 --top_p 0.95 --seed -5 --stop zz --stop".split() + ["\n"]
    _, said = write("chars.pt", *openings, "--num", 2, "--out", "new/folder/fields.jsonl", *flags)
    path = work / "new" / "folder" / "fields.jsonl"
    assert said.endswith("new/folder/fields.jsonl: 6 stories, 6 of them new\n")
    for row in rows(path):
        assert list(row) == "id prompt text tokens seed checkpoint sampling".split()
        assert row["prompt"] == ["The house was empty", "I", "It was raining, and"][row["id"] % 3]
        assert row["text"].startswith(row["prompt"])
        new = len(row["text"]) - len(row["prompt"])  # a token is a character
        assert new == row["tokens"] == 12 or new < row["tokens"] <= 12  # or a --stop text was cut off
        assert (row["seed"], row["checkpoint"], row["sampling"]) == (-5, "chars.pt", sampling)


def test_the_end_of_text_ends_a_story(write, work):
    follow = phrases("end")
    follow[ord("d")] = {256}
    write_chain(work / "end.pt", follow)
    assert write("end.pt", "--prompt", "The ")[0] == "The end\n"
    write("end.pt", "--prompt", "The ", "--out", "end.jsonl")
    assert rows(work / "end.jsonl")[0]["tokens"] == 3


def test_more_stories_are_added_behind_those_there(write, work):
    flags, path = ("bytes.pt", "--max_new_tokens", 20, "--out", "more.jsonl"), work / "more.jsonl"
    write(*flags, "--num", 3)
    before = path.read_bytes()
    _, said = write(*flags, "--num", 5)
    assert path.read_bytes().startswith(before) and len(rows(path)) == 5
    assert said.endswith("more.jsonl: 5 stories, 2 of them new\n")
    whole = path.read_bytes()
    _, said = write(*flags, "--num", 2)
    assert path.read_bytes() == whole and said.endswith("more.jsonl: 2 stories, 0 of them new\n")


MANY = "bytes.pt", "--num", 50, "--max_new_tokens", 60


@pytest.fixture
def whole(write, work):
    """The stories of a run that nothing interrupted."""
    if not (work / "whole.jsonl").exists():
        write(*MANY, "--out", "whole.jsonl")
    return rows(work / "whole.jsonl")


@pytest.mark.parametrize("name, code", [("SIGKILL", -9), ("SIGINT", 130)])
def test_an_interrupted_run_goes_on_with_those_missing(write, work, whole, name, code):
    path = work / f"{name}.jsonl"
    with start(work, *MANY, "--batch_size", 1, "--out", path.name) as process:
        while len(lines(path)) < 3:
            assert process.poll() is None, "the run ended before it could be interrupted"
            time.sleep(0.001)
        process.send_signal(getattr(signal, name))
        said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == code and "Traceback" not in said
    assert name == "SIGKILL" or said.endswith("sample.py: interrupted\n")
    old = lines(path)
    assert 3 <= len(old) < len(whole)
    path.write_bytes(b"".join(old[:-1]) + old[-1][: len(old[-1]) // 2])  # as if it had been stopped while writing
    _, said = write(*MANY, "--out", path.name)
    assert said.endswith(f"{path.name}: 50 stories, {51 - len(old)} of them new\n")
    assert lines(path)[: len(old) - 1] == old[:-1] and rows(path) == whole


def test_a_full_disk_loses_nothing(write, work, whole):
    path = work / "full.jsonl"
    with small_disk(5_000):
        _, said = write(*MANY, "--out", "full.jsonl", code=1)
    assert said.splitlines()[-1].startswith("sample.py: --out full.jsonl: File too large; ")
    old = lines(path)
    assert 3 < len(old) < len(whole) and all(json.loads(line) in whole for line in old) and old[-1].endswith(b"\n")
    write(*MANY, "--out", "full.jsonl")
    assert lines(path)[: len(old)] == old and rows(path) == whole


def expected(i):
    return {"prompt": "x", "seed": 1}


def test_a_line_that_was_cut_short_anywhere_is_written_again(tmp_path):
    path, row = tmp_path / "x.jsonl", dict(prompt="x", text="x – é", seed=1)
    whole = b"".join((json.dumps({"id": i, **row}) + "\n").encode() for i in (0, 1))
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        file, have = script.open_stories(str(path), expected)
        file.close()
        kept = path.read_bytes()
        assert kept == whole[: kept.count(b"\n") * len(whole) // 2] and have == set(range(kept.count(b"\n")))
        assert kept.count(b"\n") == whole[:size].count(b"\n")


@pytest.fixture
def old(write, work):
    """A file of two stories."""
    if not (work / "old.jsonl").exists():
        write("bytes.pt", "--num", 2, "--max_new_tokens", 5, "--out", "old.jsonl")
    return work / "old.jsonl"


@pytest.mark.parametrize(
    "change, named",
    [
        ({"--seed": 7}, "seed 1337, not 7"),
        ({"--prompt": "Now"}, f'prompt "{PROMPT}", not "Now"'),
        ({"--temperature": 0.7}, 'sampling {"max_new_tokens": 5, "temperature": 0.8'),
        ({"--top_k": 3}, '"top_k": 0'),
        ({"--top_p": 0.5}, '"top_p": 1.0'),
        ({"--stop": "x"}, '"stop": []'),
        ({"--max_new_tokens": 6}, '"max_new_tokens": 5'),
    ],
)
def test_stories_of_another_run_are_not_added_to(refused, old, change, named):
    before = old.read_bytes()
    flags = [word for pair in ({"--max_new_tokens": 5} | change).items() for word in pair]
    message = refused("bytes.pt", "--num", 3, "--out", "old.jsonl", *flags)
    assert message.startswith("sample.py: --out old.jsonl: line 1 is of another run (") and named in message
    assert old.read_bytes() == before


def test_stories_of_another_checkpoint_are_not_added_to(refused, old):
    message = refused("gpt2.pt", "--max_new_tokens", 5, "--out", "old.jsonl")
    assert 'line 1 is of another run (checkpoint "bytes.pt", not "gpt2.pt"); name a new file' in message


OTHER_FILES = {
    "text": b"notes\n",
    "cut": b"notes",
    "blank": b"\n",
    "list": b"[]\n",
    "number": b"7",
    "deep": b"[" * 100_000,
    "no id": b'{"prompt": "x", "seed": 1}\n',
    "name": b'{"id": "one", "prompt": "x", "seed": 1}\n',
    "half": b'{"id": 0.5, "prompt": "x", "seed": 1}\n',
    "latin": b'{"id": 0, "prompt": "\xe9", "seed": 1}\n',
    "json": b'{"id": 7, "title": "of somebody else, and without an end of line"}',
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_a_file_of_something_else_is_not_taken_for_stories(refused, work, old, kind):
    path = work / "other.jsonl"
    for before in (b"", old.read_bytes()):
        path.write_bytes(before + OTHER_FILES[kind])
        message = refused("bytes.pt", "--max_new_tokens", 5, "--num", 3, "--out", "other.jsonl")
        assert f"--out other.jsonl: line {1 + before.count(10)} is " in message and "name a new file" in message
        assert path.read_bytes() == before + OTHER_FILES[kind]


def test_an_out_that_cannot_be_is_named(refused, work, old, tmp_path, capsys):
    assert "--out old.jsonl/x.jsonl: " in refused("bytes.pt", "--out", "old.jsonl/x.jsonl")
    assert f"--out {tmp_path}: Is a directory" in refused("bytes.pt", "--out", tmp_path)
    assert "--out /dev/null: not a file" in refused("bytes.pt", "--out", "/dev/null")
    os.mkfifo(tmp_path / "pipe")
    assert "pipe: not a file" in refused("bytes.pt", "--out", tmp_path / "pipe")
    (tmp_path / "closed").mkdir(mode=0o500)
    with no_root(), pytest.raises(SystemExit):
        script.open_stories(str(tmp_path / "closed" / "x.jsonl"), expected)
    assert "closed/x.jsonl: Permission denied" in capsys.readouterr().err


def test_two_runs_do_not_add_to_one_file(refused, write, old):
    before = old.read_bytes()
    with open(old, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        message = refused("bytes.pt", "--max_new_tokens", 5, "--num", 3, "--out", "old.jsonl")
    assert message == "sample.py: --out old.jsonl: another process is writing to it\n" and old.read_bytes() == before
    write("bytes.pt", "--max_new_tokens", 5, "--num", 3, "--out", "old.jsonl")


# --- texts out of tokens ---


@pytest.fixture
def told(monkeypatch):
    """What tell yields of texts that are given as lists of tokens: for each, its pieces and its count of tokens."""

    def told(tokenizer, texts, stop=()):
        def generate(model, prompts, max_new_tokens, stop, ended, **_):
            alive = list(range(len(texts)))
            for step in range(max_new_tokens):
                yield [(row, texts[row][step]) for row in alive]
                alive = [row for row in alive if texts[row][step] not in stop and row not in ended]

        monkeypatch.setattr(script, "generate", generate)
        flags = dict(max_new_tokens=len(texts[0]), temperature=1, top_k=0, top_p=1, seed=0, stop=list(stop))
        model = types.SimpleNamespace(config=types.SimpleNamespace(block_size=10**9))
        found, counts = [[] for _ in texts], [None] * len(texts)
        for row, text, tokens in script.tell(model, tokenizer, [[0]] * len(texts), [0], types.SimpleNamespace(**flags)):
            assert counts[row] is None, "a story went on after its end"
            found[row].append(text)
            counts[row] = tokens
        assert None not in counts
        return found, counts

    return told


E_ACUTE, NIGHT, GHOST = "é".encode(), "夜".encode(), "👻".encode()


@pytest.mark.parametrize(
    "tokens, pieces",
    [
        (b"a" + E_ACUTE + NIGHT + GHOST + b"b", ["a", "", "é", "", "", "夜", "", "", "", "👻", "b"]),
        (b"a" + GHOST[:3], ["a", "", "", ""]),  # cut in the middle: what is there of the character is left out
        (NIGHT[:2], ["", ""]),
        (NIGHT[:2] + b"a", ["", "", "\ufffda"]),
        (NIGHT[:1] + E_ACUTE, ["", "\ufffd", "é"]),
        (b"\xff\x80a", ["\ufffd", "\ufffd", "a"]),
        (b"\xed\xa0\x80", ["", "", "\ufffd\ufffd\ufffd"]),  # half of a pair of UTF-16 is no character
        (b"\xc0\xaf", ["\ufffd", "\ufffd"]),  # nor is a / in too many bytes
    ],
)
def test_characters_come_whole(told, tokens, pieces):
    found, counts = told(script.get_tokenizer("bytes"), [list(tokens)])
    assert found == [pieces] and counts == [len(tokens)]


def test_the_end_of_text_in_the_middle_of_a_character(told):
    assert told(script.get_tokenizer("bytes"), [[*b"a", *NIGHT[:2], 256, *b"b"]]) == ([["a", "", "", ""]], [3])


def test_random_bytes_come_as_python_decodes_them(told):
    chance = random.Random(0)
    texts = [bytes(chance.choices([*b"ab", *E_ACUTE, *NIGHT, *GHOST, 0xFF], k=200)) + b"." for _ in range(20)]
    found, counts = told(script.get_tokenizer("bytes"), [list(text) for text in texts])
    assert ["".join(pieces) for pieces in found] == [text.decode("utf-8", "replace") for text in texts]
    assert counts == [201] * 20


@pytest.mark.parametrize(
    "words, stop, pieces, count",
    [
        ("a b a b a c", "aba", ["", "", ""], 3),  # at once
        ("c a b b a b a", "aba", ["c", "", "", "abb", "", "", ""], 7),
        ("a a b a b a c", "abac", ["", "a", "", "", "ab", "", ""], 7),  # the second beginning is the right one
        ("ab ab ab c", "bc", ["a", "ba", "ba", ""], 4),  # across tokens
        ("ab ab aba bb", "bab", ["a", ""], 2),  # in two tokens, of which one begins before it
        ("c ab", "abc", ["c", "ab"], 2),  # never completed: printed at the end
        ("c a b", "abc bb", ["c", "", "ab"], 3),
        ("a b c a b", "bd ca", ["a", "", "b", ""], 4),  # several
        ("aba", "ba ab", [""], 1),  # in one token: the first of them
    ],
)
def test_a_stop_text_ends_a_story_before_it(told, words, stop, pieces, count):
    gpt2 = script.get_tokenizer("gpt2")
    tokens = [gpt2.encode_single_token(word) for word in words.split()]
    assert told(gpt2, [tokens], stop.split()) == ([pieces], [count])


def test_stop_texts_hold_back_no_more_than_they_must(told):
    """Against the definition: print all but the longest end that some stop text begins with."""
    gpt2, chance = script.get_tokenizer("gpt2"), random.Random(0)
    for _ in range(300):
        words = [chance.choices(["a", "b", "ab", "ba", "aa", "bb", "c"], k=30) for _ in range(3)]
        stops = ["".join(chance.choices("abc", (5, 5, 2), k=chance.randint(3, 7))) for _ in range(chance.randint(1, 3))]
        found, counts = told(gpt2, [[gpt2.encode_single_token(word) for word in row] for row in words], stops)
        for row, pieces, count in zip(words, found, counts):
            for n in range(1, 31):
                text, printed = "".join(row[:n]), "".join(pieces[:n])
                if cut := [text.index(stop) for stop in stops if stop in text]:
                    assert printed == text[: min(cut)] and len(pieces) == count == n
                    break
                ends = [k for k in range(len(text) + 1) if any(stop.startswith(text[k:]) for stop in stops)]
                assert printed == (text if n == 30 else text[: ends[0]])


@pytest.mark.parametrize("name", ["bytes", "chars", "gpt2"])
def test_stop_texts_from_outside(write, name):
    flags = f"{name}.pt", "--prompt", PROMPT, "--max_new_tokens", 60
    free = write(*flags)[0].removeprefix(PROMPT)
    stops = [text for text in (free[20:23], free[25:27]) if text.isprintable()] + ["never written"]
    ended = write(*flags, *(word for stop in stops for word in ("--stop", stop)))[0]
    assert len(stops) > 1 and ended == PROMPT + free[: min(free.index(stop) for stop in stops[:-1])] + "\n"


# --- streams ---

GHOSTS = re.compile(r"Ghosts( née| 夜| 👻)*( n?é?e?)?")


def test_a_story_appears_while_it_is_written_in_whole_characters(work):
    with start(work, "chain.pt", "--prompt", "Ghosts ", "--max_new_tokens", 10**6) as process:
        chunks = [os.read(process.stdout.fileno(), 100_000)]
        while sum(map(len, chunks)) < 1000:
            assert process.poll() is None
            chunks.append(os.read(process.stdout.fileno(), 100_000))
        process.send_signal(signal.SIGINT)
        rest, said = process.communicate(timeout=60)
    assert max(map(len, chunks)) < 8192, "it waits until a buffer is full"
    text = "".join(chunk.decode() for chunk in chunks)  # no chunk ends in the middle of a character
    assert GHOSTS.fullmatch(text + rest.decode()) and set("n夜👻") < set(text)
    assert process.returncode == 130 and said == b"sample.py: interrupted\n"


def test_of_several_stories_each_appears_when_it_is_complete(work):
    several = "--num", 10**6, "--batch_size", 1, "--max_new_tokens", 50
    with start(work, "chain.pt", "--prompt", "Ghosts ", *several) as process:
        text = b""
        while text.count(b"\n\n---\n\n") < 2:
            text += os.read(process.stdout.fileno(), 100_000)
        assert len(text) < 8192, "it waits until a buffer is full"
        process.stdout.close()  # a reader that leaves
        said = process.stderr.read()
        assert process.wait(60) == 141 and said == b""
    stories = text.decode().split("\n\n---\n\n")
    assert all(GHOSTS.fullmatch(story) for story in stories[:2]) and stories[0] != stories[1]


def test_an_output_that_cannot_hold_a_character_gets_a_question_mark(write, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="latin-1"))
    write("chain.pt", "--prompt", "Ghosts ", "--max_new_tokens", 200)
    sys.stdout.flush()
    assert re.fullmatch(rb"Ghosts( n\xe9e| \?)*( n?\xe9?e?)?\n", printed.getvalue())


# --- openings ---


def test_openings_come_from_a_file_or_standard_input(write, work):
    data = codecs.BOM_UTF8 + "It is dark.\r\n\r\n  \nÉté\r\nthe end".encode()
    (work / "marked.txt").write_bytes(data)
    flags = "bytes.pt", "--max_new_tokens", 5, "--temperature", 0
    write(*flags, "--prompt_file", "marked.txt", "--out", "marked.jsonl")
    assert [row["prompt"] for row in rows(work / "marked.jsonl")] == ["It is dark.", "Été", "the end"]
    with standard_input(data):
        write(*flags, "--prompt_file", "-", "--out", "piped.jsonl")
    assert rows(work / "piped.jsonl") == rows(work / "marked.jsonl")


def test_a_prompt_comes_from_standard_input(write):
    flags = "bytes.pt", "--max_new_tokens", 5
    with standard_input(codecs.BOM_UTF8 + "It is dark.\r\nÉté\n".encode()):
        printed = write(*flags, "--prompt", "-")[0]
    assert printed == write(*flags, "--prompt", "It is dark.\nÉté")[0]
    assert printed.startswith("It is dark.\nÉté") and len(printed) > len("It is dark.\nÉté\n")
    with standard_input(b""):
        assert write(*flags, "--prompt", "-") == write(*flags, "--prompt", "")


def test_openings_that_are_none_are_named(refused, tmp_path):
    path = tmp_path / "x.txt"
    for data, message in [(b"", "no opening"), (b" \r\n\n", "no opening"), (b"caf\xe9\n", "not text in UTF-8")]:
        path.write_bytes(data)
        assert message in refused("bytes.pt", "--prompt_file", path, "--out", tmp_path / "x.jsonl")
        with standard_input(data):
            assert f"--prompt_file -: {'holds ' * (data < b'c')}{message}" in refused("bytes.pt", "--prompt_file", "-")
    with standard_input(b"caf\xe9"):
        assert "--prompt -: not text in UTF-8" in refused("bytes.pt", "--prompt", "-")
    assert "--prompt: not text in UTF-8" in refused("bytes.pt", "--prompt", os.fsdecode(b"caf\xe9"))
    assert "none.txt: No such file" in refused("bytes.pt", "--prompt_file", tmp_path / "none.txt")
    assert f"--prompt_file {tmp_path}: Is a directory" in refused("bytes.pt", "--prompt_file", tmp_path)
    path.chmod(0)
    with no_root():
        assert "x.txt: Permission denied" in refused("bytes.pt", "--prompt_file", path)
    assert not (tmp_path / "x.jsonl").exists()


def test_characters_that_a_checkpoint_does_not_know_are_named(refused, tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("I\nÜ€\n")
    message = "the checkpoint does not know the characters"
    assert f"--prompt: {message} '5'" in refused("chars.pt", "--prompt", "at 5")
    new = tmp_path / "new" / "x.jsonl"
    assert f"--prompt_file {path}: {message} 'Ü€'" in refused("chars.pt", "--prompt_file", path, "--out", new)
    assert "--prompt: empty" in refused("chars.pt", "--prompt", "")
    assert not new.parent.exists()


# --- talks ---


@pytest.fixture
def talk(write, monkeypatch):
    """A run of --interactive with these bytes piped into it."""

    def talk(data, *flags):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        return write(*flags, "--interactive")

    return talk


def test_openings_are_piped_into_a_talk(talk, write, work):
    flags = "bytes.pt", "--max_new_tokens", 20, "--prompt", "It was late"
    write(*flags, "--num", 3, "--out", "talk.jsonl")
    stories = [row["text"] for row in rows(work / "talk.jsonl")]
    printed, said = talk(b"It was late\n\r\nIt was late", *flags)  # an empty line means --prompt
    assert printed == "\n".join(stories) + "\n" and said == ""
    printed, said = talk(b"caf\xe9\n", *flags)
    assert printed.startswith("caf\ufffd") and said == ""
    assert talk(b"", *flags) == ("", "")


def test_characters_that_are_not_known_do_not_end_a_talk(talk):
    printed, said = talk("Ü\nthe house\n5\nI\n".encode(), "chars.pt", "--max_new_tokens", 200)
    openings = re.findall(r"(?:^|\n)(the house|I)", printed)
    assert printed.startswith("the house") and "\nI" in printed and openings[0] == "the house"
    unknown, window, other = said.splitlines()
    assert unknown == "sample.py: the opening: the checkpoint does not know the characters 'Ü'"
    assert other == "sample.py: the opening: the checkpoint does not know the characters '5'"
    assert "tokens was full" in window


def test_on_a_terminal_ctrl_c_ends_a_story_and_ctrl_d_the_talk(work):
    ours, theirs = pty.openpty()

    def own_terminal():
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    def read_until(text):
        shown = b""
        while text not in shown:
            assert select.select([ours], [], [], 60)[0], shown
            shown += os.read(ours, 100_000)
        return shown

    flags = "chain.pt", "--interactive", "--max_new_tokens", 10**6
    with start(work, *flags, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=own_terminal) as process:
        os.close(theirs)
        for _ in range(2):
            read_until(b"opening> ")
            os.write(ours, b"Ghosts \n")
            assert "👻".encode() in read_until("👻 ".encode())
            os.write(ours, b"\x03")
        read_until(b"opening> ")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    os.close(ours)


# --- narration ---

SENTENCE = re.compile(r"[.!?…][\"'”’)]*$")
FRAME = struct.pack(">I", 0xFFFB9064)  # MPEG-1 layer III, 128 kbit/s, 44.1 kHz: 1152 samples in 417 bytes


def frames(piece, count=40):
    """Frames of mp3 that tell which piece they are of."""
    return (FRAME + bytes([piece]) * 413) * count


def tagged(sound, tmp_path, size, version):
    """The sound behind an ID3v2 tag that holds so much text."""
    path = tmp_path / "tag"
    tag = mutagen.id3.ID3()
    tag.add(mutagen.id3.TSSE(encoding=3, text="Lavf"))
    tag.add(mutagen.id3.COMM(encoding=3, lang="eng", desc="long", text="x" * size))
    tag.save(path, v2_version=version)
    return path.read_bytes() + sound


@pytest.fixture
def speech(monkeypatch, tmp_path):
    """Starts a server that gives some answers in turn, the last for ever: its address, and the requests to come."""
    servers = []
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def speech(*answers):
        asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, headers, data = answers[min(len(asked), len(answers) - 1)]
                asked.append((self.path, dict(self.headers), body))
                self.send_response(status)
                for name, value in ({"Content-Length": len(data)} | headers).items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,)).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/v1", asked

    yield speech
    for server in servers:
        server.shutdown()
        server.server_close()


def answer(sound, status=200, **headers):
    return status, headers, sound


def refusal(status, message, **headers):
    return status, headers, json.dumps({"error": {"message": message}}).encode()


@pytest.fixture
def narrate(write, monkeypatch, tmp_path):
    """Has a short story read aloud into x.mp3, without waiting: what was printed and said, and the waits."""
    waits = []
    clock = types.SimpleNamespace(sleep=waits.append, perf_counter=time.perf_counter, time=time.time)
    monkeypatch.setattr(script, "time", clock)

    def narrate(url, *flags, code=0, prompt="The house."):
        target = "--narrate", tmp_path / "x.mp3", "--base_url", url, "--max_new_tokens", 20, "--prompt", prompt
        return *write("chars.pt", *target, *flags, code=code), waits

    return narrate


def long_text(chance, size):
    """Sentences of up to 200 characters, with some quotes."""
    text = ""
    while len(text) < size:
        words = " ".join("".join(chance.choices(CHARS[8:], k=chance.randint(1, 9))) for _ in range(20))
        text += chance.choice(["{}. ", "'{}.' ", "{},' I {}.'\n"]).format(words, words[::-1])
    return text


def test_a_long_story_is_read_in_pieces_that_are_joined(narrate, speech, tmp_path):
    sounds = [frames(1), tagged(frames(2), tmp_path, 10, 3), tagged(frames(3), tmp_path, 20_000, 4), frames(4)]
    url, asked = speech(*map(answer, sounds))
    text = long_text(random.Random(0), 14_000)
    story, said, waits = narrate(url + "/", "--voice", "coral", "--speech_model", "tts-1", prompt=text)
    assert len(asked) == 4 and {path for path, _, _ in asked} == {"/v1/audio/speech"} and max(waits) == 0
    assert {headers["Authorization"] for _, headers, _ in asked} == {f"Bearer {KEY}"}
    texts = [body.pop("input") for _, _, body in asked]
    assert [body for _, _, body in asked] == 4 * [dict(model="tts-1", voice="coral", response_format="mp3")]
    assert " ".join(texts).split() == story.split() and story.startswith(text)
    assert all(3400 < len(text) <= 4000 and SENTENCE.search(text) for text in texts[:-1]) and len(texts[-1]) <= 4000
    sound = tmp_path / "x.mp3"
    assert sound.read_bytes() == b"".join(map(frames, (1, 2, 3, 4)))
    length = mutagen.mp3.MP3(sound).info.length
    assert length == pytest.approx(4 * 40 * 1152 / 44_100, rel=0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tag", "x.mp3"] and "piece 1 of 4" in said


def test_texts_without_sentences_are_cut_between_words_or_anywhere():
    chance = random.Random(1)
    for letters, most in [("ab ", 4000), ("ab. ", 50), ("a.'", 30), ("ab \n", 7), (" .", 5)]:
        for size in (0, 1, most - 1, most, most + 1, 5 * most):
            text = "".join(chance.choices(letters, k=size))
            found = script.pieces(text, most)
            assert "".join("".join(found).split()) == "".join(text.split()) and all(map(str.strip, found))
            assert all(0 < len(piece) <= most for piece in found)
            words = set(text.split())
            if all(len(word) <= most for word in words):
                assert all(set(piece.split()) <= words for piece in found)


def test_a_tag_with_a_footer_is_left_out_whole(narrate, speech, tmp_path):
    tag = b"\x04\x00\x10" + b"\x00\x00\x02\x01"  # version 2.4.0, a footer, 2 * 128 + 1 bytes between
    url, _ = speech(answer(b"ID3" + tag + b"\xff" * 257 + b"3DI" + tag + frames(5)))
    narrate(url)
    assert (tmp_path / "x.mp3").read_bytes() == frames(5)


def test_narration_goes_on_after_refusals_and_lost_connections(narrate, speech, tmp_path):
    cut = answer(frames(1)[:1000], **{"Content-Length": len(frames(1))})
    late = refusal(429, "too many", **{"Retry-After": "7"})
    url, asked = speech(late, refusal(503, "busy"), cut, answer(frames(1)))
    _, said, waits = narrate(url)
    assert (tmp_path / "x.mp3").read_bytes() == frames(1) and len(asked) == 4 and "Traceback" not in said
    assert waits[0] == 0 and 7 <= waits[1] < 9 and all(0 < wait < 5 for wait in waits[2:])


@pytest.mark.parametrize(
    "answers, code, message, requests",
    [
        ([refusal(401, f"Incorrect API key provided: {KEY}")], 2, "is OPENAI_API_KEY right?", 1),
        ([refusal(404, "no such model")], 2, "are --base_url and the model's name right?", 1),
        ([refusal(400, "no such voice")], 1, "answers 400 (no such voice)", 1),
        ([refusal(500, "out of order")], 1, "answers 500 (out of order), 6 times", 6),
        ([answer(b'{"text": "hello"}')], 1, "is not mp3", 1),
        ([answer(b"")], 1, "is not mp3", 1),
        ([answer(b"ID3")], 1, "is not mp3", 1),
        ([answer(b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f" + frames(1))], 1, "is not mp3", 1),
        ([answer(frames(1)), refusal(400, "no")], 1, "answers 400 (no)", 2),  # in the middle
    ],
)
def test_a_failed_narration_leaves_the_old_file(narrate, speech, tmp_path, answers, code, message, requests):
    (tmp_path / "x.mp3").write_bytes(b"old")
    url, asked = speech(*answers)
    story, said, _ = narrate(url, prompt="The house. " * 500, code=code)
    last = said.splitlines()[-1]
    assert last.startswith(f"sample.py: --narrate {tmp_path / 'x.mp3'}: ") and message in last
    assert len(asked) == requests and KEY not in story + said and story.startswith("The house. The house.")
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp3"] and (tmp_path / "x.mp3").read_bytes() == b"old"


def test_a_full_disk_leaves_the_old_sound(narrate, speech, tmp_path):
    (tmp_path / "x.mp3").write_bytes(b"old")
    with small_disk(1000):
        _, said, _ = narrate(speech(answer(frames(1)))[0], code=1)
    assert said.endswith(f"--narrate {tmp_path / 'x.mp3'}: File too large\n")
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp3"] and (tmp_path / "x.mp3").read_bytes() == b"old"


def test_an_empty_story_is_not_read_aloud(write, speech, tmp_path, work):
    write_chain(work / "silent.pt", {32: {256}})
    url, asked = speech(answer(frames(1)))
    flags = "--prompt", " ", "--narrate", tmp_path / "x.mp3", "--base_url", url
    assert write("silent.pt", *flags, code=2)[1] == f"sample.py: --narrate {tmp_path / 'x.mp3'}: the story is empty\n"
    assert asked == [] and list(tmp_path.iterdir()) == []


def test_narration_that_cannot_be_is_refused_before_the_story(refused, speech, tmp_path, monkeypatch):
    url, asked = speech(answer(frames(1)))
    here = "chars.pt", "--base_url", url, "--narrate"
    assert "none/x.mp3: not a file in a folder that is there" in refused(*here, tmp_path / "none" / "x.mp3")
    assert f"--narrate {tmp_path}: not a file" in refused(*here, tmp_path)
    with tempfile.TemporaryDirectory() as closed:  # root's own tmp_path is out of sight for others
        os.chmod(closed, 0o555)
        with no_root():
            assert f"--narrate {closed}/x.mp3: not a file in a folder" in refused(*here, f"{closed}/x.mp3")
    good = "chars.pt", "--narrate", tmp_path / "x.mp3"
    assert "--base_url" in refused(*good, "--base_url", "localhost:8000")
    assert "--narrate: one story" in refused(*good, "--num", 2)
    monkeypatch.setattr(script.requests.Session, "send", lambda *_, **__: pytest.fail("a request"))
    monkeypatch.delenv("OPENAI_API_KEY")
    message = refused(*good)
    assert "api.openai.com wants a key" in message and "OPENAI_API_KEY is not set" in message
    assert asked == [] and list(tmp_path.iterdir()) == []


# --- mistakes ---


def test_flags_must_make_sense(refused):
    for flag in ("--num 0", "--top_p 1.5", "--top_k -1", "--temperature -1", "--temperature nan", "--batch_size -1"):
        assert flag.split()[0] in refused("bytes.pt", *flag.split())
    assert "--stop: an empty text" in refused("bytes.pt", "--stop", "")
    for flag in ("--num 2", "--out x.jsonl", "--prompt_file x", "--narrate x.mp3", "--prompt -"):
        assert "--interactive: goes without" in refused("bytes.pt", "--interactive", *flag.split())


def test_a_talk_needs_standard_input(refused, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert refused("bytes.pt", "--interactive") == "sample.py: --interactive: standard input is closed\n"


def test_what_is_no_checkpoint_is_named(refused, work, tmp_path):
    (tmp_path / "notes.pt").write_text("notes")
    for path, message in [("none.pt", "No such file"), ("notes.pt", "is not a checkpoint"), ("", "in this folder")]:
        assert message in refused(tmp_path / path, "--out", tmp_path / "new" / "x.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.pt"]
    for size in (256, 300):
        write_checkpoint(tmp_path / "other.pt", "bytes", size)
        assert f"other.pt: the model has {size} tokens, its tokenizer 257" in refused(tmp_path / "other.pt")
    write_checkpoint(tmp_path / "twice.pt", {"chars": "aab"}, 3)
    assert "a character twice" in refused(tmp_path / "twice.pt")
