"""Files that appear whole or not at all, and sums of what is in them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor


class Digest(Protocol):
    """What ``hashlib`` makes."""

    def update(self, data: bytes | ctypes.Array[ctypes.c_ubyte], /) -> None:
        """Takes in bytes."""


@contextlib.contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; what is there takes the place of ``path`` if nothing raises.

    Args:
        path: Stays as it is until then, and if anything raises.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # made by the writer, with the usual permissions
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def take_in(digest: Digest, tensor: Tensor, name: str = "") -> None:
    """Updates a digest with a tensor's name, dtype, shape and values.

    Args:
        digest: Of ``hashlib``.
        tensor: On any device.
        name: Of the tensor.
    """
    tensor = tensor.detach().cpu().contiguous()
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    if tensor.numel():  # straight from memory: torch needs numpy for any other view of its bytes
        digest.update((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))
