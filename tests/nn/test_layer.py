"""What holds for every kind of layer."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from rpqfx.errors import CodeError, InputError, RewriteError, SpecError
from rpqfx.nn import (
    RPQBilinear,
    RPQConv1d,
    RPQConv2d,
    RPQConv3d,
    RPQConvTranspose1d,
    RPQConvTranspose2d,
    RPQConvTranspose3d,
    RPQEmbedding,
    RPQEmbeddingBag,
    RPQLinear,
    RPQMultiheadAttention,
    RPQWeight,
)
from rpqfx.nn.hosting.backed import backed_weights
from rpqfx.ops import PLANS
from tests.helpers import SUFFIX, assert_equals_dense, dense_twin, randomise
from tests.kinds import KINDS, NAMES, Kind

CLASSES = [
    RPQBilinear, RPQConv1d, RPQConv2d, RPQConv3d, RPQConvTranspose1d, RPQConvTranspose2d, RPQConvTranspose3d,
    RPQEmbedding, RPQEmbeddingBag, RPQLinear, RPQMultiheadAttention,
]  # fmt: skip

# Sixteen vectors each, so that sixteen entries hold a weight exactly. The queries' weight of attention stands apart
# from the others where keys have another width.
EXACT = {
    RPQLinear: (24, 16), RPQEmbedding: (16, 12), RPQEmbeddingBag: (16, 12), RPQBilinear: (4, 6, 4),
    RPQConv1d: (6, 16, 3), RPQConv2d: (6, 16, 3), RPQConv3d: (2, 16, 3), RPQConvTranspose1d: (16, 6, 3),
    RPQConvTranspose2d: (16, 6, 3), RPQConvTranspose3d: (16, 2, 3),
    RPQMultiheadAttention: (16, 4, 0.0, True, False, False, 8, 12),
}  # fmt: skip

# Large enough that a standard deviation is known to a few percent.
LARGE = {
    RPQLinear: (512, 256), RPQEmbedding: (512, 256), RPQEmbeddingBag: (512, 256), RPQBilinear: (24, 256, 32),
    RPQConv1d: (128, 256, 3), RPQConv2d: (64, 256, 3), RPQConv3d: (32, 256, 3), RPQConvTranspose1d: (256, 128, 3),
    RPQConvTranspose2d: (256, 64, 3), RPQConvTranspose3d: (256, 32, 3), RPQMultiheadAttention: (256, 4),
}  # fmt: skip


def held(module: nn.Module) -> Iterator[tuple[str, RPQWeight]]:
    """Name of the dense Parameter, and what holds it."""
    for name, child in module.named_modules():
        if isinstance(child, RPQWeight):
            yield name.removesuffix(SUFFIX), child


def read(module: nn.Module, name: str) -> Tensor:
    """A Parameter as foreign code reads it."""
    for part in name.split("."):
        module = getattr(module, part)
    return module


def storages(module: nn.Module) -> set[int]:
    tensors = [*module.parameters(), *module.buffers()]
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


@pytest.fixture(params=NAMES)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


# --------------------------------------------------------------------------------------------------- being one


def test_every_layer_is_among_the_kinds() -> None:
    assert {kind.layer for kind in KINDS.values()} == set(CLASSES) == set(EXACT) == set(LARGE)


def test_equals_the_dense_layer(kind: Kind) -> None:
    """The claim of each layer's own file, at the size of the other claims here."""
    layer = randomise(kind.make(), 0)
    assert_equals_dense(layer, kind.make_dense(), *kind.make_inputs(), **dict(kind.call))


def test_is_an_instance_of_its_namesake(kind: Kind) -> None:
    layer = kind.make()
    assert isinstance(layer, kind.dense) and type(layer).__name__ == "RPQ" + kind.dense.__name__
    dense = kind.make_dense()
    for name, value in vars(dense).items():
        if not name.startswith("_"):
            assert getattr(layer, name) == value, name


def test_reading_a_weight_gives_the_expanded_tensor(kind: Kind) -> None:
    layer = randomise(kind.make(), 0)
    _, weights, _ = dense_twin(layer)
    dense = kind.make_dense()
    names = [name for name, _ in held(layer)]
    assert names
    for name in names:
        torch.testing.assert_close(read(layer, name), weights[name])
        assert read(layer, name).shape == read(dense, name).shape
        assert read(layer, name).requires_grad


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", [KINDS[name] for name in NAMES if "attention" not in name])
def test_what_follows_a_layer_may_change_its_result_in_place(kind: Kind, plan: str) -> None:
    """As activations with inplace=True do; gradients stay those of the other activation."""
    layer = randomise(kind.make(plan=plan), 0)
    grads = []
    for inplace in (False, True):
        layer.zero_grad()
        nn.functional.relu(kind.run(layer), inplace=inplace).sum().backward()
        grads.append(next(iter(backed_weights(layer).values())).codebooks.grad)
    assert torch.equal(grads[0], grads[1])


def test_assigning_a_weight_is_refused(kind: Kind) -> None:
    layer = kind.make()
    name = next(name for name, _ in held(layer))
    owner, _, short = name.rpartition(".")
    with pytest.raises(RewriteError, match=rf"{short} is quantized .* train or load {short}_rpq"):
        setattr(layer.get_submodule(owner), short, nn.Parameter(torch.zeros(3)))


def test_printing_shows_the_layer_and_its_codebooks(kind: Kind) -> None:
    text = repr(kind.make())
    assert text.startswith(f"RPQ{kind.dense.__name__}(")
    assert kind.make_dense().extra_repr() in text
    for name, weight in held(kind.make()):
        short = name.rpartition(".")[2]
        assert f"({short}_rpq): RPQWeight({weight.extra_repr()})" in text


def test_state_dict_keys_are_the_dense_ones_with_codebooks_for_weights(kind: Kind) -> None:
    layer = kind.make()
    keys = set()
    weights = dict(held(layer))
    for name in kind.make_dense().state_dict():
        if name in weights:
            keys |= {f"{name}_rpq.codebooks", f"{name}_rpq.codes"}
            keys |= {f"{name}_rpq.scale"} if weights[name].spec.scale else set()
            keys |= {f"{name}_rpq.column_scale"} if weights[name].spec.column_scale_group else set()
            keys |= {f"{name}_rpq.signs"} if weights[name].spec.signs else set()
        else:
            keys.add(name)
    assert set(layer.state_dict()) == keys


def test_codes_are_buffers_and_codebooks_are_parameters(kind: Kind) -> None:
    layer = kind.make()
    for name, weight in held(layer):
        assert f"{name}_rpq.codes" in dict(layer.named_buffers())
        assert f"{name}_rpq.codebooks" in dict(layer.named_parameters())
        assert weight.codes.dtype == torch.uint8


# -------------------------------------------------------------------------------------------- copies and files


def test_state_dict_round_trip_is_exact(kind: Kind) -> None:
    """A strict load into another draw gives the same outputs to the last bit."""
    layer, other = kind.make(), kind.make()
    assert not torch.equal(kind.run(layer), kind.run(other))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert torch.equal(kind.run(layer), kind.run(other))


def test_codes_out_of_range_are_refused(kind: Kind) -> None:
    """In the narrow dtype, and in a wider one that would wrap around."""
    layer = kind.make()
    name = next(name for name, _ in held(layer))
    for bad, dtype in ((8, torch.uint8), (256, torch.int64), (-1, torch.int64)):
        state = layer.state_dict()
        codes = state[f"{name}_rpq.codes"].to(dtype).clone()
        codes[0, 0, 0] = bad
        state[f"{name}_rpq.codes"] = codes
        with pytest.raises(CodeError, match=rf"{name}_rpq.codes holds .*{bad}.* has 8 entries \(0 to 7\)"):
            layer.load_state_dict(state)


def test_a_missing_key_is_noticed(kind: Kind) -> None:
    layer = kind.make()
    state = layer.state_dict()
    del state[next(name for name, _ in held(layer)) + "_rpq.codes"]
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(state)


def test_deepcopy_and_pickle_are_exact_and_apart(kind: Kind) -> None:
    layer = kind.make()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        assert torch.equal(kind.run(layer), kind.run(other))
        assert not storages(layer) & storages(other)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)
        assert not torch.equal(kind.run(layer), kind.run(other))


# --------------------------------------------------------------------------------------------------------- plans


def test_every_layer_takes_a_plan_and_every_plan_gives_the_same(kind: Kind) -> None:
    """Outputs and gradients; the names in the state dict are the same too."""
    layers = {plan: kind.make(plan=plan) for plan in PLANS}
    for plan, layer in layers.items():
        assert {weight.plan for _, weight in held(layer)} == {plan}
        assert ("plan=" in repr(layer)) == (plan != "auto")
        layer.load_state_dict(layers["auto"].state_dict())
        assert_equals_dense(randomise(layer, 0), kind.make_dense(), *kind.make_inputs(), **dict(kind.call))
    torch.testing.assert_close(kind.run(layers["dequantize"]), kind.run(layers["lookup"]), rtol=1e-9, atol=1e-9)


def test_a_plan_is_kept_by_copies_and_from_dense(kind: Kind) -> None:
    layer = kind.make(plan="lookup")
    made = [
        kind.layer.from_dense(
            plain(kind.make_dense()), init=init, plan="lookup", **{"codebook_dim": 4, **dict(kind.options)}
        )
        for init in ("fit", "random")
    ]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to(torch.float32), *made):
        assert {weight.plan for _, weight in held(other)} == {"lookup"}


def test_what_is_no_plan_is_refused(kind: Kind) -> None:
    wrong = "^plan is one of auto, dequantize, lookup, got 'fast'$"
    with pytest.raises(SpecError, match=wrong):
        kind.make(plan="fast")
    with pytest.raises(SpecError, match=wrong):
        kind.layer.from_dense(kind.make_dense(), plan="fast", **{"codebook_dim": 4, **dict(kind.options)})


# ------------------------------------------------------------------------------------------- devices and dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes_give_close_results(kind: Kind, dtype: torch.dtype) -> None:
    """By .to(dtype) and by the dtype argument. Codes keep their own."""
    layer = kind.make()
    exact = kind.run(layer)
    layer = {torch.float16: layer.half, torch.bfloat16: layer.bfloat16, torch.float32: layer.float}[dtype]()
    for name, weight in held(layer):
        assert weight.codebooks.dtype == dtype and weight.codes.dtype == torch.uint8
        assert read(layer, name).dtype == dtype
    out = kind.run(layer, dtype=dtype)
    assert out.dtype == dtype
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    out.float().sum().backward()
    assert all(p.grad.dtype == dtype for p in layer.parameters() if p.grad is not None)
    made = kind.make(dtype=dtype)
    assert {p.dtype for p in made.parameters()} == {dtype}
    assert made.double() is made and {p.dtype for p in made.parameters()} == {torch.float64}


def test_the_meta_device_allocates_nothing(kind: Kind) -> None:
    """By argument and by context; materialised later it is as good as new."""
    with torch.device("meta"):
        by_context = kind.make()
    for layer in (kind.make(device="meta"), by_context):
        assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
        layer.to_empty(device="cpu").reset_parameters()
        assert kind.run(layer).isfinite().all()
        for _, weight in held(layer):
            assert int(weight.codes.max()) < weight.spec.entries


def test_the_default_dtype_is_torchs(kind: Kind) -> None:
    assert {p.dtype for p in kind.make(dtype=None).parameters()} == {torch.float32}


# ---------------------------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("layer", CLASSES)
@pytest.mark.parametrize(
    "options", [{}, {"stages": 2, "signs": True, "scale": True, "column_scale": True}], ids=["plain", "all options"]
)
def test_weights_are_drawn_with_the_standard_deviation_of_torch(layer: type, options: dict) -> None:
    """And biases from the same interval. Codebooks average over few entries, hence the few percent."""
    torch.manual_seed(0)
    ours = layer(*LARGE[layer], codebook_dim=1, codebook_bits=8, **options)
    theirs = layer._dense(*LARGE[layer])
    for name, _ in held(ours):
        mine, other = read(ours, name).detach(), read(theirs, name).detach()
        assert 0.95 < float(mine.std() / other.std()) < 1.05, name
        assert abs(float(mine.mean())) < 0.1 * float(other.std()), name
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            mine, other = ours.get_parameter(name).detach(), parameter.detach()
            assert float(mine.abs().max()) <= 1.2 * float(other.abs().max())
            assert math.isclose(float(mine.std()), float(other.std()), rel_tol=0.2)


@pytest.mark.parametrize("layer", CLASSES)
def test_codes_are_balanced(layer: type) -> None:
    """Each entry of each sub-vector serves as many vectors as any other, give or take one."""
    for bits in (1, 3):
        for _, weight in held(layer(*EXACT[layer], codebook_dim=1, codebook_bits=bits, stages=2)):
            for codes in weight.codes.flatten(0, 1):
                counts = codes.long().bincount(minlength=weight.spec.entries)
                assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize("layer", CLASSES)
def test_with_an_entry_for_each_vector_codes_are_a_bijection(layer: type) -> None:
    for _, weight in held(layer(*EXACT[layer], codebook_dim=2, codebook_bits=4)):
        assert weight.spec.num_vectors == 16
        for codes in weight.codes.flatten(0, 1):
            assert sorted(codes.tolist()) == list(range(16))


def test_reset_parameters_draws_anew_and_follows_the_seed(kind: Kind) -> None:
    layer = kind.make()
    torch.manual_seed(3)
    layer.reset_parameters()
    first = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert any(not torch.equal(first[name], value) for name, value in layer.state_dict().items())
    torch.manual_seed(3)
    layer.reset_parameters()
    assert all(torch.equal(first[name], value) for name, value in layer.state_dict().items())


# --------------------------------------------------------------------------------------------------- from_dense


def plain(module: nn.Module) -> nn.Module:
    """In float64, every parameter random but an embedding's padding row."""
    return randomise(module, 5)


@pytest.mark.parametrize("init", ["fit", "random"])
def test_from_dense_leaves_the_original_alone(kind: Kind, init: str) -> None:
    """Nothing is changed, nothing is shared, what is not a weight is copied."""
    dense = kind.make_dense()
    before = copy.deepcopy(dense.state_dict())
    layer = kind.layer.from_dense(dense, init=init, **{"codebook_dim": 4, "codebook_bits": 3, **dict(kind.options)})
    assert type(layer) is kind.layer
    assert not storages(dense) & storages(layer)
    assert list(dense.state_dict()) == list(before)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    weights = dict(held(layer))
    for name, parameter in dense.named_parameters():
        if name in weights:
            assert read(layer, name).shape == parameter.shape and read(layer, name).dtype == parameter.dtype
            ratio = float(read(layer, name).detach().std() / parameter.detach().std())
            assert (0.5 if init == "fit" else 0.8) < ratio < 1.25
        else:
            assert torch.equal(layer.get_parameter(name), parameter)
    assert_equals_dense(layer, dense, *kind.make_inputs(), **dict(kind.call))


def test_a_fit_is_nearer_than_a_random_draw(kind: Kind) -> None:
    dense = kind.make_dense()
    errors = []
    for init in ("fit", "random"):
        layer = kind.layer.from_dense(dense, init=init, **{"codebook_dim": 4, "codebook_bits": 3, **dict(kind.options)})
        with torch.no_grad():
            parts = [(read(layer, name) - read(dense, name)).square().sum() for name, _ in held(layer)]
        errors.append(float(sum(parts)))
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("layer", CLASSES)
def test_an_entry_for_each_vector_reproduces_the_weight(layer: type) -> None:
    """To the last bit, in float32 as well as float16."""
    for dtype in (torch.float32, torch.float16):
        dense = layer._dense(*EXACT[layer], dtype=dtype)
        made = layer.from_dense(dense, codebook_dim=2, codebook_bits=4)
        for name, _ in held(made):
            assert torch.equal(read(made, name), read(dense, name))


def test_from_dense_keeps_flags_hooks_and_frozen_weights() -> None:
    dense = nn.Linear(8, 8).eval().requires_grad_(False)
    dense.note = "mine"
    calls = []
    dense.register_forward_hook(lambda *args: calls.append(1))
    layer = RPQLinear.from_dense(dense, codebook_dim=4)
    assert not layer.training and layer.note == "mine"
    assert not any(p.requires_grad for p in layer.parameters())
    layer(torch.zeros(1, 8))
    assert calls == [1]


@pytest.mark.parametrize("layer", CLASSES)
def test_from_dense_of_another_class_is_refused(layer: type) -> None:
    """A subclass too: its forward may be another."""
    other = nn.Linear if layer is not RPQLinear else nn.Bilinear
    sub = type("Sub", (layer._dense,), {})
    for wrong in (other(*LARGE[RPQLinear if other is nn.Linear else RPQBilinear]), sub(*EXACT[layer])):
        with pytest.raises(InputError, match=rf"{layer.__name__}.from_dense takes a {layer._dense.__name__}, got"):
            layer.from_dense(wrong)


def test_from_dense_of_a_weight_that_is_not_finite_is_refused() -> None:
    dense = nn.Linear(8, 8)
    with torch.no_grad():
        dense.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="infinite or NaN"):
        RPQLinear.from_dense(dense, codebook_dim=4)
