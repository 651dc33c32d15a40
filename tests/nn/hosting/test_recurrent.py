"""Recurrent layers compute with their codebooks, and keep no dense weight in any of their lists."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import Policy
from rpqfx.errors import RewriteError
from rpqfx.nn import VirtualWeight
from tests.models import SMALL, assert_equals_dense, quantized_weights

LAYERS: dict[str, Any] = {
    "lstm": lambda: nn.LSTM(12, 16),
    "lstm, two layers, both ways, projected": lambda: nn.LSTM(12, 16, 2, bidirectional=True, proj_size=8),
    "gru, batch first, dropout": lambda: nn.GRU(12, 16, 2, batch_first=True, dropout=0.3),
    "gru without bias": lambda: nn.GRU(12, 16, bias=False),
    "rnn": lambda: nn.RNN(12, 16),
    "rnn, relu": lambda: nn.RNN(12, 16, 2, nonlinearity="relu"),
    "lstm cell": lambda: nn.LSTMCell(12, 16),
    "gru cell": lambda: nn.GRUCell(12, 16),
    "rnn cell": lambda: nn.RNNCell(12, 16),
}
either_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def made(name: str, policy: Policy = SMALL) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    model = LAYERS[name]().double()
    shape = (3, 12) if "cell" in name else (5, 3, 12)
    return model, rpqfx.rpqify(model, policy), torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("split", ["row", "column"])
@pytest.mark.parametrize("name", LAYERS)
@either_mode
def test_outputs_and_gradients_are_those_of_the_expanded_weights(name: str, training: bool, split: str):
    model, small, x = made(name, Policy(codebook_dim=4, codebook_bits=2, min_size=64, split=split, allow_growth=True))
    assert set(quantized_weights(small)) == {n for n, p in model.named_parameters() if p.dim() > 1}
    assert_equals_dense(model.train(training), small.train(training), (x,), {})


@pytest.mark.parametrize("name", LAYERS)
def test_they_are_sites_of_their_own_kind(name: str):
    _, small, _ = made(name)
    assert {record.kind for record in rpqfx.report(small).sites} == {"recurrent"}
    with pytest.raises(rpqfx.RPQError, match="the policy leaves every recurrent alone"):
        made(name, Policy(kinds=("linear",)))


def test_the_flat_list_is_made_of_the_names_and_holds_nothing_dense():
    model = nn.LSTM(12, 16, 2)
    dense = [weakref.ref(p) for p in model.parameters() if p.dim() > 1]
    small = rpqfx.rpqify(model, SMALL, inplace=True)
    assert "_flat_weights" not in vars(small)
    kinds = [type(weight) for weight in small._flat_weights]
    assert kinds == 2 * [VirtualWeight, VirtualWeight, nn.Parameter, nn.Parameter]
    assert small.all_weights[1][2] is small.bias_ih_l1
    gc.collect()
    assert all(ref() is None for ref in dense)


def test_a_conversion_and_a_new_bias_are_seen_at_the_next_call():
    _, small, x = made("lstm")
    before = small(x)[0]
    small = small.float()
    small.flatten_parameters()
    assert small._flat_weights[2] is small.bias_ih_l0 and small.bias_ih_l0.dtype == torch.float32
    torch.testing.assert_close(small(x.float())[0].double(), before, rtol=1e-4, atol=1e-5)
    small.bias_ih_l0 = nn.Parameter(small.bias_ih_l0.detach() + 1)
    assert not torch.allclose(small(x.float())[0].double(), before, rtol=1e-2)


def test_a_held_weight_cannot_be_laid_over():
    _, small, _ = made("lstm")
    with pytest.raises(RewriteError, match="weight_ih_l0 is quantized"):
        small.weight_ih_l0 = nn.Parameter(torch.zeros(64, 12))


class Own(nn.LSTM):
    """Draws itself in a way of its own."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.5)


def test_parameters_are_drawn_anew_with_torchs_own_deviation():
    torch.manual_seed(0)
    small = rpqfx.rpqify(nn.LSTM(256, 256), Policy(codebook_bits=6, init="random"))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    small.reset_parameters()
    for weight in quantized_weights(small).values():
        assert float(weight().detach().std()) == pytest.approx(1 / math.sqrt(3 * 256), rel=0.05)
    assert 0.9 / 16 < float(small.bias_hh_l0.detach().abs().max()) <= 1 / 16
    own = rpqfx.rpqify(Own(16, 16), SMALL)
    own.bias_ih_l0.data.zero_()
    own.reset_parameters()
    assert bool((own.bias_ih_l0 == 0.5).all())


@pytest.mark.parametrize("build", [lambda: nn.GRU(64, 64, 2), lambda: nn.LSTMCell(64, 64)], ids=["gru", "cell"])
def test_a_layer_on_the_meta_device_is_materialised(build: Any):
    with torch.device("meta"):
        model = nn.Sequential(build())
    small = rpqfx.rpqify(model, Policy(codebook_bits=4))
    rpqfx.materialize(small)
    for weight in quantized_weights(small).values():
        assert float(weight().detach().std()) == pytest.approx(1 / math.sqrt(3 * 64), rel=0.2)
    bias = next(p for name, p in small.named_parameters() if "bias" in name).detach()
    assert 0 < float(bias.abs().max()) <= 1 / 8
    assert torch.is_tensor(torch.utils._pytree.tree_leaves(small(torch.randn(3, 64)))[0])


@pytest.fixture
def allowed() -> Iterator[None]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["gru without bias", "rnn", "lstm cell", "gru cell", "rnn cell"])
def test_they_compile_where_the_dense_layer_does(name: str, allowed: None):
    _, small, x = made(name)
    mine = torch.compile(small, fullgraph=True, backend="aot_eager")(x)
    pairs = zip(torch.utils._pytree.tree_leaves(mine), torch.utils._pytree.tree_leaves(small(x)), strict=True)
    assert all(torch.allclose(ours, theirs) for ours, theirs in pairs)


def test_a_refused_rewrite_puts_the_flat_list_back():
    """Where the example inputs show a difference, the layer is what it was."""

    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.calls = nn.GRU(16, 16), [0]

        def forward(self, x: Tensor) -> Tensor:
            held = any("_rpq" in name for name, _ in self.rnn.named_parameters())
            return self.rnn(x)[0] + float(held)

    model = Changing()
    before, x = copy.deepcopy(model), torch.randn(4, 2, 16)
    with pytest.raises(RewriteError, match="does not compute what the dense model"):
        rpqfx.check_outputs(rpqfx.rpqify(model, SMALL), (x,))

    def stop(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rpqfx.rpqify(model, SMALL, inplace=True, progress=stop)
    assert type(model.rnn) is nn.GRU and model.rnn._flat_weights[0] is model.rnn.weight_ih_l0
    assert torch.equal(model(x), before(x))
