"""What the output feels of inputs, outputs and tables, held against autograd on the dense tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rpqfx
from rpqfx.conversion import gradients
from rpqfx.conversion.dense_weight import StandIn
from rpqfx.conversion.gradients import Gradients
from rpqfx.conversion.moments import input_rows
from rpqfx.conversion.observe import Observer
from rpqfx.conversion.row_weights import limited
from rpqfx.graph.calibration.probe import probe
from rpqfx.nn.layout import Layout
from tests.helpers import randn, seeds


def stand_in(tensor: Tensor, transposed: bool = False) -> StandIn:
    layout = Layout(tuple(tensor.shape), transposed=transposed)
    return StandIn(rpqfx.CodebookSpec(layout.num_vectors, layout.dim, 2, 4), layout, tensor, Observer(()))


def heard(weights: Sequence[StandIn], runs: Sequence[Callable[[], Any]], seed: int = 0) -> Gradients:
    found = Gradients(nn.ModuleList(weights), weights, seed)
    found.watch(runs, lambda number: None)
    return found


def felt(run: Callable[..., Tensor], *results: int, seed: int = 0) -> Tensor:
    """The gradient of a result ``z`` of zeros of that shape that is added within a run."""
    z = torch.zeros(results, dtype=torch.float64, requires_grad=True)
    loss = probe(run(z), seed)
    assert loss is not None
    return torch.autograd.grad(loss, z)[0]


@given(seeds)
def test_rows_and_outputs_are_those_of_the_gradients(seed: int) -> None:
    weight, after, x = stand_in(randn(seed, 6, 8)), randn(seed + 1, 3, 6), randn(seed + 2, 2, 5, 8)
    found = heard([weight], [lambda: F.linear(torch.tanh(weight.linear(x)), after)])
    grad = felt(lambda z: F.linear(torch.tanh(F.linear(x, randn(seed, 6, 8)) + z), after), 2, 5, 6).view(-1, 6)
    energy = grad.square().mean(1)
    kept = energy.clamp_max(4 * energy.mean())
    rows = found.rows.of(weight, 0, 0)
    assert rows is not None
    torch.testing.assert_close(rows.double(), 0.8 * kept / kept.mean() + 0.2, rtol=1e-2, atol=1e-2)
    scaled = grad * (kept / energy).sqrt()[:, None]
    wanted, total = scaled.t() @ scaled, found.outputs[weight].total
    assert total is not None
    torch.testing.assert_close(total.double(), wanted, rtol=1e-2, atol=1e-3 * float(wanted.abs().max()))
    assert found.sums[weight] == pytest.approx(float(grad.square().mean()), rel=1e-5)


@given(seeds, st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.booleans())
def test_places_of_a_convolution_weigh_what_their_outputs_feel(
    seed: int, groups: int, stride: int, batched: bool
) -> None:
    tensor = randn(seed, 4, 2, 3)
    weight = stand_in(tensor)
    x = randn(seed + 1, *((2,) if batched else ()), 2 * groups, 7)
    geometry = ((stride,), (1,), (1,), groups, False, None)
    found = heard([weight], [lambda: torch.tanh(weight.conv(x, None, *geometry))])
    shape = F.conv1d(x, tensor, None, stride, 1, 1, groups).shape
    grad = felt(lambda z: torch.tanh(F.conv1d(x, tensor, None, stride, 1, 1, groups) + z), *shape)
    grad = grad if batched else grad[None]
    energy = grad.unflatten(1, (groups, -1)).square().mean(2).flatten()
    rows = found.rows.of(weight, 0, 0)
    assert rows is not None and len(rows) == sum(map(len, input_rows("conv", x, weight.layout, geometry)))
    kept = energy.clamp_max(4 * energy.mean())
    torch.testing.assert_close(rows.double(), 0.8 * kept / kept.mean() + 0.2, rtol=1e-2, atol=1e-2)
    assert (weight in found.outputs) == (groups == 1)


@given(seeds, st.booleans())
def test_a_table_has_the_metric_of_what_it_gives(seed: int, tied: bool) -> None:
    tensor, ids = randn(seed, 9, 4), torch.tensor([[1, 4, 4], [0, 8, 2]])
    weight = stand_in(tensor)

    def run(rows: Callable[[Tensor], Tensor], last: Callable[[Tensor], Tensor]) -> Tensor:
        hidden = torch.tanh(rows(ids))
        return last(hidden) if tied else hidden

    found = heard([weight], [lambda: run(weight.lookup, weight.linear)]).tables[weight].mean
    grad = felt(lambda z: run(lambda i: tensor[i] + z, lambda h: F.linear(h, tensor)), 2, 3, 4).view(-1, 4)
    energy = grad.square().mean(1)
    grad = grad * (limited(energy) / energy).sqrt()[:, None]
    wanted = grad.t() @ grad / 9
    if tied:
        hidden = torch.tanh(tensor[ids]).view(-1, 4)
        out = felt(lambda z: F.linear(torch.tanh(tensor[ids]), tensor) + z, 2, 3, 9).view(-1, 9)
        wanted += (hidden * limited(out.square().mean(1))[:, None]).t() @ hidden
    assert found is not None
    torch.testing.assert_close(found.double() / found.trace(), wanted / wanted.trace(), rtol=1e-4, atol=1e-5)


def test_wide_outputs_are_left_out_and_long_ones_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = stand_in(randn(0, 6, 8)), randn(1, 40, 8)
    monkeypatch.setattr(gradients, "_GRADIENT_ELEMENTS", 60)
    monkeypatch.setattr(gradients, "_GRADIENTS_PER_VECTOR", 2)
    found = heard([weight], [lambda: weight.linear(x)] * 2)
    assert 12 <= found.outputs[weight].rows <= 14
    monkeypatch.setattr(gradients, "_MOST_VECTORS", 5)
    assert not heard([weight], [lambda: weight.linear(x)]).outputs


def test_a_part_of_the_vectors_has_rows_and_no_outputs() -> None:
    weight, x = stand_in(randn(0, 6, 8)), randn(1, 5, 8)

    def run() -> Tensor:
        part = weight.part().narrow(0, 0, 2)
        assert part is not None
        return part.linear(x)

    found = heard([weight], [run])
    assert not found.outputs and found.rows.of(weight, 0, 0) is not None


@pytest.mark.parametrize("transposed", [False, True])
def test_outputs_that_lie_along_the_vectors_are_not_of_one_vector_each(transposed: bool) -> None:
    weight, x = stand_in(randn(0, 8, 8), transposed), randn(1, 5, 8)
    found = heard([weight], [lambda: weight.linear(x) if transposed else weight.linear_t(x)])
    assert not found.outputs and found.rows.of(weight, 0, 0) is None and found.sums[weight] > 0


def test_gradients_that_are_not_finite_say_nothing() -> None:
    weight, x = stand_in(randn(0, 6, 8)), randn(1, 5, 8)

    def run() -> Tensor:
        y = weight.linear(x)
        return torch.cat([y[:4], (y[4:] - y[4:].detach()).sqrt()])  # whose gradient is infinite

    found = heard([weight], [run])
    rows, outputs = found.rows.of(weight, 0, 0), found.outputs[weight].total
    assert rows is not None and float(rows[4]) == pytest.approx(0.2) and outputs is not None
    assert bool(torch.isfinite(rows).all()) and bool(torch.isfinite(outputs).all())


def test_no_gradient_is_left_and_flags_stay() -> None:
    weight, other = stand_in(randn(0, 6, 8)), nn.Parameter(torch.zeros(6, dtype=torch.float64))
    model = nn.ParameterList([other])
    Gradients(model, [weight]).watch([lambda: weight.linear(randn(1, 5, 8)) + other], lambda number: None)
    assert other.grad is None and other.requires_grad


def test_outputs_without_gradients_weigh_nothing() -> None:
    weight, x = stand_in(randn(0, 6, 8)), randn(1, 5, 8)
    found = heard([weight], [lambda: weight.linear(x).argmax(-1)])
    assert found.rows.of(weight, 0, 0) is None and not found.outputs and found.seen[weight].moments.rows == 5


def test_the_same_seed_hears_the_same() -> None:
    weight, x = stand_in(randn(0, 6, 8)), randn(1, 5, 8)
    run = lambda: torch.tanh(weight.linear(x))  # noqa: E731
    sums = [heard([weight], [run], seed).outputs[weight].total for seed in (3, 3, 4)]
    assert torch.equal(sums[0], sums[1]) and not torch.equal(sums[0], sums[2])
