"""runs/import_hf.py with a file of the original post: it computes and writes what the post's model does."""

import argparse

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from test_export_hf import main

import runs.import_hf as script
import sample
import train_gpt

TABLE = "transformer_blocks.token_embedding_table.weight"
LAYER = [f"multihead_attention.{name}.weight" for name in ("key_values", "query_values", "values", "projection")]
LAYER += [f"feed_forward_layer.feed_forward_{name}.weight" for name in ("layer", "projection")]


def post_weights(C, rows=50304, layers=3, seed=0):
    """Random weights under the names of the post's code, so large that the blocks decide what comes next."""
    torch.manual_seed(seed)
    weights = {TABLE: torch.randn(rows, C) * C**-0.5}
    for i in range(layers):
        for name, (n, m) in zip(LAYER, [(1, 1), (1, 1), (1, 1), (1, 1), (4, 1), (1, 4)]):
            weights[f"transformer_blocks.transformers.{i}.{name}"] = torch.randn(n * C, m * C) * (m * C) ** -0.5
    return weights | {"lm_head.weight": weights[TABLE]}


def turned(x, exact):
    """Heads (B, H, T, D) as D / 2 complex numbers each, turned clockwise by position times frequency."""
    T, D = x.shape[2:]
    x = F.rms_norm(x, (D,), eps=1e-6 if exact else 2**-7)  # the epsilon of bf16, in which the post's q and k are
    angles = torch.arange(T)[:, None] * 10000.0 ** -(torch.arange(0, D, 2) / D)  # (T, D / 2)
    cos, sin = angles.cos(), angles.sin()
    if not exact:
        cos, sin = cos.bfloat16().float(), sin.bfloat16().float()
    z = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, -sin)
    return torch.cat((z.real, z.imag), dim=-1)


def post_logits(weights, idx, D, exact):
    """The post's model from its description and the facts of its code: as it is, or (exact) rounded as ours."""
    eps, x = 1e-6 if exact else 2**-23, weights[TABLE][idx]
    for i in range(len(weights) // len(LAYER)):
        key, query, value, out, up, down = [weights[f"transformer_blocks.transformers.{i}.{name}"] for name in LAYER]
        y = F.rms_norm(x, x.shape[-1:], eps=eps)
        q, k, v = [(y @ w.T).unflatten(-1, (-1, D)).transpose(1, 2) for w in (query, key, value)]  # (B, H, T, D)
        y = F.scaled_dot_product_attention(turned(q, exact), turned(k, exact), v, is_causal=True)
        x = x + y.transpose(1, 2).flatten(2) @ out.T
        x = x + (F.rms_norm(x, x.shape[-1:], eps=eps) @ up.T).clamp(min=0).pow(2) @ down.T
    return (F.rms_norm(x, x.shape[-1:], eps=eps) @ weights["lm_head.weight"].T)[..., :50257]


def save(path, weights):
    """A file as the post's code writes it: of a compiled model, and with more than weights in it."""
    state = {f"_orig_mod.{name}": weight for name, weight in weights.items()}
    torch.save(dict(step=7, model_state_dict=state, args=argparse.Namespace(seed=1994)), path)


@pytest.mark.parametrize("exact, tolerance", [(True, 1e-5), (False, 0.1)])
def test_logits_are_those_of_the_post(tmp_path, exact, tolerance):
    weights, idx = post_weights(64), torch.randint(50257, (1, 300))
    save(tmp_path / "post.pt", weights)
    checkpoint = script.from_post(tmp_path / "post.pt", head_size=16, block_size=300)
    ours = train_gpt.GPT(checkpoint["config"])
    ours.load_state_dict(checkpoint["model"])
    found, expected = ours(idx).detach()[..., :50257], post_logits(weights, idx, 16, exact)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    assert expected.std() > 0.9 and (exact or (found - expected).abs().max() > 1e-4), "the rounding is there to be seen"


def test_the_greedy_text_is_that_of_the_post(tmp_path, capsys):
    """At the widths of the post's heads and table, and from sample.py, which has a cache."""
    weights, bpe, prompt, n = post_weights(256, seed=22), tiktoken.get_encoding("gpt2"), "It was a dark night", 30
    save(tmp_path / "post.pt", weights)
    assert main(script, tmp_path / "post.pt", tmp_path / "new" / "ckpt.pt") == 0
    capsys.readouterr()
    text = [bpe.eot_token] + bpe.encode(prompt)
    for _ in range(n):
        (best, second), (token, _) = post_logits(weights, torch.tensor([text]), 128, False)[0, -1].topk(2)
        assert best - second > 0.015, "too close to call: this test needs another seed"
        text.append(token.item())
    assert len(set(text[-n:])) > n / 2, "a model that repeats itself tests nothing"
    flags = "--max_new_tokens", n, "--temperature", 0, "--device", "cpu", "--dtype", "float32"
    assert main(sample, tmp_path / "new", "--prompt", prompt, *flags) == 0
    assert capsys.readouterr().out == bpe.decode(text[1:]) + "\n"
