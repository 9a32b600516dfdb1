"""
Choose the scariest of every four stories: by GPT-4o or another model behind its API, by two checkpoints, or by you.

    python rank.py stories.jsonl                  asks gpt-4o; the key comes from OPENAI_API_KEY
    python rank.py stories.jsonl --dry_run        sends nothing: shows the first request, and what to expect of all
    python rank.py stories.jsonl --base_url http://localhost:8000/v1 --model llama3      vLLM, llama.cpp, Ollama, ...
    python rank.py stories.jsonl --judge local --scary out/finetune --plain out/gpt      offline
    python rank.py stories.jsonl --judge human

ranked.jsonl gets an object a group (its stories A to D, the best, all votes), best.jsonl the winners in the form of the
stories. Answers are kept in ranked.jsonl.answers: stopped at any moment, the same command goes on.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import collections
import concurrent.futures
import email.utils
import functools
import hashlib
import json
import math
import os
import queue
import random
import re
import sys
import threading
import time
import urllib.parse

import requests
import tiktoken
import torch
import torch.nn.functional as F

try:
    import fcntl
except ImportError:  # Windows, where two runs do not exclude each other
    fcntl = None

# US dollars for a million tokens read and written, as OpenAI listed them in August 2025
PRICES = {"gpt-4o": (2.5, 10), "gpt-4o-mini": (0.15, 0.6), "gpt-4.1": (2, 8), "gpt-5": (1.25, 10)}
SYSTEM = "You judge scary stories: you read each to its end, compare them, and answer in the form that is asked for."
PROMPT = """Here are {count} stories, labelled {labels}. Which is the scariest: which would leave a reader who is
alone at night the most uneasy?

{stories}

Go by what is told and how, not by the place where a story stands. What makes no sense, or says the same thing again and
again, is not scary. A story may end in the middle of a sentence: do not hold that against it. Choose one even if all
are weak. Answer in this form and no other, where X is one of {labels}:

BEST_ANSWER:[X]
REASONING:[why, in one to three sentences]"""
# How one vote after another shows the labels: each takes each place once, and of four the second reverses the first.
ORDERS = {2: ("AB", "BA"), 3: ("ABC", "BCA", "CAB"), 4: ("ABCD", "DCBA", "BDAC", "CADB")}


def get_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, usage=argparse.SUPPRESS)
    add, yes_no = parser.add_argument, argparse.BooleanOptionalAction
    add("stories", metavar="STORIES.jsonl", help="what sample.py --out wrote, or another file in that form")
    add("--judge", default="openai", choices=["openai", "local", "human"], help="who chooses")
    add("--out", default="ranked.jsonl", help="an object a group; the answers are kept in OUT.answers")
    add("--best", help="the winners; not given: best.jsonl beside ranked.jsonl, and x_best.jsonl beside x.jsonl")
    add("--overwrite", default=False, action=yes_no, help="forget the answers that are there")
    add("--seed", type=int, default=1337, help="decides in which order stories are shown")
    add("--model", default="gpt-4o", help="openai: the judge")
    add("--base_url", default="https://api.openai.com/v1", help="openai: where it answers")
    add("--votes", type=int, default=2, help="openai: how often a group is asked, in different orders")
    add("--temperature", type=float, default=0.0, help="openai: the judge's")
    add("--max_new_tokens", type=int, default=500, help="openai: of a reply; models that think need more")
    add("--concurrency", type=int, default=8, help="openai: requests at the same time")
    add("--timeout", type=float, default=60.0, help="openai: seconds for an answer, up to its last byte")
    add("--retries", type=int, default=5, help="openai: how often a request that failed is sent again")
    add("--max_requests", type=int, help="openai: send no more, those of earlier runs on --out included")
    add("--max_cost", type=float, help="openai: spend no more dollars, those of earlier runs included")
    add("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="openai: dollars for a million tokens")
    add("--dry_run", default=False, action=yes_no, help="openai: send nothing, show a request and what to expect")
    add("--scary", help="local: a model trained on scary stories, .pt or the folder of a run")
    add("--plain", help="local: the model that it was trained from")
    add("--repetition_penalty", type=float, default=1.0, help="local: nats a token if all were repeated")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="local: where to compute")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="local: of weights and activations")
    return parser.parse_args()


def fail(message, code=2):
    """Exit with one line on stderr: code 2 for what the user can put right, 1 when the work itself failed."""
    print(f"rank.py: {message}", file=sys.stderr)
    raise SystemExit(code)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows the script's docstring as it stands, and every default."""


def run(main):
    """Call main(); interruptions and errors of the system get one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # an unprintable character must not end the work
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except torch.OutOfMemoryError:
        fail("out of memory; --device cpu may have more", 1)
    except OSError as error:
        fail(f"{error.filename or 'the work stopped'}: {error.strerror or error}", 2 if error.filename else 1)


# --- stories and votes ---
def read_stories(path):
    """The stories of a .jsonl file; exits naming the first line that is none."""
    stories, wanted = {}, '{"id", "text"} with an id of its own and a text that begins with its "prompt"'
    for number, line in enumerate(open(path, "rb").read().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            try:
                story = {"prompt": "", **json.loads(line)}
                f"{story['id']}{story['text']}".encode()  # JSON can hold halves of characters
                good = type(story["id"]) in (str, int) and story["id"] not in stories and story["text"].strip()
                good = good and story["text"].startswith(story["prompt"])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                good = False
            if not good:
                fail(f"{path}:{number}: not a story, which is {wanted}")
            stories[story["id"]] = story
    if len(stories) < 2:
        fail(f"{path}: {len(stories)} stories, and nothing to compare")
    return list(stories.values())


def make_groups(stories, seed):
    """Groups {label: story}, labelled by lot: four after four, but stories with the same opening come together."""
    openings, groups = [story["prompt"] for story in stories], []
    stories = sorted(stories, key=lambda story: openings.index(story["prompt"]))
    for i in range(0, len(stories), 4):
        four = stories[i : i + 4]
        random.Random(f"{seed} {i // 4}").shuffle(four)
        groups.append(dict(zip("ABCD", four)))
    if len(groups[-1]) == 1:
        print(f"the story {groups.pop()['A']['id']!r} has none to be compared with", file=sys.stderr)
    return groups


def winner(rows):
    """The label with the most votes, or None when there is none or another has as many."""
    counts = collections.Counter(row["best"] for row in rows if row["best"]).most_common(2)
    return None if not counts or len(counts) > 1 and counts[0][1] == counts[1][1] else counts[0][0]


def next_vote(rows, votes):
    """The first vote that a group lacks; when they are split, one more; None when it is done."""
    have = {row["vote"] for row in rows if row["best"]}
    return next((vote for vote in range(votes + (winner(rows) is None)) if vote not in have), None)


class Stop(Exception):
    """Nothing more is to be asked: (why, the exit code)."""


class Books:
    """OUT.answers: settings, then a line before each request and one for its answer. Threads share it.

    The first has the most dollars that the request can cost, the second subtracts what was not needed, so that what
    was under way when a run was killed counts as spent.
    """

    def __init__(self, path, settings, overwrite):
        self.lock, self.stop, self.hold, self.known = threading.Lock(), threading.Event(), 0.0, set()
        self.rows, self.requests, self.cost = collections.defaultdict(list), 0, 0.0
        self.file = open(path, "a+b", buffering=0)
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it ends with the process
            self.file.seek(0)
            data, start = b"" if overwrite else self.file.read(), b'{"settings": '
            *lines, cut = data.split(b"\n")  # a kill can cut the last line short
            same = not lines or json.loads(lines[0]) == {"settings": settings}
            answered = any(b'"best": "' in line for line in lines)
            assert data.startswith(start) or start.startswith(data)
            if same or not answered:
                self.file.truncate(len(data) - len(cut) if same else 0)
                for row in map(json.loads, lines[1:] if same else []):
                    self.count(row)
        except BlockingIOError:
            fail(f"{path}: another rank.py is at work on it")
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
            fail(f"{path}: not a file of rank.py's, or damaged; name another --out")
        if answered and not same:
            fail(f"{path} is of other stories or settings ({lines[0].decode()}); name another --out, or --overwrite it")
        if not lines or not same:
            self.write({"settings": settings})

    def count(self, row):
        self.requests, self.cost = self.requests + row.get("sent", 0), self.cost + row.get("cost", 0)
        if "vote" in row and row.get("status", 200) == 200:  # the others are refusals
            self.rows[row["group"]].append(row)

    def write(self, row, most_requests=None, most_dollars=None):
        """Append a line; raises Stop when it goes beyond a limit."""
        with self.lock:
            if most_requests is not None and self.requests >= most_requests:
                raise Stop(f"--max_requests {most_requests} is reached", 1)
            if most_dollars is not None and self.cost + row["cost"] > most_dollars:
                raise Stop(f"--max_cost {most_dollars}: the next request can cost ${row['cost']:.4f}, too much", 1)
            line, size = json.dumps(row).encode() + b"\n", self.file.seek(0, os.SEEK_END)
            if self.file.write(line) < len(line):  # a disk that is nearly full takes a part
                self.file.truncate(size)
                raise OSError(28, "No space left on device", self.file.name)
            self.count(row)


# --- the judge behind an API ---
def hide(text):
    """A text without the key, which some servers repeat; nothing of a text that spells it with escapes or spaces."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if len(key) < 8:  # a word like "none", for a server at home
        return text
    text = text.replace(key, "[key]")
    plain = re.sub(r"\\(?:u00|x)([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), text)
    plain, letters = (re.sub(r"[\W_]", "", each).lower() for each in (plain, key))
    return "[a text with the key]" if letters in plain else text


# All of these are bounded, so that reading takes linear time. TWO is what makes "B" one of two: "] or maybe [C".
ANSWER = re.compile(
    r"best[\s_-]?answer[\"'_]{0,2}(\s?[:=：-]|\sis\b)?\s?([\[({<【\"']{0,2})"
    r"\s?(?:(?:story|option|answer)\s)?([a-z])(?![\w'’])",
    re.I,
)
TWO = re.compile(
    r"[^\w\n<]{0,3}(?:[,/&+–-]|\b(?:and|or|vs|versus)\b)[^A-Za-z]{0,3}(?:(?:maybe|story|option)\W{1,2})?(?:[A-Z]|[b-d])\b"
)
END = re.compile(r"\s?(?:$|[\n.,;:!)(—–-]|(?:because|since|as|for|is|due|reasoning)\b)", re.I)


def read_reply(reply, labels):
    """(label, reasoning) of a judge's reply; label None unless one of the labels, and no other, is named as best."""
    text = reply.rpartition("</think>")[2].partition("<think>")[0]  # thinking may have been cut off, too
    lines = [" ".join(line.split()) for line in re.sub(r"[*`\\#]", "", text).splitlines()]
    text, named = "\n".join(filter(None, lines)), set()
    for found in ANSWER.finditer(text):
        (link, bracket, letter), tail = found.groups(""), text[found.end() : found.end() + 30]
        plain = END.match(tail) and (letter != "a" or ":" in link)  # not "the best answer is a tie"
        if TWO.match(tail):
            named |= {letter.upper(), "another"}
        elif bracket or plain or letter in "BCD":
            named.add(letter.upper())
    named.discard("X")  # the form, repeated
    rest = ANSWER.sub("", text)
    after = re.search(r"reasoning[\s_\"']{0,3}[:=：]", rest, re.I)
    label = named.pop() if len(named) == 1 and named <= set(labels) else None
    return label, rest[after.end() if after else 0 :].strip(" \n[]")


def read_answer(status, data, labels):
    """An answer as a row: its status (200 is a chat completion), answer, reasoning, reply, problem, usage and empty."""
    text = data.decode("utf-8", "replace")
    row = dict(status=status, answer=None, reasoning="", reply="", problem=None, usage=None, empty=False)
    try:
        body = json.loads(text)
        error = body.get("error") or (status != 200 and body)
        if error:  # OpenAI's {"message", "param", "code"}, FastAPI's {"detail": [{"loc", "msg"}]}, or a text
            error = error if isinstance(error, dict) else {"message": error}
            code = str(error.get("code"))
            row["status"] = status if status != 200 else int(code) if re.fullmatch("[45][0-9][0-9]", code) else 500
            said = [error[key] for key in ("message", "detail", "param", "code") if error.get(key)]
            return row | {"problem": " ".join(hide(" ".join(map(str, said)) or text).split())[:300]}
        usage = {key: (body.get("usage") or {}).get(key) for key in ("prompt_tokens", "completion_tokens")}
        row["usage"] = usage if all(type(n) is int and n >= 0 for n in usage.values()) else None
        choice = body["choices"][0]
        reply = choice["message"].get("content") or choice["message"].get("refusal") or ""
        if isinstance(reply, list):  # parts, of which some are the model's thinking
            parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in reply]
            reply = "".join(part["text"] for part in parts if part.get("type") == "text")
        row["reply"] = hide(reply)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        shown = " ".join(hide(text).split())[:100]
        return row | {"problem": shown if status != 200 else f"a reply that is no chat completion ({shown})"}
    row["answer"], row["reasoning"] = read_reply(row["reply"], labels)
    cut = not row["answer"] and choice.get("finish_reason") == "length"
    problem = "a reply cut off" if cut else f"a reply that names none of {labels} as the best"
    return row | {"problem": None if row["answer"] else problem, "empty": cut and not row["reasoning"]}


def asked_wait(headers):
    """The seconds, 60 at most, that Retry-After (a number or a date) or retry-after-ms ask to wait; 0: they don't."""
    after, ms = headers.get("retry-after", ""), headers.get("retry-after-ms")
    try:
        date = email.utils.parsedate_tz(after) if re.search("[A-Za-z]", after) else None
        seconds = float(ms) / 1000 if ms else email.utils.mktime_tz(date) - time.time() if date else float(after)
    except (ValueError, OverflowError):
        seconds = 0
    return min(60, max(0, seconds))


def refused(text, body):
    """Which part of a request an error refuses: "temperature", "max_tokens" (not its value), "system" or None."""
    text = text.lower()
    if re.search(r"system (role|message|prompt)|developer instruction|roles must alternate", text):
        return "system" if len(body["messages"]) == 2 else None
    if "max_tokens" in text and "max_tokens" in body:
        large = re.search(r"too (large|big|high|long)|at most|exceed|maximum|less than", text)
        unknown = re.search(r"support|unrecognized|unknown|unexpected|extra|not permitted|not allowed|instead", text)
        return "max_tokens" if unknown and not large else None
    return "temperature" if "temperature" in text and "temperature" in body else None


def make_body(flags, dropped, group, order, again=0):
    """The request for one vote, without what the model has refused; changed when it is asked for again."""
    shown = "\n\n".join(f"--- Story {a} ---\n{group[label]['text'].strip()}" for a, label in zip("ABCD", order))
    labels, count = ", ".join("ABCD"[: len(order)]), ("two", "three", "four")[len(order) - 2]
    text = PROMPT.format(count=count, labels=labels, stories=shown) + "\n\nBegin with BEST_ANSWER:[" * again
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    if "system" in dropped:
        messages = [{"role": "user", "content": f"{SYSTEM}\n\n{text}"}]
    limit = "max_completion_tokens" if "max_tokens" in dropped else "max_tokens"
    body = {"model": flags.model, "messages": messages, limit: flags.max_new_tokens, "temperature": flags.temperature}
    return {key: value for key, value in body.items() if key not in dropped}


def dollars(flags, tokens_read, tokens_written):
    """What so many tokens cost; 0 when the price is not known."""
    price = flags.price or (0, 0)
    return (tokens_read * price[0] + tokens_written * price[1]) / 1e6


def fetch(session, url, body, timeout, answer):
    """POST body as JSON, and put (status, headers, the first 1 MB of what comes) or (None, {}, why not) in a queue."""
    try:
        end, data = time.monotonic() + timeout, b""
        arguments = dict(json=body, timeout=timeout, allow_redirects=False, stream=True)
        with session.post(url, **arguments) as response:
            for piece in response.raw.stream(1024, decode_content=False):
                data += piece
                if len(data) > 1_000_000 or time.monotonic() > end:
                    break
        answer.put((response.status_code, response.headers, data))
    except Exception as error:  # of requests, urllib3, idna; their texts may hold the key
        answer.put((None, {}, f"it cannot be reached, or hangs up ({type(error).__name__})".encode()))


def ask(flags, session, books, groups, g):
    """Ask for every vote that group g lacks; returns why it stays undecided, or None. Raises Stop."""
    failures, again, host, group = 0, 0, urllib.parse.urlsplit(flags.base_url).netloc, groups[g]
    while (vote := next_vote(books.rows[g], flags.votes)) is not None and not books.stop.is_set():
        order = ORDERS[len(group)][vote % len(group)]
        body = make_body(flags, books.known, group, order, again)
        size = sum(len(message["content"].encode()) for message in body["messages"])
        most = dollars(flags, size + 50, flags.max_new_tokens)  # no token is shorter than a byte; 50: for the roles
        books.write({"sent": 1, "cost": most}, flags.max_requests, flags.max_cost)
        answer = queue.SimpleQueue()
        arguments = session, f"{flags.base_url.rstrip('/')}/chat/completions", body, flags.timeout, answer
        threading.Thread(target=fetch, args=arguments, daemon=True).start()
        try:  # the address, the headers and slow bytes take no more than --timeout together
            status, headers, data = answer.get(timeout=flags.timeout)
        except queue.Empty:
            status, headers, data = None, {}, f"no answer within {flags.timeout:g} s".encode()
        row = read_answer(status, data, "ABCD"[: len(order)])
        status, problem, usage = row["status"], row["problem"], row["usage"]
        cost = dollars(flags, *usage.values()) if usage else most if status in (None, 200) else 0
        row["best"] = order["ABCD".index(row["answer"])] if row["answer"] else None
        parameters = {key: value for key, value in body.items() if key not in ("model", "messages")}
        row["sent_with"] = {"temperature": None} | parameters
        books.write({"group": g, "vote": vote, "order": order, **row, "cost": cost - most})
        if usage and usage["prompt_tokens"] < size / 6 and "cut" not in books.known:
            books.known.add("cut")
            said = f"{usage['prompt_tokens']} tokens of a prompt of {size} bytes"
            print(f"warning: {host} has read {said}; is its context too small, and cuts them?", file=sys.stderr)
        if row["best"]:
            failures, again = 0, 0
        elif row["empty"] and not body.get("temperature"):
            raise Stop(f"--max_new_tokens {flags.max_new_tokens} is too small for this model: it wrote no text", 2)
        elif status == 200 and again == 2:
            return problem
        elif status == 200:
            again += 1
        elif status in (400, 422, 500) and (part := refused(problem, body)):
            books.known.add(part)
        else:
            problem = f"{host} answers {status} ({problem})" if status else f"{host}: {problem}"
            if status in (401, 402, 403) or "insufficient_quota" in problem:
                raise Stop(f"{problem}; is OPENAI_API_KEY right, and has the account credit?", 2)
            if status == 404 or status and status // 100 == 3:
                raise Stop(f"{problem}; are --base_url and --model right? No redirect is followed", 2)
            if status and status < 500 and status not in (408, 409, 429):
                return problem
            if failures == flags.retries and not any(row["best"] for row in sum(list(books.rows.values()), [])):
                raise Stop(problem, 1)  # nothing has ever come from there
            if failures == flags.retries:
                return problem
            wait = asked_wait(headers) or min(30, 0.5 * 2**failures)
            books.hold = max(books.hold, time.monotonic() + wait) if status == 429 else books.hold  # for all threads
            failures += 1
            books.stop.wait(wait + random.random() * min(1, wait / 2))
        books.stop.wait(max(0, books.hold - time.monotonic()))
    return None if winner(books.rows[g]) else "votes split"


# --- the judge of two checkpoints ---
def get_tokenizer(name):
    """The tiktoken.Encoding of a checkpoint's "tokenizer". bytes: token i is byte i, 256 is <|endoftext|>."""
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError:  # requests' errors are OSErrors, too
            fail("cannot fetch the GPT-2 tokenizer; see TIKTOKEN_CACHE_DIR in README.md")
    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding(name, pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})


def load(path, device, dtype):
    """Open a checkpoint, or the newest in a folder, executing nothing of it: (config, weights, tokenizer's name)."""
    if os.path.isdir(path):
        names = [name for name in os.listdir(path) if re.fullmatch(r"best\.pt|ckpt\.pt|ckpt_\d+\.pt", name)]
        names.sort(key=lambda name: (name == "best.pt", name == "ckpt.pt", len(name), name))
        path = os.path.join(path, *names[-1:])
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config, name = checkpoint["config"], checkpoint["tokenizer"]
        weights = {key: weight.to(device, dtype).flatten(0, -2) for key, weight in checkpoint["model"].items()}
        weights.setdefault("head", weights["embed"])  # tied
        assert len(weights["embed"]) >= config["vocab_size"] >= {"gpt2": 50257, "bytes": 257}[name]
        mean_losses((config, weights), [([0], [256])])  # shows what does not fit together
        return config, weights, name
    except OSError:
        raise
    except Exception:  # damaged files raise nearly everything
        fail(f"{path}: not a checkpoint of these scripts, or one that knows only characters")


def norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)  # Zhang and Sennrich 2019, without parameters


def forward(config, weights, idx):
    """The model of train_gpt.py: tokens idx (B, T) to the last normalized activations (B, T, C)."""
    (B, T), H, D = idx.shape, config["n_head"], config["n_embd"] // config["n_head"]
    frequencies = 1 / 10000 ** (torch.arange(0, D, 2, dtype=torch.float32, device=idx.device) / D)
    angles = torch.arange(T, device=idx.device)[:, None] * frequencies  # (T, D / 2)
    cos, sin = angles.cos(), angles.sin()
    x = F.embedding(idx, weights["embed"])  # (B, T, C)
    x = norm(x) if config.get("embed_norm", True) else x
    for i in range(config["n_layer"]):
        qkv, o, up, down = [weights[f"blocks.{i}.{name}"] for name in ("qkv", "o", "up", "down")]
        qk, v = F.linear(norm(x), qkv).view(B, T, 3 * H, D).transpose(1, 2).split((2 * H, H), dim=1)
        x1, x2 = qk.chunk(2, dim=-1)  # rotary position embedding (Su et al. 2021), in fp32
        qk = norm(torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1))
        q, k = qk.type_as(v).chunk(2, dim=1)  # q, k, v: (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(y.transpose(1, 2).flatten(2), o)
        x = x + F.linear(F.linear(norm(x), up).relu().square(), down)
    return norm(x)


@torch.inference_mode()
def mean_losses(model, rows):
    """The mean cross-entropy, in nats, of the tokens of each (context, tokens); the rows are one padded batch."""
    config, weights = model
    T, cap, losses = max(len(context + tokens) for context, tokens in rows), config.get("logit_softcap", 15.0), []
    idx = torch.tensor([(context + tokens + [0] * T)[:T] for context, tokens in rows], device=weights["embed"].device)
    x = forward(config, weights, idx)  # (B, T, C)
    for i, (context, tokens) in enumerate(rows):
        first, last = len(context), len(context + tokens)
        logits = F.linear(x[i, first - 1 : last - 1], weights["head"])[:, : config["vocab_size"]].float()
        logits = cap * torch.tanh(logits / cap) if cap else logits
        losses.append(F.cross_entropy(logits, idx[i, first:last]).item())
    return losses


def score(flags, models, tokenizer, stories):
    """The score of each story, and how much of it is repetition (seq-rep-n of Welleck et al. 2020).

    The score is the cross-entropy difference of Moore and Lewis (2010), the nats a token that what follows the prompt
    is likelier under --scary than under --plain, less --repetition_penalty times the repetition.
    """
    window, rows, repeated = min(config["block_size"] for config, _ in models), [], []
    n = 4 if tokenizer.name == "gpt2" else 16
    for story in stories:
        prompt, text = story["prompt"], story["text"][len(story["prompt"]) :]
        context = [tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)][-max(1, window // 2) :]
        tokens = tokenizer.encode_ordinary(text or "\n")[: window + 1 - len(context)]  # the last is never read
        rows.append((context, tokens))
        runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        repeated.append(1 - len(set(runs)) / max(1, len(runs)) if runs else 0.0)
    scary, plain = (mean_losses(model, rows) for model in models)
    scores = [b - a - flags.repetition_penalty * r for a, b, r in zip(scary, plain, repeated)]
    empty = [story["text"] == story["prompt"] for story in stories]
    return [-math.inf if nothing else x for nothing, x in zip(empty, scores)], repeated


def load_judges(flags):
    """The models of --scary and --plain, (config, weights) each, and their tokenizer."""
    if not flags.scary or not flags.plain:
        fail("--judge local needs two checkpoints: --scary, and --plain, from which it was trained")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = device if flags.device == "auto" else flags.device
    dtype = {"auto": "bfloat16" if device == "cuda" else "float32"}.get(flags.dtype, flags.dtype)
    (*scary, name), (*plain, other) = (load(path, device, getattr(torch, dtype)) for path in (flags.scary, flags.plain))
    if name != other:
        fail(f"{flags.scary} and {flags.plain} have different tokenizers ({name}, {other}), so no token to compare")
    return (scary, plain), get_tokenizer(name)


def choose(flags, judges, books, groups, g):
    """Have group g judged by two models, or without any by a person; returns why it stays undecided, or None."""
    group, reasoning = groups[g], ""
    if judges:
        scores, repeated = score(flags, *judges, group.values())
        if math.isnan(sum(scores)):
            raise Stop(f"{flags.scary}, {flags.plain}: a loss is not finite", 1)
        cells = ", ".join(f"{label} {x:.4f} ({r:.1%} repeated)" for label, x, r in zip(group, scores, repeated))
        reasoning = f"Nats a token likelier under --scary, less repetition: {cells}."
        best = list(group)[scores.index(max(scores))]
    else:
        for label, story in group.items():
            print(f"\n--- {label} ---", "".join(c for c in story["text"] if c.isprintable() or c == "\n"), sep="\n")
        best = ""
        while best not in {*group, "S", "Q"}:
            print(f"\nWhich is the scariest, {', '.join(group)}? (s skips, q ends)", end=" ", flush=True)
            best = (sys.stdin.readline() or "q").strip().upper()
        if best == "Q":
            raise Stop("ended by q", 0)
        if best == "S":
            return "skipped"
    row = dict(group=g, vote=0, order="".join(group), best=best, answer=best, reasoning=reasoning)
    books.write({**row, "problem": None, "usage": None})


# --- results ---
def write_lines(path, rows):
    """Replace a .jsonl file whole and at once."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def finish(flags, best, groups, books, settings, undecided):
    """Write ranked.jsonl and best.jsonl, and print how often votes agreed and which places won."""
    ranked, winners, places, same, chance = [], [], collections.Counter(), [], 1 / len(groups[0])
    for g, group in enumerate(groups):
        rows, label = books.rows[g], winner(books.rows[g])
        if next_vote(rows, flags.votes) is not None and g not in undecided:
            continue
        agrees = next(
            (row for row in rows if label and row["best"] == label), {"reasoning": "", "order": "".join(group)}
        )
        note = f" (shown as {agrees['order']})" if agrees["order"] != "".join(group) else ""
        keys = "vote", "order", "answer", "best", "reasoning", "problem"
        votes, counted = [{key: row[key] for key in keys} for row in rows], ("prompt_tokens", "completion_tokens")
        usage = {key: sum(row["usage"][key] for row in rows if row["usage"]) for key in counted}
        stories = {label: {key: story[key] for key in ("id", "prompt", "text")} for label, story in group.items()}
        row = dict(group=g, stories=stories, best=label, reasoning=agrees["reasoning"] + note, votes=votes)
        ranked.append(row | dict(judge=settings | (rows[-1].get("sent_with", {}) if rows else {}), usage=usage))
        winners += [group[label]] if label else []
        voted = [row for row in rows if row["best"]]
        places.update(row["answer"] for row in voted if len(group) == len(groups[0]))  # the last may have fewer
        first = [row["best"] for row in voted if row["vote"] < flags.votes]  # one more comes only after disagreement
        same += [a == b for i, a in enumerate(first) for b in first[:i]]
    if ranked:
        write_lines(flags.out, ranked)
        write_lines(best, winners)
    print(f"{flags.out}: {len(ranked)} of {len(groups)} groups; {best}: {len(winners)} stories")
    for why in dict.fromkeys(undecided.values()):
        print(f"undecided, {why}: groups {', '.join(str(g) for g in sorted(undecided) if undecided[g] == why)}")
    if same:
        print(f"agreement: {sum(same) / len(same):.0%} of {len(same)} pairs of votes; by chance {chance:.0%}")
    if places and flags.judge == "openai":
        cells = ", ".join(f"{place} {places[place] / places.total():.0%}" for place in groups[0])
        print(f"places: {cells} of {places.total()} votes; by chance {chance:.0%} each")
        cost = f"at most ${books.cost:.4f}" if flags.price else "cost unknown"
        print(f"in all: {books.requests:,} requests, {cost}")
    return len(groups) - len(ranked), len(winners)


def main():
    flags = get_flags()
    key, form = os.environ.get("OPENAI_API_KEY", "").strip(), r"https?://([\w.-]+|\[[\w:]+\])(:\d+)?(/[^?#\s]*)?"
    if min(flags.votes, flags.concurrency, flags.max_new_tokens, flags.timeout) <= 0:
        fail("--votes, --concurrency, --max_new_tokens and --timeout must be above 0")
    if not re.fullmatch(form, flags.base_url):
        fail("--base_url is an address like http://localhost:8000/v1; on Azure https://NAME.openai.azure.com/openai/v1")
    if flags.judge == "openai" and not key and "//api.openai.com/" in flags.base_url and not flags.dry_run:
        fail("OpenAI wants a key, and the environment variable OPENAI_API_KEY is not set")
    if not (key.isascii() and key.isprintable()):
        fail("OPENAI_API_KEY holds characters that no key has")
    flags.price = flags.price or PRICES.get(flags.model)
    if flags.max_cost is not None and not flags.price:
        fail(f"--max_cost: the price of {flags.model} is not known here; say it with --price IN OUT")
    flags.votes = flags.votes if flags.judge == "openai" else 1
    stem, extension = os.path.splitext(os.path.basename(flags.out))
    stem = stem.replace("ranked", "best") if "ranked" in stem else f"{stem}_best"
    best, path = flags.best or os.path.join(os.path.dirname(flags.out), stem + extension), f"{flags.out}.answers"
    if len(set(map(os.path.realpath, (flags.stories, flags.out, best, path)))) < 4:
        fail("--out and --best must be files of their own, not each other or the stories")
    for file in (flags.out, best):
        if os.path.exists(file) and not os.path.exists(path) and not flags.overwrite:
            fail(f"{file}: is there, but not {path}; name another --out, or --overwrite it")
        os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    stories = read_stories(flags.stories)
    groups = make_groups(stories, flags.seed)
    if flags.dry_run:  # the first request, and what to expect of all
        bodies = [make_body(flags, (), group, order) for group in groups for order in ORDERS[len(group)][: flags.votes]]
        print(f"POST {flags.base_url}/chat/completions\n{json.dumps(bodies[0], indent=2, ensure_ascii=False)}\n")
        read, written = sum(len(m["content"]) for body in bodies for m in body["messages"]) // 4, 80 * len(bodies)
        print(f"requests: {len(bodies):,}, and one more for every group whose votes are split")
        print(f"tokens: about {read:,} read (4 characters each) and {written:,} written (80 a reply)")
        print(f"dollars: {f'about {dollars(flags, read, written):.2f}' if flags.price else 'unknown, see --price'}")
        return
    names = dict(openai="model base_url temperature", local="scary plain repetition_penalty", human="")[flags.judge]
    settings = {name: getattr(flags, name) for name in f"judge seed {names}".split()}
    settings["stories"] = hashlib.sha256(repr((SYSTEM, PROMPT, groups)).encode()).hexdigest()[:12]
    judges = load_judges(flags) if flags.judge == "local" else None
    settings["changed"] = [os.path.getmtime(path) for path in (flags.scary, flags.plain)] if judges else None
    books, undecided, ended, in_a_row = Books(path, settings, flags.overwrite), {}, None, 0
    session = requests.Session()
    session.headers.update({"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {}))
    session.auth = lambda request: request  # without any, a password in ~/.netrc would replace the key
    session.trust_env = not re.search("//(localhost|127.0.0.1)[:/]", flags.base_url)  # no proxy to oneself
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=flags.concurrency + 10))
    todo = [g for g in range(len(groups)) if next_vote(books.rows[g], flags.votes) is not None]
    with concurrent.futures.ThreadPoolExecutor(flags.concurrency) as pool:
        if flags.judge == "openai":
            judge, do = functools.partial(ask, flags, session, books, groups), pool.map
        else:
            judge, do = functools.partial(choose, flags, judges, books, groups), map
        try:
            for some in (todo[:1], todo[1:]):  # a wrong key or model costs one request
                for g, problem in zip(some, do(judge, some)):
                    undecided.update({g: problem} if problem else {})
                    in_a_row = in_a_row + 1 if problem not in (None, "votes split", "skipped") else 0
                    if in_a_row == 5:
                        raise Stop(problem, 1)
                    if sys.stderr.isatty():
                        print(f"group {g} of {len(groups)}, ${books.cost:.4f}", end="\r", file=sys.stderr)
        except Stop as stop:
            ended = stop.args
        except OSError as error:  # a disk that is full, most often
            ended = f"{error.filename or path}: {error.strerror}", 1
        except KeyboardInterrupt:
            ended = "interrupted", 130
        books.stop.set()  # what is under way is waited for
    left, decided = finish(flags, best, groups, books, settings, undecided)
    if ended:
        fail(f"{ended[0]}; {left} groups are left, and the same command goes on", code=ended[1])
    if not decided:
        fail("nothing could be decided", code=1)


if __name__ == "__main__":
    run(main)
