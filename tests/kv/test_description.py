"""Attention on codes is saved and comes back, whatever it was put into and in whatever order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import KVPolicy, Policy, Rule
from rpqfx.errors import FormatError, RPQError
from rpqfx.kv.module import attentions
from tests.kv.kv_models import LM, tokens

WEIGHTS = Policy(
    codebook_dim=4, codebook_bits=4, min_size=64, sharing="layer", rules=(Rule("*kv_codes*", skip="the cache's own"),)
)  # fmt: skip
CACHES: dict[str, dict[str, Any]] = {
    "mapped": {}, "averages": {"decay": 0.9}, "channels": {"transform": False}, "normalize": {"normalize": True},
    "strided": {"transform": False, "strided": True}, "by angle": {"use_cosine_sim": True},
}  # fmt: skip


def policy(**options: Any) -> KVPolicy:
    return KVPolicy(
        **{"bits_per_value": 3, "window": 4, "sinks": 2, "codebook_size": 16, "chunk": 8, "codebook_dim": 4, **options}
    )


def rewritten(order: str, model: nn.Module, batch: Tensor, fit: bool = False, **options: Any) -> nn.Module:
    for step in order.split(", "):
        if step == "weights":
            model = rpqfx.rpqify(model, WEIGHTS)
        else:
            model = rpqfx.quantize_kv(model, policy(**options), calibration=[batch], fit=fit)
    return model.eval()


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("order", ["cache", "weights, cache", "cache, weights"])
@pytest.mark.parametrize("suffix", [".rpq", ".safetensors"])
def test_it_loads_with_the_dense_build(order: str, suffix: str, tmp_path: Path) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    small, ids = rewritten(order, LM(), tokens(1), fit=suffix == ".rpq"), tokens(5)
    rpqfx.save(small, tmp_path / f"m{suffix}")
    again = rpqfx.load(tmp_path / f"m{suffix}", LM).eval()
    assert torch.equal(again(ids), small(ids))
    assert [type(m) for m in again.modules()] == [type(m) for m in small.modules()]
    assert len(list(again.parameters())) == len(list(small.parameters()))  # shared codebooks stay shared
    assert {name: core.policy for name, core in attentions(again).items()} == {
        name: core.policy for name, core in attentions(small).items()
    }


@pytest.mark.parametrize("name", CACHES)
def test_every_kind_of_coder_comes_back(name: str, tmp_path: Path) -> None:
    small, ids = rewritten("weights, cache", LM(), tokens(1), fit=name == "averages", **CACHES[name]), tokens(5)
    rpqfx.save(small, tmp_path / "m.rpq")
    again = rpqfx.load(tmp_path / "m.rpq", LM).eval()
    assert torch.equal(again(ids), small(ids))
    assert again.state_dict().keys() == small.state_dict().keys()


@pytest.mark.parametrize("order", ["cache", "weights, cache", "cache, weights"])
def test_torchs_own_attention_comes_back(order: str, tmp_path: Path) -> None:
    x = torch.randn(2, 30, 32)
    small = rewritten(order, Attends(), x)
    rpqfx.save(small, tmp_path / "m.rpq")
    again = rpqfx.load(tmp_path / "m.rpq", Attends).eval()
    assert torch.equal(again(x), small(x)) and type(again.inner) is type(small.inner)


def test_a_build_that_quantises_already_is_taken_as_it_is(tmp_path: Path) -> None:
    small, ids = rewritten("weights, cache", LM(), tokens(1)), tokens(5)
    rpqfx.save(small, tmp_path / "m.rpq")

    def build() -> nn.Module:
        return rpqfx.quantize_kv(LM(), policy(bits_per_value=2), calibration=[tokens(2)], fit=False)

    again = rpqfx.load(tmp_path / "m.rpq", build, build_device="cpu").eval()
    assert torch.equal(again(ids), small(ids))


def test_layers_that_a_rule_skips_stay_as_they_are(tmp_path: Path) -> None:
    rule = rpqfx.KVRule("layers.1", skip="told so")
    small, ids = rewritten("cache", LM(), tokens(1), rules=(rule,)), tokens(5)
    rpqfx.save(small, tmp_path / "m.rpq")
    again = rpqfx.load(tmp_path / "m.rpq", LM).eval()
    assert list(attentions(again)) == ["layers.0"] and torch.equal(again(ids), small(ids))


def test_a_cache_works_on_what_was_loaded(tmp_path: Path) -> None:
    small = rewritten("weights, cache", LM(), tokens(1))
    rpqfx.save(small, tmp_path / "m.rpq")
    rpqfx.save(rpqfx.load(tmp_path / "m.rpq", LM), tmp_path / "again.rpq")
    assert (tmp_path / "again.rpq").read_bytes() == (tmp_path / "m.rpq").read_bytes()


def test_another_build_is_refused_by_name(tmp_path: Path) -> None:
    rpqfx.save(rewritten("cache", LM(), tokens(1)), tmp_path / "m.rpq")
    with pytest.raises(FormatError, match=r"holds attention on codes at 'layers\.1', which the model that build"):
        rpqfx.load(tmp_path / "m.rpq", lambda: LM(layers=1))


def test_coders_that_were_changed_by_hand_are_refused(tmp_path: Path) -> None:
    small = rewritten("cache", LM(), tokens(1))
    small.layers[0].kv_codes.keys.quantizer.commitment = 1.0
    with pytest.raises(RPQError, match=r"layers\.0 has attention on codes that quantize_kv did not make"):
        rpqfx.save(small, tmp_path / "m.rpq")
    assert not list(tmp_path.iterdir())


def test_a_routed_model_needs_a_build_that_routes(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    small = rpqfx.route(rpqfx.rpqify(build(), WEIGHTS)).eval()
    rpqfx.save(small, tmp_path / "m.rpq")
    with pytest.raises(FormatError, match=r"holds a routed model .* build\(\) made one that is not: route it there"):
        rpqfx.load(tmp_path / "m.rpq", build)
    x = torch.randn(2, 9, 32)
    assert torch.equal(rpqfx.load(tmp_path / "m.rpq", lambda: rpqfx.route(build())).eval()(x), small(x))
