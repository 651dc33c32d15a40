"""Moving averages: the formulas, padding, dead entries, and several ranks that stay one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, multiprocessing

from rpqfx.kv.quantizer import ema
from rpqfx.kv.quantizer.encode import walk
from rpqfx.kv.quantizer.quantizer import VectorQuantizer
from tests.helpers import generator, randn, seeds
from tests.kv.helpers import arguments, made, naive_rests


def scaled(quantizer: VectorQuantizer, x: Tensor) -> Tensor:
    scale = x.std(1, correction=0, keepdim=True) if quantizer.normalize else torch.ones(len(x), 1)
    return x / torch.where(scale == 0, 1, scale).to(x)


def error(quantizer: VectorQuantizer, x: Tensor) -> float:
    return float((quantizer.decode(*quantizer.encode(x)).detach() - x).square().mean())


def naive_step(quantizer: VectorQuantizer, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codebooks, counts and sums after a step of training, by loops, in float64."""
    decay, shared = quantizer.decay, quantizer.layout.shared
    assert decay is not None
    counts, sums = (torch.zeros_like(t, dtype=torch.float64) for t in (quantizer.ema_counts, quantizer.ema_sums))
    codes = quantizer.encode(x).codes.long()
    for vector, code, counted in zip(scaled(quantizer, x), codes, mask.tolist(), strict=True):
        for rest, k, group, stage in zip(
            naive_rests(quantizer, vector, code), code.tolist(), *quantizer.slots, strict=True
        ):
            where = (stage // quantizer.shared_stages, 0 if shared else group, k)
            counts[where] += counted
            sums[where] += rest * counted
    books = quantizer.codebooks.detach().double().clone()
    new_counts, new_sums = quantizer.ema_counts.double(), quantizer.ema_sums.double()
    for stage, group in {where[:2] for where in counts.nonzero().tolist() for where in [tuple(where)]}:
        new_counts[stage, group] = decay * new_counts[stage, group] + (1 - decay) * counts[stage, group]
        new_sums[stage, group] = decay * new_sums[stage, group] + (1 - decay) * sums[stage, group]
        total, entries = new_counts[stage, group].sum(), books.shape[2]
        smooth = (new_counts[stage, group] + 1e-5) / (total + entries * 1e-5) * total
        books[stage, group] = new_sums[stage, group] / smooth[:, None]
    return books, new_counts, new_sums


@given(arguments(dtype=torch.float32), seeds, st.floats(0, 0.99))
def test_a_step_is_the_smoothed_average(given: dict[str, Any], seed: int, decay: float) -> None:
    quantizer = made(seed, **given, decay=decay)
    quantizer._average_from(randn(seed, *quantizer.ema_counts.shape, dtype=torch.float32).exp())
    x = randn(seed + 1, 6, given["dim"], dtype=torch.float32)
    mask = torch.rand(6, generator=generator(seed)) < 0.6
    expected = naive_step(quantizer, x, mask)
    spoilt = x.clone()
    if not given["normalize"]:
        spoilt[~mask] = float("nan")  # padding may hold anything
    quantizer(spoilt, mask)
    for ours, exact in zip((quantizer.codebooks, quantizer.ema_counts, quantizer.ema_sums), expected, strict=True):
        torch.testing.assert_close(ours.detach().double(), exact, rtol=1e-4, atol=1e-5)


def test_counts_are_smoothed() -> None:
    """As if each entry had a little of a point more, the total as it was: no division by zero."""
    counts, sums = torch.tensor([[[0.0, 2e-5, 3.0]]]), torch.tensor([[[[0.0], [4e-5], [6.0]]]])
    codebooks = torch.ones(1, 1, 3, 1)
    batch = ema.Sums(torch.tensor([[[0.0, 0, 4]]]), torch.tensor([[[[0.0], [0], [2]]]]))
    ema.update(codebooks, ema.Sums(counts, sums), batch, decay=0.5)
    assert counts.flatten().tolist() == pytest.approx([0, 1e-5, 3.5])
    total = 3.5 + 1e-5
    smooth = [(count + 1e-5) / (total + 3e-5) * total for count in (0, 1e-5, 3.5)]
    assert codebooks.flatten().tolist() == pytest.approx([0, 2e-5 / smooth[1], 4 / smooth[2]])


def test_evaluation_and_padding_alone_change_nothing() -> None:
    quantizer = made(0, 8, dtype=torch.float32, codebook_size=4, decay=0.9, threshold_ema_dead_code=2.0)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    x = randn(1, 5, 8, dtype=torch.float32)
    quantizer.eval()(x)
    quantizer.train()(x, torch.zeros(5, dtype=torch.bool))
    quantizer(x[:0])
    for name, tensor in quantizer.state_dict().items():
        assert name == "ema_steps" or torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_are_float32_whatever_the_dtype(dtype: torch.dtype) -> None:
    """Rounded codebooks, but averages that small steps add up in, and counts past what float16 can hold."""
    quantizer = made(0, 8, dtype=torch.float32, codebook_size=4, decay=0.9999)
    quantizer.ema_counts.fill_(1e6)
    quantizer.ema_sums.copy_(quantizer.codebooks * 1e6)
    quantizer.to(dtype)
    assert quantizer.codebooks.dtype == dtype
    assert quantizer.ema_counts.dtype == quantizer.ema_sums.dtype == torch.float32
    assert (quantizer.ema_counts == 1e6).all()
    before = quantizer.ema_sums.clone()
    out = quantizer(randn(1, 50, 8, dtype=dtype))
    assert out.values.dtype == dtype and out.loss.dtype == torch.float32
    assert not torch.equal(quantizer.ema_sums, before) and quantizer.codebooks.isfinite().all()


def test_averages_come_to_what_k_means_finds() -> None:
    x = randn(0, 4000, 8, dtype=torch.float32)
    given: dict[str, Any] = {
        "dtype": torch.float32,
        "codebook_size": 16,
        "stages": 2,
        "decay": 0.5,
        "threshold_ema_dead_code": 1.0,
    }
    quantizer, fitted = made(1, 8, **given), made(1, 8, **given).fit(x)
    start = error(quantizer, x)
    for _ in range(30):
        quantizer(x)
    assert error(fitted, x) < 0.7 * start
    assert error(quantizer, x) < 1.05 * error(fitted, x)


# ---------------------------------------------------------------------------------------------- dead entries


@given(arguments(dtype=torch.float32, normalize=False, use_cosine_sim=False), seeds)
def test_dead_entries_become_inputs_with_count_and_sum(given: dict[str, Any], seed: int) -> None:
    quantizer = made(seed, **given, decay=0.5, threshold_ema_dead_code=0.75)
    x = randn(seed + 1, 5, given["dim"], dtype=torch.float32)
    mask = torch.tensor([True, False, True, True, False])
    plain = copy.deepcopy(quantizer)
    plain.threshold_ema_dead_code = 0.0
    codes = plain(x, mask).codes.long()
    shared = quantizer.layout.shared
    before = quantizer.codebooks.clone()
    pools: dict[tuple[int, int], list[Tensor]] = {}
    for vector, code, counted in zip(x, codes, mask.tolist(), strict=True):
        rests = naive_rests(quantizer, vector, code)
        for rest, group, stage in zip(rests, *quantizer.slots, strict=True):
            if counted:
                pools.setdefault((stage // quantizer.shared_stages, 0 if shared else group), []).append(rest)
    quantizer(x, mask)
    for (stage, book), pool in pools.items():
        dead = plain.ema_counts[stage, book] < 0.75
        assert torch.equal(quantizer.ema_sums[stage, book][~dead], plain.ema_sums[stage, book][~dead])
        for k in dead.nonzero()[:, 0].tolist():
            entry = quantizer.codebooks[stage, book, k]
            assert min(float((entry - rest).abs().max()) for rest in pool) < 1e-5
            assert quantizer.ema_counts[stage, book, k] == 0.75
            torch.testing.assert_close(quantizer.ema_sums[stage, book, k], entry * 0.75)
    for stage in range(quantizer.codebooks.shape[0]):
        for book in range(quantizer.codebooks.shape[1]):
            if (stage, book) not in pools:
                assert torch.equal(quantizer.codebooks[stage, book], before[stage, book])


def test_the_points_drawn_are_different_and_not_the_same_at_each_step() -> None:
    quantizer = made(0, 8, codebook_dim=4, codebook_size=32, stages=1, dtype=torch.float32, decay=0.9)
    x = randn(1, 300, 8, dtype=torch.float32)
    slots = quantizer.layout
    steps = list(walk(slots.split(x), quantizer.encode(x).codes, quantizer.codebooks.detach(), slots))
    mask = torch.ones(300, dtype=torch.bool)
    mask[100:200] = False
    drawn = [ema.draw(steps, mask, slots, torch.tensor(number))[0, 0] for number in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    for points in (drawn[0], drawn[2]):
        assert len(points.unique(dim=0)) == 32
        held = (points[:, None] == slots.split(x)[mask].flatten(0, 1)).all(-1)
        assert held.any(1).all()
        half = held.int().argmax(1) < 200  # from the first tokens as from the last
        assert 8 < half.sum() < 24


def test_a_seed_draws_others() -> None:
    x = randn(1, 50, 8, dtype=torch.float32)
    books = []
    for seed in (0, 0, 5):
        quantizer = made(0, 8, dtype=torch.float32, codebook_size=16, decay=0.9, threshold_ema_dead_code=3.0, seed=seed)
        quantizer(x)
        books.append(quantizer.codebooks)
    assert torch.equal(books[0], books[1]) and not torch.equal(books[0], books[2])


def test_entries_that_are_never_chosen_come_back() -> None:
    """Entries far from every point stay there for good, or, revived, serve points."""
    x = randn(0, 500, 4, dtype=torch.float32)
    errors = []
    for revive in (0.0, 1.0):
        quantizer = made(
            1,
            4,
            codebook_dim=4,
            stages=1,
            codebook_size=16,
            dtype=torch.float32,
            decay=0.8,
            threshold_ema_dead_code=revive,
        )
        with torch.no_grad():
            quantizer.codebooks[0, 0, 2:] += 100
        quantizer._average_from(None)
        for _ in range(30):
            loss = quantizer(x).loss
        errors.append(float(loss))
        used = quantizer.encode(x).codes.unique()
        assert len(used) == (16 if revive else 2)
    assert errors[1] < 0.5 * errors[0]


# ------------------------------------------------------------------------------------------------ several ranks


def rank(index: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=2)
    x = randn(5, 40, 8, dtype=torch.float32)
    mask = torch.rand(40, generator=generator(6)) < 0.8
    quantizer = made(
        0,
        8,
        dtype=torch.float32,
        codebook_size=16,
        decay=0.8,
        threshold_ema_dead_code=1.0,
        stages=[2, 1],
        codebook_dim=4,
    )
    for step in range(3):
        # The second time rank 0 has padding only.
        own = slice(0, 25) if index == 0 else slice(25, 40)
        quantizer(x[own] + step, mask[own] & (index == 1 or step != 1))
    torch.save(quantizer.state_dict(), f"{results}/{index}.pt")
    plain = made(0, 8, dtype=torch.float32, codebook_size=16, decay=0.8)
    plain(x[own], mask[own])
    torch.save(plain.state_dict(), f"{results}/plain{index}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_ranks_are_one(tmp_path: Path) -> None:
    """All ranks hold the same, and without dead entries what one rank with all tokens would hold."""
    multiprocessing.spawn(rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for name in ("", "plain"):
        ours, other = (torch.load(tmp_path / f"{name}{index}.pt") for index in range(2))
        assert all(torch.equal(ours[key], other[key]) for key in ours)
    quantizer = made(0, 8, dtype=torch.float32, codebook_size=16, decay=0.8)
    quantizer(randn(5, 40, 8, dtype=torch.float32), torch.rand(40, generator=generator(6)) < 0.8)
    for key, tensor in quantizer.state_dict().items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-5, atol=1e-6)
