"""The tokenizers: GPT-2's against transformers', a learned BPE against the library tokenizers, bytes, characters."""

import json
import os
import subprocess
import sys

import tokenizers
import transformers
from conftest import BPE, ROOT, call

import sample as script

TEXT = 'Über "Nacht"\n\n  the  owls flew 1234 times -- don\'t ask. \U0001f989 <|endoftext|>\t'


def test_gpt2_is_that_of_transformers():
    theirs = transformers.GPT2Tokenizer(str(BPE / "encoder.json"), str(BPE / "vocab.bpe"))
    ours = script.get_tokenizer("gpt2")
    text = TEXT.replace("<|endoftext|>", "")
    assert ours.encode_ordinary(text) == theirs(text)["input_ids"]
    assert ours.n_vocab == 50257 and ours.eot_token == 50256


def test_a_bpe_is_that_of_tokenizers_but_for_ties(tmp_path):
    """tales.txt, and the same in another script: its letters moved to Greek, whose characters take two bytes."""
    tales = (ROOT / "data/tales.txt").read_text(encoding="utf-8").replace("<|endoftext|>", "")
    greek = "".join(chr(ord(c) + 0x391 - 65) if c.isascii() and c.isalpha() else c for c in tales)
    for text in (tales, greek):
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        flags = "--tokenizer", "bpe", "--val_fraction", 0, "--overwrite"
        call("data/prepare.py", tmp_path / "a.txt", "--out", tmp_path / "a", *flags)
        spec = json.loads((tmp_path / "a_bpe.json").read_text())
        ours, bytelevel = script.get_tokenizer(spec), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
        theirs.pre_tokenizer = bytelevel
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=2047, initial_alphabet=alphabet, show_progress=False)
        theirs.train_from_iterator([text], trainer)
        assert len(spec["bpe"]) == 2047 and ours.decode(ours.encode_ordinary(text)) == text
        byte = {c: chr(i) for i, c in transformers.convert_slow_tokenizer.bytes_to_unicode().items()}
        same = {"".join(map(byte.get, token)) for token in theirs.get_vocab()} & {*spec["bpe"]}
        assert len(same) > 0.99 * 2047


def test_bytes_and_characters_are_numbered_as_they_stand():
    tokenizer = script.get_tokenizer("bytes")
    assert tokenizer.encode_ordinary(TEXT) == list(TEXT.encode()) and tokenizer.decode(list(TEXT.encode())) == TEXT
    assert tokenizer.encode("a<|endoftext|>", allowed_special="all") == [97, 256] and tokenizer.n_vocab == 257
    chars = "\n aébИ\U0001f989"
    tokenizer = script.get_tokenizer({"chars": chars})
    assert tokenizer.encode_ordinary(chars * 3) == list(range(len(chars))) * 3 and tokenizer.n_vocab == len(chars)
    assert tokenizer.decode([6, 2, 3]) == "\U0001f989aé"


def test_without_a_network_one_line_says_what_to_do(tmp_path):
    environment = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", "import sample; sample.get_tokenizer('gpt2')"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "TIKTOKEN_CACHE_DIR" in done.stderr and done.stderr.count("\n") == 1
