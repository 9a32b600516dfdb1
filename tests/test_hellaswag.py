"""hellaswag.py as a user runs it: against transformers row by row, stopped, shared, downloading, with mistakes."""

import concurrent.futures
import contextlib
import http.server
import json
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiktoken
import tokenizers
import torch
import torch.nn.functional as F
from conftest import BPE
from test_model import as_nanochat
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import hellaswag as script

ROOT = pathlib.Path(__file__).resolve().parent.parent
FEW, MANY, WINDOW = 12, 250, 160
WORDS = "tea the a kettle she boils, then pours. it slowly; naïve Über cups — and walks away".split()
QUESTION = dict(
    activity_label="Tea", ctx="She boils", ctx_a="She boils", ctx_b="", endings=["a", "b", "c", "d"], label=2
)


def write_questions(path, count):
    chance = random.Random(0)

    def text(most):
        return " ".join(chance.choices(WORDS, k=chance.randint(1, most)))

    rows = []
    for _ in range(count):
        ctx, endings = text(9), [text(6) for _ in range(4)]
        rows.append({**QUESTION, "ctx": ctx, "ctx_a": ctx, "endings": endings, "label": chance.randrange(4)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def randomise(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model.eval()


def write_checkpoint(path, tokenizer, vocab_size, step):
    config = dict(vocab_size=vocab_size, block_size=WINDOW, n_layer=2, n_head=2, n_embd=16)
    model = randomise(script.GPT(script.Config(**config)), step)
    checkpoint = {"format": 1, "config": config, "tokenizer": tokenizer, "model": model.state_dict()}
    torch.save({**checkpoint, "train": {"step": step}}, path)
    return model


def write_gpt2(folder):
    """A model of transformers with GPT-2's tokenizer, in the form in which such models are published."""
    bpe = tokenizers.ByteLevelBPETokenizer(str(BPE / "encoder.json"), str(BPE / "vocab.bpe"))
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    model = randomise(GPT2LMHeadModel(GPT2Config(n_positions=WINDOW, n_embd=16, n_layer=2, n_head=2)))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder in which everything runs."""
    work = tmp_path_factory.mktemp("hellaswag")
    write_questions(work / "many.jsonl", MANY)
    return work


@pytest.fixture(scope="module")
def questions(work):
    return write_questions(work / "few.jsonl", FEW)


@pytest.fixture(scope="module")
def models(work):
    """What is scored, by the name that the table gives it."""
    return {
        "bytes.pt": write_checkpoint(work / "bytes.pt", "bytes", 257, step=100),
        "later.pt": write_checkpoint(work / "later.pt", "bytes", 257, step=200),
        "gpt2.pt": write_checkpoint(work / "gpt2.pt", "gpt2", 50257, step=300),
        "tiny_gpt2": write_gpt2(work / "tiny_gpt2"),
    }


def start(work, *flags, ranks=1, environment={}, **settings):  # noqa: B006
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, ROOT / "hellaswag.py", "--device", "cpu", "--dtype", "float32", *flags]
    settings = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=work) | settings
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(list(map(str, command)), env=environment, **settings)


def score(work, *flags, code=0, **settings):
    """A run from start to end: what it printed, and what it said."""
    with start(work, *flags, **settings) as process:
        try:
            stdout, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == code and "Traceback" not in stderr, stderr
    return stdout, stderr


@pytest.fixture(scope="module", autouse=True)
def offline(work):
    """A run whose questions cannot be downloaded, begun before all else: it tries for half a minute."""
    proxies = {name: "http://127.0.0.1:9" for name in ("HTTPS_PROXY", "https_proxy")} | {"NO_PROXY": "", "no_proxy": ""}
    with start(work, "any.pt", "--data", "none.jsonl", environment=proxies) as process:
        yield process
        process.kill()


def at_once(*calls):
    """The results of calls that share the processors."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def table(stdout):
    """{name: (questions, acc, its error, acc_norm, its error)} of the lines that this run computed."""
    cell = r" +([\d.]+) ± ([\d.]+)"
    found = re.findall(rf"^(\S+) +([\d,]+){cell}{cell}$", stdout, re.M)
    return {name: (int(count.replace(",", "")), *map(float, numbers)) for name, count, *numbers in found}


def answers(path, model):
    """The details' rows of a model, in the order of the questions."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted((row for row in rows if row["model"] == model), key=lambda row: row["question"])


@torch.no_grad()
def row_by_row(model, encode, texts):
    """Losses of endings after contexts, summed over tokens, and their numbers of tokens: each row by itself."""
    losses, sizes = torch.zeros(len(texts), 4), torch.zeros(len(texts), 4)
    for i, (context, endings) in enumerate(texts):
        for j, ending in enumerate(endings):
            before, tokens = encode(context), encode(ending)
            logits = model(torch.tensor([before + tokens])).logits[0, len(before) - 1 : -1]
            losses[i, j], sizes[i, j] = F.cross_entropy(logits, torch.tensor(tokens), reduction="sum"), len(tokens)
    return losses, sizes


def assert_answers(rows, losses, sizes):
    assert [row["question"] for row in rows] == list(range(len(losses)))
    assert (torch.tensor([row["losses"] for row in rows]) - losses).abs().max() < 1e-4 and losses.std() > 1
    assert [row["prediction"] for row in rows] == losses.argmin(1).tolist()
    assert [row["prediction_norm"] for row in rows] == (losses / sizes).argmin(1).tolist()


# --- answers ---


@pytest.fixture(scope="module")
def scored(work, questions, models):
    """Two runs, one of checkpoints and one of a model of transformers: what they printed."""
    ours = "bytes.pt later.pt gpt2.pt --data few.jsonl --details scored.jsonl".split()
    theirs = "--hf tiny_gpt2 --data few.jsonl --details hf.jsonl --style harness".split()
    return at_once(lambda: score(work, *ours)[0], lambda: score(work, *theirs)[0])


def in_bytes(text):
    return list(text.encode())


def in_gpt2(text):
    return tiktoken.get_encoding("gpt2").encode_ordinary(text)


@pytest.mark.parametrize("name, encode, step", [("bytes.pt", in_bytes, 100), ("gpt2.pt", in_gpt2, 300)])
def test_checkpoints_are_scored_as_transformers_would_row_by_row(work, questions, models, scored, name, encode, step):
    texts = [(row["ctx"], [" " + ending for ending in row["endings"]]) for row in questions]
    expected = row_by_row(as_nanochat(models[name]), encode, texts)
    found = answers(work / "scored.jsonl", name)
    assert_answers(found, *expected)
    assert [row["label"] for row in found] == [row["label"] for row in questions]
    assert {row["step"] for row in found} == {step}


def test_models_of_transformers_are_scored_as_row_by_row(work, questions, models, scored):
    texts = [(f"Tea: {row['ctx']}", [" " + ending for ending in row["endings"]]) for row in questions]
    losses, _ = row_by_row(models["tiny_gpt2"], in_gpt2, texts)
    characters = torch.tensor([[len(ending) for ending in row["endings"]] for row in questions])
    assert_answers(answers(work / "hf.jsonl", "tiny_gpt2"), losses, characters)


def test_each_checkpoint_has_its_line(work, questions, models, scored):
    assert list(table(scored[0])) == ["bytes.pt", "later.pt", "gpt2.pt"] and list(table(scored[1])) == ["tiny_gpt2"]
    for name, (count, *numbers) in table(scored[0]).items():
        expected, rows = [], answers(work / "scored.jsonl", name)
        for key in ("prediction", "prediction_norm"):
            p = sum(row[key] == row["label"] for row in rows) / FEW
            expected += [p, (p * (1 - p) / FEW) ** 0.5]
        assert count == FEW and numbers == pytest.approx(expected, abs=5e-5), name
    assert any(numbers[1] > 0 for numbers in table(scored[0]).values())


def test_published_figures_stand_below(scored):
    for stdout in scored:
        lines = stdout.splitlines()
        assert "questions" in lines[0] and "acc_norm" in lines[0] and stdout.count("\n\n") == 1
        assert all("10042" in line.replace(",", "") for line in lines[lines.index("") + 1 :])
    assert re.search(r"GPT-2 124M, published +10,042 +0\.2859 +0\.2955", scored[0])
    assert re.search(r"GPT-3 1.3B.*published +10,042 +0\.5470", scored[0])
    assert re.search(r"GPT-2 124M, published +10,042 +0\.2892 +0\.3114", scored[1])


# --- questions as lm-evaluation-harness makes them ---

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
    (
        ("Été", "Il fait  beau.", "élise", ["rit.", "a [one\nline] b", "a [title] b", "a[title] b"]),
        "Été: Il fait beau. Élise",
        [(" rit.", 4), (" a [one\nline] b", 14), (" a. b", 4), (" a b", 3)],
    ),
]


@pytest.mark.parametrize("encode", [in_bytes, in_gpt2])
@pytest.mark.parametrize("texts, context, expected", HARNESS, ids=["plain", "wikihow", "space", "accents"])
def test_harness_questions_are_cleaned_and_split_as_written_by_hand(encode, texts, context, expected):
    row = dict(zip(("activity_label", "ctx_a", "ctx_b", "endings"), texts), ctx="another text", label=0)
    before, endings, sizes = script.harness_question(encode, row, 1024)
    assert before == encode(context) and sizes == [size for _, size in expected]
    assert [before + ending for ending in endings] == [encode(context + ending) for ending, _ in expected]


def test_harness_questions_too_long_lose_the_beginning_of_their_context():
    row = {**QUESTION, "endings": ["four", "x", "y", "z"]}  # the last token of 13 is only predicted
    context, endings, _ = script.harness_question(in_bytes, row, 12)
    assert bytes(context) == b"he boils" and list(map(bytes, endings)) == [b" four", b" x", b" y", b" z"]
    context, endings, _ = script.harness_question(in_bytes, {**row, "endings": ["four", "x", "y", "z" * 99]}, 12)
    assert bytes(context) == b"s" and bytes(endings[3]) == b" " + 11 * b"z"


# --- stopped and gone on, shared ---


@pytest.fixture(scope="module")
def whole(work, models):
    """A run of many questions that nothing interrupts, and one on two processes: what they printed."""
    flags = ["bytes.pt", "--data", "many.jsonl", "--details"]
    return at_once(
        lambda: score(work, *flags, "whole.jsonl")[0], lambda: score(work, *flags, "shared.jsonl", ranks=2)[0]
    )


def assert_same_answers(found, expected):
    assert [row["question"] for row in found] == list(range(MANY))
    losses = [torch.tensor([row["losses"] for row in rows]) for rows in (found, expected)]
    assert (losses[0] - losses[1]).abs().max() < 1e-4
    for a, b in zip(found, expected):
        assert {**a, "losses": None} == {**b, "losses": None}


def test_two_processes_share_the_questions(work, whole):
    assert whole[0] == whole[1] and table(whole[0])["bytes.pt"][0] == MANY
    assert_same_answers(answers(work / "shared.jsonl", "bytes.pt"), answers(work / "whole.jsonl", "bytes.pt"))


def lines(path):
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


@pytest.fixture(scope="module")
def stopped(work, models):
    """Details of runs that were ended in the middle, by the signal's name."""

    def stop(name):
        path = work / f"{name}.jsonl"
        with start(work, "bytes.pt", "--data", "many.jsonl", "--details", path, "--tokens_at_once", 1) as process:
            while len(lines(path)) < 20:
                assert process.poll() is None, "the run ended before it could be interrupted"
                time.sleep(0.001)
            process.send_signal(getattr(signal, name))
            said = process.communicate(timeout=60)[1].splitlines()
        assert 20 <= len(lines(path)) < MANY
        return path, process.returncode, said

    return dict(zip(("SIGKILL", "SIGINT"), at_once(lambda: stop("SIGKILL"), lambda: stop("SIGINT"))))


def test_interrupted_it_says_so_in_a_line(stopped):
    _, code, said = stopped["SIGINT"]
    assert code == 130 and said[-1] == "hellaswag.py: interrupted" and not any("Traceback" in line for line in said)
    assert stopped["SIGKILL"][1] == -9


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_stopped_it_goes_on_where_it_was(work, whole, stopped, capsys, monkeypatch, name):
    path = stopped[name][0]
    old = lines(path)
    first = json.loads(old[0])
    old[0] = json.dumps({**first, "losses": [7.0] * 4}).encode() + b"\n"  # computed again it would be another
    path.write_bytes(b"".join(old[:-1]) + old[-1][: len(old[-1]) // 2])
    monkeypatch.chdir(work)
    main(monkeypatch, "bytes.pt", "--data", "many.jsonl", "--details", path)
    assert capsys.readouterr().out == whole[0]
    assert lines(path)[: len(old) - 1] == old[:-1] and len(lines(path)) == MANY
    found = answers(path, "bytes.pt")
    found[first["question"]] = first
    assert_same_answers(found, answers(work / "whole.jsonl", "bytes.pt"))


def test_what_is_there_is_not_computed_again(work, whole, capsys, monkeypatch):
    monkeypatch.chdir(work)
    before = (work / "whole.jsonl").read_bytes()
    monkeypatch.setattr(script, "score", lambda model, questions, _: iter(()) if not questions else pytest.fail())
    main(monkeypatch, "bytes.pt", "--data", "many.jsonl", "--details", "whole.jsonl")
    main(monkeypatch, "bytes.pt", "--data", "many.jsonl", "--details", "whole.jsonl", "--questions", 100)
    printed = capsys.readouterr().out
    assert printed.startswith(whole[0]) and table(printed)["bytes.pt"][0] == 100
    assert (work / "whole.jsonl").read_bytes() == before


def test_another_checkpoint_of_that_name_is_scored_anew(work, questions, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.jsonl").write_bytes((work / "few.jsonl").read_bytes())
    for step in (1, 2):
        write_checkpoint(tmp_path / "x.pt", "bytes", 257, step)
        main(monkeypatch, "x.pt", "--data", "few.jsonl", "--details", "new/folder/x.jsonl")
    found = [json.loads(line) for line in lines(tmp_path / "new" / "folder" / "x.jsonl")]
    assert sorted((row["step"], row["question"]) for row in found) == [(s, q) for s in (1, 2) for q in range(FEW)]


def test_a_full_disk_loses_nothing(work, whole, capsys, monkeypatch):
    path = work / "full.jsonl"
    command = ["bytes.pt", "--data", "many.jsonl", "--details", path, "--tokens_at_once", 400]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    said = score(work, *command, code=1, preexec_fn=limit)[1].splitlines()
    assert said[-1].startswith(f"hellaswag.py: --details {path}: File too large")
    assert all(line.startswith("bytes.pt: ") for line in said[:-1])
    kept = [line for line in lines(path) if line.endswith(b"\n")]
    assert 20 < len(kept) < MANY
    monkeypatch.chdir(work)
    main(monkeypatch, *command)
    assert capsys.readouterr().out == whole[0] and lines(path)[: len(kept)] == kept
    assert_same_answers(answers(path, "bytes.pt"), answers(work / "whole.jsonl", "bytes.pt"))


# --- download ---


@contextlib.contextmanager
def served(data):
    """A server of one file: its address, and the paths that were asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/data/hellaswag_val.jsonl", asked
        server.shutdown()


def test_questions_are_downloaded_once(work, questions, models, tmp_path, capsys, monkeypatch):
    data = tmp_path / "new" / "few.jsonl"
    command = work / "bytes.pt", "--data", data, "--details", tmp_path / "x.jsonl"
    with served((work / "few.jsonl").read_bytes()) as (url, asked):
        monkeypatch.setattr(script, "HELLASWAG", url)
        monkeypatch.setattr(script, "check_hellaswag", lambda path: None)
        main(monkeypatch, *command)
        main(monkeypatch, *command)
    assert asked == ["/data/hellaswag_val.jsonl"] and data.read_bytes() == (work / "few.jsonl").read_bytes()
    said = capsys.readouterr()
    assert "1 of 1 files" in said.err and len(re.findall(r"bytes\.pt +12 ", said.out)) == 2


def test_a_download_that_is_not_the_published_file_is_thrown_away(work, questions, tmp_path, capsys, monkeypatch):
    with served((work / "few.jsonl").read_bytes()) as (url, _):
        monkeypatch.setattr(script, "HELLASWAG", url)
        message = refused(monkeypatch, capsys, "x.pt", "--data", tmp_path / "few.jsonl")
    assert "bytes instead of 12,246,618" in message and list(tmp_path.iterdir()) == []


def test_without_a_network_there_is_a_line(work, offline):
    _, said = offline.communicate(timeout=120)
    message = said.splitlines()[-1]
    assert offline.returncode == 2 and "Traceback" not in said and not (work / "none.jsonl").exists()
    assert message.startswith("hellaswag.py: ") and "none.jsonl: cannot reach raw.githubusercontent.com" in message
    assert "--data" in message


# --- mistakes ---


def main(monkeypatch, *flags, code=0):
    """hellaswag.py in this process, which ends with this exit code."""
    flags = ["hellaswag.py", "--device", "cpu", "--dtype", "float32", *flags]
    monkeypatch.setattr(sys, "argv", list(map(str, flags)))
    script.progress.next = 0.0
    with pytest.raises(SystemExit) as end:
        script.run(script.main)
    assert end.value.code == code


def refused(monkeypatch, capsys, *flags):
    """The line that a mistake gets: the only one, but for a download's progress."""
    main(monkeypatch, *flags, code=2)
    said = capsys.readouterr()
    message = [line for line in said.err.splitlines() if " of 1 files " not in line]
    assert len(message) == 1 and message[0].startswith("hellaswag.py: "), said.err
    assert "±" not in said.out
    return message[0]


@pytest.fixture
def mistaken(work, questions, models, tmp_path, capsys, monkeypatch):
    """Calls a mistake with good questions and a folder for details; later flags win."""
    monkeypatch.chdir(work)
    good = ["--data", "few.jsonl", "--details", tmp_path / "x.jsonl"]
    return lambda *flags: refused(monkeypatch, capsys, *good, *flags)


def test_one_kind_of_model_must_be_named(mistaken):
    assert "name one checkpoint or more" in mistaken()
    assert "name one checkpoint or more" in mistaken("bytes.pt", "--hf", "tiny_gpt2")


def test_flags_must_make_sense(mistaken):
    assert "--questions" in mistaken("bytes.pt", "--questions", "0")
    assert "--style" in mistaken("bytes.pt", "--style", "other")
    assert "--tokens" in mistaken("bytes.pt", "--tokens", "1")


def test_what_is_no_checkpoint_for_this_is_named(mistaken, tmp_path):
    write_checkpoint(tmp_path / "chars.pt", {"chars": "abc"}, 3, step=1)
    assert "chars.pt: knows only the characters of its own text" in mistaken(tmp_path / "chars.pt")
    assert "few.jsonl: is not a checkpoint" in mistaken("few.jsonl")
    assert "none.pt: No such file" in mistaken("none.pt")
    assert "tiny_gpt2: " in mistaken("tiny_gpt2")


def test_a_folder_without_a_model_is_named(mistaken, work, tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"--hf {tmp_path / 'empty'}: " in mistaken("--hf", tmp_path / "empty")
    (tmp_path / "damaged").mkdir()
    for file in (work / "tiny_gpt2").iterdir():
        most = 1000 if file.name == "model.safetensors" else None
        (tmp_path / "damaged" / file.name).write_bytes(file.read_bytes()[:most])
    assert f"--hf {tmp_path / 'damaged'}: " in mistaken("--hf", tmp_path / "damaged")


def test_without_transformers_there_is_a_line(work, questions, tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError('there is none')\n")
    flags = "--hf", "tiny_gpt2", "--data", "few.jsonl", "--details", tmp_path / "x.jsonl"
    said = score(work, *flags, code=2, environment={"PYTHONPATH": str(tmp_path)})[1]
    assert said == "hellaswag.py: --hf needs transformers: pip install transformers\n"


def test_questions_that_break_the_format_are_named_by_their_line(mistaken, tmp_path):
    line, data = json.dumps(QUESTION), tmp_path / "data.jsonl"
    data.write_text(f"{line}\n{line}\n{line[:-9]}\n{line}\n")
    assert f"{data}:3: not a HellaSwag question" in mistaken("bytes.pt", "--data", data)
    data.write_text("")
    assert f"{data}: empty" in mistaken("bytes.pt", "--data", data)


def test_details_that_cannot_be_are_named(mistaken, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--details" in mistaken("bytes.pt", "--details", tmp_path / "file" / "x.jsonl")
    assert "--details" in mistaken("bytes.pt", "--details", tmp_path)


def test_a_file_of_something_else_is_not_taken_for_details(mistaken, tmp_path):
    path = tmp_path / "notes"
    for other in ("notes", "notes\n", "\n", "[]\n", "7\n", '{"run": "x"}\n', '{"run": "x", "question": "1"}\n'):
        path.write_text(other)
        assert f"{path}: line 1 is not an answer" in mistaken("bytes.pt", "--details", path)
        assert path.read_text() == other
