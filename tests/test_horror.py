"""data/horror.py on invented books in the form of Project Gutenberg's, from the server of test_fineweb.py."""

import functools
import pathlib
import re
import textwrap
import time

import pytest
from test_fineweb import HOSTILE, run, server  # noqa: F401

import data.horror as script

ROOT = pathlib.Path(__file__).resolve().parent.parent
BOOKS = dict(re.findall(r"(\d+) ([^;\n]+)", script.BOOKS))
TALES = (ROOT / "data" / "tales.txt").read_text(encoding="utf-8")
STORIES = [tale.replace("\n", "\n\n") for tale in TALES.split("\n<|endoftext|>\n")[:3]]


def wrapped(story):
    return re.sub(r".+", lambda line: textwrap.fill(line[0], 72, break_on_hyphens=False), story)


PARTS = ["\ufeffTitle: TITLE\n\nRelease date: 1993 [eBook #NUMBER]", "*** START OF THE PROJECT GUTENBERG EBOOK X ***"]
PARTS += ["TITLE\n\nBY\n\nA. N. AUTHOR", *[f"CHAPTER\n\nThe Thing\n\n\n{wrapped(story)}" for story in STORIES]]
PARTS += ["*** END OF THE PROJECT GUTENBERG EBOOK X ***", "Section 1. General Terms of Use\n" * 40]


def file(number):
    return (
        "\n\n\n\n\n".join(PARTS)
        .replace("TITLE", BOOKS[number])
        .replace("NUMBER", number)
        .replace("\n", "\r\n")
        .encode()
    )


def path(number):
    return f"/mirror/cache/epub/{number}/pg{number}.txt"


@pytest.fixture
def go(server, monkeypatch):  # noqa: F811
    server.files = {path(number): file(number) for number in BOOKS}
    monkeypatch.setenv("GUTENBERG_MIRROR", f"{server.url}/mirror/")
    return functools.partial(run, "--pause", 0, name="horror.py")


def test_the_books_arrive_and_are_then_passed_over(server, go, tmp_path):  # noqa: F811
    assert "all books" in go("--out", tmp_path / "new")
    assert [asked for asked, _ in server.asked] == list(server.files) and len(BOOKS) == 42
    texts = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "new").iterdir()}
    assert len(texts) == 42 and set(texts.values()) == {"\n<|endoftext|>\n".join(STORIES) + "\n"}
    (tmp_path / "new" / "bram_stoker_draculas_guest.txt").unlink()
    go("--out", tmp_path / "new")
    assert [asked for asked, _ in server.asked[42:]] == [path("10150")]


def test_what_is_not_the_book_is_named_and_the_others_go_on(server, go, tmp_path):  # noqa: F811
    wrong = {"345": file("10150"), "43": file("43").split(b"*** END")[0], "209": b"", "601": None}
    wrong |= {"174": b"<title>Project Gutenberg</title>Are you human?", "696": bytes(range(256)) * 10_000}
    server.files |= {path(number): body for number, body in wrong.items()}
    del server.files[path("601")]
    *said, last, _ = go("--out", tmp_path, code=1, lines=7).split("\n")
    assert {re.match(r"pg(\d+)\.txt, ", line)[1] for line in said} == set(wrong) and "6 books" in last
    assert "cut short" in next(line for line in said if "pg43.txt" in line)
    server.files |= {path(number): file(number) for number in wrong}
    go("--out", tmp_path)
    assert len(server.asked) == 42 + 6 and len(list(tmp_path.iterdir())) == 42


@pytest.mark.parametrize("odd", HOSTILE[1:3] + HOSTILE[5:8] + HOSTILE[-2:], ids=str)
def test_servers_that_never_deliver_end_in_one_line(server, go, tmp_path, odd):  # noqa: F811
    second, began = list(BOOKS)[1], time.monotonic()
    server.odd = {f"pg{second}.txt": odd, "": odd}
    assert go("--out", tmp_path, "--timeout", 2, code=1).startswith("horror.py: ")
    assert time.monotonic() - began < 10 and path(second) == server.asked[1][0]


def test_lines_that_a_program_wrapped_are_joined_and_verse_stays():
    for paragraph in STORIES[0].split("\n\n"):
        for width in (64, 70, 76):
            assert script.unwrap(textwrap.fill(paragraph, width, initial_indent="    ")) == paragraph
    verse = ["Slow o'er the moor the lantern went,", "And slow the stair it climbed by night;", "Then nothing."]
    assert script.unwrap("\n".join(f"  {line}" for line in verse)) == "\n".join(verse)
    lines = "The knocking that had been so long in coming, _every night of\nMay_, came again down below--\nfrom there"
    assert script.unwrap(lines) == lines.replace("_", "").replace("--\n", "--").replace("\n", " ")


def test_what_is_no_story_is_left_out():
    one, two = STORIES[0], "\n\n".join(STORIES[1:])
    a, b = wrapped(one), wrapped(two)
    text = f"THE MOOR\n\n[Transcriber's Note: No copyright\nrenewal was found.]\n\n\n\n{a}[1]\n\n\n\nNOTES\n\n\n\n{b}"
    assert script.stories(text) == [one, two]
    text = f"{b}\n\n\nII\n\n\n{a}\n\n\n\nThe Glass\n\n{b}"
    assert script.stories(text) == [f"{two}\n\nII\n\n{one}", two], "after two empty lines it is a section"
    lines = "\n\n".join(f"A. Short line {i}." for i in range(1000))
    assert script.stories(lines) == [lines], "a book laid out in another way stays whole"
