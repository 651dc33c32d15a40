"""Where files are written to and read from: paths of every kind, links, and file objects."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rpqfx.errors import InputError
from rpqfx.storage.files import draft, place

Place = str | bytes | os.PathLike[str] | os.PathLike[bytes] | BinaryIO


def target_of(path: Place) -> Path | BinaryIO:
    """Returns where a file is to be written, seen to before there is any work."""
    if isinstance(path, (str, bytes, os.PathLike)):
        return place(path)
    if not callable(getattr(path, "write", None)) or isinstance(path, io.TextIOBase):
        raise InputError(
            f"save takes a path or a file object open for writing in binary, got {_kind(path)}; open it with 'wb'"
        )
    return path


def name_of(path: Place) -> str:
    """Returns the name of a file, for messages."""
    if isinstance(path, (str, bytes, os.PathLike)):
        return os.fsdecode(path)
    name = getattr(path, "name", None)
    return name if isinstance(name, str) else f"the {type(path).__name__}"


def _kind(path: Any) -> str:
    return f"a {type(path).__name__} in text mode" if isinstance(path, io.TextIOBase) else type(path).__name__


@contextlib.contextmanager
def written(target: Path | BinaryIO) -> Iterator[Path]:
    """Gives a path to write to; what is there comes to the target if nothing raises."""
    if isinstance(target, Path):
        with draft(target) as part:
            yield part
        return
    with tempfile.TemporaryDirectory(prefix="rpqfx-") as folder:
        part = Path(folder) / "content"
        yield part
        with open(part, "rb") as whole:
            shutil.copyfileobj(whole, target)


@contextlib.contextmanager
def opened(path: Place) -> Iterator[tuple[BinaryIO, str]]:
    """Gives a file to read, which can be sought in, and its name."""
    name = name_of(path)
    if isinstance(path, (str, bytes, os.PathLike)):
        if os.path.isdir(path):
            raise IsADirectoryError(f"{name} is a folder; give the name of the file in it")
        try:
            file = open(path, "rb")  # noqa: SIM115 (closed below)
        except FileNotFoundError as error:
            raise FileNotFoundError(error.errno, f"{name} does not exist", name) from error
        with file:
            yield file, name
        return
    if not callable(getattr(path, "read", None)) or isinstance(path, io.TextIOBase):
        raise InputError(
            f"load takes a path or a file object open for reading in binary, got {_kind(path)}; open it with 'rb'"
        )
    rest = path.read()
    if not isinstance(rest, bytes):
        raise InputError(f"load takes a file object open in binary, the {type(path).__name__} gives {_kind(rest)}")
    yield io.BytesIO(rest), name
