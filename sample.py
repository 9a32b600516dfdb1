"""
Write stories from a checkpoint of any of these scripts.

    python sample.py out/gpt --prompt "The house was empty" --temperature 0.7 --seed 2
    python sample.py out/gpt --num 400 --max_new_tokens 300 --out stories.jsonl    (run it again to add what is missing)
    python sample.py out/gpt --interactive
    python sample.py out/gpt --narrate story.mp3    (with the key of OpenAI in OPENAI_API_KEY)
    python sample.py --model gpt-4.1-nano --prompt_file openings.txt --out theirs.jsonl    (by a model behind an API)

A single story is streamed to stdout; several are printed as each is finished, or added to --out as lines {id, prompt,
text, tokens, seed, checkpoint, sampling}. One that fills the context goes on from its last half.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import codecs
import itertools
import json
import math
import os
import re
import sys
import zipfile

import numpy as np
import requests
import tiktoken
import torch
import torch.nn.functional as F


def get_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, usage=argparse.SUPPRESS)
    add, yes_no = parser.add_argument, argparse.BooleanOptionalAction
    add("checkpoint", nargs="?", help="a .pt file, or the folder of a run")
    add("--model", help="instead: a model at --base_url, for which --temperature is the only rule of sampling")
    add("--prompt", default="It was a dark and stormy night", help="how the story begins; - is standard input")
    add("--prompt_file", help="prompts of several stories, one a line; - is standard input")
    add("--num", type=int, default=1, help="stories for each prompt")
    add("--out", help="a .jsonl file to add the stories to")
    add("--interactive", default=False, action=yes_no, help="keep the model loaded and ask for prompts")
    add("--max_new_tokens", type=int, default=500, help="tokens of a story at most")
    add("--temperature", type=float, default=0.8, help="0 is greedy")
    add("--top_k", type=int, default=0, help="sample from the k likeliest tokens; 0 is no limit")
    add("--top_p", type=float, default=1.0, help="only the most likely tokens that together have this probability")
    add("--min_p", type=float, default=0.0, help="no tokens below this fraction of the most likely one")
    add("--stop", action="append", default=[], metavar="TEXT", help="end a story before this text (may be repeated)")
    add("--batch_size", type=int, default=0, help="stories at once; 0: as many as suit the device")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of weights and activations")
    add("--compile", default=False, action=yes_no, help="compile the decoding step; takes about a minute")
    add("--seed", type=int, default=1337, help="a story depends only on this and its id")
    add("--narrate", metavar="FILE.mp3", help="have the story read aloud into this file")
    add("--speech_model", default="gpt-4o-mini-tts", help="narrate: with this model")
    add("--voice", default="onyx", help="narrate: in this voice")
    add("--base_url", default="https://api.openai.com/v1", help="model, narrate: the server to ask")
    return parser.parse_args()


def fail(message, code=2):
    """Exit with one line on stderr: code 2 for what the user can put right, 1 when the work itself failed."""
    print(f"sample.py: {message}", file=sys.stderr)
    raise SystemExit(code)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows the script's docstring as it stands, and every default."""


def run(main):
    """Call main(); interruptions and errors of the system get one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # an unprintable character must not end the work
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except BrokenPipeError:  # the reader has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what stdout still holds goes nowhere
        raise SystemExit(141) from None
    except torch.OutOfMemoryError:
        fail("out of memory; a smaller --batch_size takes less", 1)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        fail(f"{name}{error.strerror or error}", 2 if name else 1)


def get_device(device, dtype):
    """The torch.device and the torch.dtype of --device and --dtype; auto takes the fastest that is there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: PyTorch finds no GPU here")
    fast_bf16 = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    if device == "cpu":  # without native bf16 it is a hundred times slower in it
        fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.device(device), getattr(torch, {"auto": "bfloat16" if fast_bf16 else "float32"}.get(dtype, dtype))


def get_tokenizer(spec):
    """The tiktoken.Encoding of a checkpoint's "tokenizer": that of train_gpt.py, or {"chars": ...} of train_char.py."""
    if spec == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError):  # of requests, too, or a page to log in came instead
            fail("cannot fetch the GPT-2 tokenizer; see TIKTOKEN_CACHE_DIR in README.md")
    split = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # GPT-2's, into words
    if "chars" in spec:
        ranks, special, split = {c.encode(): i for i, c in enumerate(spec["chars"])}, {}, r"[\s\S]"
    else:
        tokens = [chr(i) for i in range(256)] if spec == "bytes" else spec["bpe"]
        ranks, special = {token.encode("latin-1"): i for i, token in enumerate(tokens)}, {"<|endoftext|>": len(tokens)}
    return tiktoken.Encoding(str(spec)[:7], pat_str=split, mergeable_ranks=ranks, special_tokens=special)


def load(path, device, dtype, compiled=False):
    """Open a checkpoint, or that in a run's folder, executing nothing of it: (path, config, weights, tokenizer)."""
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load() does not verify the checksum of what is not a weight
            archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config, model, tokenizer = checkpoint["config"], checkpoint["model"], get_tokenizer(checkpoint["tokenizer"])
        assert "kind" not in config  # a bigram, for example
        weights = {name: weight.to(device, dtype).flatten(0, -2) for name, weight in model.items()}
        assert all(weight.abs().max() < 2**16 for weight in weights.values())  # none that was trained is larger
    except (FileNotFoundError, PermissionError, torch.OutOfMemoryError):
        raise
    except Exception:  # damaged files raise nearly everything
        fail(f"{path}: not a checkpoint of these scripts, a damaged one, or one that only train_char.py runs")
    weights.setdefault("head", weights["embed"])  # tied
    if device.type == "cpu" and not compiled and (dtype.itemsize == 4 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        for name in set(weights) - {"embed"}:  # packed once: F.linear would reorder them at every call
            weights[name] = torch.ops.mkldnn._reorder_linear_weight(weights[name], 16)
    return path, config, weights, tokenizer


def norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)  # Zhang and Sennrich 2019, without parameters


def linear(x, weight):
    if weight.is_mkldnn:  # packed by load(), for which there is no public call
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def forward(config, weights, idx, positions, cache, rows=None, mask=None):
    """The model of train_gpt.py: tokens idx (B, T) at `positions` (B, T) to the last normalized activations (B, T, C).

    Keys and values go into `rows` (B, 1) of the cache, which is two tensors (rows, H, S, D) for each layer. With a mask
    (B, 1, 1, S), to decode, each token sees these places of its row; without, to prefill, idx up to itself.
    """
    (B, T), H, D = idx.shape, config["n_head"], config["n_embd"] // config["n_head"]
    frequencies = 1 / 10000 ** (torch.arange(0, D, 2, dtype=torch.float32, device=idx.device) / D)
    angles = positions[:, None, :, None] * torch.cat((frequencies, frequencies))  # (B, 1, T, D)
    cos, sin = angles.cos(), angles.sin() * torch.where(torch.arange(D, device=idx.device) < D // 2, 1, -1)
    rows = torch.arange(B, device=idx.device)[:, None] if rows is None else rows
    x = F.embedding(idx, weights["embed"])  # (B, T, C)
    x = norm(x) if config.get("embed_norm", True) else x
    for i, (k_cache, v_cache) in enumerate(cache):
        qkv, o, up, down = [weights[f"blocks.{i}.{name}"] for name in ("qkv", "o", "up", "down")]
        qkv = linear(norm(x), qkv).view(B, T, 3 * H, D).transpose(1, 2).type_as(k_cache)
        qk, v = qkv.split((2 * H, H), dim=1)
        qk = norm(qk * cos + qk.roll(D // 2, dims=-1) * sin)  # rotary position embedding (Su et al. 2021), in fp32
        q, k = qk.type_as(v).chunk(2, dim=1)  # q, k, v: (B, H, T, D)
        k_cache[rows, :, positions], v_cache[rows, :, positions] = k.transpose(1, 2), v.transpose(1, 2)  # (B, T, H, D)
        if mask is not None:
            k, v = k_cache[:, :, : mask.size(-1)], v_cache[:, :, : mask.size(-1)]  # (B, H, S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + linear(y.transpose(1, 2).flatten(2).type_as(x), o)
        x = x + linear(linear(norm(x), up).relu().square(), down)
    return norm(x)


@torch.compiler.disable  # a sum of many rows in fp64 is more than the compiler of PyTorch 2.11 can do on a GPU
def sample(logits, u, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Next tokens (B,) from logits (B, V) and uniform numbers u (B,): where the cumulative distribution passes u."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits / temperature).softmax(-1)
    if top_k:
        p = p.masked_fill(p < p.topk(min(top_k, p.size(-1))).values[:, -1:], 0)
    if top_p < 1:
        largest = p.sort(descending=True).values
        before = largest.cumsum(-1) - largest  # the total probability of those before each
        least = largest.masked_fill(before > top_p * largest.sum(-1, keepdim=True), 1).amin(-1, keepdim=True)
        p = p.masked_fill(p < least, 0)
    if min_p:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
    cdf = p.cumsum(-1, dtype=torch.float64 if p.is_cuda else None)  # (B, V); in fp32 a GPU's sums may decrease
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous())  # no token after it has any probability
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).minimum(last)[:, 0]


def decode(config, weights, cache, state, draws, S, sampling):
    """One more token for every row. No shape depends on the lengths, so that a CUDA graph can repeat it.

    state (4, B, 1), changed in place: the last token, its position, the story that the row writes, and the number of
    its new tokens. draws (stories, max_new_tokens): the uniform numbers that decide them. S: how much of the cache.
    """
    token, position, story, count = state
    seen = torch.arange(S, device=token.device) <= position  # (B, S)
    mask = torch.where(seen, 0.0, -torch.inf).to(cache[0][0].dtype)[:, None, None]  # once, not in every layer
    if token.device.type == "mps":  # older versions of PyTorch apply the first row's mask to all of them there
        mask = mask.expand(-1, config["n_head"], -1, -1).contiguous()
    x = forward(config, weights, token, position, cache, mask=mask)[:, 0]  # (B, C)
    logits = linear(x, weights["head"])[:, : config["vocab_size"]].float()  # the padding is cut off
    if cap := config.get("logit_softcap", 15.0):
        logits = logits.div_(cap).tanh_().mul_(cap)
    token = sample(logits, draws[story, count][:, 0], *sampling)[:, None]
    position = (position + 1).clamp(max=cache[0][0].size(2) - 1)  # rows that have ended stay at the end
    state.copy_(torch.stack((token, position, story, (count + 1).clamp(max=draws.size(1) - 1))))


def record(function, *arguments):
    """A CUDA graph of a call: its kernels are then launched together, not one by one."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # first calls allocate and compile, which must not be recorded
        function(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        function(*arguments)
    return graph


@torch.inference_mode()
def generate(config, weights, prompts, ids, max_new_tokens, sampling, seed, batch_size, ended, compiled=False):
    """Continue prompts (lists of tokens, none empty), batch_size at once; yields lists of (story, next token).

    A story is the index of its prompt. It ends with max_new_tokens, or when the caller adds it to the set `ended`; then
    another one takes its row. One that fills the context goes on from its last half. sampling: sample()'s, after u.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper it builds a plan, 50 ms, for every new length
    device, window = weights["embed"].device, config["block_size"]
    cuda, half = device.type == "cuda", max(1, window // 2)
    S = (min(window, max(map(len, prompts)) + max_new_tokens) + 63) // 64 * 64  # few shapes, aligned masks
    row_bytes = 8 * config["n_layer"] * config["n_embd"] * S + 24 * config["vocab_size"]  # of cache and logits
    most = batch_size or (max(1, min(256, torch.cuda.mem_get_info()[0] // 2 // row_bytes)) if cuda else 32)
    B = math.ceil(len(prompts) / math.ceil(len(prompts) / most))  # batches of equal size
    shape = B, config["n_head"], S, config["n_embd"] // config["n_head"]
    dtype = torch.float32 if device.type == "cpu" else weights["embed"].dtype  # attention in bf16 is slow on a CPU
    # not one tensor for all layers: a compiled model would copy it as a whole at every step
    cache = [[torch.zeros(shape, dtype=dtype, device=device) for _ in "kv"] for _ in range(config["n_layer"])]
    raw = [np.random.Philox(key=np.array([seed % 2**64, i], np.uint64)).random_raw(max_new_tokens) for i in ids]
    draws = torch.tensor((np.stack(raw) >> np.uint64(40)).astype(np.float32) / 2**24, device=device)  # in [0, 1)
    state = torch.zeros(4, B, 1, dtype=torch.long, device=device)
    decode_step = torch.compile(decode, dynamic=False) if compiled else decode
    if cuda:
        graph = record(decode_step, config, weights, cache, state, draws, S, sampling)
    texts = [list(prompt if len(prompt) <= window else prompt[-half:]) for prompt in prompts]
    counts, unread = [0] * len(prompts), set(range(len(prompts)))
    story_of, waiting = list(range(B)), iter(range(B, len(prompts)))
    while True:
        story_of = [next(waiting, i) if i in ended else i for i in story_of]  # story_of[row]
        used = [row for row, i in enumerate(story_of) if i not in ended]
        if not used:
            return

        # prefill: read all but the last token of new stories, and of those that have filled the context
        if fresh := [row for row in used if story_of[row] in unread]:
            rows, read = torch.tensor(fresh, device=device), [texts[story_of[row]] for row in fresh]
            values = [(texts[i][-1], len(texts[i]) - 1, i, counts[i]) for i in [story_of[row] for row in fresh]]
            state[:, rows, 0] = torch.tensor(values, device=device).T
            if T := max(map(len, read)) - 1:
                idx = torch.tensor([(text[:-1] + [0] * T)[:T] for text in read], device=device)  # right-padded
                forward(config, weights, idx, torch.arange(T, device=device).expand_as(idx), cache, rows[:, None])
            unread -= {story_of[row] for row in fresh}

        # decode: several tokens before a GPU has to wait for a look at them
        longest, tokens = max(len(texts[story_of[row]]) for row in used), []
        for _ in range(min(8 if cuda else 1, window + 1 - longest)):
            if cuda:
                graph.replay()
            else:
                decode_step(config, weights, cache, state, draws, S if compiled else longest, sampling)
            tokens.append(state[0].clone())
        for column in torch.cat(tokens, dim=1).T.tolist():
            pairs = [(story_of[row], column[row]) for row in used if story_of[row] not in ended]
            for i, token in pairs:
                texts[i].append(token)
                counts[i] += 1
                if counts[i] == max_new_tokens:
                    ended.add(i)
                elif len(texts[i]) > window:
                    texts[i] = texts[i][-half:]
                    unread.add(i)
            yield pairs


def hand_over(story, file, done, count):
    """Add a story to the file, or print it without one."""
    if file:
        file.write((json.dumps(story) + "\n").encode())
        print(f"{done} of {count} stories", end="\r" if done < count else "\n", file=sys.stderr, flush=True)
    else:
        print(story["text"], end="\n" if done == count else "\n\n---\n\n", flush=True)


def write(config, weights, tokenizer, prompts, ids, flags, file=None, about=None):
    """Write a story to each prompt: to the file, or to stdout, where a single one appears as it grows. Returns one."""
    eot = [tokenizer.eot_token] if tokenizer.special_tokens_set else []  # stories stand behind the end of another
    unknown = set() if eot else set("".join(prompts)) - set(tokenizer.decode(range(tokenizer.n_vocab)))
    if unknown or (not eot and "" in prompts):
        fail(f"--prompt: empty, or with characters that the checkpoint does not know: {''.join(sorted(unknown))!r}")
    pieces = [re.split(r"(\s{1000})", prompt) for prompt in prompts]  # tiktoken panics at a million blanks in a row
    starts = [eot + list(itertools.chain(*map(tokenizer.encode_ordinary, each))) for each in pieces]
    stories, counts, ended, printed, done = list(prompts), [0] * len(prompts), set(), 0, 0
    utf8 = [codecs.getincrementaldecoder("utf-8")("replace") for _ in prompts]  # a character may take several tokens
    held_back = max(map(len, flags.stop), default=1) - 1  # characters that may belong to a --stop text
    sampling = flags.temperature, flags.top_k, flags.top_p, flags.min_p
    settings = flags.max_new_tokens, sampling, flags.seed, flags.batch_size, ended, flags.compile
    for i, token in itertools.chain.from_iterable(generate(config, weights, starts, ids, *settings)):
        if token in eot:
            ended.add(i)
        else:
            counts[i] += 1
            stories[i] += utf8[i].decode(tokenizer.decode_single_token_bytes(token))
        for stop in flags.stop:
            if (cut := stories[i].find(stop, len(prompts[i]))) >= 0:
                stories[i] = stories[i][:cut]
                ended.add(i)
        done += i in ended
        if len(ids) == 1 and not file:  # streamed
            ready = len(stories[i]) if i in ended else max(printed, len(stories[i]) - held_back)
            print(stories[i][printed:ready], end="\n" if i in ended else "", flush=True)
            printed = ready
        elif i in ended:
            story = dict(id=ids[i], prompt=prompts[i], text=stories[i], tokens=counts[i], **about)
            hand_over(story, file, done, len(ids))
    return stories[0]


def open_stories(path, prompts, about):
    """Open --out to add stories: (file, the ids that it holds). A last line that was cut short is dropped."""
    file, have = open(path, "ab+", buffering=0), set()
    file.seek(0)
    *lines, cut = file.read().split(b"\n")
    for line in lines if b'{"id": '.startswith(cut[:7]) else [cut]:
        try:
            story = json.loads(line)
            wanted = dict(prompt=prompts[story["id"] % len(prompts)], **about)
            other = [f"{key} {story[key]!r}, not {wanted[key]!r}" for key in wanted if story[key] != wanted[key]]
        except (ValueError, KeyError, TypeError):
            other = ["a line that is no story"]
        if other:
            fail(f"--out {path}: belongs to another run ({other[0]}); name a new file")
        have.add(story["id"])
    file.truncate(file.tell() - len(cut))
    return file, have


def post(flags, path, body):
    """The answer of the server at --base_url, which alone gets the key: no redirect is followed."""
    key, url = "".join(os.environ.get("OPENAI_API_KEY", "").split()), flags.base_url.rstrip("/") + path
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    response = requests.post(url, headers=headers, json=body, timeout=300, allow_redirects=False)
    if response.status_code != 200:
        said = " ".join(response.text.split())[:300].replace(key or "\0", "[key]")
        fail(f"{url} answers {response.status_code} ({said})", 1)
    return response


def ask(prompts, ids, flags, file, about):
    """Have the model behind an API continue the prompts, one after another; returns a story."""
    for done, (i, prompt) in enumerate(zip(ids, prompts), 1):
        wish = f"Continue this opening as a short scary story, in at most {flags.max_new_tokens * 2 // 3} words. Go on "
        wish += f"where it stops, be it in mid-sentence, and answer with the continuation only.\n\n{prompt}"
        body = dict(model=flags.model, messages=[dict(role="user", content=wish)], max_tokens=flags.max_new_tokens)
        answer = post(flags, "/chat/completions", body | dict(temperature=flags.temperature, seed=flags.seed + i))
        try:
            text = answer.json()["choices"][0]["message"]["content"].rpartition("</think>")[2].strip()
            text = re.sub(rf"\A{re.escape(prompt.strip())}(?!\w)", "", text, flags=re.I)  # the opening, all the same
            tokens = (answer.json().get("usage") or {}).get("completion_tokens")
            assert text
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError):
            fail(f"{flags.base_url} sent no story; a model that thinks may need a larger --max_new_tokens", 1)
        blank = " " if re.search(r"\S\Z", prompt) and re.match(r"[^\s.,;:!?…]", text) else ""
        hand_over(dict(id=i, prompt=prompt, text=prompt + blank + text, tokens=tokens, **about), file, done, len(ids))
    return prompt + blank + text


def narrate(story, flags):
    """Have a server of OpenAI's kind read a story aloud, in pieces of whole sentences: it takes 4,096 characters."""
    pieces = r"\S.{0,3999}\Z|\S.{0,3990}[.!?…][\"'”’)]{0,3}(?=\s)|\S.{0,3998}(?=\s)|\S.{0,3999}"
    sound = b""
    for piece in re.findall(pieces, story.strip(), re.S):
        body = dict(model=flags.speech_model, voice=flags.voice, input=piece, response_format="mp3")
        sound += post(flags, "/audio/speech", body).content
    with open(f"{flags.narrate}.tmp", "wb") as f:
        f.write(sound)
    os.replace(f"{flags.narrate}.tmp", flags.narrate)


def main():
    flags = get_flags()
    if bool(flags.checkpoint) == bool(flags.model) or flags.model and flags.interactive:
        fail("name a checkpoint, or a --model behind an API, but not both; --interactive takes a checkpoint")
    if (flags.narrate or flags.interactive) and (flags.out or flags.prompt_file or flags.num > 1):
        fail("--narrate and --interactive tell one story at a time: without --num, --prompt_file and --out")
    if flags.narrate and not os.path.isdir(os.path.dirname(flags.narrate) or "."):  # before it costs anything
        fail(f"--narrate {flags.narrate}: there is no such folder")
    if (flags.narrate or flags.model) and "api.openai.com" in flags.base_url and not os.environ.get("OPENAI_API_KEY"):
        fail("OpenAI wants a key, and the environment variable OPENAI_API_KEY is not set")
    where = get_device(flags.device, flags.dtype)
    path, *model = [flags.model] if flags.model else load(flags.checkpoint, *where, flags.compile)
    if flags.interactive:
        print("a prompt a line; Ctrl-D ends", file=sys.stderr)
        for i, line in enumerate(sys.stdin):
            write(*model, [line.rstrip("\n") or flags.prompt], [i], flags)
        return
    prompts = [sys.stdin.read().rstrip("\n") if flags.prompt == "-" else flags.prompt]
    if flags.prompt_file:
        lines = sys.stdin if flags.prompt_file == "-" else open(flags.prompt_file, encoding="utf-8-sig")
        prompts = [line.rstrip("\n") for line in lines if line.strip()] or fail(f"{flags.prompt_file}: no prompts")
    rules = "max_new_tokens temperature" if flags.model else "max_new_tokens temperature top_k top_p min_p stop"
    sampling = {key: getattr(flags, key) for key in rules.split()}
    about = dict(seed=flags.seed, checkpoint=path, sampling=sampling)
    file, have = open_stories(flags.out, prompts, about) if flags.out else (None, set())
    ids = [i for i in range(flags.num * len(prompts)) if i not in have]
    if ids:
        todo = [prompts[i % len(prompts)] for i in ids], ids, flags, file, about
        story = ask(*todo) if flags.model else write(*model, *todo)
    if flags.out:
        print(f"{flags.out}: {len(have) + len(ids)} stories, {len(ids)} of them new", file=sys.stderr)
    if flags.narrate:
        narrate(story, flags)


if __name__ == "__main__":
    run(main)
