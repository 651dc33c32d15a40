"""Whatever foreign code raises during a call, or the disk refuses, the model and all around it stay as they were."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.fx.experimental.symbolic_shapes  # imports sympy, which adds a filter of warnings when it is first imported
from torch import Tensor, nn

import rpqfx
from rpqfx import KeepDense, KVPolicy, Policy, RoutePolicy, Rule
from rpqfx.errors import CaptureError, PolicyError, RewriteError
from tests.contracts.test_undone import KV, POLICY, batches, net, on_meta, rewritten
from tests.interrupts import around, contents

PLACES = pytest.mark.parametrize("inplace", [False, True])


class Fault(Exception):
    """What is raised here, and by nobody else."""


class Raising:
    """Raises when it is called for the ``at``-th time, whatever with.

    Args:
        at: When.
        answer: What it returns otherwise.
    """

    def __init__(self, at: int = 1, answer: Any = None) -> None:
        self._left, self._answer = at, answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._left -= 1
        if not self._left:
            raise Fault
        return self._answer


def unchanged(model: nn.Module, call: Callable[[], Any], error: type[BaseException] = Fault) -> None:
    torch.manual_seed(0)
    before, outside = contents(model), around()
    with pytest.raises(error) as caught:
        call()
    assert error is not Fault or isinstance(caught.value.__cause__ or caught.value, Fault)
    assert contents(model) == before
    assert around() == outside


def iterated(at: int) -> Iterator[Tensor]:
    yield from batches(at)
    raise Fault


@PLACES
@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_progress_callback_raises(at: int, inplace: bool) -> None:
    model = net()
    given: dict[str, Any] = {"inplace": inplace, "progress": Raising(at)}
    unchanged(model, lambda: rpqfx.convert(model, POLICY, batches(), **given))
    if at == 1:
        unchanged(model, lambda: rpqfx.rpqify(model, POLICY, inplace=inplace, progress=Raising()))


@PLACES
@pytest.mark.parametrize("at", [1, 3])
def test_a_policy_raises(at: int, inplace: bool) -> None:
    model = net()
    unchanged(model, lambda: rpqfx.rpqify(model, Raising(at, KeepDense("no")), inplace=inplace))
    rule = Rule(Raising(at), skip="it says so")
    unchanged(
        model, lambda: rpqfx.rpqify(model, Policy(codebook_dim=4, codebook_bits=2, rules=[rule]), inplace=inplace)
    )


@PLACES
def test_calibration_raises_midway(inplace: bool) -> None:
    model = net()
    unchanged(model, lambda: rpqfx.convert(model, POLICY, iterated(1), inplace=inplace))
    unchanged(model, lambda: rpqfx.quantize_kv(model, KV, calibration=iterated(1), inplace=inplace))


@PLACES
@pytest.mark.parametrize("at", [1, 2, 4, 6])
def test_a_hook_of_a_layer_raises(at: int, inplace: bool) -> None:
    def hooked() -> nn.Module:
        model, raising = net(), Raising(at)
        model.blocks[0].down.register_forward_hook(lambda module, args, output: raising())
        return model

    model = hooked()
    unchanged(model, lambda: rpqfx.convert(model, POLICY, batches(), inplace=inplace), Exception)
    if at == 1:
        model = hooked()
        small = rpqfx.rpqify(model, POLICY, inplace=inplace)
        unchanged(small, lambda: rpqfx.check_outputs(small, batches(1)), Exception)
        model = hooked()
        unchanged(model, lambda: rpqfx.quantize_kv(model, KV, calibration=batches(), inplace=inplace), Exception)


def test_copying_raises() -> None:
    class Uncopied(nn.Module):
        def __deepcopy__(self, memo: Any) -> Any:
            raise Fault

    model = net()
    model.extra = Uncopied()
    for call in (
        lambda: rpqfx.rpqify(model, POLICY),
        lambda: rpqfx.quantize_kv(model, KV, calibration=batches()),
        lambda: rpqfx.route(model, RoutePolicy(0.5)),
    ):
        unchanged(model, call, RewriteError)


def test_what_cannot_be_carried_out_is_undone() -> None:
    model = rewritten()
    report = str(rpqfx.report(model))
    unchanged(
        model,
        lambda: rpqfx.quantize_kv(model, KVPolicy(codebook_dim=5), calibration=batches(), inplace=True),
        PolicyError,
    )
    assert str(rpqfx.report(model)) == report


def test_a_graph_that_cannot_be_made_leaves_the_model() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.fc(x)) if x.sum() > 0 else self.fc(x)

    model = Branching().eval()
    x = [torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).abs() for _ in range(2)]
    small = rpqfx.convert(model, POLICY, x)
    unchanged(small, lambda: rpqfx.graph.whole_graph(small), CaptureError)


def test_an_initialiser_raises() -> None:
    for at in (1, 3):
        model = on_meta()
        unchanged(model, lambda at=at, model=model: rpqfx.materialize(model, init=Raising(at)))


def test_a_builder_raises(tmp_path: pathlib.Path) -> None:
    small = rewritten()
    rpqfx.save(small, tmp_path / "small.pt")
    before = (tmp_path / "small.pt").read_bytes()
    unchanged(small, lambda: rpqfx.load(tmp_path / "small.pt", Raising()))
    assert (tmp_path / "small.pt").read_bytes() == before and len(os.listdir(tmp_path)) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is refused to the superuser")
def test_a_folder_that_may_not_be_written_is_named(tmp_path: pathlib.Path) -> None:
    tmp_path.chmod(0o500)
    model = net()
    try:
        given: dict[str, Any] = {"checkpoint": tmp_path / "new", "inplace": True}
        unchanged(model, lambda: rpqfx.convert(model, POLICY, batches(), **given), OSError)
    finally:
        tmp_path.chmod(0o700)


def test_a_disk_that_refuses_leaves_model_and_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(part: Any, path: Any) -> None:
        raise PermissionError(13, "Permission denied")

    model = net()
    monkeypatch.setattr(os, "replace", refused)
    for inplace in (False, True):
        given: dict[str, Any] = {"checkpoint": tmp_path, "inplace": inplace}
        unchanged(model, lambda given=given: rpqfx.convert(model, POLICY, batches(), **given), OSError)
    assert not list(tmp_path.iterdir())
