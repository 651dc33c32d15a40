"""The codes of one side of a layer, its keys or its values, as they grow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rpqfx.codebook.packing import code_bits
from rpqfx.errors import FormatError, InputError
from rpqfx.kv.attention.slots import UNIT, Stream, check, packed
from rpqfx.kv.cache.positions import grown
from rpqfx.kv.coder.protocol import Coder, slots_of

# Tokens that are encoded at a time.
BLOCK = 4096
_ODD = 0x9E3779B97F4A7C15 - 2**64  # any odd number of 64 bits whose multiples look like chance


class Side:
    """Packed codes, and scales where there are any.

    Args:
        coder: What makes the codes.
        name: Of the layer and the side, for errors.
    """

    def __init__(self, coder: Coder, name: str) -> None:
        self.coder, self.name = coder, name
        check(slots_of(coder), coder.books, coder.dim if coder.basis is None else coder.basis.shape[1], name)
        if coder.heads % (len(coder.head_slots) - 1):
            raise InputError(f"{name}: {len(coder.head_slots) - 1} parts have slots, the coder has {coder.heads} heads")
        self.width = code_bits(coder.codebook_size)
        self.length = 0
        self._data: Tensor | None = None  # [B, S, bytes]
        self._scale: Tensor | None = None  # [B, H, capacity]

    def encode(self, x: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Returns codes and scales of tokens, block by block, for ``add``.

        Raises:
            InputError: If the coder gives something else than it says.
        """
        return [self._encode(block) for block in x.split(BLOCK, 2)]

    def add(self, encoded: list[tuple[Tensor, Tensor | None]]) -> None:
        """Appends the result of ``encode``, of a multiple of ``UNIT`` tokens."""
        length = self.length + sum(codes.shape[2] for codes, _ in encoded)
        self._make_room(length, *encoded[0])
        for codes, scale in encoded:
            stop = self.length + codes.shape[2]
            assert self._data is not None
            self._data[:, :, self._bytes(self.length) : self._bytes(stop)] = packed(codes, self.coder.codebook_size)
            if self._scale is not None:
                assert scale is not None
                self._scale[:, :, self.length : stop] = scale
            self.length = stop

    def codes(self) -> Stream:
        """Returns all codes; there are some."""
        assert self._data is not None
        return Stream(self._data, self.width, self.coder.codebook_size, self.length)

    def scale(self) -> Tensor | None:
        """Returns ``[B, H, T]`` float16 or None."""
        return None if self._scale is None else self._scale[:, :, : self.length]

    def nbytes(self) -> tuple[int, int]:
        """Returns the bytes of codes and of scales."""
        used = self._used()
        return used["codes"].numel() if "codes" in used else 0, used["scale"].numel() * 2 if "scale" in used else 0

    def allocated(self) -> int:
        """Returns the bytes that the tensors take, with room for more tokens."""
        return sum(x.numel() * x.element_size() for x in (self._data, self._scale) if x is not None)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Puts rows of the batch into another order, or repeats or drops some."""
        used = {name: change(part) for name, part in self._used().items()}
        self._data, self._scale = used.get("codes"), used.get("scale")

    def crop(self, length: int) -> None:
        """Drops the newest codes; a multiple of ``UNIT`` tokens stays."""
        self.length = length

    def reset(self) -> None:
        """Drops all codes."""
        self.length, self._data, self._scale = 0, None, None

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors that ``restore`` takes."""
        state = {"codes": torch.empty(0), "scale": torch.empty(0), **self._used()}
        return {**{name: part.clone() for name, part in state.items()}, "coder": fingerprint(self.coder)}

    def restore(self, state: dict[str, Tensor], length: int, batch: int) -> None:
        """Takes on the result of ``state``, of so many tokens.

        Raises:
            FormatError: If it is of another coder or of other shapes.
        """
        if not torch.equal(state["coder"].cpu(), fingerprint(self.coder).cpu()):
            raise FormatError(f"{self.name}: the cache was saved with other codebooks")
        codes, scale = (state[name].clone() for name in ("codes", "scale"))
        shape = (batch, len(self.coder.slot_books), self._bytes(length))
        if length and (codes.shape != shape or codes.dtype is not torch.uint8):
            raise FormatError(f"{self.name}: the codes saved are {tuple(codes.shape)}, {length} tokens take {shape}")
        if scale.dim() == 3 and (scale.shape != (batch, self.coder.heads, length) or scale.dtype is not torch.float16):
            raise FormatError(f"{self.name}: the scales saved are not of {length} tokens")
        self._data, self._scale = codes if length else None, scale if length and scale.dim() == 3 else None
        self.length = length
        for start, stop in self.codes().blocks(shape[0] * shape[1]) if length else ():
            some = self.codes().block(start, stop)
            if some.numel() and int(some.max()) >= self.coder.codebook_size:
                raise FormatError(f"{self.name}: codes saved are above the {self.coder.codebook_size} entries")

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        codes, scale = self.coder.encode(x)
        batch, heads, tokens, _ = x.shape
        if codes.shape != (batch, len(self.coder.slot_books), tokens):
            raise InputError(f"{self.name}: codes of {tuple(x.shape)} are {tuple(codes.shape)}")
        if scale is not None and (scale.shape != (batch, heads, tokens) or scale.dtype is not torch.float16):
            raise InputError(f"{self.name}: scales of {tuple(x.shape)} are {tuple(scale.shape)} of {scale.dtype}")
        return codes, scale

    def _bytes(self, tokens: int) -> int:
        return tokens // UNIT * self.width

    def _used(self) -> dict[str, Tensor]:
        used = {}
        if self._data is not None:
            used["codes"] = self._data[:, :, : self._bytes(self.length)]
        if self._scale is not None:
            used["scale"] = self._scale[:, :, : self.length]
        return used

    def _make_room(self, length: int, codes: Tensor, scale: Tensor | None) -> None:
        if self._data is None:
            self._data = torch.empty((*codes.shape[:2], 0), dtype=torch.uint8, device=codes.device)
            self._scale = None if scale is None else scale.new_empty(*scale.shape[:2], 0)
        if self._data.shape[2] >= self._bytes(length):
            return
        used = self._used()
        self._data = self._data.new_empty(*self._data.shape[:2], self._bytes(grown(length)))
        self._data[:, :, : used["codes"].shape[2]] = used["codes"]
        if self._scale is not None:
            self._scale = self._scale.new_empty(*self._scale.shape[:2], grown(length))
            self._scale[:, :, : self.length] = used["scale"]


def fingerprint(coder: Coder) -> Tensor:
    """Returns ``[4]`` int64 that nearly always differ between coders; the same on every device."""
    numbers = [_mixed(x) if x is not None else 0 for x in (coder.books, coder.basis, coder.mean)]
    layout = torch.tensor([*coder.slot_books, *coder.slot_groups, *coder.head_slots, coder.dim], dtype=torch.int64)
    return torch.tensor([*numbers, _mixed(layout)], dtype=torch.int64)


def _mixed(x: Tensor) -> int:
    """Returns bits of a tensor in one number, by sums that wrap around and so come out the same in every order."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    words = x.detach().contiguous().view(bits).reshape(-1).long() + 1
    return int((words * (torch.arange(1, len(words) + 1, device=x.device) * _ODD | 1)).sum())
