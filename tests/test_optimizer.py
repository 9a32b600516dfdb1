"""Muon against torch.optim.Muon, AdamW against torch.optim.AdamW, and the singular values of what Muon steps along."""

import pytest
import torch

import train_char as script

NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5  # the one triple that torch.optim.Muon repeats


def parameters(*shapes):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def test_muon_is_that_of_torch():
    shapes = [(24, 24), (24, 24), (96, 24), (24, 96)]  # two of one shape share a call
    ours, theirs = parameters(*shapes), parameters(*shapes)
    states = [{} for _ in ours]
    reference = torch.optim.Muon(theirs, lr=0.05, momentum=0.9, weight_decay=0.1)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        before = [p.detach().clone() for p in ours]
        with torch.no_grad():
            script.muon_step(ours, states, 0.05, 0.9, 0.1, coefficients=NEWTON_SCHULZ)
        reference.step()
        for p, q, old in zip(ours, theirs, before):
            moved = (q - old).norm()
            assert (p - q).norm() < 0.02 * moved, "bf16 rounding explains a difference of a hundredth, no more"
            with torch.no_grad():
                p.copy_(q)  # differences of rounding shall not add up
        for state, q in zip(states, theirs):
            torch.testing.assert_close(state["momentum"], reference.state[q]["momentum_buffer"])


@pytest.mark.parametrize("dtype, low, high", [(torch.float32, 0.85, 1.15), (torch.bfloat16, 0.8, 1.2)])
@pytest.mark.parametrize("shape", [(64, 64), (3, 64, 64), (256, 64), (2, 64, 256)])
def test_orthogonalised_matrices_have_singular_values_near_one(dtype, low, high, shape):
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    G = 1e-4 * U @ torch.diag(torch.logspace(0, -2, 64)) @ Vh  # from the largest to a 300th of the norm
    X = script.orthogonalize(G, dtype)
    assert X.shape == G.shape and X.dtype == dtype
    values = torch.linalg.svdvals(X.float())
    assert low < values.min() and values.max() < high
    assert (X.float() - U @ Vh).norm() < 0.15 * (U @ Vh).norm()


def test_a_zero_gradient_moves_nothing():
    assert torch.equal(script.orthogonalize(torch.zeros(2, 8, 8)), torch.zeros(2, 8, 8, dtype=torch.bfloat16))


def test_adamw_is_that_of_torch():
    ours, theirs = parameters((40, 8)), parameters((40, 8))
    states = [{}]
    reference = torch.optim.AdamW(theirs, lr=0.3, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        with torch.no_grad():
            script.adamw_step(ours, states, 0.3, (0.8, 0.95))
        reference.step()
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tie_weights", [False, True])
def test_every_parameter_is_stepped_by_its_own_group(tie_weights):
    model = script.GPT(script.Config(65, 8, 2, 2, 16, tie_weights=tie_weights))
    optimizer = script.Optimizer(model, 0.02, 0.02, 0.3, 0.01, 0.95, 0.0, (0.8, 0.95), torch.float32)
    give_gradients(model.parameters(), 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.set_lr(0.5)
    optimizer.step()
    change = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters()}
    assert change["embed"] == pytest.approx(0.15, rel=1e-3)  # Adam's first step is the rate itself
    assert tie_weights or change["head"] == pytest.approx(0.005, rel=1e-3)
    assert all(change[name] > 0 for name in change)
    assert set(optimizer.state) == set(before) and set(optimizer.state["blocks.0.qkv"]) == {"momentum"}
