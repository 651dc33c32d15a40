"""A job with a checkpoint that is killed at any point, and run again, gives the bits of one that was left alone."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import pytest

from tests.figures import record
from tests.kills import JOBS, run_apart

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")


JOBS_IN_WORDS = {
    "weights alone": "a conversion without calibration",
    "calibrated": "a calibrated conversion",
    "fine-tuned": "`finetune` with changing codes",
}


def check(jobs: list[str], folder: pathlib.Path, count: int) -> list[dict[str, Any]]:
    results = run_apart(jobs, folder, count, seed=0)
    assert [found["job"] for found in results] == jobs
    for found in results:
        assert not found["wrong"], found
        assert found["points"] + found["delays"] + found["late"] == count
        assert found["points"] > 0
    return results


def test_some_are_killed_a_few_times(tmp_path: pathlib.Path) -> None:
    check(["calibrated", "fine-tuned"], tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_it_is_killed_a_hundred_times(job: str, tmp_path: pathlib.Path) -> None:
    [found] = check([job], tmp_path, 100)
    record(
        f"reliability/killed-{job.replace(' ', '-')}",
        "pytest -m slow tests/contracts/test_killed.py",
        attack=f"SIGKILL of a job with a checkpoint, then run again: {JOBS_IN_WORDS[job]}",
        tried=100,
        outcome=f"{found['points']} killed at file operations, {found['delays']} at a random moment, {found['late']} "
        "already over; the bits of an undisturbed run each time",
        counts=found,
        seeds=[0],
    )
