"""
Turn documents into token shards for train_gpt.py, on all cores, or into one text for train_char.py.

    python data/prepare.py data/tales.txt data/plain.txt --tokenizer bytes --out data/mine
    python data/prepare.py creepypastas.xlsx --column body --out data/creepy    needs `pip install openpyxl`
    python data/prepare.py web.jsonl --out data/web --val_fraction 0.001
    python data/prepare.py stories.csv --text stories.txt
    python data/prepare.py gedichte.txt --tokenizer bpe --vocab_size 4096 --out data/gedichte    its own tokens

INPUT is a .txt (documents between <|endoftext|>), a .jsonl (one field), a .csv or .xlsx (one column; the first row has
the names). Writes PREFIX_train_000001.bin, PREFIX_train_000002.bin, ... and, of the last documents,
PREFIX_val_000000.bin, in place of all shards that PREFIX had before; each document begins with the token <|endoftext|>.
Tokens of its own are also written, to PREFIX_bpe.json, which train_gpt.py --tokenizer takes.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import collections
import concurrent.futures
import csv
import glob
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading

import numpy as np
import regex  # which tiktoken brings along
import tiktoken

EOT = "<|endoftext|>"


def get_flags():
    show = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show, usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("inputs", metavar="INPUT", nargs="+", help=".txt, .jsonl, .csv or .xlsx files, in UTF-8")
    add("--tokenizer", default="gpt2", help="gpt2 (default), bytes, bpe: learned from INPUT, or the .json of that")
    add("--vocab_size", type=int, default=2048, help="tokens that bpe learns at most (default: %(default)s)")
    add("--out", metavar="PREFIX", help="how the names of the shards begin")
    add("--text", metavar="FILE", help="write the documents to this one text instead")
    add("--column", help="what holds the documents (default: text in a .jsonl, body in a .csv or .xlsx)")
    add("--skip_bad", action="store_true", help="name and pass over rows that hold no text")
    add("--val_fraction", type=float, default=0.05, help="share of the documents, the last (default: %(default)s)")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens of a training shard (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace what an earlier run made")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    return parser.parse_args()


def fail(message, code=2):
    """Exit with one line on stderr: code 2 for what the user can put right, 1 when the work itself failed."""
    print(f"prepare.py: {message}", file=sys.stderr, flush=True)
    os._exit(code)  # without waiting for what the workers do


# --- input: each reader yields the text of a document, or a ValueError about one that has none ---
def read_lines(path):
    """The lines of a UTF-8 file one by one, each ending in a plain newline whatever system wrote it."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                text = "\0"
            if "\0" in text:
                f.seek(0)
                zeros = [i % 2 for i, byte in enumerate(f.read(4096)) if byte == 0]  # Latin letters in UTF-16 have one
                guess = ("UTF-16LE" if sum(zeros) > len(zeros) / 2 else "UTF-16BE") if zeros else "CP1252"
                fail(f"{path}:{number}: not UTF-8 but perhaps {guess}; `iconv -f {guess} -t UTF-8 {path}` converts it")
            yield text.replace("\r\n", "\n")


def read_txt(path):
    lines = []
    for line in read_lines(path):
        *ends, line = re.sub(r"<\|startoftext\|>\n?", "", line).split(EOT)  # gpt-2-simple marks the starts, too
        for end in ends:
            yield "".join([*lines, end]).removesuffix("\n")
            lines = []
        if line.strip() or not ends:  # else it is what is left of the line after the marker
            lines.append(line)
    if any(lines):
        yield "".join(lines).removesuffix("\n")


def read_jsonl(path, field):
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[field]
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            text = error
        if isinstance(text, str):
            yield text.encode("utf-8", "replace").decode()  # JSON can hold halves of characters
        else:
            yield ValueError(f"{path}:{number}: no text in the field {field!r}, which --column names ({text!r:.99})")


def read_table(path, column):
    rows = read_csv(path) if path.lower().endswith(".csv") else read_xlsx(path)
    _, names = next(rows, (path, []))
    if column not in names:
        fail(f"{path}: no column {column!r}; --column can be {', '.join(map(repr, names)) or 'nothing: it is empty'}")
    index = names.index(column)
    for place, row in rows:
        cell = row[index] if index < len(row) else "missing"
        if index < len(row) and isinstance(cell, str):
            yield cell.replace("_x000D_", "").replace("\r\n", "\n")  # how Excel writes a carriage return
        else:
            yield ValueError(f"{place}: {column!r} is {cell}, not text")


def read_csv(path):
    """The rows of a .csv: (place, list of cells)."""
    csv.field_size_limit(2**31 - 1)  # 128 KiB is too little for a story
    reader = csv.reader(read_lines(path), strict=True)
    try:
        for row in reader:
            if row:  # else an empty line
                yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        fail(f"{path}:{reader.line_num}: broken CSV ({error})")


def read_xlsx(path):
    """The rows of the first sheet of an .xlsx: (place, list of cells); an empty cell is an empty string."""
    try:
        import openpyxl
    except ImportError:
        fail(f"{path}: reading .xlsx takes one more package: pip install openpyxl")
    try:
        sheets = [openpyxl.load_workbook(path, read_only=True, data_only=only).worksheets[0] for only in (True, False)]
        for sheet in sheets:
            sheet.reset_dimensions()  # what a file says about its size is often wrong
        width = 0
        for number, (values, formulas) in enumerate(zip(*[sheet.iter_rows() for sheet in sheets]), 1):
            row = ["" if cell.value is None else cell.value for cell in values]
            for i, (cell, formula) in enumerate(zip(values, formulas)):
                if cell.data_type == "e" or (formula.data_type == "f" and cell.value is None):
                    row[i] = ValueError(f"an error or a formula without a value ({str(formula.value)[:40]!r})")
            width = width or len(row)  # later rows end with their last cell
            yield f"{path}: row {number}", row + [""] * (width - len(row))
    except Exception as error:  # openpyxl raises whatever a damaged file leads to
        fail(f"{path}: no .xlsx file, or a damaged one ({type(error).__name__})")


def documents(flags, counts, quiet=True):
    """The documents of all inputs one by one; counts, a Counter, learns how many of each kind there were."""
    for path in flags.inputs:
        if path.lower().endswith(".txt"):
            texts = read_txt(path)
        elif path.lower().endswith(".jsonl"):
            texts = read_jsonl(path, flags.column or "text")
        elif path.lower().endswith((".csv", ".xlsx")):
            texts = read_table(path, flags.column or "body")
        else:
            fail(f"{path}: the name must end in .txt, .jsonl, .csv or .xlsx")
        before = counts["documents"]
        for text in texts:
            if isinstance(text, ValueError):
                if not flags.skip_bad:
                    fail(f"{text} (--skip_bad passes over it)")
                if not quiet:
                    print(f"skipped: {text}", file=sys.stderr)
                counts["bad"] += 1
                continue
            clean = text.replace(EOT, " ")  # a reader would take it for the end
            counts["marked"] += clean != text
            if clean.strip():
                counts["documents"] += 1
                yield clean
            else:
                counts["empty"] += 1
        if counts["documents"] == before:
            fail(f"{path}: empty, there is no document in it")


# --- encoding, the same in every script (tests/test_copies.py) ---
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # GPT-2's, into words


def get_tokenizer(spec):
    """The tiktoken.Encoding of a checkpoint's "tokenizer"; <|endoftext|> is its last token.

    spec: "gpt2", "bytes", whose token i is byte i, or {"bpe": the tokens, byte i of them as chr(i)}.
    """
    if spec == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError):  # of requests, too, or a page to log in came instead
            fail("cannot fetch the GPT-2 tokenizer; see TIKTOKEN_CACHE_DIR in README.md")
    tokens = [chr(i) for i in range(256)] if spec == "bytes" else spec["bpe"]
    ranks, special = {token.encode("latin-1"): i for i, token in enumerate(tokens)}, {"<|endoftext|>": len(tokens)}
    name = "bytes" if spec == "bytes" else "bpe"
    return tiktoken.Encoding(name, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)


# --- tokens ---
def learn_tokens(texts, size):
    """Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) of GPT-2's words: the tokens, byte i as chr(i).

    The first 256 are the bytes. Then, size - 1 in all, the two that stand together most often become one, again and
    again; of pairs that are equally common the first ones. Fewer when all words are whole.
    """
    counts = collections.Counter()
    for text in texts:
        counts.update(regex.findall(SPLIT, text))
    words, tokens = [[*word.encode()] for word in counts], [chr(i) for i in range(256)]
    times, pairs, places = [*counts.values()], collections.Counter(), collections.defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += times[i]
            places[pair].add(i)  # the words that hold it
    while len(tokens) < size - 1 and pairs and (most := max(pairs.values())):
        best = min(pair for pair, n in pairs.items() if n == most)
        for i in places.pop(best):
            old, words[i] = words[i], []
            for token in old:
                if words[i] and (words[i][-1], token) == best:
                    words[i][-1] = len(tokens)
                else:
                    words[i].append(token)
            for pair in zip(old, old[1:]):
                pairs[pair] -= times[i]
            for pair in zip(words[i], words[i][1:]):
                pairs[pair] += times[i]
                places[pair].add(i)
        del pairs[best]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def encode(text):
    """The tokens (n,) of a document, in uint16."""
    if tokenizer.name == "bytes":  # tiktoken would take much longer
        return np.append(np.uint16(256), np.frombuffer(text.encode(), np.uint8))
    tokens = [tokenizer.eot_token]
    for piece in re.split(r"(\s{1000})", text):  # tiktoken panics when a million blanks stand in a row
        tokens += tokenizer.encode_ordinary(piece)
    return np.array(tokens, np.uint16)


def encode_all(texts, pool):
    """The tokens of each document in turn; two groups of documents are in memory at once."""
    group = []
    while some := list(itertools.islice(texts, 1000)):
        following = pool.map(encode, some, chunksize=4)
        yield from group
        group = following
    yield from group


def start_worker(spec):
    global tokenizer
    tokenizer = get_tokenizer(spec)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and is the main one's to answer
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # else the workers outlive a parent that fails or is killed


# --- output ---
def write_shards(prefix, number, arrays, most):
    """Write arrays of tokens one after another as shards of `most` tokens, the last of fewer; returns how many."""
    total, tokens = 0, next(arrays, None)
    while tokens is not None:
        name, n = f"{prefix}_{number:06d}.bin", 0
        with open(f"{name}.tmp", "wb") as f:
            f.write(bytes(1024))
            while tokens is not None and n < most:
                f.write(tokens[: most - n].astype("<u2").tobytes())
                n, tokens = n + len(tokens[: most - n]), tokens[most - n :]
                tokens = tokens if len(tokens) else next(arrays, None)
            f.seek(0)
            f.write(np.array([20240520, 1, n], "<i4").tobytes())
        print(f"{name}: {n:,} tokens", file=sys.stderr)
        total, number = total + n, number + 1
    return total


def write(flags, texts, n_train, spec):
    """Write all of --text, or of --out, under names that end in .tmp; returns a line about it."""
    if flags.text:
        with open(f"{flags.text}.tmp", "w", encoding="utf-8", newline="\n") as f:
            for i, text in enumerate(texts):
                f.write(f"\n{EOT}\n" * (i > 0) + text)
            f.write("\n")
        return "one text"
    if isinstance(spec, dict):
        with open(f"{flags.out}_bpe.json.tmp", "w", encoding="utf-8") as f:
            json.dump(spec, f)
    pool = concurrent.futures.ProcessPoolExecutor(flags.workers, initializer=start_worker, initargs=(spec,))
    arrays = encode_all(itertools.islice(texts, n_train), pool)
    train = write_shards(f"{flags.out}_train", 1, arrays, flags.shard_tokens)
    val = write_shards(f"{flags.out}_val", 0, encode_all(texts, pool), 2**31 - 1)
    pool.shutdown()
    return f"{train:,} tokens in {n_train:,} documents, and {val:,} in the others for validation"


def find(flags, suffix=""):
    """The files of this --text or --out that are there."""
    ends = ["_train_[0-9]*.bin", "_val_[0-9]*.bin", "_bpe.json"] if flags.out else [""]
    return [path for end in ends for path in sorted(glob.glob(glob.escape(flags.out or flags.text) + end + suffix))]


def main():
    flags = get_flags()
    target = flags.out or flags.text
    if bool(flags.out) == bool(flags.text):
        fail("give either --out PREFIX, for shards, or --text FILE")
    if not 0 <= flags.val_fraction < 1 or flags.shard_tokens < 1 or flags.workers < 1:
        fail("--val_fraction is from 0 to below 1, --shard_tokens and --workers are 1 or more")
    if not flags.overwrite and find(flags):
        fail(f"{find(flags)[0]}: is there already; choose another name, or give --overwrite")
    counts = collections.Counter()  # all input is looked at before the work begins
    size = sum(len(text.encode()) for text in documents(flags, counts, quiet=False))
    n = counts["documents"]
    n_val = min(n - 1, max(1, round(n * flags.val_fraction))) if flags.val_fraction and flags.out else 0
    if flags.out and flags.val_fraction and not n_val:
        fail("one document only, so that none can be set apart for validation; --val_fraction 0 does without")
    spec = flags.tokenizer
    if flags.out and spec == "bpe":
        spec = {"bpe": learn_tokens(itertools.islice(documents(flags, counts.copy()), n - n_val), flags.vocab_size)}
    elif flags.out and spec not in ("gpt2", "bytes"):
        with open(spec, encoding="utf-8") as f:
            spec = json.load(f)
    if flags.out:
        get_tokenizer(spec)  # so that it is the main process that says when it cannot be had
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    for path in find(flags, ".tmp"):  # of a run that was killed
        os.remove(path)
    try:
        line = write(flags, documents(flags, collections.Counter()), n - n_val, spec)
        for path in find(flags):
            os.remove(path)
        for path in find(flags, ".tmp"):
            os.replace(path, path.removesuffix(".tmp"))
    finally:
        for path in find(flags, ".tmp"):
            os.remove(path)
    print(f"documents: {n:,}, {size:,} bytes; {counts['empty']:,} empty and {counts['bad']:,} bad ones skipped")
    if counts["marked"]:
        print(f"{EOT} inside a document became a blank: in {counts['marked']:,} of them")
    print(f"{target}: {line}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except concurrent.futures.BrokenExecutor:
        fail("a worker process died, perhaps for want of memory: nothing was written", 1)
    except OSError as error:
        fail(f"{error.filename or 'could not be written'}: {error.strerror}", 2 if error.filename else 1)
