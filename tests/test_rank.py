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
from conftest import call, refused
from test_model import as_nanochat, random_model, write_checkpoint
from test_train_gpt import popen

import rank as script

KEY = "sk-test-0123456789"
STORY = re.compile(r"night (s\d+) with a fear of (\d+)")
PROMPT = "It was a dark and stormy night"


def write_stories(count, **more):
    fears = random.Random(count).sample(range(1000), count)
    rows = [dict(id=f"s{i}", prompt=PROMPT, text=f"{PROMPT} s{i} with a fear of {x}.") for i, x in enumerate(fears)]
    rows = [{**row, "tokens": 300, "seed": 7, "checkpoint": "ckpt.pt", **more} for row in rows]
    pathlib.Path("stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {row["id"]: row for row in rows}


class Handler(http.server.BaseHTTPRequestHandler):
    """Chat completions: the story with the most fear is the best. First come what the server's `faults` do instead."""

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def do_POST(self):
        judge, arrived = self.server, time.monotonic()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        told = dict(key=self.headers["Authorization"], path=self.path, port=self.client_address[1])
        judge.asked.append(dict(body=body, time=arrived, **told))
        fault = judge.faults.popleft() if judge.faults else None
        time.sleep(judge.latency)
        if fault:
            return fault(self)
        content = body["messages"][-1]["content"]
        fears = [fear for _, fear in STORY.findall(content)]
        most = max(fears, key=int)
        usage = judge.usage or dict(prompt_tokens=len(content) // 4, completion_tokens=20)
        text = f"BEST_ANSWER:[{'ABCD'[fears.index(most)]}]\nREASONING:[a fear of {most}]"
        self.send(200, completion(text, usage=usage))

    def send(self, status, data, **headers):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def completion(text="BEST_ANSWER:[A]", finish="stop", **changes):
    choice = dict(index=0, message=dict(role="assistant", content=text), finish_reason=finish)
    return {"choices": [choice], "usage": dict(prompt_tokens=1000, completion_tokens=2), **changes}


def page(data, status=200, **more):
    return lambda h: h.send(status, data, **more)


def refuse(status, message, **more):
    return page({"error": {"message": message, **more}}, status)


@pytest.fixture
def judge():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket.listen(64)
        server.handle_error = lambda *_: None  # a client that has hung up, or was killed
        server.url, server.latency, server.usage = f"http://127.0.0.1:{server.server_port}/v1", 0.0, None
        server.asked, server.faults = [], collections.deque()
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return tmp_path


@pytest.fixture
def rank(judge):
    """Calls rank.py in this process: what it prints, and the lines of stderr. Later flags win."""

    def ranked(*flags, **settings):
        out, said = call("rank.py", "stories.jsonl", "--base_url", judge.url, *flags, **settings)
        for text in (out, said, *[path.read_text() for path in pathlib.Path().glob("*.jsonl*")]):
            assert KEY not in text
        return out, said.splitlines()

    return ranked


def dollars(usage):
    return usage["prompt_tokens"] * 2.5e-6 + usage["completion_tokens"] * 10e-6  # of gpt-4o


def lines(path):
    """The objects of a .jsonl; a kill can have cut the last line."""
    return [json.loads(line) for line in pathlib.Path(path).read_text().split("\n")[:-1]]


def answers():
    """What a run was told, refusals and replies that could not be read too."""
    return [row for row in lines("ranked.jsonl.answers") if "vote" in row]


def assert_right(stories):
    """The files hold every group of four, the one with the most fear the best."""
    rows, ids, winners = lines("ranked.jsonl"), list(stories), []
    assert [row["group"] for row in rows] == list(range(-(-len(ids) // 4)))
    for row in rows:
        group = ids[4 * row["group"] :][:4]
        assert sorted(story["id"] for story in row["stories"].values()) == sorted(group)
        assert list(row["stories"]) == list("ABCD"[: len(group)])
        for story in row["stories"].values():
            assert story == {key: stories[story["id"]][key] for key in ("id", "prompt", "text")}
        winners.append(row["stories"][row["best"]]["id"])
        assert winners[-1] == max(group, key=lambda i: int(STORY.search(stories[i]["text"])[2]))
    assert lines("best.jsonl") == [stories[i] for i in winners]


# --- against llmock, which judges its clients ---
def scripted(llmock):
    llmock.reply("BEST_ANSWER:[B]\nREASONING:[It is quiet.]", times=None)
    return ["--base_url", llmock.base_url(), "--votes", 1, "--timeout", 1]


def test_refusals_and_delays_are_outwaited_as_they_should_be(rank, llmock):
    stories = write_stories(12)
    flags = scripted(llmock)
    llmock.rate_limit(times=1, retry_after=0.7).fail(500, times=1).delay(2, times=1)
    out, _ = rank(*flags)
    assert "3 of 3 groups" in out and " 6 requests" in out
    llmock.assert_resilient(strict=True)
    assert sorted((row["status"] for row in answers()), key=str) == [200, 200, 200, 429, 500, None]
    rows = lines("ranked.jsonl")
    assert [row["best"] for row in rows] == ["B"] * 3 and rows[0]["reasoning"] == "It is quiet."
    assert lines("best.jsonl") == [stories[row["stories"]["B"]["id"]] for row in rows]


def test_8_a_judge_that_always_says_the_same_place_is_not_hidden(rank, llmock):
    write_stories(24)
    out, said = rank(*scripted(llmock), "--votes", 2, code=1)
    assert "agreement: 0% of 6 pairs of votes; by chance 25%" in out
    assert "A 0%, B 100%, C 0%, D 0% of 18 votes; by chance 25% each" in out
    assert said[-1] == "rank.py: nothing could be decided"
    assert [row["best"] for row in lines("ranked.jsonl")] == [None] * 6 and lines("best.jsonl") == []


# --- what is asked ---
def test_every_group_is_asked_for_twice_in_reversed_order(rank, judge):
    stories, judge.latency = write_stories(41), 0.05
    out, said = rank("--concurrency", 4)
    assert "'s40' has none to be compared with" in said[0] and stories.pop("s40")
    assert len(judge.asked) == 20 and len({asked["port"] for asked in judge.asked}) == 4
    assert_right(stories)
    groups = collections.defaultdict(list)
    for asked in judge.asked:
        shown = [name for name, _ in STORY.findall(asked["body"]["messages"][-1]["content"])]
        groups[frozenset(shown)].append(shown)
    assert all(a == b[::-1] for a, b in groups.values()) and len(groups) == 10
    assert "agreement: 100% of 10 pairs of votes; by chance 25%" in out
    cost = sum(dollars(row["usage"]) for row in lines("ranked.jsonl"))
    assert f"20 requests, at most ${cost:.4f}" in out and cost > 0.01
    assert judge.asked[0]["path"] == "/v1/chat/completions" and judge.asked[0]["key"] == f"Bearer {KEY}"
    system, user = judge.asked[0]["body"]["messages"]
    assert system["role"] == "system" and "BEST_ANSWER:[X]\nREASONING:[" in user["content"]


def test_stories_of_one_opening_come_together_and_all_have_every_place():
    stories = [dict(id=i, prompt="AB"[i % 2]) for i in range(10)]
    groups = [sorted(story["id"] for story in group.values()) for group in script.make_groups(stories, 1)]
    assert groups == [[0, 2, 4, 6], [1, 3, 5, 8], [7, 9]]
    for n, orders in script.ORDERS.items():
        assert len(orders) == n and all(len(set(column)) == n for column in zip(*orders))


def test_a_tie_is_broken_by_one_more_vote(rank, judge):
    write_stories(4)
    judge.faults.extend(page(completion(f"BEST_ANSWER:[{x}]\nREASONING:[place {x}]")) for x in "BDC")
    rank()
    [row] = lines("ranked.jsonl")
    assert row["best"] == "A" and row["reasoning"] == "place D (shown as DCBA)"
    votes = [(vote["order"], vote["answer"], vote["best"]) for vote in row["votes"]]
    assert votes == [("ABCD", "B", "B"), ("DCBA", "D", "A"), ("BDAC", "C", "A")]


def test_a_dry_run_sends_nothing_and_shows_the_first_request(rank, judge):
    write_stories(40)
    out, _ = rank("--dry_run")
    assert judge.asked == [] and os.listdir() == ["stories.jsonl"] and "requests: 20," in out
    shown = json.loads(out[out.index("{") : out.rindex("}") + 1])
    rank("--max_requests", 1, code=1)
    assert shown == judge.asked[0]["body"]


# --- what real servers do ---
def forever(piece, pause=0.0, begin=b"HTTP/1.1 200 OK\r\n\r\n"):
    def fault(h):
        h.close_connection, end = True, time.monotonic() + 20
        h.wfile.write(begin)
        while time.monotonic() < end:
            h.wfile.write(piece)
            time.sleep(pause)

    return fault


NO_COMPLETION = "None a reply that is no chat completion ("
TOO_SMALL = "--max_new_tokens 30 is too small for this model"
PARTS = [dict(type="thinking", thinking=[dict(type="text", text="BEST_ANSWER:[A]")])]
PARTS += [dict(type="text", text=text) for text in ("BEST_ANS", "WER:[B]")]
CUT = [page(completion("<think>Is it so? BEST_ANSWER:[A]. No,", "length"))]
CUT_PROMPT = page(completion(usage=dict(prompt_tokens=9, completion_tokens=9)))
FASTAPI = {"detail": [{"loc": ["body", "temperature"], "msg": "Not permitted"}]}
# What the server does before it judges; exit code, requests for two groups, and what is said, stored, or sent.
SERVERS = {
    "1 error": ([page({"error": {"message": "Slow", "code": 429}}, Retry_After="0.7")], 0, 3, '429 {"error": {"mess'),
    "1 page": ([page(b"<html>Log in, please</html>" * 10)], 0, 3, NO_COMPLETION + "<html>Log in"),
    "1 null": ([page(completion(choices=None))], 0, 3, NO_COMPLETION + '{"choices": null'),
    "1 sse": ([page(b'data: {"choices": []}\n\ndata: [DONE]')], 0, 3, NO_COMPLETION + 'data: {"choices"'),
    "2": ([page(completion(PARTS))], 0, 2, "200 BEST_ANSWER:[B]"),
    "3": (CUT, 2, 1, TOO_SMALL),
    "4 empty": ([page(completion("", "length"))], 2, 1, TOO_SMALL),
    "4 null": ([page(completion(None, "length"))], 2, 1, TOO_SMALL),
    "4 warm": (CUT * 3, 0, 4, "group 0 is undecided: no reply names"),  # by chance another may be shorter
    "5": ([refuse(400, "Unsupported value: 'temperature' does not support 0.0.")], 0, 3, "[system user max_tokens]"),
    "5 param": ([refuse(400, "Only the default is possible", param="temperature")], 0, 3, "[system user max_tokens]"),
    "5 detail": ([page(FASTAPI, 422)], 0, 3, "[system user max_tokens]"),
    "5 name": ([refuse(400, "Unsupported parameter: 'max_tokens'")], 0, 3, " max_completion_tokens temperature]"),
    "5 here": ([refuse(400, "'max_tokens' is not supported here")], 0, 3, " max_completion_tokens temperature]"),
    "5 value": ([refuse(400, "max_tokens is too large: 50000. This model supports at most 16384")], 0, 2, "undecided"),
    "6": ([refuse(400, "System role not supported")], 0, 3, "[user max_tokens temperature]"),
    "6 roles": ([refuse(500, "roles must alternate user/assistant")], 0, 3, "[user max_tokens temperature]"),
    "7": ([CUT_PROMPT] * 2, 0, 2, "has read 9 tokens of a prompt of"),
    "9": ([page(completion("All of them."))] * 3, 0, 4, "group 0 is undecided: no reply names one of ABCD"),
    "10 endless": ([forever(b"x" * 100_000)], 0, 3, NO_COMPLETION + "xxx"),
    "10 slow": ([forever(b"x", 0.2)], 0, 3, "no answer within 1 s"),
    "10 headers": ([forever(b"x", 0.2, b"HTTP/1.1 200 OK\r\nA: ")], 0, 3, "no answer within 1 s"),
    "10 gzip": ([page(b"\x1f\x8b\x08" + bytes(2_000_000), Content_Encoding="gzip")], 0, 3, NO_COMPLETION),
    "hangup": ([lambda h: h.connection.shutdown(socket.SHUT_RDWR)], 0, 3, "hangs up"),
    "down": ([refuse(502, "Later")] * 2, 1, 2, 'answers 502 ({"error": {"message": "Later"}})'),
    "key": ([refuse(401, "Not you!")], 2, 1, 'answers 401 ({"error": {"message": "Not you!"}}); are OPENAI_API_KEY'),
    "quota": ([refuse(429, "Pay!", code="insufficient_quota")], 2, 1, "answers 429 ("),
    "redirect": ([page(b"", 307, Location="/v1/chat/completions")], 2, 1, "answers 307 ("),  # and is not followed
}


@pytest.mark.parametrize("name", SERVERS)
def test_what_real_servers_do(rank, judge, name):
    write_stories(8)
    (faults, code, requests, words), start = SERVERS[name], time.monotonic()
    judge.faults.extend(faults)
    flags = "--votes 1 --timeout 1 --retries 1 --max_new_tokens 30 --temperature".split()
    out, said = rank(*flags, 1 if name == "4 warm" else 0, code=code)
    assert time.monotonic() - start < 10 and len(judge.asked) == requests and len(said) <= 1
    told, bodies = [f"{row['status']} {row['said']}" for row in answers()], [asked["body"] for asked in judge.asked]
    sent = [[message["role"] for message in body["messages"]] + list(body)[2:] for body in bodies]
    assert words in "\n".join([out, *said, *told, *[f"[{' '.join(names)}]" for names in sent]])
    assert all(body["messages"][0]["content"].startswith(script.SYSTEM) for body in bodies)
    assert name != "9" or len(set(map(json.dumps, bodies))) == 4  # never unchanged
    assert max(map(len, told)) < 200 and answers()[0]["answer"] == {"2": "B", "7": "A"}.get(name)

    rows = lines("ranked.jsonl.answers")
    for asked, told in zip(rows[::2], rows[1::2]):  # what has no answer may have cost as much as it could
        cost = dollars(told["usage"]) if told["usage"] else asked["cost"] if told["status"] in (None, 200) else 0
        assert asked["cost"] > 0 and asked["cost"] + told["cost"] == pytest.approx(cost)
    wait = {429: 0.7, None: 0.5}.get(rows[1]["status"], 0)
    assert requests == 1 or judge.asked[1]["time"] - judge.asked[0]["time"] >= wait
    assert os.path.exists("ranked.jsonl") == os.path.exists("best.jsonl") == (code == 0)
    if code == 0:
        used = {"temperature": None} | {key: value for key, value in bodies[-1].items() if key != "messages"}
        assert used.items() <= lines("ranked.jsonl")[-1]["judge"].items()


READ = [
    ("BEST_ANSWER:[C]\nREASONING:[The door.]", "C", "The door."),
    ("**BEST_ANSWER:** [c]\n\n**REASONING:** The door\nis never\nopened.", "C", "The door\nis never\nopened."),
    ("REASONING:[Of all, D is loud.\nThe door.]\nBEST_ANSWER:[C]", "C", "Of all, D is loud.\nThe door."),
    ("### BEST_ANSWER\n[C]\n### REASONING\n[The door.]", "C", "The door."),
    ('{"BEST_ANSWER": "C", "REASONING": "The door."}', "C", None),
    ("<think>BEST_ANSWER:[A]? No.</think>\nBEST_ANSWER:[C] REASONING:[The door.]", "C", "The door."),
    ("BEST_ANSWER:[A]\n- B is weak", "A", None),
]
B = "BEST_ANSWER: B because it is quiet.|BEST_ANSWER - B|BEST_ANSWER: Option B|The best answer is B.|**Best answer: B**"
B += "|BEST_ANSWER: B. A door opens.|BEST_ANSWER：【B】|`BEST_ANSWER:[B]`|Not BEST_ANSWER:[X], so BEST_ANSWER:[B]"
A = "BEST_ANSWER: A because it is quiet.|BEST_ANSWER: (A) is quiet.|The best answer is A."
NONE = "BEST_ANSWER:[E]|BEST_ANSWER:[X]|BEST_ANSWER:[B, C]|BEST_ANSWER: B or C|BEST_ANSWER:[B] and [C]|BEST_ANSWER: B/C"
NONE += "|BEST_ANSWER: [B] or maybe [C]|BEST_ANSWER: B - C|BEST_ANSWER:[B] REASONING:[x] BEST_ANSWER:[C]|BEST_ANSWER:[]"
NONE += "|BEST_ANSWER: a tie between B and C|BEST_ANSWER: A tie|The best answer is a tie|<think>BEST_ANSWER:[A] is"
NONE += "|BEST_ANSWER: None REASONING: Bad stories|BEST_ANSWER: REASONING: D is loud|I think that C is the best.|C|"
READ += [(reply, label, None) for text, label in ((A, "A"), (B, "B"), (NONE, None)) for reply in text.split("|")]


@pytest.mark.parametrize("reply, label, reasoning", READ, ids=range(len(READ)))
def test_9_replies_are_read_as_models_write_them_and_never_guessed(reply, label, reasoning):
    found = script.read_reply(reply, "ABCD")
    assert found[0] == label and reasoning in (None, found[1])


def test_10_waits_are_as_asked_and_a_minute_at_most():
    date = email.utils.formatdate(time.time() + 30.5, usegmt=True)
    waits = {"0.9": 0.9, "99999999999": 60, "Fri, 31 Dec 9999 23:59:59 GMT": 60, date: 30, "a while": 0, "-5": 0}
    for after, wait in waits.items():
        assert script.asked_wait({"retry-after": after}) == pytest.approx(wait, abs=2 if after == date else 0), after
    assert script.asked_wait({"retry-after-ms": "700", "retry-after": "9"}) == 0.7 and script.asked_wait({}) == 0


ESCAPED = "".join(f"\\u{ord(c):04x}" for c in KEY)


@pytest.mark.parametrize("spelt", [KEY, " ".join(KEY), ESCAPED, json.dumps(list(KEY)), list(KEY)], ids=range(5))
def test_10_the_key_in_any_spelling_is_stored_nowhere(rank, judge, spelt):
    write_stories(4)
    escaped = json.dumps(completion("@")).replace("@", ESCAPED).encode()  # decoded before it is checked
    judge.faults.extend([page(completion(spelt)), page(escaped), refuse(400, spelt)])
    rank("--votes", 1, code=1)
    for path in pathlib.Path().glob("ranked.jsonl*"):
        stored = re.sub(r"\\+u00(..)", lambda found: chr(int(found[1], 16)), path.read_text())
        assert KEY not in re.sub(r'[\s",\[\]\\]', "", stored), path


@pytest.mark.parametrize("reply", ["The best answer" + "\n" * 10**6, "best answer [" * 80_000, "reasoning " * 100_000])
def test_11_reading_takes_linear_time(reply):
    start = time.perf_counter()
    assert script.read_reply(reply, "ABCD")[0] is None and time.perf_counter() - start < 2


def test_the_key_is_all_that_is_sent(rank, judge, folder, monkeypatch):
    write_stories(8)
    (folder / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    elsewhere = judge.url.replace("127.0.0.1", "0.0.0.0")  # the same, but nobody knows
    rank("--base_url", elsewhere)
    monkeypatch.delenv("OPENAI_API_KEY")
    rank("--base_url", elsewhere, "--out", "without.jsonl")
    assert [asked["key"] for asked in judge.asked] == [f"Bearer {KEY}"] * 4 + [None] * 4


# --- nothing twice, nothing lost, no more than is allowed ---
def test_limits_are_never_exceeded(rank, judge):
    stories, judge.latency = write_stories(80), 0.01
    for limit in (0, 1, 13):
        said = rank("--max_requests", limit, code=1)[1]
        assert f"--max_requests {limit} is reached" in said[-1] and len(judge.asked) == limit
    judge.usage = dict(prompt_tokens=1000, completion_tokens=500)  # dear ones
    for limit in (0.07, 0.09):
        said = rank("--max_cost", limit, code=1)[1]
        costs = [dollars(row["usage"]) for row in answers()]
        assert "--max_cost" in said[-1] and len(judge.asked) == len(costs) and sum(costs) <= limit
    rank("--max_cost", 9)
    assert_right(stories)


def test_answers_are_of_their_stories_and_judge_alone(rank, judge):
    write_stories(8)
    for flags, asked in (((), 4), ((), 4), (("--model", "gpt-4o-mini"), 8), (("--seed", 1), 12), ((), 12)):
        rank(*flags)
        assert len(judge.asked) == asked
    with open("stories.jsonl", "a") as f:
        f.writelines(json.dumps(dict(id=i, text=f"A night s{i} with a fear of {i}")) + "\n" for i in range(4))
    rank()
    assert len(judge.asked) == 14 and len(lines("best.jsonl")) == 3  # eight of twelve were known
    held = script.Books("other.answers")
    assert "another rank.py is at work" in refused("rank.py", "stories.jsonl", "--out", "other")
    held.file.close()


@pytest.mark.parametrize("name", ["ranked.jsonl", "best.jsonl", "ranked.jsonl.answers"])
def test_files_of_others_are_left_alone(name):
    write_stories(8)
    for text in ("mine", "mine\nyours\n", "[1]\n"):
        pathlib.Path(name).write_text(text)
        assert f"{name}: " in refused("rank.py", "stories.jsonl") and pathlib.Path(name).read_text() == text


def test_killed_again_and_again_nothing_is_lost_and_nothing_asked_twice(judge):
    stories, judge.latency, known = write_stories(160), 0.05, 0
    command = "rank.py", "stories.jsonl", "--base_url", judge.url
    for how in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, None):
        before = len(judge.asked)
        with popen(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            while how and len(judge.asked) < before + 15:
                time.sleep(0.005)
            if how:
                process.send_signal(how)
            said = process.stdout.read()
        if how == signal.SIGKILL:  # in the middle of a line, at the worst
            with open("ranked.jsonl.answers", "a") as f:
                f.write('{"sent": 1, "co')
        assert process.returncode == {None: 0, signal.SIGINT: 130, signal.SIGKILL: -9}[how], said
        if how == signal.SIGINT:  # what was sent is waited for
            assert re.search(r"interrupted; \d+ groups are left", said)
            assert len(judge.asked) - before == len(answers()) - known
        known = len(answers())
    assert_right(stories)
    told = [(row["key"], row["vote"]) for row in answers()]
    assert len(told) == len(set(told)) == 80  # nothing was answered twice
    count = sum("sent" in row for row in lines("ranked.jsonl.answers"))
    assert 80 <= len(judge.asked) <= count <= 80 + 2 * 8 and f"in all: {count} requests, at most $" in said
    cost = sum(row["cost"] for row in lines("ranked.jsonl.answers"))  # what was under way counts as spent
    assert f"${cost:.4f}" in said and cost > sum(dollars(row["usage"]) for row in answers())


# --- offline ---
LOCAL = "--judge local --scary scary.pt --plain plain.pt --device cpu --dtype float32 --repetition_penalty 3".split()


@torch.no_grad()
def expected_score(models, text):
    """By transformers, one story by itself; a token is a byte, what follows the prompt counts."""
    tokens, losses = torch.tensor([[256, *text.encode()]]), []
    for model in map(as_nanochat, models):
        logits = model(tokens).logits[0, len(PROMPT) : -1, :257]
        losses.append(F.cross_entropy(logits, tokens[0, len(PROMPT) + 1 :]).item())
    runs = [text[i : i + 16] for i in range(len(PROMPT), len(text) - 15)]
    return losses[1] - losses[0] - 3 * (len(runs) - len(set(runs))) / len(runs) if runs else float("-inf")


def test_scores_are_cross_entropy_differences_by_transformers(rank, folder):
    chance = random.Random(1)
    texts = [PROMPT + "".join(chance.choices("abcdefg .", k=chance.randint(20, 150))) for _ in range(9)]
    texts += [PROMPT + " and on" * 15, PROMPT]  # repeats itself; nothing follows
    rows = [dict(id=i, prompt=PROMPT, text=text) for i, text in enumerate(texts)]
    (folder / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = [random_model(block_size=200, n_layer=n_layer) for n_layer in (2, 3)]
    for name, model in zip(("scary.pt", "plain.pt"), models):
        write_checkpoint(name, model)
    rank(*LOCAL)
    for row in lines("ranked.jsonl"):
        expected = {label: expected_score(models, story["text"]) for label, story in row["stories"].items()}
        said = re.findall(r"([A-D]) (-?[\d.]+|-inf) \(", row["reasoning"])
        assert {label: float(x) for label, x in said} == pytest.approx(expected, abs=2e-4)
        assert row["best"] == max(expected, key=expected.get)
    assert [len(row["stories"]) for row in lines("ranked.jsonl")] == [4, 4, 3]
    rank(*LOCAL)
    assert len(answers()) == 3  # nothing is computed again
    os.utime("scary.pt", (1, 1))  # another model, perhaps
    rank(*LOCAL)
    assert len(answers()) == 6
    assert "of 11 pairs (0 ties" in rank(*LOCAL, "--against", "stories.jsonl", "--out", "pairs.jsonl")[0]


def test_folders_of_runs_and_checkpoints_that_do_not_fit(rank):
    write_stories(8)
    os.mkdir("run")
    write_checkpoint("run/ckpt.pt", random_model()), write_checkpoint("plain.pt", random_model(block_size=40))
    rank(*LOCAL, "--scary", "run")
    good, changed = torch.load("plain.pt"), dict(chars=dict(tokenizer={"chars": "abc"}))
    for name, value in dict(n_head=3, n_embd=64, vocab_size=100, n_layer=4).items():
        changed[name] = dict(config={**good["config"], name: value})
    for name, change in changed.items():
        torch.save({**good, **change}, name)
        assert f"{name}: not a checkpoint" in refused("rank.py", "stories.jsonl", *LOCAL, "--scary", name)


# --- one writer against another ---
@pytest.fixture
def versus(rank):
    """Calls rank.py --against, for ten stories with more fear than ten others, two to each of the same five prompts."""
    for name, more in (("stories.jsonl", 10), ("others.jsonl", 0)):
        rows = [
            dict(id=i, prompt=(start := f"{i % 5}: {PROMPT}"), text=f"{start} s{i} with a fear of {i + more}.")
            for i in range(10)
        ]
        pathlib.Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda *flags, **settings: rank("--against", "others.jsonl", *flags, **settings)


def test_pairs_are_asked_for_in_both_orders_and_give_a_win_rate(versus, judge):
    others = [*pathlib.Path("others.jsonl").read_text().splitlines()[::-1], '{"id": "x", "text": "alone"}']
    pathlib.Path("others.jsonl").write_text("\n".join(others))  # backwards, but pairs go by ids
    assert "requests: 20\n" in versus("--dry_run")[0] and judge.asked == []
    out, said = versus()
    assert said == ["left out: 0 stories of stories.jsonl, 1 of others.jsonl, without a partner"]
    assert "win rate of stories.jsonl over others.jsonl: 100.0% of 10 pairs (0 ties count half)" in out
    assert "95% interval: 72.2% to 100.0%" in out and "changed its mind in 0.0% of the pairs" in out
    shown = [STORY.findall(asked["body"]["messages"][-1]["content"]) for asked in judge.asked]
    assert all(a[0] == b[0] for a, b in shown) and len(shown) == 20 and all(pair[::-1] in shown for pair in shown)
    found = [{label: story["side"] for label, story in row["stories"].items()} for row in lines("ranked.jsonl")]
    assert [sides[row["best"]] for sides, row in zip(found, lines("ranked.jsonl"))] == ["stories"] * 10
    assert {sides["A"] for sides in found} == {"stories", "against"} and not os.path.exists("best.jsonl")
    assert versus()[0] == out and len(judge.asked) == 20


def test_split_votes_on_a_pair_are_a_tie_and_no_third_is_asked_for(versus, judge):
    judge.faults.extend([page(completion("BEST_ANSWER:[A]"))] * 20)  # whatever comes first
    out, _ = versus()
    assert "50.0% of 10 pairs (10 ties count half)" in out and "changed its mind in 100.0% of" in out
    assert "95% interval: 23.7% to 76.3%" in out and len(judge.asked) == 20


def test_a_person_compares_and_how_repetitive_stories_are(versus, monkeypatch):
    rows = [dict(id=i, text="a b c d a b c d a b c d" if i else "a b") for i in range(2)]  # 5 of 9 runs came before
    pathlib.Path("others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "have no prompt in common" in refused("rank.py", "stories.jsonl", "--against", "others.jsonl")
    monkeypatch.setattr(sys, "stdin", io.StringIO("A\nB\n"))
    out, _ = call("rank.py", "others.jsonl", "--against", "others.jsonl", "--judge", "human")
    assert "of 2 pairs (0 ties count half)" in out and "changed its mind" not in out
    assert "others.jsonl: 7 words a story; 27.8% of its runs of four words came before in the story" in out


def test_intervals_are_those_of_newcombe_1998():
    """Two-sided confidence intervals for the single proportion, Statistics in Medicine 17, table I, method 3."""
    for points, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]:
        assert script.wilson(points, n) == pytest.approx((low, high), abs=5e-5)


# --- a person, and mistakes ---
def test_a_person_chooses(rank, monkeypatch, judge):
    stories = write_stories(16, text=PROMPT + "\n\nA door\x1b[2J opens.")
    monkeypatch.setattr(sys, "stdin", io.StringIO("b\n\nE\n s \nD\nq\n"))
    out, said = rank("--judge", "human")
    assert "ended by q; 2 groups are left" in said[-1] and "group 1 is undecided: skipped\n" in out
    assert "\x1b" not in out and out.count("--- C ---") == 4
    assert [row["best"] for row in lines("ranked.jsonl")] == ["B", "D"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("c\na\n"))
    rank("--judge", "human")
    assert [row["best"] for row in lines("ranked.jsonl")] == list("BCDA") and judge.asked == []
    assert lines("best.jsonl") == [stories[row["stories"][row["best"]]["id"]] for row in lines("ranked.jsonl")]


GOOD = b'{"id": 1, "text": "x"}\n'
BAD = [b'{"id": 2, "prompt": "y", "text": "x"}', b'{"id": 2, "text": 5}', b'{"text": "x"}', b'["text"]', b"x"]
BAD += [b'{"id": 2, "text": "\\ud800"}', b'{"id": 2, "prompt": null, "text": "x"}', b'{"id": 2, "text": "\xff"}']


def test_stories_that_are_none_are_named_by_their_line(folder):
    cases = [(GOOD + b"\n" + line + b"\n" + GOOD, "stories.jsonl:3: no story") for line in BAD]
    for text, words in cases + [(b"\n \n", "stories.jsonl: 0 stories"), (GOOD, "stories.jsonl: 1 stories")]:
        (folder / "stories.jsonl").write_bytes(text)
        assert refused("rank.py", "stories.jsonl").startswith(f"rank.py: {words}")
    assert os.listdir() == ["stories.jsonl"]


def test_other_mistakes_get_a_line(rank, monkeypatch):
    write_stories(8)
    monkeypatch.delenv("OPENAI_API_KEY")
    nobody = "--base_url", "http://127.0.0.1:9/v1"
    azure = "https://me.openai.azure.com/openai/deployments/x?api-version=2024-06-01"
    for flags, words in {
        "none.jsonl": "none.jsonl: No such file",
        "stories.jsonl --votes 0": "--votes",
        "stories.jsonl --out stories.jsonl": "stories.jsonl",
        "stories.jsonl --model llama3 --max_cost 1": "--price",
        "stories.jsonl --base_url localhost:8000": "--base_url",
        "stories.jsonl --base_url http://me:secret@x/v1": "--base_url",
        "stories.jsonl --base_url https://api.openai.com/v1": "OPENAI_API_KEY",
        f"stories.jsonl --base_url {azure}": "https://NAME.openai.azure.com/openai/v1",  # point 12
        "stories.jsonl --judge local": "needs two checkpoints",
    }.items():
        said = refused("rank.py", *nobody, *flags.split())
        assert words in said and "secret" not in said
    said = rank(*nobody, "--retries", 0, code=1)[1]
    assert "127.0.0.1:9" in said[-1] and "cannot be reached" in said[-1]
