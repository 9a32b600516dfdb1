"""sample.py: against transformers, in batches, resumed, streamed, read aloud, mistaken, and as a CUDA graph."""

import codecs
import contextlib
import http.server
import io
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import NanoChatConfig, NanoChatForCausalLM

import sample as script

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROMPT = "It was a dark and stormy night"
WINDOW, CPU = 64, torch.device("cpu")
CHARS = " ,.'\nITabcdefghijklmnopqrstuvwxyzéß"
KEY = "sk-of-this-test-and-of-no-other"
MODELS = {"bytes": ("bytes", 257), "chars": ({"chars": CHARS}, len(CHARS)), "gpt2": ("gpt2", 50257)}


# --- checkpoints ---


def write_checkpoint(path, tokenizer, vocab_size, tied=False):
    """Random weights as a checkpoint of ours, and as a model of transformers."""
    torch.manual_seed(3)
    sizes = dict(vocab_size=vocab_size, hidden_size=16, intermediate_size=64, num_hidden_layers=2)
    more = dict(num_attention_heads=2, max_position_embeddings=WINDOW, tie_word_embeddings=tied, pad_token_id=None)
    theirs = NanoChatForCausalLM(NanoChatConfig(**sizes, **more)).eval()
    for p in theirs.parameters():
        p.data.normal_(std=0.5)
    padding = torch.full((-vocab_size % 64, 16), 50.0)  # it must never be written
    weights = {"embed": torch.cat((theirs.model.embed_tokens.weight.data, padding))}
    if not tied:
        weights["head"] = torch.cat((theirs.lm_head.weight.data, padding))
    for i, layer in enumerate(theirs.model.layers):
        qkv = [getattr(layer.self_attn, name).weight.data for name in ("q_proj", "k_proj", "v_proj")]
        weights[f"blocks.{i}.qkv"], weights[f"blocks.{i}.o"] = torch.stack(qkv), layer.self_attn.o_proj.weight.data
        weights[f"blocks.{i}.up"], weights[f"blocks.{i}.down"] = layer.mlp.fc1.weight.data, layer.mlp.fc2.weight.data
    config = dict(vocab_size=vocab_size, block_size=WINDOW, n_layer=2, n_head=2, n_embd=16, tie_weights=tied)
    torch.save(dict(format=1, config=config, tokenizer=tokenizer, model=weights), path)
    return theirs


def write_chain(path, *texts):
    """A checkpoint of bytes that writes these texts in any order; no two of them share a byte but the space."""
    embed, head = torch.zeros(320, 64), torch.zeros(320, 64)
    pairs = {pair for text in texts for pair in itertools.pairwise(b" " + text.encode() + b" ")}
    for i, byte in enumerate(sorted({a for a, _ in pairs})):
        embed[byte, i] = 1.0
        head[[b for a, b in pairs if a == byte], i] = 100.0  # logits of 800: the others have probability 0
    zeros = {"qkv": (3, 64, 64), "o": (64, 64), "up": (256, 64), "down": (64, 256)}
    blocks = {f"blocks.0.{name}": torch.zeros(shape) for name, shape in zeros.items()}
    config = dict(vocab_size=257, block_size=WINDOW, n_layer=1, n_head=1, n_embd=64, logit_softcap=0.0)
    torch.save(dict(format=1, config=config, tokenizer="bytes", model=dict(embed=embed, head=head) | blocks), path)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder in which everything runs."""
    return tmp_path_factory.mktemp("sample")


@pytest.fixture(scope="module", autouse=True)
def models(work):
    write_chain(work / "chain.pt", "née", "夜", "👻")
    return {name: write_checkpoint(work / f"{name}.pt", *MODELS[name], name == "gpt2") for name in MODELS}


# --- runs ---


@pytest.fixture
def write(work, capsys, monkeypatch):
    """Runs sample.py in this process from start to end: what it printed, and what it said."""
    monkeypatch.chdir(work)

    def write(*flags, code=0):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", "--dtype", "float32", *map(str, flags)])
        ended = 0
        try:
            script.run(script.main)
        except SystemExit as end:
            ended = end.code or 0
        said = capsys.readouterr()
        assert ended == code, said.err
        return said.out, said.err

    return write


@contextlib.contextmanager
def start(work, *flags):
    """A run in a process of its own, which is ended behind the with."""
    command = [sys.executable, ROOT / "sample.py", "--device", "cpu", "--dtype", "float32", *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONUNBUFFERED", None)  # it would hide what is not flushed
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, env=environment, cwd=work, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def rows(path):
    """The stories of a file by their ids, which must be there once each."""
    found = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["id"])
    assert [row["id"] for row in found] == list(range(len(found)))
    return found


def load(work, name="bytes", dtype=torch.float32, device=CPU):
    """config and weights, as the functions of sample.py take them."""
    return script.load(str(work / f"{name}.pt"), device, dtype)[1:3]


def texts(model, prompts, n, sampling=(1.0,), ids=None, seed=0, batch_size=0):
    """The tokens that generate() continues prompts with."""
    found = [[] for _ in prompts]
    ids = range(len(prompts)) if ids is None else ids
    for pairs in script.generate(*model, prompts, ids, n, sampling, seed, batch_size, set()):
        for i, token in pairs:
            found[i].append(token)
    return found


# --- the model, its cache, full contexts ---


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_cached_logits_are_those_of_transformers(work, models, monkeypatch, name, dtype):
    logits, sample = [], script.sample
    monkeypatch.setattr(script, "sample", lambda x, *rest: (logits.append(x), sample(x, *rest))[1])
    prompts = [[1, 2, 3], [7], [4, 3, 200, 9, 30]]
    found = texts(load(work, name, dtype), prompts, 40)
    for i, (prompt, new) in enumerate(zip(prompts, found)):
        expected = models[name](torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        ours = torch.stack([step[i] for step in logits])
        assert ours.shape == expected.shape and expected.std() > 0.5
        assert (ours - expected).abs().max() < 1e-4 if dtype == torch.float32 else 0 < (ours - expected).std() < 0.3


@torch.no_grad()
def greedily(theirs, prompt, n, eot):
    """The tokens that transformers' model continues a prompt with, nothing cached; a full context keeps a half."""
    text, begin = list(prompt), 0 if len(prompt) <= WINDOW else len(prompt) - WINDOW // 2
    for _ in range(n):
        if len(text) - begin > WINDOW:
            begin = len(text) - WINDOW // 2
        text.append(theirs(torch.tensor([text[begin:]])).logits[0, -1].argmax().item())
        if text[-1] == eot:
            return text[len(prompt) : -1]
    return text[len(prompt) :]


@pytest.mark.parametrize(
    "name, prompt", [("bytes", PROMPT), ("chars", PROMPT), ("chars", 3 * PROMPT), ("gpt2", PROMPT)]
)
def test_greedy_stories_are_those_of_transformers(write, models, name, prompt):
    tokenizer = script.get_tokenizer(MODELS[name][0])
    eot = tokenizer.eot_token if name != "chars" else None
    tokens = [eot] * (name != "chars") + tokenizer.encode_ordinary(prompt)
    new = greedily(models[name], tokens, 150, eot)
    assert len(set(new)) > 5 and len(tokens) + len(new) > WINDOW, "a model that repeats itself tests nothing"
    flags = f"{name}.pt", "--prompt", prompt, "--max_new_tokens", 150
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # half a character at the end is left out
    expected = prompt + decoder.decode(tokenizer.decode_bytes(new)) + "\n"
    for greedy in ("--temperature", 0), ("--top_k", 1), ("--top_p", 0), ("--min_p", 1):
        assert write(*flags, *greedy)[0] == expected


def test_prompts_of_any_length_share_a_batch_also_when_the_context_is_full(work, models):
    torch.manual_seed(4)
    prompts = [torch.randint(256, (length,)).tolist() for length in (1, 9, 4, WINDOW, WINDOW + 7, 9)]
    expected = [greedily(models["bytes"], prompt, 3 * WINDOW, None) for prompt in prompts]
    for batch_size in (1, 4, 6):
        assert texts(load(work), prompts, 3 * WINDOW, (0,), batch_size=batch_size) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_cuda_graph_writes_what_is_written_without(work, compiled):
    torch.manual_seed(4)
    prompts = [torch.randint(256, (length,)).tolist() for length in (1, 9, 4, WINDOW, WINDOW + 7, 9)]
    for sampling in [(0,), (0.8, 40, 0.9, 0.01)]:
        found = [[] for _ in prompts]
        settings = sampling, 1, 4, set(), compiled
        for pairs in script.generate(*load(work, device=torch.device("cuda")), prompts, range(6), 200, *settings):
            for i, token in pairs:
                found[i].append(token)
        expected = texts(load(work), prompts, 200, sampling, seed=1)
        same = [next((n for n, (a, b) in enumerate(zip(*pair)) if a != b), 200) for pair in zip(found, expected)]
        assert sorted(same)[2] == 200 and min(map(len, found)) == 200, same  # rounding may part a few


def test_compiled_decoding_writes_the_same(work):
    compiled, cache = torch.compile(script.decode, dynamic=False, backend="aot_eager"), []
    for decode in (script.decode, compiled):
        config, weights = script.load(str(work / "bytes.pt"), CPU, torch.float32, compiled=True)[1:3]
        cache.append([[torch.zeros(2, 2, WINDOW, 8) for _ in "kv"] for _ in range(2)])
        state = torch.stack([torch.tensor([[n], [n + 1]]) for n in (5, 0, 0, 0)])
        draws = torch.rand(2, 9, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            for _ in range(5):
                decode(config, weights, cache[-1], state, draws, WINDOW, (0.8,))
        cache[-1] = [state, *itertools.chain(*cache[-1])]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*cache)) and cache[0][0][1].tolist() == [[5], [6]]


# --- sampling ---


@pytest.mark.parametrize(
    "rules, kept",
    [
        (dict(), [0, 1, 2, 3]),
        (dict(temperature=2.0), [0, 1, 2, 3]),
        (dict(top_k=2), [0, 3]),
        (dict(top_k=99), [0, 1, 2, 3]),
        (dict(top_p=0.6), [0]),  # it has 0.64 of the probability
        (dict(top_p=0.8), [0, 3]),
        (dict(min_p=0.2), [0, 3]),  # 1, 0.14, 0.05 and 0.37 times as likely as the likeliest
        (dict(min_p=0.1), [0, 1, 3]),
        (dict(top_k=3, top_p=0.99, min_p=0.3), [0, 3]),
        (dict(temperature=0), [0]),
    ],
)
def test_sampling_follows_the_distribution(rules, kept):
    logits, u = torch.tensor([[2.0, 0.0, -1.0, 1.0]]), (torch.arange(4000) + 0.5) / 4000
    expected = (logits[0] / (rules.get("temperature") or 1)).softmax(-1)
    expected[[i for i in range(4) if i not in kept]] = 0
    found = torch.bincount(script.sample(logits.expand(4000, 4), u, **rules), minlength=4) / 4000
    torch.testing.assert_close(found, expected / expected.sum(), atol=1e-3, rtol=0)
    padded = F.pad(logits, (3, 3), value=-torch.inf).expand(2, 10)  # never a token of probability 0
    found = script.sample(padded, torch.tensor([0, 1 - 2**-24]), **rules)
    assert found.tolist() == [3 + kept[0], 3 + kept[-1]]


def test_the_chance_of_a_token_is_that_of_its_seed_id_and_position(work):
    config, weights = load(work, "chars")
    weights["head"], config = torch.zeros(64, 16), {**config, "vocab_size": 64}  # the number drawn is the token
    found = texts((config, weights), [[1], [1, 2]], 150, ids=[3, 7], seed=-5)
    for i, text in zip((3, 7), found):
        raw = np.random.Philox(key=np.array([2**64 - 5, i], np.uint64)).random_raw(150)
        assert text == (raw >> np.uint64(58)).tolist()


# --- many stories ---


@pytest.fixture
def prompts(work):
    (work / "prompts.txt").write_text("The house was empty\n\nI\n  \nIt was raining, and\n")
    return "--prompt_file", "prompts.txt"


def test_one_seed_gives_one_story_for_each_id_whatever_the_batch(write, work, prompts):
    flags = "bytes.pt", *prompts, "--num", 3, "--max_new_tokens", 80
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


def test_a_story_is_a_line_of_these_fields(write, work, prompts):
    sampling = dict(max_new_tokens=12, temperature=0.9, top_k=20, top_p=0.95, min_p=0.01, stop=["zz", "\n"])
    flags = "--max_new_tokens 12 --temperature 0.9 --top_k 20 --top_p 0.95 --min_p 0.01 --seed -5 --stop zz --stop"
    _, said = write("chars.pt", *prompts, "--num", 2, "--out", "fields.jsonl", *flags.split(), "\n")
    assert said == "fields.jsonl: 6 stories, 6 of them new\n"
    for row in rows(work / "fields.jsonl"):
        assert list(row) == "id prompt text tokens seed checkpoint sampling".split()
        assert row["prompt"] == ["The house was empty", "I", "It was raining, and"][row["id"] % 3]
        new = len(row["text"].removeprefix(row["prompt"]))  # a token is a character
        assert new == row["tokens"] == 12 or new < row["tokens"] <= 12  # or a --stop text was cut off
        assert (row["seed"], row["checkpoint"], row["sampling"]) == (-5, "chars.pt", sampling)


def test_a_killed_run_goes_on_with_those_missing(write, work):
    many, path = ("bytes.pt", "--num", 50, "--max_new_tokens", 60), work / "killed.jsonl"
    write(*many, "--out", "whole.jsonl")
    with start(work, *many, "--batch_size", 1, "--out", path.name) as process:
        while not path.exists() or path.read_bytes().count(b"\n") < 3:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    old = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(old[:-1]) + old[-1][: len(old[-1]) // 2])  # as if it had been killed while writing
    said = write(*many, "--out", path.name)[1]
    assert 3 <= len(old) < 50 and said == f"killed.jsonl: 50 stories, {51 - len(old)} of them new\n"
    assert path.read_bytes().startswith(b"".join(old[:-1])) and rows(path) == rows(work / "whole.jsonl")
    whole = path.read_bytes()
    assert write(*many, "--out", path.name)[1].endswith("50 stories, 0 of them new\n") and path.read_bytes() == whole


@pytest.mark.parametrize(
    "flags, named",
    [
        (("--seed", 7), "seed 1337, not 7"),
        (("--prompt", "Now"), f"prompt '{PROMPT}', not 'Now'"),
        (("--top_k", 3), "'top_k': 0"),
        (("--stop", "x"), "'stop': []"),
        (("--num", 9, "old"), "a line that is no story"),
    ],
)
def test_stories_of_another_run_are_not_added_to(write, work, flags, named):
    path = work / "old.jsonl"
    path.unlink(missing_ok=True)
    write("bytes.pt", "--num", 2, "--max_new_tokens", 5, "--out", "old.jsonl")
    if flags[-1] == "old":
        path.write_bytes(path.read_bytes() + b"notes of somebody else")
        flags = flags[:-1]
    before = path.read_bytes()
    said = write("bytes.pt", "--max_new_tokens", 5, "--out", "old.jsonl", *flags, code=2)[1]
    assert said.startswith("sample.py: --out old.jsonl: ") and named in said and said.count("\n") == 1
    assert path.read_bytes() == before


# --- texts ---

GHOSTS = re.compile(r"Ghosts( née| 夜| 👻)*( n?é?e?)?")


def test_a_story_appears_while_it_is_written_in_whole_characters(work):
    with start(work, "chain.pt", "--prompt", "Ghosts ", "--max_new_tokens", 100_000) as process:
        chunks = [os.read(process.stdout.fileno(), 100_000)]
        while sum(map(len, chunks)) < 1000:
            assert process.poll() is None
            chunks.append(os.read(process.stdout.fileno(), 100_000))
        process.send_signal(signal.SIGINT)
        rest, said = process.communicate(timeout=60)
    assert max(map(len, chunks)) < 8192, "it waits until a buffer is full"
    text = "".join(chunk.decode() for chunk in chunks)  # no chunk ends in the middle of a character
    assert GHOSTS.fullmatch(text + rest.decode().removesuffix("\n")) and set("n夜👻") < set(text)
    assert process.returncode == 130 and said == b"sample.py: interrupted\n"


def test_an_output_that_cannot_hold_a_character_gets_a_question_mark(write, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="latin-1"))
    write("chain.pt", "--prompt", "Ghosts ", "--max_new_tokens", 200)
    assert re.fullmatch(rb"Ghosts( n\xe9e| \?)*( n?\xe9?e?)?\n", printed.getvalue())


@pytest.mark.parametrize("name", ["bytes", "chars", "gpt2"])
def test_a_stop_text_ends_a_story_before_it(write, work, name):
    flags = f"{name}.pt", "--prompt", PROMPT, "--max_new_tokens", 60
    free = write(*flags)[0].removeprefix(PROMPT)
    stops = [text for text in (free[20:23], free[25:27]) if text.isprintable()]
    assert stops, "nothing to stop at"
    more = [word for stop in (*stops, "never written") for word in ("--stop", stop)]
    expected = PROMPT + free[: min(free.index(stop) for stop in stops)]
    assert write(*flags, *more)[0] == expected + "\n"  # streamed: no part of it was printed
    write(*flags, *more, "--out", f"stopped_{name}.jsonl")
    assert rows(work / f"stopped_{name}.jsonl")[0]["text"] == expected


def test_prompts_come_from_files_and_standard_input(write, work, monkeypatch):
    data, flags = "It is dark.\n\n  \nÉté\nthe end", ("bytes.pt", "--max_new_tokens", 5, "--temperature", 0)
    (work / "marked.txt").write_text(data, encoding="utf-8-sig")
    write(*flags, "--prompt_file", "marked.txt", "--out", "marked.jsonl")
    assert [row["prompt"] for row in rows(work / "marked.jsonl")] == ["It is dark.", "Été", "the end"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(data))
    write(*flags, "--prompt_file", "-", "--out", "piped.jsonl")
    assert rows(work / "piped.jsonl") == rows(work / "marked.jsonl")
    monkeypatch.setattr(sys, "stdin", io.StringIO("It is dark.\nÉté\n"))
    assert write(*flags, "--prompt", "-")[0] == write(*flags, "--prompt", "It is dark.\nÉté")[0]


def test_a_talk_has_a_story_for_every_line(write, work, monkeypatch):
    flags = "bytes.pt", "--max_new_tokens", 20, "--prompt", "It was late"
    write(*flags, "--num", 3, "--out", "talk.jsonl")
    monkeypatch.setattr(sys, "stdin", io.StringIO("It was late\n\nIt was late"))  # an empty line means --prompt
    assert write(*flags, "--interactive")[0] == "".join(row["text"] + "\n" for row in rows(work / "talk.jsonl"))


# --- narration ---


@pytest.fixture
def speech(monkeypatch):
    """Starts a server that gives some answers (status, data) in turn, the last for ever: its address, the requests."""
    servers = []
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")

    def speech(*answers):
        asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, data = answers[min(len(asked), len(answers) - 1)]
                asked.append((self.path, self.headers["Authorization"], body))
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Location", "http://127.0.0.1:1/elsewhere")
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


def test_a_story_is_read_aloud_in_pieces_of_whole_sentences(write, speech, tmp_path):
    url, asked = speech(*[(200, b"<%d>" % i) for i in range(9)])
    prompt = " ".join(f"'{'a house in the dark ' * (i % 7)}and no light.'" for i in range(250))
    story, _ = write("chars.pt", "--prompt", prompt, "--narrate", tmp_path / "x.mp3", "--base_url", url + "/")
    read = [body["input"] for _, _, body in asked]
    assert "".join("".join(read).split()) == "".join(story.split()) and len(read) > 3
    assert all(2500 < len(text) <= 4000 and text.endswith(".'") for text in read[:-2]) and len(read[-1]) <= 4000
    assert {asks[:2] for asks in asked} == {("/v1/audio/speech", f"Bearer {KEY}")}
    assert {key: asked[0][2][key] for key in ("model", "voice")} == dict(model="gpt-4o-mini-tts", voice="onyx")
    assert (tmp_path / "x.mp3").read_bytes() == b"".join(b"<%d>" % i for i in range(len(read)))
    assert os.listdir(tmp_path) == ["x.mp3"]


@pytest.mark.parametrize(
    "answers, message, requests",
    [
        ([(401, f"Incorrect API key provided:\n{KEY}".encode())], "answers 401 (Incorrect API key provided: [key])", 1),
        ([(307, b"there")], "answers 307 (there)", 1),  # the key is sent nowhere else
        ([(500, b"out of order")], "answers 500 (out of order)", 1),
        ([(200, b"<0>"), (400, b"no")], "answers 400 (no)", 2),  # in the middle
    ],
)
def test_a_failed_narration_leaves_the_old_file(write, speech, tmp_path, answers, message, requests):
    (tmp_path / "x.mp3").write_bytes(b"old")
    url, asked = speech(*answers)
    flags = "--prompt", "the house. " * 500, "--max_new_tokens", 9, "--narrate", tmp_path / "x.mp3", "--base_url", url
    story, said = write("chars.pt", *flags, code=1)
    assert said.startswith("sample.py: --narrate: ") and said.count("\n") == 1 and message in said
    assert len(asked) == requests and KEY not in story + said
    assert os.listdir(tmp_path) == ["x.mp3"] and (tmp_path / "x.mp3").read_bytes() == b"old"


# --- mistakes ---


@pytest.mark.parametrize(
    "flags, message",
    [
        ("none.pt", "none.pt: No such file or directory"),
        ("notes.txt", "notes.txt: not a checkpoint of these scripts"),
        ("words.pt", "words.pt: not a checkpoint of these scripts"),
        ("empty", "empty/ckpt.pt"),
        ("kind.pt", "kind.pt: not a checkpoint of these scripts"),
        ("bytes.pt --tempo 1", "unrecognized arguments: --tempo"),
        ("bytes.pt --device cuda", "--device cuda: PyTorch finds no GPU here"),
        ("bytes.pt --num x", "argument --num"),
        ("bytes.pt --prompt_file none.txt", "none.txt: No such file or directory"),
        ("bytes.pt --prompt_file blank.txt", "blank.txt: no prompts"),
        ("bytes.pt --out empty", "empty: Is a directory"),
        ("bytes.pt --out none/x.jsonl", "none/x.jsonl: No such file or directory"),
        ("chars.pt --prompt at€5", "with characters that the checkpoint does not know: '5€'"),
        ("chars.pt --prompt=", "--prompt: empty"),
        ("bytes.pt --interactive --out x.jsonl", "one story at a time"),
        (
            "bytes.pt --narrate none/x.mp3 --base_url http://127.0.0.1:1",
            "--narrate none/x.mp3: there is no such folder",
        ),
        ("bytes.pt --narrate x.mp3", "OpenAI wants a key"),
    ],
)
def test_a_mistake_gets_one_line(write, work, monkeypatch, flags, message):
    (work / "notes.txt").write_text("notes")
    (work / "blank.txt").write_text(" \n\n")
    (work / "empty").mkdir(exist_ok=True)
    torch.save(dict(format=1, config={"kind": "bigram"}, tokenizer="bytes", model={}), work / "kind.pt")
    torch.save(dict(format=1, config={}, tokenizer={"words": "a"}, model={}), work / "words.pt")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is one")
    printed, said = write(*flags.split(), code=2)
    assert printed == "" and said.startswith("sample.py: ") and said.count("\n") == 1 and message in said
    assert not (work / "x.jsonl").exists() and not (work / "x.mp3").exists()
