"""Runs side by side: the order of keys, what is handed over, and that nothing stays behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpqfx.conversion.parallel_runs import Lockstep, RunError


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def lowest(keys: Collection[Any]) -> Any:
    return min(keys, default=None)


def together(
    paths: Sequence[Sequence[int]], handle: Callable[[Any, dict[int, Any]], None] | None = None
) -> tuple[list[tuple[int, list[int]]], list[list[str]]]:
    """Jobs that stop for the keys of their paths; what was handled, and what each job saw and did in between."""
    handled: list[tuple[int, list[int]]] = []
    traces: list[list[str]] = [[] for _ in paths]
    state = {"handled": 0}

    def job(number: int) -> Callable[[], None]:
        def run() -> None:
            for key in paths[number]:
                steps.stop(key, (number, key))
                traces[number].append(f"{key} after {state['handled']}")

        return run

    steps: Lockstep[tuple[int, int]] = Lockstep([job(number) for number in range(len(paths))])

    def taken(key: Any, seen: dict[int, tuple[int, int]]) -> None:
        assert all(value == (number, key) for number, value in seen.items())
        state["handled"] += 1
        handled.append((key, sorted(seen)))
        if handle is not None:
            handle(key, seen)

    steps.run(taken, lowest)
    return handled, traces


def test_all_jobs_meet_at_every_key() -> None:
    handled, traces = together([[1, 2, 3]] * 3)
    assert handled == [(1, [0, 1, 2]), (2, [0, 1, 2]), (3, [0, 1, 2])]
    assert traces == [["1 after 1", "2 after 2", "3 after 3"]] * 3


def test_jobs_may_skip_keys_or_have_none() -> None:
    handled, _ = together([[1, 3], [2, 3], [], [3, 1]])
    assert handled == [(1, [0]), (2, [1]), (3, [0, 1, 3]), (1, [3])]


def test_no_jobs_are_over_at_once() -> None:
    assert together([]) == ([], [])
    assert together([[], []]) == ([], [[], []])


@given(st.lists(st.lists(st.integers(0, 5), max_size=5), max_size=4))
def test_every_stop_is_handled_once_lowest_key_first(paths: list[list[int]]) -> None:
    handled, traces = together(paths)
    assert [len(trace) for trace in traces] == [len(path) for path in paths]
    at = [0] * len(paths)
    for key, numbers in handled:
        waiting = {n: path[at[n]] for n, path in enumerate(paths) if at[n] < len(path)}
        assert key == min(waiting.values()) and numbers == [n for n, where in waiting.items() if where == key]
        for number in numbers:
            at[number] += 1
    assert at == [len(path) for path in paths]


def test_a_key_that_no_job_waits_for_can_be_handled() -> None:
    handled: list[tuple[Any, list[int]]] = []
    steps: Lockstep[None] = Lockstep([lambda: steps.stop(1, None)])

    def choose(keys: Collection[Any]) -> Any:
        return 0 if not handled else (2 if not keys and len(handled) == 2 else lowest(keys))

    steps.run(lambda key, seen: handled.append((key, list(seen))), choose)
    assert handled == [(0, []), (1, [0]), (2, [])]


def test_one_job_runs_at_a_time() -> None:
    running = threading.Lock()

    def job() -> None:
        for key in range(20):
            assert running.acquire(blocking=False)
            sum(range(2000))
            running.release()
            steps.stop(key, None)

    steps: Lockstep[None] = Lockstep([job] * 4)
    steps.run(lambda key, seen: None, lowest)


@pytest.mark.parametrize("wrong", [0, 1, 2])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_job_that_raises_is_named_and_ends_the_others(wrong: int, at: int) -> None:
    went_on = []

    def job(number: int) -> Callable[[], None]:
        def run() -> None:
            for key in range(3):
                if (number, key) == (wrong, at):
                    raise ValueError("no")
                steps.stop(key, None)
            went_on.append(number)

        return run

    steps: Lockstep[None] = Lockstep([job(number) for number in range(3)])
    with pytest.raises(RunError) as caught:
        steps.run(lambda key, seen: None, lowest)
    assert caught.value.number == wrong and isinstance(caught.value.__cause__, ValueError)
    assert not went_on


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_handler_that_raises_ends_all(error: type[BaseException]) -> None:
    def handle(key: Any, seen: dict[int, Any]) -> None:
        if key == 2:
            raise error("stop")

    with pytest.raises(error, match="stop"):
        together([[1, 2, 3], [1, 3], [2]], handle)


def test_jobs_that_are_given_up_clean_up_behind_them() -> None:
    closed = []

    def job() -> None:
        try:
            steps.stop(1, None)
        except Exception:  # as a model's fallback would: what gives a run up must not end here
            closed.append("caught")
        finally:
            closed.append("closed")

    steps: Lockstep[None] = Lockstep([job, job])

    def handle(key: Any, seen: dict[int, Any]) -> None:
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        steps.run(handle, lowest)
    assert closed == ["closed", "closed"]


def test_jobs_run_without_gradients_and_under_the_callers_autocast() -> None:
    found = []

    def job() -> None:
        found.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))

    for enabled, dtype in ((True, torch.bfloat16), (True, torch.float16), (False, torch.bfloat16)):
        with torch.autocast("cpu", dtype, enabled):
            expected = (False, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
            Lockstep([job]).run(lambda key, seen: None, lowest)
        assert found.pop() == expected
