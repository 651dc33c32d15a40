"""Claims on the rotary embedding."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rpqfx.kv.attention.rotary import Rotary, apply_rotary, undo_rotary
from tests.kv.kv_models import angles


@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([(8, 8), (8, 4), (6, 2)]), st.floats(0.5, 2))
def test_rotating_back_undoes_rotating(seed: int, length: int, dims: tuple[int, int], stretch: float) -> None:
    x = torch.randn(2, 3, length, dims[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rotary = Rotary(*(stretch * angle.double() for angle in angles(length, dims[1])))
    torch.testing.assert_close(undo_rotary(apply_rotary(x, rotary), rotary), x)
    torch.testing.assert_close(apply_rotary(x, rotary)[..., dims[1] :], x[..., dims[1] :])


@given(st.integers(0, 2**31), st.integers(0, 50), st.integers(0, 50))
def test_scores_depend_on_distances_alone(seed: int, first: int, shift: int) -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def score(a: int, b: int) -> torch.Tensor:
        rotated = [apply_rotary(x, Rotary(*(y.double() for y in angles(1, 8, at)))) for x, at in ((q, a), (k, b))]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(first, 3), score(first + shift, 3 + shift), rtol=1e-4, atol=1e-5)
