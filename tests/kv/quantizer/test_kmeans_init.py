"""The k-means start: better with stages, true to weights, and each stage on the groups that have it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given

from rpqfx.errors import InputError
from rpqfx.fit import train
from rpqfx.fit.refitting import left_over
from rpqfx.kv.quantizer import kmeans_init as start_module
from rpqfx.kv.quantizer.kmeans_init import start
from rpqfx.kv.quantizer.quantizer import VectorQuantizer
from tests.helpers import randn, seeds
from tests.kv.helpers import arguments, channels


def error(quantizer: VectorQuantizer, x: torch.Tensor) -> float:
    return float((quantizer.decode(*quantizer.encode(x)).detach() - x).square().mean())


@pytest.mark.few(25)
@given(arguments(dtype=torch.float64), seeds)
def test_each_group_is_served_by_its_own_stages(given: dict[str, Any], seed: int) -> None:
    """The start is no worse than zeros, codebooks that no group uses are zero, and it is the same again."""
    x = randn(seed, 30, given["dim"])
    quantizer = VectorQuantizer(**given).fit(x, seed=seed, steps=3)
    assert torch.equal(quantizer.codebooks, VectorQuantizer(**given).fit(x, seed=seed, steps=3).codebooks)
    if (given["beam"] == 1 or given["use_cosine_sim"]) and given["shared_stages"] == 1:
        assert error(quantizer, x) <= float(x.square().mean()) * (1 + 1e-6)
    for stage in range(quantizer.codebooks.shape[0]):
        for book in range(quantizer.codebooks.shape[1]):
            unused = not given["shared"] and quantizer.layout.stages[book] <= stage * given["shared_stages"]
            assert not unused or not quantizer.codebooks[stage, book].any()


def test_shared_stages_are_trained_on_the_groups_that_have_them() -> None:
    x = randn(0, 200, 8, dtype=torch.float32)
    quantizer = VectorQuantizer(8, codebook_dim=2, codebook_size=8, stages=[1, 3, 0, 3]).fit(x, seed=4)
    groups = [x[:, channels(quantizer, m)] for m in (0, 1, 3)]
    first, codes = train(torch.stack(groups, 1).flatten(0, 1), 1, 8, seed=4)
    torch.testing.assert_close(quantizer.codebooks[0, 0], first[0])
    rests = left_over(torch.stack(groups, 1).flatten(0, 1), codes, first).view(200, 3, 2)[:, 1:].flatten(0, 1)
    later, _ = train(rests, 2, 8, seed=5)
    torch.testing.assert_close(quantizer.codebooks[1:, 0], later)


def test_own_codebooks_are_trained_on_their_group() -> None:
    x = randn(0, 200, 6, dtype=torch.float32)
    quantizer = VectorQuantizer(6, codebook_dim=3, codebook_size=8, stages=2, shared=False, strided=True).fit(x, seed=1)
    for m in range(2):
        torch.testing.assert_close(quantizer.codebooks[:, m], train(x[:, m::2], 2, 8, seed=1 + 2 * m)[0])


def test_points_of_weight_zero_move_nothing() -> None:
    x = randn(0, 300, 8, dtype=torch.float32)
    spoilt = torch.cat([x, x + 50])
    weights = torch.cat([torch.ones(300), torch.zeros(300)])
    for more in ({}, {"use_cosine_sim": True}, {"normalize": True}):
        plain, weighed = (VectorQuantizer(8, codebook_dim=4, codebook_size=16, **more) for _ in range(2))
        plain.fit(x)
        weighed.fit(spoilt, weights)
        assert error(weighed, x) < 1.2 * error(plain, x)
        by_group = torch.ones(300, 2)
        by_group[:, 1] = 0
        weighed.fit(x, by_group)
        now, before = ((q.decode(*q.encode(x)) - x).square().mean(0).view(2, 4).mean(1) for q in (weighed, plain))
        assert now[0] < before[0] and now[1] > before[1]


def test_with_a_scale_it_is_the_error_of_the_points_that_counts() -> None:
    """Vectors a hundred times as long matter ten thousand times as much, by their own factor."""
    x = randn(0, 600, 8, dtype=torch.float32)
    x[:300, :4] = x[:300, :4].abs() * 100
    x[:300, 4:] *= 100
    quantizer = VectorQuantizer(8, codebook_dim=4, codebook_size=16, stages=1, normalize=True, shared=False).fit(x)
    other = VectorQuantizer(8, codebook_dim=4, codebook_size=16, stages=1, normalize=True, shared=False)
    other.fit(x / x.std(1, correction=0, keepdim=True))
    assert error(quantizer, x) < 0.95 * error(other, x)


def test_no_more_than_so_many_points_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(start_module, "SAMPLES", 50)
    monkeypatch.setattr(start_module, "train", lambda points, *args, **more: seen.append(len(points)) or train(
        points, *args, **more
    ))  # fmt: skip
    for shared in (True, False):
        VectorQuantizer(6, codebook_dim=2, codebook_size=4, shared=shared).fit(randn(0, 100, 6, dtype=torch.float32))
    assert seen == [50] * 4
    assert start_module.SAMPLES == 50


def test_counts_are_how_many_points_chose_an_entry() -> None:
    quantizer = VectorQuantizer(6, codebook_dim=2, codebook_size=4, stages=[2, 1, 0], decay=0.9)
    x = randn(0, 100, 6, dtype=torch.float32)
    books, counts = start(
        quantizer.layout.split(x), None, quantizer.layout, beam=1, use_cosine_sim=False, seed=0, steps=5
    )  # fmt: skip
    assert counts.sum(-1).tolist() == [[200], [100]]
    assert books.shape == (2, 1, 4, 2)
    quantizer.fit(x)
    torch.testing.assert_close(quantizer.ema_sums / quantizer.ema_counts[..., None], quantizer.codebooks.detach())


def test_what_cannot_be_clustered_is_refused() -> None:
    quantizer = VectorQuantizer(6, codebook_dim=2)
    with pytest.raises(InputError, match="no points"):
        quantizer.fit(torch.zeros(0, 6))
    with pytest.raises(InputError, match="finite and not negative"):
        quantizer.fit(torch.zeros(3, 6), -torch.ones(3))


@pytest.mark.parametrize("more", [{}, {"use_cosine_sim": True}, {"shared": False, "stages": [2, 4]}])
def test_a_codebook_of_several_stages_serves_them_all(more: dict[str, Any]) -> None:
    """Better than using it once, and than as many stages of a codebook that was made for one."""
    x = randn(0, 2000, 8, dtype=torch.float32)
    given: dict[str, Any] = {"codebook_dim": 4, "codebook_size": 16, "stages": 2, "beam": 1, **more}
    once = {**given, "stages": [own // 2 for own in given["stages"]] if isinstance(given["stages"], list) else 1}
    repeated = VectorQuantizer(8, **given, shared_stages=2)
    single = VectorQuantizer(8, **once).fit(x)
    assert repeated.codebooks.shape == single.codebooks.shape and repeated.books.shape[0] == 2 * single.books.shape[0]
    with torch.no_grad():
        repeated.codebooks.copy_(single.codebooks)
    naive = error(repeated, x)
    assert error(repeated.fit(x), x) < 0.92 * min(naive, error(single, x))
    for i in range(0, repeated.books.shape[0], 2):
        assert torch.equal(repeated.books[i], repeated.books[i + 1])
