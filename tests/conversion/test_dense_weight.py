"""Stand-ins: the dense model while they stand there, what the codebooks say when they have become them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx.conversion.dense_weight import StandIn
from rpqfx.conversion.observe import Observer
from rpqfx.graph import capture, find_sites
from rpqfx.graph.replace import parameter_at, put
from rpqfx.graph.validate import layout_of
from rpqfx.nn import RPQWeight
from rpqfx.nn.layout import Layout
from rpqfx.policies.decide import decide_all
from rpqfx.policies.decision import Quantize
from tests.helpers import generator, naive_tensor, randn, stored_all
from tests.models import CASES, Case, assert_outputs, filled, quantized_weights


class Heard(Observer):
    def __init__(self) -> None:
        super().__init__(())
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def asked(self, weight: RPQWeight, product: str, x: Tensor, layout: Layout, geometry: tuple[Any, ...]) -> None:
        assert isinstance(weight, StandIn) and not x.requires_grad
        self.calls.append((product, tuple(x.shape)))


def with_stand_ins(case: Case) -> tuple[nn.Module, nn.Module, dict[str, StandIn], Heard]:
    """A model, the same with stand-ins, these by name, and what hears of their uses."""
    dense = case.model().eval()
    model = copy.deepcopy(dense)
    captured = capture(model)
    sites = find_sites(captured)
    decisions, _ = decide_all(case.policy, sites)
    heard = Heard()
    made = {
        site.name: StandIn(hold.spec, layout_of(site, hold), parameter_at(model, site.name), heard)
        for site in sites
        if isinstance(hold := decisions[site.name], Quantize)
    }
    put(model, sites, made)
    return dense, model, made, heard


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_model_with_stand_ins_computes_what_the_dense_one_does(case: Case) -> None:
    dense, model, made, heard = with_stand_ins(case)
    assert set(made) == set(case.rewritten)
    args, kwargs = case.arguments()
    assert_outputs(model(*args, **kwargs), dense(*args, **kwargs))
    read_whole = case.name in ("encoder", "padded encoder", "recurrent", "subclassed")
    assert heard.calls or read_whole  # no product of ours: nobody can hear of their inputs


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_they_become_is_what_the_codebooks_say(case: Case) -> None:
    dense, model, made, heard = with_stand_ins(case)
    for number, weight in enumerate(made.values()):
        tensors = stored_all(weight.spec, number)
        factors = {
            name: getattr(tensors, name) for name in ("scale", "column_scale") if getattr(tensors, name) is not None
        }
        weight.become(nn.Parameter(tensors.codebooks * 0.3), tensors.codes, factors)
        assert type(weight) is RPQWeight
        assert not {"vectors", "listener", "trained", "_ids"} & set(weight.__dict__)
    args, kwargs = case.arguments()
    assert_outputs(model(*args, **kwargs), filled(dense, model)(*args, **kwargs))
    assert not heard.calls
    assert set(quantized_weights(model)) == {*case.rewritten, *case.tied}


@pytest.mark.parametrize("transposed", [False, True])
def test_vectors_that_are_rows_in_memory_are_not_copied(transposed: bool) -> None:
    tensor = randn(0, 6, 8)
    layout = Layout((6, 8), transposed=transposed)
    spec = rpqfx.CodebookSpec(layout.num_vectors, layout.dim, 2, 4)
    weight = StandIn(spec, layout, nn.Parameter(tensor), Heard())
    assert (weight.vectors.data_ptr() == tensor.data_ptr()) == (not transposed)
    assert torch.equal(weight(), tensor) and not weight().requires_grad
    assert weight.codebooks.is_meta and weight.codes.is_meta


def test_every_product_is_heard_with_its_input_and_its_result_may_be_changed() -> None:
    class Halving(Heard):
        def made(self, weight: RPQWeight, y: Tensor) -> Tensor:
            return y / 2

    heard = Halving()
    tensor = randn(0, 6, 8)
    weight = StandIn(rpqfx.CodebookSpec(6, 8, 2, 4), Layout((6, 8)), tensor, heard)
    x, y, ids = randn(1, 3, 8).requires_grad_(), randn(2, 2, 6), torch.tensor([1, 5])
    torch.testing.assert_close(weight.linear(x), x @ tensor.t() / 2)
    torch.testing.assert_close(weight.linear_t(y), y @ tensor / 2)
    torch.testing.assert_close(weight.lookup(ids), tensor[ids] / 2)
    torch.testing.assert_close(weight.linear(x, rows=slice(2, 4)), x @ tensor[2:4].t() / 2)
    assert heard.calls == [("linear", (3, 8)), ("linear_t", (2, 6)), ("lookup", (2,)), ("linear", (3, 8))]


@pytest.mark.parametrize("cut", ["narrow", "seen_as", "drop", "take", "experts"])
def test_a_part_that_was_taken_before_is_of_the_codebooks_afterwards(cut: str) -> None:
    layout = Layout((3, 6, 8), experts="shared")
    spec = rpqfx.CodebookSpec(18, 8, 2, 4)
    weight = StandIn(spec, layout, randn(0, 3, 6, 8), Heard())
    whole = weight.part()
    part: Any = {
        "narrow": lambda: whole.narrow(0, 1, 2),
        "seen_as": lambda: whole.seen_as(Layout((18, 8))),
        "drop": lambda: whole.narrow(0, 2, 1).drop(0),
        "take": lambda: whole.take(torch.tensor([2, 0])),
        "experts": lambda: whole.experts()[1],
    }[cut]()
    assert part is not None

    def wanted(tensor: Tensor) -> Tensor:
        return {
            "narrow": tensor[1:], "seen_as": tensor.reshape(18, 8), "drop": tensor[2], "take": tensor[[2, 0]],
            "experts": tensor[1],
        }[cut]  # fmt: skip

    torch.testing.assert_close(part.dense(), wanted(randn(0, 3, 6, 8)))
    codes = torch.randint(4, spec.codes_shape, generator=generator(1))
    weight.become(nn.Parameter(randn(2, *spec.codebooks_shape)), codes, {})
    torch.testing.assert_close(part.dense(), wanted(naive_tensor(weight)))


def test_a_weight_with_signs_has_none_turned() -> None:
    spec = rpqfx.CodebookSpec(6, 8, 2, 4, signs=True)
    weight = StandIn(spec, Layout((6, 8)), randn(0, 6, 8), Heard())
    weight.become(nn.Parameter(randn(1, *spec.codebooks_shape)), torch.zeros(spec.codes_shape, dtype=torch.long), {})
    assert weight.signs is not None and weight.signs.shape == spec.signs_shape and not weight.signs.any()
    assert weight.codes.dtype == spec.code_dtype
    torch.testing.assert_close(weight(), naive_tensor(weight))
