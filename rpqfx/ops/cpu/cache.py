"""The folder of compiled kernels: where it is, what in it can be trusted, and a lock for writing to it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rpqfx.errors import RPQError

VARIABLE = "RPQFX_CACHE"  # in the environment: where compiled kernels are kept
PAUSE = 0.1  # seconds between two looks at a lock

_LOG = logging.getLogger("rpqfx")


def folders() -> list[Path]:
    """Returns the folders to look in, and to write to, in this order.

    The one that ``RPQFX_CACHE`` names is the only one. Without it, that of the user, and behind it one among the
    temporary files, for a user without a home or with one that cannot be written to.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return [Path(chosen)]
    found = [Path(tempfile.gettempdir()) / f"rpqfx-{os.geteuid()}"]
    home = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # there is no HOME, and no user of this number
        found.insert(0, (Path(home) if home else Path.home() / ".cache") / "rpqfx")
    return found


def trusted(path: Path) -> bool:
    """Returns whether code may be loaded from a path: it is this user's, or root's, and not open to everybody.

    A folder that ``RPQFX_CACHE`` names is trusted as it is: several users may share it.

    Args:
        path: Which exists.
    """
    if os.environ.get(VARIABLE) is not None:
        return True
    found = path.stat()
    owners = {path.lstat().st_uid, found.st_uid}  # of a link, and of what it leads to
    return owners <= {0, os.geteuid()} and not found.st_mode & stat.S_IWOTH


def made(folder: Path) -> Path:
    """Returns a folder that exists and can be written to, made now if need be.

    Args:
        folder: One of ``folders()``.

    Raises:
        OSError: If it cannot be made or written to, or is another user's.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not trusted(folder):
        raise PermissionError("it is another user's, or everybody may write to it")
    with tempfile.TemporaryFile(dir=folder):  # which asks the file system, and not only the permissions
        return folder


def intact(library: Path) -> bool:
    """Returns whether a library is there, to be trusted and as it was written: loading half a library ends the process.

    Args:
        library: Beside which ``seal`` has left the sum of its bytes.
    """
    try:
        if not trusted(library.parent) or not trusted(library):
            return False
        return _sum_file(library).read_text() == _sum(library)
    except OSError:
        return False


def seal(built: Path, library: Path) -> None:
    """Puts a library into its place, whole or not at all, with the sum of its bytes beside it.

    Args:
        built: The library, in another folder of the same file system.
        library: Its place.
    """
    noted = built.with_suffix(".sum")
    noted.write_text(_sum(built))
    os.replace(noted, _sum_file(library))  # first: a library without its sum would be built again by every process
    os.replace(built, library)


@contextlib.contextmanager
def turn(lock: Path, patience: float) -> Iterator[None]:
    """Waits for a lock between processes, and holds it. A process that has died holds none.

    Args:
        lock: A file, which stays.
        patience: How many seconds to wait at most.

    Raises:
        RPQError: If that was not enough.
    """
    import fcntl  # which Linux has, and this is asked for nowhere else

    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        end, waits = time.monotonic() + patience, True
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waits:
                    _LOG.info("another process is compiling the CPU kernels; waiting for it")
                    waits = False
                if time.monotonic() > end:
                    raise RPQError(
                        f"another process has been compiling for {patience:.0f} s (it holds {lock})"
                    ) from None
                time.sleep(PAUSE)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # also for a child that was forked meanwhile and has the handle too
    finally:
        os.close(handle)


def _sum_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
