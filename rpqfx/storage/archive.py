"""A file that ``torch.save`` wrote, read without running anything that is in it.

Such a file is a zip archive: a pickle that says what there is, and a record of bytes for each storage. torch's own
reader takes the sizes that the pickle claims for true, and memory for what they claim. This one knows the few words
that a dict of strings and plain tensors is written in, holds every size against the bytes that are there, and refuses
anything else. Nothing is allocated before.
"""

from __future__ import annotations

import math
import os
import struct
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from rpqfx.errors import FormatError
from rpqfx.storage.files import bytes_of
from rpqfx.storage.pickle_reader import Reader, Storage

MAGIC = b"PK\x03\x04"
_LOCAL = struct.Struct("<4s22xHH")  # of a record: its mark, and the lengths of its name and of what else is told of it

_LARGEST = 2**48  # more than any machine has bytes


class _Range(NamedTuple):
    """Where a record's bytes are."""

    offset: int
    size: int


@dataclass(frozen=True)
class Described:
    """A tensor as a file describes it, checked against the bytes that the file has.

    Args:
        key: Key of the storage.
        dtype: Dtype of the tensor.
        shape: Shape of the tensor.
        strides: In elements; no two elements share a place, and none is left free.
        offset: In elements.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class Archive:
    """A file that ``torch.save`` wrote.

    Args:
        file: Open for reading in binary, and seekable.

    Raises:
        FormatError: If it is no such file, or is truncated.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = file.seek(0, os.SEEK_END)
        self._records, prefix = self._directory()
        self._data = f"{prefix}data/"
        order = self._records.get(f"{prefix}byteorder")
        if order is not None and self._bytes(order) != sys.byteorder.encode():
            raise FormatError("it was written on a machine with another order of bytes")
        self._pickle = self._bytes(self._records[f"{prefix}data.pkl"])

    def value(self) -> Any:
        """Returns what was saved, with a ``Described`` in place of each tensor.

        Raises:
            FormatError: If it is something else than tensors, or claims what the file does not hold.
        """
        try:
            return Reader(self._describe).read(self._pickle)
        except (ValueError, TypeError, LookupError, OverflowError, AttributeError) as error:
            raise FormatError(f"it does not say what it holds ({type(error).__name__}: {error})") from error

    def tensors(self, described: dict[str, Described]) -> dict[str, Tensor]:
        """Reads tensors; those that share a storage in the file share memory.

        Args:
            described: By name, as in ``value``.
        """
        raw: dict[str, Tensor] = {}
        made = {}
        for name, one in described.items():
            if one.key not in raw:
                raw[one.key] = read_bytes(self._file, *self._records[self._data + one.key])
            whole = raw[one.key].view(one.dtype)
            made[name] = whole.as_strided(one.shape, one.strides, one.offset)
        return made

    def _directory(self) -> tuple[dict[str, _Range], str]:
        """Returns where each record is, and the prefix of their names."""
        try:
            with zipfile.ZipFile(self._file) as archive:
                entries = archive.infolist()
        except Exception as error:  # zipfile raises whatever its reading of damaged bytes leads to
            raise FormatError(f"it is no zip archive ({error})") from error
        records: dict[str, _Range] = {}
        for entry in entries:
            plain = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
            if not plain or entry.flag_bits & 1 or entry.filename in records:
                raise FormatError(f"its record {entry.filename!r} is compressed, encrypted or there twice")
            records[entry.filename] = self._range(entry)
        end = 0
        for offset, size in sorted(records.values()):
            if offset < end:
                raise FormatError("its records overlap")
            end = offset + size
        names = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(names) != 1:
            raise FormatError("it is a zip archive, but not one of torch")
        return records, names[0].removesuffix("data.pkl")

    def _range(self, entry: zipfile.ZipInfo) -> _Range:
        self._file.seek(max(0, entry.header_offset))
        head = self._file.read(_LOCAL.size) if entry.header_offset >= 0 else b""
        if len(head) < _LOCAL.size or not head.startswith(MAGIC):
            raise FormatError(f"its record {entry.filename!r} is not where it says")
        _, name, extra = _LOCAL.unpack(head)
        offset = entry.header_offset + _LOCAL.size + name + extra
        if offset + entry.file_size > self._size:
            raise FormatError(f"its record {entry.filename!r} goes on after its end")
        return _Range(offset, entry.file_size)

    def _bytes(self, record: _Range) -> bytes:
        self._file.seek(record.offset)
        return self._file.read(record.size)

    def _describe(
        self, storage: Storage, offset: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype | None
    ) -> Described:
        dtype = storage.dtype or dtype
        if dtype is None or (storage.dtype is not None and storage.dtype is not dtype):
            raise FormatError("it holds a tensor of no dtype")
        record = self._records.get(self._data + storage.key)
        size = storage.numel * (dtype.itemsize if storage.dtype is not None else 1)
        if record is None or record.size != size or size % dtype.itemsize:
            raise FormatError(f"its storage {storage.key!r} is said to have {size} bytes, which it has not")
        numbers = (offset, *shape, *strides)
        if any(type(n) is not int or not 0 <= n < _LARGEST for n in numbers) or len(shape) != len(strides):
            raise FormatError("it holds a tensor of no shape")
        if math.prod(max(1, n) for n in shape) >= _LARGEST:
            raise FormatError(f"it holds a tensor of shape {tuple(shape)}, which none can have")
        if not is_dense(shape, strides) or (offset + math.prod(shape)) * dtype.itemsize > record.size:
            raise FormatError(f"it holds a tensor of shape {tuple(shape)} that is not in its storage {storage.key!r}")
        return Described(storage.key, dtype, tuple(shape), tuple(strides), offset)


def read_bytes(file: BinaryIO, offset: int, size: int) -> Tensor:
    """Returns a stretch of a file as a tensor of uint8.

    Args:
        file: Open for reading in binary, and seekable.
        offset: Where it begins.
        size: Its length in bytes, which the file has been seen to have.

    Raises:
        FormatError: If the file has become shorter.
    """
    raw = torch.empty(size, dtype=torch.uint8, device="cpu")
    if not size:
        return raw
    file.seek(offset)
    left = memoryview(bytes_of(raw)).cast("B")
    while left:
        count = file.readinto(left)  # type: ignore[attr-defined]
        if not count:
            raise FormatError("it became shorter while it was read")
        left = left[count:]
    return raw


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Returns whether elements fill a stretch of memory, each its own place, in whatever order of axes.

    Args:
        shape: Shape of a tensor.
        strides: Strides of it, in elements.
    """
    if not math.prod(shape):
        return True
    filled = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != filled:
                return False
            filled *= size
    return True
