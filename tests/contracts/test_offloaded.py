"""accelerate offloads rewritten models as it does dense ones; what it has offloaded is not rewritten over.

The models run on the CPU and their weights are on disk or in a dictionary, which goes through the same hooks as a model
that is larger than a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import Policy, Rule
from rpqfx.errors import RewriteError, RPQError
from rpqfx.graph import capture, find_sites, rewrite
from rpqfx.policies.policy import Quantize

accelerate = pytest.importorskip("accelerate")


class Net(nn.Module):
    """Layers, a Parameter of its own, ties, and codes of one and of two bytes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.a = nn.Embedding(600, 16), nn.Linear(16, 64)
        self.mid = Middle()
        self.rnn = nn.GRU(64, 16, batch_first=True)
        self.out = nn.Linear(16, 600, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.rnn(self.mid(self.a(self.emb(ids))))[0])


class Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 64) / 8)
        self.norm = nn.BatchNorm1d(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm((torch.relu(x) @ self.w).mT).mT


WIDE = Rule("emb", codebook_bits=9, min_codebook_bits=9, scale=True, signs=True, allow_growth=True)
DRAWN = Policy.from_scratch(codebook_dim=4, codebook_bits=4, min_size=64, allow_growth=True, rules=(WIDE,))
FITTED = Policy(codebook_dim=4, codebook_bits=4, min_size=64, allow_growth=True)
IDS = torch.arange(24).view(2, 12)


def small() -> nn.Module:
    return rpqfx.rpqify(Net().eval(), DRAWN)


def cpu(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device="cpu")


def cpu_and_buffers(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def whole_modules(model: nn.Module, folder: Path) -> nn.Module:
    names = [type(model.mid).__name__, type(model.rnn).__name__]
    return accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=names)


def disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, folder, execution_device="cpu", offload_buffers=True)


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    places = {"emb": "cpu", "out": "cpu", "a": "disk", "mid": "cpu", "rnn": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


WAYS = [cpu, cpu_and_buffers, whole_modules, disk, dispatched]
Way = Callable[[nn.Module, Path], nn.Module]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    yield request.param


@torch.no_grad()
def test_a_rewritten_model_is_offloaded_and_computes_the_same(way: Way, tmp_path: Path):
    model = small()
    assert model.emb.weight_rpq.codes.dtype == torch.int16
    wanted, state = model(IDS), copy.deepcopy(model.state_dict())
    way(model, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    for _ in range(2):
        assert torch.equal(model(IDS), wanted)
    assert any(parameter.is_meta for parameter in model.parameters())
    if way is not disk:  # what was on disk before stays there
        accelerate.hooks.remove_hook_from_submodules(model)
        now = model.state_dict()
        assert all(torch.equal(now[name], value) for name, value in state.items())
        assert torch.equal(model(IDS), wanted)


@torch.no_grad()
def test_a_model_loaded_from_a_checkpoint_on_disk_is_dispatched(tmp_path: Path):
    from safetensors.torch import save_file

    model = small()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = rpqfx.rpqify(Net().eval(), DRAWN)
    places = {"emb": "cpu", "out": "cpu", "a": "cpu", "mid": "disk", "rnn": "cpu"}
    loaded = accelerate.load_checkpoint_and_dispatch(
        empty, str(tmp_path / "model.safetensors"), places, offload_folder=str(tmp_path / "away"), offload_buffers=True
    )
    assert torch.equal(loaded(IDS), model(IDS))


def test_what_needs_values_refuses_an_offloaded_model_by_name(tmp_path: Path):
    model = cpu(small(), tmp_path)
    for use in (
        lambda: rpqfx.materialize(model),
        lambda: rpqfx.save(model, tmp_path / "model.rpq"),
        lambda: rpqfx.finetune(model, data=[IDS], loss=lambda out, batch: out.sum()),
    ):
        with pytest.raises(RPQError, match=r"weight_rpq.* accelerate has offloaded their values"):
            use()
    assert not (tmp_path / "model.rpq").exists()


@pytest.mark.parametrize("policy", [FITTED, DRAWN, Policy.pretrained(bits_per_weight=6)])
@pytest.mark.parametrize("inplace", [False, True])
def test_an_offloaded_model_is_not_rewritten(way: Way, policy: Policy, inplace: bool, tmp_path: Path):
    model = way(Net().eval(), tmp_path)
    with torch.no_grad():
        wanted = model(IDS)
    before = [(type(module), list(module._parameters)) for module in model.modules()]
    with pytest.raises(RewriteError, match=r"\w+(\.\w+)* .*cannot be rewritten: accelerate has offloaded"):
        rpqfx.rpqify(model, policy, inplace=inplace)
    assert before == [(type(module), list(module._parameters)) for module in model.modules()]
    with torch.no_grad():
        assert torch.equal(model(IDS), wanted)


def test_what_is_not_offloaded_of_a_dispatched_model_may_be_rewritten(tmp_path: Path):
    model = dispatched(Net().eval(), tmp_path)
    rules = (Rule("a", skip="on disk"), Rule("rnn.*", skip="on disk"))
    rewritten = rpqfx.rpqify(
        model, Policy(codebook_dim=4, codebook_bits=6, min_size=64, allow_growth=True, rules=rules)
    )
    with torch.no_grad():
        found, wanted = rewritten(IDS), model(IDS)
    assert not found.is_meta and float((found - wanted).norm() / wanted.norm()) < 0.5


@pytest.mark.parametrize("calibration", [None, [IDS]])
def test_a_model_that_is_loaded_in_part_is_not_fitted(calibration: Any):
    model = Net().eval()
    model.a.to("meta")
    policy = FITTED if calibration is None else Policy.pretrained(bits_per_weight=6)
    with pytest.raises(RewriteError, match=r"^a\.weight are on the meta device, without values to fit"):
        rpqfx.rpqify(model, policy) if calibration is None else rpqfx.convert(model, policy, calibration)
    captured = capture(model)
    sites = find_sites(captured)
    decisions = {site.name: hold for site in sites if isinstance(hold := FITTED(site), Quantize)}
    with pytest.raises(RewriteError, match=r"^a\.weight are on the meta device"):
        rewrite(captured, decisions)
    drawn = rpqfx.materialize(rpqfx.rpqify(model, DRAWN))
    assert torch.isfinite(drawn(IDS)).all()


def test_a_model_without_any_values_is_rewritten_whatever_the_policy():
    with accelerate.init_empty_weights():
        model = Net().eval()
    for policy in (FITTED, DRAWN):
        assert torch.isfinite(rpqfx.materialize(rpqfx.rpqify(model, policy))(IDS)).all()
