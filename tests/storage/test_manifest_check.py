"""A manifest and the tensors beside it say the same of every dtype, or the file is refused."""

from __future__ import annotations

import io
import json

import pytest
import torch
from torch import nn

import rpqfx
from rpqfx import Policy
from rpqfx.errors import FormatError
from rpqfx.storage.sealed_manifest import checksum, seal_of

POLICY = Policy(codebook_dim=4, codebook_bits=2, min_size=1, scale=True, column_scale=True, allow_growth=True)
FACTORS = ("codebooks", "scale", "column_scale")
DTYPES = (torch.float64, torch.float16, torch.bfloat16)


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32))


def small() -> nn.Module:
    """No tensor of it loses nothing in half precision, so all are stored as they are."""
    torch.manual_seed(0)
    model = rpqfx.rpqify(build(), POLICY)
    with torch.no_grad():
        model[0].weight_rpq.column_scale.mul_(1.001)
    return model


def saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    file.name = "m.rpq"
    rpqfx.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*(f"0.weight_rpq.{part}" for part in FACTORS), "0.bias"])
@pytest.mark.parametrize("place", ["manifest", "tensor"])
def test_a_tensor_of_another_dtype_than_its_manifest_says_is_refused(place: str, name: str, dtype: torch.dtype) -> None:
    """Either is forged, under a seal and a checksum that fit."""
    held = torch.load(saved(small()), weights_only=True)
    manifest, tensors = json.loads(held["rpqfx"]), held["tensors"]
    entry = next(entry for entry in manifest["tensors"] if name in entry["names"])
    assert (entry["dtype"], "stored" in entry) == ("float32", False)
    if place == "tensor":
        tensors[name] = tensors[name].to(dtype)
    else:
        entry["dtype"] = str(dtype).removeprefix("torch.")
    text = json.dumps({**manifest, "checksum": checksum(tensors)})
    forged = io.BytesIO()
    forged.name = "m.rpq"
    torch.save({"rpqfx": text, "seal": seal_of(text), "tensors": tensors}, forged)
    forged.seek(0)
    with pytest.raises(FormatError, match=rf"it holds {name} as .* of torch\.\w+, its manifest says .* of torch\.\w+"):
        rpqfx.load(forged, build)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", FACTORS[1:])
def test_factors_of_another_dtype_than_their_codebooks_return_as_they_were(part: str, dtype: torch.dtype) -> None:
    """A layer computes with them, so a file may hold them."""
    model = small()
    factors = getattr(model[0].weight_rpq, part)
    with torch.no_grad():
        factors.data = (factors * 1.001).to(dtype)
    again = rpqfx.load(saved(model), build)
    assert getattr(again[0].weight_rpq, part).dtype == dtype
    x = torch.ones(2, 16)
    assert torch.equal(again(x), model(x)) and again(x).dtype == model(x).dtype
