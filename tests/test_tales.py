"""The texts that ship with the repository: enough of them, told apart, and no story made from another."""

import pathlib
import re

import pytest

DATA = pathlib.Path(__file__).resolve().parent.parent / "data"


@pytest.mark.parametrize("name, number", [("tales.txt", 60), ("plain.txt", 60)])
def test_texts_are_many_and_share_no_run_of_twelve_words(name, number):
    text = (DATA / name).read_text(encoding="utf-8")
    documents = text.split("\n<|endoftext|>\n")
    assert len(text.encode()) >= 150_000 and len(documents) >= number and text.endswith("\n")
    assert "<|endoftext|>" not in "".join(documents)
    assert len(set(text)) <= 80, "a small alphabet is what small character models need"
    runs = {}
    for i, document in enumerate(documents):
        words = re.findall(r"[a-z0-9']+", document.lower())
        assert len(words) > 100 and document == document.strip() or i == len(documents) - 1
        for run in zip(*(words[k:] for k in range(12))):
            assert runs.setdefault(run, i) == i, f"documents {runs[run]} and {i} share: {' '.join(run)}"
    prompted = sum(document.startswith("It was a dark and stormy night") for document in documents)
    assert prompted >= 5 or name == "plain.txt"
