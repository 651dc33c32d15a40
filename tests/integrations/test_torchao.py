"""quantize_ of torchao with quantized weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import rpqfx
from rpqfx import Policy
from rpqfx.errors import InputError, PolicyError
from rpqfx.nn import RPQEmbedding, RPQLinear

quantization = pytest.importorskip("torchao.quantization")
from rpqfx.integrations.torchao import RPQConfig  # noqa: E402


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()


def test_linear_layers_are_what_rpqify_makes_of_each() -> None:
    small, ids = model(), torch.arange(8)
    layer, hooked = small[1], []
    layer.register_forward_hook(lambda *_: hooked.append(1))
    quantization.quantize_(small, RPQConfig(bits_per_weight=5))
    assert small[1] is layer and [type(part) for part in small] == [nn.Embedding, RPQLinear, nn.ReLU, RPQLinear]
    wanted = model()
    for at in (1, 3):
        wanted[at] = rpqfx.rpqify(wanted[at], Policy.pretrained(5), seed=0)
    assert torch.equal(small(ids), wanted(ids)) and hooked
    assert rpqfx.report(small).bits_per_weight <= 6


def test_a_filter_takes_the_whole_model_with_its_ties() -> None:
    small = model()
    small.append(nn.Linear(32, 100, bias=False))
    small[4].weight, policy = small[0].weight, Policy(codebook_dim=8, codebook_bits=4, min_size=64)
    quantization.quantize_(small, RPQConfig(policy=policy), filter_fn=lambda _, name: not name)
    assert type(small[0]) is RPQEmbedding and small[0].weight_rpq is small[4].weight_rpq


def test_names_have_configs_of_their_own() -> None:
    small = model()
    configs: OrderedDict[str, Any] = OrderedDict()
    configs["1"] = RPQConfig(bits_per_weight=6)
    configs["re:[0-9]"] = None
    quantization.quantize_(small, quantization.FqnToConfig(configs), filter_fn=None)
    assert type(small[1]) is RPQLinear and type(small[3]) is nn.Linear


def test_twice_changes_nothing() -> None:
    small = model()
    quantization.quantize_(small, RPQConfig(bits_per_weight=5))
    before = copy.deepcopy(small.state_dict())
    quantization.quantize_(small, RPQConfig(bits_per_weight=3))
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, PolicyError), ({"bits_per_weight": 4, "policy": Policy()}, PolicyError),
        ({"policy": "small"}, PolicyError), ({"bits_per_weight": 0}, PolicyError),
        ({"bits_per_weight": 17}, PolicyError),
        ({"bits_per_weight": 4, "seed": -1}, InputError),
    ],
)  # fmt: skip
def test_configs_that_say_nothing(options: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        RPQConfig(**options)


def test_a_layer_that_is_too_small_is_refused_by_name() -> None:
    small = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(PolicyError, match=r"a Linear \(weight \(4, 8\), bias \(4,\)\) cannot be quantized"):
        quantization.quantize_(small, RPQConfig(bits_per_weight=4))
    assert type(small[0]) is nn.Linear
