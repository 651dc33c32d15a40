"""Feeds batches, one after the other, for a number of steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rpqfx.errors import InputError
from rpqfx.validation.values import shown

Data = Iterable[Any] | Callable[[int], Any]


def feed(data: Data, seed: int, start: int = 0) -> Iterator[Any]:
    """Yields batches without end, or until an iterator is used up.

    Args:
        data: A sequence, which is gone through in a new order each time; another iterable, which is gone through in its
            own order each time; an iterator, once; or a callable that is given 0, 1, 2, ...
        seed: Seeds the order.
        start: Batches to leave out at the beginning. Of an iterable they are taken and dropped, of the others they
            are not asked for.

    Returns:
        Batches.

    Raises:
        InputError: If ``data`` is none of these, or one batch, or empty; the first batch is taken to see that.
    """
    if isinstance(data, (Tensor, Mapping, str)):
        raise InputError(f"data is a sequence of batches, got one {type(data).__name__}; put it in a list")
    if not callable(data) and not isinstance(data, Iterable):
        raise InputError(f"data is a sequence of batches or a callable from a number to one, got {shown(data)}")
    batches = _feed(data, seed, start)
    if start:
        return batches
    first = next(batches, _NOTHING)
    if first is _NOTHING:
        spent = isinstance(data, Iterable) and iter(data) is data
        why = "; an iterator that was gone through before holds nothing any more, a list does" if spent else ""
        raise InputError(f"there is no data: it holds no batch{why}")
    return itertools.chain([first], batches)


_NOTHING = object()


def _feed(data: Any, seed: int, start: int) -> Iterator[Any]:
    if isinstance(data, Sequence):
        return _shuffled(data, seed, start)
    if is_replayed(data):
        return itertools.islice(_repeated(data), start, None)
    numbered: Any = data
    return map(numbered, itertools.count(start))


def is_replayed(data: Data) -> bool:
    """Returns whether data has to be gone through from its beginning to come to a later batch."""
    return isinstance(data, Iterable) and not isinstance(data, Sequence)


def _repeated(data: Any) -> Iterator[Any]:
    got = True
    while got:
        got = False
        for batch in data:
            got = True
            yield batch
        if iter(data) is data:
            return


def _shuffled(data: Sequence[Any], seed: int, start: int) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(seed)
    while len(data):
        order = torch.randperm(len(data), generator=generator).tolist()
        for number in order[start:]:
            yield data[number]
        start = max(0, start - len(data))
