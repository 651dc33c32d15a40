"""A file that ``torch.save`` wrote, read without running anything that is in it.

Such a file is a zip archive: a pickle that says what there is, and a record of bytes for each storage. torch's own
reader takes the sizes that the pickle claims for true, and memory for what they claim. This one knows the few words
that a dict of strings and plain tensors is written in, holds every size against the bytes that are there, and refuses
anything else. Nothing is allocated before.
"""

from __future__ import annotations

import math
import os
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from rpqfx.errors import FormatError
from rpqfx.files import bytes_of

MAGIC = b"PK\x03\x04"
_LOCAL = struct.Struct("<4s22xHH")  # of a record: its mark, and the lengths of its name and of what else is told of it

_LARGEST = 2**48  # more than any machine has bytes

_TYPED = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64,
}  # fmt: skip
_UNTYPED = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "uint16", "uint32",
            "uint64", "complex32")  # fmt: skip
DTYPES: dict[str, torch.dtype] = {
    **{str(dtype).removeprefix("torch."): dtype for dtype in _TYPED.values()},
    **{name: getattr(torch, name) for name in _UNTYPED if hasattr(torch, name)},
}
"""The dtypes that a file may hold, by their names."""


class _Range(NamedTuple):
    """Where a record's bytes are."""

    offset: int
    size: int


class _Word(NamedTuple):
    """What the pickle calls by name, and nobody looks up."""

    name: str


class _Storage(NamedTuple):
    dtype: torch.dtype | None
    key: str
    count: int


@dataclass(frozen=True)
class Described:
    """What a file says of a tensor, found to be true of the bytes that it has.

    Args:
        key: Of the storage.
        dtype: Of the tensor.
        shape: Of the tensor.
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
    """What ``torch.save`` wrote to a file.

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
            return _Reader(self._describe).read(self._pickle)
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
        """Where each record is, and what their names begin with."""
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
        self, storage: _Storage, offset: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype | None
    ) -> Described:
        dtype = storage.dtype or dtype
        if dtype is None or (storage.dtype is not None and storage.dtype is not dtype):
            raise FormatError("it holds a tensor of no dtype")
        record = self._records.get(self._data + storage.key)
        size = storage.count * (dtype.itemsize if storage.dtype is not None else 1)
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
        shape: Of a tensor.
        strides: Of it, in elements.
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


_Describe = Callable[[_Storage, int, Sequence[int], Sequence[int], torch.dtype | None], Described]
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1")
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Reader:
    """Reads a pickle of nested dicts with strings for keys, of strings and tensors. Nothing is looked up by name."""

    def __init__(self, describe: _Describe) -> None:
        self._describe = describe
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def read(self, pickle: bytes) -> Any:
        for op, argument, _ in pickletools.genops(pickle):
            if op.name == "STOP":
                (value,) = self._stack
                return value
            self._take(op.name, argument)
        raise ValueError("no end")

    def _take(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name == "MARK":
            self._marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "BINUNICODE" or name in _NUMBERS:
            stack.append(argument)
        elif name == "GLOBAL":
            stack.append(_Word(argument))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in _TUPLES:
            count = _TUPLES[name]
            self._put_tuple(self._above(len(stack) - count))
        elif name == "TUPLE":
            self._put_tuple(self._above(self._marks.pop()))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(self._called(stack.pop(), arguments))
        elif name in ("SETITEM", "SETITEMS"):
            self._set_items(self._above(self._marks.pop() if name == "SETITEMS" else len(stack) - 2))
        elif name != "PROTO":
            raise ValueError(f"the word {name} is none of a file of tensors")

    def _above(self, start: int) -> list[Any]:
        if start < (self._marks[-1] if self._marks else 0):
            raise ValueError("too little on the stack")
        above = self._stack[start:]
        del self._stack[start:]
        return above

    def _put_tuple(self, items: list[Any]) -> None:
        self._stack.append(tuple(items))

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("what is given items is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:
                raise ValueError("a key is no string, or there twice")
            target[key] = value

    def _called(self, function: Any, arguments: Any) -> Any:
        if type(function) is not _Word or type(arguments) is not tuple:
            raise ValueError("what is called is no function")
        if function.name == "collections OrderedDict" and not arguments:
            return {}
        if function.name == "torch._utils _rebuild_tensor_v2" and len(arguments) == 6:
            return self._tensor(*arguments)
        if function.name == "torch._utils _rebuild_tensor_v3" and len(arguments) == 7:
            return self._tensor(*arguments)
        raise ValueError(f"{function.name!r} makes no plain tensor")

    def _tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any = None
    ) -> Described:
        if type(storage) is not _Storage or type(shape) is not tuple or type(strides) is not tuple or hooks != {}:
            raise ValueError("a tensor has no storage, no shape, or hooks")
        if dtype is not None:
            dtype = DTYPES[_name(dtype, "torch ")]
        return self._describe(storage, offset, shape, strides, dtype)


def _storage(said: Any) -> _Storage:
    kind, typed, key, _, count = said
    if kind != "storage" or type(key) is not str or type(count) is not int or count < 0:
        raise ValueError("a storage is not as torch writes it")
    if typed == _Word("torch.storage UntypedStorage"):
        return _Storage(None, key, count)
    return _Storage(_TYPED[_name(typed, "torch ")], key, count)


def _name(word: Any, module: str) -> str:
    if type(word) is not _Word or not word.name.startswith(module):
        raise ValueError("a name is none of torch")
    return word.name.removeprefix(module)
