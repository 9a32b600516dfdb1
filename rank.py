"""
Choose the scariest of every four stories: by GPT-4o or another model behind its API, by two checkpoints, or by you.

    python rank.py stories.jsonl                  asks gpt-4o; the key comes from OPENAI_API_KEY
    python rank.py stories.jsonl --dry_run        sends nothing: shows the first request, and what to expect of all
    python rank.py stories.jsonl --base_url http://localhost:8000/v1 --model llama3      vLLM, llama.cpp, Ollama, ...
    python rank.py stories.jsonl --judge local --scary out/finetune --plain out/gpt      offline
    python rank.py stories.jsonl --judge human
    python rank.py stories.jsonl --against others.jsonl        who writes scarier? Compares stories to the same prompts

ranked.jsonl gets an object a group (its stories A to D, the best, all votes), best.jsonl the winners in the form of the
stories. Answers are kept in ranked.jsonl.answers: stopped at any moment, the same command goes on, and nothing is asked
again while the four stories and the judge are the same. With --against a group is a pair, and there is no best.jsonl.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import collections
import concurrent.futures
import email.utils
import hashlib
import itertools
import json
import math
import os
import queue
import random
import re
import sys
import threading
import time

import requests
import tiktoken
import torch
import torch.nn.functional as F

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
# What a model may refuse, and the words of an error that say so. Not a max_tokens whose value is too large.
REFUSALS = {
    "system": r"system (role|message|prompt)|roles must alternate",
    "max_tokens": r"unsupported[^.]*max_tokens|max_tokens[^.]*not supported",
    "temperature": r"temperature",
}


def get_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("stories", metavar="STORIES.jsonl", help="what sample.py --out wrote, or another file in that form")
    add("--against", metavar="OTHERS.jsonl", help="another writer's stories to the same prompts: who is scarier?")
    add("--judge", default="openai", choices=["openai", "local", "human"], help="who chooses")
    add("--out", default="ranked.jsonl", help="an object a group; the answers are kept in OUT.answers")
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
    add("--dry_run", default=False, action=argparse.BooleanOptionalAction, help="openai: send nothing, show a request")
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
def read_stories(path, least=2):
    """The stories of a .jsonl file; exits naming the first line that is none."""
    stories = []
    for number, line in enumerate(open(path, "rb"), 1):
        if line.strip():
            try:
                story = {"prompt": "", **json.loads(line)}
                (story["prompt"] + story["text"]).encode()  # texts, without the halves of characters that JSON can hold
                good = "id" in story and story["text"].startswith(story["prompt"])
            except (ValueError, KeyError, TypeError, AttributeError):
                good = False
            if not good:
                fail(f'{path}:{number}: no story, {{"id", "prompt", "text"}} with a text that begins with its prompt')
            stories.append(story)
    if len(stories) < least:
        fail(f"{path}: {len(stories)} stories, and nothing to compare")
    return stories


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


def make_pairs(flags):
    """Pairs {label: story}, labelled by lot: the i-th story to a prompt, by id, with the i-th of --against to it."""
    ours, theirs = read_stories(flags.stories, 1), read_stories(flags.against, 1)
    for stories in (ours, theirs):  # sample.py adds short ones first, which must not be all that is paired
        stories.sort(key=lambda story: (len(str(story["id"])), str(story["id"])))
    waiting, pairs = collections.defaultdict(list), []
    for story in theirs:
        waiting[story["prompt"]].append(story)
    for story in ours:
        if waiting[story["prompt"]]:
            pair = {**story, "side": "stories"}, {**waiting[story["prompt"]].pop(0), "side": "against"}
            pairs.append(dict(zip("AB", random.Random(f"{flags.seed} {story['text']}").sample(pair, 2))))
    if not pairs:
        fail(f"{flags.stories} and {flags.against} have no prompt in common, so nothing to compare")
    if len(pairs) < max(len(ours), len(theirs)):
        a, b = len(ours) - len(pairs), len(theirs) - len(pairs)
        print(f"left out: {a} stories of {flags.stories}, {b} of {flags.against}, without a partner", file=sys.stderr)
    return pairs


def winner(votes):
    """The label with the most votes, or None when there is none or another has as many."""
    counts = collections.Counter(vote["best"] for vote in votes if vote["best"]).most_common(2)
    return None if not counts or len(counts) > 1 and counts[0][1] == counts[1][1] else counts[0][0]


def next_vote(votes, flags):
    """The number of the first vote that a group lacks; when four are split, one more; None when it is done."""
    have = {vote["vote"] for vote in votes if vote["best"]}
    return next((i for i in range(flags.votes + (winner(votes) is None and not flags.against)) if i not in have), None)


class Stop(Exception):
    """Nothing more is to be asked: (why, the exit code)."""


class Books:
    """OUT.answers: a line before each request and one for its answer. Threads share it.

    The first has the most dollars that the request can cost, the second subtracts what was not needed, so that what
    was under way when a run was killed counts as spent.
    """

    def __init__(self, path):
        self.requests, self.cost, self.votes = 0, 0.0, collections.defaultdict(list)  # votes[key of a group]
        self.refused, self.warned = set(), False
        self.lock, self.stop = threading.RLock(), threading.Event()
        self.file = open(path, "a+", encoding="utf-8", newline="\n")
        try:
            import fcntl  # not on Windows, where two runs do not exclude each other

            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it ends with the process
        except ImportError:
            pass
        except BlockingIOError:
            fail(f"{path}: another rank.py is at work on it")
        self.file.seek(0)
        try:
            *lines, rest = self.file.read().split("\n")  # a kill can cut the last line short
            for line in lines or filter(None, [rest]):
                self.count(json.loads(line))
        except (ValueError, KeyError, AttributeError):
            fail(f"{path}: not a file of rank.py's, or damaged; name another --out")
        self.file.truncate(sum(len(line) + 1 for line in lines))

    def count(self, row):
        self.requests += row.get("sent", 0)
        self.cost += row.get("cost", 0)
        if row.get("status") == 200:
            self.votes[row["key"]].append(row)

    def write(self, row):
        with self.lock:
            print(json.dumps(row), file=self.file, flush=True)
            self.count(row)

    def book(self, cost, flags):
        """Count a request that is about to be sent; raises Stop when it goes beyond a limit."""
        with self.lock:
            if flags.max_requests is not None and self.requests >= flags.max_requests:
                raise Stop(f"--max_requests {flags.max_requests} is reached", 1)
            if flags.max_cost is not None and self.cost + cost > flags.max_cost:
                raise Stop(f"--max_cost {flags.max_cost}: the next request can cost ${cost:.4f}, too much", 1)
            self.write({"sent": 1, "cost": cost})


# --- the judge behind an API ---
def make_body(flags, refused, group, order, again=0):
    """The request for one vote, without what the model has refused; changed when it is asked for again."""
    shown = "\n\n".join(f"--- Story {a} ---\n{group[label]['text'].strip()}" for a, label in zip("ABCD", order))
    labels, count = ", ".join("ABCD"[: len(order)]), ("two", "three", "four")[len(order) - 2]
    text = PROMPT.format(count=count, labels=labels, stories=shown) + "\n\nBegin with BEST_ANSWER:[" * again
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    if "system" in refused:
        messages = [{"role": "user", "content": f"{SYSTEM}\n\n{text}"}]
    limit = "max_completion_tokens" if "max_tokens" in refused else "max_tokens"
    body = {"model": flags.model, "messages": messages, limit: flags.max_new_tokens}
    return body if "temperature" in refused else {**body, "temperature": flags.temperature}


def dollars(flags, tokens_read, tokens_written):
    return (tokens_read * flags.price[0] + tokens_written * flags.price[1]) / 1e6


def preview(flags, groups):
    """Print the first request, and what to expect of all."""
    bodies = [make_body(flags, (), group, order) for group in groups for order in ORDERS[len(group)][: flags.votes]]
    read, written = sum(len(m["content"]) for body in bodies for m in body["messages"]) // 4, 80 * len(bodies)
    print(f"POST {flags.base_url}/chat/completions\n{json.dumps(bodies[0], indent=2, ensure_ascii=False)}\n")
    print(f"requests: {len(bodies):,}" + ", and one more for every group whose votes are split" * (not flags.against))
    print(f"tokens: about {read:,} read (4 characters each) and {written:,} written (80 a reply)")
    print(f"dollars: about {dollars(flags, read, written):.2f}" if any(flags.price) else "dollars: see --price")


def post(session, url, body, timeout):
    """Send body as JSON: (status, headers, the first 1 MB of the answer), or (None, {}, why there is none)."""
    answers = queue.SimpleQueue()

    def send():
        try:
            with session.post(url, json=body, timeout=timeout, allow_redirects=False, stream=True) as response:
                data = response.raw.read(1_000_000, decode_content=False)
            answers.put((response.status_code, response.headers, data))
        except Exception as error:  # of requests, urllib3, idna; their texts may hold the key
            answers.put((None, {}, f"it cannot be reached, or hangs up ({type(error).__name__})".encode()))

    threading.Thread(target=send, daemon=True).start()
    try:  # not left to requests, whose timeout begins anew with every byte
        return answers.get(timeout=timeout)
    except queue.Empty:
        return None, {}, f"no answer within {timeout:g} s".encode()


def hide(text):
    """A text, or nothing of it when it has the key, be it with spaces, quotes or escapes between its letters."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    plain = re.sub(r"\\+(?:u00|x)([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), text)
    plain, letters = (re.sub(r"[\W_]", "", each).lower() for each in (plain, key))
    return "[a text with the key]" if len(key) > 7 and letters in plain else text  # shorter: "none", for one at home


def read_reply(reply, labels):
    """(label, reasoning) of a judge's reply; label None unless one of the labels, and no other, is named as best."""
    text = reply.rpartition("</think>")[2].partition("<think>")[0]  # thinking may have been cut off, too
    rest, *parts = re.split(r"best[\s_-]?answer", re.sub(r"[*`\\#]", "", text), flags=re.I)
    named = set()
    for part in parts:  # what is said up to the end of the line or sentence, or a reason
        claim = re.split(r"\n|[.;!]\s|because|since|reasoning", part[:200].lstrip(" :\n"), flags=re.I)[0]
        rest += part.replace(claim, "", 1)
        first = re.match(r"[\W_]*(?:(?:is|story|option|answer)\b[\W_]*)*([a-z])\b(?!['’])(.*)", claim, re.I)
        if not first or first[1].upper() == "X":  # the form, repeated
            continue
        bracket, alone = claim[: first.start(1)].endswith(tuple("[({<【")), not re.search(r"\w", first[2])
        if first[1].upper() != "A" or bracket or first[1] == "A" and alone:  # not "the best answer is a tie"
            named |= {letter.upper() for letter in [first[1], *re.findall(r"\b[A-Db-d]\b", first[2])]}
    label = named.pop() if len(named) == 1 and named <= set(labels) else None
    return label, re.split(r"reasoning[\W_]*", rest, maxsplit=1, flags=re.I)[-1].strip(" \n:[]{}")


def read_answer(status, data):
    """What a server sent: (status, the text of a reply or error, finish_reason, usage).

    Status 200 is left for chat completions, of an error it is the code that the error names, None is anything else.
    """
    text = data.decode("utf-8", "replace")
    try:
        body = json.loads(text)
        text = json.dumps(body, ensure_ascii=False)  # the same without escapes
        if status == 200 and body.get("error"):
            code = str(dict(body["error"]).get("code"))
            status = int(code) if re.fullmatch("[45][0-9][0-9]", code) else 500
        elif status == 200:
            reply, finish = body["choices"][0]["message"]["content"] or "", body["choices"][0].get("finish_reason")
            if isinstance(reply, list):  # parts, of which some are the model's thinking
                reply = "".join(part["text"] for part in reply if part["type"] == "text")
            usage = {key: (body.get("usage") or {}).get(key) for key in ("prompt_tokens", "completion_tokens")}
            return 200, hide(reply), finish, usage if all(type(n) is int for n in usage.values()) else None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        pass
    text = " ".join(hide(text).split())[:500]
    if status == 200:
        return None, f"a reply that is no chat completion ({text[:100]})", None, None
    return status, text, None, None


def asked_wait(headers):
    """The seconds, 60 at most, that Retry-After (a number or a date) or retry-after-ms ask to wait; 0: they don't."""
    after, ms = headers.get("retry-after", ""), headers.get("retry-after-ms")
    try:
        seconds = float(ms) / 1000 if ms else float(after)
    except ValueError:
        date = email.utils.parsedate_tz(after)
        seconds = email.utils.mktime_tz(date) - time.time() if date else 0
    return min(60, max(0, seconds))


def ask(flags, session, books, key, group):
    """Ask for every vote that a group lacks; returns why it stays undecided, or None. Raises Stop."""
    failures, unread, votes, labels = 0, 0, books.votes[key], "ABCD"[: len(group)]
    while (vote := next_vote(votes, flags)) is not None and not books.stop.is_set():
        order, refused = ORDERS[len(group)][vote % len(group)], set(books.refused)
        body = make_body(flags, refused, group, order, unread)
        size = sum(len(message["content"].encode()) for message in body["messages"])
        most = dollars(flags, size + 50, flags.max_new_tokens)  # no token is shorter than a byte; 50: for the roles
        books.book(most, flags)
        status, headers, data = post(session, f"{flags.base_url.rstrip('/')}/chat/completions", body, flags.timeout)
        status, text, finish, usage = read_answer(status, data)
        answer, reasoning = read_reply(text, labels) if status == 200 else (None, "")
        row = dict(key=key, vote=vote, order=order, status=status, answer=answer, reasoning=reasoning, said=text)
        row["best"] = order[labels.index(answer)] if answer else None
        sent = {name: value for name, value in body.items() if name not in ("model", "messages")}
        cost = dollars(flags, *usage.values()) if usage else most if status in (None, 200) else 0
        books.write(row | dict(usage=usage, cost=cost - most, sent_with={"temperature": None} | sent))
        if usage and usage["prompt_tokens"] < size / 6 and not books.warned:
            books.warned = True
            said = f"{usage['prompt_tokens']} tokens of a prompt of {size} bytes"
            print(f"warning: the server has read {said}; is its context too small, and cuts them?", file=sys.stderr)

        if status == 200:
            failures, unread = 0, 0 if answer else unread + 1
            if finish == "length" and not answer and not reasoning and not body.get("temperature"):
                raise Stop(f"--max_new_tokens {flags.max_new_tokens} is too small for this model: it wrote no text", 2)
            if unread == 3:
                return f"no reply names one of {labels} as the best"
            continue
        parts = {part for part, words in REFUSALS.items() if re.search(words, text, re.I)} - refused
        if parts:
            books.refused |= parts
            continue
        problem = f"{flags.base_url} answers {status} ({text})" if status else f"{flags.base_url}: {text}"
        if status in (400, 413, 422):  # of this group's stories, perhaps
            return problem
        if "insufficient_quota" in text or status and status < 500 and status not in (408, 409, 429):
            hint = "are OPENAI_API_KEY, --base_url and --model right, and has the account credit?"
            raise Stop(f"{problem}; {hint} No redirect is followed", 2)
        if failures == flags.retries:
            raise Stop(problem, 1)
        wait = asked_wait(headers) or min(30, 0.5 * 2**failures)
        failures += 1
        books.stop.wait(wait + random.random() * min(1, wait / 2))
    return None if winner(votes) or flags.against else "votes split"


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


# --- the judge of two checkpoints ---
def load_judges(flags):
    """The models of --scary and --plain, [(config, weights), ...], and their tokenizer; executes nothing of them."""
    if not flags.scary or not flags.plain:
        fail("--judge local needs two checkpoints: --scary, and --plain, from which it was trained")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = device if flags.device == "auto" else flags.device
    dtype = getattr(torch, {"auto": "bfloat16" if device == "cuda" else "float32"}.get(flags.dtype, flags.dtype))
    models, names = [], []
    for path in (flags.scary, flags.plain):
        path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            config, name = checkpoint["config"], checkpoint["tokenizer"]
            weights = {key: weight.to(device, dtype).flatten(0, -2) for key, weight in checkpoint["model"].items()}
            weights.setdefault("head", weights["embed"])  # tied
            assert len(weights["embed"]) >= config["vocab_size"] == get_tokenizer(name).n_vocab
            mean_losses((config, weights), [([0], [256])])  # shows what does not fit together
        except (FileNotFoundError, PermissionError, torch.OutOfMemoryError):
            raise
        except Exception:  # damaged files raise nearly everything
            fail(f"{path}: not a checkpoint of these scripts, or one that knows only characters")
        models.append((config, weights))
        names.append(name)
    if names[0] != names[1]:
        fail(f"{flags.scary} and {flags.plain} have different tokenizers, so no token to compare")
    return models, get_tokenizer(name)


def norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)  # Zhang and Sennrich 2019, without parameters


@torch.inference_mode()
def mean_losses(model, rows):
    """The mean cross-entropy, in nats, of the tokens of each (context, tokens); the rows are one padded batch."""
    config, weights = model
    device, H, D = weights["embed"].device, config["n_head"], config["n_embd"] // config["n_head"]
    B, T = len(rows), max(len(context + tokens) for context, tokens in rows)
    idx = torch.tensor([(context + tokens + [0] * T)[:T] for context, tokens in rows], device=device)  # (B, T)
    frequencies = 1 / 10000 ** (torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)
    angles = torch.arange(T, device=device)[:, None] * frequencies  # (T, D / 2)
    cos, sin = angles.cos(), angles.sin()
    x = F.embedding(idx, weights["embed"])  # (B, T, C); the model of train_gpt.py
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
    losses, cap = [], config.get("logit_softcap", 15.0)
    for row, targets, (context, tokens) in zip(norm(x), idx, rows):  # one by one: logits are large
        first, last = len(context), len(context + tokens)
        logits = F.linear(row[first - 1 : last - 1], weights["head"])[:, : config["vocab_size"]].float()
        logits = cap * torch.tanh(logits / cap) if cap else logits
        losses.append(F.cross_entropy(logits, targets[first:last]).item())
    return losses


def score(flags, models, tokenizer, stories):
    """The score of each story, and how much of it is repetition (seq-rep-n of Welleck et al. 2020).

    The score is the cross-entropy difference of Moore and Lewis (2010), the nats a token that what follows the prompt
    is likelier under --scary than under --plain, less --repetition_penalty times the repetition.
    """
    window, rows, repeated = min(config["block_size"] for config, _ in models), [], []
    n = 16 if tokenizer.name == "bytes" else 4
    for story in stories:
        prompt, text = story["prompt"], story["text"][len(story["prompt"]) :]
        context = [tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)][-max(1, window // 2) :]
        tokens = tokenizer.encode_ordinary(text or "\n")[: window + 1 - len(context)]  # the last is never read
        rows.append((context, tokens))
        runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        repeated.append(1 - len(set(runs)) / len(runs) if runs else 0.0)
    scary, plain = (mean_losses(model, rows) for model in models)
    scores = [b - a - flags.repetition_penalty * r for a, b, r in zip(scary, plain, repeated)]
    return [-math.inf if story["text"] == story["prompt"] else x for story, x in zip(stories, scores)], repeated


def choose(flags, judges, books, key, group):
    """Have a group judged by two models, or without any by a person; returns why it stays undecided, or None."""
    reasoning, best = "", ""
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
    while best not in {*group, "S", "Q"}:
        print(f"\nWhich is the scariest, {', '.join(group)}? (s skips, q ends)", end=" ", flush=True)
        best = (sys.stdin.readline() or "q").strip().upper()
    if best == "Q":
        raise Stop("ended by q", 0)
    if best == "S":
        return "skipped"
    row = dict(key=key, vote=0, order="".join(group), status=200, answer=best, best=best, reasoning=reasoning)
    books.write(row | dict(usage=None, sent_with={}))


# --- results ---
def write_results(flags, paths, settings, groups, votes):
    """Write ranked.jsonl and best.jsonl; returns how many groups have all their votes, and how many a winner."""
    ranked, winners, counted = [], [], ("prompt_tokens", "completion_tokens")
    kept = ("id", "prompt", "text", "side") if flags.against else ("id", "prompt", "text")
    for g, group in enumerate(groups):
        if next_vote(votes[g], flags) is not None:
            continue
        label, reasoning = winner(votes[g]), ""
        if label:
            winners.append(group[label])
            vote = next(vote for vote in votes[g] if vote["best"] == label)
            shown = "" if vote["order"] == "".join(group) else f" (shown as {vote['order']})"
            reasoning = vote["reasoning"] + shown
        stories = {label: {key: story[key] for key in kept} for label, story in group.items()}
        row = dict(group=g, stories=stories, best=label, reasoning=reasoning, votes=votes[g])
        usage = {key: sum(vote["usage"][key] for vote in votes[g] if vote["usage"]) for key in counted}
        ranked.append(row | dict(judge=settings | votes[g][-1]["sent_with"], usage=usage))
    for path, rows in zip(paths, (ranked, winners)) if ranked else ():
        with open(f"{path}.tmp", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        os.replace(f"{path}.tmp", path)
    return len(ranked), len(winners)


def wilson(points, n):
    """The 95% interval of a share, points / n (Wilson 1927). Ties, as half points, make it a little too wide."""
    z = 1.959964  # 95% of a normal distribution lies within so many standard deviations
    middle, half = points + z * z / 2, z * math.sqrt(points * (n - points) / n + z * z / 4)
    return (middle - half) / (n + z * z), (middle + half) / (n + z * z)


def compare(flags, groups, votes):
    """Print the win rate over --against: a pair with split votes is a tie, half a win; the interval is wilson()'s.

    And how long each side's stories are, and how repetitive: seq-rep-4 of Welleck et al. (2020), of words.
    """
    judged = [(group, rows) for group, rows in zip(groups, votes) if next_vote(rows, flags) is None]
    best = [winner(rows) and group[winner(rows)]["side"] for group, rows in judged]
    n, ties, wins = len(best), best.count(None), best.count("stories") + best.count(None) / 2
    low, high = wilson(wins, n)
    print(f"win rate of {flags.stories} over {flags.against}: {wins / n:.1%} of {n} pairs ({ties} ties count half)")
    print(f"95% interval: {low:.1%} to {high:.1%}; two equally scary writers would have 50%")
    if flags.votes > 1:
        split = sum(len({vote["best"] for vote in rows if vote["best"]}) > 1 for _, rows in judged)
        print(f"shown the same two in the other order, the judge changed its mind in {split / n:.1%} of the pairs")
    for side, path in ("stories", flags.stories), ("against", flags.against):
        texts = [story["text"].split() for group, _ in judged for story in group.values() if story["side"] == side]
        runs = [list(zip(words, words[1:], words[2:], words[3:])) for words in texts]
        length, repeated = sum(map(len, texts)) / n, sum(1 - len(set(each)) / len(each) for each in runs if each) / n
        print(f"{path}: {length:.0f} words a story; {repeated:.1%} of its runs of four words came before in the story")


def report(flags, groups, votes, books):
    """Print how often votes agreed, how often each place won, and what all runs have cost."""
    same, places, chance = [], collections.Counter(), 1 / len(groups[0])
    for group, rows in zip(groups, votes):
        read = [vote for vote in rows if vote["best"]]
        places.update(vote["answer"] for vote in read if len(group) == len(groups[0]))  # the last may have fewer
        first = [vote["best"] for vote in read if vote["vote"] < flags.votes]  # one more comes after disagreement only
        same += [a == b for a, b in itertools.combinations(first, 2)]
    if same and not flags.against:
        print(f"agreement: {sum(same) / len(same):.0%} of {len(same)} pairs of votes; by chance {chance:.0%}")
    if places and not flags.against:
        cells = ", ".join(f"{place} {places[place] / places.total():.0%}" for place in groups[0])
        print(f"places: {cells} of {places.total()} votes; by chance {chance:.0%} each")
    cost = f"at most ${books.cost:.4f}" if any(flags.price) else "cost unknown, see --price"
    print(f"in all: {books.requests:,} requests, {cost}")


def main():
    flags = get_flags()
    openai, key = flags.judge == "openai", os.environ.get("OPENAI_API_KEY", "").strip()
    if min(flags.votes, flags.concurrency, flags.max_new_tokens, flags.timeout) <= 0:
        fail("--votes, --concurrency, --max_new_tokens and --timeout must be above 0")
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", flags.base_url):
        fail("--base_url is an address like http://localhost:8000/v1; on Azure https://NAME.openai.azure.com/openai/v1")
    if openai and not key and "//api.openai.com/" in flags.base_url and not flags.dry_run:
        fail("OpenAI wants a key, and the environment variable OPENAI_API_KEY is not set")
    flags.price = flags.price or PRICES.get(flags.model, (0, 0))
    if flags.max_cost is not None and not any(flags.price):
        fail(f"--max_cost: the price of {flags.model} is not known here; say it with --price IN OUT")
    flags.votes = flags.votes if openai else 1
    groups = make_pairs(flags) if flags.against else make_groups(read_stories(flags.stories), flags.seed)
    if flags.dry_run:
        return preview(flags, groups)

    folder, name = os.path.split(flags.out)
    best = os.path.join(folder, name.replace("ranked", "best") if "ranked" in name else f"best_{name}")
    paths = [flags.out] if flags.against else [flags.out, best]
    for path in paths:
        if os.path.exists(path) and not os.path.exists(f"{flags.out}.answers"):
            fail(f"{path}: is there, but not {flags.out}.answers; name another --out")
    names = dict(openai="model base_url temperature", local="scary plain repetition_penalty", human="")[flags.judge]
    settings = {name: getattr(flags, name) for name in f"judge {names}".split()}
    judges = load_judges(flags) if flags.judge == "local" else None
    if judges:
        settings["changed"] = [os.path.getmtime(path) for path in (flags.scary, flags.plain)]
    texts = [json.dumps([SYSTEM, PROMPT, settings, group]) for group in groups]
    keys = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
    os.makedirs(folder or ".", exist_ok=True)
    books, ended = Books(f"{flags.out}.answers"), None
    votes = [books.votes[key] for key in keys]
    todo = [g for g in range(len(groups)) if next_vote(votes[g], flags) is not None]
    session = requests.Session()
    session.headers.update({"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {}))
    session.auth = lambda request: request  # without any, a password in ~/.netrc would replace the key
    session.trust_env = not re.match("https?://(localhost|127.0.0.1)[:/]", flags.base_url)  # no proxy to oneself
    session.mount(flags.base_url, requests.adapters.HTTPAdapter(pool_maxsize=flags.concurrency))

    def judge(g):
        if openai:
            return ask(flags, session, books, keys[g], groups[g])
        return choose(flags, judges, books, keys[g], groups[g])

    with concurrent.futures.ThreadPoolExecutor(flags.concurrency) as pool:
        try:
            for some in (todo[:1], todo[1:]):  # a wrong key or model costs one request
                for g, problem in zip(some, pool.map(judge, some) if openai else map(judge, some)):
                    if problem:
                        print(f"group {g} is undecided: {problem}")
                    if sys.stderr.isatty():
                        print(f"group {g} of {len(groups)}, ${books.cost:.4f}", end="\r", file=sys.stderr)
        except Stop as stop:
            ended = stop.args
        except KeyboardInterrupt:
            ended = "interrupted", 130
        finally:
            books.stop.set()  # what is under way is waited for

    done, decided = write_results(flags, paths, settings, groups, votes)
    what = "pairs" if flags.against else f"groups; {best}: {decided} stories"
    print(f"{flags.out}: {done} of {len(groups)} {what}")
    if flags.against and done:
        compare(flags, groups, votes)
    if openai:
        report(flags, groups, votes, books)
    if ended:
        fail(f"{ended[0]}; {len(groups) - done} groups are left, and the same command goes on", code=ended[1])
    if not (done if flags.against else decided):
        fail("nothing could be decided", code=1)


if __name__ == "__main__":
    run(main)
