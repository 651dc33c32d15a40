"""Codes that are drawn rather than learned: every entry serves as many vectors as any other.

They are a function of their seed and shape alone, the same on every platform, so that a file can hold the seed in their
place. Sub-vector ``m`` of a stage gets its codes by sorting the numbers of stream ``m`` of that stage
(``rpqfx.codebook.counter_random``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rpqfx.codebook.counter_random import SEEDS, streams
from rpqfx.codebook.spec import CodebookSpec, code_dtype

VERSION = 1
"""Says which codes belong to a seed. Files name it: who changes what is drawn adds a version, and keeps this one."""

_SIZE = 16  # log2 of how many vectors are sorted at a time; more only where one sub-vector has more
_KEY = 31  # bits of what is sorted: torch sorts int32 of one axis fastest
_DENSE = 8  # bytes of the widest element of a dense tensor


def new_seed(generator: torch.Generator | None = None) -> int:
    """Returns a seed from torch's random numbers, so that ``torch.manual_seed`` decides about codes, too.

    Args:
        generator: Draws it; the CPU's global one if left out, whichever device the codes are for.
    """
    device = "cpu" if generator is None else generator.device
    drawn = torch.randint(SEEDS - 1, (), device=device, generator=generator)
    return int(drawn) if type(drawn) is Tensor else 0  # a fake tensor has no value, nor have codes then


def balanced_codes(shape: Sequence[int], entries: int, seed: int, device: torch.device | str | None = None) -> Tensor:
    """Returns random codes in the narrowest integer, each sub-vector's a shuffled repetition of 0..K-1.

    With ``K = N`` the layer is exactly as free as a dense one.

    Args:
        shape: ``(R, M, N)``.
        entries: ``K``.
        seed: 0 to ``2**63 - 1``. Together with ``VERSION``, shape and entries it says every code.
        device: Where they are computed.

    Returns:
        ``[R, M, N]``. A stage depends neither on how many there are, nor a sub-vector on how many there are.
    """
    device, codes = torch.device(device or torch.get_default_device()), None
    for stage in range(shape[0]):
        for first, some in _parts(shape, entries, seed, stage, device):
            if (1, *some.shape) == tuple(shape):
                return some[None]  # there is nothing to put together
            codes = torch.empty(tuple(shape), device=device, dtype=some.dtype) if codes is None else codes
            codes[stage, first : first + len(some)] = some
    return torch.empty(tuple(shape), device=device, dtype=code_dtype(entries)) if codes is None else codes


def drawn_stages(codes: Tensor, entries: int, seed: int) -> tuple[int, ...]:
    """Returns the stages whose codes are those that ``balanced_codes`` draws, by drawing them again.

    A stage that was learned is known from its first sub-vectors; no more of it is drawn.

    Args:
        codes: ``[R, M, N]``, with values.
        entries: ``K``.
        seed: The seed that they may be of.
    """
    return tuple(
        stage
        for stage, held in enumerate(codes)
        if all(
            torch.equal(_comparable(held[first : first + len(some)]), _comparable(some))
            for first, some in _parts(codes.shape, entries, seed, stage, codes.device)
        )
    )


def may_be_seed(spec: CodebookSpec) -> bool:
    """Returns whether a file may hold drawn codes as a seed: where they are smaller than the dense tensor can be.

    So whoever reads a file makes nothing larger of it than the model that the file is for.

    Args:
        spec: Shape of the codebooks.
    """
    return spec.stages * spec.code_dtype.itemsize <= _DENSE * spec.codebook_dim


def _parts(
    shape: Sequence[int], entries: int, seed: int, stage: int, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Yields the codes of a stage in parts: the first sub-vector of each, and codes ``[m, N]``."""
    _, sub_vectors, vectors = shape
    # Some bits number the sub-vectors of a part, the more the shorter these are; the others are random. Fewer than
    # N / 2 ** 16 pairs of N keys are equal then (N ** 2 / 2 ** 32, where N is larger than that), and stay in order.
    random_bits = min(_KEY, _KEY - _SIZE + (vectors - 1).bit_length())
    count = min(2 ** (_KEY - random_bits), sub_vectors)
    once = torch.arange(entries, device=device).to(code_dtype(entries))
    once = once if vectors % entries == 0 else once.repeat(-(-vectors // entries))[:vectors]
    balanced = once.repeat(count * vectors // max(1, len(once)))
    numbers = torch.arange(count, device=device)[:, None] << random_bits
    for first in range(0, sub_vectors, count):
        size = min(count, sub_vectors - first)
        drawn = streams(seed, stage, first, size, vectors, device).bitwise_right_shift_(32 - random_bits)
        keys = torch.bitwise_or(drawn, numbers[:size], out=torch.empty_like(drawn, dtype=torch.int32)).flatten()
        order = torch.sort(keys, stable=True)[1]  # which takes sub-vectors one after the other
        yield first, balanced[order].view(size, vectors)


def _comparable(codes: Tensor) -> Tensor:
    """Returns the same bits in a dtype that torch compares everywhere."""
    return codes.view(torch.int16) if codes.dtype is torch.uint16 else codes
