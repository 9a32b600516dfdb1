"""rank.py over HTTP, against llmock and a server that does what real ones do wrong; killed; offline; by hand."""

import collections
import email.utils
import http.server
import io
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from transformers import NanoChatConfig, NanoChatForCausalLM

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
    """The answers of a run: {(group, vote): [rows]}, unreadable ones and refusals too."""
    found = collections.defaultdict(list)
    for row in lines(f"{path}.answers"):
        if "vote" in row:
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


def completion(text="BEST_ANSWER:[A]", finish="stop", **changes):
    choice = dict(index=0, message=dict(role="assistant", content=text), finish_reason=finish)
    return {"choices": [choice], "usage": dict(prompt_tokens=1000, completion_tokens=2), **changes}


def refuse(status, message, **more):
    return lambda h: h.send(status, {"error": {"message": message, **more}})


# --- against llmock, which judges its clients ---

GOOD = "BEST_ANSWER:[B]\nREASONING:[It is quiet.]"


def scripted(llmock, *behaviours):
    llmock.reply(GOOD, times=None)
    return ["--base_url", llmock.base_url(), "--votes", 1, "--timeout", 1]


def test_refusals_and_delays_are_outwaited_as_they_should_be(rank, llmock):
    stories = write_stories(pathlib.Path("stories.jsonl"), 12)
    flags = scripted(llmock)
    llmock.rate_limit(times=1, retry_after=0.7).fail(500, times=1).delay(2, times=1)
    code, out, _ = rank(*flags)
    assert code == 0 and "3 of 3 groups" in out
    llmock.assert_resilient(strict=True)
    failed = [row["status"] for rows in answers().values() for row in rows if not row["best"]]
    assert sorted(failed, key=str) == [429, 500, None]
    assert len(llmock.requests) == 6 and " 6 requests" in out
    rows = lines("ranked.jsonl")
    assert [row["best"] for row in rows] == ["B"] * 3 and rows[0]["reasoning"] == "It is quiet."
    assert lines("best.jsonl") == [stories[row["stories"]["B"]["id"]] for row in rows]


def test_a_judge_that_always_says_the_same_place_is_not_hidden(rank, llmock):
    write_stories(pathlib.Path("stories.jsonl"), 24)
    code, out, said = rank(*scripted(llmock), "--votes", 2)
    assert "agreement: 0% of 6 pairs of votes; by chance 25%" in out
    assert "A 0%, B 100%, C 0%, D 0% of 18 votes; by chance 25% each" in out
    assert "undecided, votes split: groups 0, 1, 2, 3, 4, 5" in out
    assert code == 1 and said[-1] == "rank.py: nothing could be decided"  # point 8
    assert [row["best"] for row in lines("ranked.jsonl")] == [None] * 6 and lines("best.jsonl") == []


@pytest.mark.parametrize("status, hint", [(401, "OPENAI_API_KEY"), (404, "--base_url"), (429, "credit")])
def test_what_no_patience_helps_against_ends_it_at_once(rank, llmock, monkeypatch, status, hint):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_stories(pathlib.Path("stories.jsonl"), 80)
    flags = scripted(llmock)
    llmock.fail(status, times=None, message=f"Not with {KEY}!", code="insufficient_quota" if status == 429 else None)
    code, out, said = rank(*flags)
    assert code == 2 and len(llmock.requests) == 1
    assert f"answers {status} (Not with [key]!" in said[-1] and hint in said[-1] and "20 groups are left" in said[-1]
    assert not pathlib.Path("ranked.jsonl").exists() and not pathlib.Path("best.jsonl").exists()
    llmock.reset()
    assert rank(*scripted(llmock), "--model", "gpt-4o-mini")[0] == 0  # nothing was answered: other settings may follow


# --- what is asked ---


def test_every_group_is_asked_for_twice_in_reversed_order(rank, judge):
    stories = write_stories(pathlib.Path("stories.jsonl"), 40)
    judge.latency = 0.02
    code, out, _ = rank("--concurrency", 4)
    assert code == 0 and len(judge.asked) == 20 and 1 < judge.busiest <= 4
    assert_right(stories)
    groups = collections.defaultdict(list)
    for asked in judge.asked:
        groups[frozenset(asked["ids"])].append(asked["ids"])
    assert all(a == b[::-1] for a, b in groups.values()) and len(groups) == 10
    assert "agreement: 100% of 10 pairs of votes; by chance 25%" in out
    usage = [row["usage"] for row in lines("ranked.jsonl")]
    read, written = (sum(each[key] for each in usage) for key in ("prompt_tokens", "completion_tokens"))
    assert written == 400 and f"20 requests, at most ${read * PRICE[0] + written * PRICE[1]:.4f}" in out
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
    assert all(len(set(column)) == n for column in zip(*script.ORDERS[n])) and len(script.ORDERS[n]) == n


def test_a_tie_is_broken_by_one_more_vote(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 4)
    replies = iter("BDC")  # of ABCD, DCBA, BDAC
    judge.reply = lambda shown: f"BEST_ANSWER:[{(place := next(replies))}]\nREASONING:[said of place {place}]"
    code, out, _ = rank("--concurrency", 1)
    [row] = lines("ranked.jsonl")
    assert code == 0 and row["best"] == "A" and row["reasoning"] == "said of place D (shown as DCBA)"
    assert [(vote["order"], vote["answer"], vote["best"]) for vote in row["votes"]] == [
        ("ABCD", "B", "B"),
        ("DCBA", "D", "A"),
        ("BDAC", "C", "A"),
    ]


def test_last_groups_may_be_smaller(rank, judge):
    for count in (7, 6, 5):
        stories = write_stories(pathlib.Path("stories.jsonl"), count)
        code, out, said = rank("--out", f"{count}.jsonl")
        assert code == 0 and (count > 5 or "'s4' has none" in said[0])
        assert_right(stories if count > 5 else dict(list(stories.items())[:4]), f"{count}.jsonl", f"{count}_best.jsonl")


def test_a_dry_run_sends_nothing_and_shows_the_first_request(rank, judge, monkeypatch):
    write_stories(pathlib.Path("stories.jsonl"), 40)
    monkeypatch.delenv("OPENAI_API_KEY")
    code, out, _ = rank("--dry_run", "--base_url", "https://api.openai.com/v1")
    assert code == 0 and judge.asked == [] and os.listdir() == ["stories.jsonl"] and "requests: 20," in out
    shown = json.loads(out[out.index("{") : out.rindex("}") + 1])
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert rank("--max_requests", 1)[0] == 1 and shown == judge.asked[0]["body"]


# --- what real servers do ---


def test_1_errors_with_status_200_and_pages_instead_of_answers(rank, judge):
    stories = write_stories(pathlib.Path("stories.jsonl"), 4)
    judge.faults.append(lambda h: h.send(200, {"error": {"message": "Slow down", "code": 429}}, Retry_After="0.6"))
    code, out, _ = rank("--votes", 1)
    assert code == 0 and judge.asked[1]["time"] - judge.asked[0]["time"] > 0.6
    refusal, answer = answers()[0, 0]
    assert refusal["status"] == 429 and "Slow down" in refusal["problem"] and refusal["usage"] is None
    sent = lines("ranked.jsonl.answers")[1]["cost"]
    assert refusal["cost"] == -sent  # it has cost nothing
    assert_right(stories)
    pages = [b"<html>Log in, please</html>", completion(choices=None), b'data: {"choices": []}\n\ndata: [DONE]']
    for page, shown in zip(pages, ("<html>Log in", '{"choices": null', 'data: {"choices"')):
        judge.faults.append(lambda h, page=page: h.send(200, page))
        assert rank("--votes", 1, "--overwrite")[0] == 0
        problem = answers()[0, 0][0]["problem"]
        assert f"no chat completion ({shown}" in problem and len(problem) < 150


def test_2_content_in_parts(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 4)
    thinking = dict(type="thinking", thinking=[dict(type="text", text="BEST_ANSWER:[A]")])
    judge.reply = lambda shown: [thinking, dict(type="text", text="BEST_ANS"), dict(type="text", text="WER:[B]")]
    rank("--votes", 1)
    assert lines("ranked.jsonl")[0]["best"] == "B" and len(judge.asked) == 1


@pytest.mark.parametrize("text", ["<think>Is it so? BEST_ANSWER:[A]. No,", "", None])
def test_3_and_4_a_reply_that_is_cut_off_before_its_answer(rank, judge, text):
    write_stories(pathlib.Path("stories.jsonl"), 40)
    judge.faults.extend([lambda h: h.send(200, completion(text, "length"))] * 30)
    code, _, said = rank("--max_new_tokens", 30)
    assert code == 2 and "--max_new_tokens 30 is too small for this model" in said[-1] and len(judge.asked) == 1
    assert answers()[0, 0][0]["answer"] is None
    code = rank("--max_new_tokens", 30, "--temperature", 1, "--votes", 1, "--overwrite", "--concurrency", 1)[0]
    assert (
        code == 1 and 15 < len(judge.asked) <= 1 + 3 * 6
    )  # by chance another may be shorter; after five groups it ends


@pytest.mark.parametrize(
    "fault",
    [
        refuse(400, "Unsupported value: 'temperature' does not support 0.0 with this model."),
        refuse(400, "Only the default is possible here", param="temperature"),
        lambda h: h.send(422, {"detail": [{"loc": ["body", "temperature"], "msg": "Extra inputs are not permitted"}]}),
    ],
)
def test_5_a_temperature_is_refused(rank, judge, fault):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    judge.faults.append(fault)
    assert rank("--retries", 0, "--votes", 1)[0] == 0 and len(judge.asked) == 3
    assert all("temperature" not in asked["body"] for asked in judge.asked[1:])
    for row in lines("ranked.jsonl"):
        assert row["judge"].get("temperature") is None and row["judge"]["max_tokens"] == 500


@pytest.mark.parametrize(
    "message, renamed",
    [
        ("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'.", True),
        ("max_tokens is too large: 50000. This model supports at most 16384 completion tokens", False),
        ("'max_tokens' or 'max_completion_tokens' is too large: 5000. The maximum context length is 4096", False),
    ],
)
def test_5_max_tokens_is_renamed_only_when_its_name_is_refused(rank, judge, message, renamed):
    write_stories(pathlib.Path("stories.jsonl"), 4)
    judge.faults.append(refuse(400, message))
    code, out, _ = rank("--retries", 0, "--votes", 1)
    assert code == (not renamed) and len(judge.asked) == 1 + renamed and (renamed or message[:30] in out)
    if renamed:
        assert judge.asked[1]["body"]["max_completion_tokens"] == 500 and "max_tokens" not in judge.asked[1]["body"]


@pytest.mark.parametrize(
    "status, said", [(400, "System role not supported"), (500, "roles must alternate user/assistant")]
)
def test_6_no_system_role(rank, judge, status, said):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    judge.faults.append(refuse(status, said))
    assert rank("--retries", 0, "--votes", 1)[0] == 0 and len(judge.asked) == 3
    for asked in judge.asked[1:]:
        [message] = asked["body"]["messages"]
        assert message["role"] == "user" and message["content"].startswith(script.SYSTEM)


def test_7_a_prompt_that_was_cut_silently(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 16)
    judge.usage = dict(prompt_tokens=100, completion_tokens=9)
    warned = [line for line in rank()[2] if "has read 100 tokens of a prompt of" in line]
    assert len(warned) == 1
    judge.usage = None
    assert not [line for line in rank("--overwrite")[2] if "warning" in line]


READ = [
    ("BEST_ANSWER:[C]\nREASONING:[The door.]", "C", "The door."),
    ("**BEST_ANSWER:** [c]\n\n**REASONING:** The door\nis never\nopened.", "C", "The door\nis never\nopened."),
    ("best_answer: c\nreasoning: the door", "C", "the door"),
    ("BEST\\_ANSWER:[C] REASONING:[The door.]", "C", "The door."),
    ("REASONING:[Of all, D is loud.\nThe door.]\nBEST_ANSWER:[C]", "C", "Of all, D is loud.\nThe door."),
    ("### BEST_ANSWER\n[C]\n### REASONING\n[The door.]", "C", None),
    ("`BEST_ANSWER:[C]`\n`REASONING:[The door.]`", "C", "The door."),
    ("BEST_ANSWER: [Story C]\nREASONING: The door.", "C", "The door."),
    ("BEST_ANSWER: (C) The one with the door, better than [A].\nREASONING: x", "C", None),
    ("BEST_ANSWER: C. It has a door.", "C", None),
    ("BEST_ANSWER：【C】\nREASONING：The door.", "C", "The door."),
    ('{"BEST_ANSWER": "C", "REASONING": "The door."}', "C", None),
    ("<think>BEST_ANSWER:[A]? No.</think>\nBEST_ANSWER:[C]\nREASONING:[The door.]", "C", "The door."),
    ("BEST_ANSWER:[C]\nREASONING:[x]\nSo: BEST_ANSWER:[C]", "C", None),
    ("BEST_ANSWER: B because it is quiet.", "B", None),  # point 9
    ("BEST_ANSWER: A because it is quiet.", "A", None),
    ("BEST_ANSWER - B", "B", None),
    ("BEST_ANSWER: Option B", "B", None),
    ("The best answer is B.", "B", None),
    ("The best answer is [C].", "C", None),
    ("BEST_ANSWER:[A]\n- B is weak", "A", None),
    ("<b>BEST_ANSWER:[A]</b>", "A", None),
    ("The form is BEST_ANSWER:[X], so BEST_ANSWER:[B]", "B", None),
    ("<think>BEST_ANSWER:[A] is what I", None, None),
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
    ("BEST_ANSWER: A tie between B and C", None, None),
    ("The best answer is a\ntie.", None, None),
    ("BEST_ANSWER:[]\nREASONING:[A door.]", None, None),
    ("BEST_ANSWER: None\nREASONING: Bad stories, all.", None, None),
    ("BEST_ANSWER:\nREASONING: D is loud", None, None),
    ("I think that story C is the best.", None, None),
    ("C", None, None),
    ("", None, None),
]


@pytest.mark.parametrize("reply, label, reasoning", READ, ids=range(len(READ)))
def test_9_replies_are_read_as_models_write_them_and_never_guessed(reply, label, reasoning):
    found = script.read_reply(reply, "ABCD")
    assert found[0] == label and reasoning in (None, found[1])


def test_9_what_cannot_be_read_is_asked_for_twice_more_and_never_unchanged(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    judge.reply = lambda shown: "All of them."
    code, out, _ = rank("--votes", 1, "--retries", 9)
    assert code == 1 and len(judge.asked) == 6 and "names none of ABCD as the best: groups 0, 1\n" in out
    assert len({asked["content"] if "content" in asked else json.dumps(asked["body"]) for asked in judge.asked}) == 6


def forever(piece, pause=0.0, status=b"HTTP/1.1 200 OK\r\n\r\n"):
    def fault(h):
        h.close_connection = True
        h.wfile.write(status)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                h.wfile.write(piece)
                h.wfile.flush()
            except OSError:
                return
            time.sleep(pause)

    return fault


@pytest.mark.parametrize(
    "fault",
    [
        forever(b"x" * 100_000),
        forever(b"x", 0.2),
        forever(b"x", 0.2, b"HTTP/1.1 200 OK\r\nA: "),
        lambda h: h.send(200, b"\x1f\x8b\x08" + bytes(2_000_000), Content_Encoding="gzip"),
    ],
    ids=["no end", "slow", "slow headers", "gzip"],
)
def test_10_answers_without_end(rank, judge, fault):
    write_stories(pathlib.Path("stories.jsonl"), 4)
    judge.faults.append(fault)
    start = time.monotonic()
    assert rank("--votes", 1, "--timeout", 1)[0] == 0 and time.monotonic() - start < 4
    assert os.path.getsize("ranked.jsonl.answers") < 5000


def test_10_waits_are_as_asked_and_a_minute_at_most():
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    for headers, low, high in (
        ({"retry-after": "0.9"}, 0.9, 0.9),
        ({"retry-after": "99999999999"}, 60, 60),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, 60, 60),
        ({"retry-after": date}, 28, 31),
        ({"retry-after-ms": "700", "retry-after": "9"}, 0.7, 0.7),
        ({"retry-after": "a while"}, 0, 0),
        ({"retry-after": "-5"}, 0, 0),
        ({"retry-after": "nan"}, 0, 60),
        ({}, 0, 0),
    ):
        assert low <= script.asked_wait(headers) <= high, headers


@pytest.mark.parametrize(
    "spelt",
    [KEY, " ".join(KEY), "".join(f"\\u{ord(c):04x}" for c in KEY), json.dumps(list(KEY)), list(KEY)],
    ids=range(5),
)
def test_10_the_key_in_any_spelling_is_stored_nowhere(rank, judge, spelt):
    write_stories(pathlib.Path("stories.jsonl"), 4)
    escaped = "".join(f"\\u{ord(c):04x}" for c in KEY)  # by JSON itself: what is checked is decoded
    judge.faults.append(lambda h: h.say(spelt if isinstance(spelt, list) else f"REASONING:[{spelt}]"))
    judge.faults.append(lambda h: h.send(200, json.dumps(completion("@")).replace("@", escaped).encode()))
    judge.faults.append(lambda h: h.send(400, {"error": {"message": spelt}}))
    rank("--votes", 1)
    for path in pathlib.Path().glob("ranked.jsonl*"):
        stored = re.sub(r"\\+u00(..)", lambda found: chr(int(found[1], 16)), path.read_text())
        assert KEY not in re.sub(r'[\s",\[\]\\]', "", stored), path


@pytest.mark.parametrize("reply", ["The best answer" + "\n" * 200_000, "best answer [" * 20_000, "reasoning " * 30_000])
def test_11_reading_takes_linear_time(reply):
    start = time.perf_counter()
    assert script.read_reply(reply, "ABCD")[0] is None and time.perf_counter() - start < 1


def test_12_azures_classic_form_gets_a_line(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 4)
    code, _, said = rank("--base_url", "https://me.openai.azure.com/openai/deployments/x?api-version=2024-06-01")
    assert code == 2 and len(said) == 1 and "https://NAME.openai.azure.com/openai/v1" in said[0]


def test_connections_that_break_are_made_again(rank, judge):
    stories = write_stories(pathlib.Path("stories.jsonl"), 4)
    judge.faults.append(lambda h: h.send(200, json.dumps(completion()).encode()[:50], length=500))
    judge.faults.append(lambda h: h.connection.shutdown(socket.SHUT_RDWR))
    assert rank("--votes", 1)[0] == 0 and len(judge.asked) == 3
    assert_right(stories)
    lost = answers()[0, 0][0]
    assert lost["status"] is None and lost["cost"] == 0  # it may have cost as much as it could


def test_a_429_holds_everyone(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 400)
    judge.latency = 0.005
    judge.faults.extend([None] * 20 + [lambda h: h.send(429, {}, Retry_After="1.5")])
    assert rank("--votes", 1)[0] == 0 and len(judge.asked) == 101
    refused = judge.asked[20]["time"]
    assert len([asked for asked in judge.asked[21:] if asked["time"] < refused + 1.5]) <= 14


def test_redirects_are_not_followed_and_the_key_is_all_that_is_sent(rank, judge, folder, monkeypatch):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    other = Judge()
    judge.faults.append(lambda h: h.send(307, b"", Location=other.url + "/chat/completions"))
    code, _, said = rank()
    assert code == 2 and "answers 307" in said[-1] and "--base_url" in said[-1] and len(judge.asked) == 1
    assert other.asked == []
    other.shutdown()
    (folder / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    elsewhere = judge.url.replace("127.0.0.1", "0.0.0.0")  # the same, but nobody knows
    assert rank("--base_url", elsewhere, "--overwrite")[0] == 0
    monkeypatch.delenv("OPENAI_API_KEY")
    assert rank("--base_url", elsewhere, "--out", "without.jsonl")[0] == 0
    assert [asked["headers"]["Authorization"] for asked in judge.asked] == [f"Bearer {KEY}"] * 5 + [None] * 4


def test_a_server_that_is_not_there_or_goes_away_ends_it(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 80)
    code, _, said = rank("--base_url", "http://127.0.0.1:9/v1", "--retries", 1)
    assert code == 1 and "127.0.0.1:9" in said[-1] and "cannot be reached" in said[-1] and "20 groups" in said[-1]
    judge.faults.extend([None] * 12 + [lambda h: h.send(502, b"<html>Bad Gateway</html>")] * 200)
    code, out, said = rank("--retries", 0, "--overwrite")
    assert code == 1 and "answers 502 (<html>Bad Gateway</html>)" in said[-1] and len(judge.asked) < 40
    judge.faults.clear()
    before = len([rows for rows in answers().values() if rows[-1]["best"]])
    judge.asked.clear()
    assert rank()[0] == 0 and len(judge.asked) == 40 - before


# --- nothing twice, nothing lost, no more than is allowed ---


def test_limits_are_never_exceeded(rank, judge):
    stories = write_stories(pathlib.Path("stories.jsonl"), 80)
    judge.latency = 0.01
    for limit in (0, 1, 13):
        code, out, said = rank("--max_requests", limit)
        assert code == 1 and f"--max_requests {limit} is reached" in said[-1] and len(judge.asked) == limit
    judge.usage = dict(prompt_tokens=1000, completion_tokens=500)  # dear ones
    for limit in (0.07, 0.09):
        code, _, said = rank("--max_cost", limit)
        usage = [row["usage"] for rows in answers().values() for row in rows]
        cost = sum(u["prompt_tokens"] * PRICE[0] + u["completion_tokens"] * PRICE[1] for u in usage)
        assert code == 1 and "--max_cost" in said[-1] and len(judge.asked) == len(usage) and cost <= limit
    assert rank("--max_cost", 9)[0] == 0
    assert_right(stories)
    code, _, said = rank("--model", "llama3", "--max_cost", 1)
    assert code == 2 and len(said) == 1 and "--price" in said[0]


def test_what_a_killed_run_had_sent_counts_as_spent(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    assert rank()[0] == 0
    with open("ranked.jsonl.answers", "a") as f:
        f.write('{"sent": 1, "cost": 0.5}\n{"sent": 1, "co')
    out = rank("--max_requests", 5)[1]
    assert "in all: 5 requests" in out and 0.5 < float(re.search(r"at most \$([\d.]+)", out)[1]) < 0.51
    code, _, said = rank("--max_cost", 0.5, "--votes", 3)
    assert code == 1 and "--max_cost" in said[-1] and len(judge.asked) == 4


def test_another_run_is_refused_until_overwritten(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    assert rank()[0] == 0 and rank()[0] == 0 and len(judge.asked) == 4
    before = pathlib.Path("ranked.jsonl.answers").read_bytes()
    for flags in (("--model", "gpt-4o-mini"), ("--temperature", "1"), ("--seed", "1"), ("--judge", "human")):
        code, _, said = rank(*flags)
        assert code == 2 and len(said) == 1 and "other stories or settings" in said[0] and "--overwrite" in said[0]
    held = script.Books("other.answers", {}, False)
    code, _, said = rank("--out", "other")
    assert code == 2 and "another rank.py is at work" in said[0]
    held.file.close()
    assert pathlib.Path("ranked.jsonl.answers").read_bytes() == before and len(judge.asked) == 4
    assert rank("--overwrite", "--seed", 1)[0] == 0 and len(judge.asked) == 8


def test_files_of_others_are_left_alone(rank, judge):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    for name in ("ranked.jsonl", "best.jsonl"):
        pathlib.Path(name).write_text("mine\n")
        code, _, said = rank()
        assert code == 2 and len(said) == 1 and f"{name}: is there" in said[0]
        pathlib.Path(name).unlink()
    start = '{"settings": {}}\n'
    for text in ("mine\n", "mine", "\n", "[1]\n", '{"settings": 1}\n{"best": "A"}\n', start + '{"best": "A"}\n{"gr\n'):
        pathlib.Path("ranked.jsonl.answers").write_text(text)
        code, _, said = rank()
        assert code == 2 and len(said) == 1 and "ranked.jsonl.answers" in said[0], text
        assert pathlib.Path("ranked.jsonl.answers").read_text() == text
    for flags in (("--out", "stories.jsonl"), ("--best", "stories.jsonl"), ("--best", "ranked.jsonl")):
        assert rank(*flags, "--overwrite")[0] == 2
    assert judge.asked == []


def start(judge, *flags):
    command = [sys.executable, ROOT / "rank.py", "stories.jsonl", "--base_url", judge.url, *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(judge, process, count):
    while len(judge.asked) < count:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)


def test_killed_again_and_again_nothing_is_lost_and_nothing_asked_twice(judge):
    stories = write_stories(pathlib.Path("stories.jsonl"), 160)
    path, judge.latency, known, have = pathlib.Path("ranked.jsonl.answers"), 0.05, {}, b""
    groups = script.make_groups(list(stories.values()), 1337)
    for kill in range(3):
        with start(judge) as process:
            wait_for(judge, process, len(judge.asked) + 15 + 3 * kill)
            process.kill()
        assert path.read_bytes().startswith(have)
        have = path.read_bytes()
        have = have[: have.rfind(b"\n") + 1]
        for row in map(json.loads, have.splitlines()):
            if row.get("best"):
                ids = tuple(groups[row["group"]][label]["id"] for label in row["order"])
                known.setdefault(ids, len(judge.asked))
    with start(judge) as process:
        assert process.wait() == 0, process.stdout.read()
    assert_right(stories)
    for i, asked in enumerate(judge.asked):
        assert i < known.get(asked["ids"], 1e9), "asked for again"
    assert len(answers()) == 80 and 20 < len(known) < 80
    assert 80 <= len(judge.asked) <= sum("sent" in row for row in lines(path)) <= 80 + 3 * 8


def test_ctrl_c_finishes_what_was_sent(judge):
    write_stories(pathlib.Path("stories.jsonl"), 80)
    judge.latency = 0.2
    with start(judge, "--concurrency", 4) as process:
        wait_for(judge, process, 7)
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
        assert process.wait() == 130 and re.search(r"interrupted; \d+ groups are left", said) and "Trace" not in said
    assert len(judge.asked) == len(answers()) < 40


# --- offline ---


def write_checkpoint(path, seed, tokenizer="bytes", window=200):
    """A small model of random weights as train_gpt.py saves them, and the same one of transformers."""
    C, V, rows = 16, 257, 320
    config = NanoChatConfig(
        vocab_size=rows,
        hidden_size=C,
        intermediate_size=4 * C,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=window,
        final_logit_softcapping=15.0,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    theirs = NanoChatForCausalLM(config).eval()
    for p in theirs.parameters():
        p.data.normal_(std=0.4)
    model = {"embed": theirs.model.embed_tokens.weight, "head": theirs.lm_head.weight}
    for i, layer in enumerate(theirs.model.layers):
        qkv = [getattr(layer.self_attn, name).weight for name in ("q_proj", "k_proj", "v_proj")]
        o, up, down = layer.self_attn.o_proj.weight, layer.mlp.fc1.weight, layer.mlp.fc2.weight
        for name, weight in dict(qkv=torch.stack(qkv), o=o, up=up, down=down).items():
            model[f"blocks.{i}.{name}"] = weight
    sizes = dict(vocab_size=V, block_size=window, n_layer=2, n_head=2, n_embd=C)
    model = {name: weight.detach().clone() for name, weight in model.items()}
    torch.save(dict(format=1, config=sizes, tokenizer=tokenizer, model=model), path)
    return theirs


LOCAL = "--judge local --scary scary.pt --plain plain.pt --device cpu --dtype float32".split()


@torch.no_grad()
def losses_of(model, prompt, text):
    """Mean cross-entropy of the bytes after the prompt: transformers, one story by itself."""
    tokens = torch.tensor([[256, *text.encode()]])
    logits = model(tokens).logits[0, len(prompt) : -1, :257]
    return F.cross_entropy(logits, tokens[0, len(prompt) + 1 :]).item()


def test_scores_are_cross_entropy_differences_by_transformers(rank, folder, monkeypatch):
    chance = random.Random(1)
    texts = [PROMPT + "".join(chance.choices("abcdefg .", k=chance.randint(20, 150))) for _ in range(11)]
    texts[4] = PROMPT + " and on" * 15  # repeats itself
    texts[9] = PROMPT  # nothing follows
    rows = [dict(id=i, prompt=PROMPT, text=text) for i, text in enumerate(texts)]
    (folder / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = [write_checkpoint("scary.pt", 1), write_checkpoint("plain.pt", 2)]
    code, out, _ = rank(*LOCAL, "--repetition_penalty", 3)
    assert code == 0 and "3 of 3 groups" in out
    for row in lines("ranked.jsonl"):
        said = dict(re.findall(r"([A-D]) (-?[\d.]+) \(", row["reasoning"]))
        expected = {}
        for label, story in row["stories"].items():
            if story["text"] == PROMPT:
                assert f"{label} -inf" in row["reasoning"] and row["best"] != label
                continue
            scary, plain = (losses_of(model, PROMPT, story["text"]) for model in models)
            written = story["text"][len(PROMPT) :]
            runs = [written[i : i + 16] for i in range(len(written) - 15)]
            expected[label] = plain - scary - 3 * (len(runs) - len(set(runs))) / len(runs)
        assert {label: float(x) for label, x in said.items()} == pytest.approx(expected, abs=2e-4)
        assert row["best"] == max(expected, key=expected.get)
    assert [len(row["stories"]) for row in lines("ranked.jsonl")] == [4, 4, 3]
    monkeypatch.setattr(script, "mean_losses", lambda model, rows: pytest.fail() if len(rows) > 1 else [0.0])
    assert rank(*LOCAL, "--repetition_penalty", 3)[0] == 0  # nothing is computed again
    os.utime("scary.pt", (1, 1))
    assert "other stories or settings" in rank(*LOCAL, "--repetition_penalty", 3)[2][0]


def test_folders_of_runs_and_checkpoints_that_are_none(rank, folder):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    os.mkdir("run")
    write_checkpoint("run/ckpt_000300.pt", 1), write_checkpoint("plain.pt", 2, window=40)
    assert rank(*LOCAL, "--scary", "run")[0] == 0
    checkpoint = torch.load("plain.pt")
    for change in (dict(n_head=3), dict(n_embd=32), dict(vocab_size=100), dict(n_layer=3)):
        torch.save({**checkpoint, "config": {**checkpoint["config"], **change}}, "damaged.pt")
        code, _, said = rank(*LOCAL, "--scary", "damaged.pt", "--out", "x")
        assert code == 2 and len(said) == 1 and "damaged.pt: not a checkpoint" in said[0], change
    torch.save({**checkpoint, "tokenizer": {"chars": "abc"}}, "chars.pt")
    for path in ("chars.pt", "stories.jsonl"):
        code, _, said = rank(*LOCAL, "--scary", path, "--out", "x")
        assert code == 2 and len(said) == 1 and f"{path}: not a checkpoint" in said[0]
    assert "none.pt: No such file" in rank(*LOCAL, "--scary", "none.pt", "--out", "x")[2][0]
    assert "needs two checkpoints" in rank("--judge", "local", "--out", "x")[2][0]


# --- a person, and mistakes ---


def test_a_person_chooses(rank, monkeypatch, judge):
    stories = write_stories(pathlib.Path("stories.jsonl"), 16, text=PROMPT + "\n\nA door\x1b[2J opens.")
    monkeypatch.setattr(sys, "stdin", io.StringIO("b\n\nE\n s \nD\nq\n"))
    code, out, said = rank("--judge", "human")
    assert code == 0 and "ended by q; 1 groups are left" in said[-1] and "undecided, skipped: groups 1\n" in out
    assert "\x1b" not in out and out.count("--- C ---") == 4
    assert [row["best"] for row in lines("ranked.jsonl")] == ["B", None, "D"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("c\na\n"))
    code, out, _ = rank("--judge", "human")
    assert code == 0 and [row["best"] for row in lines("ranked.jsonl")] == list("BCDA") and judge.asked == []
    assert lines("best.jsonl") == [stories[row["stories"][row["best"]]["id"]] for row in lines("ranked.jsonl")]


@pytest.mark.parametrize(
    "text, words",
    [
        ("\n \n", "stories.jsonl: 0 stories"),
        ('{"id": 1, "text": "x"}\n', "stories.jsonl: 1 stories"),
        ('{"id": 1, "text": "x"}\n\n{"id": 1, "text": "y"}\n', "stories.jsonl:3: not a story"),
        ('{"id": 1, "text": "x"}\n{"id": 2, "text": " "}\n', "stories.jsonl:2: not a story"),
        ('{"id": 1, "text": "x"}\n{"id": 2, "prompt": "y", "text": "x"}\n', "stories.jsonl:2: not a story"),
        ('{"id": 1, "text": "x"}\n{"id": 2, "text": 5}\n', "stories.jsonl:2: not a story"),
        ('{"id": [], "text": "x"}\n', "stories.jsonl:1: not a story"),
        ('{"id": 1, "text": "\\ud800"}\n', "stories.jsonl:1: not a story"),
        ('{"id": 1, "prompt": null, "text": "x"}\n', "stories.jsonl:1: not a story"),
        ('{"id": 1, "text": "x"}\n["text"]\n', "stories.jsonl:2: not a story"),
        (b'{"id": 1, "text": "\xff\xfe"}\n', "stories.jsonl:1: not a story"),
        ("[" * 100_000, "stories.jsonl:1: not a story"),
    ],
    ids=range(12),
)
def test_stories_that_are_none_are_named_by_their_line(rank, judge, text, words):
    pathlib.Path("stories.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    code, out, said = rank()
    assert code == 2 and out == "" and len(said) == 1 and said[0].startswith(f"rank.py: {words}")
    assert judge.asked == [] and os.listdir() == ["stories.jsonl"]


def test_other_mistakes_get_a_line(rank, judge, monkeypatch):
    write_stories(pathlib.Path("stories.jsonl"), 8)
    for flags, words in {
        ("--votes", "0"): "--votes",
        ("--out", "stories.jsonl/x"): "stories.jsonl",
        ("--base_url", "localhost:8000"): "--base_url",
        ("--base_url", "http://[::1/v1"): "--base_url",
        ("--base_url", "http://me:secret@x/v1"): "--base_url",
    }.items():
        code, _, said = rank(*flags)
        assert code == 2 and len(said) == 1 and words in said[0] and "secret" not in said[0], said
    assert "none.jsonl: No such file" in rank(stories="none.jsonl")[2][0]
    monkeypatch.delenv("OPENAI_API_KEY")
    code, _, said = rank("--base_url", "https://api.openai.com/v1")
    assert code == 2 and len(said) == 1 and "OPENAI_API_KEY" in said[0]
    monkeypatch.setenv("OPENAI_API_KEY", "sk-with a\nline")
    code, _, said = rank()
    assert code == 2 and len(said) == 1 and "OPENAI_API_KEY" in said[0] and "line" not in said[0]
    assert judge.asked == []
