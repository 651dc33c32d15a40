"""Attention on codes is attention on what the codes stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.codebook.packing import code_bits
from rpqfx.kv.attention.attend import scores, weighted
from rpqfx.kv.attention.slots import Stream, packed
from tests.helpers import randn, seeds
from tests.kv.coders import PlainCoder, coders, decode, draw_codes

# Of the largest element or of 1. float64: sums of a few hundred terms whose rounding is 2**-53 each. float32: 2**-24.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
rows = st.sampled_from([1, 3, 4, 5, 16, 17, 40, 130])  # one table, several, and tiles
lengths = st.sampled_from([0, 1, 7, 8, 33, 150])


def half_turn(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([-right, left], -1)


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == exact.shape and ours.dtype is dtype
    largest = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
    torch.testing.assert_close(ours.double(), exact.double(), rtol=0, atol=TOLERANCE[dtype] * largest)


def widened(coder: PlainCoder) -> PlainCoder:
    """The same coder in float64."""
    basis = None if coder.basis is None else coder.basis.double()
    mean = None if coder.mean is None else coder.mean.double()
    return PlainCoder(
        coder.books.double(),
        coder.slot_books,
        coder.slot_groups,
        coder.head_slots,
        coder.dim,
        basis,
        mean,
        coder.scaled,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(data=st.data())
@settings(max_examples=60)
def test_scores_and_sums_are_those_of_the_vectors(dtype: torch.dtype, data: st.DataObject) -> None:
    coder, seed = data.draw(coders(dtype)), data.draw(seeds)
    batch, n, tokens = data.draw(st.integers(1, 2)), data.draw(rows), data.draw(lengths)
    codes, scale = draw_codes(seed, coder, batch, tokens)
    x = decode(widened(coder), codes, scale)
    q, p = randn(seed, batch, coder.heads, n, coder.dim, dtype=dtype), randn(seed, batch, coder.heads, n, tokens)
    for held in (
        codes,
        Stream(packed(codes, coder.codebook_size), code_bits(coder.codebook_size), coder.codebook_size, tokens),
    ):
        close(scores(q, coder, held, scale), q.double() @ x.transpose(-1, -2), dtype)
        close(weighted(p.to(dtype), coder, held, scale), p.to(dtype).double() @ x, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(data=st.data())
@settings(max_examples=60)
def test_scores_of_keys_turned_after_they_were_coded(dtype: torch.dtype, data: st.DataObject) -> None:
    """Angles of each sample or of all, of all of a key or of its first elements only."""
    coder, seed = data.draw(coders(dtype)), data.draw(seeds)
    batch, n, tokens = data.draw(st.integers(1, 2)), data.draw(rows), data.draw(lengths)
    half = data.draw(st.integers(0, coder.dim // 2))
    codes, scale = draw_codes(seed, coder, batch, tokens)
    angles = randn(seed, *([batch] if data.draw(st.booleans()) else []), tokens, half, dtype=dtype).repeat_interleave(
        2, 0
    )
    angles = angles[: angles.shape[0] // 2]
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    x = decode(widened(coder), codes, scale)
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    wide = (cos.double(), sin.double()) if cos.dim() == 2 else (cos.double()[:, None], sin.double()[:, None])
    keys = torch.cat([rotated * wide[0] + half_turn(rotated) * wide[1], rest], -1)
    q = randn(seed, batch, coder.heads, n, coder.dim, dtype=dtype)
    close(scores(q, coder, codes, scale, (cos, sin)), q.double() @ keys.transpose(-1, -2), dtype)
