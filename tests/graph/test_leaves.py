"""What was given to ``leaf`` is not traced, and its weights are found all the same."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import Policy, Rule
from rpqfx.errors import InputError
from rpqfx.graph import capture, find_sites, leaf, whole_graph
from tests.models import SMALL, quantized_weights


class Counting(nn.Module):
    """Counts each run of its forward where nothing is undone afterwards."""

    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.w = nn.Linear(16, 16), nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        Counting.runs += 1
        return self.fc(x) @ self.w


@leaf
class Marked(Counting):
    pass


class Heir(Marked):
    pass


@pytest.fixture(autouse=True)
def fresh() -> None:
    Counting.runs = 0


@pytest.mark.parametrize("build", [lambda: leaf(Counting()), Marked, Heir], ids=["instance", "class", "subclass"])
def test_a_leafs_forward_never_runs(build: type[nn.Module]):
    model = nn.Sequential(build(), nn.Linear(16, 16))
    captured = capture(model)
    assert Counting.runs == 0 and captured.graphs["0"].graphs == () and captured.opaque == {}
    sites = {site.name: site.kind for site in find_sites(captured)}
    assert sites == {"0.w": "parameter", "0.fc.weight": "linear", "1.weight": "linear"}
    small = rpqfx.rpqify(model, SMALL)
    assert Counting.runs == 0 and set(quantized_weights(small)) == set(sites)
    x = torch.randn(2, 16)
    torch.testing.assert_close(small(x), small[1](small[0].fc(x) @ small[0].w_rpq()))


def test_others_of_the_class_are_read():
    leaf(Counting())
    model = nn.Sequential(Counting())
    assert capture(model).graphs["0"].graphs and Counting.runs > 0


def test_a_leaf_stays_one_in_copies_and_pickles():
    module = leaf(Counting())
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert capture(again).graphs[""].graphs == ()
    assert set(module.state_dict()) == set(Counting().state_dict())
    rpqfx.check_outputs(rpqfx.rpqify(nn.Sequential(module), SMALL), torch.randn(2, 16))  # works on copies
    assert Counting.runs == 2  # the dense and the rewritten model: no trace


def test_a_leaf_lives_no_longer_than_its_module():
    module = leaf(Counting())
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


class Wrapper(nn.Module):
    """Answers for what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_wrapper_of_a_leaf_is_none():
    assert capture(Wrapper(leaf(Counting()))).graphs[""].graphs


def test_a_leaf_is_one_node_of_the_whole_graph():
    graph = whole_graph(rpqfx.rpqify(nn.Sequential(leaf(Counting()), nn.Linear(16, 16)), SMALL))
    assert [str(node.target) for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]


def test_leaf_returns_what_it_was_given_and_refuses_anything_else():
    module = Counting()
    assert leaf(module) is module
    with pytest.raises(InputError, match="leaf takes a module or a class of modules, got 3"):
        leaf(3)
    with pytest.raises(InputError, match="leaf takes a module or a class of modules"):
        leaf(dict)


def test_a_rule_keeps_a_site_out_and_the_report_says_why():
    rules = (Rule("0.w", skip="its owner said so"),)
    small = rpqfx.rpqify(nn.Sequential(Counting()), Policy(codebook_dim=4, codebook_bits=2, min_size=64, rules=rules))
    made = rpqfx.report(small)
    assert {record.name: record.reason for record in made.skipped} == {"0.w": "its owner said so"}
    assert "left: its owner said so" in str(made) and type(small[0].w) is nn.Parameter
