"""A calibration of keys and values is saved once and used again, for models like the one it was fitted to alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import KVPolicy
from rpqfx.errors import FormatError, InputError, RewriteError
from rpqfx.kv import CodebookCache, attentions
from tests.kv.kv_models import LM, tokens

WEIGHTS = rpqfx.Policy(codebook_dim=4, codebook_bits=4, min_size=64, sharing="layer")


def small_of(model: nn.Module, **options: Any) -> nn.Module:
    policy = KVPolicy(bits_per_value=3, window=4, sinks=2, codebook_size=16, chunk=8, codebook_dim=4, **options)
    return rpqfx.quantize_kv(model, policy, calibration=[tokens(1, 4)])


@pytest.mark.parametrize("suffix", [".rpq", ".safetensors"])
@pytest.mark.parametrize("options", [{}, {"transform": False}, {"decay": 0.9}, {"skip_layers": (0,)}])
@torch.no_grad()
def test_it_gives_the_model_that_was_calibrated(suffix: str, options: dict[str, Any], tmp_path: Path) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    dense, x = LM().eval(), tokens(5)
    small = small_of(dense, **options)
    rpqfx.save_calibration(small, tmp_path / f"c{suffix}")
    again = rpqfx.quantize_kv(LM().eval(), tmp_path / f"c{suffix}")
    assert torch.equal(again(x), small(x)) and not torch.equal(again(x), dense(x))
    assert {name: core.policy for name, core in attentions(again).items()} == {
        name: core.policy for name, core in attentions(small).items()
    }
    assert len(list(again.parameters())) == len(list(small.parameters()))
    assert not any(module.training for module in again.modules())


@torch.no_grad()
def test_it_holds_no_weight_and_serves_a_cache(tmp_path: Path) -> None:
    small, x = small_of(LM()).eval(), tokens(5)
    rpqfx.save_calibration(small, path := tmp_path / "c.rpq")
    rpqfx.save(small, whole := tmp_path / "whole.rpq")
    assert path.stat().st_size < whole.stat().st_size
    again = rpqfx.quantize_kv(LM().eval(), str(path), inplace=True)
    cache = CodebookCache.for_model(again)
    with cache.attended():
        steps = torch.cat([again(part) for part in x.split(1, 1)], 1)
    torch.testing.assert_close(steps, small(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_weights_may_be_in_codebooks_before_or_after(tmp_path: Path) -> None:
    weights, x = rpqfx.rpqify(LM(), WEIGHTS).eval(), tokens(5)
    rpqfx.save_calibration(small_of(weights), path := tmp_path / "c.rpq")
    assert torch.equal(rpqfx.quantize_kv(weights, path)(x), small_of(weights).eval()(x))
    assert attentions(rpqfx.rpqify(rpqfx.quantize_kv(LM(), path), WEIGHTS))


def test_a_module_that_is_attention_itself(tmp_path: Path) -> None:
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
    call = {"query": x, "key": x, "value": x, "need_weights": False}
    policy = KVPolicy(bits_per_value=3, window=4, sinks=2, codebook_size=16, chunk=8, codebook_dim=4)
    small = rpqfx.quantize_kv(attention, policy, calibration=[call])
    rpqfx.save_calibration(small, tmp_path / "c.rpq")
    again = rpqfx.quantize_kv(attention, tmp_path / "c.rpq")
    assert torch.equal(again(**call)[0], small(**call)[0])


class Renamed(nn.Module):
    """The same model at another name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = LM()

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids)


class Wider(LM):
    """Attention with projections of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0].k = nn.Linear(32, 24)


class Other(type(LM().layers[0])):  # type: ignore[misc]
    """Attention of another class."""


def changed() -> nn.Module:
    model = LM()
    model.layers[1].__class__ = Other
    return model


@pytest.mark.parametrize(
    ("build", "said"), [(Renamed, "has not"), (Wider, r"k\.\w+ of shape"), (changed, "where this model has a Other")]
)
def test_another_model_is_refused_and_left_alone(build: Any, said: str, tmp_path: Path) -> None:
    rpqfx.save_calibration(small_of(LM()), tmp_path / "c.rpq")
    model = build()
    before = dict(model.state_dict())
    with pytest.raises(RewriteError, match=said):
        rpqfx.quantize_kv(model, tmp_path / "c.rpq", inplace=True)
    assert model.state_dict().keys() == before.keys() and not attentions(model)


def test_a_file_that_was_altered_or_is_something_else_is_refused(tmp_path: Path) -> None:
    small = small_of(LM())
    rpqfx.save_calibration(small, path := tmp_path / "c.rpq")
    whole = bytearray(path.read_bytes())
    at = whole.index(b"layers.0") + 3
    whole[at] ^= 1
    path.write_bytes(bytes(whole))
    with pytest.raises(FormatError):
        rpqfx.quantize_kv(LM(), path)
    rpqfx.save(small, path)
    with pytest.raises(FormatError, match="no calibration alone"):
        rpqfx.quantize_kv(LM(), path)
    with pytest.raises(FileNotFoundError):
        rpqfx.quantize_kv(LM(), tmp_path / "none.rpq")
    with pytest.raises(RewriteError, match="quantize_kv first"):
        rpqfx.save_calibration(LM(), path)


@pytest.mark.parametrize("more", [{"calibration": [tokens(1)]}, {"fit": False}, {"seed": 1}])
def test_what_would_do_nothing_beside_it_is_refused(more: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="would do nothing"):
        rpqfx.quantize_kv(LM(), tmp_path / "c.rpq", **more)


def test_a_model_that_attends_to_codes_already_is_refused(tmp_path: Path) -> None:
    small = small_of(LM())
    rpqfx.save_calibration(small, tmp_path / "c.rpq")
    with pytest.raises(RewriteError, match="already"):
        rpqfx.quantize_kv(small, tmp_path / "c.rpq")
