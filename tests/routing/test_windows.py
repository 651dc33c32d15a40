"""Local attention is attention under a mask, without the mask's matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.errors import SpecError
from rpqfx.routing import LocalAttention, local_attention, windows
from tests.helpers import generator, randn, seeds


def naive(q: Tensor, k: Tensor, v: Tensor, block: int, causal: bool, mask: Tensor) -> Tensor:
    line = torch.arange(q.shape[1])
    apart = line // block - line[:, None] // block
    seen = (apart >= -1) & (line <= line[:, None] if causal else apart <= 1)
    q, k, v = (rearrange(x, "b n h e -> b h n e") for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, seen & mask[:, None, None])
    return rearrange(out, "b h n e -> b n h e")


@given(seeds, st.integers(1, 50), st.integers(1, 12), st.booleans(), st.booleans(), st.sampled_from([1, 10, 4096]))
def test_it_is_attention_to_the_blocks_beside(
    seed: int, n: int, block: int, causal: bool, masked: bool, segment: int
) -> None:
    """Outputs of tokens that are not masked, and all gradients; however many blocks a call takes."""
    mask = torch.rand(2, n, generator=generator(seed)) < (0.6 if masked else 2)
    tensors = [randn(seed + i, 2, n, 2, 3).requires_grad_() for i in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "SEGMENT", segment)
        ours = local_attention(torch.stack(tensors, 2), block, causal=causal, mask=mask if masked else None)[mask]
    wanted = naive(*tensors, block, causal, mask)[mask]
    torch.testing.assert_close(ours, wanted)
    seen = randn(seed + 4, *ours.shape)
    for mine, other in zip(*(torch.autograd.grad((x * seen).sum(), tensors) for x in (ours, wanted)), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("causal", [False, True])
def test_what_sees_nothing_is_finite(causal: bool) -> None:
    layer, x = LocalAttention(8, dim_head=4, heads=2, window_size=4, causal=causal), torch.randn(2, 20, 8)
    out = layer(x, torch.zeros(2, 20, dtype=torch.bool))
    out.sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


def test_nothing_of_shape_n_by_n_is_made() -> None:
    """32 times the tokens keep 32 times the bytes for the backward pass, not 1024 times."""

    def kept(n: int) -> int:
        sizes: list[int] = []
        layer, x = LocalAttention(8, dim_head=4, heads=2, window_size=8), torch.randn(1, n, 8)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            layer(x, torch.ones(1, n, dtype=torch.bool))
        return sum(sizes)

    assert kept(4096) < 33 * kept(128)


@pytest.mark.parametrize("size", [0, 7])
def test_an_odd_window_is_refused(size: int) -> None:
    with pytest.raises(SpecError, match=f"must be even; got {size}"):
        LocalAttention(8, window_size=size)
