"""
Download FineWeb-10B as GPT-2 tokens: the validation shard and the first N of 103 training shards, 100 M tokens each.

    python data/fineweb.py        9 training shards: 0.9 B tokens, 2 GB with the validation shard
    python data/fineweb.py 75     the 7.5 B tokens of the original post, 15 GB

They come from huggingface.co, or from the mirror that the environment variable HF_ENDPOINT names. After an interruption
the same command goes on where it stopped, and files that are there and whole are passed over.
In --out_dir: fineweb_val_000000.bin, fineweb_train_000001.bin, ..., ready for train_gpt.py.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import os
import queue
import sys
import tempfile
import threading
import time
import urllib.parse

import numpy as np
import requests


def get_flags():
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fineweb10B")
    flags = Flags()
    add = flags.add_argument
    add("n", metavar="N", nargs="?", type=number(int, 0, 103), default=9, help="how many training shards")
    add("--out_dir", default=here, help="where the shards go")
    add("--concurrency", type=number(int, 1, 104), default=4, help="files to fetch at the same time")
    add("--retries", type=number(int, 0), default=5, help="failures in a row that a file is forgiven")
    return flags.parse_args()


# --- command line: the same in every script (tests/test_copies.py) ---


def fail(message, code=2):
    """End with one line on stderr: code 2 for what the user can put right, 1 when the work itself failed."""
    if code != 2 or int(os.environ.get("LOCAL_RANK", 0)) == 0:  # under torchrun all ranks see the same mistake
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    raise SystemExit(code)


class Flags(argparse.ArgumentParser):
    """Flat flags: --help shows the script's docstring and every default, a mistake gets one line."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default is None else super()._get_help_string(action)

    def __init__(self):
        super().__init__(description=sys.modules["__main__"].__doc__, formatter_class=self.Help, allow_abbrev=False)

    def error(self, message):
        fail(message)


def number(kind, low, high=float("inf")):
    """The type of a flag that takes an int or a float from low to high."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            bounds = f"of {low} or more" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number {bounds}")
        return value

    return parse


def run(main):
    """Call main(); Ctrl-C, a full disk, and a reader of the output that has left (`| head`) leave no traceback."""
    code, said = 0, None
    try:
        try:
            main()
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code, said = 130, "interrupted"
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what stdout still holds would fail again
        code, said = 1, f"{error.filename or 'the work stopped'}: {error.strerror or error}"
        if isinstance(error, BrokenPipeError):
            code, said = 141, None
    if said:
        print(f"{os.path.basename(sys.argv[0])}: {said}", file=sys.stderr)
    if "WORLD_SIZE" in os.environ:  # gloo's threads may abort Python's own shutdown (PyTorch issue 190489)
        os._exit(code)
    raise SystemExit(code)


# --- end of command line ---


# --- download: the same in every script (tests/test_copies.py) ---


class Progress:
    """One line on stderr about all downloads together: written over on a terminal, else a new one every 5 seconds."""

    def __init__(self, files=1):
        self.files, self.whole, self.done, self.sizes, self.fresh = files, 0, {}, {}, 0
        self.live, self.shown, self.start, self.next = sys.stderr.isatty(), 0, time.perf_counter(), 0.0
        self.lock = threading.Lock()  # downloads may run in threads

    def __call__(self, path, done, size, fresh=0, whole=False, note=""):
        """`done` of the `size` bytes (None: not known) of `path` are here, `fresh` of them since the last call."""
        with self.lock:
            self.done[path], self.sizes[path] = done, size
            self.fresh += fresh
            self.whole += whole
            now, last = time.perf_counter(), self.whole == self.files
            if now < self.next and not last:
                return
            done, rate = sum(self.done.values()), self.fresh / (now - self.start)
            text = f"{self.whole} of {self.files} files  {done / 1e6:,.1f} MB  {rate / 1e6:.1f} MB/s  "
            if sizes := [size for size in self.sizes.values() if size is not None]:
                total = sum(sizes) / len(sizes) * self.files  # the others are taken to be as long as these
                text = text.replace(" MB ", f" of {total / 1e6:,.1f} MB ")
                text += f"ETA {max(0, total - done) / rate:.0f} s  " if rate else ""
            text += note
            start, end = ("\r", "\n" if last else "") if self.live else ("", "\n")
            print(f"{start}{text:<{self.shown}}", end=end, file=sys.stderr, flush=True)
            self.next, self.shown = now + (0.1 if self.live else 5), 0 if end else len(text)

    def stop(self):
        """Leave the line, for good: a thread that still downloads can show nothing more."""
        self.lock.acquire()
        if self.shown:
            print(file=sys.stderr)


def download(url, path, check=None, retries=5, progress=None):
    """Fetch `url` to `path` over HTTP; raises OSError with one line that says why it could not.

    check(file) raises ValueError with what is wrong with a whole file. A `path` that is there and passes is left alone.
    What arrives is kept in path.part, where the next attempt, or the next call, goes on. `retries` failures in a row
    are forgiven, after waits of 1, 2, 4, ... seconds.
    """
    progress, check, part = progress or Progress(), check or (lambda file: None), f"{path}.part"
    name, host = os.path.basename(path), urllib.parse.urlsplit(url).netloc
    if os.path.exists(path):
        try:
            check(path)
            return progress(path, os.path.getsize(path), os.path.getsize(path), whole=True)
        except ValueError:
            pass  # fetched anew, and replaced when that is whole
    size, most, failures = None, 0, 0
    while True:
        have = os.path.getsize(part) if os.path.exists(part) else 0
        problem = f"cannot reach {host} (is there a network?)"
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-" if have else None}
        try:
            with requests.get(url, headers=headers, stream=True, timeout=30) as response:
                problem = f"{host} answers {response.status_code} {response.reason}"
                if response.status_code in (200, 206):
                    problem = "the connection was lost"
                    have = have if response.status_code == 206 else 0  # 200: all of it, whatever was asked for
                    length = response.headers.get("Content-Length")
                    size = have + int(length) if length else None
                    with open(part, "ab") as f:
                        f.truncate(have)
                        for piece in response.iter_content(2**16):
                            f.write(piece)
                            have += len(piece)
                            progress(path, have, size, len(piece))
                            if have > most:  # a server that starts again each time must not be asked for ever
                                most, failures = have, 0
                        f.flush()
                        os.fsync(f.fileno())
                    if size in (None, have):
                        break
                elif response.status_code == 416 and have:
                    if response.headers.get("Content-Range") == f"bytes */{have}":
                        break  # nothing is missing
                    os.remove(part)  # longer than the file: something else
                    continue
                elif response.status_code < 500 and response.status_code not in (408, 429):
                    failures = retries  # asking again would not help
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
            pass
        except OSError as error:  # of the disk, or an address that is none
            problem, failures = error.strerror or f"{url}: {type(error).__name__}", retries
        failures += 1
        if failures > retries:
            raise OSError(f"{name}: {problem}")
        wait = 2 ** (failures - 1)
        progress(path, have, size, note=f"{problem}, again in {wait} s")
        time.sleep(wait)
    try:
        check(part)
    except ValueError as error:
        os.remove(part)
        raise OSError(f"{name}: {error}") from None
    os.replace(part, path)
    progress(path, have, have, whole=True)


# --- end of download ---


def check_shard(file):
    header, size = np.fromfile(file, "<i4", 256), os.path.getsize(file)
    if len(header) < 256 or tuple(header[:2]) != (20240520, 1):
        raise ValueError(f"no token shard: it does not begin with 20240520 and 1 but with {header[:2].tolist()}")
    if size != 1024 + 2 * int(header[2]):
        raise ValueError(f"{size:,} bytes, but {1024 + 2 * int(header[2]):,} for the {header[2]:,} tokens it promises")


def fetch(url, path, flags, progress, slots, ended):
    """A thread for one file: waits for one of the slots, and puts None or the error into `ended`."""
    with slots:
        try:
            download(url, path, check_shard, flags.retries, progress)
            ended.put(None)
        except Exception as error:
            ended.put(error)


def main():
    flags = get_flags()
    try:
        os.makedirs(flags.out_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=flags.out_dir).close()
    except OSError as error:
        fail(f"--out_dir {flags.out_dir}: {error.strerror}")
    base = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, flags.n + 1)]
    progress, slots, ended = Progress(len(names)), threading.Semaphore(flags.concurrency), queue.SimpleQueue()
    for name in names:
        url, path = f"{base}/datasets/kjj0/fineweb10B-gpt2/resolve/main/{name}", os.path.join(flags.out_dir, name)
        # a daemon, so that nobody waits for the network after an error or Ctrl-C
        threading.Thread(target=fetch, args=(url, path, flags, progress, slots, ended), daemon=True).start()
    try:
        for _ in names:
            if error := ended.get():
                raise error
    except (OSError, KeyboardInterrupt) as error:
        progress.stop()
        code, what = (1, error) if isinstance(error, OSError) else (130, "interrupted")
        fail(f"{what}; the same command goes on with what has arrived", code)
    size = sum(os.path.getsize(os.path.join(flags.out_dir, name)) for name in names)
    print(f"{flags.out_dir}: {len(names)} shards, {size / 1e9:.1f} GB, {progress.fresh / 1e9:.1f} GB of it fetched now")


if __name__ == "__main__":
    run(main)
