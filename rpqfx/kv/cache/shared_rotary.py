"""The rotary embeddings of a cache's layers, which may be several."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from rpqfx.errors import FormatError, InputError
from rpqfx.kv.cache.positions import Positions


class SharedPositions:
    """The rotary embeddings of a cache's layers: one for each that differs, kept once for all layers that share it.

    Args:
        dtype: As of ``Positions``.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self._kept: list[Positions] = []
        self._of: dict[str, Positions] = {}

    def of(self, name: str) -> LayerPositions:
        """Returns what the layer of a name keeps its positions in."""
        return LayerPositions(self, name)

    def put(self, start: int, cos: Tensor, sin: Tensor, name: str) -> None:
        """Keeps tokens of a layer; see ``Positions.put``.

        A layer whose angles are others than those of the layers that it shared with so far gets its own from there on.
        """
        own = self._of.get(name)
        if own is not None and own.length <= start:
            own.put(start, cos, sin, name)
            return
        if own is None or not own.holds(start, cos, sin):
            before = None if own is None else own
            for other in self._kept:
                if (
                    other is not own
                    and other.holds(start, cos, sin)
                    and (before is None or before.agrees(other, start))
                ):
                    self._of[name] = other
                    return
            if start and before is None:
                raise InputError(f"{name}: positions of the {start} tokens before are missing")
            self._of[name] = own = Positions(self.dtype) if before is None else before.copied(start)
            self._kept.append(own)
            own.put(start, cos, sin, name)

    def get(self, start: int, stop: int, name: str) -> tuple[Tensor, Tensor]:
        """Returns ``cos, sin`` of a layer's tokens, each ``[1 or B, stop - start, R / 2]``."""
        return self._of[name].get(start, stop)

    def nbytes(self) -> int:
        """Returns the bytes of what is kept."""
        return sum(kept.nbytes() for kept in self._kept)

    def crop(self, length: int) -> None:
        """Drops tokens past a length."""
        for kept in self._kept:
            kept.crop(length)

    def reset(self) -> None:
        """Drops all tokens."""
        self._kept, self._of = [], {}

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Puts rows of the batch into another order, or repeats or drops some; rows that agree still do."""
        for kept in self._kept:
            kept.map_rows(change)

    def state(self) -> dict[str, Tensor]:
        """Returns tensors for ``restore``: ``cos`` and ``sin`` of the first embedding, and of others by layer."""
        found: dict[str, Tensor] = {}
        for number, kept in enumerate(self._kept):
            end = f".{number}" if number else ""
            found |= {f"{part}{end}": x for part, x in kept.state().items()}
        if len(self._kept) > 1:
            places = {id(kept): number for number, kept in enumerate(self._kept)}
            found |= {f"of.{name}": torch.tensor(places[id(kept)]) for name, kept in self._of.items()}
        return found

    def restore(self, state: dict[str, Tensor], names: Iterable[str]) -> None:
        """Takes on the result of ``state``.

        Args:
            state: Cosines and sines.
            names: Of the layers that have an embedding, for a state of one.

        Raises:
            FormatError: If it is something else.
        """
        self.reset()
        numbers = {0, *(int(key.rpartition(".")[2]) for key in state if key.startswith("cos."))} if state else set()
        for number in sorted(numbers):
            end = f".{number}" if number else ""
            kept = Positions(self.dtype)
            kept.restore({part: state[part + end] for part in ("cos", "sin") if part + end in state}, "the cache")
            self._kept.append(kept)
        of = {key[3:]: int(x) for key, x in state.items() if key.startswith("of.")}
        if any(not 0 <= number < len(self._kept) for number in of.values()):
            raise FormatError("the cache: layers are saved with positions that are not there")
        if len(self._kept) == 1:
            of = dict.fromkeys(names, 0)
        self._of = {name: self._kept[number] for name, number in of.items()}


class LayerPositions:
    """One layer's part of ``SharedPositions``, as ``Positions`` is used.

    Args:
        shared: Of all layers.
        name: Of the layer.
    """

    def __init__(self, shared: SharedPositions, name: str) -> None:
        self._shared, self._name = shared, name

    def put(self, start: int, cos: Tensor, sin: Tensor, name: str) -> None:
        """Keeps tokens; see ``Positions.put``."""
        self._shared.put(start, cos, sin, self._name)

    def get(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Returns ``cos, sin``, each ``[1 or B, stop - start, R / 2]``."""
        return self._shared.get(start, stop, self._name)
