"""finetune.py --method grpo: stories from a cache, TRL's loss, a reward that rises, judges, resumed, refused."""

import argparse
import http.server
import json
import re
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, call, refused
from test_model import random_model, write_checkpoint
from test_train_gpt import assert_same_end, rows

import finetune as script
import rank
from bench import grpo_oracle

END, TOKENIZER = 256, script.get_tokenizer("bytes")
START = "finetune.py --init start.pt --device cpu --dtype float32 --sample_every 0".split()
SFT = f"--data {ROOT}/data/tales.txt --max_tokens 250000 --total_batch_size 1280 --lr_scale 1 --embed_lr 0.3".split()
GRPO = "--init base --method grpo --prompts prompts.txt --prompts_per_step 4 --max_new_tokens 20".split()
LOCAL = "--judge local --scary base --plain start.pt --val_share 0.3".split()
# Made by `python bench/grpo_oracle.py` with trl 1.16.0, transformers 5.24.0, torch 2.13.0.
TRL = """
-0.0100387 0 -0.2481161 0.1212496 0.0321577 -0.0145033 -0.1115355 -0.1251059 -0.0018651 -0.0190857 0.0314634 0.1166154
0.0077774 0 -0.3088974 0.0791145 0.0465952 -0.0117469 -0.1509765 -0.1135414 -0.0127275 -0.0134424 0.0215446 0.1219828
-0.0091662 0.0294103 -0.2492401 0.1244089 0.0316409 -0.0149667 -0.1105774 -0.1253299 -0.0020355 -0.0188250 0.0316449
0.1181876 0.0086499 0.0294103 -0.3100213 0.0822739 0.0460784 -0.0122103 -0.1500184 -0.1137655 -0.0128980 -0.0131817
0.0217262 0.1235550
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder in which everything runs: prompts, and a model of bytes that has read some tales."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work := tmp_path_factory.mktemp("grpo"))
        model = random_model(block_size=40, n_layer=2)
        for p in model.parameters():
            p.data.mul_(0.3)
        write_checkpoint("start.pt", model)
        (work / "prompts.txt").write_text("It was\nThe cellar\n\nNo\nA door\nWell, it\nIt was\nThen\nDark\n")
        (work / "long.txt").write_text("No\n" + "It was dark. " * 4)
        call(*START, *SFT, "--val_loss_every", 0, "--out_dir", "base")
        yield work


def learn(patch, out, judge, *flags):
    """A run with another judge; returns its exit code."""
    for state in (script.files, script.signals, script.ended):
        state.clear()
    patch.setattr(script, "judge", judge)
    patch.setattr(signal, "signal", lambda *_: None)
    patch.setattr(sys, "argv", list(map(str, [ROOT / START[0], *START[1:], *GRPO, *LOCAL, "--out_dir", out, *flags])))
    try:
        return script.main()
    except SystemExit as end:
        return end.code


def share_of_e(args, judges, groups):
    texts = [[story["text"][len(story["prompt"]) :] for story in group] for group in groups]
    return torch.tensor([[text.count("e") / max(1, len(text)) for text in group] for group in texts])  # (P, G)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(tie_weights=True, logit_softcap=0.0, embed_norm=False)])
def test_stories_are_those_of_a_loop_without_a_cache(changes):
    model = random_model(block_size=40, n_layer=2, **changes)
    (model.embed if model.head is None else model.head)[END] *= 3  # so that some come to an end
    prompts = [(np.array([END, *text.encode()]), text) for text in ("It was a dark and stormy night", "No", "The")]
    args = argparse.Namespace(group=3, max_new_tokens=25)
    groups, (idx, targets, logps) = script.write_groups(args, model, TOKENIZER, prompts, [5, 7])
    draws = np.random.default_rng([5, 7]).random((9, 41), np.float32)
    for row, story in enumerate(groups[0] + groups[1] + groups[2]):
        tokens, begin = prompts[row // 3][0].tolist(), len(prompts[row // 3][0])
        while len(tokens) < min(41, begin + 25) and END not in tokens[begin:]:
            cdf = model(torch.tensor([tokens]))[0, -1].softmax(-1).cumsum(-1)
            tokens.append(torch.searchsorted(cdf, cdf[-1] * draws[row, len(tokens)].item(), right=True).item())
        assert targets[row][targets[row] >= 0].tolist() == tokens[begin:]
        assert idx[row, : len(tokens) - 1].tolist() == tokens[:-1] and story["begin"] == begin
        assert story["tokens"].tolist() == [END] + [token for token in tokens if token != END]
        assert story["text"].encode()[: begin - 1] == bytes(tokens[1:begin])
    assert 0 < (targets == END).sum() < 9
    torch.testing.assert_close(logps, -model(idx, targets, reduction="none").view(9, -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("number", range(4))
def test_the_loss_is_that_of_trl(number):
    _, found = grpo_oracle.ours(*grpo_oracle.SETTINGS[number])
    assert found == pytest.approx(list(map(float, TRL.split()))[12 * number :][:12], abs=1e-6)


def test_a_reward_rises(work, monkeypatch):
    learn(monkeypatch, "rises", share_of_e, "--max_iters", 30, "--lr_scale", 0.2)
    rewards, validated = [list(rows(work / "rises", key).values()) for key in ("reward", "val_reward")]
    assert len(rewards) == 30 and np.mean(rewards[-5:]) > 2 * np.mean(rewards[:5])
    assert len(validated) == 4 and validated[-1] > 2 * validated[0]


def test_an_interruption_changes_nothing(work, monkeypatch):
    def interrupting(*arguments):
        judged.append(arguments)
        script.signals.extend([signal.SIGTERM] * (len(judged) == 3))
        return share_of_e(*arguments)

    judged, flags = [], "--max_iters 8 --val_loss_every 0 --passes 2 --beta 0.01".split()
    assert learn(monkeypatch, "whole", share_of_e, *flags) is None
    assert learn(monkeypatch, "parts", interrupting, *flags) == 143
    assert learn(monkeypatch, "parts", share_of_e, *flags, "--resume") is None
    assert_same_end(work / "parts", work / "whole")


def test_two_checkpoints_judge_as_rank_py_does(work):
    flags = dict(scary="base", plain="start.pt", device="cpu", dtype="float32", repetition_penalty=1.0)
    args = argparse.Namespace(**flags, group=4, max_new_tokens=36, batch_size=3)
    *models, writer = [script.open_checkpoint(path)[2] for path in ("base", "start.pt", "base")]
    groups, prompts = [], [(np.array([END, *b"It was"]), "It was")]
    for letters in (list(range(32, 127)), [ord("e")]):  # it writes these and no others
        writer.padding.fill_(-torch.inf)[letters] = 0
        groups += script.write_groups(args, writer, TOKENIZER, prompts, 0)[0]
    scores, repeated = rank.score(args, *rank.load_judges(args), groups[0] + groups[1])
    assert script.judge(args, models, groups).flatten().tolist() == pytest.approx(scores, abs=1e-4)
    assert [story["repetition"] for group in groups for story in group] == pytest.approx(repeated)
    assert repeated[0] == 0 and repeated[-1] > 0.9


class Api(http.server.BaseHTTPRequestHandler):
    """Likes exclamation marks; breaks down, or does not decide, when a story says so."""

    asked = []

    def do_POST(self):
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        a, b = re.search(r"--- Story A ---\n(.*)\n\n--- Story B ---\n(.*)", message, re.S).groups()
        self.asked.append((a < b, self.path, self.headers["Authorization"]))
        answer = "Both" if "both" in a + b else "A." if a.count("!") > b.count("!") else "B"
        usage = dict(prompt_tokens=100, completion_tokens=1)
        data = json.dumps(dict(choices=[dict(message=dict(content=answer))], usage=usage)).encode()
        self.send_response(500 if "broken" in a + b else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def test_an_api_judges_pairs_and_limits_end_the_run(work, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(Api, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    args = argparse.Namespace(base_url=url, model="x", seed=1, max_requests=np.inf, max_cost=np.inf)
    texts = [["one!", "two!!", "three!!!", "broken"], ["both", "both!!", "four!", "five"]]
    rewards = script.judge(args, [], [[dict(text=text) for text in group] for group in texts])
    assert rewards.tolist() == [[0, 0.5, 1, 0.5], [0.5, 0.5, 1, 0]]
    assert script.spent == dict(requests=12, answered=4, dollars=pytest.approx(9 * 260e-6))
    sent = ("/v1/chat/completions", "Bearer sk-secret")
    assert len(Api.asked) == 9 + 3 * 3 and set(Api.asked) == {(True, *sent), (False, *sent)}  # in both orders
    flags = "--judge", "openai", "--base_url", url, "--group", 3, "--out_dir", "api", "--max_requests", 35
    for more in ((), ("--resume",)):
        said = "".join(call(*START, *GRPO, *flags, *more, code=1))
        assert "reached: 24 requests, $0.0062; api/ckpt.pt holds step 2" in said and "secret" not in said
    assert rows(work / "api", "requests") == {1: 12, 2: 24} and not rows(work / "api", "val_reward")
    said = call(*START, *GRPO, *flags[:3], "http://127.0.0.1:9/v1", "--out_dir", "refused", code=1)[1]
    assert "answers neither A nor B but 'ConnectionError" in said and "secret" not in said
    server.shutdown()


def test_mistakes_are_named(work, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for flags, words in {
        "--method sft": "--data",
        "--method grpo --judge local": "--prompts",
        "--method grpo --prompts prompts.txt": "--judge",
        "--method grpo --prompts prompts.txt --judge local --scary base": "--plain",
        "--method grpo --prompts prompts.txt --judge openai": "OPENAI_API_KEY",
        "--method grpo --prompts prompts.txt --judge local --scary base --plain base --group 1": "--group",
        "--method grpo --prompts long.txt --judge local --scary base --plain base": "long.txt: one fills",
    }.items():
        assert words in refused(*START, "--out_dir", "none", *flags.split()), flags
