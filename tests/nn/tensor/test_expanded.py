"""What is read as a layer's weight is a tensor that cannot be changed without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpqfx import Policy, rpqify
from rpqfx.errors import RewriteError
from rpqfx.nn import RPQLinear

READ_AS = ["expanded", "tensor"]


def layer(read_as: Any) -> RPQLinear:
    torch.manual_seed(0)
    made = RPQLinear(8, 6, codebook_dim=4, codebook_bits=2)
    made.weight_rpq.read_as = read_as
    return made


def assign_data(weight: Tensor) -> None:
    weight.data = weight.detach() + 1


def add_to_data(weight: Tensor) -> None:
    weight.data += 1


def set_item(weight: Tensor) -> None:
    weight[0] = 1


CHANGES: list[Callable[[Tensor], Any]] = [
    assign_data, add_to_data, set_item, lambda w: w.mul_(w.detach()), lambda w: w.data.copy_(w.detach()),
    lambda w: w.data.zero_(), nn.init.normal_, nn.init.xavier_uniform_,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("read_as", READ_AS)
@torch.no_grad()
def test_a_change_in_place_is_refused(read_as: str, change: Callable[[Tensor], Any]):
    made = layer(read_as)
    before = made.weight_rpq()
    with pytest.raises(RewriteError, match="would change"):
        change(made.weight)
    assert torch.equal(made.weight_rpq(), before)


@pytest.mark.parametrize("read_as", READ_AS)
def test_it_is_a_tensor_whose_gradient_is_the_codebooks(read_as: str):
    made, x = layer(read_as), torch.randn(3, 8)
    assert isinstance(made.weight, Tensor) and torch.overrides.has_torch_function((made.weight,)) == (
        read_as == "expanded"
    )
    y = F.linear(x, made.weight, made.bias)
    assert type(y) is Tensor and type(made.weight * 2) is Tensor
    torch.testing.assert_close(y, made(x))
    y.sum().backward()
    found, made.weight_rpq.codebooks.grad = made.weight_rpq.codebooks.grad, None
    made(x).sum().backward()
    torch.testing.assert_close(found, made.weight_rpq.codebooks.grad)


@pytest.mark.parametrize("read_as", [*READ_AS, "virtual"])
@torch.no_grad()
def test_it_may_be_multiplied_by_a_number(read_as: str):
    made = layer(read_as)
    before = made.weight_rpq()
    made.weight.mul_(2)
    made.weight.data *= 2
    made.weight.data /= 8
    assert torch.equal(made.weight_rpq(), before / 2)


@pytest.mark.parametrize("read_as", READ_AS)
def test_it_gets_rows_ties_and_freezes_as_a_parameter_does(read_as: str):
    made, other = layer(read_as), RPQLinear(8, 6, codebook_dim=4, codebook_bits=2)
    values = made.weight.detach().clone()
    made.weight.data = torch.cat([values, values])
    assert made.weight.shape == (12, 8)
    other.weight = made.weight
    assert other.weight_rpq is made.weight_rpq
    made.weight.requires_grad_(False)
    assert not made.weight_rpq.codebooks.requires_grad and not made.weight.requires_grad
    made.weight.requires_grad = True
    assert made.weight_rpq.codebooks.requires_grad and made.weight.requires_grad


def test_weights_within_an_encoder_layer_are_as_safe():
    """They are read as plain tensors, by which torch takes its fast path; a change would be lost all the same."""
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    small: Any = rpqify(encoder, Policy(codebook_dim=4, codebook_bits=2, min_size=64))
    assert not torch.overrides.has_torch_function((small.linear1.weight, small.self_attn.in_proj_weight))
    for read in (lambda: small.linear1.weight, lambda: small.self_attn.in_proj_weight):
        with pytest.raises(RewriteError, match="would change"):
            add_to_data(read())
