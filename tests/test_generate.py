"""Cached decoding against recomputing everything, batches of different lengths, sampling, and one seed one story."""

import itertools

import numpy as np
import pytest
import torch
from test_model import T, V, random_model

import train_char as script


def recompute_greedily(model, prompt, n):
    """Greedy text without a cache; a full window keeps its last half, as generate promises."""
    text, window = list(prompt), list(prompt)
    window = window if len(window) <= T else window[-(T // 2) :]
    for _ in range(n):
        if len(window) > T:
            window = text[-(T // 2) :]
        with torch.no_grad():
            token = model(torch.tensor([window]))[0, -1].argmax().item()
        text.append(token)
        window.append(token)
    return text[len(prompt) :]


def collect(model, prompts, n, **settings):
    texts = [[] for _ in prompts]
    for step in script.generate(model, prompts, n, **settings):
        for row, token in step:
            texts[row].append(token)
    return texts


@pytest.mark.parametrize("n", [5, T - 9, 3 * T])
def test_cached_decoding_is_recomputing_token_for_token(n):
    model = random_model()
    torch.manual_seed(3)
    prompts = [torch.randint(V, (length,)).tolist() for length in (1, 9, 4, T, T + 7, 9)]
    expected = [recompute_greedily(model, prompt, n) for prompt in prompts]
    for prompt, text in zip(prompts, expected):
        assert collect(model, [prompt], n, temperature=0) == [text]
    assert all(len(set(text)) > 2 for text in expected if n > 5), "a model that repeats one token tests nothing"


@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_smallest_windows_work(window):
    assert len(collect(random_model(block_size=window), [[1, 2, 3, 4]], 9)[0]) == 9


def test_prompts_of_different_lengths_share_a_batch():
    model, n = random_model(), T - 12
    torch.manual_seed(4)
    prompts = [torch.randint(V, (length,)).tolist() for length in (1, 9, 4, 12, 9)]
    prompts.append(prompts[1])  # read once, continued twice
    assert collect(model, prompts, n, temperature=0) == [recompute_greedily(model, p, n) for p in prompts]


def test_one_seed_gives_one_story_whatever_the_batch():
    model, prompts = random_model(), [[5, 6, 7]] * 6
    together = collect(model, prompts, 30, seed=11)
    assert together == [collect(model, [prompts[i]], 30, seed=11, indices=[i])[0] for i in range(6)]
    assert together[2:4] == collect(model, prompts[2:4], 30, seed=11, indices=[2, 3])
    assert len({tuple(text) for text in together}) == 6
    assert collect(model, prompts, 30, seed=12) != together


def test_neighbouring_seeds_share_nothing():
    model = random_model()
    stories = {tuple(collect(model, [[1]], 12, seed=seed, indices=[i])[0]) for seed in range(-3, 5) for i in range(4)}
    assert len(stories) == 32


def test_the_chance_of_a_token_is_that_of_its_seed_row_and_position():
    model = random_model(vocab_size=64, block_size=4096, n_layer=1, n_head=1, n_embd=8)
    torch.nn.init.zeros_(model.head)  # every token is as likely: the number that is drawn is the token
    steps = itertools.islice(script.generate(model, [[1], [1]], 10**12, seed=5, indices=[3, 7]), 2100)
    texts = list(zip(*([token for _, token in step] for step in steps)))
    for index, text in zip((3, 7), texts):
        raw = np.random.Philox(key=np.array([5, index], np.uint64)).random_raw(2100)
        assert text == tuple((raw >> np.uint64(58)).tolist())


def test_rows_end_at_the_stop_token_and_the_others_go_on():
    model = random_model()
    free = collect(model, [[i] for i in range(8)], 20, seed=1)
    stop = free[0][3]
    for text, stopped in zip(free, collect(model, [[i] for i in range(8)], 20, seed=1, stop=(stop,))):
        end = text.index(stop) + 1 if stop in text else len(text)
        assert stopped == text[:end]


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0]])
    u = (torch.arange(4000) + 0.5) / 4000
    counts = torch.bincount(script.sample(logits.expand(4000, 4), u), minlength=4) / 4000
    torch.testing.assert_close(counts, logits.softmax(-1)[0], atol=1e-3, rtol=0)
    hot = torch.bincount(script.sample(logits.expand(4000, 4), u, temperature=2.0), minlength=4) / 4000
    torch.testing.assert_close(hot, (logits / 2).softmax(-1)[0], atol=1e-3, rtol=0)
    top2 = torch.bincount(script.sample(logits.expand(4000, 4), u, top_k=2), minlength=4) / 4000
    torch.testing.assert_close(top2[[0, 3]], logits[0, [0, 3]].softmax(-1), atol=1e-3, rtol=0)
    assert top2[1] == top2[2] == 0
    assert set(script.sample(logits.expand(4000, 4), u, top_p=0.6).tolist()) == {0}  # 0 alone has 0.64
    assert set(script.sample(logits.expand(4000, 4), u, top_p=0.8).tolist()) == {0, 3}


def test_sampling_at_the_edges():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    almost_one = torch.tensor([1 - 2**-24])
    assert script.sample(logits, torch.zeros(1)).item() == 1
    assert script.sample(logits, almost_one).item() == 3, "never a token of probability 0"
    wide = torch.randn(1, 50304)
    wide[:, 50257:] = -torch.inf
    assert script.sample(wide, almost_one).item() < 50257
    assert script.sample(logits, almost_one, temperature=0).item() == 1
    assert script.sample(logits, almost_one, top_k=99).item() == 3


def test_stories_are_different_at_high_temperature_and_never_padding():
    model = random_model(vocab_size=65)
    texts = collect(model, [[1]] * 20, 40, temperature=50.0)
    assert max(max(text) for text in texts) < 65 < model.embed.size(0)
