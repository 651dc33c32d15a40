"""Claims on fitted coders."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.kv.coder.calibrate import allocate, find_space, fit_coders, share_codebooks
from rpqfx.kv.coder.head_coder import HeadCoder
from rpqfx.kv.coder.statistics import Moments


def moments_of(x: Tensor, grads: Tensor, joint: bool = True) -> Moments:
    moments = Moments(joint)
    moments.add(x, 1)
    moments.add_gradient(grads)
    return moments


def correlated(seed: int, count: int = 2000) -> tuple[Tensor, Tensor]:
    """Vectors of two heads of 8 with a few strong directions, and gradients that look at others."""
    generator = torch.Generator().manual_seed(seed)
    mix, look = torch.randn(2, 16, 16, generator=generator)
    x = (torch.randn(count, 16, generator=generator) * 0.7 ** torch.arange(16)) @ mix
    grads = (torch.randn(count, 16, generator=generator) * 0.8 ** torch.arange(16)) @ look
    return tuple(y.view(1, count, 2, 8).transpose(1, 2).contiguous() for y in (x + 1, grads))  # type: ignore[return-value]


@given(st.integers(0, 2**31), st.booleans())
@settings(max_examples=10)
def test_in_code_space_errors_count_alike_and_coordinates_are_uncorrelated(seed: int, joint: bool) -> None:
    x, grads = correlated(seed)
    coder = HeadCoder(2, 8, codebook_dim=4, joint=joint)
    space = find_space(coder, moments_of(x, grads, joint))
    parts = coder.parts
    flat = (x - space.mean[:, None]).view(parts, -1, x.shape[2], 8).transpose(1, 2).flatten(2)
    y = flat @ space.analysis
    covariance = y.mT @ y / y.shape[1]
    outside = covariance - torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    assert outside.abs().max() < 1e-2
    # An error of one in a sub-vector's coordinates costs what its gradient says: energy is cost of leaving it out.
    error = torch.zeros_like(y)
    error[..., :4] = y[..., :4]
    dense = (error @ space.synthesis).double()
    seen = grads.view(parts, -1, x.shape[2], 8).transpose(1, 2).flatten(2).double()
    fisher = seen.mT @ seen / seen.shape[1]
    cost = torch.einsum("pni,pij,pnj->p", dense, fisher, dense) / dense.shape[1]
    torch.testing.assert_close(cost.float(), space.energy[:, 0], rtol=0.05, atol=1e-3)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 20))
def test_no_other_allocation_is_cheaper(energies: list[float], budget: int) -> None:
    left = torch.tensor(energies)[:, None] * 0.3 ** torch.arange(4)
    counts = allocate(left, budget)
    assert int(counts.sum()) == min(budget, 3 * len(energies))
    cost = float(left.gather(1, counts[:, None]).sum())
    for a in range(len(energies)):
        for b in range(len(energies)):
            moved = counts.clone()
            moved[a] -= 1
            moved[b] += 1
            if moved.min() >= 0 and moved.max() <= 3:
                assert cost <= float(left.gather(1, moved[:, None]).sum()) * (1 + 1e-6)


def test_bits_are_kept_and_more_of_them_cost_less() -> None:
    x, grads = correlated(0, 600)
    costs = []
    for bits in (0.5, 1.0, 3.0):
        coders = [HeadCoder(2, 8, codebook_dim=4, codebook_size=16) for _ in range(2)]
        share_codebooks(coders, 5)
        spaces = [find_space(coder, moments_of(x, grads)) for coder in coders]
        fit_coders(coders, spaces, bits, 5)
        assert sum(coder.code_count for coder in coders) * 4 <= bits * 32
        assert coders[0].quantizer.codebooks is coders[1].quantizer.codebooks
        flat = grads.transpose(1, 2).flatten(2)[0]
        error = (coders[0](x)[0].detach() - x).transpose(1, 2).flatten(2)[0]
        costs.append(float((error @ (flat.mT @ flat / len(flat)) * error).sum()))
    assert costs == sorted(costs, reverse=True)
    assert costs[2] < 0.1 * costs[0]


def test_it_beats_coding_channels_as_they_are() -> None:
    x, grads = correlated(3)
    whole = grads.transpose(1, 2).flatten(2)[0]
    fisher = whole.mT @ whole / len(whole)

    def cost(coder: HeadCoder) -> float:
        error = (coder(x)[0].detach() - x).transpose(1, 2).flatten(2)[0]
        return float(((error @ fisher) * error).sum())

    coder = HeadCoder(2, 8, codebook_dim=4, codebook_size=16)
    share_codebooks([coder], 4)
    fit_coders([coder], [find_space(coder, moments_of(x, grads))], 2.0, 4)
    plain = HeadCoder(2, 8, codebook_dim=4, codebook_size=16, stages=2, transform=False)
    plain.fit(x)
    assert cost(coder) < 0.5 * cost(plain)


def test_heads_that_never_change_and_gradients_that_never_come() -> None:
    x = torch.ones(1, 2, 50, 8)
    coder = HeadCoder(2, 8, codebook_dim=4, codebook_size=4)
    share_codebooks([coder], 2)
    fit_coders([coder], [find_space(coder, moments_of(x, torch.zeros_like(x)))], 1.0, 2)
    torch.testing.assert_close(coder(x)[0], x, rtol=1e-3, atol=1e-3)
