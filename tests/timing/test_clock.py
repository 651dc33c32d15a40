"""Calls are timed in turns, and the median counts."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from rpqfx.timing import clock

CPU = torch.device("cpu")


class Clock:
    """A clock that calls move on by a given time."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.order = 0.0, []
        patch.setattr(time, "perf_counter", lambda: self.now)

    def call(self, name: str, *seconds: float) -> object:
        left = list(seconds)

        def run() -> None:
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_calls_take_turns_and_the_median_of_each_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call to warm up and one to choose a sample's size count for nothing, nor does one slow or one fast sample."""
    made = Clock(monkeypatch)
    calls = [made.call("a", 9.0, 9.0, 0.002, 0.5, 0.001), made.call("b", 9.0, 9.0, 0.004)]
    assert clock.in_turns(calls, CPU, 3) == pytest.approx([2.0, 4.0])
    assert made.order == ["a", "b"] * 5


def test_short_calls_are_repeated_within_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Clock(monkeypatch)
    calls = [made.call("a", clock.SAMPLE / 8), made.call("b", 1e-9), made.call("c", 3 * clock.SAMPLE)]
    found = clock.in_turns(calls, CPU, 2)
    assert found == pytest.approx([1e3 * clock.SAMPLE / 8, 1e-6, 3e3 * clock.SAMPLE])
    one = ["a"] * 8 + ["b"] * clock.MOST_CALLS + ["c"]
    assert made.order == ["a", "b", "c"] * 2 + one * 2


def test_a_real_clock_gives_at_least_what_a_call_sleeps() -> None:
    """In milliseconds. What more there is depends on what else the machine does."""
    nothing, short, longer = clock.in_turns([lambda: None, *(partial(time.sleep, s) for s in (3e-3, 6e-3))], CPU, 3)
    assert nothing > 0 and short >= 3 and longer >= 6


def test_other_devices_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the clock is read, at both ends."""
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    clock.in_turns([lambda: waited.append("call")], torch.device("cuda", 1), 1)
    device = torch.device("cuda", 1)
    assert waited[:4] == ["call", device, "call", device]
    assert waited[4] == waited[-1] == device and set(waited[5:-1]) == {"call"}
