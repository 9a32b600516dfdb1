"""rank.py as a user runs it: over real HTTP against llmock and a server that fails in every way, killed, interrupted,
offline against transformers, and in a terminal."""

import collections
import contextlib
import email.utils
import fcntl
import fractions
import http.server
import importlib.util
import io
import json
import math
import os
import pathlib
import pty
import random
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from test_model import as_nanochat

import rank as script

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEY = "sk-test-0123456789"
PRICE = 2.5e-6, 10e-6  # of gpt-4o, per token
STORY = re.compile(r"night (s\d+) with a fear of (\d+)")
PROMPT = "It was a dark and stormy night"


def write_stories(path, count, fears=None, **more):
    chance = random.Random(count)
    fears = fears or chance.sample(range(1000), count)
    rows = [dict(id=f"s{i}", prompt=PROMPT, text=f"{PROMPT} s{i} with a fear of {x}.") for i, x in enumerate(fears)]
    rows = [{**row, "tokens": 300, "seed": 7, "checkpoint": "ckpt.pt", **more} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {row["id"]: row for row in rows}


class Judge(http.server.ThreadingHTTPServer):
    """A server of chat completions that names the story with the most fear, after what `faults` do instead."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.latency, self.reply, self.usage = 0.0, None, None
        self.asked, self.faults, self.lock = [], collections.deque(), threading.Lock()
        self.busy = self.busiest = self.connections = 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def process_request(self, *connection):
        self.connections += 1
        super().process_request(*connection)

    def handle_error(self, *_):  # a client that was killed
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def do_POST(self):
        judge, arrived = self.server, time.monotonic()
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        self.body = json.loads(raw)
        self.content = self.body["messages"][-1]["content"]
        shown = STORY.findall(self.content)
        with judge.lock:
            judge.asked.append(dict(ids=tuple(i for i, _ in shown), body=self.body, headers=self.headers, time=arrived))
            judge.asked[-1]["path"] = self.path
            judge.busy += 1
            judge.busiest = max(judge.busiest, judge.busy)
            fault = judge.faults.popleft() if judge.faults else None
        time.sleep(judge.latency)
        with judge.lock:
            judge.busy -= 1
        if fault:
            return fault(self)
        fears = [int(fear) for _, fear in shown]
        place = "ABCD"[fears.index(max(fears))]
        self.say(judge.reply(shown) if judge.reply else f"BEST_ANSWER:[{place}]\nREASONING:[a fear of {max(fears)}]")

    def say(self, text, **message):
        """A chat completion, with the usage that the test has set or a likely one."""
        usage = self.server.usage or dict(prompt_tokens=len(self.content) // 4, completion_tokens=20)
        choice = dict(index=0, message=dict(role="assistant", content=text, **message), finish_reason="stop")
        self.send(200, dict(id="x", object="chat.completion", choices=[choice], usage=usage))

    def send(self, status, data, length=None, **headers):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)
        self.close_connection |= length is not None

    def log_message(self, *_):
        pass


@pytest.fixture
def judge():
    server = Judge()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Everything runs in a folder of its own, with a key, and does not wait for long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return tmp_path


@pytest.fixture
def rank(capsys, monkeypatch, judge):
    """Calls rank.py in this process: (exit code, stdout, the lines of stderr). Later flags win."""

    def call(*flags, stories="stories.jsonl"):
        flags = ["rank.py", stories, "--base_url", judge.url, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, flags)))
        script.progress.next = time.perf_counter() + 60
        code = 0
        try:
            script.run(script.main)
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        assert KEY not in said.out + said.err and "Traceback" not in said.err
        for file in pathlib.Path().rglob("*"):
            assert file.is_dir() or KEY.encode() not in file.read_bytes(), file
        return code, said.out, said.err.splitlines()

    return call


def lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def answers(path="ranked.jsonl"):
    """The answers of a run: {(group, vote): [rows]}, unreadable ones too."""
    found = collections.defaultdict(list)
    for row in lines(f"{path}.answers"):
        if "best" in row:
            found[row["group"], row["vote"]].append(row)
    return found


def assert_right(stories, path="ranked.jsonl", best="best.jsonl", size=4):
    """The files hold every group, the one with the most fear the best."""
    rows, ids = lines(path), list(stories)
    assert [row["group"] for row in rows] == list(range(-(-len(ids) // size)))
    winners = []
    for row in rows:
        group = ids[row["group"] * size : row["group"] * size + size]
        assert sorted(story["id"] for story in row["stories"].values()) == sorted(group)
        assert list(row["stories"]) == list("ABCD"[: len(group)])
        for story in row["stories"].values():
            assert story == {key: stories[story["id"]][key] for key in ("id", "prompt", "text")}
        fears = {i: int(STORY.search(stories[i]["text"])[2]) for i in group}
        winners.append(row["stories"][row["best"]]["id"])
        assert winners[-1] == max(fears, key=fears.get)
    assert lines(best) == [stories[i] for i in winners]


# --- against llmock, which judges its clients ---

GOOD = "BEST_ANSWER:[B]\nREASONING:[It is quiet.]"


def scripted(llmock, *behaviours):
    llmock.reply(GOOD, times=None)
    return ["--base_url", llmock.base_url(), "--votes", 1, "--timeout", 1]


def test_refusals_and_delays_are_outwaited_as_they_should_be(rank, llmock, monkeypatch):
    stories = write_stories(pathlib.Path("stories.jsonl"), 12)
    flags = scripted(llmock)
    llmock.rate_limit(times=1, retry_after=0.7).fail(500, times=1).delay(2, times=1)
    code, out, _ = rank(*flags)
    assert code == 0 and "3 of 3 groups" in out
    llmock.assert_resilient(strict=True)
    failed = [row["failed"] for row in lines("ranked.jsonl.answers") if "failed" in row]
    assert sorted(failed, key=str) == [429, 500, None]
    assert len(llmock.requests) == 6 and " 6 requests" in out
    rows = lines("ranked.jsonl")
    assert [row["best"] for row in rows] == ["B"] * 3 and rows[0]["reasoning"] == "It is quiet."
    assert lines("best.jsonl") == [stories[row["stories"]["B"]["id"]] for row in rows]
    used = [request.body for request in llmock.requests if request.status == 200]
    tokens = sum(row["usage"]["prompt_tokens"] for row in rows)
    assert tokens > 300 and len(used) == 3 + 1  # the delayed answer went to nobody
    assert {key: used[0][key] for key in ("model", "temperature", "max_tokens")} == {
        "model": "gpt-4o",
        "temperature": 0,
        "max_tokens": 500,
    }


def test_a_judge_that_always_says_the_same_place_is_not_hidden(rank, llmock):
    write_stories(pathlib.Path("stories.jsonl"), 24)
    flags = scripted(llmock)
    code, out, _ = rank(*flags, "--votes", 2)
    assert code == 0 and "agreement: 0% of 6 pairs of votes; by chance 25%" in out
    assert "A 0%, B 100%, C 0%, D 0% of 18 votes; by chance 25% each" in out and "WARNING: B won 18 of 18 times" in out
    assert "undecided, votes split: groups 0, 1, 2, 3, 4, 5" in out
    assert [row["best"] for row in lines("ranked.jsonl")] == [None] * 6 and lines("best.jsonl") == []


@pytest.mark.parametrize("status, hint", [(401, "OPENAI_API_KEY"), (403, "key"), (404, "--base_url"), (429, "credit")])
def test_what_no_patience_helps_against_ends_it_at_once(rank, llmock, monkeypatch, status, hint):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_stories(pathlib.Path("stories.jsonl"), 80)
    flags = scripted(llmock)
    llmock.fail(status, times=None, message=f"Not with {KEY}!", code="insufficient_quota" if status == 429 else None)
    code, out, said = rank(*flags)
    assert code == 2 and len(llmock.requests) == 1
    assert f"answers {status} (Not with [key]!)" in said[-1] and hint in said[-1] and "20 groups are left" in said[-1]
    assert not pathlib.Path("ranked.jsonl").exists() and not pathlib.Path("best.jsonl").exists()
    llmock.reset()
    assert rank(*scripted(llmock), "--model", "gpt-4o-mini")[0] == 0  # nothing was answered: other settings may follow


def test_what_a_model_refuses_is_learnt_once(rank, llmock):
    write_stories(pathlib.Path("stories.jsonl"), 16)
    flags = scripted(llmock)
    unknown = (
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    )
    fixed = "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) is supported."
    llmock.fail(400, message=unknown).fail(400, message=fixed)
    assert rank(*flags, "--retries", 0)[0] == 0
    bodies = [request.body for request in llmock.requests]
    assert len(bodies) == 2 + 4 and {"max_tokens", "temperature"} < set(bodies[0])
    llmock.reset()
    assert rank(*scripted(llmock), "--votes", 2, "--retries", 0)[0] == 0  # another run
    for body in bodies[2:] + [request.body for request in llmock.requests]:
        assert set(body) == {"model", "messages", "max_completion_tokens"} and body["max_completion_tokens"] == 500


# --- what is asked ---


def test_every_group_is_asked_for_twice_in_reversed_order(rank, judge):
    stories = write_stories(pathlib.Path("stories.jsonl"), 40)
    code, out, _ = rank("--concurrency", 4)
    assert code == 0 and len(judge.asked) == 20
    assert_right(stories)
    groups = collections.defaultdict(list)
    for asked in judge.asked:
        groups[frozenset(asked["ids"])].append(asked["ids"])
    assert all(a == b[::-1] for a, b in groups.values()) and len(groups) == 10
    assert len({tuple(int(i[1:]) % 4 for i in a) for a, _ in groups.values()}) > 3, "labelled by lot"
    for (_, vote), [row] in answers().items():
        assert row["order"] == ("ABCD", "DCBA")[vote] and row["best"] == row["order"]["ABCD".index(row["answer"])]
    assert 1 < judge.busiest <= 4 and judge.connections <= 4
    assert "agreement: 100% of 10 pairs of votes; by chance 25%" in out and "WARNING" not in out
    read, written = (
        sum(row["usage"][key] for row in lines("ranked.jsonl")) for key in ("prompt_tokens", "completion_tokens")
    )
    assert written == 400
    assert f"20 requests, {read:,} tokens in, 400 out, at most ${read * PRICE[0] + written * PRICE[1]:.4f}" in out
    body, headers = judge.asked[0]["body"], judge.asked[0]["headers"]
    assert judge.asked[0]["path"] == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert "BEST_ANSWER:[X]\nREASONING:[" in body["messages"][1]["content"]


def test_stories_of_one_opening_come_together():
    stories = [dict(id=i, prompt="AB"[i % 2]) for i in range(10)]
    groups = [sorted(story["id"] for story in group.values()) for group in script.make_groups(stories, 1)]
    assert groups == [[0, 2, 4, 6], [1, 3, 5, 8], [7, 9]]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_orders_give_every_story_every_place(n):
    votes = [script.order_of(1, 5, vote, n) for vote in range(3 * n)]
    assert all(sorted(order) == list("ABCD"[:n]) for order in votes) and votes[0] == "ABCD"[:n]
    for square in range(0, 3 * n, n):
        assert all(len(set(column)) == n for column in zip(*votes[square : square + n]))
    if n == 4:
        follows = collections.Counter(pair for order in votes[:4] for pair in zip(order, order[1:]))
        assert set(follows.values()) == {1} and len(follows) == 12
        assert len({script.order_of(1, g, 4, 4) for g in range(20)}) > 5
    assert votes == [script.order_of(1, 5, vote, n) for vote in range(3 * n)]


def test_a_tie_is_broken_by_one_more_vote(rank, judge):
    stories = write_stories(pathlib.Path("stories.jsonl"), 24)
    firsts = set()

    def reply(shown):
        """Groups in which s0, s4, s8 stand: the first place, at first; then the truth."""
        ids = frozenset(i for i, _ in shown)
        fears = [int(x) for _, x in shown]
        right = "ABCD"[fears.index(max(fears))]
        wrong = "A" if right != "A" else "B"
        if ids & {"s0", "s4", "s8"} and ids not in firsts:
            firsts.add(ids)
            return f"BEST_ANSWER:[{wrong}]"
        return f"BEST_ANSWER:[{right}]"

    judge.reply = reply
    code, out, _ = rank()
    assert code == 0 and len(judge.asked) == 12 + 3
    assert_right(stories)
    assert "agreement: 50% of 6 pairs of votes" in out
    extra = [key for key in answers() if key[1] == 2]
    assert sorted(extra) == [(0, 2), (1, 2), (2, 2)] and answers()[0, 2][0]["order"] == "BDAC"
    assert [len(row["votes"]) for row in lines("ranked.jsonl")] == [3, 3, 3, 2, 2, 2]
    split = lines("ranked.jsonl")[0]
    assert sum(vote["best"] == split["best"] for vote in split["votes"]) == 2


def test_the_reasoning_is_that_of_a_vote_for_the_winner(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 4)
    replies = iter("BDC")  # of ABCD, DCBA, BDAC
    judge.reply = lambda shown: f"BEST_ANSWER:[{(place := next(replies))}]\nREASONING:[said of place {place}]"
    assert rank("--concurrency", 1)[0] == 0
    [row] = lines("ranked.jsonl")
    assert row["best"] == "A" and row["reasoning"] == "said of place D (this vote was shown DCBA as ABCD)"
    assert [(vote["order"], vote["answer"], vote["best"]) for vote in row["votes"]] == [
        ("ABCD", "B", "B"),
        ("DCBA", "D", "A"),
        ("BDAC", "C", "A"),
    ]


def test_last_groups_may_be_smaller(rank, judge):
    for count, words in ((7, "the last group has 3"), (6, "the last group has 2"), (5, "'s4', has none")):
        stories = write_stories(pathlib.Path("stories.jsonl"), count)
        name, before = f"{count}.jsonl", len(judge.asked)
        code, out, said = rank("--out", name)
        assert code == 0 and words in said[0] and "of 2 votes; by chance 25% each" in out  # places of four alone
        stories = stories if count > 5 else {i: stories[i] for i in list(stories)[:4]}
        assert_right(stories, name, f"{count}_best.jsonl")
        if count == 7:
            [content] = {a["body"]["messages"][1]["content"][:41] for a in judge.asked[before:] if len(a["ids"]) == 3}
            assert content.startswith("Here are three stories, labelled A, B, C.")


def test_a_dry_run_sends_nothing_and_shows_the_first_request(rank, judge, monkeypatch):
    write_stories(pathlib.Path("stories.jsonl"), 40)
    monkeypatch.delenv("OPENAI_API_KEY")
    code, out, _ = rank("--dry_run")
    assert code == 0 and judge.asked == [] and os.listdir() == ["stories.jsonl"]
    shown = json.loads(out[out.index("{") : out.rindex("}") + 1])
    assert f"POST {judge.url}/chat/completions" in out and "requests: 20," in out
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert rank("--max_requests", 7)[0] == 1
    assert shown == judge.asked[0]["body"]
    read = sum(len(message["content"]) for message in shown["messages"]) / 4
    found = re.search(r"about ([\d,]+) read .* and ([\d,]+) written", out)
    assert int(found[1].replace(",", "")) == pytest.approx(20 * read, rel=0.02)
    expected = int(found[1].replace(",", "")) * PRICE[0] + int(found[2].replace(",", "")) * PRICE[1]
    assert f"dollars: about {expected:.2f}" in out
    assert "requests: 13," in rank("--dry_run")[1] and len(judge.asked) == 7


# --- replies as they come ---

READ = [
    ("BEST_ANSWER:[C]\nREASONING:[The door.]", "C", "The door."),
    ("**BEST_ANSWER:** [c]\n\n**REASONING:** The door\nis never\nopened.", "C", "The door\nis never\nopened."),
    ("**BEST_ANSWER:[C]**\n**REASONING:[The door.]**", "C", "The door."),
    ("best_answer: c\nreasoning: the door", "C", "the door"),
    ("BEST_ANSWER: C\nREASONING: [The door.", "C", "The door."),
    ("BEST\\_ANSWER:[C] REASONING:[The door.]", "C", "The door."),
    ("REASONING:[Of all, D is loud.\n\nThe door.]\nBEST_ANSWER:[C]", "C", "Of all, D is loud.\n\nThe door."),
    ("Reasoning: The door.\n\nBest Answer: **C**", "C", "The door."),
    ("### BEST_ANSWER\n[C]\n### REASONING\n[The door.]", "C", None),
    ("`BEST_ANSWER:[C]`\n`REASONING:[The door.]`", "C", "The door."),
    ("BEST_ANSWER: Story C\nREASONING: The door.", "C", "The door."),
    ("BEST_ANSWER: [Story C]\nREASONING: The door.", "C", "The door."),
    ("BEST_ANSWER: (C) The one with the door, better than [A].\nREASONING: x", "C", None),
    ("BEST_ANSWER: C. It has a door.", "C", None),
    ("BEST_ANSWER：【C】\nREASONING：The door.", "C", "The door."),
    ('{"BEST_ANSWER": "C", "REASONING": "The door."}', "C", None),
    ("The best answer is [C].", "C", None),
    ("<think>BEST_ANSWER:[A]? No.</think>\nBEST_ANSWER:[C]\nREASONING:[The door.]", "C", "The door."),
    ("BEST_ANSWER:[C]\nREASONING:[x]\nSo: BEST_ANSWER:[C]", "C", None),
    ("BEST_ANSWER:[E]\nREASONING:[x]", None, None),
    ("BEST_ANSWER:[X]\nREASONING:[x]", None, None),
    ("BEST_ANSWER:[B, C]", None, None),
    ("BEST_ANSWER: B or C", None, None),
    ("BEST_ANSWER:[B] and [C]", None, None),
    ("BEST_ANSWER: B/C", None, None),
    ("BEST_ANSWER: B & C", None, None),
    ("BEST_ANSWER: [B] or maybe [C]", None, None),
    ("BEST_ANSWER: [B], [C]", None, None),
    ("BEST_ANSWER: B - C", None, None),
    ("BEST_ANSWER:[B]\nREASONING:[x]\nBEST_ANSWER:[C]", None, None),
    ("BEST_ANSWER: a tie between B and C", None, None),
    ("The best answer is a\ntie.", None, None),
    ("BEST_ANSWER:[]\nREASONING:[A door.]", None, None),
    ("BEST_ANSWER: None\nREASONING: Bad stories, all.", None, None),
    ("BEST_ANSWER:\nREASONING: D is loud", None, None),
    ("I think that story C is the best.", None, None),
    ("C", None, None),
    ("", None, None),
    ("I'm sorry, but I can't assist with that.", None, None),
]


@pytest.mark.parametrize("reply, label, reasoning", READ, ids=range(len(READ)))
def test_replies_are_read_as_models_write_them_and_never_guessed(reply, label, reasoning):
    found = script.read_reply(reply, "ABCD")
    assert found[0] == label and reasoning in (None, found[1])


def completion(**changes):
    choice = dict(index=0, message=dict(role="assistant", content="BEST_ANSWER:[A]"), finish_reason="stop")
    return {"choices": [choice], "usage": dict(prompt_tokens=10, completion_tokens=2), **changes}


BROKEN = {
    "garbage": lambda h: h.send(200, bytes(range(256)) * 9),
    "truncated JSON": lambda h: h.send(200, json.dumps(completion()).encode()[:-30]),
    "empty choice list": lambda h: h.send(200, completion(choices=[])),
    "no choice list": lambda h: h.send(200, {"error": {"message": "busy"}}),
    "a list": lambda h: h.send(200, [1]),
    "nested": lambda h: h.send(200, b"[" * 100_000),
    "null": lambda h: h.send(200, completion(choices=[dict(message=None)])),
    "parts": lambda h: h.say([dict(type="text", text="BEST_ANSWER:[A]")]),
    "refusal": lambda h: h.say(None, refusal="I can't help with that."),
    "E": lambda h: h.say("BEST_ANSWER:[E]\nREASONING:[none of them]"),
    "nothing": lambda h: h.say(""),
    "the key": lambda h: h.say(f"I was asked with {h.headers['Authorization']}"),
}
CUT = {
    "cut": lambda h: h.send(200, json.dumps(completion()).encode()[:50], length=500),
    "hung up": lambda h: h.connection.shutdown(socket.SHUT_RDWR),
    "no HTTP": lambda h: (h.wfile.write(b"what?\r\n\r\n"), h.connection.shutdown(socket.SHUT_RDWR)),
    "bad gzip": lambda h: h.send(200, b"no gzip", Content_Encoding="gzip"),
}


def test_what_cannot_be_read_is_asked_for_again(rank, judge):
    stories = write_stories(pathlib.Path("stories.jsonl"), 8)
    judge.faults.extend(BROKEN.values())
    code, out, _ = rank("--votes", 1, "--retries", len(BROKEN), "--concurrency", 1)
    assert code == 0 and len(judge.asked) == len(BROKEN) + 2
    assert_right(stories)
    rows = answers()[0, 0]
    assert len(rows) == len(BROKEN) + 1 and [bool(row["problem"]) for row in rows] == [True] * len(BROKEN) + [False]
    assert all(row["best"] is None and row["answer"] is None for row in rows[:-1])
    replies = dict(zip(BROKEN, (row["reply"] for row in rows)))
    assert replies["refusal"] == "I can't help with that." and replies["the key"] == "I was asked with Bearer [key]"
    assert len(lines("ranked.jsonl")[0]["votes"]) == len(BROKEN) + 1


def test_connections_that_break_are_made_again(rank, judge, monkeypatch):
    stories = write_stories(pathlib.Path("stories.jsonl"), 8)
    monkeypatch.setattr(script.random, "uniform", lambda a, b: 0.01)
    judge.faults.extend(CUT.values())
    code, out, _ = rank("--votes", 1, "--concurrency", 1)
    assert code == 0 and len(judge.asked) == len(CUT) + 2
    assert_right(stories)
    assert [row["failed"] for row in lines("ranked.jsonl.answers") if "failed" in row] == [None] * len(CUT)


def test_what_stays_unreadable_is_listed_and_asked_for_by_the_next_run(rank, judge):
    stories = write_stories(pathlib.Path("stories.jsonl"), 16)
    right = judge.reply
    judge.reply = lambda shown: "BEST_ANSWER:[E]" if {"s5"} & {i for i, _ in shown} else f"BEST_ANSWER:[{best(shown)}]"
    code, out, _ = rank("--retries", 2)
    assert code == 0 and len(judge.asked) == 6 + 2 * 3
    assert "undecided, a reply that names none of ABCD as the best: groups 1\n" in out
    rows = lines("ranked.jsonl")
    assert [bool(row["best"]) for row in rows] == [True, False, True, True] and len(rows[1]["votes"]) == 6
    assert len(lines("best.jsonl")) == 3
    judge.reply, judge.asked = right, []
    assert rank("--retries", 2)[0] == 0 and len(judge.asked) == 2
    assert all("s5" in asked["ids"] for asked in judge.asked)
    assert_right(stories)


def best(shown):
    fears = [int(fear) for _, fear in shown]
    return "ABCD"[fears.index(max(fears))]


def test_a_judge_that_never_follows_the_form_is_not_paid_for_long(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 400)
    judge.reply = lambda shown: "The first one, I guess."
    code, out, said = rank("--retries", 1)
    assert (
        code == 1 and len(judge.asked) == 20 and "95 groups are left" in said[-1] and "names none of ABCD" in said[-1]
    )


def test_a_group_that_the_model_cannot_take_does_not_stop_the_others(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 16)
    judge.faults.extend([lambda h: h.send(400, {"error": {"message": "maximum context length is 8 tokens"}})] * 2)
    code, out, _ = rank("--concurrency", 1)
    assert (
        code == 0 and len(judge.asked) == 8 and [bool(r["best"]) for r in lines("ranked.jsonl")] == [False] + [True] * 3
    )
    assert re.search(r"undecided, 127.0.0.1:\d+ answers 400 \(maximum context length is 8 tokens\): groups 0\n", out)
    assert rank()[0] == 0 and len(judge.asked) == 10


# --- manners ---

BODY = {"messages": [{"content": f"{PROMPT} s0 with a fear of 1."}]}


@pytest.mark.parametrize(
    "headers, seconds",
    [
        (dict(Retry_After="0.9"), 0.9),
        (dict(Retry_After="1"), 1.0),
        (dict(x_ratelimit_reset_requests="20ms", x_ratelimit_reset_tokens="1.2s"), 1.2),
        (dict(Retry_After="a while"), 0.0),
        (dict(Retry_After="-5", x_ratelimit_reset_tokens="6m0s"), 0.0),
    ],
)
def test_the_server_says_how_long_to_wait(judge, headers, seconds, monkeypatch):
    monkeypatch.setattr(script.random, "uniform", lambda low, high: low + 0.01)
    judge.faults.append(lambda h: h.send(429, {"error": {"message": "slow"}}, **headers))
    waits = []

    def turn(wait, status):
        waits.append((wait, status))
        time.sleep(wait if wait < 2 else 0)

    script.post(script.api_session(judge.url), judge.url, BODY, turn=turn)
    (zero, _), (wait, status) = waits
    assert zero == 0 and status == 429 and seconds < wait < (seconds or 5) + 1
    assert judge.asked[1]["time"] - judge.asked[0]["time"] >= seconds


def test_a_429_holds_everyone(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 400)
    judge.latency = 0.005
    judge.faults.extend([None] * 20 + [lambda h: h.send(429, {}, Retry_After="1.5")])
    assert rank("--votes", 1)[0] == 0 and len(judge.asked) == 101
    refused = judge.asked[20]["time"]
    early = [asked for asked in judge.asked[21:] if asked["time"] < refused + 1.5]
    assert len(early) <= 14, "what was under way, and no more"


def test_dates_and_long_waits(judge, monkeypatch):
    waits = []
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    judge.faults.append(lambda h: h.send(503, {}, Retry_After=date))
    judge.faults.append(lambda h: h.send(429, {}, x_ratelimit_reset_tokens="6m0s"))
    script.post(script.api_session(judge.url), judge.url, BODY, turn=lambda wait, status: waits.append(wait))
    assert 98 < waits[1] < 102 and 60 <= waits[2] < 62
    judge.faults.append(lambda h: h.send(429, {}, Retry_After="7200"))
    with pytest.raises(script.ApiError, match="asks to wait 7,200 s") as error:
        script.post(script.api_session(judge.url), judge.url, BODY)
    assert error.value.hopeless and len(judge.asked) == 4


def test_waits_grow_and_differ(judge):
    waits = []
    for _ in range(3):
        judge.faults.extend([lambda h: h.send(500, b"oops")] * 9)
        with pytest.raises(script.ApiError, match=r"answers 500 \(oops\), 9 times"):
            script.post(script.api_session(judge.url), judge.url, BODY, 5, 8, lambda *turn: waits.append(turn))
    for i in range(0, 27, 9):
        assert waits[i] == (0, None) and {status for _, status in waits[i + 1 : i + 9]} == {500}
        seconds = [wait for wait, _ in waits[i + 1 : i + 9]]
        assert all(0.5 * 2**k <= wait <= 0.625 * 2**k or 30 <= wait <= 37.5 for k, wait in enumerate(seconds))
    assert len({wait for wait, _ in waits}) == 25


def test_redirects_are_not_followed(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    other = Judge()
    judge.faults.append(lambda h: h.send(307, b"", Location=other.url + "/chat/completions"))
    code, _, said = rank()
    assert code == 2 and "answers 307" in said[-1] and "--base_url" in said[-1]
    assert other.asked == [] and len(judge.asked) == 1
    other.shutdown()


def test_no_proxy_comes_between_this_machine_and_itself(rank, judge, monkeypatch):
    write_stories(pathlib.Path("stories.jsonl"), 4)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert rank()[0] == 0 and len(judge.asked) == 2


def test_the_key_is_all_that_is_sent(rank, judge, folder, monkeypatch):
    write_stories(pathlib.Path("stories.jsonl"), 4)
    (folder / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    elsewhere = judge.url.replace("127.0.0.1", "0.0.0.0")  # the same, but nobody knows
    assert rank("--base_url", elsewhere)[0] == 0
    monkeypatch.delenv("OPENAI_API_KEY")
    assert rank("--base_url", elsewhere, "--out", "without.jsonl")[0] == 0
    sent = [asked["headers"]["Authorization"] for asked in judge.asked]
    assert sent == [f"Bearer {KEY}"] * 2 + [None] * 2


def test_a_server_that_is_not_there_ends_it(rank):
    write_stories(pathlib.Path("stories.jsonl"), 40)
    code, _, said = rank("--base_url", "http://127.0.0.1:9/v1", "--retries", 1)
    assert code == 1 and "127.0.0.1:9 cannot be reached" in said[-1] and "10 groups are left" in said[-1]
    assert not pathlib.Path("ranked.jsonl").exists()


def test_a_server_that_goes_away_ends_it(rank, judge, monkeypatch):
    stories = write_stories(pathlib.Path("stories.jsonl"), 80)
    monkeypatch.setattr(script.random, "uniform", lambda a, b: 0.01)
    judge.faults.extend([None] * 12 + [lambda h: h.send(502, b"<html>Bad Gateway</html>")] * 200)
    code, out, said = rank("--retries", 1)
    assert code == 1 and "answers 502 (<html>Bad Gateway</html>), 2 times" in said[-1]
    assert 12 + 2 * 10 <= len(judge.asked) <= 12 + 2 * 18
    judge.faults.clear()
    before = len(answers())
    judge.asked.clear()
    assert rank()[0] == 0 and len(judge.asked) == 40 - before
    assert_right(stories)


def test_requests_never_exceed_their_limit(rank, judge):
    stories = write_stories(pathlib.Path("stories.jsonl"), 80)
    judge.latency = 0.01
    for limit in (0, 1, 13, 14, 27):
        judge.faults.extend([None, lambda h: h.send(200, {})] * 3)
        code, out, said = rank("--max_requests", limit)
        assert code == 1 and f"--max_requests {limit} is reached" in said[-1] and len(judge.asked) == limit
    judge.faults.clear()
    assert rank()[0] == 0
    assert_right(stories)


@pytest.mark.parametrize("dear", [True, False])
def test_money_never_exceeds_its_limit(rank, judge, dear):
    stories = write_stories(pathlib.Path("stories.jsonl"), 80)
    judge.latency = 0.01
    if dear:  # nearly a token for every byte
        judge.usage = dict(prompt_tokens=1000, completion_tokens=500)
    for limit in (0.02, 0.03, 0.031):
        code, _, said = rank("--max_cost", limit)
        usage = [row["usage"] for rows in answers().values() for row in rows]
        cost = sum(u["prompt_tokens"] * PRICE[0] + u["completion_tokens"] * PRICE[1] for u in usage)
        worst = max(row["sent"] for row in lines("ranked.jsonl.answers") if "sent" in row)
        assert code == 1 and "--max_cost" in said[-1] and len(judge.asked) == len(usage)
        assert limit - worst * 1.2 < cost <= limit, "near the limit, and below it"
    assert rank("--max_cost", 9)[0] == 0
    assert_right(stories)


def test_an_answer_that_was_lost_counts_as_money(rank, judge, monkeypatch):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    monkeypatch.setattr(script.random, "uniform", lambda a, b: 0.01)
    judge.faults.append(CUT["cut"])
    judge.faults.append(lambda h: h.send(500, b""))
    judge.faults.append(lambda h: h.send(200, completion(usage=None)))
    assert rank("--votes", 1, "--price", 1, 1, "--concurrency", 1)[0] == 0
    rows = lines("ranked.jsonl.answers")
    lost, refused, silent, *others = [row["cost"] for row in rows if "cost" in row]
    sent = [row["sent"] for row in rows if "sent" in row]
    assert lost == sent[0] > 0 and refused == 0 and silent == sent[2] and all(0 < x < sent[0] for x in others)


def test_what_a_killed_run_had_sent_counts_as_money(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    assert rank()[0] == 0
    with open("ranked.jsonl.answers", "a") as f:
        f.write('{"group": 1, "vote": 2, "sent": 0.5}\n{"group": 1, "vote": 2, "sent": 0.25}\n')
    out = rank("--max_requests", 6)[1]
    assert "in all: 6 requests" in out and 0.75 < float(re.search(r"at most \$([\d.]+)", out)[1]) < 0.76
    code, _, said = rank("--max_cost", 0.75, "--votes", 3)
    assert code == 1 and "--max_cost" in said[-1] and len(judge.asked) == 4


def test_prices_that_are_not_known(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 4)
    code, _, said = rank("--model", "llama3", "--max_cost", 1)
    assert code == 2 and len(said) == 1 and "--price" in said[0] and judge.asked == []
    assert (
        "cost unknown" in rank("--model", "llama3")[1]
        and "dollars: unknown" in rank("--model", "y", "--dry_run", "--out", "y")[1]
    )
    assert rank("--model", "llama3", "--out", "b.jsonl", "--price", 1, 2, "--max_cost", 1)[0] == 0


# --- nothing twice, nothing lost ---


def test_a_second_run_asks_only_for_what_is_missing(rank, judge):
    stories = write_stories(pathlib.Path("stories.jsonl"), 20)
    first = rank("--max_requests", 4)
    assert first[0] == 1 and "6 groups are left" not in first[2][-1] and len(judge.asked) == 4
    assert 1 <= len(lines("ranked.jsonl")) < 5
    assert rank()[0] == 0 and len(judge.asked) == 10
    done = rank("--concurrency", 2, "--retries", 1, "--timeout", 5, "--max_requests", 10, "--max_new_tokens", 9)
    assert done[0] == 0 and len(judge.asked) == 10
    assert rank("--votes", 3)[0] == 0 and len(judge.asked) == 15
    assert {asked["ids"] for asked in judge.asked[10:]}.isdisjoint({asked["ids"] for asked in judge.asked[:10]})
    assert rank()[0] == 0 and len(judge.asked) == 15
    assert_right(stories)
    assert {len(row["votes"]) for row in lines("ranked.jsonl")} == {3}


def test_a_run_with_others_says_so(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    assert rank()[0] == 0
    before = {file: pathlib.Path(file).read_bytes() for file in os.listdir()}
    for flags, word in {
        ("--model", "gpt-4o-mini"): "model 'gpt-4o' (now 'gpt-4o-mini')",
        ("--base_url", "http://127.0.0.1:9/v1"): "base_url",
        ("--temperature", "1"): "temperature",
        ("--seed", "1"): "seed",
        ("--judge", "human"): "judge",
    }.items():
        code, _, said = rank(*flags)
        assert code == 2 and len(said) == 1 and word in said[0] and "--out" in said[0] and "--overwrite" in said[0]
    write_stories(pathlib.Path("stories.jsonl"), 8, fears=range(8))
    code, _, said = rank()
    assert code == 2 and "stories" in said[0]
    del before["stories.jsonl"]
    assert before == {file: pathlib.Path(file).read_bytes() for file in before} and len(judge.asked) == 4
    assert rank("--overwrite")[0] == 0 and len(judge.asked) == 8


def test_files_of_others_are_left_alone(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    for name in ("ranked.jsonl", "best.jsonl"):
        pathlib.Path(name).write_text("mine\n")
        code, _, said = rank()
        assert code == 2 and len(said) == 1 and f"{name}: is there" in said[0]
        pathlib.Path(name).unlink()
    for text in ("mine\n", "mine", "\n", "[1]\n", '{"settings": 1}\n{"group": []}\n'):
        pathlib.Path("ranked.jsonl.answers").write_text(text)
        code, _, said = rank()
        assert code == 2 and len(said) == 1 and "ranked.jsonl.answers" in said[0], text
        assert pathlib.Path("ranked.jsonl.answers").read_text() == text
    pathlib.Path("ranked.jsonl.answers").unlink()
    for flags in (("--out", "stories.jsonl"), ("--best", "stories.jsonl"), ("--best", "ranked.jsonl")):
        assert rank(*flags, "--overwrite")[0] == 2
    assert judge.asked == [] and os.listdir() == ["stories.jsonl"]


def test_a_line_cut_short_is_repaired_and_a_damaged_one_named(rank, judge):
    stories = write_stories(pathlib.Path("stories.jsonl"), 8)
    assert rank("--concurrency", 1)[0] == 0
    path = pathlib.Path("ranked.jsonl.answers")
    whole, size = path.read_bytes(), len(judge.asked)
    last = whole.splitlines(keepends=True)[-1]
    for cut in (1, len(last) // 2, len(last) - 1):
        path.write_bytes(whole[:-cut])
        assert rank("--concurrency", 1)[0] == 0
        assert len(judge.asked) == (size := size + 1) and path.read_bytes().startswith(whole[: -len(last)])
        assert_right(stories)
    path.write_bytes(whole[:40])  # in the first line: nothing was answered
    assert rank()[0] == 0 and len(judge.asked) == size + 4
    path.write_bytes(whole.replace(b'"best": ', b'"best", ', 1))
    code, _, said = rank()
    assert code == 2 and re.search(r"ranked.jsonl.answers:3: damaged", said[0])


def test_two_runs_exclude_each_other(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    held = script.Answers("ranked.jsonl.answers", {"judge": "openai"})
    code, _, said = rank()
    assert code == 2 and len(said) == 1 and "another rank.py is at work" in said[0] and judge.asked == []
    held.file.close()
    assert rank()[0] == 0


ZYGOTE = """
import json, os, resource, sys
sys.path.insert(0, sys.argv[1])
import rank
for line in iter(sys.stdin.readline, ""):
    folder, flags, most = json.loads(line)
    if not (pid := os.fork()):
        os.chdir(folder)
        os.dup2(os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        os.dup2(2, 1)
        sys.argv = ["rank.py", *flags]
        if most:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        rank.run(rank.main)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def zygote():
    """A process that has imported rank.py already, and runs it in forks of itself."""
    command = [sys.executable, "-c", ZYGOTE, ROOT]
    environment = {**os.environ, "OPENAI_API_KEY": KEY}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def fork(zygote, judge, folder):
    """Starts rank.py as a process of its own: its pid, and a call that waits for its exit code."""

    def start(*flags, most=0):
        flags = ["stories.jsonl", "--base_url", judge.url, *map(str, flags)]
        print(json.dumps([str(folder), flags, most]), file=zygote.stdin, flush=True)
        return int(zygote.stdout.readline()), lambda: int(zygote.stdout.readline())

    return start


def until(condition):
    for _ in range(100_000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("it never happened")


def test_killed_twenty_times_nothing_is_lost_and_nothing_asked_twice(fork, judge):
    """An answer that is in the file is never asked for again, no line is ever lost or twice there, and a kill costs at
    most what was under way: --concurrency requests, each of them noted in the file before it was sent."""
    stories = write_stories(pathlib.Path("stories.jsonl"), 480)
    path, chance, judge.latency = pathlib.Path("ranked.jsonl.answers"), random.Random(0), 0.02
    known, have = {}, b""
    for _ in range(20):
        asked = len(judge.asked)
        pid, wait = fork()
        moment = asked + chance.randint(0, 12)
        until(lambda: len(judge.asked) >= moment)  # noqa: B023
        time.sleep(chance.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert wait() == -9, pathlib.Path("said.txt").read_text()
        assert path.read_bytes().startswith(have)
        have = path.read_bytes()
        have = have[: have.rfind(b"\n") + 1]
        path.write_bytes(have + b'{"group": 1, "vo' * chance.randint(0, 1))
        rows = [json.loads(line) for line in have.splitlines()]
        groups = {}
        for g, group in enumerate(script.make_groups(list(stories.values()), 1337)):
            groups[g] = {label: story["id"] for label, story in group.items()}
        for row in rows:
            if "best" in row:
                known.setdefault(tuple(groups[row["group"]][label] for label in row["order"]), len(judge.asked))
    pid, wait = fork()
    assert wait() == 0, pathlib.Path("said.txt").read_text()
    assert_right(stories)
    assert path.read_bytes().startswith(have) and 20 < len(known) < 240
    for i, asked in enumerate(judge.asked):
        assert i < known.get(asked["ids"], math.inf), "asked for again"
    assert all(len(rows) == 1 for rows in answers().values()) and len(answers()) == 240
    sent = sum("sent" in row for row in lines(path))
    assert 240 <= len(judge.asked) <= sent <= 240 + 20 * 8


def test_ctrl_c_finishes_what_was_sent(fork, judge):
    stories = write_stories(pathlib.Path("stories.jsonl"), 80)
    judge.latency = 0.15
    pid, wait = fork("--concurrency", 4)
    until(lambda: len(judge.asked) >= 7)
    os.kill(pid, signal.SIGINT)
    assert wait() == 130
    said = pathlib.Path("said.txt").read_text().splitlines()
    assert len(judge.asked) == len(answers()) < 40 and re.search(r"interrupted; \d+ groups are left", said[-1])
    assert not any("Traceback" in line for line in said)
    pid, wait = fork()
    assert wait() == 0 and len(judge.asked) == 40
    assert_right(stories)


def test_ctrl_c_twice_ends_at_once(fork, judge):
    stories = write_stories(pathlib.Path("stories.jsonl"), 800)
    pid, wait = fork("--concurrency", 4, "--timeout", 300)
    until(lambda: len(judge.asked) >= 5)
    judge.latency = 100
    time.sleep(0.1)
    until(lambda: judge.busy == 4)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    os.kill(pid, signal.SIGINT)
    assert wait() == 130 and judge.busy == 4, "it has not waited for the answers"
    judge.latency = 0
    pid, wait = fork()
    assert wait() == 0
    assert_right(stories)


def test_a_full_disk_loses_nothing(fork, judge):
    stories = write_stories(pathlib.Path("stories.jsonl"), 80)
    pid, wait = fork(most=6000)
    assert wait() == 1
    said = pathlib.Path("said.txt").read_text().splitlines()
    assert "ranked.jsonl" in said[-1] and "File too large" in said[-1] and not any("Traceback" in s for s in said)
    before = answers()
    assert 3 < len(before) < 40 and not list(pathlib.Path().glob("*.tmp"))
    judge.asked.clear()
    pid, wait = fork()
    assert wait() == 0 and len(judge.asked) == 40 - len(before)
    assert_right(stories)


# --- the report ---


def test_chance_is_that_of_the_binomial_distribution(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 160)
    places = iter("B" * 21 + "ACD" * 7)

    judge.reply = lambda shown: f"BEST_ANSWER:[{next(places)}]"
    code, out, _ = rank("--votes", 1, "--max_requests", 40)
    assert code == 0 and re.search(r"places: A \d+%, B 52%, C \d+%, D \d+% of 40 votes; by chance 25% each", out)
    chance = fractions.Fraction(1, 4)
    p = 4 * sum(math.comb(40, k) * chance**k * (1 - chance) ** (40 - k) for k in range(21, 41))
    assert "WARNING: B won 21 of 40 times" in out and f"probability of {float(p):.1g}:" in out
    assert "agreement" not in out  # one vote agrees with nobody


def test_places_that_chance_explains_are_no_warning(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 160)
    places = iter("B" * 16 + "ACD" * 8)
    judge.reply = lambda shown: f"BEST_ANSWER:[{next(places)}]"
    code, out, _ = rank("--votes", 1)
    assert code == 0 and "B 40%" in out and "WARNING" not in out


# --- offline ---


def write_checkpoint(path, seed, tokenizer="bytes", block_size=200, vocab_size=257):
    config = dict(vocab_size=vocab_size, block_size=block_size, n_layer=2, n_head=2, n_embd=16)
    torch.manual_seed(seed)
    model = script.GPT(script.Config(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4)
    torch.save({"format": 1, "config": config, "tokenizer": tokenizer, "model": model.state_dict()}, path)
    return model


LOCAL = "--judge local --scary scary.pt --plain plain.pt --device cpu --dtype float32".split()


@torch.no_grad()
def losses_of(model, start, prompt, text):
    """Mean cross-entropy of the bytes after the prompt: transformers, one story by itself."""
    tokens = torch.tensor([start + list(text.encode())])
    logits = as_nanochat(model)(tokens).logits[0, len(start) + len(prompt) - 1 : -1]
    return F.cross_entropy(logits, tokens[0, len(start) + len(prompt) :]).item()


def test_scores_are_cross_entropy_differences_by_transformers(rank, folder):
    chance = random.Random(1)
    texts = [PROMPT + "".join(chance.choices("abcdefg .", k=chance.randint(20, 150))) for _ in range(11)]
    texts[4] = PROMPT + " and on" * 15  # repeats itself
    rows = [dict(id=i, prompt=PROMPT, text=text) for i, text in enumerate(texts)]
    (folder / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = [write_checkpoint("scary.pt", 1), write_checkpoint("plain.pt", 2)]
    code, out, _ = rank(*LOCAL, "--repetition_penalty", 3)
    assert code == 0 and "3 of 3 groups" in out
    for row in lines("ranked.jsonl"):
        said = dict(re.findall(r"([A-D]) (-?[\d.]+) \(", row["reasoning"]))
        expected = {}
        for label, story in row["stories"].items():
            scary, plain = (losses_of(model, [256], PROMPT, story["text"]) for model in models)
            written = story["text"][len(PROMPT) :]
            runs = [written[i : i + 16] for i in range(len(written) - 15)]
            again = len(runs) - len(set(runs))
            assert (again > 50) == (story["id"] == 4)
            expected[label] = plain - scary - 3 * again / len(runs)
        assert {label: float(x) for label, x in said.items()} == pytest.approx(expected, abs=2e-4)
        assert row["best"] == max(expected, key=expected.get) and row["usage"]["prompt_tokens"] == 0
    assert [len(row["stories"]) for row in lines("ranked.jsonl")] == [4, 4, 3]
    first = pathlib.Path("ranked.jsonl").read_bytes(), pathlib.Path("best.jsonl").read_bytes()
    assert rank(*LOCAL, "--repetition_penalty", 3, "--overwrite")[0] == 0
    assert first == (pathlib.Path("ranked.jsonl").read_bytes(), pathlib.Path("best.jsonl").read_bytes())


def test_offline_answers_are_not_computed_again(rank, monkeypatch):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    write_checkpoint("scary.pt", 1), write_checkpoint("plain.pt", 2)
    assert rank(*LOCAL)[0] == 0
    monkeypatch.setattr(script, "mean_losses", lambda *_: pytest.fail())
    assert rank(*LOCAL)[0] == 0
    os.utime("scary.pt", (1, 1))
    code, _, said = rank(*LOCAL)
    assert code == 2 and "scary" in said[0]


def test_repetition_costs(rank, folder):
    write_checkpoint("scary.pt", 1), write_checkpoint("plain.pt", 2)
    chance, best = random.Random(3), {}
    texts = ["ha" * 60, *("".join(chance.choices("abcdefghijklm ", k=120)) for _ in range(3))]
    (folder / "stories.jsonl").write_text("".join(json.dumps(dict(id=i, text=t)) + "\n" for i, t in enumerate(texts)))
    for penalty in (0, 100):
        assert rank(*LOCAL, "--repetition_penalty", penalty, "--overwrite")[0] == 0
        [row] = lines("ranked.jsonl")
        best[penalty] = float(
            re.search(rf"{[k for k, s in row['stories'].items() if s['id'] == 0][0]} (-?[\d.]+)", row["reasoning"])[1]
        )
        assert penalty == 0 or row["stories"][row["best"]]["id"] != 0
    assert 80 < best[0] - best[100] < 100


def test_stories_beyond_the_window_are_judged_by_their_beginning(rank, folder):
    write_checkpoint("scary.pt", 1, block_size=64), write_checkpoint("plain.pt", 2)
    same = PROMPT + " and nobody came to the door for seven years."
    rows = [
        dict(id=i, prompt=PROMPT, text=same[: 63 + 1] + tail)
        for i, tail in enumerate(("", "xyz", "q" * 900, "the end"))
    ]
    (folder / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, said = rank(*LOCAL)
    assert code == 0 and "longer than the window of 64 tokens, judged by their beginning: 3 stories" in said
    [row] = lines("ranked.jsonl")
    assert len(set(re.findall(r"[A-D] (-?[\d.]+) \(", row["reasoning"]))) == 1


def test_characters_and_stories_without_text(rank, folder):
    spec = {"chars": "".join(sorted(set("It was a dark and stormy night!abcdefghijklmnopqrstuvwxyz")))}
    for name, seed in (("scary.pt", 1), ("plain.pt", 2)):
        write_checkpoint(name, seed, spec, vocab_size=len(spec["chars"]))
    texts = [PROMPT, PROMPT + "!", "no prompt here", PROMPT + " it came", PROMPT, PROMPT]
    rows = [dict(id=i, prompt=PROMPT, text=text) for i, text in enumerate(texts)]
    (folder / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = rank(*LOCAL)
    assert code == 0 and "undecided, nothing after their prompts: groups 1\n" in out
    found = lines("ranked.jsonl")
    assert [row["best"] is None for row in found] == [False, True] and found[0]["stories"][found[0]["best"]]["id"] != 0
    rows[0]["text"] += " in Zürich"
    (folder / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, said = rank(*LOCAL, "--overwrite")
    assert code == 2 and "the story 0: the checkpoint does not know the characters 'Zü'" in said[-1]


def test_checkpoints_that_do_not_go_together(rank):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    write_checkpoint("scary.pt", 1), write_checkpoint("plain.pt", 2, {"chars": "abc"}, vocab_size=3)
    code, _, said = rank(*LOCAL)
    assert code == 2 and said == [
        "rank.py: scary.pt and plain.pt have different tokenizers (bytes, characters), so no token to compare"
    ]
    assert rank("--judge", "local", "--scary", "scary.pt")[2] == [
        "rank.py: --judge local needs two checkpoints: --scary, and --plain, from which it was trained"
    ]
    assert "none.pt: No such file" in rank(*LOCAL, "--plain", "none.pt")[2][0]
    assert "stories.jsonl: is not a checkpoint" in rank(*LOCAL, "--plain", "stories.jsonl")[2][0]
    assert sorted(os.listdir()) == ["plain.pt", "scary.pt", "stories.jsonl"]


# --- a person ---


def test_a_person_chooses_by_lines_where_there_is_no_terminal(rank, monkeypatch, judge):
    stories = write_stories(pathlib.Path("stories.jsonl"), 16, text=PROMPT + "\n\nA door\x1b[2J opens.")
    monkeypatch.setattr(sys, "stdin", io.StringIO("b\n\nE\n s \nD\nq\n"))
    code, out, said = rank("--judge", "human")
    assert code == 0 and "ended by q; 1 groups are left" in said[-1] and "undecided, skipped: groups 1\n" in out
    assert "\x1b" not in out and "A door [2J opens." in out and out.count("--- C ---") == 4
    assert [row["best"] for row in lines("ranked.jsonl")] == ["B", None, "D"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n"))  # then the input ends
    assert rank("--judge", "human")[0] == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("c\n"))
    code, out, _ = rank("--judge", "human")
    assert code == 0 and "4 of 4 groups" in out and [row["best"] for row in lines("ranked.jsonl")] == list("BADC")
    assert lines("best.jsonl") == [stories[row["stories"][row["best"]]["id"]] for row in lines("ranked.jsonl")]
    assert judge.asked == []


def test_a_person_chooses_by_keys_in_a_terminal(folder):
    write_stories(folder / "stories.jsonl", 12)
    ours, theirs = pty.openpty()
    command = [sys.executable, ROOT / "rank.py", "stories.jsonl", "--judge", "human"]

    def control():  # Ctrl-C in it is a signal
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=control) as process:
        os.close(theirs)
        seen, keys = b"", [b"c", b"\x04xA", b"\x03"]  # no Enter, keys that mean nothing, Ctrl-C
        with contextlib.suppress(OSError):  # the end of a terminal
            while piece := os.read(ours, 4096):
                seen += piece
                if keys and seen.count(b"q ends)") == 4 - len(keys):
                    os.write(ours, keys.pop(0))
    os.close(ours)
    assert process.returncode == 130 and keys == []
    assert [row["best"] for row in lines("ranked.jsonl")] == ["C", "A"] and b"interrupted; 1 groups are left" in seen


# --- mistakes ---


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "stories.jsonl: no stories"),
        ("\n \n", "stories.jsonl: no stories"),
        ('{"id": 1, "text": "x"}\n', "stories.jsonl: one story"),
        ('{"id": 1, "text": "x"}\n\n{"id": 1, "text": "y"}\n', "stories.jsonl:3: the id 1 again, which line 1 has"),
        ('{"id": 1, "text": "x"}\n{"id": 2, "text": " "}\n', "stories.jsonl:2: not a story"),
        ('{"id": 1, "text": "x"}\n{"id": 2, "text": 5}\n', "stories.jsonl:2: not a story"),
        ('{"id": 1, "text": "x"}\n{"text": "y"}\n', "stories.jsonl:2: not a story"),
        ('{"id": [], "text": "x"}\n', "stories.jsonl:1: not a story"),
        ('{"id": 1, "text": "\\ud800"}\n', "stories.jsonl:1: not a story"),
        ('{"id": 1, "prompt": null, "text": "x"}\n', "stories.jsonl:1: not a story"),
        ('{"id": 1, "text": "x"}\n["text"]\n', "stories.jsonl:2: not a story"),
        ('{"id": 1, "text": "x"}\n{"id": 2, "te', "stories.jsonl:2: not a story"),
        (b'{"id": 1, "text": "\xff\xfe"}\n', "stories.jsonl:1: not a story"),
        ("[" * 100_000, "stories.jsonl:1: not a story"),
    ],
    ids=range(14),
)
def test_stories_that_are_none_are_named_by_their_line(rank, judge, text, words):
    pathlib.Path("stories.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    code, out, said = rank()
    assert code == 2 and out == "" and len(said) == 1 and said[0].startswith(f"rank.py: {words}")
    assert judge.asked == [] and os.listdir() == ["stories.jsonl"]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.openai.com/v1",
        "ftp://x/v1",
        "http://",
        "http://x:port/v1",
        "http://x/v1?a=b",
        "http://me:secret@x/v1",
        "http://x y/v1",
        "http://[::1/v1",
        "x",
        "http://x/#v1",
    ],
)
def test_addresses_that_are_none(rank, url):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    code, _, said = rank("--base_url", url)
    assert code == 2 and len(said) == 1 and "--base_url" in said[0] and "http://localhost:8000/v1" in said[0]
    assert "secret" not in said[0]


def test_other_mistakes_get_a_line(rank, judge, monkeypatch):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    for flags, words in {
        ("--votes", "0"): "--votes",
        ("--price", "1"): "--price",
        ("--concurrency", "0"): "--concurrency",
        ("--judge", "cat"): "--judge",
        ("--dry_run", "--judge", "human"): "--dry_run",
        ("--out", "stories.jsonl/x"): "stories.jsonl/x.answers: ",
        ("--out", "."): "",
        ("--best", "none/best.jsonl"): "--best none/best.jsonl: there is no such folder",
        ("--base_url", "http://a..b/v1", "--retries", "0"): "a..b cannot be reached",
    }.items():
        code, _, said = rank(*flags)
        assert code == 2 and len(said) == 1 and words in said[0], said
    assert "none.jsonl: No such file" in rank(stories="none.jsonl")[2][0]
    monkeypatch.delenv("OPENAI_API_KEY")
    code, _, said = rank("--base_url", "https://api.openai.com/v1")
    assert code == 2 and len(said) == 1 and "OPENAI_API_KEY" in said[0]
    monkeypatch.setenv("OPENAI_API_KEY", "sk-with a\nline")
    code, _, said = rank()
    assert code == 2 and len(said) == 1 and "OPENAI_API_KEY holds characters" in said[0] and "line" not in said[0]
    assert judge.asked == []


def test_it_opens_where_there_are_no_locks_and_no_terminals(monkeypatch, folder, rank):
    for name in ("fcntl", "termios", "tty"):
        monkeypatch.setitem(sys.modules, name, None)  # as on Windows
    spec = importlib.util.spec_from_file_location("rank_elsewhere", ROOT / "rank.py")
    elsewhere = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "rank_elsewhere", elsewhere)
    spec.loader.exec_module(elsewhere)
    assert elsewhere.fcntl is None
    write_stories(folder / "stories.jsonl", 8)
    monkeypatch.setattr(script, "run", elsewhere.run)
    monkeypatch.setattr(script, "main", elsewhere.main)
    monkeypatch.setattr(elsewhere.progress, "next", math.inf, raising=False)
    assert rank()[0] == 0 and len(lines("ranked.jsonl")) == 2
