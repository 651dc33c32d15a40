"""Opens the source at a path: a file that ``rpqfx.save`` wrote, or a folder of ``save_pretrained``."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rpqfx.errors import FormatError
from rpqfx.integrations.folder import Folder
from rpqfx.storage.container import open_container
from rpqfx.storage.sealed_manifest import read_manifest

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Source:
    """A saved model that is open; its seal and its checksum are right.

    Args:
        name: For messages.
        manifest: What it says of the model.
        nbytes: Of its files.
        files: How many they are.
        read: Gives tensors as they are stored.
    """

    name: str
    manifest: dict[str, Any]
    nbytes: int
    files: int
    read: Callable[[Sequence[str]], dict[str, Tensor]]


@contextlib.contextmanager
def opened(path: str) -> Iterator[Source]:
    """Opens a saved model.

    Args:
        path: Of the file or folder.

    Raises:
        FormatError: If it is damaged, or nothing that this library wrote.
        OSError: If it is not there.
    """
    place = Path(path)
    if place.is_dir():
        files = weight_files(place)
        folder = Folder(files)
        try:
            folder.verify()
            size = sum(Path(file).stat().st_size for file in files)
            yield Source(path, folder.manifest, size, len(files), folder.read)
        finally:
            folder.close()
        return
    if not place.exists():
        raise FileNotFoundError(f"{path} does not exist")
    with open(place, "rb") as file:
        try:
            held = open_container(file, path)
            manifest = read_manifest(held.text, held.seal, lambda _: held.stored)
            digest = hashlib.sha256()
            for name in sorted(held.stored):
                held.take_in(digest, name)
        except FormatError as error:
            raise FormatError(f"{path} {error}") from error
        if digest.hexdigest() != manifest["checksum"]:
            raise FormatError(f"{path} was altered: its tensors do not match its checksum; save the model again")
        yield Source(path, manifest, place.stat().st_size, 1, lambda names: held.read(list(names)))


def weight_files(folder: Path) -> list[str]:
    """Returns the safetensors files of a folder of transformers.

    Args:
        folder: Which exists.

    Raises:
        FormatError: If there are none, or their index is damaged.
    """
    index = folder / _INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return [str(folder / Path(name).name) for name in names]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise FormatError(f"{index} does not say which files there are ({type(error).__name__})") from error
    if not (folder / _ONE).exists():
        raise FormatError(f"{folder} has no {_ONE}; give the folder of a model, or the file itself")
    return [str(folder / _ONE)]
