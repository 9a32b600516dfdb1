"""
Download FineWeb-10B as GPT-2 tokens: the validation shard and the first N of 103 training shards, 100 M tokens each.

    python data/fineweb.py        9 training shards: 0.9 B tokens, 2 GB with the validation shard
    python data/fineweb.py 75     the 7.5 B tokens of the original post, 15 GB

They come from huggingface.co, or from the mirror that the environment variable HF_ENDPOINT names. After an interruption
the same command goes on where it stopped. In --out_dir: fineweb_val_000000.bin, fineweb_train_000001.bin, ...
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import os
import sys
import threading
import time

import numpy as np
import requests


def get_flags():
    show = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show, usage=argparse.SUPPRESS)
    add, here = parser.add_argument, os.path.join(os.path.dirname(os.path.abspath(__file__)), "fineweb10B")
    add("n", metavar="N", nargs="?", type=int, default=9, help="training shards, of 103 (default: 9)")
    add("--out_dir", default=here, help="where the shards go (default: %(default)s)")
    add("--retries", type=int, default=5, help="failures that a shard is forgiven (default: %(default)s)")
    add("--timeout", type=float, default=3600, help="seconds that a shard may take (default: %(default)s)")
    return parser.parse_args()


def fail(message, code=1):
    print(f"fineweb.py: {message}", file=sys.stderr, flush=True)
    os._exit(code)  # also from another thread, and wherever a download hangs


def what_is_wrong(path):
    """One line about a file that is not a whole token shard, else None."""
    if not os.path.exists(path):
        return "not there"
    header, size = np.fromfile(path, "<i4", 256), os.path.getsize(path)
    if len(header) < 256 or tuple(header[:2]) != (20240520, 1):
        return f"no token shard: it begins with {header[:2].tolist()}, not with 20240520 and 1"
    if size != 1024 + 2 * int(header[2]):
        return f"{size:,} bytes, but {1024 + 2 * int(header[2]):,} for the {header[2]:,} tokens it promises"


def receive(url, part, note):
    """Ask once for what the file `part` lacks, and add it.

    The file `note` holds the version of the part, an ETag or a date: nothing of another version is added to it.
    """
    note.seek(0)
    version, have = note.read(), os.path.getsize(part) if os.path.exists(part) else 0
    headers = {"Accept-Encoding": "identity"}
    if have and version:  # else all of it
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code != 416:  # which means that the part is too long
            response.raise_for_status()
        place = response.headers.get("Content-Range", "")
        now = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        with open(part, "ab") as f:
            if response.status_code == 200:
                f.truncate(0)
                note.truncate(0)
                note.write(now)
                note.flush()
            elif now != version or not place.startswith(f"bytes {have}-"):
                f.truncate(0)
                raise requests.ConnectionError("the server has another file now, or sends another piece of it")
            for piece in response.iter_content(2**16):
                f.write(piece)
                if f.tell() > 2**30:
                    raise ValueError("longer than any shard")
                if sys.stderr.isatty():
                    print(f"\r{part}: {f.tell() / 1e6:.1f} MB ", end="", file=sys.stderr)


def download(url, path, retries):
    """Bring a shard to `path`, over path.part; raises an OSError or a ValueError that says why it could not."""
    part = f"{path}.part"
    with open(f"{part}.version", "a+") as note:
        try:
            import fcntl

            fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, even if it is killed
        except ImportError:  # Windows, where two runs do not exclude each other
            pass
        except BlockingIOError:
            raise FileExistsError("another run is downloading it") from None
        for attempt in range(retries + 1):
            try:
                if what_is_wrong(part):  # a killed run may have left all of it
                    receive(url, part, note)
                break
            except requests.RequestException as error:
                if attempt == retries or isinstance(error, ValueError):  # such as an address that is none
                    raise
                time.sleep(2**attempt)
        problem = what_is_wrong(part)
        if problem:
            os.remove(part)
        else:
            os.replace(part, path)
        os.remove(note.name)
    if problem:
        raise ValueError(problem)


def main():
    flags = get_flags()
    if not 0 <= flags.n <= 103:
        fail("N is from 0 to 103: there are no more training shards", 2)
    base = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    os.makedirs(flags.out_dir, exist_ok=True)
    for i in range(flags.n + 1):
        name = f"fineweb_{'train' if i else 'val'}_{i:06d}.bin"
        path = os.path.join(flags.out_dir, name)
        if what_is_wrong(path):
            clock = threading.Timer(flags.timeout, fail, [f"{name}: slower than --timeout; the same command goes on"])
            clock.start()
            try:
                download(f"{base}/datasets/kjj0/fineweb10B-gpt2/resolve/main/{name}", path, flags.retries)
            except Exception as error:  # a server that misbehaves leads to nearly any
                fail(f"{name}: {error}; the same command goes on", 2 if isinstance(error, PermissionError) else 1)
            clock.cancel()
        print(f"{path}: {i + 1} of {flags.n + 1} shards", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on", 130)
    except OSError as error:
        fail(error, 2)
