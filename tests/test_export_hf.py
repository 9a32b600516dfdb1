"""runs/export_hf.py: transformers opens what it writes, computes and says the same; tokenizers against tiktoken."""

import os
import random
import re
import sys

import pytest
import tiktoken
import torch
import transformers

import runs.export_hf as script
import sample
import train_gpt

CHARS = "\n\r\0 !<>|abcdeghilnoprstuwyßé\u0301И日\u2028\u200d🦉"
POST = dict(tie_weights=True, embed_norm=False, logit_softcap=0.0)  # what makes the model of the original post
CASES = {  # tokenizer, config, prompt
    "gpt2": ("gpt2", {}, "Über the café 🦉 it's\n\n  dark"),
    "bytes": ("bytes", dict(tie_weights=True, logit_softcap=7.5), "日本 Über\t🦉"),
    "chars": ({"chars": CHARS}, dict(logit_softcap=0.0), "the\u200d wind\r\nand🦉"),
    "post": ("bytes", POST, "It was"),
}


def write_checkpoint(path, tokenizer, **changes):
    """A small model with no zero anywhere, and its checkpoint in a file."""
    V = {"gpt2": 50257, "bytes": 257}.get(str(tokenizer), len(CHARS))
    config = dict(vocab_size=V, block_size=128, n_layer=2, n_head=2, n_embd=32, tie_weights=False, embed_norm=True)
    model = train_gpt.GPT(config | dict(logit_softcap=15.0) | changes)
    torch.manual_seed(6)  # with most seeds one of them repeats itself
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if not model.config["embed_norm"]:
        model.embed.data /= 20  # or else the last token alone would decide the next
    torch.save(dict(format=1, config=model.config, tokenizer=tokenizer, model=model.state_dict()), path)
    return model


def main(module, *arguments):
    """A script in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        try:
            module.main()
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """{case: (our model, its file, their model, their tokenizer)}"""
    work, found = tmp_path_factory.mktemp("export"), {}
    for case, (tokenizer, changes, _) in CASES.items():
        ours = write_checkpoint(work / f"{case}.pt", tokenizer, **changes)
        assert main(script, work / f"{case}.pt", work / case) == 0
        theirs = transformers.AutoModelForCausalLM.from_pretrained(work / case)
        found[case] = ours, work / f"{case}.pt", theirs, transformers.AutoTokenizer.from_pretrained(work / case)
    return found


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_and_writes_the_same(exports, case, capsys):
    (ours, path, theirs, tokenizer), prompt = exports[case], CASES[case][2]
    V = ours.config["vocab_size"]
    idx = torch.randint(V, (2, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, logits = ours(idx)[..., :V], theirs(idx).logits
    torch.testing.assert_close(logits[..., :V], expected, atol=1e-4, rtol=0)
    kind = transformers.ApertusForCausalLM if case == "post" else transformers.NanoChatForCausalLM
    assert type(theirs) is kind and theirs.dtype == torch.float32 and expected.std() > 0.05

    inputs = tokenizer(prompt, return_tensors="pt")
    ids = theirs.generate(**inputs, max_new_tokens=60, do_sample=False)[0]
    flags = "--max_new_tokens", 60, "--temperature", 0, "--device", "cpu", "--dtype", "float32"
    assert main(sample, path, "--prompt", prompt, *flags) == 0
    assert capsys.readouterr().out == tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    assert len(set(ids[-60:].tolist())) > 10, "a model that repeats itself tests nothing"
    batch = tokenizer([prompt, prompt + "Qxz"], return_tensors="pt", padding=True)  # chars does not know the letters
    assert theirs.generate(**batch, max_new_tokens=60, do_sample=False)[0, -60:].tolist() == ids[-60:].tolist()
    assert theirs.generate(**inputs, max_new_tokens=99, do_sample=True, temperature=1e3).max() < V, "no unk, no pad"


@pytest.mark.parametrize("case", ["gpt2", "bytes"])
def test_texts_get_the_ids_of_tiktoken(exports, case):
    tokenizer, chance = exports[case][3], random.Random(0)
    encode = tiktoken.get_encoding("gpt2").encode_ordinary if case == "gpt2" else lambda text: list(text.encode())
    pieces = [*"don't\n\n \t\r\n\x85\xa0\u2028\u3000日本語हिन्दीالعربية🦉👩\u200d🚀e\u0301ﬀ½٣", "  ", "'ll", " owl"]
    for _ in range(500):
        text = "".join(chance.choices(pieces, k=chance.randint(0, 30)))
        ids = tokenizer(text)["input_ids"]
        assert ids == [tokenizer.eos_token_id, *encode(text)] and tokenizer.decode(ids[1:]) == text
    assert tokenizer("<|endoftext|>")["input_ids"] == [tokenizer.eos_token_id] * 2


def test_the_model_card_says_how_to_load_it(exports, capsys):
    path = exports["bytes"][1]
    card = (path.parent / "bytes" / "README.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1], {})
    assert str(path) in card and capsys.readouterr().out.startswith("It was a dark and stormy night")


def test_another_export_takes_the_place_of_one_when_told_so(tmp_path):
    ours, files = write_checkpoint(tmp_path / "x.pt", "bytes"), (tmp_path / "x.pt", tmp_path / "x")
    assert [main(script, *files, *flags) for flags in ([], [], ["--overwrite", "--dtype", "bfloat16"])] == [0, 2, 0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert torch.equal(theirs.model.layers[1].self_attn.k_proj.weight, ours.blocks[1].qkv[1].bfloat16())


def test_what_cannot_be_exported_gets_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint("softcap.pt", "bytes", embed_norm=False)
    write_checkpoint("bigram.pt", "bytes", kind="bigram")
    write_checkpoint("words.pt", {"words": "a b"})
    (tmp_path / "half.pt").write_bytes((tmp_path / "words.pt").read_bytes()[:50_000])
    for name, word in dict(softcap="softcap", bigram="bigram", words="words", half="half.pt", none="No such").items():
        assert main(script, f"{name}.pt", "x") == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and word in said and not os.path.exists("x")
