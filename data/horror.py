"""
Download 42 public-domain horror books from Project Gutenberg and turn each into a text of its stories or chapters.

    python data/horror.py                                             one book every two seconds
    python data/prepare.py data/horror/*.txt --text data/horror.txt   then: all of them as one text
    python data/prepare.py data/horror/*.txt --out data/horror        or as GPT-2 tokens

They come from Project Gutenberg's mirror, since the main site asks programs to keep away, or from another one in the
same layout that --mirror or the environment variable GUTENBERG_MIRROR names. In --out: a .txt for each book, stories
between lines <|endoftext|>. What is there is passed over: after a failure the same command goes on.
The books are in the public domain in the USA; elsewhere look up the law before downloading.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import os
import re
import sys
import threading
import time

import requests

BOOKS = """
Algernon Blackwood: 49222 John Silence, Physician Extraordinary; 14471 The Empty House and Other Ghost Stories
Algernon Blackwood: 10897 The Wendigo; 11438 The Willows
Ambrose Bierce: 4366 Can Such Things Be?
Ann Radcliffe: 3268 The Mysteries of Udolpho
Arthur Machen: 25016 The House of Souls; 35517 The Three Impostors
Bram Stoker: 345 Dracula; 10150 Dracula's Guest
E. F. Benson: 72421 The Room in the Tower; 60339 Visible and Invisible
Edgar Allan Poe: 2147 The Works of Edgar Allan Poe, Volume 1; 2148 The Works of Edgar Allan Poe, Volume 2
Edgar Allan Poe: 2149 The Works of Edgar Allan Poe, Volume 3
F. Marion Crawford: 40386 Wandering Ghosts
Gaston Leroux: 175 The Phantom of the Opera
H. G. Wells: 159 The Island of Doctor Moreau
H. P. Lovecraft: 70652 At the Mountains of Madness; 68283 The Call of Cthulhu; 73547 The Case of Charles Dexter Ward
H. P. Lovecraft: 68236 The Colour out of Space; 50133 The Dunwich Horror; 73181 The Shadow over Innsmouth
Henry James: 209 The Turn of the Screw
Horace Walpole: 696 The Castle of Otranto
J. Sheridan Le Fanu: 10007 Carmilla; 40510 The Watcher; 14851 Uncle Silas
M. R. James: 20387 A Thin Ghost and Others; 8486 Ghost Stories of an Antiquary
Mary E. Wilkins Freeman: 1617 The Wind in the Rose-Bush, and Other Stories of the Supernatural
Mary Shelley: 84 Frankenstein
Matthew Lewis: 601 The Monk
Oscar Wilde: 174 The Picture of Dorian Gray
Richard Marsh: 5164 The Beetle
Robert Louis Stevenson: 43 The Strange Case of Dr. Jekyll and Mr. Hyde
Robert W. Chambers: 8492 The King in Yellow
Vernon Lee: 9956 Hauntings
William Hope Hodgson: 10832 Carnacki, the Ghost Finder; 10966 The Ghost Pirates; 10002 The House on the Borderland
"""  # author: number at Project Gutenberg and title; ...


def get_flags():
    show = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show, usage=argparse.SUPPRESS)
    add, here = parser.add_argument, os.path.join(os.path.dirname(os.path.abspath(__file__)), "horror")
    mirror = os.environ.get("GUTENBERG_MIRROR") or "https://gutenberg.pglaf.org"
    add("--out", default=here, help="the folder where the books go (default: %(default)s)")
    add("--mirror", default=mirror, help="where the folder cache/epub is found (default: %(default)s)")
    add("--pause", type=float, default=2.0, help="seconds between two downloads (default: %(default)s)")
    add("--timeout", type=float, default=300, help="seconds that a book may take (default: %(default)s)")
    return parser.parse_args()


def fail(message, code=1):
    print(f"horror.py: {message}; the same command goes on", file=sys.stderr, flush=True)
    os._exit(code)  # also from another thread, and wherever a download hangs


def fetch(url, timeout):
    """The file at an address, in bytes. When it takes longer than `timeout` seconds, the script ends."""
    clock = threading.Timer(timeout, fail, [f"{url}: takes longer than --timeout"])
    clock.start()
    data, headers = b"", {"User-Agent": "horror.py"}  # a server may want to know who asks
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code != 404:  # the other books may be there, and unpack() will see that this is none
            response.raise_for_status()
        for piece in response.iter_content(2**16):
            data += piece
            if len(data) > 2**25:
                raise ValueError(f"{url}: longer than any book")
    clock.cancel()
    return data


def unpack(data, number):
    """The text of a book without what Project Gutenberg writes above and below it; ValueError for any other file."""
    text = data.decode("utf-8-sig", "replace").replace("\r\n", "\n")
    start = re.search(r"^\*\*\* ?START OF TH(E|IS) PROJECT GUTENBERG EBOOK[^*]*\*\*\*", text, re.M)
    if not start or not re.search(rf"\[e-?(book|text) #{number}\]", text[: start.start()], re.I):
        raise ValueError(f"not Project Gutenberg's book {number}, but: {text[:60]!r}")
    text = text[start.end() :]
    end = re.search(r"^[^\w\n]*(the )?end of (the |this )?project gutenberg", text, re.M | re.I)
    if not end:
        raise ValueError("cut short: it has no line *** END OF THE PROJECT GUTENBERG EBOOK")
    return text[: end.start()]


def unwrap(paragraph):
    """A paragraph as one line, unless its lines are short, as those of verse and letters are."""
    lines = [line.strip() for line in paragraph.strip().split("\n")]
    text = "\n".join(lines)
    if max(map(len, lines)) >= 56:
        text = re.sub(r"(?<=[-—])\n|\n(?=--|—)", "", text).replace("\n", " ")
    return re.sub(r"(?<!\w)_([^_]+)_(?!\w)", r"\1", text)  # _italics_


def stories(text):
    """The stories or chapters of a book, without headings.

    Three empty lines and then a short paragraph: so Project Gutenberg's volunteers begin one. What has less than 1,000
    characters of prose is a title page, a table of contents, ... A book that would lose more than a tenth stays whole.
    """
    text = re.sub(r"^ *\[(Illustration|Transcriber|Footnote)[^\]]*\]|\[\d+\]", "", text, flags=re.M)
    pieces = [[]]
    for part in re.split(r"\n(?: *\n){3,}", text.strip()):
        paragraphs = [unwrap(paragraph) for paragraph in re.split(r"\n(?: *\n)+", part)]
        if len(paragraphs[0]) < 100:
            pieces.append([])
        pieces[-1] += paragraphs
    found, whole = [], "\n\n".join(sum(pieces, []))
    for paragraphs in pieces:
        while paragraphs and len(paragraphs[0]) < 100 and (paragraphs[0].isupper() or paragraphs[0][-1:].isalnum()):
            del paragraphs[0]  # a heading
        if sum(len(paragraph) for paragraph in paragraphs if len(paragraph) >= 100) >= 1000:
            found.append("\n\n".join(paragraphs))
    return found if sum(map(len, found)) >= 0.9 * len(whole) else [whole]


def main():
    flags = get_flags()
    os.makedirs(flags.out, exist_ok=True)
    wrong = 0
    for line in BOOKS.strip().split("\n"):
        author, books = line.split(": ")
        for book in books.split("; "):
            number, title = book.split(" ", 1)
            name = "_".join(re.findall(r"\w+", f"{author} {title}".lower().replace("'", "")))
            path = os.path.join(flags.out, f"{name}.txt")
            if os.path.exists(path):
                continue
            time.sleep(flags.pause)
            data = fetch(f"{flags.mirror.rstrip('/')}/cache/epub/{number}/pg{number}.txt", flags.timeout)
            try:
                text = "\n<|endoftext|>\n".join(stories(unpack(data, number))) + "\n"
            except ValueError as error:  # the others may be right
                print(f"pg{number}.txt, {title}: {error}", file=sys.stderr)
                wrong += 1
                continue
            with open(f"{path}.{os.getpid()}.tmp", "wb") as f:  # another run may write it, too
                f.write(text.encode())
            os.replace(f.name, path)
            print(path, flush=True)
    if wrong:
        fail(f"{wrong} books were not to be had")
    print(f"{flags.out}: all books are there; data/prepare.py makes one text of them, or shards")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Exception as error:  # a server that misbehaves leads to nearly any
        fail(error, 2 if isinstance(error, (PermissionError, FileExistsError, NotADirectoryError)) else 1)
