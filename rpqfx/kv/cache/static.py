"""A cache of fixed capacity, all of whose sizes are known before it runs: compilers see one graph for every token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rpqfx.codebook.packing import code_bits
from rpqfx.errors import InputError
from rpqfx.kv.attention import attend
from rpqfx.kv.attention.attend import Rope
from rpqfx.kv.attention.rotary import turned_back
from rpqfx.kv.attention.slots import Stream, bits_at, check
from rpqfx.kv.coder.protocol import Coder, slots_of


class StaticStore(nn.Module):
    """Keys and values of one layer; ``update``, ``reset``, positions as tensors, as torchtune's ``KVCache`` has them.

    Every token is encoded as it comes; the last ``window`` of them, and the sinks, are kept as they are besides, and
    are attended to instead of their codes.

    Args:
        keys: The coder of keys; its ``encode`` has to be one that the compiler takes, if there is one.
        values: The coder of values.
        batch: ``B``.
        capacity: Tokens at most.
        sinks: First tokens that are kept as they are.
        window: Recent tokens that are kept as they are, at least 1.
        dtype: Of what is kept as it is.
        rope: Elements of a key that its rotary embedding turns, where keys are coded before it; else 0.
        scaled: Whether the coders give scales.
        device: Of the cache.
        name: Of the layer, for errors.

    Raises:
        InputError: If the numbers, or the coders, do not go together.
    """

    codes_k: Tensor
    first_k: Tensor
    first_v: Tensor
    recent_k: Tensor
    recent_v: Tensor
    cos: Tensor
    sin: Tensor
    total: Tensor

    def __init__(
        self, keys: Coder, values: Coder, batch: int, capacity: int, *, sinks: int = 4, window: int = 128,
        dtype: torch.dtype = torch.float32, rope: int = 0, scaled: tuple[bool, bool] = (True, True),
        device: torch.device | str = "cpu", name: str = "cache",
    ) -> None:  # fmt: skip
        super().__init__()
        if sinks < 0 or window < 1 or capacity < 1 or rope % 2 or not 0 <= rope <= keys.dim:
            raise InputError(f"{name}: sinks {sinks}, window {window}, capacity {capacity} or rope {rope} cannot be")
        self.name, self.capacity, self.sinks, self.window, self.rope = name, capacity, sinks, window, rope
        self.coders = (keys, values)
        for side, coder, has_scale in zip(("k", "v"), self.coders, scaled, strict=True):
            check(slots_of(coder), coder.books, coder.dim if coder.basis is None else coder.basis.shape[1], name)
            # three bytes more, so that those of the last code can be read and written like those of any other
            size = -(-capacity * code_bits(coder.entries) // 8) + 3
            shapes = {
                "codes": ((batch, len(coder.slot_books), size), torch.uint8),
                "scale": ((batch, coder.heads, capacity if has_scale else 0), torch.float16),
                "recent": ((batch, coder.heads, window, coder.dim), dtype),
                "first": ((batch, coder.heads, sinks + 1, coder.dim), dtype),  # one more, which nobody reads
            }
            for part, (shape, kind) in shapes.items():
                self.register_buffer(f"{part}_{side}", torch.zeros(shape, dtype=kind, device=device), persistent=False)
        for part in ("cos", "sin"):
            angles = torch.zeros(batch, capacity, rope // 2, dtype=dtype, device=device)
            self.register_buffer(part, angles, persistent=False)
        self.register_buffer("total", torch.zeros((), dtype=torch.int64, device=device), persistent=False)

    @torch.no_grad()
    def update(self, position: Tensor, k: Tensor, v: Tensor, rope: Rope | None = None) -> None:
        """Takes the next tokens.

        Args:
            position: ``[T]`` int64, where they belong, one after the other.
            k: ``[B, H, T, D]``; after the rotary embedding if there is one.
            v: ``[B, H, T, D_v]``.
            rope: ``cos`` and ``sin`` of these tokens, ``[T, R]`` or ``[B, T, R]``, if the store was made for them.

        Raises:
            InputError: If shapes do not fit, or tokens lie past the capacity (in compiled graphs torch's own error).
        """
        self._check(position, k, v, rope)
        before = k
        if rope is not None:
            turns = [part[..., : self.rope // 2].expand(k.shape[0], -1, -1) for part in rope]
            for name, part in zip(("cos", "sin"), turns, strict=True):
                self.get_buffer(name).index_copy_(1, position, part.to(self.get_buffer(name).dtype))
            before = turned_back(k, *turns)
        for side, coder, x, plain in (("k", self.coders[0], before, k), ("v", self.coders[1], v, v)):
            codes, scale = coder.encode(x)
            self._write(side, coder, position, codes)
            if scale is not None:
                self.get_buffer(f"scale_{side}").index_copy_(2, position, scale)
            recent, first = self.get_buffer(f"recent_{side}"), self.get_buffer(f"first_{side}")
            last = plain[:, :, -self.window :].to(recent.dtype)
            recent.index_copy_(2, position[-self.window :] % self.window, last)
            for t in range(min(self.sinks, plain.shape[2])):  # alone: those past the sinks all go to one place
                first.index_copy_(2, position[t : t + 1].clamp(max=self.sinks), plain[:, :, t : t + 1].to(first.dtype))
        self.total.copy_(position[-1] + 1)

    @torch.no_grad()
    def attend(self, q: Tensor, position: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
        """Attention of tokens to all up to themselves.

        Args:
            q: ``[B, H_q, n, D]``, floating.
            position: ``[n]`` int64, of the queries.
            scale: Of the scores; None for ``1 / sqrt(D)``.
            mask: Broadcastable to ``[B, H_q, n, capacity]``: True where one may be seen, or added to the scores.

        Returns:
            ``[B, H_q, n, D_v]`` of the queries' dtype; zeros for a query that sees nothing.
        """
        batch, heads, queries, dim = q.shape
        keys, values = self.coders
        dtype = torch.promote_types(*(attend.compute_dtype(q, coder) for coder in self.coders))
        rows = (q.to(dtype) * (dim**-0.5 if scale is None else scale)).reshape(batch, keys.heads, -1, dim)
        near = torch.cat([self.first_k[:, :, : self.sinks], self.recent_k], 2).to(dtype)
        held = attend.hold(keys, self._codes("k", keys), self._scale("k"), dtype)
        far = attend.turned_scores(rows, held, self.cos, self.sin) if self.rope else attend.straight_scores(rows, held)
        scores = torch.cat([rows @ near.transpose(-1, -2), far], -1).view(batch, heads, queries, -1)
        place, seen = self._places()
        allowed = seen & (place <= position[:, None])
        if mask is not None:
            wide = mask.expand(batch, heads, queries, self.capacity)[..., place.clamp(0, self.capacity - 1)]
            allowed, scores = (allowed & wide, scores) if wide.dtype is torch.bool else (allowed, scores + wide)
        scores = scores.masked_fill(~allowed, -torch.inf)
        p = torch.softmax(scores, -1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
        p = p.view(batch, keys.heads, -1, p.shape[-1])
        plain = self.sinks + self.window
        held = attend.hold(values, self._codes("v", values), self._scale("v"), dtype)
        y = p[..., :plain] @ torch.cat([self.first_v[:, :, : self.sinks], self.recent_v], 2).to(dtype)
        return (y + attend.weighted_sum(p[..., plain:], held)).view(batch, heads, queries, -1).to(q.dtype)

    def reset(self) -> None:
        """Forgets all tokens."""
        for buffer in self.buffers():
            buffer.zero_()

    def _places(self) -> tuple[Tensor, Tensor]:
        """Positions of the sinks, of the window and of the codes, and which of them count: each token once."""
        total, device = self.total, self.total.device
        first, every = torch.arange(self.sinks, device=device), torch.arange(self.capacity, device=device)
        recent = total - 1 - (total - 1 - torch.arange(self.window, device=device)) % self.window
        seen = (first < total, recent >= self.sinks, (every >= self.sinks) & (every < total - self.window))
        return torch.cat([first, recent, every]), torch.cat(seen)

    def _codes(self, side: str, coder: Coder) -> Stream:
        return Stream(self.get_buffer(f"codes_{side}"), code_bits(coder.entries), coder.entries, self.capacity)

    def _scale(self, side: str) -> Tensor | None:
        scale = self.get_buffer(f"scale_{side}")
        return scale if scale.shape[2] else None

    def _write(self, side: str, coder: Coder, position: Tensor, codes: Tensor) -> None:
        """Codes at their places: no two share a bit, so sums of what they change are the same as bits set."""
        data, width = self.get_buffer(f"codes_{side}"), code_bits(coder.entries)
        bits = position * width
        old, shift = bits_at(data, bits, width), (bits % 8).to(torch.int32)
        for i in range(3):
            change = [(some.to(torch.int32) << shift) >> 8 * i & 255 for some in (codes, old)]
            data.index_add_(2, bits // 8 + i, (change[0] - change[1] & 255).to(torch.uint8))

    def _check(self, position: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> None:
        for coder, x in zip(self.coders, (k, v), strict=True):
            expected = (self.codes_k.shape[0], coder.heads, len(position), coder.dim)
            if x.shape != expected:
                raise InputError(f"{self.name}: keys or values are {tuple(x.shape)}, expected {expected}")
        if (rope is not None) != bool(self.rope) or any(part.shape[-1] != self.rope for part in rope or ()):
            raise InputError(f"{self.name}: the store was made for rotary embeddings of {self.rope} elements")
        if torch.compiler.is_compiling():
            return
        if not all(bool(torch.isfinite(x).all()) for x in (k, v)):
            raise InputError(f"{self.name}: keys or values hold NaN or infinity")
        if int(position[-1]) >= self.capacity:
            raise InputError(
                f"{self.name}: token {int(position[-1])} is past the {self.capacity} that there is room for"
            )
