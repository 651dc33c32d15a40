"""Random numbers that are a function of a seed and a place: the same on every device and in every version of torch.

This is SplitMix (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014) in 32 bits:
number ``n`` of a stream is ``mix(start + n * gamma)``, and each stream has a start and an odd gamma of its own. The
numbers are exact: they are held in int64, and none is ever negative or larger than that, so nothing depends on what a
processor does with integers that overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor

SEEDS = 2**63
"""Seeds are whole numbers from 0 up to this."""

_MASK = 2**32 - 1
_GOLDEN = 0x9E3779B9  # 2 ** 32 by the golden ratio
_FACTORS = 0x21F0AAAD, 0x735A2D97  # below 2 ** 31, so that products with 32 bits fit; a low-bias hash (C. Wellons)


def mix(number: int) -> int:
    """Returns a number of 32 bits that is another for each number of 32 bits, and looks unrelated to it.

    Args:
        number: 0 to ``2**32 - 1``.
    """
    number ^= number >> 16
    number = number * _FACTORS[0] & _MASK
    number ^= number >> 15
    number = number * _FACTORS[1] & _MASK
    return number ^ number >> 15


def _mix_all(numbers: Tensor) -> Tensor:
    """Does the same to int64 numbers in place; fresh memory for each step would take most of the time."""
    shifted = torch.bitwise_right_shift(numbers, 16)
    for factor in _FACTORS:
        numbers.bitwise_xor_(shifted).mul_(factor).bitwise_and_(_MASK)
        torch.bitwise_right_shift(numbers, 15, out=shifted)
    return numbers.bitwise_xor_(shifted)


def streams(
    seed: int, group: int, first: int, count: int, length: int, device: torch.device | str | None = None
) -> Tensor:
    """Returns the first numbers of some streams.

    Args:
        seed: 0 to ``SEEDS - 1``.
        group: Groups of streams have nothing to do with each other; 0 to ``2**31``.
        first: The first stream of the group.
        count: How many streams.
        length: How many numbers of each, fewer than ``2**31``.
        device: Where they are computed.

    Returns:
        ``[count, length]`` int64 of 0 to ``2**32 - 1``.
    """
    which = torch.arange(first, first + count, device=device)[:, None]
    start, gamma = (_mix_all((which + _key(word, seed, group)).bitwise_and_(_MASK)) for word in (0, 1))
    numbers = torch.addcmul(start, torch.arange(length, device=device), gamma.bitwise_or_(1))
    return _mix_all(numbers.bitwise_and_(_MASK))


def _key(*words: int) -> int:
    """Returns a number of 32 bits that depends on all words, each below ``2**64``."""
    state = 0
    for word in words:
        for part in (word & _MASK, word >> 32):
            state = mix((state + part + _GOLDEN) & _MASK)
    return state
