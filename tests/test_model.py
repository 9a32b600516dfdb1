"""Every script that has a model computes what transformers' NanoChat does, and none opens what is no checkpoint."""

import argparse
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, refused
from transformers import NanoChatConfig, NanoChatForCausalLM

import finetune
import hellaswag
import rank
import sample
import train_char
import train_gpt

CPU, T = torch.device("cpu"), 24
QUESTION = dict(activity_label="Tea", ctx="She", ctx_a="She", ctx_b="", endings=["a", "b", "c", "d"], label=2)


def random_model(**changes):
    """A model of train_gpt.py with no zero anywhere, so that every weight matters, also those of the padding."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, block_size=T, n_layer=3, n_head=2, n_embd=32)
    model = train_gpt.GPT(sizes | dict(tie_weights=False, embed_norm=True, logit_softcap=15.0) | changes)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
        for p in (model.embed, model.embed if model.head is None else model.head):
            p[model.config["vocab_size"] :] = 50.0
    return model.eval()


def write_checkpoint(path, model, tokenizer="bytes", step=7):
    """Save a model as train_gpt.py does; returns the path as the scripts want it."""
    train = dict(step=step, flags={})
    torch.save(dict(format=1, config=model.config, tokenizer=tokenizer, model=model.state_dict(), train=train), path)
    return str(path)


def as_nanochat(model):
    """The same weights in transformers' own implementation."""
    config = model.config
    sizes = dict(vocab_size=config["vocab_size"], hidden_size=config["n_embd"], num_hidden_layers=config["n_layer"])
    sizes |= dict(num_attention_heads=config["n_head"], intermediate_size=4 * config["n_embd"])
    sizes |= dict(max_position_embeddings=config["block_size"], tie_word_embeddings=config["tie_weights"])
    cap = config["logit_softcap"] or None
    no_row = dict(pad_token_id=None)  # else that row of the embedding would get no gradient
    theirs = NanoChatForCausalLM(NanoChatConfig(final_logit_softcapping=cap, **sizes, **no_row)).eval()
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(model.embed[: config["vocab_size"]])
        if not config["tie_weights"]:
            theirs.lm_head.weight.copy_(model.head[: config["vocab_size"]])
        for layer, block in zip(theirs.model.layers, model.blocks):
            attention, mlp = layer.self_attn, layer.mlp
            for name, weight in zip(("q_proj", "k_proj", "v_proj"), block.qkv):
                getattr(attention, name).weight.copy_(weight)
            attention.o_proj.weight.copy_(block.o)
            mlp.fc1.weight.copy_(block.up)
            mlp.fc2.weight.copy_(block.down)
    return theirs


# Each gives the losses (3, T) in nats of idx[:, 1:], idx (3, T + 1) being tokens, by the checkpoint at this path.


def opened(model_class, path, dtype):
    checkpoint = torch.load(path, weights_only=True)
    model = model_class(checkpoint["config"], dtype=dtype)
    model.load_state_dict(checkpoint["model"])
    return model


def train_gpt_losses(path, idx, dtype):
    return opened(train_gpt.GPT, path, dtype)(idx[:, :-1], idx[:, 1:], reduction="none").view(3, T)


def train_char_losses(path, idx, dtype):
    return F.cross_entropy(opened(train_char.Model, path, dtype)(idx[:, :-1]).mT, idx[:, 1:], reduction="none")


def finetune_losses(path, idx, dtype):
    model = finetune.open_checkpoint(path)[2]
    model.dtype = dtype
    return model(idx[:, :-1], idx[:, 1:], reduction="none").view(3, T)


def rank_losses(path, idx, dtype):
    flags = argparse.Namespace(scary=path, plain=path, device="cpu", dtype=str(dtype)[6:])
    (model, _), _ = rank.load_judges(flags)
    rows = [(row[:i], [row[i]]) for row in idx.tolist() for i in range(1, T + 1)]
    return torch.tensor(rank.mean_losses(model, rows)).view(3, T)


def hellaswag_losses(path, idx, dtype):
    checkpoint = hellaswag.load_checkpoint(path, CPU, dtype)
    texts = [(row[:i], [[row[i]]] * 4, []) for row in idx.tolist() for i in range(1, T + 1)]
    return hellaswag.score(checkpoint, texts, T, CPU)[:, 3].view(3, T)


def sample_losses(path, idx, dtype):
    """Its cache at work, behind prompts of a token and of several; it has to write idx, whatever it likes."""
    config, weights = sample.load(path, CPU, dtype)[1:3]
    losses, lengths, count = torch.full((3, T), torch.nan), [1, 9, 4], itertools.count()

    def forced(logits, *_):
        tokens, step = torch.zeros(3, dtype=torch.long), next(count)
        for i, length in enumerate(lengths):
            if length + step <= T:
                tokens[i] = idx[i, length + step]
                losses[i, length + step - 1] = F.cross_entropy(logits[i], tokens[i])
        return tokens

    prompts = [row[:length].tolist() for row, length in zip(idx, lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "sample", forced)
        for _ in sample.generate(config, weights, prompts, range(3), T, (), 0, 0, set()):
            pass
    assert losses[0].isfinite().all()
    return losses


LOSSES = [train_char_losses, train_gpt_losses, finetune_losses, rank_losses, hellaswag_losses, sample_losses]


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(tie_weights=True, logit_softcap=0.0), dict(embed_norm=False)])
def test_every_script_opens_a_checkpoint_and_computes_what_transformers_does(tmp_path, changes):
    model = random_model(**changes)
    if not model.config["embed_norm"]:  # NanoChat always normalizes: hand both rows on which that does nothing
        model.embed.mul_(torch.rsqrt(model.embed.square().mean(-1, keepdim=True)))
    path, idx = write_checkpoint(tmp_path / "x.pt", model), torch.randint(257, (3, T + 1))
    expected = F.cross_entropy(as_nanochat(model)(idx[:, :-1]).logits.mT, idx[:, 1:], reduction="none")
    assert expected.std() > 0.5
    for losses in LOSSES if not changes else LOSSES[1:]:  # train_char.py's model has no such settings
        apart = (losses(path, idx, torch.float32) - expected).abs()
        assert apart.nan_to_num().max() < 2e-4, losses.__name__
        rounded = (losses(path, idx, torch.bfloat16) - expected).abs()
        assert 0.001 < rounded.nanmean() < 0.1 * expected.std(), losses.__name__


def test_the_folder_of_a_run_stands_for_its_checkpoint(tmp_path):
    write_checkpoint(tmp_path / "ckpt.pt", random_model())
    opened = sample.load(str(tmp_path), CPU, torch.float32)[0], finetune.open_checkpoint(str(tmp_path))[0]
    assert {*opened} == {str(tmp_path / "ckpt.pt")}


class Bomb:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("script", ["train_char", "finetune", "sample", "hellaswag", "rank"])
def test_what_is_no_checkpoint_is_refused_and_not_executed(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    whole = pathlib.Path(write_checkpoint("whole.pt", random_model())).read_bytes()
    for name, data in {"cut": whole[: len(whole) // 2], "text": b"It was a dark night", "empty": b""}.items():
        pathlib.Path(f"{name}.pt").write_bytes(data)
    torch.save(dict(torch.load("whole.pt"), model=Bomb()), "bomb.pt")
    torch.save([1, 2], "list.pt")
    os.mkdir("folder")
    pathlib.Path("questions.jsonl").write_text(json.dumps(QUESTION))
    stories = [dict(id=i, prompt="It", text=f"It was {i}.") for i in range(4)]
    pathlib.Path("stories.jsonl").write_text("".join(json.dumps(story) + "\n" for story in stories))
    for name in ("cut.pt", "text.pt", "empty.pt", "bomb.pt", "list.pt", "missing.pt", "folder"):
        flags = dict(
            train_char=["--init", name, "--data", ROOT / "data/tales.txt", "--out_dir", "out"],
            finetune=["--init", name, "--data", ROOT / "data/tales.txt", "--out_dir", "out"],
            sample=[name],
            hellaswag=[name, "--data", "questions.jsonl", "--details", "details.jsonl"],
            rank=["stories.jsonl", "--judge", "local", "--scary", name, "--plain", "whole.pt"],
        )[script]
        assert name in refused(f"{script}.py", *flags)
    assert not {"executed", "out"} & set(os.listdir())


def test_each_script_starts_alone_in_an_empty_folder(tmp_path):
    processes = []
    for path in ROOT.glob("*.py"):
        (tmp_path / path.stem).mkdir()
        command = [sys.executable, "-I", shutil.copy(path, tmp_path / path.stem), "--help"]  # -I: imports no neighbour
        processes.append(subprocess.Popen(command, cwd=tmp_path / path.stem, stdout=subprocess.PIPE, text=True))
    for process in processes:
        assert "--help" in process.communicate()[0] and process.returncode == 0
