"""RPQMultiheadAttention is torch.nn.MultiheadAttention."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rpqfx.errors import InputError
from rpqfx.nn import RPQLinear, RPQMultiheadAttention
from tests.helpers import assert_equals_dense, codebook_options, generator, randn, randomise, seeds


def some_mask(data: st.DataObject, seed: int, *shape: int) -> Tensor:
    """Boolean or added; the first key is never hidden, for a row that sees nothing has no defined result."""
    hidden = torch.rand(shape, generator=generator(seed)) < 0.4
    hidden[..., 0] = False
    if data.draw(st.booleans()):
        return hidden
    return randn(seed, *shape).masked_fill(hidden, float("-inf"))


@pytest.mark.few(50)
@given(st.data(), seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_equals_the_dense_layer(
    data: st.DataObject, seed: int, heads: int, head_dim: int, length: int, source: int
) -> None:
    """Same outputs, weights and gradients: all flags, widths, masks, orders of axes, and dropout of one seed."""
    width = heads * head_dim
    flag = st.booleans()
    args: dict[str, Any] = {
        "embed_dim": width, "num_heads": heads, "dropout": data.draw(st.sampled_from([0.0, 0.4])),
        "bias": data.draw(flag), "add_bias_kv": data.draw(flag), "add_zero_attn": data.draw(flag),
        "batch_first": data.draw(flag), "dtype": torch.float64,
    }  # fmt: skip
    same = data.draw(st.sampled_from(["self", "memory", "none"]))
    if same == "none":
        args["kdim"], args["vdim"] = (data.draw(st.sampled_from([None, 2, 5])) for _ in range(2))
    source = length if same == "self" else source
    kdim, vdim = args.get("kdim") or width, args.get("vdim") or width
    packed = (kdim, vdim) == (width, width)
    sizes = [(3 * width, width)] if packed else [(width, width), (width, kdim), (width, vdim)]
    options = data.draw(codebook_options([*sizes, (width, width)], split=True))
    layer = randomise(RPQMultiheadAttention(**args, **options), seed)
    dense = nn.MultiheadAttention(**args)
    training = data.draw(flag)
    layer.train(training), dense.train(training)

    batch = data.draw(st.sampled_from([None, 1, 2]))

    def sequence(offset: int, long: int, wide: int) -> Tensor:
        shape = (long, wide) if batch is None else (batch, long, wide) if args["batch_first"] else (long, batch, wide)
        return randn(seed + offset, *shape)

    query = sequence(0, length, width)
    key = query if same == "self" else sequence(1, source, kdim)
    value = key if same in ("self", "memory") else sequence(2, source, vdim)
    rows = () if batch is None else (batch,)
    kwargs: dict[str, Any] = {"need_weights": data.draw(flag), "average_attn_weights": data.draw(flag)}
    if data.draw(flag):
        kwargs["key_padding_mask"] = some_mask(data, seed + 3, *rows, source)
    kind = data.draw(st.sampled_from(["none", "one", "each head", "causal"]))
    if kind == "causal":
        kwargs["attn_mask"] = torch.ones(length, source, dtype=torch.bool).triu(1)
        # What torch does with the hint when keys are appended is not what the mask says.
        kwargs["is_causal"] = data.draw(flag) and not (args["add_bias_kv"] or args["add_zero_attn"])
    elif kind != "none":
        every_head = ((batch or 1) * heads,) if kind == "each head" else ()
        kwargs["attn_mask"] = some_mask(data, seed + 4, *every_head, length, source)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched")  # one mask boolean and one added
        assert_equals_dense(layer, dense, query, key, value, seed=seed, **kwargs)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_it_serves_inside_a_transformer_layer(norm_first: bool, grad: bool) -> None:
    """Which in eval mode reads the projections' weights for a fast path of its own."""
    host = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first).double().eval()
    x = randn(0, 2, 5, 8)
    attention = RPQMultiheadAttention(8, 2, batch_first=True, codebook_dim=4, dtype=torch.float64).eval()
    with torch.no_grad():
        host.self_attn.in_proj_weight.copy_(attention.in_proj_weight)
        host.self_attn.out_proj.weight.copy_(attention.out_proj.weight)
        host.self_attn.in_proj_bias.copy_(attention.in_proj_bias)
        host.self_attn.out_proj.bias.copy_(attention.out_proj.bias)
    with torch.set_grad_enabled(grad):
        expected = host(x)
        host.self_attn = attention
        torch.testing.assert_close(host(x), expected)


def test_a_causal_hint_without_its_mask_is_refused() -> None:
    layer = RPQMultiheadAttention(8, 2, codebook_dim=4)
    x = torch.zeros(3, 1, 8)
    with pytest.raises(InputError, match="pass that mask too"):
        layer(x, x, x, is_causal=True)


def test_inputs_that_do_not_fit_are_refused() -> None:
    layer = RPQMultiheadAttention(8, 2, codebook_dim=4)
    x = torch.zeros(3, 1, 8)
    with pytest.raises(InputError, match="expected 8 features"):
        layer(x, x[..., :4], x)
    with pytest.raises(InputError, match="float64"):
        layer(x, x.double(), x)
    with pytest.raises(InputError, match="complex64"):
        layer(x.to(torch.complex64), x, x)


@pytest.mark.parametrize("extra", [{}, {"kdim": 5, "vdim": 6}])
def test_all_projections_are_held_in_codebooks(extra: dict[str, int]) -> None:
    layer = RPQMultiheadAttention(16, 2, codebook_dim=1, **extra)
    assert isinstance(layer.out_proj, RPQLinear)
    names = {name for name, p in layer.named_parameters() if p.dim() == 2}
    assert not names, f"dense weights are left: {names}"
    expected = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if extra else ["in_proj_weight"]
    for name in expected:
        assert f"{name}_rpq.codes" in layer.state_dict()


def test_a_module_may_be_built_with_torch_defaults() -> None:
    """bias, batch_first and the rest keep their places in the argument list."""
    ours = RPQMultiheadAttention(16, 2, 0.1, False, True, True, 5, 6, True, codebook_dim=1)
    theirs = nn.MultiheadAttention(16, 2, 0.1, False, True, True, 5, 6, True)
    for name in ("dropout", "in_proj_bias", "add_zero_attn", "kdim", "vdim", "batch_first", "head_dim"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.bias_k is not None and ours.bias_k.shape == theirs.bias_k.shape
