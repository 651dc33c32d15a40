"""The line that shows progress: on a terminal, in a file, and what callers may ask for."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest

from rpqfx.reporting import progress
from rpqfx.reporting.progress import Line, shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_a_file_gets_a_line_for_every_tenth(clock: Callable[[float], None]) -> None:
    file = io.StringIO()
    line = Line(file)
    for done in range(1, 41):
        clock(1)
        line(done, 40, f"w{done}")
    lines = file.getvalue().splitlines()
    assert [text.split(" ")[0] for text in lines] == [f"{done}/40" for done in range(4, 41, 4)]
    assert "\r" not in file.getvalue() and lines[-1].startswith("40/40 w40, ") and lines[-1].endswith(", 0 s left")


def test_few_steps_get_a_line_each(clock: Callable[[float], None]) -> None:
    file = io.StringIO()
    line = Line(file)
    for done in (1, 2, 3):
        line(done, 3, "w")
    assert len(file.getvalue().splitlines()) == 3


def test_the_time_left_follows_from_the_time_passed(clock: Callable[[float], None]) -> None:
    file = io.StringIO()
    line = Line(file)
    line(1, 10, "a")
    for done in (2, 3, 4, 5):
        clock(30)
        line(done, 10, "a")
    assert file.getvalue().splitlines()[-1] == "5/10 a, 2 min 00 s so far, 2 min 00 s left"


def test_another_phase_starts_anew(clock: Callable[[float], None]) -> None:
    file = io.StringIO()
    line = Line(file)
    for total in (2, 4, 4):
        for done in range(1, total + 1):
            clock(10)
            line(done, total, "a")
    lines = file.getvalue().splitlines()
    assert [text for text in lines if "/" in text and text.startswith("1/")] == [
        "1/2 a, 0 s so far, 0 s left", "1/4 a, 0 s so far, 0 s left", "1/4 a, 0 s so far, 0 s left"
    ]  # fmt: skip
    assert lines[-1] == "4/4 a, 30 s so far, 0 s left"


def test_a_terminal_shows_one_line_over_and_over(clock: Callable[[float], None]) -> None:
    file = Terminal()
    line = Line(file)
    line(1, 100, "first")
    for done in range(2, 100):
        clock(0.05)
        line(done, 100, "a long name" if done < 50 else "short")
    shown_so_far = file.getvalue().split("\r")[1:]
    assert 10 < len(shown_so_far) < 30 and "\n" not in file.getvalue()
    line(100, 100, "end")
    last = file.getvalue().split("\r")[-1]
    assert last.startswith("100/100 end") and last.endswith("\n")
    widths = [len(text.rstrip("\n")) for text in file.getvalue().split("\r")[1:]]
    texts = [text.rstrip() for text in file.getvalue().split("\r")[1:]]
    assert all(now >= len(before) for now, before in zip(widths[1:], texts, strict=False))  # nothing of it is left


@pytest.mark.parametrize(
    ("asked", "quiet", "terminal", "wanted"),
    [
        (True, True, False, True), (True, False, True, True), (False, False, True, False), (None, False, True, True),
        (None, False, False, False), (None, True, True, False),
    ],
)  # fmt: skip
def test_who_asks_gets_a_line(
    asked: bool | None, quiet: bool, terminal: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    assert isinstance(shown(asked, quiet), Line) == wanted


def test_a_callers_own_is_taken_as_it_is() -> None:
    calls = []
    own = shown(lambda *args: calls.append(args), quiet=True)
    assert own is not None
    own(1, 2, "a")
    assert calls == [(1, 2, "a")]
