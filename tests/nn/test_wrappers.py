"""What stands around a model is looked through wherever the library goes by names."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import rpqfx
from rpqfx.errors import FormatError, RewriteError
from rpqfx.nn.wrappers import modules_within, rewrapped, unwrapped
from tests.models import MLP, SMALL, quantized_weights

AROUND: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "checkpoint_wrapper": checkpoint_wrapper,
    "two at once": lambda model: torch.compile(nn.DataParallel(model)),
}
around = pytest.mark.parametrize("wrap", AROUND.values(), ids=AROUND)
NAMES = ["fc1.weight", "fc2.weight"]


def small_mlp() -> nn.Module:
    torch.manual_seed(0)
    return rpqfx.rpqify(MLP(), SMALL).eval()


def part_wrapped(model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model.fc2 = wrap(model.fc2)
    return model


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@around
@pytest.mark.parametrize("part", [False, True], ids=["around the model", "around a part"])
def test_what_was_saved_loads_with_the_same_build(
    part: bool, wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    small, x = small_mlp(), torch.randn(3, 12)
    given = part_wrapped(copy.deepcopy(small), wrap) if part else wrap(small)
    rpqfx.save(given, tmp_path / "m.rpq")
    again = rpqfx.load(tmp_path / "m.rpq", MLP).eval()
    assert type(again) is MLP and torch.equal(again(x), small(x))
    assert str(rpqfx.report(again)) == str(rpqfx.report(small))

    def build() -> nn.Module:
        return part_wrapped(MLP(), wrap) if part else wrap(MLP())

    if wrap is AveragedModel:
        with pytest.raises(FormatError, match=r"holds no n_averaged of the AveragedModel .* wrap what is loaded"):
            rpqfx.load(tmp_path / "m.rpq", build)
        return
    assert str(rpqfx.report(given)) == str(rpqfx.report(small))
    wrapped = rpqfx.load(tmp_path / "m.rpq", build)
    assert type(wrapped) is type(given)
    assert quantized_weights(unwrapped(wrapped)).keys() == quantized_weights(unwrapped(given)).keys()
    assert str(rpqfx.report(wrapped)) == str(rpqfx.report(small))


def test_a_distributed_model_is_saved_as_the_model_within(one_process: None, tmp_path: Path) -> None:
    small, x = small_mlp(), torch.randn(3, 12)
    rpqfx.save(DistributedDataParallel(small), tmp_path / "m.rpq")
    assert torch.equal(rpqfx.load(tmp_path / "m.rpq", MLP).eval()(x), small(x))
    assert [site.name for site in rpqfx.report(DistributedDataParallel(small)).sites] == NAMES


def test_what_changes_parameters_refuses_a_distributed_model(one_process: None) -> None:
    with pytest.raises(RewriteError, match=r"rpqify changes Parameters, and the model is in DistributedDataParallel"):
        rpqfx.rpqify(DistributedDataParallel(MLP()), SMALL)
    with pytest.raises(RewriteError, match=r"finetune changes Parameters.* hand in its \.module"):
        rpqfx.finetune(DistributedDataParallel(small_mlp()), teacher=MLP(), data=[torch.randn(3, 12)], steps=1)


def test_a_sharded_model_is_refused_by_name(one_process: None, tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    sharded = fully_shard(small_mlp(), mesh=mesh)
    for ask in (
        lambda: rpqfx.save(sharded, tmp_path / "m.rpq"),
        lambda: rpqfx.finetune(sharded, teacher=MLP(), data=[torch.randn(3, 12)], steps=1),
        lambda: rpqfx.tune(sharded, torch.randn(3, 12)),
        lambda: rpqfx.materialize(sharded),
        lambda: rpqfx.rpqify(fully_shard(MLP(), mesh=mesh), SMALL),
    ):
        with pytest.raises(RewriteError, match=r"needs whole tensors, and FSDP shards those of the model"):
            ask()
    assert os.listdir(tmp_path) == ["rendezvous"]


@around
def test_a_wrapped_model_is_rewritten_by_the_names_that_it_has_within(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(MLP())
    policy = rpqfx.Policy(
        codebook_dim=4, codebook_bits=2, min_size=64, rules=(rpqfx.Rule("fc1.weight", skip="told so"),)
    )
    small = rpqfx.rpqify(model, policy)
    assert type(small) is type(model) and not quantized_weights(model)
    found = rpqfx.report(small)
    assert [site.name for site in found.sites] == NAMES and [site.name for site in found.rewritten] == NAMES[1:]
    assert torch.isfinite(unwrapped(small).eval()(torch.randn(3, 12))).all()
    assert rpqfx.rpqify(model, policy, inplace=True) is model and [*quantized_weights(unwrapped(model))] == NAMES[1:]


@around
def test_wrapped_models_are_tuned_trained_and_materialised(wrap: Callable[[nn.Module], nn.Module]) -> None:
    x = torch.randn(3, 12)
    model = wrap(small_mlp())
    assert [weight.name for weight in rpqfx.tune(model, x, repeats=1).reached] == NAMES
    before = unwrapped(model).fc1.weight_rpq.codebooks.detach().clone()
    assert rpqfx.finetune(model, teacher=wrap(MLP()), data=[x], steps=2).steps == 2
    assert not torch.equal(unwrapped(model).fc1.weight_rpq.codebooks, before)
    with torch.device("meta"):
        empty = MLP()
    made = rpqfx.materialize(wrap(rpqfx.rpqify(empty, SMALL)))
    assert torch.isfinite(unwrapped(made)(x)).all()


def test_names_are_those_without_wrappers() -> None:
    model = nn.Sequential(torch.compile(nn.DataParallel(nn.Linear(2, 2))), nn.Sequential(nn.Linear(2, 2)))
    found = {name: path for name, path, _ in modules_within(nn.DataParallel(model))}
    assert found == {
        "": "module", "0": "module.0._orig_mod.module", "1": "module.1", "1.0": "module.1.0",
    }  # fmt: skip
    tied = nn.Sequential(model[0], model[0])
    assert [name for name, _, _ in modules_within(tied)] == ["", "0", "1"]


def test_a_wrapper_is_copied_around_another_model() -> None:
    first, second = MLP(), MLP()
    average = AveragedModel(first)
    average.update_parameters(first)
    again = rewrapped(average, second)
    assert unwrapped(again) is second and int(again.n_averaged) == 1 and again is not average
    assert rewrapped(average, unwrapped(average)) is average


def test_a_wrapper_that_nobody_knows_stays_part_of_the_names(tmp_path: Path) -> None:
    class Mine(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.module = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x)

    small = Mine(small_mlp()).eval()
    rpqfx.save(small, tmp_path / "m.rpq")
    with pytest.raises(FormatError, match=r"holds module\.fc1\.weight, which the model that build\(\) made has not"):
        rpqfx.load(tmp_path / "m.rpq", MLP)
    x = torch.randn(3, 12)
    assert torch.equal(rpqfx.load(tmp_path / "m.rpq", lambda: Mine(MLP())).eval()(x), small(x))
