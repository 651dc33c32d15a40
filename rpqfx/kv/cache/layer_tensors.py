"""The tensors of one layer's cache: their rows, their bytes, and their state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rpqfx.errors import FormatError
from rpqfx.kv.cache.codes import Side
from rpqfx.kv.cache.positions import Positions
from rpqfx.kv.cache.shared_rotary import LayerPositions
from rpqfx.kv.coder.protocol import Coder


class LayerTensors:
    """Keys and values of one layer: codes, and the tokens that are kept as they are.

    Args:
        keys: The coder of keys.
        values: The coder of values.
        sinks: First tokens, which are kept as they are.
        recent: Room for the newest tokens, as they are.
        positions: What the rotary embeddings are kept in where layers share it, or None.
        name: Of the layer, for errors.
    """

    def __init__(
        self, keys: Coder, values: Coder, sinks: int, recent: int, positions: Positions | LayerPositions | None,
        name: str,
    ) -> None:  # fmt: skip
        self.name, self.sinks, self.recent = name, sinks, recent
        self.keys, self.values = Side(keys, f"{name}, keys"), Side(values, f"{name}, values")
        self._own = Positions() if positions is None else None
        self.positions: Positions | LayerPositions = positions or self._own  # type: ignore[assignment]
        self.total = 0
        self._left: tuple[Tensor, ...] = ()  # keys and values that the last append sent into codes, as they were
        self._plain: list[Tensor] = []  # keys and values [B, H, sinks + recent, D]: sinks, then the newest
        self._rotated: bool | None = None  # whether keys come with a rotary embedding

    @property
    def encoded(self) -> int:
        """Tokens in codes."""
        return self.keys.length

    @property
    def batch(self) -> int:
        """Rows; 0 of an empty store."""
        return self._plain[0].shape[0] if self._plain else 0

    @property
    def rotated(self) -> bool:
        """Whether keys came with a rotary embedding, before which they are coded."""
        return bool(self._rotated)

    @property
    def _filled(self) -> int:
        return self.total - self.encoded

    def nbytes(self) -> dict[str, int]:
        """Counts bytes of tokens: ``codes``, ``scales``, ``window`` (with the sinks), ``positions`` (of its own)."""
        sides = [side.nbytes() for side in (self.keys, self.values)]
        as_they_are = (*(plain[:, :, : self._filled] for plain in self._plain), *self._left)
        window = sum(x.numel() * x.element_size() for x in as_they_are)
        own = 0 if self._own is None else self._own.nbytes()
        codes, scales = (sum(side[i] for side in sides) for i in range(2))
        return {"codes": codes, "scales": scales, "window": window, "positions": own}

    def allocated(self) -> int:
        """Returns the bytes of all tensors, with the room for tokens to come, but for positions that are shared."""
        plain = sum(x.numel() * x.element_size() for x in (*self._plain, *self._left))
        own = 0 if self._own is None else self._own.nbytes()
        return self.keys.allocated() + self.values.allocated() + plain + own

    def reset(self) -> None:
        """Drops all tokens."""
        self.total, self._plain, self._rotated, self._left = 0, [], None, ()
        for side in (self.keys, self.values):
            side.reset()
        if self._own is not None:
            self._own.reset()

    def reorder(self, beams: Tensor) -> None:
        """Reorders rows of the batch, some more than once: ``beams`` ``[B]``, an integer, on any device."""
        self.select(beams)

    def select(self, indices: Tensor) -> None:
        """Keeps some rows of the batch: ``indices`` ``[B']``, an integer, on any device."""
        self._map_rows(lambda x: x.index_select(0, indices.to(x.device)))

    def repeat(self, times: int) -> None:
        """Repeats each row of the batch, the copies beside each other."""
        self._map_rows(lambda x: x.repeat_interleave(times, 0))

    def state(self) -> dict[str, Tensor]:
        """Returns all that ``restore`` needs but the coders, as tensors of their own."""
        state = {"tokens": torch.tensor([self.total, self.encoded, int(bool(self._rotated)), self.sinks])}
        for name, plain in zip(("k", "v"), self._plain, strict=False):
            state[f"window.{name}"] = plain[:, :, : self._filled].clone()
        parts = {"keys": self.keys.state(), "values": self.values.state()}
        parts["positions"] = {} if self._own is None else self._own.state()
        return {**state, **{f"{name}.{key}": x for name, part in parts.items() for key, x in part.items()}}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes on the result of ``state``.

        Raises:
            FormatError: If it is not complete, or of other codebooks; the store is empty then.
        """
        self.reset()
        try:
            self._restore(state)
        except KeyError as missing:
            self.reset()
            raise FormatError(f"{self.name}: the state has no {missing}") from None
        except FormatError:
            self.reset()
            raise

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self._plain = [change(plain) for plain in self._plain]
        self._left = tuple(change(left) for left in self._left)
        for side in (self.keys, self.values):
            side.map_rows(change)
        if self._own is not None:
            self._own.map_rows(change)

    def _restore(self, state: dict[str, Tensor]) -> None:
        total, encoded, rotated, sinks = state["tokens"].tolist()
        if sinks != self.sinks:
            raise FormatError(f"{self.name}: the cache was saved with {sinks} sinks, this one has {self.sinks}")
        parts: dict[str, dict[str, Tensor]] = {"keys": {}, "values": {}, "positions": {}, "window": {}}
        for key, x in state.items():
            name, _, rest = key.partition(".")
            parts.setdefault(name, {})[rest] = x
        plain = [parts["window"][name] for name in ("k", "v")] if total else []
        for x, side in zip(plain, (self.keys, self.values), strict=False):
            if x.dim() != 4 or x.shape[1:] != (side.coder.heads, total - encoded, side.coder.dim):
                raise FormatError(f"{side.name}: the window saved is {tuple(x.shape)}")
        batch = plain[0].shape[0] if plain else 0
        room = max(self.sinks + self.recent, total - encoded)
        self._plain = [torch.cat([x, x.new_empty(*x.shape[:2], room - x.shape[2], x.shape[3])], 2) for x in plain]
        for name, side in (("keys", self.keys), ("values", self.values)):
            side.restore(parts[name], encoded, batch)
        if self._own is not None:
            self._own.restore(parts["positions"], self.name)
            if rotated and self._own.length != total:
                raise FormatError(f"{self.name}: the positions saved are not of {total} tokens")
        self.total, self._rotated = total, bool(rotated) if total else None
