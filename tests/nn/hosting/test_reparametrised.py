"""Weights that torch computes from Parameters of other names: those Parameters are held, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rpqfx
from rpqfx import Policy, Rule
from rpqfx.errors import RewriteError
from rpqfx.graph.copying import copy_model
from rpqfx.nn import RPQLinear
from rpqfx.nn.hosting.reparametrised import computed_from, hooked, parametrised_at
from tests.models import SMALL, quantized_weights

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
either_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def orthogonal(kind: str, trivial: bool) -> Callable[[nn.Module], nn.Module]:
    return lambda m: parametrizations.orthogonal(m, orthogonal_map=kind, use_trivialization=trivial)


NEW: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "weight norm": (parametrizations.weight_norm, "original1"),
    "spectral norm": (parametrizations.spectral_norm, "original"),
    "weight and spectral norm": (
        lambda m: parametrizations.spectral_norm(parametrizations.weight_norm(m)),
        "original1",
    ),
}
ORTHOGONAL = {
    f"{kind}, {'with' if trivial else 'without'} a base": (orthogonal(kind, trivial), "original")
    for kind in ("cayley", "matrix_exp")
    for trivial in (True, False)
}
OLD: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "old weight norm": (torch.nn.utils.weight_norm, "weight_v"),
    "old weight norm of all": (lambda m: torch.nn.utils.weight_norm(m, dim=None), "weight_v"),
    "old spectral norm": (torch.nn.utils.spectral_norm, "weight_orig"),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.3), "weight_orig"),
    "pruned twice": (
        lambda m: prune.random_unstructured(prune.l1_unstructured(m, "weight", 0.3), "weight", 0.2),
        "weight_orig",
    ),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 24), "linear", (5, 16)),
    "conv": (lambda: nn.Conv2d(8, 16, 3), "conv", (2, 8, 5, 5)),
    "conv_transpose": (lambda: nn.ConvTranspose1d(16, 16, 4), "conv_transpose", (2, 16, 6)),
}
ALL = {**NEW, **OLD}


def made(how: str, layer: str = "linear") -> tuple[nn.Module, nn.Module, Tensor]:
    """A model of one such layer, its rewrite, and an input."""
    torch.manual_seed(0)
    build, _, shape = LAYERS[layer]
    wrap = {**ALL, **ORTHOGONAL}[how][0]
    model = nn.Sequential(wrap(build())).double()
    return model, rpqfx.rpqify(model, SMALL), torch.randn(shape, dtype=torch.float64)


def twin(model: nn.Module, small: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """The dense model with the expanded tensors, and those tensors with a history that leads to the codebooks."""
    dense, expanded = copy_model(model), {name: weight() for name, weight in quantized_weights(small).items()}
    with torch.no_grad():
        for name, tensor in expanded.items():
            dense.get_parameter(name).copy_(tensor)
    return dense, expanded


def assert_same_as_dense(model: nn.Module, small: nn.Module, x: Tensor, training: bool) -> None:
    """Outputs, gradients of everything (through the expanded tensors by the chain rule) and buffers."""
    dense, expanded = twin(model, small)
    ours, theirs = small.train(training)(x), dense.train(training)(x)
    ours, theirs = (y[0] if isinstance(y, tuple) else y for y in (ours, theirs))
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn_like(theirs)
    ours.backward(cotangent)
    theirs.backward(cotangent)
    parameters = dict(small.named_parameters())
    for name, parameter in dense.named_parameters():
        if name in expanded:
            codebooks = parameters[f"{name}_rpq.codebooks"]
            (wanted,) = torch.autograd.grad(expanded[name], codebooks, parameter.grad)
            assert float(wanted.abs().sum()) > 0
            torch.testing.assert_close(codebooks.grad, wanted, msg=lambda text, name=name: f"{name}: {text}")
        else:
            torch.testing.assert_close(parameters[name].grad, parameter.grad)
    buffers = dict(small.named_buffers())
    assert all(torch.allclose(buffer, buffers[name]) for name, buffer in dense.named_buffers())


# ------------------------------------------------------------------------------------------------------ the claim


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("how", ALL)
@either_mode
def test_outputs_and_gradients_are_those_of_the_expanded_originals(how: str, layer: str, training: bool):
    model, small, x = made(how, layer)
    ending = ALL[how][1]
    (name,) = quantized_weights(small)
    assert name == (f"0.{ending}" if how in OLD else f"0.parametrizations.weight.{ending}")
    kinds = {record.name: record.kind for record in rpqfx.report(small).rewritten}
    assert kinds == {name: LAYERS[layer][1]}
    assert_same_as_dense(model, small, x, training)


@pytest.mark.parametrize("how", ORTHOGONAL)
@either_mode
def test_orthogonal_layers_stay_orthogonal(how: str, training: bool):
    model, small, x = made(how)
    with torch.no_grad():
        for weight in quantized_weights(small).values():
            weight.codebooks.normal_()
    assert_same_as_dense(model, small, x, training)
    weight = small[0].weight.detach()
    torch.testing.assert_close(weight.T @ weight, torch.eye(16, dtype=torch.float64), rtol=1e-5, atol=1e-5)


RECURRENT = {
    "orthogonal": lambda: parametrizations.orthogonal(nn.LSTM(16, 16), "weight_hh_l0", orthogonal_map="cayley"),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.GRU(16, 16), "weight_hh_l0"),
    "old weight norm": lambda: torch.nn.utils.weight_norm(nn.LSTM(16, 16), "weight_hh_l0"),
}


@pytest.mark.parametrize("how", RECURRENT)
@either_mode
def test_recurrent_layers_may_be_parametrised(how: str, training: bool):
    torch.manual_seed(0)
    model = RECURRENT[how]().double()
    small = rpqfx.rpqify(model, SMALL)
    assert len(quantized_weights(small)) == 2 and "weight_ih_l0" in quantized_weights(small)
    assert {record.kind for record in rpqfx.report(small).rewritten} == {"recurrent"}
    assert_same_as_dense(model, small, torch.randn(5, 2, 16, dtype=torch.float64), training)


def test_a_recurrent_layer_that_is_only_parametrised_keeps_no_dense_tensor():
    model = parametrizations.spectral_norm(nn.GRU(16, 16), "weight_hh_l0").double()
    policy = Policy(codebook_dim=4, codebook_bits=2, min_size=64, rules=(Rule("weight_ih_l0", skip="left dense"),))
    small = rpqfx.rpqify(model, policy)
    assert small._flat_weights == [None] * 4
    assert_same_as_dense(model, small, torch.randn(5, 2, 16, dtype=torch.float64), False)


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).T


class Foreign(nn.Module):
    """Its own Parameter is parametrised, and used the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16))
        self.rate = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x @ self.w, self.rate)


def test_a_parametrised_parameter_is_what_its_modules_graph_does_with_it():
    model = Foreign().double()
    parametrize.register_parametrization(model, "w", Symmetric())
    captured = rpqfx.graph.capture(model)
    sites = {site.name: site for site in rpqfx.graph.find_sites(captured)}
    site = sites["parametrizations.w.original"]
    assert (site.kind, site.flipped, site.blocked, site.module_type) == ("linear", True, None, Foreign)
    small = rpqfx.rpqify(model, SMALL)
    assert set(quantized_weights(small)) == {"parametrizations.w.original", "rate"}
    assert_same_as_dense(model, small, torch.randn(3, 16, dtype=torch.float64), True)
    torch.testing.assert_close(small.w, small.w.T)


def test_rules_by_class_reach_parametrised_layers():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 16)), nn.Conv1d(16, 16, 1))
    rules = (Rule(nn.Linear, skip="no linear layers"),)
    small = rpqfx.rpqify(model, Policy(codebook_dim=4, codebook_bits=2, min_size=64, rules=rules))
    assert set(quantized_weights(small)) == {"1.weight"}


def test_reading_a_computed_weight_right_after_gives_that_of_the_codebooks():
    for how in OLD:
        model, small, x = made(how)
        dense, _ = twin(model, small)
        dense.eval()(x)
        torch.testing.assert_close(small[0].weight, dense[0].weight.detach())
        assert not small[0].weight.requires_grad


# --------------------------------------------------------------------------------------- copies, files, compilers


@pytest.mark.parametrize("how", {**ALL, **ORTHOGONAL})
def test_copies_and_files(how: str, tmp_path: Path):
    _, small, x = made(how)
    wanted = small.eval()(x)
    assert torch.equal(copy_model(small)(x), wanted)
    if how in OLD:  # torch itself pickles no parametrised module
        with torch.no_grad():
            small(x)
        assert torch.equal(pickle.loads(pickle.dumps(small))(x), wanted)
        assert torch.equal(copy.deepcopy(small)(x), wanted)
    rpqfx.save(small, tmp_path / "model.pt")
    loaded = rpqfx.load(tmp_path / "model.pt", lambda: made(how)[0].eval(), build_device="cpu")
    assert torch.equal(loaded[0].weight, small[0].weight) and torch.equal(loaded(x), wanted)
    other = copy_model(small)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(x), wanted)


@pytest.mark.parametrize("how", OLD)
def test_what_a_hook_computes_is_not_saved(how: str, tmp_path: Path):
    _, small, _ = made(how)
    rpqfx.save(small, tmp_path / "model.pt")
    names = set(torch.load(tmp_path / "model.pt")["tensors"])
    assert "0.weight" not in names and f"0.{ALL[how][1]}_rpq.codebooks" in names


@pytest.mark.parametrize("how", {**ALL, **ORTHOGONAL})
def test_they_compile_in_one_graph(how: str):
    torch.compiler.reset()
    _, small, x = made(how)
    small.eval()
    torch.testing.assert_close(torch.compile(small, fullgraph=True, backend="aot_eager")(x), small(x))
    torch.compiler.reset()


def test_what_norms_add_is_not_materialised_by_chance():
    """torch's layers draw their own tensors, and know nothing of a norm's."""
    with torch.device("meta"):
        model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(16, 16)))
    small = rpqfx.rpqify(model, SMALL)
    with pytest.raises(RewriteError, match=r"none that knows all of their tensors.*: 0; pass init="):
        rpqfx.materialize(small)

    def init(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            nn.init.ones_(parameter)

    rpqfx.materialize(small, init=init)
    torch.testing.assert_close(small[0].weight.norm(dim=1), torch.ones(16))


# ----------------------------------------------------------------------------------------------- taking them off


@pytest.mark.parametrize("how", {**NEW, **ORTHOGONAL})
def test_removing_parametrizations_leaves_a_dense_layer_of_the_same_value(how: str):
    _, small, x = made(how)
    wanted = small.eval()(x)
    parametrize.remove_parametrizations(small[0], "weight")
    assert type(small[0]) is nn.Linear and type(small[0].weight) is nn.Parameter and not quantized_weights(small)
    assert torch.equal(small(x), wanted)


def test_removing_parametrizations_from_a_layer_that_holds_another_weight():
    layer = nn.Linear(16, 16)
    parametrize.register_parametrization(layer, "bias", Halved())
    model = nn.Sequential(layer)
    small, x = rpqfx.rpqify(model, SMALL), torch.randn(3, 16)
    assert isinstance(small[0], RPQLinear) and type(model[0]) is not type(small[0])
    wanted = small(x)
    parametrize.remove_parametrizations(small[0], "bias")
    assert type(small[0]) is RPQLinear and torch.equal(small(x), wanted)
    assert parametrize.is_parametrized(model[0], "bias") and model[0].bias is not None


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2

    def right_inverse(self, x: Tensor) -> Tensor:
        return 2 * x


REMOVE: dict[str, Any] = {
    "old weight norm": torch.nn.utils.remove_weight_norm,
    "old spectral norm": torch.nn.utils.remove_spectral_norm,
    "pruned": lambda module: prune.remove(module, "weight"),
}


@pytest.mark.parametrize("how", REMOVE)
def test_removing_an_old_hook_is_refused_and_changes_nothing(how: str):
    _, small, x = made(how)
    wanted, names = small.eval()(x), list(small.state_dict())
    with pytest.raises(RewriteError, match=r"Linear.weight is computed from weight_(v|orig).* before rewriting"):
        REMOVE[how](small[0])
    assert torch.equal(small(x), wanted) and list(small.state_dict()) == names


@pytest.mark.parametrize("how", NEW)
def test_assigning_a_computed_weight_is_refused_and_changes_nothing(how: str):
    _, small, x = made(how)
    wanted = small.eval()(x)
    with pytest.raises(RewriteError, match="quantized and cannot be assigned"):
        small[0].weight = torch.zeros(24, 16, dtype=torch.float64)
    assert torch.equal(small(x), wanted)


def test_the_list_of_parametrizations_counts_only_them():
    _, small, x = made("spectral norm")
    found = small[0].parametrizations.weight
    assert len(found) == 1 and list(found) == [found[0]] == [found[-1]]
    parametrize.register_parametrization(small[0], "weight", Halved())
    assert len(found) == 2 and type(found[1]) is Halved and parametrize.is_parametrized(small[0], "weight")
    before = small.eval()(x)
    del found[1]
    assert len(found) == 1 and "original_rpq" in found._modules
    torch.testing.assert_close(small(x) - small[0].bias, 2 * (before - small[0].bias))


# ------------------------------------------------------------------------------------------------------- the names


def test_names_of_what_is_computed():
    model = nn.ModuleDict({"a": parametrizations.weight_norm(nn.Linear(4, 4)), "b": nn.Linear(4, 4)})
    torch.nn.utils.weight_norm(model["b"])
    model["b"].own_v = nn.Parameter(torch.zeros(4, 4))
    assert computed_from(model, "a.parametrizations.weight", "original1") == ("a", "weight")
    assert computed_from(model, "b", "weight_v") == ("b", "weight")
    assert computed_from(model, "b", "own_v") == ("b", "own_v")
    assert computed_from(model["a"], "parametrizations.weight", "original0") == ("", "weight")
    assert hooked(model["b"]) == {"weight"} and hooked(model["a"]) == set()
    assert parametrised_at("parametrizations.weight") == "weight"
    assert parametrised_at("fc.parametrizations.weight") == "fc.weight"
    assert parametrised_at("fc.weight") is None and parametrised_at("fc") is None
