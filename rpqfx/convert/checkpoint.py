"""Finished weights of a conversion on disk, so that one that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpqfx.archive import Archive
from rpqfx.errors import FormatError
from rpqfx.files import ENDING, draft, take_in

_MARK = "conversion.sha256"
_SUM = "sha256"


class Checkpoint:
    """A folder with a file for each finished weight.

    Args:
        folder: Made if it is not there.
        fingerprint: Of all that the result depends on.

    Raises:
        FormatError: If the folder holds another conversion.
        OSError: If it cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        mark = self._folder / _MARK
        if mark.exists():
            if mark.read_bytes().strip() != fingerprint.encode():
                raise FormatError(
                    f"{self._folder} holds a conversion of another model, policy, seed or calibration; give an empty "
                    "folder, or remove it to start over"
                )
        elif any(path.suffix != ENDING for path in self._folder.iterdir()):  # drafts of one that was killed at once
            raise FormatError(f"{self._folder} is not empty and holds no conversion; give an empty folder")
        else:
            self._write(mark, lambda part: part.write_text(fingerprint))

    def load(self, name: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor] | None:
        """Tensors that were saved under a name, or None; a damaged file counts as none.

        Args:
            name: That they were saved under.
            shapes: Of each tensor that there is to be.

        Raises:
            OSError: If there is a file that cannot be read.
        """
        try:
            with open(self._path(name), "rb") as file:
                archive = Archive(file)
                said = archive.value()
                total = said.pop(_SUM, None) if isinstance(said, dict) else None
                right = isinstance(total, str) and said.keys() == shapes.keys()
                if not right or any(getattr(said[n], "shape", None) != tuple(s) for n, s in shapes.items()):
                    return None
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
    """A hash of strings and of tensors' values.

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
