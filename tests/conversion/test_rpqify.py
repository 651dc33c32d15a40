"""rpqify: one call, its options, its checks and its refusals."""

from __future__ import annotations

import copy
import dataclasses
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import rpqfx
from rpqfx import CodebookSpec, KeepDense, Policy, Quantize, Rule, Site
from rpqfx.conversion import rewritten as rewritten_module
from rpqfx.errors import CaptureError, InputError, PolicyError, RewriteError, RPQError
from rpqfx.graph import is_rewritten, whole_graph
from rpqfx.nn import RPQLinear, RPQWeight
from rpqfx.nn.hosting.backed import Backed
from tests import models
from tests.models import (
    BY_NAME,
    CNN,
    GPT,
    MLP,
    SMALL,
    assert_equals_dense,
    assert_outputs,
    floating,
    quantized_weights,
)


def x12(batch: int = 3) -> Tensor:
    return torch.randn(batch, 12, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------- refusals


def test_only_modules_are_rewritten():
    for wrong in (MLP, MLP().forward, {"weight": torch.zeros(3, 3)}, None):
        with pytest.raises(InputError, match=r"rpqify takes a torch\.nn\.Module, got"):
            rpqfx.rpqify(wrong, SMALL)


def test_a_rewritten_model_is_refused_whichever_policy():
    small = rpqfx.rpqify(GPT(), SMALL)
    for again in (small, nn.Sequential(small), nn.Sequential(nn.Linear(64, 64), RPQLinear(64, 64))):
        with pytest.raises(RewriteError, match="already has quantized weights; start from the dense model"):
            rpqfx.rpqify(again, SMALL)


def test_a_policy_that_rewrites_nothing_says_why():
    with pytest.raises(PolicyError, match=r"rewrites nothing.*fc1.weight: 384 elements, fewer than min_size 4096"):
        rpqfx.rpqify(MLP(), Policy())
    with pytest.raises(PolicyError, match=r"rule 'blocs\.\*' matches no site; fc1\.weight: mine"):
        rpqfx.rpqify(MLP(), Policy(rules=(Rule("blocs.*", codebook_bits=2), Rule("*", skip="mine"))))
    with pytest.raises(PolicyError, match="would not shrink: 1,536 bytes dense"):
        rpqfx.rpqify(MLP(), Policy(min_size=1, codebook_dim=4, codebook_bits=8))
    with pytest.raises(PolicyError, match=r"and 5 more$"):
        rpqfx.rpqify(GPT(), Policy())


def test_a_model_without_matrices_says_so():
    with pytest.raises(PolicyError, match="no weight of two or more axes, so there is nothing to rewrite"):
        rpqfx.rpqify(nn.Sequential(nn.LayerNorm(4), nn.ReLU()), SMALL)


class Locked(nn.Module):
    """Holds something that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_a_model_that_cannot_be_copied_names_inplace():
    with pytest.raises(RewriteError, match=r"cannot be copied \(TypeError: .*lock.*\); pass inplace=True"):
        rpqfx.rpqify(Locked(), SMALL)
    model = Locked()
    assert rpqfx.rpqify(model, SMALL, inplace=True) is model and type(model.fc) is RPQLinear


def test_everything_that_is_refused_is_an_rpq_error():
    kinds = (CaptureError, InputError, PolicyError, RewriteError, rpqfx.errors.SpecError, rpqfx.errors.FormatError)
    assert all(issubclass(kind, RPQError) for kind in kinds)


def test_copying_does_not_copy_the_weights_that_are_replaced(monkeypatch: pytest.MonkeyPatch):
    """Peak memory: a copy of the model never holds a second copy of a dense weight that is about to go."""
    copied: list[tuple[int, ...]] = []
    plain = nn.Parameter.__deepcopy__
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda p, memo: copied.append(tuple(p.shape)) or plain(p, memo))
    rpqfx.rpqify(MLP(), SMALL)
    assert sorted(copied) == [(8,), (32,)]


# ------------------------------------------------------------------------------------------------- lazy modules


def test_a_lazy_model_is_rewritten_once_it_has_run_and_refused_before():
    model = nn.Sequential(nn.LazyConv2d(16, 3), nn.Flatten(), nn.LazyLinear(16))
    images = torch.randn(2, 4, 6, 6)
    for inplace in (False, True):
        with pytest.raises(CaptureError, match=r"0 is a LazyConv2d that has never run.*run the model once"):
            rpqfx.rpqify(model, SMALL, inplace=inplace)
    assert type(model[2]) is nn.LazyLinear
    model(images)
    small = rpqfx.rpqify(model, Policy(codebook_dim=9, codebook_bits=1, min_size=64))
    assert set(quantized_weights(small)) == {"0.weight", "2.weight"} and small(images).shape == (2, 16)


# ------------------------------------------------------------------------------------------- callable policies


def test_a_callable_may_return_a_spec_a_hold_or_a_skip():
    seen: list[Site] = []

    def decide(site: Site) -> CodebookSpec | Quantize | KeepDense:
        seen.append(site)
        if site.name.endswith("qkv.weight"):
            return KeepDense("kept by hand")
        if site.kind == "embedding":
            return Quantize(CodebookSpec(*site.shape, codebook_dim=4, entries=4), init="random")
        return CodebookSpec(site.layout().num_vectors, site.layout().dim, codebook_dim=2, entries=4)

    small = rpqfx.rpqify(GPT(), decide)
    records = {record.name: record for record in rpqfx.report(small).sites}
    assert all(isinstance(site, Site) for site in seen) and "pos" not in {site.name for site in seen}
    assert records["blocks.0.qkv.weight"].reason == "kept by hand"
    assert records["tok.weight"].init == "random" and records["blocks.0.proj.weight"].init == "fit"
    assert records["blocks.0.proj.weight"].spec == CodebookSpec(16, 16, 2, 4)
    assert records["pos"].reason.startswith("used by add")


def test_a_spec_along_columns_is_understood():
    small = rpqfx.rpqify(MLP(), lambda site: CodebookSpec(*reversed(site.shape), codebook_dim=4, entries=2))
    assert {record.split for record in rpqfx.report(small).sites} == {"column"}
    assert small.fc1.weight.shape == (32, 12)


def test_answers_that_do_not_fit_are_refused_by_name():
    with pytest.raises(
        PolicyError, match=r"fc1\.weight: a policy returns a CodebookSpec, a Quantize or a KeepDense, got 8"
    ):
        rpqfx.rpqify(MLP(), lambda site: 8)
    with pytest.raises(PolicyError, match=r"fc1\.weight: the spec has 5 vectors of length 12, the site 32 of .* 12"):
        rpqfx.rpqify(MLP(), lambda site: CodebookSpec(5, 12, 4, 4))
    with pytest.raises(RewriteError, match=r"fc1\.weight: the decision has 32 vectors of length 12.*split='column'"):
        rpqfx.rpqify(MLP(), lambda site: Quantize(CodebookSpec(32, 12, 4, 4), split="column"))
    with pytest.raises(PolicyError, match=r"rewrites nothing\. fc1\.weight: no; fc2\.weight: no"):
        rpqfx.rpqify(MLP(), lambda site: KeepDense("no"))


# ------------------------------------------------------------------------------------------------------- progress


def test_progress_is_told_after_each_site():
    told: list[tuple[int, int, str]] = []
    small = rpqfx.rpqify(GPT(), SMALL, progress=lambda *now: told.append(now))
    names = [record.name for record in rpqfx.report(small).rewritten]
    assert [name for _, _, name in told] == names
    assert [(done, total) for done, total, _ in told] == [(i + 1, len(names)) for i in range(len(names))]


def test_an_interrupted_rewrite_in_place_leaves_the_model_as_it_was():
    model = GPT()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def interrupt(done: int, total: int, name: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rpqfx.rpqify(model, SMALL, inplace=True, progress=interrupt)
    assert not is_rewritten(model) and model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------- the whole graph


def leaves(graph: fx.GraphModule) -> list[nn.Module]:
    return [graph.get_submodule(node.target) for node in graph.graph.nodes if node.op == "call_module"]


def test_a_whole_graph_is_one_graph_module_whose_leaves_are_the_layers():
    case = BY_NAME["gpt"]
    model = case.model().eval()
    graph = whole_graph(rpqfx.rpqify(model, SMALL))
    assert isinstance(graph, fx.GraphModule)
    held = [leaf for leaf in leaves(graph) if isinstance(leaf, Backed)]
    assert len(held) == 10 and all(type(leaf).__name__.startswith("RPQ") for leaf in held)
    assert held[0].weight_rpq is held[-1].weight_rpq  # the tie
    args, _ = case.arguments()
    assert_outputs(graph(*args), rpqfx.rpqify(model, SMALL)(*args), 0)
    assert_equals_dense(model, graph, args, {})


GRAPHS = ["mlp", "cnn", "decoder", "encoder", "recommender", "bilinear", "functional", "functional convolutions",
          "experts", "shared", "listed", "hooked", "subclassed", "read from outside"]  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_a_whole_graph_computes_what_the_module_does(name: str):
    case = BY_NAME[name]
    model = case.model().eval()
    graph = whole_graph(rpqfx.rpqify(model, case.policy))
    assert isinstance(graph, fx.GraphModule)
    args, kwargs = case.arguments()
    assert_equals_dense(model, graph, args, kwargs)
    assert any(isinstance(leaf, (Backed, RPQWeight)) for leaf in leaves(graph)) or name == "encoder"


def test_a_whole_graph_names_module_line_and_way_out_where_it_cannot_be():
    model = nn.Sequential(nn.Linear(12, 12), BY_NAME["opaque"].build())
    with pytest.raises(
        CaptureError, match=r"cannot trace 1 \(Opaque\) at .*models\.py:\d+ symbolically \(TraceError.*example_inputs"
    ) as caught:
        whole_graph(rpqfx.rpqify(model, Policy(codebook_dim=4, codebook_bits=2, min_size=64, kinds=("linear",))))
    line = int(str(caught.value).partition("models.py:")[2].partition(" ")[0])
    assert "for row in x" in Path(models.__file__).read_text().splitlines()[line - 1]


def test_with_example_inputs_torch_export_captures_what_tracing_cannot():
    case = BY_NAME["structured"]
    args, kwargs = case.arguments(torch.float32)
    model = case.model(torch.float32).eval()
    with pytest.raises(CaptureError):
        whole_graph(rpqfx.rpqify(model, SMALL))
    graph = whole_graph(rpqfx.rpqify(model, SMALL), args, kwargs)
    assert isinstance(graph, fx.GraphModule)
    assert_outputs(graph(*args, **kwargs), rpqfx.rpqify(model, SMALL)(*args, **kwargs), 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_what_neither_can_capture_says_so():
    case = BY_NAME["opaque"]
    args, _ = case.arguments(torch.float32)
    with pytest.raises(CaptureError, match=r"torch\.export cannot capture the model either"):
        whole_graph(rpqfx.rpqify(case.model(torch.float32), SMALL), args)


# ------------------------------------------------------------------------------------------- compiling and training


COMPILED = ["gpt", "functional", "functional convolutions", "experts", "read from outside"]


@pytest.mark.parametrize(
    ("name", "training"),
    [
        *(pytest.param(name, True, marks=[pytest.mark.slow] * (name in ("gpt", "functional"))) for name in COMPILED),
        *(pytest.param(name, False, marks=[pytest.mark.slow] * (name != "gpt")) for name in COMPILED),
    ],
)
def test_a_rewritten_model_compiles_whole(name: str, training: bool):
    torch._dynamo.reset()
    case = BY_NAME[name]
    small = rpqfx.rpqify(case.model(torch.float32), case.policy).eval()
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    args, kwargs = case.arguments(torch.float32)
    with torch.set_grad_enabled(training):
        found, wanted = compiled(*args, **kwargs), small(*args, **kwargs)
    assert_outputs(found, wanted, 1e-4)
    if training:
        parameters = list(small.parameters())
        mine, theirs = (
            torch.autograd.grad(sum(y.square().sum() for y in floating(result)), parameters, allow_unused=True)
            for result in (found, wanted)
        )
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "policy", [SMALL, Policy.from_scratch(codebook_dim=4, codebook_bits=2, min_size=64)], ids=["fit", "new"]
)
def test_training_reduces_a_loss(policy: Policy):
    torch.manual_seed(0)
    small = rpqfx.rpqify(GPT(), policy)
    ids = torch.randint(40, (4, 12), generator=torch.Generator().manual_seed(1))
    optimiser = torch.optim.AdamW(small.parameters(), lr=1e-2)
    codes = {name: weight.codes.clone() for name, weight in quantized_weights(small).items()}
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(small(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.85 * losses[0]
    assert all(torch.equal(weight.codes, codes[name]) for name, weight in quantized_weights(small).items())


def test_a_frozen_model_still_fits_and_has_no_gradient():
    model = CNN().requires_grad_(False)
    small = rpqfx.rpqify(model, Policy(codebook_dim=9, codebook_bits=1, min_size=64)).eval()
    y = small(torch.randn(2, 3, 8, 8))
    assert not y.requires_grad


def test_a_model_that_is_one_layer_becomes_one_layer():
    model = nn.Linear(16, 32)
    small = rpqfx.rpqify(model, SMALL)
    assert type(small) is RPQLinear and set(small.state_dict()) == {"bias", "weight_rpq.codebooks", "weight_rpq.codes"}
    assert type(model) is nn.Linear and copy.deepcopy(small)(torch.zeros(1, 16)).shape == (1, 32)


def test_a_padding_row_with_values_keeps_them_and_gets_no_gradient():
    """torch only keeps gradients from a padding row; one that is not zero is a row like any other."""
    dense = nn.Sequential(nn.Embedding(64, 16, padding_idx=1))
    with torch.no_grad():
        dense[0].weight[1] = 5.0
    small = rpqfx.rpqify(dense, Policy(codebook_dim=4, codebook_bits=5, min_size=0))
    ids = torch.tensor([1])
    torch.testing.assert_close(small(ids), small[0].weight[1:2])
    assert small(ids).abs().sum() > 40
    small(ids).sum().backward()
    assert not small[0].weight_rpq.codebooks.grad.any()


def test_codebooks_that_only_pay_together_are_shared():
    """Layers that would not shrink alone do where many share their codebooks."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    alone = Policy(codebook_dim=16, codebook_bits=6)
    with pytest.raises(PolicyError, match="would not shrink"):
        rpqfx.rpqify(model, alone)
    small = rpqfx.rpqify(model, dataclasses.replace(alone, sharing="shape"))
    assert len({id(held.codebooks) for held in quantized_weights(small).values()}) == 1
    assert rpqfx.report(small).after < rpqfx.report(small).before


def test_a_count_need_divide_one_way_only():
    """With split='auto' an explicit count that divides one side of a weight is taken there."""
    small = rpqfx.rpqify(nn.Sequential(nn.Linear(512, 100)), Policy(num_subvectors=16, codebook_bits=4))
    assert small[0].weight_rpq.spec.dim == 512


def test_a_rewrite_in_place_whose_last_step_fails_is_taken_back(monkeypatch: pytest.MonkeyPatch):
    """Whatever is raised, the caller's own model is then what it was."""
    model = MLP()
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}

    def fail(model: nn.Module) -> None:
        assert is_rewritten(model)
        raise RewriteError

    monkeypatch.setattr(rewritten_module, "renew_calls", fail)
    with pytest.raises(RewriteError):
        rpqfx.rpqify(model, SMALL, inplace=True)
    assert not is_rewritten(model) and type(model.fc1) is nn.Linear
    assert list(before) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    with pytest.raises(RPQError):
        rpqfx.report(model)
    model(x12())
