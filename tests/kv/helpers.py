"""What the tests of quantisers share: drawn constructor arguments, and plain loops over tokens."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.kv.quantizer.quantizer import VectorQuantizer
from tests.helpers import generator


@st.composite
def arguments(draw: st.DrawFn, **fixed: Any) -> dict[str, Any]:
    """Any small quantiser."""
    groups, d = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    repeat = draw(st.sampled_from([1, 1, 2]))
    number = st.integers(0, 3 // repeat).map(lambda i: i * repeat)
    uneven = st.lists(number, min_size=groups, max_size=groups)
    drawn = {
        "dim": groups * d,
        "codebook_dim": d,
        "codebook_size": draw(st.integers(2, 9)),
        "stages": draw(st.one_of(st.integers(1, 3 // repeat).map(lambda i: i * repeat), uneven)),
        "shared_stages": repeat,
        "shared": draw(st.booleans()),
        "strided": draw(st.booleans()),
        "normalize": draw(st.booleans()),
        "use_cosine_sim": draw(st.booleans()),
        "beam": 1 if repeat > 1 else draw(st.integers(1, 3)),  # the order of codes of one codebook is anyone's
    }
    return {**drawn, **fixed}


def made(draw: int, dim: int, dtype: torch.dtype = torch.float64, **given: Any) -> VectorQuantizer:
    """A quantiser with drawn entries, of variance 1 at every stage, and averages that go with them."""
    quantizer = VectorQuantizer(dim, dtype=dtype, **given)
    with torch.no_grad():
        drawn = torch.randn(quantizer.codebooks.shape, generator=generator(draw), dtype=torch.float64)
        quantizer.codebooks.copy_(drawn)
        quantizer._average_from(None)
    return quantizer


def channels(quantizer: VectorQuantizer, group: int) -> list[int]:
    """The channels of a group, by the definition."""
    d, groups = quantizer.layout.codebook_dim, quantizer.layout.groups
    if quantizer.layout.strided:
        return [c for c in range(quantizer.dim) if c % groups == group]
    return list(range(group * d, group * d + d))


def book(quantizer: VectorQuantizer, stage: int, group: int) -> Tensor:
    return quantizer.codebooks[stage // quantizer.shared_stages, 0 if quantizer.layout.shared else group].detach()


def naive_decode(quantizer: VectorQuantizer, codes: Tensor, scale: Tensor | None = None) -> Tensor:
    """What one vector's codes stand for."""
    total = torch.zeros(quantizer.dim, dtype=quantizer.codebooks.dtype)
    for code, group, stage in zip(codes.tolist(), *quantizer.slots, strict=True):
        total[channels(quantizer, group)] += book(quantizer, stage, group)[code]
    return total if scale is None else total * scale


def naive_rests(quantizer: VectorQuantizer, x: Tensor, codes: Tensor) -> list[Tensor]:
    """What each slot's stage is left with of one vector, already divided by its scale."""
    rests, left = [], {}
    for code, group, stage in zip(codes.tolist(), *quantizer.slots, strict=True):
        left.setdefault(group, x[channels(quantizer, group)])
        rests.append(left[group])
        left[group] = left[group] - book(quantizer, stage, group)[code]
    return rests
