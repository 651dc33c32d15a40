"""The two kinds of file that hold a manifest, its seal and named tensors: torch's and safetensors'."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rpqfx.errors import FormatError, RPQError
from rpqfx.storage.archive import MAGIC, Archive, Described, read_bytes
from rpqfx.storage.files import Digest, bytes_of, headline
from rpqfx.storage.pickle_reader import DTYPES

FORMAT = "rpqfx"
SEAL = f"{FORMAT}_seal"
_SAFETENSORS = ".safetensors"
_PIECE = 1 << 20  # bytes that are read at a time, where a tensor is not to be held
_HEADER = 8  # bytes of the length that a safetensors file begins with

# What safetensors calls dtypes.
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


@dataclass(frozen=True)
class Container:
    """The contents of a file; its tensors have not been read.

    Args:
        text: The manifest.
        seal: Hash of the manifest when the file was written.
        stored: Dtype and shape of each tensor; the bytes for them are there.
        read: Gives the tensors of these names, on the CPU.
        pieces: Gives the bytes of one tensor, piece by piece, each of which is gone with the next.
    """

    text: str
    seal: str
    stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    read: Callable[[list[str]], dict[str, Tensor]]
    pieces: Callable[[str], Iterator[memoryview]]

    def take_in(self, digest: Digest, name: str, shape: Sequence[int] | None = None) -> None:
        """Updates a digest with a tensor, as ``rpqfx.storage.files.take_in`` does, without holding all of it.

        Args:
            digest: A digest of ``hashlib``.
            name: Name of the tensor.
            shape: The shape that counts, where it is not the one in the file.

        Raises:
            FormatError: If the file has become shorter.
        """
        dtype, own = self.stored[name]
        digest.update(headline(name, dtype, own if shape is None else shape))
        for piece in self.pieces(name):
            digest.update(piece)


def writer_for(name: str) -> Callable[[Path, str, str, dict[str, Tensor]], None]:
    """Returns what writes a file: a safetensors file where its name says so, else torch's.

    Args:
        name: Name of the file, as it is to be called in the end.

    Raises:
        ImportError: If it is to be a safetensors file and safetensors is not installed.
    """
    if not name.lower().endswith(_SAFETENSORS):
        return _write_torch
    _safetensors()
    return _write_safetensors


def open_container(file: BinaryIO, name: str) -> Container:
    """Returns what a file holds, whatever it is called.

    Args:
        file: Open for reading in binary, and seekable; stays open while tensors are read.
        name: Name of the file; says what one that is of neither kind was meant to be.

    Raises:
        FormatError: If it is truncated, altered or no rpqfx file. The message goes on from the file's name.
        ImportError: If it is a safetensors file and safetensors is not installed.
    """
    file.seek(0)
    head = file.read(_HEADER + 1)
    meant = name.lower().endswith(_SAFETENSORS)
    if head[_HEADER:] == b"{" or (meant and not head.startswith(MAGIC)):
        return _open_safetensors(file)
    return _open_torch(file)


def _write_torch(part: Path, text: str, seal: str, tensors: dict[str, Tensor]) -> None:
    try:
        with open(part, "wb") as file:  # torch does not tell why it cannot write to a file that it opens itself
            torch.save({FORMAT: text, "seal": seal, "tensors": tensors}, file)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.filename:
            raise
        raise OSError(cause.errno, cause.strerror, str(part)) from error


def _open_torch(file: BinaryIO) -> Container:
    try:
        archive = Archive(file)
    except FormatError as error:
        raise FormatError(f"is truncated, altered or no rpqfx file: {error}") from error
    try:
        held = archive.value()
    except FormatError as error:
        raise FormatError(
            f"is a torch file, but not one that rpqfx.save wrote, or it was altered: {error}; "
            "what torch.save wrote is read by torch.load"
        ) from error
    if not isinstance(held, dict) or FORMAT not in held or "tensors" not in held:
        raise FormatError("is a torch file, but not one that rpqfx.save wrote")
    text, seal, tensors = held[FORMAT], held.get("seal", ""), held["tensors"]
    plain = isinstance(tensors, dict) and all(type(one) is Described for one in tensors.values())
    if not plain or not isinstance(text, str) or not isinstance(seal, str):
        raise FormatError("is truncated, altered or no rpqfx file: it holds something else than tensors")

    def read(names: list[str]) -> dict[str, Tensor]:
        try:
            return archive.tensors({name: tensors[name] for name in names})
        except FormatError as error:
            raise FormatError(f"is truncated or altered: {error}") from error

    def pieces(name: str) -> Iterator[memoryview]:
        tensor = read([name])[name].contiguous()
        if tensor.numel():
            yield memoryview(bytes_of(tensor)).cast("B")

    return Container(text, seal, {name: (one.dtype, one.shape) for name, one in tensors.items()}, read, pieces)


def _write_safetensors(part: Path, text: str, seal: str, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError

    held: dict[int, str] = {}
    for name, tensor in tensors.items():
        other = held.setdefault(tensor.untyped_storage().data_ptr(), name) if tensor.numel() else name
        if other != name:
            raise RPQError(
                f"{name} and {other} share memory without being one tensor, which a safetensors file cannot hold; "
                "save under another name, as model.rpq"
            )
    metadata = {"format": "pt", FORMAT: text, SEAL: seal}
    try:
        _safetensors().save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata)
    except SafetensorError as error:
        raise OSError(f"{part} cannot be written: {error}") from error


def _open_safetensors(file: BinaryIO) -> Container:
    _safetensors()
    try:
        table, start = _header(file)
        metadata = table.pop("__metadata__", {})
        ranges = {name: _range(name, said) for name, said in table.items()}
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise FormatError(f"is truncated, altered or no safetensors file: {error}") from error
    end = 0
    for one in sorted(ranges.values(), key=lambda one: (one.start, one.stop)):
        if one.start != end:
            raise FormatError("is truncated, altered or no safetensors file: its tensors overlap or leave gaps")
        end = one.stop
    if start + end != file.seek(0, os.SEEK_END):
        raise FormatError(f"is truncated, altered or no safetensors file: its tensors take {start + end} bytes")
    if not isinstance(metadata, dict) or FORMAT not in metadata:
        raise FormatError("is a safetensors file, but not one that rpqfx.save wrote")
    text, seal = metadata[FORMAT], metadata.get(SEAL, "")
    if not isinstance(text, str) or not isinstance(seal, str):
        raise FormatError("is truncated, altered or no safetensors file: its manifest is no text")

    def read(names: list[str]) -> dict[str, Tensor]:
        return {name: _tensor(file, start, ranges[name]) for name in names}

    room = memoryview(bytearray(_PIECE))

    def pieces(name: str) -> Iterator[memoryview]:
        one = ranges[name]
        file.seek(start + one.start)
        left = one.stop - one.start
        while left:
            count = file.readinto(room[:left])  # type: ignore[attr-defined]
            if not count:
                raise FormatError("it became shorter while it was read")
            yield room[:count]
            left -= count

    return Container(text, seal, {name: (one.dtype, one.shape) for name, one in ranges.items()}, read, pieces)


@dataclass(frozen=True)
class _Range:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def _header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Returns the header of a safetensors file, and where its tensors begin."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(_HEADER), "little")
    if length > size - _HEADER:
        raise ValueError(f"its header has {length} bytes, the file {size}")
    table = json.loads(file.read(length), object_pairs_hook=without_doubles)
    if not isinstance(table, dict):
        raise ValueError("its header is no table")
    return table, _HEADER + length


def _range(name: str, said: Any) -> _Range:
    dtype, shape, (start, stop) = DTYPES[_DTYPES[said["dtype"]]], said["shape"], said["data_offsets"]
    if type(shape) is not list or any(type(n) is not int or not 0 <= n < 2**48 for n in (*shape, start, stop)):
        raise ValueError(f"{name!r} has no shape")
    if stop - start != math.prod(shape) * dtype.itemsize or math.prod(max(1, n) for n in shape) >= 2**48:
        raise ValueError(f"{name!r} of shape {tuple(shape)} is not {stop - start} bytes")
    return _Range(dtype, tuple(shape), start, stop)


def _tensor(file: BinaryIO, start: int, one: _Range) -> Tensor:
    raw = read_bytes(file, start + one.start, one.stop - one.start)
    return raw.view(one.dtype).view(one.shape) if raw.numel() else torch.empty(one.shape, dtype=one.dtype, device="cpu")


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dict of what JSON has in braces.

    Args:
        pairs: Keys and values.

    Raises:
        ValueError: If a key is there twice.
    """
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name is there twice")
    return made


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors files need the extra: pip install 'rpqfx[safetensors]'") from error
    return safetensors.torch
