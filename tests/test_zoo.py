"""The checks of the zoo can fail: each is shown a model that is wrong in the way it is there to see."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from tests.zoo_bench import checks, coverage, models, page, runs


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(64, 80), nn.Dropout(0.2), nn.Linear(80, 64)
        self.norm = nn.BatchNorm1d(64)
        self.position = nn.Parameter(torch.randn(8, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.drop(torch.relu(self.first(x + self.position)))))


class Noisy(Net):
    """Is another function at each call, whatever the seed."""

    calls = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + next(Noisy.calls))


def states(
    change: Callable[[nn.Module], Any] = lambda small: None,
    build: Callable[[], nn.Module] = Net,
    skip: tuple[str, ...] = ("compile",),
) -> dict[str, str]:
    """The state of each check of a rewritten model that was changed."""
    entry = models.Model("torch/net", "net", build, models.floats((8, 64)))

    def rewrite(dense: nn.Module) -> nn.Module:
        small = rpqfx.rpqify(dense, rpqfx.Policy.from_scratch())
        change(small)
        return small

    result = checks.check_model(entry, rewrite=rewrite, skip=skip)
    return {name: check["state"] for name, check in result["checks"].items()}


def failed(change: Callable[[nn.Module], Any], **options: Any) -> set[str]:
    return {name for name, state in states(change, **options).items() if state == "failed"}


def test_a_right_model_passes_every_check():
    assert set(states(skip=()).values()) == {"ok"}


def test_an_output_that_is_a_hundredth_off_is_seen():
    found = failed(lambda small: small.norm.register_forward_hook(lambda m, x, y: y * 1.01))
    assert {"eval", "steps"} <= found


def test_a_gradient_that_is_off_is_seen_though_the_output_is_right():
    def half(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y.detach() + 0.5 * (y - y.detach())

    assert {"eval", "train"} <= failed(lambda small: small.first.register_forward_hook(half))


def test_codebooks_without_a_gradient_are_seen():
    def forget(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y + (module.weight_rpq.codebooks.sum() - module.weight_rpq.codebooks.sum().detach())

    assert {"eval", "train", "steps"} <= failed(lambda small: small.first.register_forward_hook(forget))


def test_a_dropout_that_is_gone_is_seen_in_train_mode_only():
    found = failed(lambda small: setattr(small.drop, "p", 0.0))
    assert "train" in found and "eval" not in found


def test_batch_statistics_that_are_off_are_seen():
    found = failed(lambda small: setattr(small.norm, "momentum", 0.2))
    assert "train" in found and "eval" not in found


@torch.no_grad()
def _shift(small: nn.Module) -> None:
    small.norm.running_mean.add_(1.0)


def test_an_untouched_tensor_that_changed_is_seen():
    assert "names" in failed(_shift)


def test_a_renamed_tensor_is_seen():
    def rename(small: nn.Module) -> None:
        small.offset = small._parameters.pop("position")

    assert "names" in failed(rename)


def test_a_model_that_cannot_be_pickled_is_seen():
    assert failed(lambda small: setattr(small, "hook", lambda: None)) >= {"pickle"}


def test_a_model_that_breaks_the_graph_is_seen():
    def step_out(module: nn.Module, args: Any) -> None:
        torch._dynamo.graph_break()

    assert failed(lambda small: small.first.register_forward_pre_hook(step_out), skip=("pickle",)) == {"compile"}


def test_a_model_that_is_not_reproducible_is_said_to_be_so():
    found = states(build=Noisy)
    assert found["eval"] == found["train"] == "n/a"


def test_a_rewrite_that_fails_is_a_failure():
    def refuse(small: nn.Module) -> None:
        raise RuntimeError("no")

    assert states(refuse) == {"rewrite": "failed", "coverage": "ok"}


# -------------------------------------------------------------------------------------------------- what is counted


def test_every_weight_is_in_one_class():
    dense = Net()
    small = rpqfx.rpqify(dense, rpqfx.Policy.from_scratch(rules=(rpqfx.Rule("second", skip="kept"),)))
    found = coverage.coverage(dense, small, {"first.weight"})
    assert {kind: found["sums"][kind]["count"] for kind in coverage.CLASSES} == {
        "rewritten": 1,
        "policy": 0,
        "no weight": 1,
        "missed": 1,
    }
    assert [(line["name"], line["reason"]) for line in found["missed"]] == [("second.weight", "kept")]
    assert coverage.share([found["sums"]]) == 0.5


def test_a_weight_that_the_report_does_not_name_is_a_failure():
    dense = Net()
    small = rpqfx.rpqify(dense, rpqfx.Policy.from_scratch())
    dense.extra = nn.Parameter(torch.randn(64, 64))
    found = coverage.coverage(dense, small, {"first.weight", "second.weight"})
    assert found["state"] == "failed" and "extra" in found["detail"]


# ------------------------------------------------------------------------------------------------------- the runs


def test_where_a_model_asks_for_float32_it_gets_float64():
    with runs.precision(torch.float64):
        assert torch.ones(2).dtype == torch.ones(2).float().dtype == torch.ones(2).to(torch.float32).dtype
        assert torch.zeros(1, dtype=torch.float32).dtype == torch.float64
    assert torch.ones(2).dtype == torch.float32


def test_a_gradient_that_is_only_rounding_does_not_count_and_one_that_is_missing_does():
    wanted = {"a": torch.ones(3), "b": 1e-9 * torch.ones(3)}
    assert runs.gradient_error({**wanted, "b": torch.zeros(3)}, wanted, torch.float32)[0] < 1e-3
    assert runs.gradient_error({**wanted, "a": None}, wanted, torch.float32) == (1.0, "a")
    assert runs.gradient_error({**wanted, "a": torch.full((3,), torch.nan)}, wanted, torch.float32)[0] > 1


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
def test_an_output_that_is_not_finite_where_it_should_be_counts(wrong: float):
    right = torch.tensor([1.0, -torch.inf])
    assert runs.output_error([right], [right]) == 0
    assert runs.output_error([torch.tensor([wrong, -torch.inf])], [right]) == torch.inf


# -------------------------------------------------------------------------------------------------------- the page


def test_the_page_has_a_row_for_each_model_and_names_what_is_missed():
    entry = models.Model("torch/net", "net", Net, models.floats((8, 64)))
    policy = rpqfx.Policy.from_scratch(rules=(rpqfx.Rule("second", skip="kept for the test"),))
    result = checks.check_model(entry, rewrite=lambda dense: rpqfx.rpqify(dense, policy), skip=("compile",))
    text = page.page([result])
    row = next(line for line in text.splitlines() if line.startswith("| torch/net | net |"))
    assert [cell.strip() for cell in row.split("|")][4:13] == [
        "50.0%",
        "32",
        "32",
        "yes",
        "yes",
        "yes",
        "yes",
        "?",
        "32",
    ]
    assert not page.passed(result), "one check has not run"
    assert page.passed({"checks": {**result["checks"], "compile": {"state": "ok", "detail": ""}}})
    assert "| torch/net | second.weight | 64 x 80 | 20,480 | kept for the test |" in text


def test_ids_of_the_catalogue_are_unique_and_it_needs_no_library():
    found = models.catalogue()
    assert len(found) > 260 and len({entry.architecture for entry in found}) > 140
