"""
Download 42 public-domain horror books from Project Gutenberg and turn each into a text of its stories or chapters.

    python data/horror.py                                             one book every two seconds
    python data/prepare.py data/horror/*.txt --text data/horror.txt   then: all of them as one text
    python data/prepare.py data/horror/*.txt --out data/horror        or as GPT-2 tokens

They come from Project Gutenberg's mirror, since the main site asks programs to keep away, or from another one in the
same layout that --mirror or the environment variable GUTENBERG_MIRROR names. In --out: a .txt for each book, stories
between lines <|endoftext|>, and raw/ with the files as they came. What is there is passed over: after an interruption
the same command goes on, and a .txt that was deleted is made again without a download.
These books are in the public domain in the USA; elsewhere look up the law before downloading.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import contextlib
import os
import re
import sys
import tempfile
import textwrap
import threading
import time
import urllib.parse

import requests

BOOKS = [  # number at Project Gutenberg, author, title
    (49222, "Algernon Blackwood", "John Silence, Physician Extraordinary"),
    (14471, "Algernon Blackwood", "The Empty House and Other Ghost Stories"),
    (10897, "Algernon Blackwood", "The Wendigo"),
    (11438, "Algernon Blackwood", "The Willows"),
    (4366, "Ambrose Bierce", "Can Such Things Be?"),
    (3268, "Ann Radcliffe", "The Mysteries of Udolpho"),
    (25016, "Arthur Machen", "The House of Souls"),
    (35517, "Arthur Machen", "The Three Impostors"),
    (345, "Bram Stoker", "Dracula"),
    (10150, "Bram Stoker", "Dracula's Guest"),
    (72421, "E. F. Benson", "The Room in the Tower"),
    (60339, "E. F. Benson", "Visible and Invisible"),
    (2147, "Edgar Allan Poe", "The Works of Edgar Allan Poe, Volume 1"),
    (2148, "Edgar Allan Poe", "The Works of Edgar Allan Poe, Volume 2"),
    (2149, "Edgar Allan Poe", "The Works of Edgar Allan Poe, Volume 3"),
    (40386, "F. Marion Crawford", "Wandering Ghosts"),
    (175, "Gaston Leroux", "The Phantom of the Opera"),
    (159, "H. G. Wells", "The Island of Doctor Moreau"),
    (70652, "H. P. Lovecraft", "At the Mountains of Madness"),
    (68283, "H. P. Lovecraft", "The Call of Cthulhu"),
    (73547, "H. P. Lovecraft", "The Case of Charles Dexter Ward"),
    (68236, "H. P. Lovecraft", "The Colour out of Space"),
    (50133, "H. P. Lovecraft", "The Dunwich Horror"),
    (73181, "H. P. Lovecraft", "The Shadow over Innsmouth"),
    (209, "Henry James", "The Turn of the Screw"),
    (696, "Horace Walpole", "The Castle of Otranto"),
    (10007, "J. Sheridan Le Fanu", "Carmilla"),
    (40510, "J. Sheridan Le Fanu", "The Watcher"),
    (14851, "J. Sheridan Le Fanu", "Uncle Silas"),
    (20387, "M. R. James", "A Thin Ghost and Others"),
    (8486, "M. R. James", "Ghost Stories of an Antiquary"),
    (1617, "Mary E. Wilkins Freeman", "The Wind in the Rose-Bush, and Other Stories of the Supernatural"),
    (84, "Mary Shelley", "Frankenstein"),
    (601, "Matthew Lewis", "The Monk"),
    (174, "Oscar Wilde", "The Picture of Dorian Gray"),
    (5164, "Richard Marsh", "The Beetle"),
    (43, "Robert Louis Stevenson", "The Strange Case of Dr. Jekyll and Mr. Hyde"),
    (8492, "Robert W. Chambers", "The King in Yellow"),
    (9956, "Vernon Lee", "Hauntings"),
    (10832, "William Hope Hodgson", "Carnacki, the Ghost Finder"),
    (10966, "William Hope Hodgson", "The Ghost Pirates"),
    (10002, "William Hope Hodgson", "The House on the Borderland"),
]


def get_flags():
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "horror")
    mirror = os.environ.get("GUTENBERG_MIRROR") or "https://gutenberg.pglaf.org"
    flags = Flags()
    add = flags.add_argument
    add("--out", default=here, help="the folder where the books go")
    add("--mirror", default=mirror, help="where Project Gutenberg's folder cache/epub is found")
    add("--pause", type=number(float, 0), default=2.0, help="seconds between two downloads, out of politeness")
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


START = re.compile(  # the last line of what they write above a book: since 2002, and before
    r"^[* ]*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG(?:[^*]{0,500}\*\*\*)?.*|^\*END\W*THE SMALL PRINT!.*", re.M | re.I
)
END = re.compile(r"^[^\w\n]*(?:the )?end of (?:the |this )?project gutenberg", re.M | re.I)
NOTE = re.compile(r"^[ \t]*\[(?:Illustration|Picture|Transcriber|Footnote)[^\]]{0,2000}\]", re.M | re.I)
CREDIT = re.compile(r"(this )?(e-?text |e-?book )?(was )?(produced|prepared|transcribed|scanned) (by|from)", re.I)


def unpack(data, title):
    """The text of a file of Project Gutenberg's without what they wrote above and below it.

    Raises ValueError with what is wrong when the file is none of theirs, has lost its end, or is another book.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")  # as old files are
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    start = START.search(text)
    if not start:
        raise ValueError("not a book of Project Gutenberg's: it has no line *** START OF THE PROJECT GUTENBERG EBOOK")
    header, end = text[: start.start()], END.search(text, start.end())
    words = r"(the |an? )?" + r"\W+".join(re.findall(r"\w+", re.sub(r"^(The|An?) ", "", title)))
    rest = r"\W*$|[\"”?!]*\s*[;:,.(/—–-]|\s+or\b"  # nothing, or a subtitle
    old = rf"Project Gutenberg('s)? E-?(text|book)( of|,)\s*{words}({rest}|\s+by\b)"
    if not re.search(rf"^Title:\s*{words}({rest})|{old}", header, re.M | re.I):
        found = re.search(r"^Title:.*", header, re.M | re.I) or re.search(".*Project Gutenberg.*", header, re.I)
        raise ValueError(f"not {title!r}: its header says {(found[0] if found else header)[:100]!r}")
    if not end:
        raise ValueError("cut short: it has no line *** END OF THE PROJECT GUTENBERG EBOOK")
    return text[start.end() : end.start()]


def join(lines):
    """A paragraph as one line, but for verse and other breaks that are meant: where the next word had room above."""
    indents, width = {len(line) - len(line.lstrip()) for line in lines}, max(map(len, lines))
    room = [len(line) + len(following.split()[0]) for line, following in zip(lines, lines[1:])]
    full = len(indents) == 1 and all(n >= width for n in room)
    paragraph = lines[0]
    for last, line, n in zip(lines, lines[1:], room):
        if width < 56 or not full and (line[0].isspace() or n < 50):  # prose is wrapped at 60 columns or more
            paragraph += "\n" + line
        else:
            dash = last.endswith(("-", "—")) or line.lstrip().startswith(("--", "—"))
            paragraph += ("" if dash else " ") + line.lstrip()
    paragraph = re.sub(r"(?<!\w)_([^_]+)_(?!\w)", r"\1", textwrap.dedent(paragraph))  # _italics_
    return re.sub(r"(\S) {2,}", r"\1 ", paragraph)


def paragraphs(text):
    """Each paragraph with the number of empty lines before it."""
    empty, lines = 0, []
    for line in [*text.split("\n"), ""]:
        if line.strip():
            lines.append(line.rstrip())
            continue
        if lines:
            yield empty, join(lines)
            empty, lines = 0, []
        empty += 1


def is_heading(paragraph):
    return len(paragraph) < 100 and (paragraph.isupper() or paragraph[-1].isalnum())


def stories(text):
    """The stories or chapters of a book, without headings.

    Three empty lines and then a short paragraph: so Project Gutenberg's volunteers begin a chapter or a story. What
    has less than 1,000 characters of prose is a title page, a table of contents, a dedication, ... When that would
    lose more than a tenth, the book is laid out in another way, and stays whole.
    """
    pieces, found = [["the start"]], []
    for empty, paragraph in paragraphs(NOTE.sub("", text)):
        if re.match(r"\s*\[\d+\]", paragraph):  # a footnote
            continue
        if empty >= 3 and len(paragraph) < 100:
            pieces.append([])
        pieces[-1].append(re.sub(r"\[\d+\]", "", paragraph))
    for heading, *piece in pieces:
        while piece and (is_heading(piece[0]) or CREDIT.match(piece[0])):
            del piece[0]
        prose = sum(len(line) for paragraph in piece for line in paragraph.split("\n") if len(line) >= 100)
        if prose >= 1000 and not re.match(r"\W*(footnotes|transcriber)", heading, re.I):
            found.append("\n\n".join(piece))
    whole = "\n\n".join(sum(pieces, [])[1:])
    return found if sum(map(len, found)) >= 0.9 * len(whole) else [whole]


def save(path, text):
    """All of the text under its name, or nothing."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)  # which is there only when it failed


def name(author, title):
    return "_".join(re.findall(r"\w+", f"{author} {title}".lower().replace("'", ""))) + ".txt"


def main():
    flags = get_flags()
    try:
        os.makedirs(os.path.join(flags.out, "raw"), exist_ok=True)
        tempfile.TemporaryFile(dir=flags.out).close()
    except OSError as error:
        fail(f"--out {flags.out}: {error.strerror}")
    agent = f"horror.py ({requests.utils.default_user_agent()})"  # a server may want to know who asks
    requests.utils.default_user_agent = lambda: agent
    progress, asked, problems = Progress(len(BOOKS)), False, []
    try:
        for number, author, title in BOOKS:
            raw, path = os.path.join(flags.out, "raw", f"pg{number}.txt"), os.path.join(flags.out, name(author, title))
            if os.path.exists(path):
                progress(raw, os.path.getsize(path), os.path.getsize(path), whole=True)
                continue
            if not os.path.exists(raw):
                if asked:
                    time.sleep(flags.pause)
                asked = True
            try:
                url = f"{flags.mirror.rstrip('/')}/cache/epub/{number}/pg{number}.txt"
                download(url, raw, retries=flags.retries, progress=progress)
                with open(raw, "rb") as f:
                    save(path, "\n<|endoftext|>\n".join(stories(unpack(f.read(), title))) + "\n")
            except ValueError as error:
                os.remove(raw)
                problems.append(f"pg{number}.txt: {error}")
            except OSError as error:
                if " answers 404 " not in str(error):  # else the other books will be there
                    raise
                problems.append(f"{error} ({title})")
    except (OSError, KeyboardInterrupt) as error:
        progress.stop()
        code, what = (1, error) if isinstance(error, OSError) else (130, "interrupted")
        fail(f"{what}; the same command goes on with what has arrived", code)
    progress.stop()
    for problem in problems:
        print(f"{os.path.basename(sys.argv[0])}: {problem}", file=sys.stderr)
    here = [path for _, *book in BOOKS if os.path.exists(path := os.path.join(flags.out, name(*book)))]
    print(f"{flags.out}: {len(here)} books, {sum(map(os.path.getsize, here)) / 1e6:.1f} MB. All of them as one:")
    out, prepare = os.path.relpath(flags.out), os.path.relpath(os.path.join(os.path.dirname(__file__), "prepare.py"))
    print(f"python {prepare} {out}/*.txt --text {out}.txt  # for train_char.py and finetune.py")
    print(f"python {prepare} {out}/*.txt --out {out}       # as GPT-2 tokens, for train_gpt.py")
    if problems:
        fail(f"{len(problems)} of {len(BOOKS)} books were not to be had", code=1)


if __name__ == "__main__":
    run(main)
