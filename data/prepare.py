"""
Turn documents into token shards for train_gpt.py, on all cores, or into one text for train_char.py.

    python data/prepare.py data/tales.txt data/plain.txt --tokenizer bytes --out data/mine
    python data/prepare.py creepypastas.xlsx --column body --out data/creepy    needs `pip install openpyxl`
    python data/prepare.py web.jsonl --out data/web --val_fraction 0.001
    python data/prepare.py stories.csv --text stories.txt

INPUT is a .txt (documents between lines <|endoftext|>), .jsonl (field "text"), .csv or .xlsx (first row: names).
Writes PREFIX_train_000001.bin, PREFIX_train_000002.bin, ... and, of the last documents, PREFIX_val_000000.bin, in place
of all shards that PREFIX had before; each document begins with the token <|endoftext|>. Input is streamed.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import codecs
import collections
import concurrent.futures
import contextlib
import csv
import glob
import itertools
import json
import multiprocessing
import os
import signal
import sys

import numpy as np
import tiktoken

MOST_TOKENS = 2**31 - 1  # that the header of a shard can count


def get_flags():
    flags = Flags()
    add = flags.add_argument
    add("inputs", metavar="INPUT", nargs="+", help=".txt, .jsonl, .csv or .xlsx files")
    add("--tokenizer", default="gpt2", choices=["gpt2", "bytes"], help="bytes needs no download")
    add("--out", metavar="PREFIX", help="how the names of the shards begin")
    add("--text", metavar="FILE", help="write the documents to this one text instead")
    add("--column", default="body", help="the column of a .csv or .xlsx that holds the documents")
    add("--val_fraction", type=number(float, 0, 0.99), default=0.05, help="share of the documents, the last")
    add("--shard_tokens", type=number(int, 1, MOST_TOKENS), default=100_000_000, help="tokens a training shard")
    add("--overwrite", default=False, action=argparse.BooleanOptionalAction, help="replace what an earlier run made")
    add("--workers", type=number(int, 0), default=0, help="processes; 0 is one for each core")
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


# --- tokenizer: the same in every script (tests/test_copies.py) ---


def get_tokenizer(spec):
    """The tiktoken.Encoding that a checkpoint's "tokenizer" means: "gpt2", "bytes" or {"chars": "abc…"}.

    bytes: token i is byte i, 256 is <|endoftext|>. chars: token i is the i-th character, and there is no other token.
    """
    if spec == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:  # requests' errors are OSErrors too
            fail(f"cannot fetch the GPT-2 tokenizer ({type(error).__name__}); see TIKTOKEN_CACHE_DIR in README.md")
    if spec != "bytes" and not (isinstance(spec, dict) and isinstance(spec.get("chars"), str)):
        fail(f"the checkpoint names a tokenizer that is unknown here: {spec!r}")
    chars = [bytes([i]) for i in range(256)] if spec == "bytes" else [c.encode() for c in spec["chars"]]
    if len(set(chars)) < len(chars):
        fail("the checkpoint's tokenizer has a character twice")
    name, special = ("bytes", {"<|endoftext|>": 256}) if spec == "bytes" else ("chars", {})
    ranks = {c: i for i, c in enumerate(chars)}
    return tiktoken.Encoding(name, pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special)


def encode(tokenizer, text, name):
    """Token ids of a text; exits when it holds characters that a character tokenizer does not know."""
    if tokenizer.name == "chars":
        unknown = sorted(set(text) - set(tokenizer.decode(list(range(tokenizer.n_vocab)))))
        if unknown:
            fail(f"{name}: the checkpoint does not know the characters {''.join(unknown)!r}")
    return tokenizer.encode_ordinary(text)


# --- end of tokenizer ---


# --- documents: the same in every script (tests/test_copies.py) ---


def read_lines(path):
    """The lines of a UTF-8 file one by one, each ending in a plain newline whatever system wrote it."""
    line_number = 0
    try:
        with open(path, "rb") as f:
            for line_number, line in enumerate(f, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if line_number == 1 else line
                yield line.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        fail(f"{path}:{line_number}: not UTF-8 text (byte {error.start + 1} of the line)")
    except OSError as error:
        fail(f"{path}: {error.strerror}")


def documents(path):
    """The documents of a .txt (between lines <|endoftext|>) or a .jsonl (field "text") one by one, empty ones too."""
    if path.lower().endswith(".jsonl"):
        for line_number, line in enumerate(read_lines(path), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                fail(f"{path}:{line_number}: broken JSON ({error})")
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                fail(f'{path}:{line_number}: no field "text" with a string')
            yield row["text"].encode("utf-8", "replace").decode()  # JSON can hold halves of characters
    elif path.lower().endswith(".txt"):
        lines = []
        for line in read_lines(path):
            if line.rstrip() == "<|endoftext|>":
                yield "".join(lines).removesuffix("\n")
                lines = []
            else:
                lines.append(line)
        if lines:
            yield "".join(lines).removesuffix("\n")
    else:
        fail(f"{path}: neither .txt nor .jsonl")


# --- end of documents ---


def csv_rows(path):
    """The rows of a .csv, each with the place to name when it is wrong."""
    csv.field_size_limit(2**31 - 1)  # 128 KiB is too little for a story
    reader = csv.reader(read_lines(path), strict=True)
    try:
        for row in reader:
            if row:  # else an empty line
                yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        fail(f"{path}:{reader.line_num}: broken CSV ({error})")


def xlsx_rows(path):
    """The rows of the first sheet of an .xlsx; an empty cell is an empty string."""
    try:
        import openpyxl
    except ImportError:
        fail(f"{path}: reading .xlsx takes one more package: pip install openpyxl")
    try:
        sheet = openpyxl.load_workbook(path, read_only=True, data_only=True).worksheets[0]
        sheet.reset_dimensions()  # what a file says about its size is often wrong
        width = 0
        for i, row in enumerate(sheet.iter_rows(values_only=True), 1):
            width = width or len(row)  # later rows end with their last cell
            row = ["" if cell is None else cell for cell in row] + [""] * (width - len(row))
            yield f"{path}: row {i}", row
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    except Exception as error:  # openpyxl raises whatever a damaged file leads to
        fail(f"{path}: no .xlsx file, or a damaged one ({type(error).__name__})")


def cells(path, column):
    """The documents in a column of a .csv or .xlsx."""
    rows = csv_rows(path) if path.lower().endswith(".csv") else xlsx_rows(path)
    _, names = next(rows, (path, []))
    if column not in names:
        fail(f"{path}: no column {column!r}; --column can be {', '.join(map(repr, names)) or 'nothing: it is empty'}")
    index = names.index(column)
    for place, row in rows:
        if index >= len(row):
            fail(f"{place}: only {len(row)} cells, none for {column!r}")
        if not isinstance(row[index], str):
            fail(f"{place}: {column!r} is {row[index]!r}, not text")
        yield row[index].replace("_x000D_", "").replace("\r\n", "\n")  # how Excel writes a carriage return


def read(path, column):
    """The documents of an input of any kind, empty ones too."""
    return cells(path, column) if path.lower().endswith((".csv", ".xlsx")) else documents(path)


def count(flags):
    """How many documents and bytes there are, and how many empty documents. Finds what is wrong with the input."""
    n, size, empty = 0, 0, 0
    for path in flags.inputs:
        before = n
        for text in read(path, flags.column):
            if text.strip():
                n += 1
                size += len(text.encode())
            else:
                empty += 1
        if n == before:
            fail(f"{path}: empty, there is no document in it")
    return n, size, empty


def tokenize(texts, name):
    """The tokens of some documents, one after another."""
    tokenizer, pieces = get_tokenizer(name), []
    for text in texts:
        if name == "bytes":  # tiktoken looks each byte up as if it were a word, which takes 1000 times as long
            tokens = np.frombuffer(text.encode(), np.uint8)
        else:
            tokens = tokenizer.encode_ordinary(text)
        pieces += [np.array([tokenizer.eot_token], "<u2"), np.array(tokens, "<u2")]
    return np.concatenate(pieces)


def tokenize_all(texts, name, pool, most):
    """The tokens of all documents in order, about 1 MB of text at a time, with `most` such parts in memory."""
    batch, size, under_way = [], 0, collections.deque()
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= 2**20:
            under_way.append(pool.submit(tokenize, batch, name))
            batch, size = [], 0
        if len(under_way) >= most:
            yield under_way.popleft().result()
    if batch:
        under_way.append(pool.submit(tokenize, batch, name))
    while under_way:
        yield under_way.popleft().result()


def leave_signals():
    """In a worker: Ctrl-C reaches all processes, and is the main one's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def write_shard(temporary, tokens, rest, most):
    """Write `tokens` and then those of the iterator `rest`, `most` at most; returns how many, and what is left over."""
    n = 0
    with open(temporary, "wb") as f:
        f.write(bytes(1024))
        while tokens is not None and n < most:
            written, tokens = tokens[: most - n], tokens[most - n :]
            f.write(written.tobytes())
            n += len(written)
            tokens = tokens if len(tokens) else next(rest, None)
        f.seek(0)
        f.write(np.array([20240520, 1, n], "<i4").tobytes())
        f.flush()
        os.fsync(f.fileno())
    return n, tokens


def write_shards(flags, texts, n_train, files):
    """Write all shards, put them into `files` as {name: temporary name}, and return the numbers of tokens."""
    workers, totals = flags.workers or os.cpu_count(), {}
    with concurrent.futures.ProcessPoolExecutor(workers, initializer=leave_signals) as pool:
        try:
            for kind, i, n, most in (("train", 1, n_train, flags.shard_tokens), ("val", 0, None, MOST_TOKENS)):
                rest = tokenize_all(itertools.islice(texts, n), flags.tokenizer, pool, 2 * workers)
                tokens, totals[kind] = next(rest, None), 0
                while tokens is not None:
                    name = f"{flags.out}_{kind}_{i:06d}.bin"
                    files[name] = f"{name}.{os.getpid()}.tmp"
                    written, tokens = write_shard(files[name], tokens, rest, most)
                    print(f"{name}: {written:,} tokens", file=sys.stderr)
                    i, totals[kind] = i + 1, totals[kind] + written
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()  # else the pool would wait for what is under way
            raise
    return totals


def write_text(flags, texts, files):
    files[flags.text] = f"{flags.text}.{os.getpid()}.tmp"
    with open(files[flags.text], "wb") as f:
        for i, text in enumerate(texts):
            f.write(("\n<|endoftext|>\n" * (i > 0) + text).encode())
        f.write(b"\n")
        f.flush()
        os.fsync(f.fileno())


def earlier_shards(prefix):
    return [name for kind in ("train", "val") for name in glob.glob(f"{glob.escape(prefix)}_{kind}_{'[0-9]' * 6}.bin")]


def main():
    flags = get_flags()
    target = flags.text or flags.out
    if not target or flags.text and flags.out:
        fail("give either --out PREFIX, for shards, or --text FILE")
    if not os.path.basename(target) or flags.text and os.path.isdir(target):
        fail(f"{target}: is a folder; add a name")
    for path in flags.inputs:
        if not path.lower().endswith((".txt", ".jsonl", ".csv", ".xlsx")):
            fail(f"{path}: the name must end in .txt, .jsonl, .csv or .xlsx")
    earlier = [flags.text] if flags.text else earlier_shards(flags.out)
    if not flags.overwrite and any(map(os.path.exists, earlier)):
        fail(f"{earlier[0]}: is there already; choose another name, or give --overwrite")
    n, size, empty = count(flags)
    n_val = min(n - 1, max(1, round(n * flags.val_fraction))) if flags.val_fraction else 0
    if flags.out:
        if flags.val_fraction and not n_val:
            fail("one document only, so that none can be set apart for validation; --val_fraction 0 does without")
        get_tokenizer(flags.tokenizer)  # so that it is the main process that says when it cannot be had
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    texts = (text for path in flags.inputs for text in read(path, flags.column) if text.strip())
    files = {}
    try:
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        totals = write_shards(flags, texts, n - n_val, files) if flags.out else write_text(flags, texts, files)
        for name, temporary in files.items():
            os.replace(temporary, name)
    except BaseException as error:
        for temporary in files.values():
            with contextlib.suppress(OSError):
                os.remove(temporary)
        if isinstance(error, concurrent.futures.BrokenExecutor):
            fail("a worker process died, perhaps for want of memory: nothing was written", code=1)
        if isinstance(error, OSError):
            theirs = isinstance(error, (PermissionError, FileExistsError, NotADirectoryError))
            fail(f"{target}: could not be written ({error.strerror})", code=2 if theirs else 1)
        raise
    if flags.text:
        print(f"documents: {n:,}, {size:,} bytes; {empty:,} empty ones skipped\ntext: {flags.text}")
        return
    print(f"documents: {n:,} ({n - n_val:,} train, {n_val:,} val), {size:,} bytes; {empty:,} empty ones skipped")
    made = {os.path.basename(name) for name in files}  # glob may spell the folder differently
    for name in earlier:  # which may have made more
        if os.path.basename(name) not in made:
            os.remove(name)
            print(f"removed: {name} of an earlier run")
    total = sum(totals.values())
    print(f"tokens: {total:,} ({totals['train']:,} train, {totals['val']:,} val), {total / size:.4f} per byte")
    print(f"shards: {len(files):,}, {min(files)} to {max(files)}")


if __name__ == "__main__":
    run(main)
