"""sample.py: against transformers, in batches, resumed, streamed, read aloud, mistaken, and as a CUDA graph."""

import codecs
import io
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import call, refused
from test_model import as_nanochat, random_model, write_checkpoint
from test_rank import completion, judge, page  # noqa: F401
from test_train_gpt import popen, wait_for

import sample as script

PROMPT, WINDOW, CPU = "It was a dark and stormy night", 64, torch.device("cpu")
CHARS = " ,.'\nITabcdefghijklmnopqrstuvwxyzéß"
KEY = "sk-of-this-test-and-of-no-other"
MODELS = {"bytes": ("bytes", 257), "chars": ({"chars": CHARS}, len(CHARS)), "gpt2": ("gpt2", 50257)}


def model_of(name):
    return random_model(vocab_size=MODELS[name][1], block_size=WINDOW, n_embd=16, n_layer=2, tie_weights=name == "gpt2")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder in which everything runs."""
    work = tmp_path_factory.mktemp("sample")
    for name, (tokenizer, _) in MODELS.items():
        write_checkpoint(work / f"{name}.pt", model_of(name), tokenizer)
    (work / "prompts.txt").write_text("The house was empty\n\nI\n  \nÉté, and", encoding="utf-8-sig")
    return work


@pytest.fixture
def write(work, monkeypatch):
    """Runs sample.py in this process from start to end: what it printed, and what it said."""
    monkeypatch.chdir(work)
    return lambda *flags, **settings: call("sample.py", "--device", "cpu", "--dtype", "float32", *flags, **settings)


def rows(path):
    """The stories of a file by their ids, which must be there once each."""
    found = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["id"])
    assert [row["id"] for row in found] == list(range(len(found)))
    return found


def texts(work, prompts, n, sampling, batch_size=0, device=CPU, compiled=False):
    """The tokens that generate() continues prompts with."""
    model, found = script.load(str(work / "bytes.pt"), device, torch.float32)[1:3], [[] for _ in prompts]
    for pairs in script.generate(*model, prompts, range(len(prompts)), n, sampling, 1, batch_size, set(), compiled):
        for i, token in pairs:
            found[i].append(token)
    return found


# --- what is written ---
def test_a_million_blanks_in_a_prompt(write, work):
    (work / "blanks.txt").write_text("a" + " " * 1_000_000 + "b")
    story = write("gpt2.pt", "--prompt_file", "blanks.txt", "--max_new_tokens", 3)[0]
    assert story.startswith("a" + " " * 1_000_000 + "b") and len(story) > 1_000_003


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


@pytest.mark.parametrize("name, prompt", [("bytes", PROMPT), ("chars", 3 * PROMPT), ("gpt2", PROMPT)])
def test_greedy_stories_are_those_of_transformers(write, name, prompt):
    tokenizer = script.get_tokenizer(MODELS[name][0])
    eot = tokenizer.eot_token if name != "chars" else None
    tokens = [eot] * (name != "chars") + tokenizer.encode_ordinary(prompt)
    new = greedily(as_nanochat(model_of(name)), tokens, 100, eot)
    assert len(set(new)) > 5 and len(tokens) + len(new) > WINDOW, "a model that repeats itself tests nothing"
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # half a character at the end is left out
    expected = prompt + decoder.decode(tokenizer.decode_bytes(new)) + "\n"
    for greedy in ("--temperature", 0), ("--top_k", 1), ("--top_p", 0), ("--min_p", 1):
        assert write(f"{name}.pt", "--prompt", prompt, "--max_new_tokens", 100, *greedy)[0] == expected


def random_prompts():
    torch.manual_seed(4)
    return [torch.randint(256, (length,)).tolist() for length in (1, 9, 4, WINDOW, WINDOW + 7, 9)]


def test_prompts_of_any_length_share_a_batch_also_when_the_context_is_full(work):
    theirs = as_nanochat(model_of("bytes"))
    expected = [greedily(theirs, prompt, 3 * WINDOW, None) for prompt in random_prompts()]
    for batch_size in (1, 4, 6):
        assert texts(work, random_prompts(), 3 * WINDOW, (0,), batch_size) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_cuda_graph_writes_what_is_written_without(work, compiled):
    for sampling in [(0,), (0.8, 40, 0.9, 0.01)]:
        found = texts(work, random_prompts(), 200, sampling, 4, torch.device("cuda"), compiled)
        expected = texts(work, random_prompts(), 200, sampling)
        same = [next((n for n, (a, b) in enumerate(zip(*pair)) if a != b), 200) for pair in zip(found, expected)]
        assert sorted(same)[2] == 200 and min(map(len, found)) == 200, same  # rounding may part a few


@pytest.mark.parametrize(
    "rules", [{}, {"temperature": 2.0}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.8}]
)
def test_sampling_follows_the_distribution_of_transformers(rules):
    torch.manual_seed(0)
    logits, u = 2 * torch.randn(1, 20), (torch.arange(20_000) + 0.5) / 20_000
    expected, names = logits, dict(temperature="Temperature", top_k="TopK", top_p="TopP", min_p="MinP")
    for rule, value in rules.items():
        expected = getattr(transformers, f"{names[rule]}LogitsWarper")(value)(None, expected)
    expected = expected.softmax(-1)[0]
    found = torch.bincount(script.sample(logits.expand(20_000, 20), u, **rules), minlength=20) / 20_000
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    ends = script.sample(logits.expand(2, 20), torch.tensor([0, 1 - 2**-24]), **rules)
    assert ends.tolist() == expected.nonzero()[[0, -1], 0].tolist(), "a token of probability 0"


# --- many stories ---


def test_one_seed_gives_one_story_for_each_id_whatever_the_batch(write, work):
    flags = "bytes.pt", "--prompt_file", "prompts.txt", "--num", 3, "--max_new_tokens", 80
    for size in (1, 4, 0):
        write(*flags, "--batch_size", size, "--out", f"batch_{size}.jsonl")
    expected = rows(work / "batch_1.jsonl")
    for row in expected:
        assert list(row) == "id prompt text tokens seed checkpoint sampling".split()
        assert row["prompt"] == ["The house was empty", "I", "Été, and"][row["id"] % 3]
        assert row["text"].startswith(row["prompt"]) and 0 < row["tokens"] <= 80 and row["checkpoint"] == "bytes.pt"
    assert len({row["text"] for row in expected}) == 9
    assert rows(work / "batch_4.jsonl") == rows(work / "batch_0.jsonl") == expected
    printed = write(*flags)[0]
    assert sorted(printed.removesuffix("\n").split("\n\n---\n\n")) == sorted(row["text"] for row in expected)
    assert write("bytes.pt", "--prompt", "The house was empty", "--max_new_tokens", 80)[0] == expected[0]["text"] + "\n"
    assert not {row["text"] for row in expected} & set(write(*flags, "--seed", 1338)[0][:-1].split("\n\n---\n\n"))


def test_a_killed_run_goes_on_with_those_missing(write, work):
    many, path = ("bytes.pt", "--num", 50, "--max_new_tokens", 60), work / "killed.jsonl"
    write(*many, "--out", "whole.jsonl")
    flags = "--device", "cpu", "--dtype", "float32", "--batch_size", 1, "--out", path.name
    with popen("sample.py", *many, *flags, cwd=work) as process:
        wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= 3, process)
        process.kill()
    old = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(old[:-1]) + old[-1][: len(old[-1]) // 2])  # as if it had been killed while writing
    said = write(*many, "--out", path.name)[1]
    assert 3 <= len(old) < 50 and said.endswith(f"killed.jsonl: 50 stories, {51 - len(old)} of them new\n")
    assert path.read_bytes().startswith(b"".join(old[:-1])) and rows(path) == rows(work / "whole.jsonl")


def test_stories_of_another_run_are_not_added_to(write, work):
    path, flags = work / "old.jsonl", ("bytes.pt", "--max_new_tokens", 5, "--out", "old.jsonl")
    write(*flags)
    before = path.read_bytes()
    for other, named in [("--seed 7", "seed 1337, not 7"), ("--prompt Now", "not 'Now'"), ("--top_k 3", "'top_k': 0")]:
        assert named in refused("sample.py", *flags, *other.split()) and path.read_bytes() == before
    path.write_bytes(before + b"notes of somebody else")
    assert "a line that is no story" in refused("sample.py", *flags, "--num", 9)
    assert path.read_bytes() == before + b"notes of somebody else"


# --- texts ---


def test_a_story_appears_while_it_is_written_in_whole_characters(write, work):
    flags = "bytes.pt", "--device", "cpu", "--dtype", "float32", "--max_new_tokens", 3000
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with popen("sample.py", *flags, cwd=work, env=environment, stdout=subprocess.PIPE) as process:
        first = os.read(process.stdout.fileno(), 10_000)
        assert process.poll() is None and len(first) < 2000, "it waits until a buffer is full"
        text = first.decode() + process.stdout.read().decode()  # the first does not end in the middle of a character
    write(*flags, "--out", "streamed.jsonl")
    story = rows(work / "streamed.jsonl")[0]["text"]
    assert text == story + "\n" and not story.isascii()
    latin = write("bytes.pt", "--max_new_tokens", 50, encoding="latin-1")[0]
    assert latin == write("bytes.pt", "--max_new_tokens", 50)[0].encode("latin-1", "replace").decode("latin-1")


@pytest.mark.parametrize("name", MODELS)
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


def test_prompts_come_from_standard_input(write, work, monkeypatch):
    write("bytes.pt", "--max_new_tokens", 20, "--prompt", "I\nÉté", "--num", 2, "--out", "talk.jsonl")
    stories = [row["text"] + "\n" for row in rows(work / "talk.jsonl")]
    for text, flags, expected in [
        ("I\nÉté\n", ["--prompt", "-"], stories[0]),
        ("\n\n", ["--prompt", "I\nÉté", "--interactive"], stories[0] + stories[1]),  # an empty line means --prompt
    ]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert write("bytes.pt", "--max_new_tokens", 20, *flags)[0] == expected


# --- narration ---


def narrate(write, judge, folder, prompt, answers, **settings):  # noqa: F811
    """A story read aloud by a server that gives these answers (status, data): (the requests, printed, said)."""
    judge.asked.clear()
    judge.faults.extend(page(data, status, Location="/v1/elsewhere") for status, data in answers)
    flags = "--prompt", prompt, "--max_new_tokens", 9, "--narrate", folder / "x.mp3", "--base_url", f"{judge.url}/"
    printed, said = write("chars.pt", *flags, **settings)
    return [(asks["path"], asks["key"], asks["body"]) for asks in judge.asked], printed, said


def test_a_story_is_read_aloud_in_pieces_of_whole_sentences(write, judge, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    prompt = " ".join(f"'{'a house in the dark ' * (i % 7)}and no light.'" for i in range(250))
    asked, story, _ = narrate(write, judge, tmp_path, prompt, [(200, b"<%d>" % i) for i in range(9)])
    judge.faults.clear()
    read, sound = [body["input"] for _, _, body in asked], (tmp_path / "x.mp3").read_bytes()
    assert "".join("".join(read).split()) == "".join(story.split()) and len(read) > 3
    assert all(2500 < len(text) <= 4000 and text.endswith(".'") for text in read[:-2]) and len(read[-1]) <= 4000
    assert {asks[:2] for asks in asked} == {("/v1/audio/speech", f"Bearer {KEY}")}
    assert {key: asked[0][2][key] for key in ("model", "voice")} == dict(model="gpt-4o-mini-tts", voice="onyx")
    assert sound == b"".join(b"<%d>" % i for i in range(len(read)))

    wrong_key, elsewhere = (401, f"Incorrect key:\n{KEY}".encode()), (307, b"there")
    for answers in ([wrong_key], [elsewhere], [(200, b"<0>"), wrong_key]):  # the last in the middle
        asked, story, said = narrate(write, judge, tmp_path, prompt, answers, code=1)
        assert said.startswith("sample.py: http://") and said.count("\n") == 1 and f"{answers[-1][0]} (" in said
        assert len(asked) == len(answers) and KEY not in story + said
        assert os.listdir(tmp_path) == ["x.mp3"] and (tmp_path / "x.mp3").read_bytes() == sound


def test_a_model_behind_an_api_writes_the_same_lines(write, judge, work, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    told = ["<think>?</think>\nA door shut.", "i heard it.\n", "été, and gone"]
    told += ["… as I came", "In a lift", ", too", None]
    judge.faults.extend(page(completion(text)) for text in told)
    judge.faults.insert(2, page(f"No credit for\n{KEY}".encode(), 429))
    api = "--model", "m", "--base_url", judge.url, "--prompt_file", "prompts.txt", "--out", "api.jsonl", "--num"
    said = write(*api, 2, code=1)[1].split("\r")[-1]
    assert said == f"sample.py: {judge.url}/chat/completions answers 429 (No credit for [key])\n"
    assert "6 stories, 4 of them new" in write(*api, 2)[1] and "sent no story" in write(*api, 3, code=1)[1]
    assert {asks["key"] for asks in judge.asked} == {f"Bearer {KEY}"}
    assert [asks["body"]["seed"] - 1337 for asks in judge.asked] == [0, 1, 2, 2, 3, 4, 5, 6]
    expected = ["The house was empty A door shut.", "I heard it.", "Été, and gone"]
    expected += ["The house was empty… as I came", "I In a lift", "Été, and, too"]
    sampling, found = dict(max_new_tokens=500, temperature=0.8), rows(work / "api.jsonl")
    about = dict(id=1, prompt="I", text="I heard it.", tokens=2, seed=1337, checkpoint="m", sampling=sampling)
    assert [row["text"] for row in found] == expected and found[1] == about
    judge.faults.extend(page(completion(text)) for text in told[:3])
    assert write(*api[:-3])[0] == "\n\n---\n\n".join(expected[:3]) + "\n"


def test_a_mistake_gets_one_line(work, monkeypatch):
    monkeypatch.chdir(work)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (work / "blank.txt").write_text(" \n\n")
    for flags, message in [
        ("bytes.pt --tempo 1", "unrecognized arguments: --tempo"),
        ("bytes.pt --prompt_file none.txt", "none.txt: No such file or directory"),
        ("bytes.pt --prompt_file blank.txt", "blank.txt: no prompts"),
        ("bytes.pt --out none/x.jsonl", "none/x.jsonl: No such file or directory"),
        ("chars.pt --prompt at€5", "with characters that the checkpoint does not know: '5€'"),
        ("bytes.pt --interactive --out x.jsonl", "one story at a time"),
        ("bytes.pt --narrate none/x.mp3", "--narrate none/x.mp3: there is no such folder"),
        ("bytes.pt --narrate x.mp3", "OpenAI wants a key"),
        ("--model m --num 2", "OpenAI wants a key"),
        ("bytes.pt --model m", "not both"),
        ("--num 2", "name a checkpoint, or a --model"),
    ]:
        assert message in refused("sample.py", "--device", "cpu", *flags.split())
    assert not (work / "x.jsonl").exists() and not (work / "x.mp3").exists()
