"""What transformers models find by name, on a model that has what they have (the library itself is a slow test's)."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx.conversion import rewritten as rewritten_module
from rpqfx.errors import RewriteError
from rpqfx.graph.transformers_models import ATTRIBUTES, ResizeTokenEmbeddings, is_pretrained
from tests.models import SMALL

TIES = {"head.weight": "table.weight"}


class Pretrained(nn.Module):
    """Ties by name and makes a dense head when it is resized, as transformers' models do."""

    _tied_weights_keys: dict[str, str] | None = TIES

    def __init__(self, rows: int = 40, tied: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(rows, 16), nn.Linear(16, rows, bias=bias)
        self.all_tied_weights_keys = dict(TIES) if tied else {}
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, head: nn.Module) -> None:
        self.head = head

    def tie_weights(self) -> None:
        for target, source in self.all_tied_weights_keys.items():
            path, _, name = target.rpartition(".")
            found = dict([*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)])
            setattr(self.get_submodule(path), name, found[source])

    def _resize_token_embeddings(self, rows: int) -> nn.Module:
        kept = min(rows, self.table.num_embeddings)
        table = torch.cat([self.table.weight.detach()[:kept], torch.ones(rows - kept, 16)])
        self.table.weight.data = table
        self.table.num_embeddings = rows
        if len(self.head.weight) != rows:
            head = nn.Linear(16, rows, bias=self.head.bias is not None)
            head.weight.data[:kept] = self.head.weight.data[:kept]
            if head.bias is not None:
                head.bias.data[:kept] = self.head.bias.data[:kept]
            self.set_output_embeddings(head)
        self.head.out_features = rows
        return self.table

    def resize(self, rows: int) -> None:
        self._resize_token_embeddings(rows)
        self.tie_weights()


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Pretrained()

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids)


def rewritten(**options: Any) -> Any:
    torch.manual_seed(0)
    return rpqfx.rpqify(Pretrained(**options), SMALL)


def test_ties_go_by_the_names_of_what_is_stored():
    small = rewritten()
    assert type(small) is Pretrained and Pretrained._tied_weights_keys == TIES
    assert small.all_tied_weights_keys == {
        f"head.weight_rpq.{name}": f"table.weight_rpq.{name}" for name in ("codebooks", "codes")
    }
    assert small._tied_weights_keys == {
        r"head\.weight_rpq\.": r"table\.weight_rpq\.",
        r"head\.bias": r"head\.bias",
    }
    before = small.head.weight_rpq
    small.tie_weights()
    assert small.head.weight_rpq is before is small.table.weight_rpq


def test_a_model_within_a_model_is_told_as_well():
    small = rpqfx.rpqify(Outer(), SMALL)
    assert set(small.inner.all_tied_weights_keys) == {"head.weight_rpq.codebooks", "head.weight_rpq.codes"}
    assert not set(ATTRIBUTES) & set(small.__dict__) and not is_pretrained(small)


def test_the_table_of_tokens_answers_to_the_name_by_which_peft_asks_for_it():
    small = rewritten()
    assert small.get_submodule("embeddings.word_embeddings") is small.table is small.get_submodule("table")
    with pytest.raises(AttributeError, match="no attribute `embeddings`"):
        small.get_submodule("embeddings.others")
    copied = copy.deepcopy(small)
    assert copied.get_submodule("embeddings.word_embeddings") is copied.table
    rules = (rpqfx.Rule("table.weight", skip="dense"),)
    dense = rpqfx.rpqify(
        Pretrained(tied=False), rpqfx.Policy(codebook_dim=4, codebook_bits=2, min_size=64, rules=rules)
    )
    with pytest.raises(AttributeError):  # peft then finds the dense Parameter, as it does without this library
        dense.get_submodule("embeddings.word_embeddings")


def test_ties_of_what_stays_dense_or_apart_are_left():
    only_head = rpqfx.Policy(
        codebook_dim=4, codebook_bits=2, min_size=64, rules=(rpqfx.Rule("table.weight", skip="dense"),)
    )
    small = rpqfx.rpqify(Pretrained(tied=False), only_head)
    assert small._tied_weights_keys == TIES
    assert rewritten(tied=False)._tied_weights_keys == TIES


def test_codebooks_that_weights_share_go_by_one_name():
    policy = dataclasses.replace(SMALL, sharing="shape", allow_growth=True)
    small = rpqfx.rpqify(Pretrained(tied=False), policy)
    assert small.head.weight_rpq.codebooks is small.table.weight_rpq.codebooks
    assert small._tied_weights_keys == {r"head\.weight_rpq\.codebooks": r"table\.weight_rpq\.codebooks"}


@pytest.mark.parametrize("tied", [False, True])
def test_codebooks_that_a_conversion_shares_go_by_one_name(tied: bool):
    """They are shared only when they have been trained, long after the weights are in their places."""

    class Deep(Pretrained):
        def __init__(self) -> None:
            super().__init__(tied=tied)
            self.middle = nn.Linear(16, 40, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.table(ids)
            return self.head(hidden) + self.middle(hidden)

    policy = dataclasses.replace(SMALL, sharing="shape", allow_growth=True)
    small = rpqfx.convert(Deep(), policy, [torch.arange(40)])
    assert small.middle.weight_rpq.codebooks is small.table.weight_rpq.codebooks
    assert small.head.weight_rpq.codebooks is small.table.weight_rpq.codebooks
    again = small.state_dict()
    for name in ("head", "middle"):
        found = [t for t in small._tied_weights_keys if re.match(t, f"{name}.weight_rpq.codebooks")]
        assert len(found) == 1, small._tied_weights_keys
    kept = {n for n in again if not any(re.match(pattern, n) for pattern in small._tied_weights_keys)}
    assert [n for n in kept if n.endswith("codebooks")] == ["table.weight_rpq.codebooks"]
    small.tie_weights()
    assert small.middle.weight_rpq.codebooks is small.table.weight_rpq.codebooks


@pytest.mark.parametrize("rows", [50, 30])
@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, False), (False, True)])
def test_a_resized_head_stays_the_module_it_was_in_its_codebooks(tied: bool, bias: bool, rows: int):
    small = rewritten(tied=tied, bias=bias)
    head, ids, kept = small.head, torch.arange(30), min(rows, 40)
    with torch.no_grad():
        before = small(ids)
    small.resize(rows)
    assert small.head is head and head.weight_rpq.spec.num_vectors == head.out_features == rows
    assert (head.weight_rpq is small.table.weight_rpq) == tied
    with torch.no_grad():
        assert torch.equal(small(ids)[:, :kept], before[:, :kept])
    assert rpqfx.report(small).sites[0].shape[0] == rows


def test_what_cannot_be_resized_is_refused_first():
    rule = rpqfx.Rule("head.weight", split="column")
    small = rpqfx.rpqify(
        Pretrained(tied=False), rpqfx.Policy(codebook_dim=4, codebook_bits=2, min_size=64, rules=(rule,))
    )
    with pytest.raises(RewriteError, match='split="row"'):
        small.resize(50)
    assert small.table.num_embeddings == small.table.weight_rpq.spec.num_vectors == 40


def test_copies_pickles_and_loaded_models_resize_themselves(tmp_path: Path):
    small = rewritten(tied=False)
    rpqfx.save(small, tmp_path / "model.rpq")
    loaded = rpqfx.load(tmp_path / "model.rpq", lambda: Pretrained(tied=False))
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), loaded):
        again.resize(50)
        assert again.head.weight_rpq.spec.num_vectors == 50 and small.head.weight_rpq.spec.num_vectors == 40


def test_a_model_is_not_kept_alive_by_what_it_was_told():
    gc.collect()
    gc.disable()
    try:
        small = rewritten()
        gone = weakref.ref(small)
        del small
        assert gone() is None
    finally:
        gc.enable()


def test_a_rewrite_that_is_taken_back_leaves_no_trace(monkeypatch: pytest.MonkeyPatch):
    def fail(model: nn.Module) -> None:
        assert isinstance(model.__dict__.get(ATTRIBUTES[-1]), ResizeTokenEmbeddings)
        raise RewriteError

    model = Pretrained()
    before = dict(model.__dict__)
    monkeypatch.setattr(rewritten_module, "renew_calls", fail)  # the last step of all
    with pytest.raises(RewriteError):
        rpqfx.rpqify(model, SMALL, inplace=True)
    assert model.__dict__ == before and not isinstance(model.__dict__.get(ATTRIBUTES[-1]), ResizeTokenEmbeddings)


def test_other_models_are_left_alone():
    small = rpqfx.rpqify(nn.Sequential(nn.Linear(16, 16)), SMALL)
    assert not any(set(ATTRIBUTES) & set(module.__dict__) for module in small.modules())
