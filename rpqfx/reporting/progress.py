"""Reports the progress of a long piece of work, and how long the rest will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

Progress = Callable[[int, int, str], None]  # gets the number of steps done, that of all, and the last one's name

_APART = 0.2  # seconds between two lines on a terminal


class Line:
    """Shows progress in one line of a terminal; elsewhere, one line for every tenth of the work.

    Args:
        file: Where to; standard error if left out.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file or sys.stderr
        self._start = self._shown = time.perf_counter()
        self._phase = (0, 0)
        self._width = 0

    def __call__(self, done: int, total: int, name: str) -> None:
        """Shows that ``done`` of ``total`` steps are made, the last of them ``name``."""
        now = time.perf_counter()
        if total != self._phase[1] or done <= self._phase[0]:  # something else is counted now
            self._start = self._shown = now
        self._phase = (done, total)
        passed = now - self._start
        left = passed / done * (total - done) if done else 0.0
        text = f"{done}/{total} {name}, {_span(passed)} so far, {_span(left)} left"
        if self._file.isatty():
            if done < total and now - self._shown < _APART:
                return
            self._file.write("\r" + text.ljust(self._width) + ("\n" if done == total else ""))
            self._width = len(text)
        elif done == total or done * 10 // total > (done - 1) * 10 // total:
            self._file.write(text + "\n")
        self._shown = now
        self._file.flush()


def shown(progress: Progress | bool | None, quiet: bool) -> Progress | None:
    """Returns the callback that a caller's ``progress`` stands for, or None.

    Args:
        progress: A callable, True for a [`Line`][rpqfx.reporting.progress.Line], False for nothing, None for a line
            where work is long and somebody watches.
        quiet: Whether the work is not long.
    """
    if progress is None:
        progress = not quiet and sys.stderr.isatty()
    if isinstance(progress, bool):
        return Line() if progress else None
    return progress


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
