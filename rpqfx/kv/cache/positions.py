"""The rotary embedding of a cache's tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rpqfx.errors import FormatError, InputError


class Positions:
    """Cosines and sines of tokens, of which the halves that transformers repeats are kept once.

    Rows of a batch that agree share theirs. Layers put the same tokens one after the other, which changes nothing.

    Args:
        dtype: What they are kept in; None for the dtype they come in.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.length = 0
        self._tensors: list[Tensor] = []  # cos and sin, [1 or B, capacity, R / 2]

    def put(self, start: int, cos: Tensor, sin: Tensor, name: str) -> None:
        """Keeps tokens from a place on.

        Args:
            start: Of the first of them, at most ``length``.
            cos: ``[T, R]`` or ``[B or 1, T, R]``, whose second half repeats the first.
            sin: The same.
            name: Of the layer, for errors.

        Raises:
            InputError: If the halves differ, the width or the batch is another than before, or tokens before them are
                missing.
        """
        new = []
        for part in (cos, sin):
            part = part if part.dim() == 3 else part[None]
            left, right = part.chunk(2, -1) if part.shape[-1] % 2 == 0 else (part, part[..., :0])
            if left.shape != right.shape or not torch.equal(left, right):
                raise InputError(f"{name}: the halves of cos and sin are expected to be the same")
            new.append(_agreed(left))
        batch = max(part.shape[0] for part in new)
        if start > self.length:
            raise InputError(f"{name}: positions of {self.length} tokens are there, the next put are from {start} on")
        stop = start + new[0].shape[1]
        self._make_room(batch, stop, new[0])
        for kept, part in zip(self._tensors, new, strict=True):
            if kept.shape[2] != part.shape[2] or part.shape[0] not in (1, kept.shape[0]):
                raise InputError(f"{name}: cos is {tuple(part.shape)}, tokens before have {tuple(kept.shape)}")
            kept[:, start:stop] = part
        self.length = max(self.length, stop)

    def get(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Returns ``cos, sin``, each ``[1 or B, stop - start, R / 2]``."""
        cos, sin = (part[:, start:stop] for part in self._tensors)
        return cos, sin

    def holds(self, start: int, cos: Tensor, sin: Tensor) -> bool:
        """Returns whether these are kept already from a place on, as ``put`` would keep them."""
        for kept, part in zip(self._tensors, (cos, sin), strict=False):
            part = part if part.dim() == 3 else part[None]
            part = _agreed(part[..., : part.shape[-1] // 2]).to(kept.dtype)
            mine = kept[:, start : min(start + part.shape[1], self.length)]
            if part.shape[0] not in (1, mine.shape[0]) or part.shape[1:] != mine.shape[1:]:
                return False
            if not torch.equal(mine, part.expand_as(mine)):
                return False
        return bool(self._tensors)

    def agrees(self, other: Positions, length: int) -> bool:
        """Returns whether another one keeps the same of the first so many tokens."""
        pairs = zip(self._tensors, other._tensors, strict=True)
        return all(torch.equal(own[:, :length], part[:, :length]) for own, part in pairs)

    def copied(self, length: int) -> Positions:
        """Returns one of its own with the first so many tokens."""
        twin = Positions(self.dtype)
        twin._tensors, twin.length = [part[:, :length].clone() for part in self._tensors], length
        return twin

    def nbytes(self) -> int:
        """Returns the bytes of what is kept."""
        return sum(part[:, : self.length].numel() * part.element_size() for part in self._tensors)

    def crop(self, length: int) -> None:
        """Drops tokens past a length."""
        self.length = min(self.length, length)

    def reset(self) -> None:
        """Drops all tokens."""
        self.length, self._tensors = 0, []

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Puts rows of the batch into another order, or repeats or drops some; rows that agree still do."""
        self._tensors = [part if part.shape[0] == 1 else change(part) for part in self._tensors]

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors that ``restore`` takes."""
        return {name: part[:, : self.length].clone() for name, part in zip(("cos", "sin"), self._tensors, strict=False)}

    def restore(self, state: dict[str, Tensor], name: str) -> None:
        """Takes on the result of ``state``.

        Args:
            state: Cosines and sines, or nothing.
            name: Of the layer, for errors.

        Raises:
            FormatError: If it is something else.
        """
        tensors = [state[part].clone() for part in ("cos", "sin") if part in state]
        if len(tensors) == 1 or any(part.dim() != 3 or part.shape != tensors[0].shape for part in tensors):
            raise FormatError(f"{name}: positions are saved as cos and sin of one shape, [1 or B, T, R / 2]")
        self._tensors, self.length = tensors, tensors[0].shape[1] if tensors else 0

    def _make_room(self, batch: int, length: int, like: Tensor) -> None:
        if not self._tensors:
            self._tensors = [like.new_empty(batch, 0, like.shape[2], dtype=self.dtype or like.dtype) for _ in range(2)]
        for i, part in enumerate(self._tensors):
            if part.shape[0] == 1 < batch:
                part = part.expand(batch, -1, -1).contiguous()
            if part.shape[1] < length:
                more = part.new_empty(part.shape[0], grown(length), part.shape[2])
                more[:, : part.shape[1]] = part
                part = more
            self._tensors[i] = part


def _agreed(part: Tensor) -> Tensor:
    """Returns ``[1, ...]`` where all rows of the batch are the same."""
    return part[:1] if bool((part == part[:1]).all()) else part


def grown(length: int) -> int:
    """Room for tokens and for an eighth more, so that growing costs little and little lies idle."""
    return (length + length // 8 + 7) // 8 * 8
