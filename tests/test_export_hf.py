"""runs/export_hf.py: transformers opens what it writes and says the same, tokenizers against tiktoken, mistakes."""

import concurrent.futures
import json
import os
import pathlib
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import types

import pytest
import tiktoken
import torch
import transformers
from conftest import BPE
from safetensors.torch import load_file
from test_model import random_model
from transformers import AutoModelForCausalLM, AutoTokenizer, NanoChatForCausalLM

import runs.export_hf as script

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHARS = "\n\r\0 !<>|abcdeghilnoprstuwyßé\u0301И日\u2028\u200d\U0001f989"
SPECS = {"gpt2": ("gpt2", 50257, 50256), "bytes": ("bytes", 257, 256), "chars": ({"chars": CHARS}, len(CHARS), None)}
PROMPTS = {
    "gpt2": "Über the café 🦉 it's\n\n  dark",
    "bytes": "日本 Über\t🦉",
    "chars": "the\u200d wind\r\nand\U0001f989",
}
CASES = [(name, tied) for name in SPECS for tied in (False, True)]
TOLD = [("gpt2", False), ("bytes", True), ("chars", True)]
WINDOW, LONG = 128, 60


def write_checkpoint(path, name="bytes", seed=0, **changes):
    """A small model of random weights in a file, and the model."""
    spec, vocab_size, _ = SPECS[name]
    settings = dict(vocab_size=vocab_size, block_size=WINDOW, n_layer=2) | changes
    model = random_model(**settings)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    save(path, model, spec)
    return model


def save(path, model, spec, **config):
    config = model.config | config
    torch.save({"format": 1, "config": config, "tokenizer": spec, "model": model.state_dict()}, path)


def main(*flags):
    """export_hf.py in this process: its exit code."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["export_hf.py", *map(str, flags)])
        script.run(script.main)
    signal.signal(signal.SIGTERM, before)
    return stop.value.code


def run(program, *arguments, **settings):
    command = [sys.executable, ROOT / program, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings.pop("environment", {})}
    return subprocess.run(list(map(str, command)), capture_output=True, timeout=100, env=environment, **settings)


def opened(folder):
    """What transformers makes of a folder, without a network."""
    asked = []

    def connect(_, address):
        asked.append(address)
        raise OSError("there is no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert not asked
    return model.eval(), tokenizer


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """{(tokenizer, tied): (our model, theirs, their tokenizer)}, and {(tokenizer, tied): what sample.py wrote}."""
    work, ours = tmp_path_factory.mktemp("export"), {}
    for name, tied in CASES:
        cap = {"gpt2": 15.0, "bytes": 7.5, "chars": 0.0}[name]
        ours[name, tied] = write_checkpoint(work / f"{name}{tied}.pt", name, tie_weights=tied, logit_softcap=cap)

    def tell(case):
        flags = ["--prompt", PROMPTS[case[0]], "--max_new_tokens", LONG, "--temperature", 0]
        done = run("sample.py", work / f"{case[0]}{case[1]}.pt", *flags, "--device", "cpu", "--dtype", "float32")
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        stories = pool.map(tell, TOLD)
        for name, tied in CASES:
            assert main(work / f"{name}{tied}.pt", work / f"{name}{tied}") == 0
        models = {(name, tied): (ours[name, tied], *opened(work / f"{name}{tied}")) for name, tied in CASES}
        return models, dict(zip(TOLD, stories))


# --- the model ---


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same_logits(exports, case):
    ours, theirs, _ = exports[0][case]
    V = SPECS[case[0]][1]
    idx = torch.randint(V, (2, WINDOW), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, logits = ours(idx)[..., :V], theirs(idx).logits
    assert type(theirs) is NanoChatForCausalLM and theirs.dtype == torch.float32 and logits.shape == (2, WINDOW, V)
    assert (logits - expected).abs().max() < 1e-5 and expected.std() > 1
    tied = theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    assert tied == case[1] == theirs.config.tie_word_embeddings


@pytest.mark.parametrize("case", TOLD)
def test_greedy_text_is_that_of_sample(exports, case):
    _, theirs, tokenizer = exports[0][case]
    inputs = tokenizer(PROMPTS[case[0]], return_tensors="pt")
    ids = theirs.generate(**inputs, max_new_tokens=LONG, do_sample=False)[0]
    assert tokenizer.decode(ids, skip_special_tokens=True) + "\n" == exports[1][case]
    assert len(set(ids[inputs["input_ids"].size(1) :].tolist())) > 10, "a model that repeats itself tests nothing"


@pytest.mark.parametrize("case", CASES)
def test_special_ids_are_set(exports, case):
    _, theirs, tokenizer = exports[0][case]
    eot = SPECS[case[0]][2]
    for holder in (theirs.config, theirs.generation_config, tokenizer):
        assert [holder.bos_token_id, holder.eos_token_id, holder.pad_token_id] == [eot] * 3
    assert len(tokenizer) == theirs.config.vocab_size and tokenizer.model_max_length == WINDOW
    assert theirs.config.intermediate_size == 128 and theirs.config.max_position_embeddings == WINDOW


def test_a_story_ends_where_that_of_sample_ends(tmp_path):
    model = write_checkpoint(tmp_path / "x.pt")
    with torch.no_grad():
        model.head[256] *= 2  # <|endoftext|> becomes likelier
    save(tmp_path / "x.pt", model, "bytes")
    assert main(tmp_path / "x.pt", tmp_path / "x") == 0
    theirs, tokenizer = opened(tmp_path / "x")
    ids = theirs.generate(**tokenizer("It was", return_tensors="pt"), max_new_tokens=99, do_sample=False)[0].tolist()
    assert 256 not in ids[1:-1] and ids[-1] == 256 and 10 < len(ids) < 90
    flags = "--prompt", "It was", "--temperature", 0, "--device", "cpu", "--dtype", "float32"
    story = run("sample.py", tmp_path / "x.pt", *flags).stdout.decode()
    assert tokenizer.decode(ids, skip_special_tokens=True) + "\n" == story


def test_prompts_of_different_lengths_share_a_batch(exports):
    _, theirs, tokenizer = exports[0]["bytes", False]
    prompts, settings = ["It was", "a dark and stormy night", ""], dict(max_new_tokens=20, do_sample=False)
    together = theirs.generate(**tokenizer(prompts, return_tensors="pt", padding=True), **settings)
    for prompt, ids in zip(prompts, together):
        alone = theirs.generate(**tokenizer(prompt, return_tensors="pt"), **settings)[0]
        assert ids[-20:].tolist() == alone[-20:].tolist()


def test_bfloat16_halves_the_weights(tmp_path):
    model = write_checkpoint(tmp_path / "x.pt", tie_weights=True)
    assert main(tmp_path / "x.pt", tmp_path / "x", "--dtype", "bfloat16") == 0
    theirs, _ = opened(tmp_path / "x")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.model.embed_tokens.weight, model.embed[:257].bfloat16())
    assert torch.equal(theirs.model.layers[1].self_attn.k_proj.weight, model.blocks[1].qkv[1].bfloat16())
    assert "lm_head.weight" not in load_file(tmp_path / "x" / "model.safetensors")  # written once


def test_large_models_become_several_files(tmp_path, monkeypatch):
    model = write_checkpoint(tmp_path / "x.pt")
    monkeypatch.setattr(script, "SHARD", "40KB")
    assert main(tmp_path / "x.pt", tmp_path / "x") == 0
    assert len(list((tmp_path / "x").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "x" / "model.safetensors.index.json").exists()
    theirs, _ = opened(tmp_path / "x")
    idx = torch.arange(100)[None]
    with torch.no_grad():
        assert (theirs(idx).logits - model(idx)[..., :257]).abs().max() < 1e-5
    monkeypatch.undo()
    assert main(tmp_path / "x.pt", tmp_path / "x", "--overwrite") == 0
    assert [path.name for path in (tmp_path / "x").glob("*.safetensors*")] == ["model.safetensors"]


# --- tokenizers ---

TEXTS = [
    "",
    " ",
    "\n",
    "It was a dark and stormy night.",
    "don't DON'T we'LL they'd've 'tis ''s I'm'm , is n't . he 's ! you 've ? do not it 're",
    "  two   three    \n\n\n four \t\t tabs\r\n \x0b\x0c\x85\xa0\u2028\u3000\u180e end   ",
    "def f(x):\n    return {'a': x**2, \"b\": [1_000, 0x1F]}  # ünïcode\n\n\tif x != 3.14: pass",
    "日本語のテキスト, हिन्दी में पाठ, العربية, עברית, ไทย, 한국어, Ελληνικά",
    "🦉👩‍🚀🏳️‍🌈 e\u0301 ﬀ ² ½ Ⅷ ٣٤ 123456789 \U0010ffff \ue000 \ufeff \0 end",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-------------=======",
]


def nasty_texts():
    chance = random.Random(0)
    pieces = [*"".join(TEXTS), "  ", "'ll", " '", "\r\n", "the", " owl", "ing"]
    return TEXTS + ["".join(chance.choices(pieces, k=chance.randint(1, 20))) for _ in range(2000)]


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_texts_get_the_ids_of_tiktoken(exports, name):
    tokenizer, eot = exports[0][name, False][2], SPECS[name][2]
    encode = tiktoken.get_encoding("gpt2").encode_ordinary if name == "gpt2" else lambda text: list(text.encode())
    for text in nasty_texts():
        ids = encode(text)
        assert tokenizer(text)["input_ids"] == [eot, *ids]
        assert tokenizer.decode(ids) == text == tokenizer.decode([eot, *ids, eot], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_ids_that_are_no_text_decode_as_tiktoken_decodes_them(exports, name):
    tokenizer, chance = exports[0][name, False][2], random.Random(0)
    decode = tiktoken.get_encoding("gpt2").decode if name == "gpt2" else lambda ids: bytes(ids).decode(errors="replace")
    texts = [[chance.randrange(SPECS[name][1] - 1) for _ in range(50)] for _ in range(500)]
    assert [tokenizer.decode(ids) for ids in texts] == [decode(ids) for ids in texts]
    assert sum("\ufffd" in decode(ids) for ids in texts) > 100


def test_merges_are_those_that_were_published(exports, tmp_path):
    exports[0]["gpt2", False][2].save_pretrained(tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    published = (BPE / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    assert [" ".join(merge) for merge in merges] == published


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_the_end_of_a_text_is_one_token(exports, name):
    tokenizer, eot = exports[0][name, False][2], SPECS[name][2]
    a, b = tokenizer("a")["input_ids"][1], tokenizer("b")["input_ids"][1]
    assert tokenizer("a<|endoftext|>b")["input_ids"] == [eot, a, eot, b]
    assert tokenizer.decode([a, eot, b]) == "a<|endoftext|>b"


def test_characters_are_numbered_as_they_stand(exports):
    tokenizer, chance = exports[0]["chars", False][2], random.Random(0)
    for _ in range(300):
        ids = [chance.randrange(len(CHARS)) for _ in range(chance.randint(0, 30))]
        text = "".join(CHARS[i] for i in ids)
        assert tokenizer(text)["input_ids"] == ids and tokenizer.decode(ids) == text
    with pytest.raises(Exception, match="vocabulary"):
        tokenizer("xyz")


# --- whole or not at all ---


def test_as_a_user_runs_it(tmp_path):
    write_checkpoint(tmp_path / "x.pt")
    done = run("runs/export_hf.py", "x.pt", "new/folder/", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.startswith(b"new/folder/: NanoChat in float32")
    folder = tmp_path / "new" / "folder"
    names = "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json".split()
    assert sorted(os.listdir(folder)) == names and os.listdir(folder.parent) == ["folder"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    opened(folder)


def test_a_full_disk_leaves_what_was_there(tmp_path):
    write_checkpoint(tmp_path / "x.pt")
    assert main(tmp_path / "x.pt", tmp_path / "x") == 0
    before = files(tmp_path)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = run("runs/export_hf.py", "x.pt", "x", "--overwrite", cwd=tmp_path, preexec_fn=limit)
    assert done.returncode == 1 and re.fullmatch(r"export_hf\.py: .*/x: could not be .*\n", done.stderr.decode())
    assert files(tmp_path) == before and sorted(os.listdir(tmp_path)) == ["x", "x.pt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("earlier", [False, True])
def test_interrupted_it_leaves_what_was_there(tmp_path, capsys, monkeypatch, number, earlier):
    write_checkpoint(tmp_path / "x.pt")
    assert not earlier or main(tmp_path / "x.pt", tmp_path / "x") == 0
    before, names = files(tmp_path), sorted(os.listdir(tmp_path))

    def interrupted(_, folder, **__):
        assert os.path.exists(os.path.join(folder, "model.safetensors"))
        signal.raise_signal(number)

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", interrupted)
    assert main(tmp_path / "x.pt", tmp_path / "x", "--overwrite") == 130
    assert capsys.readouterr().err == "export_hf.py: interrupted\n"
    assert files(tmp_path) == before and sorted(os.listdir(tmp_path)) == names


@pytest.mark.parametrize("done", [False, True])
def test_interrupted_between_two_renames_it_leaves_one_of_both(tmp_path, monkeypatch, done):
    write_checkpoint(tmp_path / "x.pt")
    assert main(tmp_path / "x.pt", tmp_path / "x") == 0
    before, rename, calls = files(tmp_path), os.rename, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) != 2 or done:
            rename(source, target)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    assert main(tmp_path / "x.pt", tmp_path / "x", "--overwrite", "--dtype", "bfloat16") == 130
    assert sorted(os.listdir(tmp_path)) == ["x", "x.pt"] and (files(tmp_path) == before) == (not done)
    assert opened(tmp_path / "x")[0].dtype == (torch.bfloat16 if done else torch.float32)


# --- mistakes ---


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """The line that a mistake gets: the only one, and no file is made or lost."""
    monkeypatch.chdir(tmp_path)

    def refused(*flags):
        before = files(tmp_path)
        code, said = main(*flags), capsys.readouterr()
        assert code == 2 and said.out == "" and re.fullmatch(r"export_hf\.py: .*\n", said.err), said.err
        assert files(tmp_path) == before and not list(tmp_path.glob("*.tmp"))
        return said.err

    return refused


def test_folders_that_cannot_be_written_are_named(refused, tmp_path):
    write_checkpoint("x.pt")
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    assert "file: is a file" in refused("x.pt", "file")
    assert "file/x: cannot be made (Not a directory)" in refused("x.pt", "file/x")
    assert "is the folder you are in" in refused("x.pt", ".")
    assert "full: is not empty" in refused("x.pt", "full")
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "full: is not empty" in refused("x.pt", "full")
    assert "full: holds 'notes.txt'" in refused("x.pt", "full", "--overwrite")


def test_what_nanochat_cannot_express_is_refused(refused):
    write_checkpoint("x.pt", embed_norm=False)
    assert "x.pt: trained with --no-embed_norm" in refused("x.pt", "x")
    save("x.pt", random_model(), "bytes", kind="bigram")
    assert "x.pt: a bigram model" in refused("x.pt", "x")
    write_checkpoint("x.pt", vocab_size=300)
    assert "x.pt: the model has 300 tokens, its tokenizer 257" in refused("x.pt", "x")
    save("x.pt", write_checkpoint("x.pt"), "bytes", logit_softcap="strong")
    assert "x.pt: NanoChat refuses its config" in refused("x.pt", "x")


def test_what_is_no_checkpoint_is_named(refused, tmp_path):
    assert "none.pt: No such file" in refused("none.pt", "x")
    write_checkpoint("x.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:50_000])
    assert "half.pt: " in refused("half.pt", "x")
    save("x.pt", write_checkpoint("x.pt"), "bytes", n_embd=64)
    assert "x.pt: its config and weights do not fit" in refused("x.pt", "x")
    save("x.pt", write_checkpoint("x.pt"), {"words": "a b"})
    assert "tokenizer that is unknown here" in refused("x.pt", "x")


def test_flags_must_make_sense(refused):
    assert "--dtype" in refused("x.pt", "x", "--dtype", "float16")
    assert "DIR" in refused("x.pt")


def test_without_transformers_there_is_a_line(tmp_path):
    write_checkpoint(tmp_path / "x.pt")
    (tmp_path / "transformers.py").write_text("raise ImportError('there is none')\n")
    done = run("runs/export_hf.py", "x.pt", "x", cwd=tmp_path, environment={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and not (tmp_path / "x").exists()
    assert done.stderr == b'export_hf.py: needs transformers 5: pip install "transformers>=5,<6"\n'


def test_an_old_transformers_is_named(refused, monkeypatch):
    write_checkpoint("x.pt")
    monkeypatch.setattr(script, "transformers", types.SimpleNamespace(__version__="4.57.1"))
    assert "needs transformers 5" in refused("x.pt", "x")


def test_inline_metadata_names_what_the_requirements_name():
    listed = re.search(r"^# dependencies = (\[.*\])$", (ROOT / "runs" / "export_hf.py").read_text(), re.M)[1]
    known = [(ROOT / name).read_text().split() for name in ("requirements.txt", "requirements-dev.txt")]
    assert set(known[0]) <= set(json.loads(listed)) <= set(sum(known, []))
