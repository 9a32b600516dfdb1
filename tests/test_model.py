"""The model against transformers' NanoChatForCausalLM, cached decoding against uncached, loss and compiled training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import NanoChatConfig, NanoChatForCausalLM

import train_char as script

V, T, C, H, L = 130, 24, 32, 2, 3


def random_model(dtype=torch.float32, **changes):
    """A model with no zero anywhere, so that every weight matters."""
    torch.manual_seed(0)
    model = script.GPT(script.Config(**{**dict(vocab_size=V, block_size=T, n_layer=L, n_head=H, n_embd=C), **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.eval()


def as_nanochat(model, unnormalised=True):
    """The same weights in transformers' own implementation."""
    config = model.config
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


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("softcap", [15.0, 0.0])
@pytest.mark.parametrize("embed_norm", [True, False])
def test_logits_are_those_of_transformers(tie_weights, softcap, embed_norm):
    model = random_model(tie_weights=tie_weights, logit_softcap=softcap, embed_norm=embed_norm)
    if not embed_norm:  # NanoChat always normalises: hand both rows on which that does nothing
        with torch.no_grad():
            model.embed.copy_(model.embed * torch.rsqrt(model.embed.square().mean(-1, keepdim=True)))
    theirs = as_nanochat(model)
    idx = torch.randint(V, (3, T))
    with torch.no_grad():
        ours, expected = model(idx), theirs(idx).logits
        assert (ours - expected).abs().max() < 1e-4 and expected.std() > 0.1
        cache = script.KVCache(model.config, 3, T, "cpu", torch.float32)
        steps = [model(idx[:, :5], cache=cache)] + [model(idx[:, t : t + 1], cache=cache) for t in range(5, T)]
        assert (torch.cat(steps, 1) - expected).abs().max() < 1e-4
        past = theirs(idx[:, :5], use_cache=True).past_key_values
        assert (steps[1] - theirs(idx[:, 5:6], past_key_values=past).logits).abs().max() < 1e-4


def test_untrained_model_predicts_every_token_alike():
    model = script.GPT(script.Config(V, T, L, H, C))
    loss = model(torch.randint(V, (2, T)), torch.randint(V, (2, T)))
    assert abs(loss.item() - torch.tensor(float(V)).log().item()) < 1e-5


def test_padding_of_the_vocabulary_gets_no_logits():
    model = random_model()
    assert model.embed.shape == (192, C) and model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, V)


@pytest.mark.parametrize("tie_weights", [False, True])
def test_loss_in_chunks_has_the_loss_and_gradients_of_cross_entropy(tie_weights):
    model = random_model(tie_weights=tie_weights)
    theirs = as_nanochat(model)
    idx, targets = torch.randint(V, (4, T)), torch.randint(V, (4, T))
    targets[0, :7] = -1
    model.least_rows, model.logits_at_once = 7, {"cpu": 7 * V}  # the last chunk is shorter
    loss = model(idx, targets)
    loss.backward()
    expected = F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-5
    for ours, reference in [
        (model.embed.grad[:V], theirs.model.embed_tokens.weight.grad),
        (model.head_weight.grad[:V], theirs.lm_head.weight.grad),
        (model.blocks[0].up.grad, theirs.model.layers[0].mlp.fc1.weight.grad),
        (model.blocks[-1].qkv.grad[1], theirs.model.layers[-1].self_attn.k_proj.weight.grad),
    ]:
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert abs(model(idx, targets).item() - expected.item()) < 1e-5
        rows = model(idx, targets, reduction="none")
        assert rows.shape == (4 * T - 7,) and abs(rows.mean().item() - expected.item()) < 1e-5


def test_activation_checkpointing_changes_no_gradient():
    model = random_model().train()
    idx = torch.randint(V, (2, T))
    model(idx, idx).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.recompute = True
    model(idx, idx).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters()))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="n_embd 30"):
        script.GPT(script.Config(V, T, L, 4, 30))


def train_few_steps(model, compiled):
    optimizer = script.Optimizer(model, 0.02, 0.02, 0.3, 0.01, 0.95, 0.01, (0.8, 0.95), torch.float32)
    if compiled:
        for block in model.blocks:
            block.compile()
    torch.manual_seed(1)
    for _ in range(4):
        idx = torch.randint(V, (8, T + 1))
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        model.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def test_training_compiled_by_blocks_gives_the_same_bits_twice():
    model = random_model().train()
    models = [copy.deepcopy(model) for _ in range(3)]
    eager, first, second = (train_few_steps(m, compiled) for m, compiled in zip(models, (False, True, True)))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    for a, b in zip(first, eager):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    with torch.no_grad():  # the compiled blocks also evaluate and decode
        idx = torch.randint(V, (2, 9))
        cache = script.KVCache(model.config, 2, T, "cpu", torch.float32)
        models[1](idx[:, :8], cache=cache)
        last = models[1](idx[:, 8:], cache=cache)[:, -1]
        torch.testing.assert_close(last, models[1](idx)[:, -1], atol=1e-4, rtol=1e-4)


def test_bfloat16_activations_stay_near_fp32():
    model = random_model()
    idx = torch.randint(V, (2, T))
    with torch.no_grad():
        exact = model(idx)
        model.dtype = torch.bfloat16
        cache = script.KVCache(model.config, 2, T, "cpu", torch.bfloat16)
        steps = torch.cat([model(idx[:, :9], cache=cache), model(idx[:, 9:], cache=cache)], 1)
        whole = model(idx)
        for p in model.parameters():
            p.data = p.data.bfloat16()  # as sample.py keeps them
        assert model(idx).dtype == torch.float32
        for logits in (whole, steps, model(idx)):
            assert 0 < (logits - exact).abs().mean() < 0.05 * exact.std()
