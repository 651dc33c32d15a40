"""Codes of two bytes lie in their buffer as bytes, and nobody who reads, assigns, saves or loads them sees that."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rpqfx
from rpqfx.codebook import CodebookSpec
from rpqfx.errors import CodeError, InputError
from rpqfx.nn import RPQLinear, RPQWeight
from rpqfx.nn.code_bytes import from_bytes, to_bytes

WIDE = {300: torch.int16, 40_000: torch.uint16}
ALL = {2: torch.uint8, 256: torch.uint8, **WIDE}


def weight_of(entries: int, vectors: int = 12) -> RPQWeight:
    torch.manual_seed(entries)
    weight = RPQWeight(CodebookSpec(vectors, 8, 4, entries, 2))
    weight.codes = torch.randint(entries, weight.codes.shape)
    return weight


class Model(nn.Module):
    """One linear layer whose codes take two bytes each."""

    def __init__(self, bits: int = 9) -> None:
        super().__init__()
        torch.manual_seed(bits)
        self.fc = RPQLinear(16, 1 << bits, codebook_dim=4, codebook_bits=bits)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([torch.uint8, torch.int16, torch.uint16]), st.integers(0, 2**31), st.booleans())
def test_reading_undoes_storing_without_a_copy(dtype: torch.dtype, seed: int, turned: bool):
    g = torch.Generator().manual_seed(seed)
    shape = [int(n) for n in torch.randint(1, 6, (3,), generator=g)]
    codes = torch.randint(torch.iinfo(dtype).max + 1, shape, generator=g).to(dtype)
    codes = codes.transpose(0, 2) if turned else codes
    stored = to_bytes(codes)
    assert stored.dtype == torch.uint8 and stored.dim() == 3 and stored.nbytes == codes.nbytes
    again = from_bytes(stored, dtype)
    assert again.dtype == dtype and torch.equal(again.long(), codes.long())
    assert again.data_ptr() == stored.data_ptr() and (turned or stored.data_ptr() == codes.data_ptr())


@pytest.mark.parametrize("entries", ALL)
def test_codes_are_read_in_the_narrowest_integer_and_lie_in_a_buffer_of_bytes(entries: int):
    weight = weight_of(entries)
    assert (
        weight.codes.dtype == ALL[entries] == weight.spec.code_dtype and weight.codes.shape == weight.spec.codes_shape
    )
    [(name, buffer)] = weight.named_buffers()
    assert name == "codes" and buffer.dtype == torch.uint8 and buffer is weight.stored_codes
    assert buffer.nbytes == weight.codes.nbytes and buffer.data_ptr() == weight.codes.data_ptr()
    weight.codes[0, 0, 0] = entries - 1
    assert weight.codes[0, 0, 0].item() == entries - 1


@pytest.mark.parametrize("entries", ALL)
@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.int32, torch.int64])
def test_assigned_integers_are_converted_once_they_are_known_to_fit(entries: int, dtype: torch.dtype):
    weight = weight_of(entries)
    codes = torch.randint(min(entries, torch.iinfo(dtype).max), weight.codes.shape)
    weight.codes = codes.to(dtype)
    assert weight.codes.dtype == ALL[entries] and torch.equal(weight.codes.long(), codes)
    if dtype == torch.int64:
        for bad in (-1, entries):
            with pytest.raises(CodeError, match=rf"codes holds .*{bad}.* has {entries} entries"):
                weight.codes = torch.full_like(codes, bad)
    assert torch.equal(weight.codes.long(), codes)


def test_what_are_no_integers_are_refused():
    weight = weight_of(300)
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(InputError, match="codes are integers, got"):
            weight.codes = torch.zeros(weight.codes.shape, dtype=dtype)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("entries", ALL)
def test_state_dicts_hold_codes_not_bytes(entries: int, assign: bool):
    weight, other = weight_of(entries), weight_of(entries)
    state = {name: value.clone() for name, value in weight.state_dict().items()}
    assert state["codes"].dtype == ALL[entries] and state["codes"].shape == weight.spec.codes_shape
    other.codes = torch.zeros_like(weight.codes)
    before = other.stored_codes
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other(), weight()) and (other.stored_codes is before) != assign
    assert other.stored_codes.dtype == torch.uint8
    with torch.no_grad():
        for name, value in other.state_dict().items():  # as an average of models does
            value.copy_(state[name] if value.is_floating_point() else state[name].long().flip(-1))
    assert torch.equal(other.codes.long(), weight.codes.long().flip(-1))


@pytest.mark.parametrize("entries", WIDE)
def test_state_dicts_of_other_shapes_are_refused_in_torchs_own_words(entries: int):
    weight, other = weight_of(entries), weight_of(entries, 6)
    with pytest.raises(RuntimeError, match=r"size mismatch for codes: .*\[2, 2, 12\].*\[2, 2, 6\]"):
        other.load_state_dict(weight.state_dict())
    state = weight.state_dict()
    state["codes"] = weight.stored_codes[..., :-2]  # bytes, those of a vector too few
    with pytest.raises(RuntimeError, match=r"size mismatch for codes: .*\[2, 2, 22\]"):
        weight.load_state_dict(state)


@pytest.mark.parametrize("entries", WIDE)
def test_codes_as_bytes_are_taken_as_sharded_models_save_them(entries: int):
    weight, other = weight_of(entries), weight_of(entries)
    other.codes = torch.zeros_like(weight.codes)
    other.load_state_dict({**weight.state_dict(), "codes": weight.stored_codes.clone()})
    assert torch.equal(other.codes, weight.codes) and torch.equal(other(), weight())


@pytest.mark.parametrize("entries", WIDE)
def test_copies_pickles_conversions_and_layouts_keep_the_codes(entries: int):
    weight = weight_of(entries)
    wanted = weight.codes.long().clone()
    old = copy.deepcopy(weight)
    old._buffers["codes"] = old.codes.clone()  # as modules were pickled before codes lay there as bytes
    made = {
        "deepcopy": copy.deepcopy(weight), "pickle": pickle.loads(pickle.dumps(weight)),
        "copy of an old one": copy.deepcopy(old), "half": copy.deepcopy(weight).half(),
        "bfloat16": copy.deepcopy(weight).to(torch.bfloat16),
        "channels_last": copy.deepcopy(weight).to(memory_format=torch.channels_last),
    }  # fmt: skip
    for name, other in made.items():
        assert torch.equal(other.codes.long(), wanted), name
        assert other.codes.dtype == WIDE[entries] and other.stored_codes.dtype == torch.uint8, name
        assert other.stored_codes.data_ptr() != weight.stored_codes.data_ptr(), name
    made["half"].codes[0, 0, 0] = (wanted[0, 0, 0] + 1) % entries
    assert torch.equal(weight.codes.long(), wanted)


def test_on_the_meta_device_codes_are_assigned_and_materialised():
    with torch.device("meta"):
        model, weight = Model(), weight_of(300)
    assert weight.codes.is_meta and weight.codes.dtype == torch.int16
    weight.codes = torch.zeros(weight.codes.shape, dtype=torch.int16)
    assert not weight.codes.is_meta and weight.stored_codes.dtype == torch.uint8
    rpqfx.materialize(model)
    codes = model.fc.weight_rpq.codes
    assert all(torch.equal(row.long().sort().values, torch.arange(512)) for row in codes.flatten(0, 1))


def test_codes_swapped_in_by_torch_func_may_be_bytes_or_codes():
    model, x = Model(), torch.randn(3, 16)
    wanted = model(x)
    for codes in (model.fc.weight_rpq.stored_codes, model.fc.weight_rpq.codes):
        values = {**dict(model.named_parameters()), "fc.weight_rpq.codes": codes.flip(-1) if codes is None else codes}
        assert torch.equal(torch.func.functional_call(model, values, (x,)), wanted)
    assert torch.equal(torch.func.functional_call(model, model.state_dict(), (x,)), wanted)


def test_an_ensemble_of_models_is_vmapped_over_its_codes():
    models = [Model(), Model()]
    models[1].fc.weight_rpq.codes = models[0].fc.weight_rpq.codes.flip(-1)
    parameters, buffers = torch.func.stack_module_state(models)  # type: ignore[arg-type]
    x = torch.randn(3, 16)

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    found = torch.vmap(run)(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([model(x) for model in models]))


@pytest.mark.parametrize("bits", [9, 16])
def test_compiled_and_exported_graphs_read_the_codes(bits: int):
    model, x = Model(bits), torch.randn(3, 16)
    wanted = model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.testing.assert_close(program.module()(x[:2]), wanted[:2])
    assert "aten.view.dtype" not in {str(node.target) for node in program.graph.nodes}
    traced = torch.jit.trace(model, (x,), check_trace=False)
    torch.testing.assert_close(traced(x), wanted)
