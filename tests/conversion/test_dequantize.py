"""dequantize: back to the classes, names, ties and flags of the dense model, with the weights that the codebooks
mean."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import KVPolicy, Policy
from rpqfx.conversion import dequantize as module
from rpqfx.errors import InputError, RewriteError, RPQError
from rpqfx.nn import RPQEmbedding, RPQLinear
from tests.kv.kv_models import LM, tokens
from tests.models import CASES, GPT, MLP, SMALL, Case, assert_outputs, filled, quantized_weights


def classes(model: nn.Module) -> dict[str, str]:
    """Classes by name; those that parametrising made for one module are equal where their bases are."""
    return {
        name: f"{type(one).__qualname__}({', '.join(base.__qualname__ for base in type(one).__bases__)})"
        for name, one in model.named_modules(remove_duplicate=False)
    }


def flags(model: nn.Module) -> dict[str, Any]:
    return {name: (p.requires_grad, p.dtype, p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def shared(model: nn.Module) -> set[frozenset[str]]:
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_everything_is_as_it_was_but_for_the_values(case: Case) -> None:
    dense = case.model().eval()
    small = rpqfx.rpqify(dense, case.policy)
    before = classes(small)
    again = rpqfx.dequantize(small)
    assert classes(small) == before and quantized_weights(small)
    assert not quantized_weights(again) and classes(again) == classes(dense)
    assert flags(again) == flags(dense) and shared(again) == shared(dense)
    assert set(again.state_dict()) == set(dense.state_dict())
    if all(type(one).__module__.startswith("torch.nn") for one in dense.modules() if one._parameters):
        assert list(again.state_dict()) == list(dense.state_dict())  # a module of another kind may have any order
    assert not {id(p) for p in again.parameters()} & {id(p) for p in small.parameters()}
    args, kwargs = case.arguments()
    with torch.no_grad():
        assert_outputs(again(*args, **kwargs), small(*args, **kwargs))


@pytest.mark.parametrize("case", [case for case in CASES if "hook" not in case.name], ids=lambda case: case.name)
def test_values_are_those_that_codebooks_stand_for(case: Case) -> None:
    dense = case.model()
    small = rpqfx.rpqify(dense, case.policy)
    again, wanted = rpqfx.dequantize(small), filled(dense, small)
    for name, tensor in wanted.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_dense_model_again_trains_is_copied_and_rewritten(case: Case) -> None:
    small = rpqfx.rpqify(case.model(), case.policy)
    again = rpqfx.dequantize(small, inplace=True)
    assert again is small
    for twin in (again, copy.deepcopy(again)):
        args, kwargs = case.arguments()
        torch.manual_seed(0)
        outputs = [y for y in torch.utils._pytree.tree_leaves(twin(*args, **kwargs)) if isinstance(y, Tensor)]
        sum(y.square().sum() for y in outputs if y.is_floating_point()).backward()
        named = dict(twin.named_parameters())
        assert all(named[name].grad is not None for name in case.rewritten if named[name].requires_grad)
        twin.zero_grad()
    twice = rpqfx.rpqify(again, case.policy)
    assert set(quantized_weights(twice)) == set(case.rewritten) | set(case.tied)


def test_shared_codebooks_tied_tables_and_notes() -> None:
    dense = GPT()
    dense.tok.weight.no_decay = True
    small = rpqfx.rpqify(dense, Policy.pretrained(4.0, min_size=256, embedding_bits=6))
    assert any(weight.shares_codebooks for weight in quantized_weights(small).values())
    again = rpqfx.dequantize(small)
    assert again.tok.weight is again.head.weight and again.tok.weight.no_decay
    with pytest.raises(RPQError, match="no weight of this model is quantized"):
        rpqfx.save(again, "never.rpq")


def test_layers_that_were_built_as_rpq_layers() -> None:
    model = nn.Sequential(
        RPQEmbedding(24, 16, codebook_dim=4, codebook_bits=2, padding_idx=3), RPQLinear(16, 32, codebook_bits=2)
    )
    again = rpqfx.dequantize(model)
    assert [type(layer) for layer in again] == [nn.Embedding, nn.Linear]
    ids = torch.randint(24, (3, 5))
    torch.testing.assert_close(again(ids), model(ids))
    assert not again[0].weight[3].any() and pickle.loads(pickle.dumps(again))[0].padding_idx == 3


def test_attention_on_codes_stays() -> None:
    ids = tokens(2, 12)
    dense = LM().eval()
    both = {
        "weights first": rpqfx.quantize_kv(
            rpqfx.rpqify(dense, SMALL), KVPolicy(bits_per_value=4, window=4), calibration=[ids]
        ),
        "cache first": rpqfx.rpqify(
            rpqfx.quantize_kv(dense, KVPolicy(bits_per_value=4, window=4), calibration=[ids]), SMALL
        ),
    }
    for small in both.values():
        again = rpqfx.dequantize(small)
        assert not quantized_weights(again) and len(rpqfx.kv.attentions(again)) == len(rpqfx.kv.attentions(small)) > 0
        with torch.no_grad():
            torch.testing.assert_close(again(ids), small(ids), rtol=1e-4, atol=1e-4)


def test_wrappers_stay_around_it() -> None:
    small = nn.DataParallel(rpqfx.rpqify(MLP(), SMALL))
    again = rpqfx.dequantize(small)
    assert isinstance(again, nn.DataParallel) and type(again.module.fc1) is nn.Linear
    assert isinstance(small.module.fc1, RPQLinear)


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        small = rpqfx.rpqify(MLP(), SMALL)
    again = rpqfx.dequantize(small)
    assert type(again.fc1) is nn.Linear and again.fc1.weight.is_meta and again.fc1.weight.shape == (32, 12)


def test_what_cannot_be_dense_again_is_refused_before_anything_is_done() -> None:
    class Own(RPQLinear):
        """A class whose dense namesake nobody knows."""

    model = nn.Sequential(RPQLinear(16, 16, codebook_bits=2), Own(16, 16, codebook_bits=2))
    with pytest.raises(RewriteError, match="1 is a Own, a class derived from an RPQ layer"):
        rpqfx.dequantize(model, inplace=True)
    assert type(model[0]) is RPQLinear
    with pytest.raises(RPQError, match="nothing to dequantize"):
        rpqfx.dequantize(MLP())
    with pytest.raises(InputError, match=r"dequantize takes a torch\.nn\.Module"):
        rpqfx.dequantize("small.rpq")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_where_it_is_interrupted_the_model_is_as_it_was(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    small = rpqfx.rpqify(case.model(), case.policy)
    args, kwargs = case.arguments()
    torch.manual_seed(0)
    wanted = small(*args, **kwargs)
    told, here = dict(small.state_dict()), classes(small)

    def stop(model: nn.Module) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "restore_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        rpqfx.dequantize(small, inplace=True)
    assert classes(small) == here and list(small.state_dict()) == list(told)
    torch.manual_seed(0)
    assert_outputs(small(*args, **kwargs), wanted, 0)
