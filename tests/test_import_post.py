"""runs/import_post.py: its checkpoints compute and write what the post's model does, written here a second time."""

import argparse
import dataclasses
import os
import pathlib
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn

import finetune
import runs.import_post as script

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCK = "transformer_blocks.transformers.1"


@dataclasses.dataclass
class Rounding:
    """How the post's model rounds: as published, or (exact) as ours does, to see that nothing else differs."""

    exact: bool = False

    def tables(self, T, D):
        theta = torch.arange(T)[:, None] * 10000.0 ** -(torch.arange(0, D, 2) / D)  # (T, D / 2)
        tables = theta.cos(), theta.sin()
        return tables if self.exact else [table.bfloat16().float() for table in tables]

    def norm(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=1e-6 if self.exact else None)


class PostAttention(nn.Module):
    def __init__(self, C, D, rounding):
        super().__init__()
        self.D, self.rounding = D, rounding
        for name in ("key_values", "query_values", "values", "projection"):
            setattr(self, name, nn.Linear(C, C, bias=False))

    def turned(self, x):
        """Heads (B, H, T, D) as D / 2 complex numbers each, turned clockwise by position times frequency."""
        x = self.rounding.norm(x)
        cos, sin = self.rounding.tables(x.size(2), self.D)
        z = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, -sin)
        return torch.cat((z.real, z.imag), dim=-1)

    def forward(self, x):
        def heads(linear):
            return linear(x).unflatten(-1, (-1, self.D)).transpose(1, 2)  # (B, H, T, D)

        q, k, v = self.turned(heads(self.query_values)), self.turned(heads(self.key_values)), heads(self.values)
        return self.projection(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class PostMLP(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.feed_forward_layer = nn.Linear(C, 4 * C, bias=False)
        self.feed_forward_projection = nn.Linear(4 * C, C, bias=False)

    def forward(self, x):
        return self.feed_forward_projection(self.feed_forward_layer(x).clamp(min=0).pow(2))


class PostBlock(nn.Module):
    def __init__(self, C, D, rounding):
        super().__init__()
        self.rounding = rounding
        self.multihead_attention = PostAttention(C, D, rounding)
        self.feed_forward_layer = PostMLP(C)

    def forward(self, x):
        x = x + self.multihead_attention(self.rounding.norm(x))
        return x + self.feed_forward_layer(self.rounding.norm(x))


class Post(nn.Module):
    """The model of the post, from its description and the names and facts of its code, with random weights.

    The weights are large enough that the blocks, not the token itself, decide what comes next.
    """

    def __init__(self, rows=192, C=64, D=16, L=3, exact=False, seed=0):
        super().__init__()
        self.rounding = Rounding(exact)
        blocks = [PostBlock(C, D, self.rounding) for _ in range(L)]
        table = nn.Embedding(rows, C)
        self.transformer_blocks = nn.ModuleDict(dict(token_embedding_table=table, transformers=nn.ModuleList(blocks)))
        self.lm_head = nn.Linear(C, rows, bias=False)
        self.lm_head.weight = table.weight
        torch.manual_seed(seed)
        for p in self.parameters():
            nn.init.normal_(p, std=p.size(1) ** -0.5)

    @torch.no_grad()
    def forward(self, idx):
        x = self.transformer_blocks.token_embedding_table(idx)
        for block in self.transformer_blocks.transformers:
            x = block(x)
        return self.lm_head(self.rounding.norm(x))


def save(path, post, **more):
    """A file as the post's code writes it: of a compiled model, and with more than weights in it."""
    state = torch.compile(post).state_dict()
    assert all(key.startswith("_orig_mod.") for key in state) and len(state) == 2 + 6 * 3
    torch.save({"step": 7, "model_state_dict": state, "val_loss": torch.tensor(3.0), **more}, path)


def run(*arguments, code=0, **settings):
    command = [sys.executable, str(ROOT / "runs" / "import_post.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, **settings)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


def here(monkeypatch, *arguments):
    """The same without a new process."""
    monkeypatch.setattr(sys, "argv", ["import_post.py", *map(str, arguments)])
    script.main()


@pytest.fixture
def small_vocabulary(monkeypatch):
    """As many tokens as the small tables of these tests have rows."""
    monkeypatch.setattr(script, "GPT2_TOKENS", 192)


def opened(path):
    checkpoint = torch.load(path, weights_only=True)
    model = finetune.GPT(checkpoint["config"])
    model.load_state_dict(checkpoint["model"])
    return model


@pytest.mark.parametrize("exact, tolerance", [(True, 1e-5), (False, 2e-2)])
def test_logits_are_those_of_the_post(small_vocabulary, tmp_path, monkeypatch, exact, tolerance):
    post = Post(exact=exact)
    save(tmp_path / "post.pt", post)
    here(monkeypatch, tmp_path / "post.pt", tmp_path / "ours.pt", "--head_size", 16, "--block_size", 300)
    idx = torch.randint(192, (4, 300))
    ours, theirs = opened(tmp_path / "ours.pt")(idx).detach(), post(idx)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    assert theirs.std() > 0.9 and (exact or (ours - theirs).abs().max() > 1e-4), "the rounding is there to be seen"


def test_the_greedy_text_is_that_of_the_post(tmp_path):
    """At the widths of the post's heads and table, through the command line, and from sample.py, which has a cache."""
    post = Post(rows=50304, C=256, D=128, seed=27)
    save(tmp_path / "post.pt", post, args=argparse.Namespace(seed=1994), optimizer1_state_dict={"state": {}})
    done = run("post.pt", "new/ours.pt", cwd=tmp_path)
    assert "3 layers, width 256, 2 heads of 128, context 1024, 50257 tokens" in done.stdout and not done.stderr

    bpe, prompt, n = tiktoken.get_encoding("gpt2"), "It was a dark and stormy night", 40
    text = [bpe.eot_token] + bpe.encode(prompt)
    for _ in range(n):
        (best, second), (token, _) = post(torch.tensor([text]))[0, -1, : bpe.n_vocab].topk(2)
        assert best - second > 2e-2, "too close to call: this test needs another seed"
        text.append(token.item())
    assert len(set(text[-n:])) > n / 2, "a model that repeats itself tests nothing"
    command = [sys.executable, "sample.py", tmp_path / "new" / "ours.pt", "--prompt", prompt, "--temperature", "0"]
    command += ["--max_new_tokens", str(n), "--device", "cpu", "--dtype", "float32"]
    written = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=100, check=True).stdout
    assert written == (bpe.decode(text[1:]) + "\n").encode()


def test_the_checkpoint_holds_what_the_design_says(small_vocabulary, tmp_path, monkeypatch):
    post = Post()
    save(tmp_path / "post.pt", post)
    here(monkeypatch, tmp_path / "post.pt", tmp_path / "ours.pt", "--head_size", 16)
    ours = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert set(ours) == {"format", "config", "tokenizer", "model", "train"} and ours["tokenizer"] == "gpt2"
    assert ours["config"] == dict(
        **dict(vocab_size=192, block_size=1024, n_layer=3, n_head=4, n_embd=64),
        **dict(tie_weights=True, embed_norm=False, logit_softcap=0.0),
    )
    assert "head" not in ours["model"]
    assert sum(w.numel() for w in ours["model"].values()) == sum(p.numel() for p in post.parameters())


@pytest.mark.parametrize("rows", [50257, 50304, 50432])
def test_tables_are_padded_as_ours_are(tmp_path, monkeypatch, rows):
    post = Post(rows=rows, C=8, D=4)
    save(tmp_path / "post.pt", post)
    here(monkeypatch, tmp_path / "post.pt", tmp_path / "ours.pt", "--head_size", 4)
    ours, idx = opened(tmp_path / "ours.pt"), torch.tensor([[50256, 0, 1, 50255]])
    assert ours.embed.shape == (50304, 8) and ours.config["vocab_size"] == 50257
    torch.testing.assert_close(ours(idx).detach()[..., :50257], post(idx)[..., :50257], atol=2e-2, rtol=0)


def test_every_form_that_the_weights_come_in(small_vocabulary, tmp_path, monkeypatch):
    post = Post()
    weights, idx = post.state_dict(), torch.randint(192, (2, 20))
    flat = torch.cat([w.flatten() for w in weights.values()])  # one storage for all, as some optimizers make it
    pieces = flat.split([w.numel() for w in weights.values()])
    forms = {
        "bare": weights,
        "plain": {"model_state_dict": weights},
        "ddp": {"model_state_dict": {f"module._orig_mod.{k}": w for k, w in weights.items()}},
        "blocks": {"model_state_dict": {k.replace("s.1.", "s.1._orig_mod."): w for k, w in weights.items()}},
        "parameters": {"model_state_dict": {k: nn.Parameter(w) for k, w in weights.items()}},
        "double": {"model_state_dict": {k: w.double() for k, w in weights.items()}},
        "strided": {"model_state_dict": {k: w.mT.contiguous().mT for k, w in weights.items()}},
        "flat": {"model_state_dict": {k: p.view(w.shape) for (k, w), p in zip(weights.items(), pieces)}},
        "bf16": {"model_state_dict": {k: w.bfloat16() for k, w in weights.items()}},
    }
    for name, form in forms.items():
        torch.save(form, tmp_path / f"{name}.pt")
        here(monkeypatch, tmp_path / f"{name}.pt", tmp_path / f"{name}_ours.pt", "--head_size", 16)
        ours = torch.load(tmp_path / f"{name}_ours.pt", weights_only=True)["model"]
        assert {(w.dtype, w.requires_grad) for w in ours.values()} == {(torch.float32, False)}, name
        expected = post.bfloat16().float() if name == "bf16" else post  # the last
        torch.testing.assert_close(opened(tmp_path / f"{name}_ours.pt")(idx).detach(), expected(idx), atol=2e-2, rtol=0)


class Loss:
    """What torch.load(weights_only=True) refuses."""


def test_what_cannot_be_imported_gets_one_line(small_vocabulary, tmp_path, monkeypatch, capsys):
    post, q, up = Post(), f"{BLOCK}.multihead_attention.query_values.weight", f"{BLOCK}.feed_forward_layer."
    table, head = "transformer_blocks.token_embedding_table.weight", "lm_head.weight"
    weights = {f"_orig_mod.{key}": w for key, w in post.state_dict().items()}

    def changed(**changes):
        """The file with some weights replaced (None: left out)."""
        new = {**weights, **{f"_orig_mod.{key}": w for key, w in changes.items()}}
        return {"model_state_dict": {key: w for key, w in new.items() if w is not None}}

    nan, last_inf = weights[f"_orig_mod.{q}"].clone(), weights[f"_orig_mod.{table}"].clone()
    nan[5, 7], last_inf[-1, -1] = torch.nan, -torch.inf
    square, files = torch.zeros(64, 64), {}
    files["missing"] = changed(**{q: None}), [q, "has no", "64 x 64"]
    files["a_layer"] = changed(**{key[10:]: None for key in weights if BLOCK in key}), ["transformers.1.", "has no"]
    files["no_layer"] = changed(**{key[10:]: None for key in weights if ".transformers." in key}), ["transformers.0."]
    files["headless"] = changed(**{head: None}), [head, "192 x 64"]
    files["tableless"] = changed(**{table: None}), [table, "post's code"]
    files["extra"] = changed(**{up + "router.weight": square}), [up + "router.weight", "is not a weight"]
    files["bias"] = changed(**{q.replace("weight", "bias"): square[0]}), ["query_values.bias"]
    files["shape"] = changed(**{q: square[:, :32]}), [q, "64 x 32", "64 x 64"]
    files["number"] = changed(**{q: square.sum()}), [q, "one number", "64 x 64"]
    files["narrow_mlp"] = changed(**{up + "feed_forward_layer.weight": torch.zeros(128, 64)}), ["128 x 64", "256 x 64"]
    files["flat_table"] = changed(**{table: square[0]}), [table, "matrix"]
    files["empty_table"] = changed(**{table: square[:0]}), [table, "matrix"]
    files["untied"] = changed(**{head: weights["_orig_mod." + head] + 1e-3}), [head, table, "differs"]
    files["nan"] = changed(**{q: nan}), [q, "NaN"]
    files["infinite"] = changed(**{table: last_inf, head: last_inf}), [table, "infinity"]
    files["integers"] = changed(**{q: square.long()}), [q, "floating"]
    files["sparse"] = changed(**{q: square.to_sparse()}), [q, "plain"]
    files["meta"] = changed(**{q: square.to("meta")}), [q, "plain"]
    files["text"] = changed(**{q: "It was a dark and stormy night"}), [q, "floating"]
    files["twice"] = {"model_state_dict": {**weights, q: square}}, [q, "twice"]
    files["numbered"] = {"model_state_dict": {0: square}}, [table]
    files["nothing"] = {}, [table]
    files["list"] = [1, 2], ["model_state_dict"]
    files["null"] = {"model_state_dict": None}, ["model_state_dict"]
    files["numpy"] = {**changed(), "val_loss": np.float64(3)}, ["weights_only=False", "model_state_dict"]
    files["object"] = {**changed(), "val_loss": Loss()}, ["weights_only=False"]
    for name, (content, _) in files.items():
        torch.save(content, tmp_path / f"{name}.pt")
    good = tmp_path / "good.pt"
    save(good, post)
    data = good.read_bytes()
    damaged = [b"", b"\n", data[: len(data) // 2], data[1000:], "It was a dark and stormy night ".encode("utf-16") * 99]
    for i, content in enumerate(damaged):
        (tmp_path / f"damaged{i}.pt").write_bytes(content)
        files[f"damaged{i}"] = None, ["torch.save"]
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    files |= {"folder": (None, ["directory"]), "absent": (None, ["No such file"]), "loop": (None, ["links"])}
    capsys.readouterr()

    def refused(words, *arguments):
        with pytest.raises(SystemExit) as stop:
            here(monkeypatch, *arguments)
        written = capsys.readouterr()
        assert stop.value.code == 2 and not written.out and written.err.count("\n") == 1, written.err
        assert all(word in written.err for word in words), written.err

    for name, (_, words) in files.items():
        refused([*words, str(tmp_path / f"{name}.pt")], tmp_path / f"{name}.pt", tmp_path / "o.pt", "--head_size", 16)
    refused(["--head_size 128", "64"], good, tmp_path / "o.pt")
    refused(["--head_size 48", "64"], good, tmp_path / "o.pt", "--head_size", 48)
    refused(["--head_size", "'1'"], good, tmp_path / "o.pt", "--head_size", 1)
    refused(["--block_size", "'0'"], good, tmp_path / "o.pt", "--block_size", 0)
    refused([str(good), "a folder"], good, good / "o.pt", "--head_size", 16)
    refused(["names no file"], good, f"{tmp_path}/new/", "--head_size", 16)
    refused(["is not a file"], good, tmp_path, "--head_size", 16, "--overwrite")
    os.mkfifo(tmp_path / "pipe")
    refused(["is not a file"], good, tmp_path / "pipe", "--head_size", 16, "--overwrite")
    (tmp_path / "link.pt").symlink_to(good)
    for same in (good, tmp_path / "link.pt", f"{tmp_path}/../{tmp_path.name}/good.pt"):
        refused(["FILE itself"], good, same, "--head_size", 16, "--overwrite")
    here(monkeypatch, good, tmp_path / "ours.pt", "--head_size", 16)
    capsys.readouterr()
    refused(["ours.pt", "already"], tmp_path / "ours.pt", tmp_path / "o.pt", "--head_size", 16)
    refused(["ours.pt", "--overwrite"], good, tmp_path / "ours.pt", "--head_size", 16)
    monkeypatch.setattr(script, "GPT2_TOKENS", 193)
    refused(["192 rows", "193 tokens"], good, tmp_path / "o.pt", "--head_size", 16)
    assert good.read_bytes() == data and not list(tmp_path.glob("o.pt*")) and not list(tmp_path.glob("*.tmp"))


def test_an_older_file_is_replaced_when_told_so_and_kept_when_the_disk_is_full(tmp_path):
    save(tmp_path / "post.pt", Post(rows=50257))
    (tmp_path / "ours.pt").write_text("older")

    def limit():  # stands in for the full disk: it fails at the same place
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    arguments = tmp_path / "post.pt", tmp_path / "ours.pt", "--head_size", 16, "--overwrite"
    done = run(*arguments, code=1, preexec_fn=limit)
    assert done.stderr.count("\n") == 1 and "whole" in done.stderr, done.stderr
    assert (tmp_path / "ours.pt").read_text() == "older" and len(os.listdir(tmp_path)) == 2
    run(*arguments)
    assert opened(tmp_path / "ours.pt").config["n_layer"] == 3 and len(os.listdir(tmp_path)) == 2
