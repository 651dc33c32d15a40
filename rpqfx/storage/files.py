"""Files that appear whole or not at all, and sums of what is in them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

ENDING = ".part"  # of the names of drafts; a process that is killed leaves one behind
_NAME = 60  # characters of the file's name in its draft's: file systems take 255 bytes


class Digest(Protocol):
    """A digest of ``hashlib``."""

    def update(self, data: bytes | memoryview | ctypes.Array[ctypes.c_ubyte], /) -> None:
        """Takes in bytes."""


def place(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> Path:
    """Returns where a file that is written to a path ends up, and refuses what no file can be written to.

    Args:
        path: Path of a file, there or not, or of a symbolic link to one, which is followed.

    Returns:
        The path of the file itself.

    Raises:
        OSError: If there is a folder or a device in its place, or its folder is not there or no folder.
    """
    given = os.fsdecode(path)
    target = Path(os.path.realpath(given))
    if target.is_symlink():
        raise OSError(errno.ELOOP, "is a symbolic link that leads to itself", given)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; give the name of a file in it", given)
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "is no regular file; give one, or a file object that is open for writing", given)
    if not target.parent.exists():
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {target.parent}; make it first, for", given)
    if not target.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{target.parent} is no folder, so it cannot hold", given)
    return target


@contextlib.contextmanager
def draft(path: Path) -> Iterator[Path]:
    """Yields a name beside ``path`` to write to; what is there takes the place of ``path`` if nothing raises.

    What was written is on the disk before the name is: after a power failure, too, the path leads to the old file or to
    the new one. The new file has the permissions of the old one, or where there was none, those of any new file. A
    process that is killed leaves the draft behind, under a name that ends in ``.part``, which nothing ever reads.

    Args:
        path: Stays as it is until then, and if anything raises.

    Raises:
        OSError: If the file cannot be written; it names the path.
    """
    part = path.with_name(f"{path.name[:_NAME]}.{secrets.token_hex(4)}{ENDING}")
    try:
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
        if mode is not None:  # before anything is in it: what only its owner could read stays so
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, (mode | stat.S_IWUSR) & 0o777))
        yield part
        if not part.stat().st_size:
            raise FileNotFoundError(errno.ENOENT, "nothing was written to", str(part))
        _to_disk(part, os.O_RDWR)
        if mode is not None:
            part.chmod(mode)
        os.replace(part, path)
        with contextlib.suppress(OSError):  # not every system opens folders
            _to_disk(path.parent, os.O_RDONLY)
    except OSError as error:
        _remove(part)
        if error.filename is not None or error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
    except BaseException:
        _remove(part)
        raise


def _to_disk(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that knows no such thing
            raise
    finally:
        os.close(descriptor)


def _remove(part: Path) -> None:
    with contextlib.suppress(OSError):  # what went wrong before is what is to be told
        part.unlink(missing_ok=True)


def take_in(digest: Digest, tensor: Tensor, name: str = "") -> None:
    """Updates a digest with a tensor's name, dtype, shape and values.

    Args:
        digest: A digest of ``hashlib``.
        tensor: On any device.
        name: Name of the tensor.
    """
    tensor = tensor.detach().cpu().contiguous()
    digest.update(headline(name, tensor.dtype, tensor.shape))
    if tensor.numel():
        digest.update(bytes_of(tensor))


def headline(name: str, dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    """Returns what ``take_in`` takes in before a tensor's values.

    Args:
        name: Name of the tensor.
        dtype: Dtype of the tensor.
        shape: Shape of the tensor.
    """
    return f"{name} {dtype} {tuple(shape)}\n".encode()


def bytes_of(tensor: Tensor) -> ctypes.Array[ctypes.c_ubyte]:
    """Returns a view of a tensor's bytes; torch needs numpy for any other.

    Args:
        tensor: Contiguous, on the CPU, of at least one element.
    """
    return (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
