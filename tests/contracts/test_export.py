"""torch.export takes layers with a batch of any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from rpqfx.ops import products
from tests.helpers import assert_same, generator, randn
from tests.kinds import CHANNELS, KINDS


class First(nn.Module):
    """The output of attention without its weights."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.layer(*inputs)
        return out[0] if isinstance(out, tuple) else out


def batch_of(name: str, size: int) -> tuple[Tensor, ...]:
    kind = KINDS[name]
    axis = 1 if "attention" in name else 0
    shapes = [(*shape[:axis], size, *shape[axis + 1 :]) for shape in kind.inputs]
    if kind.ids is not None:
        return tuple(torch.randint(kind.ids, shape, generator=generator(size)) for shape in shapes)
    return tuple(randn(size + i, *shape) for i, shape in enumerate(shapes))


@pytest.mark.parametrize(
    "name",
    ["linear row", "linear column", "linear signs scale", "linear column_scale", "conv2d", "conv transpose 2d",
     "embedding", "embedding column_scale", "embedding bag", "bilinear row", "attention", "attention kdim vdim"],
)  # fmt: skip
def test_exported_equals_eager_for_every_batch(name: str) -> None:
    assert_exports(name)


@pytest.mark.parametrize("name", CHANNELS)
def test_an_exported_convolution_that_contracts_equals_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "cheaper_conv", lambda *args: "lookup")
    monkeypatch.setattr(products, "Conv", None)
    assert_exports(name)
    assert "rpqfx" not in str(export(KINDS[name].make(), KINDS[name].make_inputs(), strict=False).graph)


def assert_exports(name: str) -> None:
    layer = First(KINDS[name].make()).eval()
    batch = Dim("batch", min=2, max=4096)
    axis = 1 if "attention" in name else 0
    inputs = batch_of(name, 4)
    exported = export(layer, inputs, dynamic_shapes=((*[{axis: batch}] * len(inputs),),), strict=False)
    for size in (2, 4, 61):
        inputs = batch_of(name, size)
        assert_same(exported.module()(*inputs), layer(*inputs))


@pytest.mark.parametrize("name", ["linear row", "conv2d", "embedding"])
def test_an_exported_program_holds_codebooks_and_codes_and_no_weight(name: str) -> None:
    layer = KINDS[name].make()
    program = export(layer, KINDS[name].make_inputs(), strict=False)
    assert set(program.state_dict) == set(layer.state_dict())
    weight = layer.weight.numel()
    assert all(tensor.numel() < weight for tensor in (*program.state_dict.values(), *program.constants.values()))


def test_an_exported_program_is_of_torch_operators_alone() -> None:
    """It runs where this library is not installed."""
    for name in ("linear row", "conv2d", "embedding"):
        program = export(KINDS[name].make(), KINDS[name].make_inputs(), strict=False)
        assert "rpqfx" not in str(program.graph)
