"""The cache of one attention layer: codes of most tokens, the first and the recent ones as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rpqfx.errors import FormatError, InputError
from rpqfx.kv.attention import attend
from rpqfx.kv.attention.attend import Rope
from rpqfx.kv.attention.joint_softmax import Parts, attention
from rpqfx.kv.attention.rotary import turned_back
from rpqfx.kv.attention.score_options import Changes
from rpqfx.kv.attention.slots import UNIT
from rpqfx.kv.cache.codes import Side, fingerprint
from rpqfx.kv.cache.positions import Positions
from rpqfx.kv.cache.shared_rotary import LayerPositions
from rpqfx.kv.cache.token_checks import check_queries, check_tokens, full_mask
from rpqfx.kv.coder.protocol import Coder

# Tokens of an append up to which those that it sends into codes are kept as they are until the next one: a draft of
# assisted decoding is taken back as though it had never come.
DRAFT = 64


class Arrival(NamedTuple):
    """What an append took in, for its own queries: each finds the last ``window`` tokens before it as they are.

    Args:
        start: Tokens that were there before.
        encoded: Of those, in codes.
        left: Keys ``[B, H, m, D]`` and values of the tokens that went from the window, or past it, into codes since.
    """

    start: int
    encoded: int
    left: tuple[Tensor, ...]


class LayerStore:
    """Keys and values of one layer, most of them in codes.

    Tokens leave the window for codes in whole chunks: of ``total`` tokens, those after the sinks that are in codes are
    ``max(0, (total - sinks - window) // chunk * chunk)``, however they were appended.

    Args:
        keys: The coder of keys; they are coded before their rotary embedding if ``append`` is given one.
        values: The coder of values.
        sinks: First tokens, which are kept as they are.
        window: Recent tokens that are kept as they are, at least so many.
        chunk: Tokens that are encoded together, a multiple of 8.
        dtype: Of what is kept as it is; None for the dtype it comes in.
        positions: What the rotary embeddings are kept in where layers share it. Whoever shares it resets, crops,
            reorders and saves it; without one the store has its own, and does.
        name: Of the layer, for errors.

    Raises:
        InputError: If the numbers, or the coders, do not go together.
    """

    def __init__(
        self, keys: Coder, values: Coder, *, sinks: int = 4, window: int = 128, chunk: int = 32,
        dtype: torch.dtype | None = None, positions: Positions | LayerPositions | None = None, name: str = "cache",
    ) -> None:  # fmt: skip
        if sinks < 0 or window < 0 or chunk < UNIT or chunk % UNIT:
            raise InputError(
                f"{name}: sinks and window are at least 0 and a chunk is a multiple of {UNIT}, got {sinks}, {window} "
                f"and {chunk}"
            )
        if keys.heads != values.heads:
            raise InputError(f"{name}: the coders are of {keys.heads} heads of keys and {values.heads} of values")
        self.name, self.sinks, self.window, self.chunk, self.dtype = name, sinks, window, chunk, dtype
        self.keys, self.values = Side(keys, f"{name}, keys"), Side(values, f"{name}, values")
        self._own = Positions() if positions is None else None
        self.positions: Positions | LayerPositions = positions or self._own  # type: ignore[assignment]
        self.total = 0
        self.taken = 0  # tokens that ever came
        self._left: tuple[Tensor, ...] = ()  # keys and values that the last append sent into codes, as they were
        self._plain: list[Tensor] = []  # keys and values [B, H, sinks + window + chunk, D]: sinks, then the window
        self._turned: bool | None = None  # whether keys come with a rotary embedding

    @property
    def encoded(self) -> int:
        """Tokens in codes."""
        return self.keys.length

    @property
    def batch(self) -> int:
        """Rows; 0 of an empty store."""
        return self._plain[0].shape[0] if self._plain else 0

    @property
    def turned(self) -> bool:
        """Whether keys came with a rotary embedding, before which they are coded."""
        return bool(self._turned)

    @property
    def _filled(self) -> int:
        return self.total - self.encoded

    def adopt(self, keys: Coder, values: Coder) -> None:
        """Goes on with the coders of a copy of the model.

        Args:
            keys: Of the attention that is about to append.
            values: The same.

        Raises:
            InputError: If they give codes another meaning.
        """
        for side, coder in ((self.keys, keys), (self.values, values)):
            if side.coder is not coder and not torch.equal(fingerprint(side.coder), fingerprint(coder)):
                raise InputError(
                    f"{side.name}: the cache was made for a model with other codebooks; make one for this model with "
                    "CodebookCache.for_model"
                )
            side.coder = coder

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor, rope: Rope | None = None) -> Arrival:
        """Takes the next tokens.

        Args:
            k: ``[B, H, T, D]``, floating; after the rotary embedding if there is one.
            v: ``[B, H, T, D_v]``.
            rope: ``cos`` and ``sin`` of these tokens, ``[T, R]`` or ``[B, T, R]``, for keys that are coded before them.

        Returns:
            What these tokens' queries need, if each is to find its own window: ``attend`` takes it.

        Raises:
            InputError: If shapes, or rotary embeddings, are others than before, or if something is not finite.
        """
        check_tokens(self.keys, self.values, self.name, k, v, rope, self.batch, self._turned)
        before = self.total, self.encoded
        left: tuple[Tensor, ...] = ()
        if rope is not None:
            self.positions.put(self.total, *rope, self.name)
        if not self._plain:
            room = self.sinks + self.window + self.chunk
            self._plain = [x.new_empty(*x.shape[:2], room, x.shape[3], dtype=self.dtype or x.dtype) for x in (k, v)]
        self._turned = rope is not None
        total = self.total + k.shape[2]
        due = self._due(total) - self.encoded
        if not due:
            for plain, new in zip(self._plain, (k, v), strict=True):
                plain[:, :, self._filled : self._filled + k.shape[2]] = new
        else:
            left = self._encode(due, k, v)
        self.total, self.taken = total, self.taken + k.shape[2]
        self._left = tuple(x.clone() for x in left) if k.shape[2] <= DRAFT else ()
        return Arrival(*before, left)

    @torch.no_grad()
    def attend(
        self,
        q: Tensor,
        scale: float | None = None,
        mask: Tensor | None = None,
        arrival: Arrival | None = None,
        changes: Changes | None = None,
    ) -> Tensor:
        """Attention of the newest tokens to all: each sees those before it, and itself.

        Args:
            q: ``[B, H_q, n, D]``, floating, of the ``n`` newest tokens; ``H_q`` is a multiple of ``H``.
            scale: Of the scores; None for ``1 / sqrt(D)``.
            mask: Broadcastable to ``[B, H_q, n, total]``, over all tokens in order: True where one may be seen, or
                added to the scores.
            arrival: What ``append`` gave for these tokens, the last that were appended: each query then sees as they
                are those that were so when it came, as though tokens came one by one. Left out, all see what is held
                now.
            changes: Of the scores.

        Returns:
            ``[B, H_q, n, D_v]`` of the queries' dtype; zeros for a query that sees nothing.

        Raises:
            InputError: If the cache is empty, or the queries or the mask do not go with it.
        """
        check_queries(q, self.keys.coder, self.name, self.batch, self.total)
        mask = None if mask is None else full_mask(mask, (*q.shape[:3], self.total), self.name)
        dtype = torch.promote_types(*(attend.compute_dtype(q, side.coder) for side in (self.keys, self.values)))
        rows = q.to(dtype) * (q.shape[3] ** -0.5 if scale is None else scale)
        y = attention(rows, self._parts(dtype, arrival), mask, changes, self._coded(q, arrival))
        return y.to(q.dtype)

    def nbytes(self) -> dict[str, int]:
        """Bytes that tokens take: ``codes``, ``scales``, ``window`` (with the sinks), ``positions`` (of its own)."""
        sides = [side.nbytes() for side in (self.keys, self.values)]
        as_they_are = (*(plain[:, :, : self._filled] for plain in self._plain), *self._left)
        window = sum(x.numel() * x.element_size() for x in as_they_are)
        own = 0 if self._own is None else self._own.nbytes()
        codes, scales = (sum(side[i] for side in sides) for i in range(2))
        return {"codes": codes, "scales": scales, "window": window, "positions": own}

    def allocated(self) -> int:
        """Bytes of all tensors, with the room for tokens to come, but for positions that are shared."""
        plain = sum(x.numel() * x.element_size() for x in (*self._plain, *self._left))
        own = 0 if self._own is None else self._own.nbytes()
        return self.keys.allocated() + self.values.allocated() + plain + own

    def reset(self) -> None:
        """Forgets all tokens."""
        self.total, self._plain, self._turned, self._left = 0, [], None, ()
        for side in (self.keys, self.values):
            side.reset()
        if self._own is not None:
            self._own.reset()

    def reorder(self, beams: Tensor) -> None:
        """Rows of the batch in another order, some more than once: ``beams`` ``[B]``, an integer, on any device."""
        self.select(beams)

    def select(self, indices: Tensor) -> None:
        """Some rows of the batch: ``indices`` ``[B']``, an integer, on any device."""
        self._map_rows(lambda x: x.index_select(0, indices.to(x.device)))

    def repeat(self, times: int) -> None:
        """Each row of the batch so many times, beside each other."""
        self._map_rows(lambda x: x.repeat_interleave(times, 0))

    def crop(self, length: int) -> None:
        """Forgets the newest tokens.

        Args:
            length: Tokens that stay; if negative, tokens that go.

        Raises:
            InputError: If some of those are in codes already, which would have to become the window again.
        """
        left = max(0, length if length >= 0 else self.total + length)
        if left >= self.total:
            return
        back = self.encoded - self._due(left)
        if back > (self._left[0].shape[2] if self._left else 0):
            raise InputError(
                f"{self.name}: of {self.total} tokens {left} were to stay, but {back} that would be in the window then "
                f"are in codes; a larger window lets more go, and so does the last append where it was of {DRAFT} "
                "tokens at most"
            )
        if back > 0:
            self._take_back(back)
        self.total = left
        if self._own is not None:
            self._own.crop(left)

    def state(self) -> dict[str, Tensor]:
        """All that ``restore`` needs but the coders, as tensors of their own."""
        state = {"tokens": torch.tensor([self.total, self.encoded, int(bool(self._turned)), self.sinks])}
        for name, plain in zip(("k", "v"), self._plain, strict=False):
            state[f"window.{name}"] = plain[:, :, : self._filled].clone()
        parts = {"keys": self.keys.state(), "values": self.values.state()}
        parts["positions"] = {} if self._own is None else self._own.state()
        return {**state, **{f"{name}.{key}": x for name, part in parts.items() for key, x in part.items()}}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes what ``state`` gave.

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

    # ------------------------------------------------------------------------------------------------- steps

    def _encode(self, due: int, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Encodes the oldest of the window and of new tokens, which it returns, and keeps the others as they are."""
        joined = [
            torch.cat([plain[:, :, : self._filled], new.to(plain.dtype)], 2)
            for plain, new in zip(self._plain, (k, v), strict=True)
        ]
        going = tuple(x[:, :, self.sinks : self.sinks + due] for x in joined)
        keys, values = going
        if self._turned:
            start = self.sinks + self.encoded
            keys = turned_back(keys, *self.positions.get(start, start + due))
        encoded = self.keys.encode(keys), self.values.encode(values)
        for side, codes in zip((self.keys, self.values), encoded, strict=True):
            side.add(codes)
        left = joined[0].shape[2] - due
        for plain, x in zip(self._plain, joined, strict=True):
            plain[:, :, : self.sinks] = x[:, :, : self.sinks]
            plain[:, :, self.sinks : left] = x[:, :, self.sinks + due :]
        return going

    def _due(self, total: int) -> int:
        """How many of so many tokens are in codes."""
        return max(0, (total - self.sinks - self.window) // self.chunk * self.chunk)

    def _take_back(self, back: int) -> None:
        """Puts the newest tokens in codes, which the last append sent there, into the window again."""
        room = self.sinks + self.window + self.chunk
        for i, (plain, left) in enumerate(zip(self._plain, self._left, strict=True)):
            parts = plain[:, :, : self.sinks], left[:, :, -back:], plain[:, :, self.sinks : self._filled]
            joined = torch.cat(parts, 2)[:, :, :room]  # what is beyond goes anyway
            plain[:, :, : joined.shape[2]] = joined
            self._plain[i] = plain
        self._left = tuple(left[:, :, :-back] for left in self._left)
        for side in (self.keys, self.values):
            side.crop(side.length - back)

    def _coded(self, q: Tensor, arrival: Arrival | None) -> Tensor | None:
        """``[n]``: of the tokens in codes, how many were so when each query's token came; None where all were."""
        if arrival is None or not arrival.left:
            return None
        seen = torch.arange(self.total - q.shape[2] + 1, self.total + 1, device=q.device)
        return (seen - self.sinks - self.window).clamp_min(0) // self.chunk * self.chunk

    def _parts(self, dtype: torch.dtype, arrival: Arrival | None = None) -> Parts:
        keys, values = (plain[:, :, : self._filled] for plain in self._plain)
        if not self.encoded:
            return Parts(keys, values, self._filled, None, None, None)
        twice = 0
        if arrival is not None and arrival.left:
            twice = arrival.left[0].shape[2]
            keys, values = (
                torch.cat([plain[:, :, : self.sinks], left, plain[:, :, self.sinks :]], 2)
                for plain, left in zip((keys, values), arrival.left, strict=True)
            )
        held_keys = attend.hold(self.keys.coder, self.keys.codes(), self.keys.scale(), dtype)
        held_values = attend.hold(self.values.coder, self.values.codes(), self.values.scale(), dtype)
        turns = self.positions.get(self.sinks, self.sinks + self.encoded) if self._turned else None
        return Parts(keys, values, self.sinks, held_keys, held_values, turns, twice)

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self._plain = [change(plain) for plain in self._plain]
        self._left = tuple(change(left) for left in self._left)
        for side in (self.keys, self.values):
            side.map_rows(change)
        if self._own is not None:
            self._own.map_rows(change)

    def _restore(self, state: dict[str, Tensor]) -> None:
        total, encoded, turned, sinks = state["tokens"].tolist()
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
        room = max(self.sinks + self.window + self.chunk, total - encoded)
        self._plain = [torch.cat([x, x.new_empty(*x.shape[:2], room - x.shape[2], x.shape[3])], 2) for x in plain]
        for name, side in (("keys", self.keys), ("values", self.values)):
            side.restore(parts[name], encoded, batch)
        if self._own is not None:
            self._own.restore(parts["positions"], self.name)
            if turned and self._own.length != total:
                raise FormatError(f"{self.name}: the positions saved are not of {total} tokens")
        self.total, self._turned = total, bool(turned) if total else None
