"""Timing calls against each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

# A sample lasts about this long at least, in seconds, so that the clock and waiting for the device cost little of it.
SAMPLE = 1e-3
MOST_CALLS = 100


def in_turns(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> list[float]:
    """Median time of each call, measured alternately, so that other work of the machine slows all of them alike.

    Each runs once before, since first calls load kernels and fill caches. Short calls are repeated within a sample.

    Args:
        calls: What is timed.
        device: Where they run; it is waited for before the clock is read.
        repeats: Samples of each.

    Returns:
        Milliseconds, in the order of the calls.
    """
    for call in calls:
        call()
    numbers = []
    for call in calls:
        once = _seconds(call, 1, device)
        numbers.append(max(1, min(MOST_CALLS, round(SAMPLE / max(once, 1e-9)))))
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, number, times in zip(calls, numbers, samples, strict=True):
            times.append(1e3 * _seconds(call, number, device) / number)
    return [statistics.median(times) for times in samples]


def _seconds(call: Callable[[], object], number: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(number):
        call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
