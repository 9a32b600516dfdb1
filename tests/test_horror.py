"""data/horror.py on invented books in the forms that Project Gutenberg has used since 1991, from a server of ours."""

import http.server
import os
import pathlib
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types

import pytest
import requests

import data.horror as script

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORDS = "the a of and cellar lantern moor whisper grave it had been cold fog stair came went slowly toward door "
WORDS = (
    WORDS + "candle nothing someone behind glass Mr. Ashdown's hand knocked thrice until never again by night"
).split()


def prose(seed, words=300):
    """Paragraphs of invented sentences."""
    rng, text = random.Random(seed), []
    for _ in range(words // 60):
        sentences = [" ".join(rng.choices(WORDS, k=15)).capitalize() + "." for _ in range(4)]
        text.append(" ".join(sentences))
    return text


def wrapped(paragraphs, width=72):
    return "\n\n".join(textwrap.fill(p, width, break_on_hyphens=False) for p in paragraphs)


CHAPTERS = [prose(1), prose(2, 600), prose(3)]
STORIES = ["\n\n".join(chapter) for chapter in CHAPTERS]
BODY = "\n\n\n\n\n".join(
    ["TITLE\n\nBY\n\nA. N. AUTHOR", "CONTENTS\n\n  I. The Stair   1\n  II. The Moor   23\n  III. The Glass   57"]
    + [f"CHAPTER {i}\n\nThe {x} Thing\n\n\n{wrapped(c)}" for i, x, c in zip("I II III".split(), "AVE", CHAPTERS)]
)
LICENCE = "Section 1. General Terms of Use and Redistributing Project Gutenberg electronic works\n" * 40
NOW = """\ufeffThe Project Gutenberg eBook of TITLE

This ebook is for the use of anyone anywhere in the United States and

Title: TITLE

Author: A. N. Author

Release date: October 1, 1993 [eBook #84]
                Most recently updated: February 10, 2026

Credits: Some volunteers


*** START OF THE PROJECT GUTENBERG EBOOK TITLE ***

BODY




*** END OF THE PROJECT GUTENBERG EBOOK TITLE ***



Updated editions will replace the previous one--the old editions will be renamed.
LICENCE"""
OF_2006 = """The Project Gutenberg EBook of TITLE, by A. N. Author

This eBook is for the use of anyone anywhere at no cost and with


Title: TITLE

Author: A. N. Author

Release Date: May 1, 2006 [EBook #84]

*** START OF THIS PROJECT GUTENBERG EBOOK TITLE ***




Produced by Some Volunteers and the Online
Distributed Proofreading Team at http://www.pgdp.net





BODY




End of the Project Gutenberg EBook of TITLE, by A. N. Author

*** END OF THIS PROJECT GUTENBERG EBOOK TITLE ***

***** This file should be named 84.txt or 84.zip *****
LICENCE"""
OF_2003 = """Project Gutenberg's TITLE, by A. N. Author

Copyright laws are changing all over the world. Be sure to check the

Title: TITLE

Character set encoding: ISO-8859-1

***START OF THE PROJECT GUTENBERG EBOOK TITLE
AND WHAT ELSE WAS
FOUND THERE***


E-text prepared by Some Volunteers



BODY



End of Project Gutenberg's TITLE, by A. N. Author

***END OF THE PROJECT GUTENBERG EBOOK***
LICENCE
*END THE SMALL PRINT! FOR PUBLIC DOMAIN EBOOKS*
"""
OF_1993 = """*****The Project Gutenberg Etext of TITLE by A. N. Author*****

Please take a look at the important information in this header.

***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***
LICENCE
*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*




BODY



End of The Project Gutenberg Etext of TITLE


"""


def file(title, form=NOW, newline="\r\n", encoding="utf-8"):
    text = form.replace("BODY", BODY).replace("LICENCE", LICENCE).replace("TITLE", title)
    return text.replace("\n", newline).encode(encoding)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        number = int(re.fullmatch(r"/mirror/cache/epub/(\d+)/pg\1\.txt", self.path)[1])
        asked, server = self.headers["Range"], self.server
        server.asked.append((number, asked))
        server.agents.add(self.headers["User-Agent"])
        status, body = 200, server.special.get(number, lambda: file(server.titles[number]))
        body = body() if callable(body) else body
        if isinstance(body, list):  # a status each time
            status, body = body.pop(0) if len(body) > 1 else body[0], b"sorry"
        if asked and status == 200:
            status, body = 206, body[int(asked[6:-1]) :]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = server.cuts.pop(number, None)
        self.wfile.write(body[:cut])
        if cut:
            server.free.wait(60)  # cut off now, or left hanging
            self.close_connection = True

    def log_message(self, *arguments):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        pass  # a client that has gone


@pytest.fixture
def server(monkeypatch):
    server = Server(("127.0.0.1", 0), Handler)
    server.titles = {number: title for number, _, title in script.BOOKS}
    server.asked, server.agents, server.special, server.cuts, server.free = [], set(), {}, {}, threading.Event()
    server.free.set()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("GUTENBERG_MIRROR", f"http://127.0.0.1:{server.server_port}/mirror/")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.free.set()
    server.shutdown()
    server.server_close()


def run(*arguments, code=0, pause=0, **settings):
    command = [sys.executable, str(ROOT / "data" / "horror.py"), "--pause", str(pause), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, **settings)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def three(server, monkeypatch, tmp_path, capsys):
    """A run in this process, of three books, that does not sleep; returns its exit code, stderr and sleeps."""

    def go(*arguments):
        waits.clear()
        monkeypatch.setattr(sys, "argv", ["horror.py", "--out", str(tmp_path), *arguments])
        try:
            script.main()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err, list(waits)

    waits = []
    monkeypatch.setattr(script, "time", types.SimpleNamespace(sleep=waits.append, perf_counter=time.perf_counter))
    monkeypatch.setattr(script, "BOOKS", script.BOOKS[:3])
    monkeypatch.setattr(requests.utils, "default_user_agent", requests.utils.default_user_agent)  # put back at the end
    return go


def books(folder):
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.txt")}


TEXT = "\n<|endoftext|>\n".join(STORIES) + "\n"


def test_the_books_arrive_and_the_commands_it_prints_work(server, tmp_path):
    out = tmp_path / "new" / "horror"
    done = run("--out", out)
    assert set(books(out).values()) == {TEXT} and len(books(out)) == len(script.BOOKS) >= 25
    assert [number for number, _ in server.asked] == [number for number, _, _ in script.BOOKS]
    assert len(server.agents) == 1 and "horror.py" in server.agents.pop()
    text, shards = [line for line in done.stdout.splitlines() if line.startswith("python ")]
    for command, name in ((text, "horror.txt"), (shards, "horror_train_000001.bin")):
        said = subprocess.check_output(["bash", "-c", f"{shlex.quote(sys.executable)}{command.removeprefix('python')}"])
        assert (
            f"documents: {3 * len(script.BOOKS)} " in said.decode().replace(",", " ") and (out.parent / name).exists()
        )
    assert (out.parent / "horror.txt").read_text() == "<|endoftext|>\n".join([TEXT] * len(script.BOOKS))
    server.asked.clear()
    first = out / script.name(*script.BOOKS[0][1:])
    first.unlink()
    (out / script.name(*script.BOOKS[1][1:])).write_text("mine now")
    run("--out", out)
    assert server.asked == [] and first.read_text() == TEXT and sorted(books(out).values())[-1] == "mine now"


@pytest.mark.parametrize("form", [NOW, OF_2006, OF_2003, OF_1993])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_headers_and_footers_of_all_times(form, newline):
    for title in ("The Fog", "Mr. Ashdown's Stair; or, The Moor", "At Night: Six Tales"):
        text = script.unpack(file(title, form, newline), title)
        assert script.stories(text) == STORIES and "FOUND THERE" not in text and "Project Gutenberg" not in text


def test_old_files_are_not_utf_8():
    data = file(
        "Ænigma", OF_2006.replace("BODY", f"THE FOG\n\n“Déjà vu”--naïve.\n\n{wrapped(CHAPTERS[0])}"), encoding="cp1252"
    )
    assert script.stories(script.unpack(data, "Ænigma"))[0].startswith("“Déjà vu”--naïve.\n\n")


@pytest.mark.parametrize(
    "wanted, found",
    [
        ("Frankenstein", "Frankenstein; or, the modern prometheus"),
        ("Frankenstein", "Frankenstein\n        or, The Modern Prometheus"),
        ("The Works of Edgar Allan Poe, Volume 1", "The Works of Edgar Allan Poe — Volume 1"),
        ("The Works of Edgar Allan Poe, Volume 1", "The Works of Edgar Allan\n       Poe, Volume 1 (of 5)"),
        ("The Strange Case of Dr. Jekyll and Mr. Hyde", "Strange Case Of Dr Jekyll and Mr Hyde"),
        ("Can Such Things Be?", "Can Such Things Be?"),
        ("The Three Impostors", "The Three Impostors or The Transmutations"),
        ("Dracula's Guest", "Dracula’s Guest"),
        ('The Boats of the "Glen Carrig"', "The Boats of the “Glen Carrig”: Being an account"),
    ],
)
def test_a_title_may_be_spelt_in_another_way(wanted, found):
    script.unpack(file("X").replace(b"Title: X", f"Title: {found}".encode()), wanted)


@pytest.mark.parametrize(
    "wanted, found",
    [
        ("Dracula", "Dracula's Guest"),
        ("Dracula", "Dracula’s Guest"),
        ("Dracula", "The Death of Dracula"),
        ("The Monk", "The Monk of Hambleton"),
        ("The Watcher", "The Watcher by the Threshold"),
        ("Ghost Stories of an Antiquary", "Ghost Stories of an Antiquary Part 2: More Ghost Stories"),
        ("The Works of Edgar Allan Poe, Volume 1", "The Works of Edgar Allan Poe — Volume 10"),
        ("Hauntings", "\n\nAuthor: Hauntings"),
    ],
)
def test_another_book_is_refused(wanted, found):
    with pytest.raises(ValueError, match="^not ") as error:
        script.unpack(file("X").replace(b"Title: X", f"Title: {found}".encode()), wanted)
    assert wanted in str(error.value).replace("\\", "") and found.split("\n")[0] in str(error.value)


def test_what_cannot_be_had_is_named_and_the_others_go_on(server, tmp_path):
    good = file("Dracula")
    html = b"<html><head><title>Project Gutenberg</title></head>Are you human?</html>"
    wrong = {
        345: file("Dracula's Guest"),
        84: good,
        43: file(server.titles[43]).split(b"*** END")[0],
        209: b"",
        174: html,
    }
    wrong |= {8492: os.urandom(100_000), 696: b"a b\n" * 10_000_000, 601: [404], 10007: good[:300], 389: b"never asked"}
    server.special.update(wrong)
    done = run("--out", tmp_path, code=1)
    said = done.stderr.splitlines()[-10:]
    for number, reason in (
        (345, "not 'Dracula': its header says \"Title: Dracula's Guest\""),
        (84, "not 'Frankenstein': its header says 'Title: Dracula'"),
        (43, "cut short: it has no line *** END"),
        (209, "not a book of Project Gutenberg's"),
        (174, "not a book of Project Gutenberg's"),
        (8492, "not a book of Project Gutenberg's"),
        (696, "not a book of Project Gutenberg's"),
        (601, "answers 404 Not Found (The Monk)"),
        (10007, "not a book of Project Gutenberg's"),
    ):
        assert sum(f"horror.py: pg{number}.txt: " in line and reason in line for line in said) == 1, done.stderr
    assert said[-1] == f"horror.py: 9 of {len(script.BOOKS)} books were not to be had"
    assert len(server.asked) == len(script.BOOKS) and f"{len(script.BOOKS) - 9} books" in done.stdout
    assert len(books(tmp_path)) == len(os.listdir(tmp_path / "raw")) == len(script.BOOKS) - 9
    assert set(books(tmp_path).values()) == {TEXT}
    server.special.clear()
    run("--out", tmp_path)
    assert len(server.asked) == len(script.BOOKS) + 9 and len(books(tmp_path)) == len(script.BOOKS)


def test_it_waits_between_books_and_asks_again_for_what_was_cut_off(server, three, tmp_path):
    a, b, c = (number for number, _, _ in script.BOOKS)
    server.special[b] = [503, 404]
    server.special[c], server.cuts[c] = file(server.titles[c]) + LICENCE.encode() * 50, 100_000
    code, said, waits = three()
    assert code == 1 and f"pg{b}.txt" in said and waits == [2.0, 1, 2.0, 1]
    assert [number for number, _ in server.asked] == [a, b, b, c, c]
    assert re.fullmatch(r"bytes=[1-9]\d*-", server.asked[-1][1]) and list(books(tmp_path).values()) == [TEXT] * 2
    server.special.clear()
    assert three("--pause", "9")[::2] == (0, []) and len(server.asked) == 6, "there was only one left to ask for"


def test_a_server_that_says_no_is_left_alone(server, three, tmp_path):
    a, b, c = (number for number, _, _ in script.BOOKS)
    for status, times in ((429, 3), (403, 1), (500, 3)):
        server.asked.clear()
        server.special[b] = [status]
        code, said, waits = three("--retries", "2")
        assert code == 1 and said.count("\n") == 2 and len(server.asked) == times + (status == 429)
        assert f"horror.py: pg{b}.txt: 127.0.0.1:{server.server_port} answers {status} " in said and "goes on" in said
    assert len(books(tmp_path)) == 1 and (b, None) in server.asked and c not in dict(server.asked)


def test_no_network(tmp_path, monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for mirror, message in ((url, "is there a network?"), ("nonsense", "nonsense")):
        said = run("--out", tmp_path, "--mirror", mirror, "--retries", 0, code=1).stderr
        assert said.startswith("horror.py: pg") and message in said and said.count("\n") == 1


@pytest.mark.parametrize("name, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_after_a_kill_or_ctrl_c_the_same_command_goes_on(server, tmp_path, name, code):
    (a, *first), (b, *second), *_ = script.BOOKS
    server.free.clear()
    server.special[b] = file(second[1]) + LICENCE.encode() * 50
    server.cuts[b] = 100_000  # and then it hangs
    command = [sys.executable, ROOT / "data" / "horror.py", "--pause", "0", "--out", tmp_path]
    part = tmp_path / "raw" / f"pg{b}.txt.part"
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        end = time.monotonic() + 30
        while not (part.exists() and part.stat().st_size > 0):
            assert time.monotonic() < end, "nothing arrived"
            time.sleep(0.01)
        process.send_signal(name)
        said = process.communicate(timeout=10)[1]
    assert process.returncode == code and list(books(tmp_path)) == [script.name(*first)]
    if name == signal.SIGINT:
        assert said.splitlines()[-1] == "horror.py: interrupted; the same command goes on with what has arrived"
    have = part.stat().st_size
    server.free.set()
    run("--out", tmp_path)
    assert server.asked[:3] == [(a, None), (b, None), (b, f"bytes={have}-")]
    assert set(books(tmp_path).values()) == {TEXT} and len(books(tmp_path)) == len(script.BOOKS)


def test_a_full_disk_leaves_nothing_half_written(server, tmp_path):
    """A limit on the size of files stands in for the full disk: it fails at the same place."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    (number, *book), *_ = script.BOOKS
    said = run("--out", tmp_path, code=1, preexec_fn=limit).stderr
    assert f"pg{number}.txt: File too large; the same command" in said and said.count("\n") == 1
    (tmp_path / "raw" / f"pg{number}.txt").write_bytes(file(book[1]))  # now it is the text that does not fit
    said = run("--out", tmp_path, code=1, preexec_fn=limit).stderr
    assert f"{script.name(*book)}: File too large; the same command" in said.splitlines()[-1]
    assert books(tmp_path) == {} and [path for path in os.listdir(tmp_path) if path != "raw"] == []
    run("--out", tmp_path)
    assert set(books(tmp_path).values()) == {TEXT}


def test_mistakes_get_one_line(server, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (("--pause", -1), "--pause"),
        (("--retries", "x"), "--retries"),
        (("--out", tmp_path / "file"), "--out"),
        (("--out", tmp_path / "file" / "x"), "--out"),
        (("--out", "/proc"), "--out"),  # where not even root can write
        (("84",), "84"),
    ):
        done = run(*arguments, code=2)
        assert done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    assert server.asked == [] and "(default: 2.0)" in run("--help").stdout


@pytest.mark.parametrize("width", [64, 70, 72, 76])
@pytest.mark.parametrize("indent", ["", "      "])
def test_lines_that_a_program_wrapped_are_joined(width, indent):
    """textwrap, of Python's library, breaks the lines."""
    for seed in range(10):
        for paragraph in prose(seed):
            lines = textwrap.wrap(paragraph, width, initial_indent=indent, subsequent_indent=indent)
            assert script.join(lines) == paragraph


def test_breaks_that_are_meant_stay():
    verse = ["Slow o'er the moor the lantern went,", "And slow the stair it climbed by night;", "Then nothing."]
    assert script.join(verse) == "\n".join(verse)
    ballad = ["    The fog came down upon the moor,", "      And nobody had seen it come;", "    The glass"]
    assert script.join(ballad) == "The fog came down upon the moor,\n  And nobody had seen it come;\nThe glass"
    letter = [
        "The Cellar,",
        "Cold Moor, 3 May",
        "Never open the door of the cellar again, whatever knocks; there is a candle",
        "x",
    ]
    assert script.join(letter) == f"The Cellar,\nCold Moor, 3 May\n{letter[2]} x"
    first = [
        "    An old file has its first lines indented, as printed books have, and the",
        "others begin at the margin.",
    ]
    assert script.join(first) == f"{first[0].strip()} {first[1]}"


def test_italics_dashes_and_spaces():
    lines = [
        "The knocking that had been so long in coming, _every night of",
        "that cold May_, came again  from somewhere  down below--",
        "from the cellar--and nobody of all who sat there went to-",
        "morrow or that night; for a _grave_, we all knew, is _deep_",
        "--and cold.",
    ]
    assert script.join(lines) == (
        "The knocking that had been so long in coming, every night of that cold May, came again from somewhere down "
        "below--from the cellar--and nobody of all who sat there went to-morrow or that night; for a grave, "
        "we all knew, is deep--and cold."
    )
    assert script.join(["   *       *       *"]) == "* * *"
    assert script.join(["Mr. B____ of C___"]) == "Mr. B____ of C___"


def test_what_is_no_story_is_left_out():
    a, b = wrapped(CHAPTERS[0]), wrapped(CHAPTERS[1] * 4)
    one, two = STORIES[0], "\n\n".join([STORIES[1]] * 4)
    text = f"This etext was produced by Some Volunteers.\n\n{a}\n\n[Illustration: A stair,\nand a lantern]\n\n{b}"
    assert script.stories(text) == [f"{one}\n\n{two}"]
    text = f"THE MOOR\n\n[Transcriber's Note: No copyright\nrenewal was found.]\n\n\n{a}[1]\n\n\n\n[1] Moor.\n\n\n\n{b}"
    assert script.stories(text) == [f"{one}\n\n{two}"]
    text = f"{b}\n\n\nII\n\n\n{a}\n\n\n\nThe Glass\n\n{b}\n\n\n\n\nFOOTNOTES:\n\n{a}"
    assert script.stories(text) == [f"{two}\n\nII\n\n{one}", two], "after two empty lines it is a section"


def test_a_book_laid_out_in_another_way_stays_whole():
    lines = "\n\n".join(f"A. Short line {i}." for i in range(1000))
    assert script.stories(lines) == [lines]
    parts = "\n\n\n\n".join(f"Part {i}\n\n{wrapped(prose(i, 120))}" for i in range(20))
    assert script.stories(parts) == ["\n\n".join(f"Part {i}\n\n" + "\n\n".join(prose(i, 120)) for i in range(20))]


def test_the_list():
    numbers, names = [number for number, _, _ in script.BOOKS], [script.name(*book) for _, *book in script.BOOKS]
    assert f"Download {len(names)} public-domain" in script.__doc__
    assert len(set(numbers)) == len(set(names)) == len(names) and names == sorted(names)
    assert all(re.fullmatch(r"[a-z0-9_]+\.txt", name) for name in names)
