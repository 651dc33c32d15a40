"""Batch norms: statistics that are the plain mean over batches, and that stay where nothing comes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rpqfx.graph.calibration.batch_norm import estimate_norms
from tests.helpers import randn


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.BatchNorm1d(5), nn.BatchNorm1d(5, momentum=0.3), nn.BatchNorm1d(5)
        self.plain, self.drop = nn.BatchNorm1d(5, track_running_stats=False), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.plain(self.second(2 * self.first(x) + 1)))


def model() -> Normed:
    made = Normed().eval()
    for norm in (made.first, made.second, made.unused):
        norm.running_mean.fill_(7)
        norm.num_batches_tracked.fill_(9)
    return made


def test_statistics_are_the_mean_over_batches() -> None:
    norms, xs = model(), [randn(i, 6, 5, dtype=torch.float32) * (i + 1) for i in range(3)]
    assert estimate_norms(norms, [lambda x=x: norms(x) for x in xs]) == 3
    torch.testing.assert_close(norms.first.running_mean, torch.stack([x.mean(0) for x in xs]).mean(0))
    torch.testing.assert_close(norms.first.running_var, torch.stack([x.var(0) for x in xs]).mean(0))
    torch.testing.assert_close(norms.second.running_mean, torch.ones(5))
    assert not norms.first.training and not norms.drop.training
    assert (norms.first.momentum, norms.second.momentum) == (0.1, 0.3)


def test_those_that_no_batch_reaches_keep_theirs() -> None:
    norms = model()
    estimate_norms(norms, [lambda: norms(randn(0, 6, 5, dtype=torch.float32))])
    assert bool((norms.unused.running_mean == 7).all()) and int(norms.unused.num_batches_tracked) == 9


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_momenta_and_modes_are_put_back_if_a_run_raises(error: type[BaseException]) -> None:
    norms = model()

    def wrong() -> None:
        norms(randn(0, 6, 5, dtype=torch.float32))
        raise error

    with pytest.raises(error):
        estimate_norms(norms, [wrong])
    assert not any(norm.training for norm in norms.modules())
    assert (norms.first.momentum, norms.second.momentum) == (0.1, 0.3)


def test_without_norms_or_batches_nothing_runs() -> None:
    norms = model()
    assert estimate_norms(norms, []) == 3 and bool((norms.first.running_mean == 7).all())
    assert estimate_norms(nn.Linear(2, 2), [lambda: 1 / 0]) == 0
