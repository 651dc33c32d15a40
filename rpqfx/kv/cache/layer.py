"""The cache of one attention layer: codes of most tokens, the first and the recent ones as they are."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rpqfx.errors import InputError
from rpqfx.kv.attention import attend
from rpqfx.kv.attention.attend import Rope
from rpqfx.kv.attention.joint_softmax import Parts, attention
from rpqfx.kv.attention.rotary import unrotated
from rpqfx.kv.attention.score_options import Changes
from rpqfx.kv.attention.slots import UNIT
from rpqfx.kv.attention.vectors import rotate
from rpqfx.kv.cache.codes import fingerprint
from rpqfx.kv.cache.layer_tensors import LayerTensors
from rpqfx.kv.cache.positions import Positions
from rpqfx.kv.cache.shared_rotary import LayerPositions
from rpqfx.kv.cache.token_checks import check_queries, check_tokens, full_mask
from rpqfx.kv.coder.protocol import Coder

# Tokens of an append up to which those that it sends into codes are kept as they are until the next one: a draft of
# assisted decoding is taken back as though it had never come.
DRAFT = 64


class Arrival(NamedTuple):
    """The tokens of an append, for its own queries: each sees the last ``window`` tokens before it exactly.

    Args:
        start: Tokens that were there before.
        encoded: Of those, in codes.
        left: Keys ``[B, H, m, D]`` and values of the tokens that went from the window, or past it, into codes since.
    """

    start: int
    encoded: int
    left: tuple[Tensor, ...]


class LayerStore(LayerTensors):
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
        super().__init__(keys, values, sinks, window + chunk, positions, name)
        self.window, self.chunk, self.dtype = window, chunk, dtype
        self.taken = 0  # tokens that ever came

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
        """Appends the next tokens.

        Args:
            k: ``[B, H, T, D]``, floating; after the rotary embedding if there is one.
            v: ``[B, H, T, D_v]``.
            rope: ``cos`` and ``sin`` of these tokens, ``[T, R]`` or ``[B, T, R]``, for keys that are coded before them.

        Returns:
            What these tokens' queries need, if each is to find its own window: ``attend`` takes it.

        Raises:
            InputError: If shapes, or rotary embeddings, are others than before, or if something is not finite.
        """
        check_tokens(self.keys, self.values, self.name, k, v, rope, self.batch, self._rotated)
        before = self.total, self.encoded
        left: tuple[Tensor, ...] = ()
        if rope is not None:
            self.positions.put(self.total, *rope, self.name)
        if not self._plain:
            room = self.sinks + self.recent
            self._plain = [x.new_empty(*x.shape[:2], room, x.shape[3], dtype=self.dtype or x.dtype) for x in (k, v)]
        self._rotated = rope is not None
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
        """Returns attention of the newest tokens to all: each sees those before it, and itself.

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
        y = attention(rows, self._parts(dtype, arrival), mask, changes, self._coded(q.shape[2], arrival, q.device))
        return y.to(q.dtype)

    @torch.no_grad()
    def vectors(self, side: Literal["keys", "values"], arrival: Arrival) -> tuple[Tensor, Tensor | None]:
        """Returns keys or values of all tokens, made from their codes where they are not held as they are.

        Args:
            side: Which of both.
            arrival: What the last ``append`` gave.

        Returns:
            Them, ``[B, H, total, D]``, with those as they are that the last append sent into codes, and with those as
            their codes: of both, ``near`` says which a query takes. None for the second where all are in the first.
        """
        number = ("keys", "values").index(side)
        plain = self._plain[number][:, :, : self._filled]
        if not self.encoded:
            return plain, None
        held = (self.keys, self.values)[number]
        dtype = attend.compute_dtype(plain, held.coder)
        coded = attend.hold(held.coder, held.codes(), held.scale(), dtype).vectors(0, self.encoded)
        if self._rotated and side == "keys":
            coded = rotate(coded, *self.positions.get(self.sinks, self.sinks + self.encoded))
        coded = coded.to(plain.dtype)
        first, last = plain[:, :, : self.sinks], plain[:, :, self.sinks :]
        far = torch.cat([first, coded, last], 2)
        if not arrival.left:
            return far, None
        left = arrival.left[number]
        return torch.cat([first, coded[:, :, : -left.shape[2]], left.to(plain.dtype), last], 2), far

    def near(self, queries: int, arrival: Arrival, device: torch.device) -> Tensor:
        """Returns which tokens each of the newest found as they are when it came, ``[queries, total]`` boolean.

        Args:
            queries: How many.
            arrival: What the last ``append`` gave, which took them in.
            device: Of the result.
        """
        token = torch.arange(self.total, device=device)
        coded = self._coded(queries, arrival, device)
        if coded is None:
            coded = torch.full((queries,), self.encoded, device=device)
        return (token < self.sinks) | (token >= self.sinks + coded[:, None])

    def crop(self, length: int) -> None:
        """Drops the newest tokens.

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

    # ------------------------------------------------------------------------------------------------- steps

    def _encode(self, due: int, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Encodes the oldest of the window and of new tokens, which it returns, and keeps the others as they are."""
        joined = [
            torch.cat([plain[:, :, : self._filled], new.to(plain.dtype)], 2)
            for plain, new in zip(self._plain, (k, v), strict=True)
        ]
        going = tuple(x[:, :, self.sinks : self.sinks + due] for x in joined)
        keys, values = going
        if self._rotated:
            start = self.sinks + self.encoded
            keys = unrotated(keys, *self.positions.get(start, start + due))
        encoded = self.keys.encode(keys), self.values.encode(values)
        for side, codes in zip((self.keys, self.values), encoded, strict=True):
            side.add(codes)
        left = joined[0].shape[2] - due
        for plain, x in zip(self._plain, joined, strict=True):
            plain[:, :, : self.sinks] = x[:, :, : self.sinks]
            plain[:, :, self.sinks : left] = x[:, :, self.sinks + due :]
        return going

    def _due(self, total: int) -> int:
        """Returns how many of so many tokens are in codes."""
        return max(0, (total - self.sinks - self.window) // self.chunk * self.chunk)

    def _take_back(self, back: int) -> None:
        """Puts the newest tokens in codes, which the last append sent there, into the window again."""
        room = self.sinks + self.recent
        for i, (plain, left) in enumerate(zip(self._plain, self._left, strict=True)):
            parts = plain[:, :, : self.sinks], left[:, :, -back:], plain[:, :, self.sinks : self._filled]
            joined = torch.cat(parts, 2)[:, :, :room]  # what is beyond goes anyway
            plain[:, :, : joined.shape[2]] = joined
            self._plain[i] = plain
        self._left = tuple(left[:, :, :-back] for left in self._left)
        for side in (self.keys, self.values):
            side.crop(side.length - back)

    def _coded(self, queries: int, arrival: Arrival | None, device: torch.device) -> Tensor | None:
        """Returns ``[n]``, how many tokens were in codes when each query's token came; None where all were."""
        if arrival is None or not arrival.left:
            return None
        seen = torch.arange(self.total - queries + 1, self.total + 1, device=device)
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
        angles = self.positions.get(self.sinks, self.sinks + self.encoded) if self._rotated else None
        return Parts(keys, values, self.sinks, held_keys, held_values, angles, twice)
