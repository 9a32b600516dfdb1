"""The gpt of train_char.py against transformers' NanoChatForCausalLM, and against the model of train_gpt.py."""

import types

import pytest
import torch
from transformers import NanoChatConfig, NanoChatForCausalLM

import train_char
import train_gpt

V, T = 130, 24


def random_model(**changes):
    """A model of train_gpt.py with no zero anywhere, so that every weight matters."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, block_size=T, n_layer=3, n_head=2, n_embd=32)
    model = train_gpt.GPT(sizes | dict(tie_weights=False, embed_norm=True, logit_softcap=15.0) | changes)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.eval()


def as_nanochat(model):
    """The same weights in transformers' own implementation."""
    config = types.SimpleNamespace(**model.config) if isinstance(model.config, dict) else model.config
    theirs = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=4 * config.n_embd,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            max_position_embeddings=config.block_size,
            final_logit_softcapping=config.logit_softcap or None,
            tie_word_embeddings=config.tie_weights,
            pad_token_id=None,  # else that row of the embedding would get no gradient
        )
    ).eval()
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(model.embed[: config.vocab_size])
        if not config.tie_weights:
            theirs.lm_head.weight.copy_(model.head[: config.vocab_size])
        for layer, block in zip(theirs.model.layers, model.blocks):
            attention, mlp = layer.self_attn, layer.mlp
            for name, weight in zip(("q_proj", "k_proj", "v_proj"), block.qkv):
                getattr(attention, name).weight.copy_(weight)
            attention.o_proj.weight.copy_(block.o)
            mlp.fc1.weight.copy_(block.up)
            mlp.fc2.weight.copy_(block.down)
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("length", [1, T])
def test_logits_are_those_of_transformers_and_of_train_gpt(length):
    theirs = random_model()
    ours = train_char.Model(theirs.config)
    ours.load_state_dict(theirs.state_dict())  # the same names and shapes
    idx = torch.randint(V, (3, length))
    logits = ours(idx)
    torch.testing.assert_close(logits, as_nanochat(theirs)(idx).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, theirs(idx)[..., :V], atol=1e-5, rtol=1e-5)
    assert logits.std() > 0.1
    close = train_char.Model(theirs.config, dtype=torch.bfloat16)
    close.load_state_dict(theirs.state_dict())
    assert 0 < (close(idx) - logits).abs().mean() < 0.05 * logits.std()
