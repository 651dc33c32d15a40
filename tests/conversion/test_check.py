"""check_outputs: every rewritten model passes, one that computes something else does not, and nothing is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rpqfx
from rpqfx.errors import InputError, RewriteError
from rpqfx.nn import RPQLinear
from tests.models import CASES, MLP, SMALL, floating, quantized_weights


def x12(batch: int = 3) -> Tensor:
    return torch.randn(batch, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_every_rewritten_model_passes_and_is_not_changed(case: Any):
    args, kwargs = case.arguments(torch.float32)
    model = case.model(torch.float32)
    random_state = torch.get_rng_state()
    small = rpqfx.rpqify(model, case.policy)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    rpqfx.check_outputs(small, args, kwargs)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert set(quantized_weights(small)) >= {*case.rewritten, *case.tied}
    assert small.training and not floating([p.grad for p in small.parameters() if p.grad is not None])


def test_a_model_that_does_not_compute_the_same_is_refused(monkeypatch: pytest.MonkeyPatch):
    rpqfx.check_outputs(rpqfx.rpqify(MLP(), SMALL), x12())
    monkeypatch.setattr(RPQLinear, "forward", lambda self, x: F.linear(x, self.weight, self.bias) * 1.01)
    with pytest.raises(RewriteError, match=r"does not compute what the dense model .* skip the layers that cause it"):
        rpqfx.check_outputs(rpqfx.rpqify(MLP(), SMALL), x12())


def test_another_structure_of_outputs_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(RPQLinear, "forward", lambda self, x: (F.linear(x, self.weight, self.bias),))
    with pytest.raises(RewriteError, match="does not compute"):
        rpqfx.check_outputs(rpqfx.rpqify(nn.Sequential(nn.Linear(12, 32)), SMALL), x12())


class Masked(nn.Module):
    """Returns scores of which some are minus infinity, and one that is not a number."""

    def __init__(self, off: float = 0.0) -> None:
        super().__init__()
        self.fc, self.off = nn.Linear(12, 32), off

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y = y + self.off * isinstance(self.fc, RPQLinear)
        return y.masked_fill(torch.arange(32) > 20, float("-inf")).masked_fill(torch.arange(32) == 3, float("nan"))


def test_infinite_outputs_are_equal_and_hide_no_difference():
    rpqfx.check_outputs(rpqfx.rpqify(Masked(), SMALL), x12())
    with pytest.raises(RewriteError, match="does not compute"):
        rpqfx.check_outputs(rpqfx.rpqify(Masked(off=0.1), SMALL), x12())


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        small = rpqfx.rpqify(MLP(), SMALL)
    with pytest.raises(InputError, match=r"on the meta device and has no values to compare; call rpqfx\.materialize"):
        rpqfx.check_outputs(small, x12())


def test_inputs_may_be_given_by_name():
    rpqfx.check_outputs(rpqfx.rpqify(MLP(), SMALL), example_kwargs={"x": x12()})


def test_the_model_within_a_wrapper_is_checked():
    small = rpqfx.rpqify(MLP(), SMALL)
    rpqfx.check_outputs(torch.compile(small, backend="eager"), x12())


def test_both_models_draw_the_same_numbers():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 32)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.fc(x), 0.5, True)

    random_state = torch.get_rng_state()
    rpqfx.check_outputs(rpqfx.rpqify(Noisy(), SMALL, seed=0), x12())
    drawn = torch.rand(1)
    torch.set_rng_state(random_state)
    Noisy()
    assert torch.equal(torch.rand(1), drawn)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_weights_that_a_hook_computes_do_not_hinder_a_check():
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(12, 16)), nn.Linear(16, 16))
    model(x12())
    small = rpqfx.rpqify(model, SMALL)
    rpqfx.check_outputs(small, x12())
    assert set(quantized_weights(small)) == {"0.weight_v", "1.weight"}


def test_example_runs_leave_no_trace():
    """Counters, lists and running statistics are as if nothing had run."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm, self.seen = nn.Linear(12, 48), nn.BatchNorm1d(48), []
            self.register_buffer("runs", torch.zeros(()))

        def forward(self, x):
            self.runs += 1
            self.seen.append(len(x))
            return self.norm(self.fc(x))

    small = rpqfx.rpqify(Counting(), SMALL)
    rpqfx.check_outputs(small, x12())
    assert small.runs == 0 and small.seen == [] and not small.norm.num_batches_tracked
