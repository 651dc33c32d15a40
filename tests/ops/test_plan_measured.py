"""The cost model against the clock, through the benchmark that its constants come from."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from rpqfx.ops.cpu import build

BENCH = Path(__file__).parents[2] / "examples" / "bench"
pytestmark = [
    pytest.mark.skipif(not build.ready(), reason="the constants for compiled kernels are what is measured here"),
    pytest.mark.skipif(not BENCH.exists(), reason="needs the examples"),
]
sys.path.insert(0, str(BENCH))


@pytest.mark.parametrize(
    ("numbers", "faster"),
    [
        ((4096, 1024, 64, 256, 256), "contract"),
        ((512, 512, 2, 256, 2048), "expand"),
        ((256, 2048, 8, 256, 2048), "expand"),
    ],
)
def test_a_plan_that_is_several_times_faster_is_taken(numbers: tuple[int, ...], faster: str) -> None:
    """Far from the line where both take the same, so that no machine's load can turn it round."""
    from plans import Case, regret

    expand, contract, taken = regret(Case(*numbers), torch.float32, repeats=3)
    assert taken == faster
    assert (expand > 1.3 * contract) if faster == "contract" else (contract > 1.3 * expand)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_little_time_is_lost_to_the_model(dtype: torch.dtype) -> None:
    """Over the benchmark's products and convolutions; a machine that is not the one measured may lose more."""
    from plans import CONV, LINEAR, regret

    lost = []
    for case in (*LINEAR, *CONV):
        expand, contract, taken = regret(case, dtype)
        lost.append((contract if taken == "contract" else expand) / min(expand, contract))
    assert math.exp(sum(map(math.log, lost)) / len(lost)) < 1.15
    assert max(lost) < 2
