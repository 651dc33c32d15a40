"""Finished work on disk, so that what was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rpqfx.errors import FormatError
from rpqfx.storage.archive import Archive, Described
from rpqfx.storage.files import draft, take_in

_SUM = "sha256"
_DRAFT = re.compile(r"([0-9a-f]{24}\.pt|[a-z-]+\.sha256)\.[0-9a-f]{8}\.part")  # as ``draft`` names them


class Work(NamedTuple):
    """The kind of work that a folder is for.

    Args:
        name: In words.
        inputs: All that the result depends on, in words.
    """

    name: str
    inputs: str


CONVERSION = Work("conversion", "model, policy, seed or calibration")


class Checkpoint:
    """A folder with a file for each finished piece of work.

    Args:
        folder: Made if it is not there.
        fingerprint: Fingerprint of all that the result depends on.
        work: The kind of work.

    Raises:
        FormatError: If the folder holds other work.
        OSError: If it cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str, work: Work = CONVERSION) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            if _DRAFT.fullmatch(path.name):  # left by a process that was killed while it wrote
                path.unlink(missing_ok=True)
        mark = self._folder / f"{work.name}.sha256"
        if mark.exists():
            if mark.read_bytes().strip() != fingerprint.encode():
                raise FormatError(
                    f"{self._folder} holds a {work.name} of another {work.inputs}; give an empty "
                    "folder, or remove it to start over"
                )
        elif any(self._folder.iterdir()):
            raise FormatError(f"{self._folder} is not empty and holds no {work.name}; give an empty folder")
        else:
            self._write(mark, lambda part: part.write_text(fingerprint))

    def load(
        self, name: str, shapes: Mapping[str, Sequence[int]] | None = None, *, mapped: bool = False
    ) -> dict[str, Tensor] | None:
        """Returns the tensors that were saved under a name, or None; a damaged file counts as none.

        Args:
            name: Name of the piece of work.
            shapes: Shape of each tensor that there is to be; left out, any will do.
            mapped: Leave the tensors in the file until they are read, where a second copy in memory would be too much.

        Raises:
            OSError: If there is a file that cannot be read.
        """
        path = self._path(name)
        try:
            with open(path, "rb") as file:
                archive = Archive(file)
                said = archive.value()
                total = said.pop(_SUM, None) if isinstance(said, dict) else None
                if not isinstance(total, str) or not all(isinstance(one, Described) for one in said.values()):
                    return None
                if shapes is not None and {n: one.shape for n, one in said.items()} != _tuples(shapes):
                    return None
                if mapped:  # torch's own reader can be trusted with a file that holds what it says
                    held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                    del held[_SUM]
                else:
                    held = archive.tensors(said)
        except FileNotFoundError:
            return None
        except FormatError:  # half a file cannot be there, but a disk may have lost some of it, or changed it
            return None
        return held if total == fingerprint(held, held.values()) else None

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keeps tensors; the file appears whole or not at all.

        Raises:
            OSError: If it cannot be written, as on a full disk; what was saved before stays.
        """
        held = {name: tensor.cpu() for name, tensor in tensors.items()}
        whole = {**held, _SUM: fingerprint(held, held.values())}  # torch.load checks no sums
        self._write(self._path(name), lambda part: torch.save(whole, part))

    def _path(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.pt"

    def _write(self, path: Path, write: Callable[[Path], Any]) -> None:
        try:
            with draft(path) as part:
                write(part)
        except (OSError, RuntimeError) as error:
            raise OSError(f"the checkpoint {path} could not be written ({error}); what was saved stays") from error


def fingerprint(words: Iterable[str], tensors: Iterable[Tensor]) -> str:
    """Returns a hash of strings and of tensors' values.

    Args:
        words: Settings, in words.
        tensors: On any device.
    """
    digest = hashlib.sha256()
    for word in words:
        digest.update(word.encode() + b"\0")
    for tensor in tensors:
        take_in(digest, tensor)
    return digest.hexdigest()


def _tuples(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in shapes.items()}
