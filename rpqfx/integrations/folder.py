"""The safetensors files of a folder that ``save_pretrained`` wrote: one manifest, and its tensors in one file or more.

Each file carries the whole manifest in its metadata, because that is what comes along wherever a file goes: to the
hub, into a cache, into another folder. So what one of them is without the others is known, and refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpqfx.errors import FormatError
from rpqfx.graph.pretrained_calls import EXTRA
from rpqfx.storage.container import Container, open_container
from rpqfx.storage.files import take_in
from rpqfx.storage.sealed_manifest import read_manifest

GUARD = (1,)  # the shape of a tensor that stands for a dense weight, so that it fits no dense model


class Folder:
    """Reads the files of a folder. After ``verify`` or ``verified`` its tensors are known to be what was written.

    Args:
        files: As transformers found them.

    Raises:
        FormatError: If a file is missing, damaged, or of another model than the others.
    """

    def __init__(self, files: Sequence[str] | None) -> None:
        if not files:
            raise FormatError(
                "a quantized model comes from the files of its folder, and no files were found; pass the folder to "
                "from_pretrained, without state_dict"
            )
        self.files = [str(file) for file in files]
        self.path = str(Path(self.files[0]).parent)
        self._open = contextlib.ExitStack()
        try:
            self._held = self._opened()
            self.manifest = self._manifest(self._held)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the files."""
        self._open.close()

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Reads tensors as they are stored, under the names that the files have for them.

        Args:
            names: First names of tensors in the manifest.
        """
        held = self._held
        return {name: _whole(self._entry[name], held[self._where[name]].read([name])[name]) for name in names}

    def verify(self) -> None:
        """Reads every tensor, piece by piece, and keeps none.

        Raises:
            FormatError: If the folder was altered.
        """
        digest = hashlib.sha256()
        for name in self._names():
            one = self._held[self._where[name]]
            flat = _is_flat(self._entry[name], one.stored[name][1])
            try:
                one.take_in(digest, name, self._entry[name]["shape"] if flat else None)
            except FormatError as error:
                raise FormatError(f"{self.files[self._where[name]]}: {error}") from error
        self._check(digest.hexdigest())

    def verified(self) -> dict[str, Tensor]:
        """Reads every tensor, once.

        Returns:
            All of them as they are stored, by their names in the files.

        Raises:
            FormatError: If the folder was altered.
        """
        digest, tensors = hashlib.sha256(), {}
        for name in self._names():
            tensors[name] = self.read([name])[name]
            take_in(digest, tensors[name], name)
        self._check(digest.hexdigest())
        return tensors

    def _names(self) -> list[str]:
        return sorted(entry["names"][0] for entry in self.manifest["tensors"])

    def _check(self, checksum: str) -> None:
        if checksum != self.manifest["checksum"]:
            raise FormatError(
                f"{self.path} was altered: its tensors do not match its checksum; copy it again, or save the model "
                "again"
            )

    def _opened(self) -> list[Container]:
        held = []
        for name in self.files:
            try:
                file = self._open.enter_context(open(name, "rb"))  # noqa: SIM115 (closed by close)
                held.append(open_container(file, name))
            except FileNotFoundError as error:
                raise FormatError(f"{name} is missing, without which {self.path} cannot be opened") from error
            except FormatError as error:
                raise FormatError(f"{name} {error}") from error
        return held

    def _manifest(self, held: Sequence[Container]) -> dict[str, Any]:
        first = held[0]
        self._where: dict[str, int] = {}
        stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for number, (file, one) in enumerate(zip(self.files, held, strict=True)):
            if (one.text, one.seal) != (first.text, first.seal):
                raise FormatError(f"{file} is of another model, or of another time, than {self.files[0]}")
            for name, what in one.stored.items():
                if name in stored:
                    raise FormatError(f"{file} holds {name}, which {self.files[self._where[name]]} holds, too")
                stored[name], self._where[name] = what, number
        try:
            return read_manifest(first.text, first.seal, lambda manifest: self._true(manifest, stored))
        except FormatError as error:
            raise FormatError(f"{self.path} {error}") from error

    def _true(
        self, manifest: Any, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Returns the stored tensors as a manifest has them: without guards and extra state, and no tensor flat."""
        self._entry = _entries(manifest)
        found = dict(stored)
        for name, (dtype, shape) in stored.items():
            entry = self._entry.get(name)
            if entry is None and ((dtype, shape) == (torch.uint8, GUARD) or name.endswith(f".{EXTRA}")):
                del found[name]
            elif entry is not None and _is_flat(entry, shape):
                found[name] = dtype, tuple(entry["shape"])
        return found


def _entries(manifest: Any) -> dict[str, Any]:
    """Returns the entries of a manifest by the tensors' first names; nothing for what is no manifest, checked later."""
    with contextlib.suppress(TypeError, LookupError, AttributeError):
        return {entry["names"][0]: entry for entry in manifest["tensors"]}
    return {}


def _is_flat(entry: Mapping[str, Any], shape: tuple[int, ...]) -> bool:
    own = entry.get("shape")
    sized = isinstance(own, list) and len(own) > 1 and all(type(size) is int for size in own)
    return "packed" not in entry and sized and shape == (math.prod(own or ()),)


def _whole(entry: Mapping[str, Any], tensor: Tensor) -> Tensor:
    return tensor.view(entry["shape"]) if _is_flat(entry, tuple(tensor.shape)) else tensor
