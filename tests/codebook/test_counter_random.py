"""Numbers from a seed and a place are those of their definition, whatever computes them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpqfx.codebook.counter_random import SEEDS, mix, streams

WORD = 2**32

every_seed = st.integers(0, SEEDS - 1)
groups = st.integers(0, 2**20)


def by_definition(seed: int, group: int, stream: int, place: int) -> int:
    keys = []
    for word in (0, 1):
        state = 0
        for whole in (word, seed, group):
            for part in (whole % WORD, whole // WORD):
                state = mix((state + part + 0x9E3779B9) % WORD)
        keys.append(mix((state + stream) % WORD))
    start, gamma = keys
    return mix((start + place * (gamma | 1)) % WORD)


@given(every_seed, groups, st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 70))
def test_tensors_are_as_ints_of_any_size_say(seed: int, group: int, first: int, count: int, length: int) -> None:
    found = streams(seed, group, first, count, length)
    assert found.dtype == torch.int64 and found.shape == (count, length)
    wanted = [[by_definition(seed, group, first + row, place) for place in range(length)] for row in range(count)]
    assert found.tolist() == wanted


def test_the_first_numbers_are_these() -> None:
    """Whoever draws others reads files wrongly."""
    assert [mix(number) for number in (0, 1, 2**32 - 1)] == MIXED
    assert streams(0, 0, 0, 2, 3).tolist() == FIRST
    assert streams(2**62 + 12345, 3, 1000, 1, 4).tolist() == OTHERS


MIXED = [0, 2261973619, 2578835075]
FIRST = [[2269089369, 3465415100, 3512219482], [2127163457, 178889227, 3886322977]]
OTHERS = [[899956634, 2441532052, 3101927196, 3364361600]]


@given(st.integers(0, 2**32 - 1))
def test_mixing_can_be_undone(number: int) -> None:
    def unshifted(value: int, bits: int) -> int:
        found = value
        for _ in range(32 // bits + 1):
            found = value ^ found >> bits
        return found

    back = unshifted(mix(number), 15)
    back = unshifted(back * pow(0x735A2D97, -1, WORD) % WORD, 15)
    assert unshifted(back * pow(0x21F0AAAD, -1, WORD) % WORD, 16) == number


def test_no_product_leaves_the_range_of_int64() -> None:
    """Which nobody defines: the largest factors, places and sums."""
    assert (WORD - 1) * max(0x21F0AAAD, 0x735A2D97) < 2**63
    assert (2**31 - 1) * (WORD - 1) + WORD - 1 < 2**63


@pytest.mark.parametrize("length", [1 << 16])
def test_numbers_look_random(length: int) -> None:
    """Each bit is set half the time, in no relation to the next number's, another stream's, or another seed's."""
    one = streams(5, 0, 0, 3, length)
    for other in (one[0].roll(1), one[1], one[2], streams(6, 0, 0, 1, length)[0], streams(5, 1, 0, 1, length)[0]):
        bits = torch.arange(32)
        first = (one[0][:, None] >> bits) & 1
        second = (other[:, None] >> bits) & 1
        assert float((first.float().mean(0) - 0.5).abs().max()) < 5 * 0.5 / length**0.5
        # 32 x 32 pairs of bits, each of which agrees within 5 standard deviations of half the time
        agree = (2.0 * first - 1).T @ (2.0 * second - 1) / length
        assert float(agree.abs().max()) < 5 / length**0.5


@pytest.mark.gpu
def test_a_gpu_computes_the_same() -> None:
    assert torch.equal(streams(7, 2, 5, 9, 1000, "cuda").cpu(), streams(7, 2, 5, 9, 1000))
