"""What unit Gaussian vectors lose in codes; least possible are 0.0625 at 2 bits and 0.0039 at 4."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rpqfx.codebook import CodebookSpec, expand
from rpqfx.fit import fit_codebooks
from rpqfx.fit.refitting import left_over
from rpqfx.fit.residual import encode
from rpqfx.ops.cpu import build
from tests.helpers import generator


def gaussian(seed: int, vectors: int, d: int) -> Tensor:
    return torch.randn(vectors, d, generator=generator(seed))


def losses(vectors: int, d: int, stages: int, steps: int, beam: int) -> tuple[float, float]:
    """Mean squared error of the vectors that codebooks of 256 entries were fitted to, and of as many others."""
    points, others = gaussian(0, vectors, d), gaussian(1, vectors, d)
    fit = fit_codebooks(points, CodebookSpec(vectors, d, d, 256, stages), steps=steps, beam=beam)
    books = fit.codebooks[:, 0]
    rest = left_over(others, encode(others, books, beam=beam), books)
    return float((expand(*fit) - points).square().mean()), float(rest.square().mean())


def test_two_bits_in_one_stage() -> None:
    fitted, fresh = losses(2**17, 4, stages=1, steps=20, beam=1)
    assert fitted < 0.0975 and fresh < 0.0995


@pytest.mark.skipif(not build.ready(), reason="takes a minute without compiled kernels")
def test_two_bits_in_two_stages() -> None:
    fitted, fresh = losses(2**15, 8, stages=2, steps=4, beam=4)
    assert fitted < 0.0955 and fresh < 0.115


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "bound"), [(2, 0.0955), (4, 0.0087)])
def test_two_and_four_bits_in_stages(stages: int, bound: float) -> None:
    """The bound holds for vectors that were never seen, too."""
    fitted, fresh = losses(2**17, 8, stages, steps=10, beam=8)
    assert fitted < 0.96 * bound and fresh < bound
