"""Which channels make a group, and where the codes of each group lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpqfx.errors import CodeError, InputError, SpecError
from rpqfx.kv.quantizer.groups import Groups, Run
from tests.helpers import randn, seeds


@given(seeds, st.integers(1, 5), st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_groups_are_runs_or_strides_of_channels(seed: int, groups: int, d: int, strided: bool, tokens: int) -> None:
    slots = Groups.make(groups * d, d, 1, 4, True, strided)
    x = randn(seed, tokens, groups * d)
    parts = slots.split(x)
    assert parts.shape == (tokens, groups, d)
    for m in range(groups):
        own = [c for c in range(groups * d) if (c % groups if strided else c // d) == m]
        assert torch.equal(parts[:, m], x[:, own])
    assert torch.equal(slots.join(parts), x)


def test_slots_are_group_major() -> None:
    slots = Groups.make(8, 2, [2, 0, 1, 2], 4, False, False)
    assert slots.slot_groups == (0, 0, 2, 3, 3) and slots.slot_stages == (0, 1, 0, 0, 1)
    assert slots.count == 5 and slots.codebooks_shape == (2, 4, 4, 2)
    assert slots.runs == (Run((2,), 1), Run((0, 3), 2))
    assert [slots.groups_with(stage) for stage in range(3)] == [3, 2, 0]
    codes = torch.arange(5)[None]
    assert slots.codes_of(codes, slots.runs[1]).tolist() == [[[0, 1], [3, 4]]]
    assert slots.codes_of(codes, slots.runs[0]).tolist() == [[[2]]]
    assert Groups.make(8, 2, 3, 4, True, False).codebooks_shape == (3, 1, 4, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_dim": 12}, "codebook_dim 12 does not divide dim 64; the nearest that do: 8 or 16"),
        ({"codebook_dim": 100}, "does not divide dim 64; the nearest that do: 64$"),
        ({"codebook_dim": 0}, "at least 1"),
        ({"dim": 0}, "at least 1"),
        ({"stages": [1, 2]}, "one for each of the 8 groups .* got 2 numbers"),
        ({"stages": -1}, "0 stages or more, got -1"),
        ({"codebook_size": 1}, "2 to 65536 entries"),
        ({"codebook_size": 65_537}, "2 to 65536 entries"),
    ],
)
def test_numbers_that_cannot_be_are_refused(changes: dict[str, int], message: str) -> None:
    given = {"dim": 64, "codebook_dim": 8, "stages": 2, "codebook_size": 256, "shared": True, "strided": False}
    with pytest.raises(SpecError, match=message):
        Groups.make(**{**given, **changes})  # type: ignore[arg-type]


def test_codes_that_cannot_be_are_refused() -> None:
    slots = Groups.make(4, 2, 1, 5, True, False)
    slots.check_codes(torch.tensor([[0, 4]]))
    slots.check_codes(torch.tensor([0, 4]).to(torch.uint16))
    slots.check_codes(torch.empty(0, 2, dtype=torch.uint8))
    for codes, kind, message in [
        (torch.zeros(2), InputError, "codes are integers, got torch.float32"),
        (torch.zeros(2, dtype=torch.bool), InputError, "codes are integers"),
        (torch.zeros(3, dtype=torch.uint8), InputError, "expected 2 on the last axis"),
        (torch.tensor([0, 5]), CodeError, "codes are 0 to 4, these are 0 to 5"),
        (torch.tensor([-1, 2]), CodeError, "these are -1 to 2"),
    ]:
        with pytest.raises(kind, match=message):
            slots.check_codes(codes)
