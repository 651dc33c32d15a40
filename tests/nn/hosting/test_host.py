"""Backing a Parameter keeps everything else of a module as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpqfx.codebook import CodebookSpec
from rpqfx.errors import RewriteError
from rpqfx.nn import RPQLinear, RPQWeight, VirtualWeight
from rpqfx.nn.hosting.backed import backed_weights, weight_of
from rpqfx.nn.hosting.host import back, backed_as, layer_for
from tests.helpers import assert_same, dense_twin, gradients, randn, randomise


class Projection(nn.Module):
    """A module of somebody else's, with two weights of its own."""

    constant = 3

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(randn(0, 6, 8))
        self.v = nn.Parameter(randn(1, 6, 8))
        self.b = nn.Parameter(randn(2, 6))
        self.register_buffer("shift", torch.ones(6, dtype=torch.float64))
        self.note = ["kept"]

    def forward(self, x: Tensor, flip: bool = False) -> Tensor:
        if flip:
            return x @ (self.w * 2 + self.v).T + self.b
        return F.linear(x, self.w, self.b) + self.shift + x @ self.v.t()

    def method(self) -> str:
        return type(self).__name__


class Final(Projection):
    """A class that does not let itself be extended."""

    def __init_subclass__(cls) -> None:
        raise TypeError("no heirs")


def hold(tensor: Tensor, seed: int = 0) -> RPQWeight:
    spec = CodebookSpec(*tensor.shape, 4, entries=4)
    return randomise(RPQWeight(spec, dtype=tensor.dtype), seed)


def backed(names: tuple[str, ...] = ("w",)) -> Projection:
    module = Projection()
    back(module, {name: hold(getattr(module, name), i) for i, name in enumerate(names)})
    return module


@pytest.mark.parametrize("names", [("w",), ("v",), ("w", "v")])
@pytest.mark.parametrize("flip", [False, True])
def test_the_module_computes_the_same_with_the_expanded_weights(names: tuple[str, ...], flip: bool) -> None:
    """In both branches of its forward, in value and gradient."""
    module = backed(names)
    leaves, weights, factors = dense_twin(module)
    x = randn(3, 4, 8)
    ours = module(x, flip)
    theirs = torch.func.functional_call(Projection(), {**weights, "shift": module.shift}, (x, flip))
    assert_same(ours, theirs)
    expected = gradients(theirs, leaves, factors=factors)
    for name, grad in gradients(ours, dict(module.named_parameters())).items():
        assert_same(grad, expected[name], name)


def test_the_object_stays_itself() -> None:
    """Class name, isinstance, class attributes, methods, hooks, flags, buffers, other Parameters."""
    module = Projection().eval()
    calls = []
    module.register_forward_hook(lambda *args: calls.append(1))
    b, state = module.b, vars(module)
    back(module, {"w": hold(module.w)})
    assert vars(module) is state and module.b is b and module.note == ["kept"]
    assert isinstance(module, Projection)
    assert type(module).__name__ == "Projection" and type(module).__module__ == Projection.__module__
    assert module.method() == "Projection" and module.constant == 3 and type(module).__doc__ == Projection.__doc__
    assert not module.training
    module(randn(0, 2, 8))
    assert calls == [1]
    assert set(module.state_dict()) == {"w_rpq.codebooks", "w_rpq.codes", "v", "b", "shift"}
    assert isinstance(module.w, VirtualWeight) and "w" not in dict(module.named_parameters())
    assert weight_of(module, "w") is module.w_rpq and weight_of(module, "v") is None
    assert type(Projection().w) is nn.Parameter


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_backed_too(how: object) -> None:
    module = backed(("w", "v"))
    module.v_rpq.plan = "lookup"
    other = how(module)
    assert (other.w_rpq.plan, other.v_rpq.plan) == ("auto", "lookup")
    x = randn(1, 2, 8)
    assert type(other) is type(module) and other.note == ["kept"] and other.note is not module.note
    assert torch.equal(other(x), module(x))
    with torch.no_grad():
        other.w_rpq.codebooks.add_(1)
    assert not torch.equal(other(x), module(x))
    assert isinstance(other.w, VirtualWeight)


def test_backing_twice_adds_up() -> None:
    """One Parameter after the other gives what both at once give."""
    once, twice = backed(("w", "v")), backed(("w",))
    back(twice, {"v": hold(twice.v, 1)})
    assert type(once) is type(twice)
    assert set(backed_weights(twice)) == {"w", "v"}
    x = randn(1, 2, 8)
    assert torch.equal(once(x), twice(x))
    assert torch.equal(pickle.loads(pickle.dumps(twice))(x), twice(x))


def test_one_class_for_all_modules_of_a_kind() -> None:
    assert type(backed()) is type(backed())
    assert type(backed()) is not type(backed(("v",)))


def test_strict_loading_of_the_promised_keys() -> None:
    module, other = backed(), backed()
    with torch.no_grad():
        other.w_rpq.codebooks.zero_()
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other(randn(0, 2, 8)), module(randn(0, 2, 8)))


def test_a_torch_layer_becomes_its_namesake() -> None:
    dense = nn.Linear(8, 6, dtype=torch.float64)
    back(dense, {"weight": hold(dense.weight)})
    assert type(dense) is RPQLinear and layer_for(nn.Linear) is RPQLinear
    x = randn(0, 3, 8)
    assert_same(dense(x), x @ dense.weight.T + dense.bias)


def test_a_subclass_of_a_torch_layer_keeps_its_forward() -> None:
    module = Doubled(8, 6, dtype=torch.float64)
    back(module, {"weight": hold(module.weight)})
    assert isinstance(module, Doubled) and type(module).__name__ == "Doubled"
    x = randn(0, 3, 8)
    assert_same(module(x), 2 * (x @ module.weight.expand_dense().T + module.bias))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_what_cannot_be_backed_is_refused_and_left_alone() -> None:
    module = Projection()
    with pytest.raises(RewriteError, match="Projection has no Parameter 'absent' of its own"):
        back(module, {"absent": hold(module.w)})
    with pytest.raises(RewriteError, match="Projection has no Parameter 'absent'"):
        back(module, {"w": hold(module.w), "absent": hold(module.w)})
    assert type(module) is Projection and type(module.w) is nn.Parameter
    module.w_rpq = "taken"
    with pytest.raises(RewriteError, match="already has an attribute 'w_rpq'"):
        back(module, {"w": hold(module.w)})
    assert type(module) is Projection


def test_a_class_that_cannot_be_extended_is_refused_and_left_alone() -> None:
    module = Final()
    with pytest.raises(RewriteError, match="Final cannot take on quantized Parameters: no heirs"):
        back(module, {"w": hold(module.w)})
    assert type(module) is Final and type(module.w) is nn.Parameter


def test_backed_as_tells_the_class_and_changes_nothing() -> None:
    module = Projection()
    found = backed_as(module, ["w"])
    assert type(module) is Projection and type(module.w) is nn.Parameter
    back(module, {"w": hold(module.w)})
    assert type(module) is found


def test_assigning_a_backed_parameter_is_refused() -> None:
    module = backed()
    with pytest.raises(RewriteError, match=r"Projection.w is quantized .* train or load w_rpq"):
        module.w = nn.Parameter(torch.zeros(6, 8))
    module.v = nn.Parameter(torch.zeros(6, 8, dtype=torch.float64))
    assert not module.v.any()


def test_a_parameter_that_was_added_to_a_torch_layer_stays_readable() -> None:
    """RPQLinear knows its own weight only; with a stranger among them the layer is backed as any other module."""
    layer = nn.Linear(8, 16)
    layer.extra = nn.Parameter(torch.randn(16, 8))
    spec = CodebookSpec(16, 8, 4, entries=4)
    back(layer, {name: RPQWeight.from_dense(getattr(layer, name), spec) for name in ("weight", "extra")})
    assert isinstance(layer, nn.Linear)
    torch.testing.assert_close(layer(torch.eye(8)) - layer.bias, layer.weight_rpq().t())
    torch.testing.assert_close(layer.extra + 0, layer.extra_rpq())
