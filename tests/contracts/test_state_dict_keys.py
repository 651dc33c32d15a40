"""The names under which a rewritten model keeps its tensors are a promise.

Checkpoints, optimiser states and sharding plans are written by name, so the names must never change unnoticed:

- A tensor that was not rewritten keeps its name, its shape and its place in the state dict's own order.
- A Parameter ``<name>`` that was rewritten is no longer there. In its stead are ``<name>_rpq.codebooks``
  ``[R, G, K, d]`` and ``<name>_rpq.codes`` ``[R, M, N]``; with ``scale=True`` also ``<name>_rpq.scale`` ``[N]``, with
  ``column_scale=True`` also ``<name>_rpq.column_scale`` ``[D / taps]``, and with ``signs=True`` also
  ``<name>_rpq.signs`` ``[R, M, ceil(N / 8)]``. There is nothing else.
- A tied Parameter is there under each of its names, as it is in the dense model's state dict.
- ``codebooks``, ``scale`` and ``column_scale`` are Parameters; ``codes`` and ``signs`` are buffers. Both are
  persistent.
- A layer that is built by hand has the names that a rewrite gives it.
- Loading is strict both ways: a dense state dict does not fit a rewritten model, and codes that point outside their
  codebook are refused by name.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rpqfx
from rpqfx import Policy, Rule
from rpqfx.errors import CodeError
from rpqfx.nn import RPQEmbedding, RPQLinear
from tests.models import BY_NAME, CASES, MLP, SMALL, SUFFIX, Case, quantized_weights

PARTS = {
    "scale": ("codebooks", "scale", "codes"),
    "column_scale": ("codebooks", "column_scale", "codes"),
    "signs": ("codebooks", "codes", "signs"),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_names_of_every_model(case: Case):
    model = case.model(torch.float32)
    small = rpqfx.rpqify(model, case.policy)
    held = {*case.rewritten, *case.tied}
    dense, ours = model.state_dict(), small.state_dict()
    kept = {name: value.shape for name, value in dense.items() if name not in held}
    new = {f"{name}{SUFFIX}.{part}" for name in held for part in ("codebooks", "codes")}
    assert set(ours) == kept.keys() | new
    assert {name: ours[name].shape for name in kept} == kept
    assert [name for name in ours if name in kept] == list(kept)


@pytest.mark.parametrize("option", PARTS)
def test_factors_and_signs_have_names_of_their_own(option: str):
    policy = Policy(codebook_dim=4, codebook_bits=2, min_size=64, allow_growth=True, **{option: True})
    names = set(rpqfx.rpqify(MLP(), policy).state_dict())
    wanted = {f"{layer}.weight{SUFFIX}.{part}" for layer in ("fc1", "fc2") for part in PARTS[option]}
    assert names == wanted | {"fc1.bias", "fc2.bias"}


def test_shapes_are_those_of_the_spec():
    policy = Policy(
        codebook_dim=4,
        codebook_bits=2,
        min_size=64,
        stages=2,
        scale=True,
        column_scale=True,
        signs=True,
        allow_growth=True,
    )
    small = rpqfx.rpqify(MLP(), policy)
    state = small.state_dict()
    for name, weight in quantized_weights(small).items():
        spec = weight.spec
        assert state[f"{name}{SUFFIX}.codebooks"].shape == spec.codebooks_shape == (2, spec.num_subvectors, 4, 4)
        assert state[f"{name}{SUFFIX}.codes"].shape == spec.codes_shape == (2, spec.num_subvectors, spec.num_vectors)
        assert state[f"{name}{SUFFIX}.scale"].shape == (spec.num_vectors,)
        assert state[f"{name}{SUFFIX}.column_scale"].shape == (spec.dim,)
        assert state[f"{name}{SUFFIX}.signs"].shape == (2, spec.num_subvectors, -(-spec.num_vectors // 8))


def test_codebooks_and_factors_are_parameters_codes_and_signs_buffers():
    policy = Policy(
        codebook_dim=4, codebook_bits=2, min_size=64, scale=True, column_scale=True, signs=True, allow_growth=True
    )
    small = rpqfx.rpqify(MLP(), policy)
    parameters = {name.rpartition(".")[2] for name, _ in small.named_parameters() if SUFFIX in name}
    buffers = {name.rpartition(".")[2] for name, _ in small.named_buffers()}
    assert parameters == {"codebooks", "scale", "column_scale"} and buffers == {"codes", "signs"}


def test_a_tied_tensor_is_there_under_each_name_and_is_one():
    state = rpqfx.rpqify(BY_NAME["gpt"].model(torch.float32), SMALL).state_dict()
    for part in ("codebooks", "codes"):
        tok, head = state[f"tok.weight{SUFFIX}.{part}"], state[f"head.weight{SUFFIX}.{part}"]
        assert tok.data_ptr() == head.data_ptr()


def test_layers_built_by_hand_have_the_same_names():
    by_hand = nn.Sequential(
        RPQEmbedding(64, 16, codebook_dim=4, codebook_bits=2), RPQLinear(16, 32, codebook_dim=4, codebook_bits=2)
    )
    small = rpqfx.rpqify(nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 32)), SMALL)
    shapes = {name: value.shape for name, value in small.state_dict().items()}
    assert {name: value.shape for name, value in by_hand.state_dict().items()} == shapes


def test_loading_is_strict_both_ways():
    model = MLP()
    small = rpqfx.rpqify(model, SMALL)
    with pytest.raises(RuntimeError, match=r"Missing key.*fc1.weight_rpq.codebooks[\s\S]*Unexpected key.*fc1.weight"):
        small.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*fc1.weight"):
        model.load_state_dict(small.state_dict())


def test_a_state_dict_of_other_codebooks_is_refused():
    small = rpqfx.rpqify(MLP(), SMALL)
    other = rpqfx.rpqify(
        MLP(), Policy(codebook_dim=4, codebook_bits=3, min_size=64, rules=(Rule("fc2", skip="as it is"),))
    )
    with pytest.raises((RuntimeError, CodeError), match=r"fc1\.weight_rpq"):
        small.load_state_dict(other.state_dict())


def test_codes_outside_their_codebook_are_refused_by_name():
    small = rpqfx.rpqify(MLP(), SMALL)
    state = small.state_dict()
    state[f"fc1.weight{SUFFIX}.codes"] = torch.full_like(state[f"fc1.weight{SUFFIX}.codes"], 4)
    with pytest.raises(CodeError, match=r"fc1\.weight_rpq\.codes holds 4 to 4, but the codebook has 4 entries"):
        small.load_state_dict(state)
