"""Averages of a rewritten model are models of their own: floats are averaged, codes stay codes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import rpqfx
from rpqfx import Policy, Rule
from rpqfx.nn import RPQWeight

POLICY = Policy.from_scratch(
    codebook_dim=4,
    codebook_bits=4,
    min_size=64,
    scale=True,
    rules=(Rule("emb", codebook_bits=9, signs=True, allow_growth=True),),
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.bn, self.fc = nn.Embedding(600, 16), nn.BatchNorm1d(16), nn.Linear(16, 64)
        self.w, self.head = nn.Parameter(torch.randn(64, 16) / 8), nn.Linear(16, 600, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc(self.bn(self.emb(ids)))) @ self.w)


def averaging_floats(decay: float) -> Callable[..., None]:
    """An average of floats that takes integers as they are (also in ``docs/guides/processes.md``)."""

    @torch.no_grad()
    def average(averaged: Sequence[Tensor], new: Sequence[Tensor], count: Any) -> None:
        for a, b in zip(averaged, new, strict=True):
            if a.is_floating_point():
                a.lerp_(b, 1 - decay)
            else:
                a.copy_(b)

    return average


AVERAGES: dict[str, dict[str, Any]] = {
    "mean": {},
    "mean, buffers": {"use_buffers": True},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "ema, buffers": {"multi_avg_fn": averaging_floats(0.9), "use_buffers": True},
}


def codes(model: nn.Module) -> list[Tensor]:
    return [module.codes.long() for module in model.modules() if isinstance(module, RPQWeight)]


def train(model: nn.Module, average: Callable[[], Any]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(4):
        ids = torch.arange(step, step + 32)
        optimizer.zero_grad()
        F.cross_entropy(model(ids), ids).backward()
        optimizer.step()
        average()


@pytest.mark.parametrize("name", AVERAGES)
def test_an_averaged_model_has_averaged_codebooks_and_the_codes_of_the_model(name: str):
    torch.manual_seed(0)
    dense = Net()
    small = rpqfx.rpqify(dense, POLICY)
    before = codes(small)
    averaged = AveragedModel(small, **AVERAGES[name])
    seen: list[dict[str, Tensor]] = []

    def update() -> None:
        averaged.update_parameters(small)
        seen.append({key: value.detach().clone() for key, value in small.named_parameters()})

    train(small, update)
    for key, value in averaged.module.named_parameters():
        wanted = seen[0][key].clone()
        for count, later in enumerate(seen[1:], 1):
            wanted = wanted.lerp(later[key], 1 / (count + 1) if name.startswith("mean") else 0.1)
        torch.testing.assert_close(value.detach(), wanted, rtol=1e-4, atol=1e-5, msg=key)
    assert all(torch.equal(a, b) for a, b in zip(codes(averaged), before, strict=True))
    update_bn([torch.arange(32)], averaged)
    again = AveragedModel(copy.deepcopy(small), **AVERAGES[name])
    again.load_state_dict(averaged.state_dict())
    ids = torch.arange(40)
    assert torch.equal(again.eval()(ids), averaged.eval()(ids))


def test_averages_of_state_dicts_are_written_through():
    """As EMA models are kept elsewhere: floats of two state dicts averaged, the rest copied."""
    torch.manual_seed(0)
    first, second = rpqfx.rpqify(Net(), POLICY).eval(), rpqfx.rpqify(Net(), POLICY).eval()
    with torch.no_grad():
        for ours, theirs in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
            ours.lerp_(theirs, 1.0) if ours.is_floating_point() else ours.copy_(theirs)
    assert torch.equal(first(torch.arange(40)), second(torch.arange(40)))


def test_torchs_own_average_of_integers_loses_some():
    """Which is why the guide has one that copies them; a decay of 0.9 makes of 76 codes in 256 the one before."""
    kept, codes = torch.arange(256, dtype=torch.uint8), torch.arange(256, dtype=torch.uint8)
    get_ema_multi_avg_fn(0.9)([kept], [codes], 1)
    assert int((kept != codes).sum()) > 0
    averaging_floats(0.9)([kept], [codes], 1)
    assert torch.equal(kept, codes)


class Images(nn.Module):
    """Four-dimensional codebooks beside filters, which ``Module.to(memory_format=...)`` lays out in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 64, 3, padding=1), nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.fc, self.w = nn.Linear(32, 512), nn.Parameter(torch.randn(512, 32) / 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(torch.relu(self.conv(x))).mean((2, 3))
        return torch.relu(self.fc(h)) @ self.w


LAYOUTS = {
    "own": Policy.from_scratch(codebook_bits=4, min_size=64),
    "shared": Policy.from_scratch(codebook_dim=4, codebook_bits=4, sharing="layer", min_size=64, allow_growth=True),
    "stages and signs": Policy.from_scratch(
        codebook_dim=4, codebook_bits=4, stages=2, scale=True, signs=True, min_size=64, allow_growth=True
    ),
    "wide": Policy.from_scratch(
        codebook_dim=4,
        codebook_bits=3,
        min_size=64,
        allow_growth=True,
        rules=(Rule("fc", codebook_bits=9), Rule("w", codebook_bits=9)),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_formats_change_no_value_and_no_gradient(name: str, tmp_path: Any):
    torch.manual_seed(0)
    small = rpqfx.rpqify(Images(), LAYOUTS[name])
    x = torch.randn(2, 3, 8, 8)
    wanted = small(x)
    wanted.square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in small.named_parameters()}
    other = copy.deepcopy(small).to(memory_format=torch.channels_last)
    for images in (x, x.to(memory_format=torch.channels_last)):
        other.zero_grad()
        found = other(images)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        found.square().sum().backward()
        for key, parameter in other.named_parameters():
            scale = float(gradients[key].abs().max())
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-3, atol=1e-4 * scale, msg=key)
    torch.optim.AdamW(other.parameters(), 1e-3, foreach=True).step()
    for suffix in ("rpq", "safetensors"):
        rpqfx.save(other, tmp_path / f"model.{suffix}")
        again = rpqfx.load(tmp_path / f"model.{suffix}", Images)
        torch.testing.assert_close(again(x), other(x), rtol=1e-5, atol=1e-6)
