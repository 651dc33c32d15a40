"""The report of a file is that of the model in it, without the model."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import rpqfx
from rpqfx import Policy
from rpqfx.errors import RPQError
from rpqfx.nn import RPQLinear
from rpqfx.storage.manifest_report import report_of
from rpqfx.storage.sealed_manifest import prepared
from tests.models import CASES, SMALL, Case

WIDE = Policy.from_scratch(codebook_dim=4, codebook_bits=9, min_size=64, allow_growth=True, scale=True, signs=True)


def manifest_of(model: nn.Module) -> dict[str, object]:
    return json.loads(prepared(model)[1])


@pytest.mark.parametrize("policy", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("case", CASES[:8], ids=lambda case: case.name.replace(" ", "_"))
def test_it_is_the_report_of_the_model(case: Case, policy: Policy) -> None:
    torch.manual_seed(0)
    model = rpqfx.rpqify(case.build(), policy)
    assert report_of(manifest_of(model)) == rpqfx.report(model)


def test_shared_codebooks_and_tiles_count_as_in_the_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 96) for _ in range(2)], nn.Linear(96, 64))
    small = rpqfx.convert(model[0:1] + model[2:], Policy.pretrained(5), [torch.randn(64, 64)])
    assert any(site.spec is not None and site.spec.tiled for site in rpqfx.report(small).rewritten)
    assert report_of(manifest_of(small)) == rpqfx.report(small)


def test_layers_that_were_built_by_hand_count_too() -> None:
    model = nn.Sequential(RPQLinear(64, 32, codebook_dim=8, codebook_bits=4), nn.LayerNorm(32))
    found, wanted = report_of(manifest_of(model)), rpqfx.report(model)
    assert (found.before, found.after, found.stored_bits) == (wanted.before, wanted.after, wanted.stored_bits)


def test_what_holds_no_quantized_weights_has_none() -> None:
    with pytest.raises(RPQError, match="holds no quantized weights"):
        report_of({"sites": [], "tensors": [], "records": [], "notes": []})
