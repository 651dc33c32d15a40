"""A job with a checkpoint that is killed at any point, and run again, gives the bits of one that was left alone."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

import pytest

from tests.kills import JOBS, run_apart

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")


def check(job: str, folder: pathlib.Path, count: int) -> dict[str, object]:
    found = run_apart(job, folder, count, seed=0)
    assert not found["wrong"], found
    assert found["points"] + found["delays"] + found["late"] == count
    assert found["points"] > 0
    return found


@pytest.mark.parametrize("job", ["calibrated", "fine-tuned"])
def test_it_is_killed_a_few_times(job: str, tmp_path: pathlib.Path) -> None:
    check(job, tmp_path, 3)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_it_is_killed_a_hundred_times(
    job: str, tmp_path: pathlib.Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("killed", str(check(job, tmp_path, 100)))
