"""A rewritten model computes what the dense model that holds the expanded weights computes, and is still itself."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rpqfx
from rpqfx import CodebookSpec, KeepDense, Policy, Quantize, Rule
from rpqfx.errors import RewriteError
from rpqfx.graph import capture, find_sites, install, is_rewritten, rewrite
from rpqfx.nn import Layout, RPQLinear, RPQMultiheadAttention, RPQWeight, VirtualWeight
from tests.models import (
    BY_NAME,
    CASES,
    GPT,
    MLP,
    SMALL,
    SUFFIX,
    Block,
    Case,
    Hooked,
    Listed,
    Opaque,
    Shared,
    assert_equals_dense,
    assert_outputs,
    definition,
    filled,
    quantized_weights,
)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
either_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@functools.cache
def _made(name: str) -> tuple[nn.Module, nn.Module]:
    model = BY_NAME[name].model()
    return model, rpqfx.rpqify(model, BY_NAME[name].policy)


def rewritten(case: Case) -> tuple[nn.Module, nn.Module]:
    """The dense model and its rewrite, made once a case; copies, free to be changed."""
    model, small = _made(case.name)
    return copy.deepcopy(model), copy.deepcopy(small)


@pytest.mark.parametrize("init", ["fit", "random"])
@pytest.mark.parametrize("sharing", ["own", "role"])
def test_plans_arrive_in_every_weight_and_change_no_result(init: str, sharing: str):
    """Tied layers have one weight and so one plan; layers that share codebooks each have their own."""
    model = GPT().eval()
    rules = (Rule("tok", plan="lookup"), Rule("blocks.1.*", plan="dequantize"))
    policy = Policy(codebook_dim=4, codebook_bits=2, min_size=64, init=init, sharing=sharing, rules=rules)
    small = rpqfx.rpqify(model, policy)
    weights = quantized_weights(small)
    assert weights["head.weight"] is weights["tok.weight"] and weights["tok.weight"].plan == "lookup"
    assert {weight.plan for name, weight in weights.items() if name.startswith("blocks.1.")} == {"dequantize"}
    assert {weight.plan for name, weight in weights.items() if name.startswith("blocks.0.")} == {"auto"}
    books = [weights[f"blocks.{i}.qkv.weight"].codebooks for i in range(2)]
    assert (books[0] is books[1]) == (sharing == "role")
    ids = torch.arange(6)[None]
    outputs = {}
    for plan in ("auto", "dequantize", "lookup"):
        for weight in weights.values():
            weight.plan = plan
        outputs[plan] = small(ids)
    for found in outputs.values():
        assert_outputs(found, outputs["auto"], 1e-5)


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


# ------------------------------------------------------------------------------------------------------ the claim


@every_case
@either_mode
def test_same_outputs_and_gradients_as_the_dense_model_with_the_expanded_weights(case: Case, training: bool):
    model, small = rewritten(case)
    assert set(quantized_weights(small)) == {*case.rewritten, *case.tied}
    args, kwargs = case.arguments()
    assert_equals_dense(model.train(training), small.train(training), args, kwargs)


STYLES = {
    "stages and scale": Policy(codebook_dim=4, codebook_bits=2, min_size=64, stages=2, scale=True, allow_growth=True),
    "factors of columns": Policy(codebook_dim=4, codebook_bits=2, min_size=64, column_scale=True, allow_growth=True),
    "signs": Policy(codebook_dim=4, codebook_bits=2, min_size=64, signs=True, allow_growth=True),
    "one codebook for the layer": Policy(
        codebook_dim=4, codebook_bits=3, min_size=64, sharing="layer", allow_growth=True
    ),
    "one codebook for a role": Policy(codebook_dim=4, codebook_bits=2, min_size=64, sharing="role", allow_growth=True),
    "columns": Policy(
        codebook_dim=4,
        codebook_bits=2,
        min_size=64,
        split="column",
        kinds=("linear", "bilinear", "attention"),
        allow_growth=True,
    ),
    "random": Policy(codebook_dim=4, codebook_bits=2, min_size=64, init="random", allow_growth=True),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["gpt", "attention", "functional", "opaque"])
def test_the_claim_holds_for_every_way_to_hold_a_weight(name: str, style: str):
    case = BY_NAME[name]
    model = case.model()
    small = rpqfx.rpqify(model, STYLES[style])
    assert quantized_weights(small)
    args, kwargs = case.arguments()
    assert_equals_dense(model.train(), small.train(), args, kwargs)


def test_the_claim_can_fail():
    case = BY_NAME["gpt"]
    model, small = rewritten(case)
    with torch.no_grad():
        model.norm.bias += 1e-6
        model.blocks[0].register_forward_hook(lambda module, args, output: output * (1 + 1e-6))
    args, kwargs = case.arguments()
    with pytest.raises(AssertionError):
        assert_equals_dense(model, small, args, kwargs)


@every_case
def test_a_bfloat16_model_stays_one(case: Case):
    model = case.model(torch.bfloat16).eval()
    small = rpqfx.rpqify(model, case.policy)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    args, kwargs = case.arguments(torch.bfloat16)
    with torch.no_grad():
        wanted = filled(model, small)(*args, **kwargs)
        found = small(*args, **kwargs)
    assert_outputs(found, wanted, 0.06)


@every_case
def test_a_model_on_the_meta_device_is_rewritten_without_allocating(case: Case):
    with torch.device("meta"):
        model = case.build()
    small = rpqfx.rpqify(model, case.policy)
    assert set(quantized_weights(small)) == {*case.rewritten, *case.tied}
    assert all(t.is_meta for t in (*small.parameters(), *small.buffers()))


def test_the_fast_path_of_a_transformer_encoder_computes_the_same():
    case = BY_NAME["encoder"]
    model, small = rewritten(case)
    dense = filled(model, small).eval()
    args, _ = case.arguments()
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(*args), dense(*args), rtol=1e-9, atol=1e-9)
        padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
        torch.testing.assert_close(small(*args, padding), dense(*args, padding), rtol=1e-9, atol=1e-9)


def test_training_and_freezing_between_calls_is_seen():
    """Nothing is cached: a changed codebook changes the next output, also where a Parameter is read by foreign code."""
    for name in ("mlp", "functional", "read from outside"):
        case = BY_NAME[name]
        _, small = rewritten(case)
        args, kwargs = case.arguments()
        before = small.eval()(*args, **kwargs)
        with torch.no_grad():
            for weight in quantized_weights(small).values():
                weight.codebooks.mul_(1.5)
        assert not torch.allclose(small(*args, **kwargs), before)


# --------------------------------------------------------------------------------------- the input is left untouched


@every_case
def test_the_input_model_is_bit_identical_afterwards_and_shares_nothing(case: Case):
    model = case.model()
    before, names, modes = bits_of(model), list(model.__dict__), [m.training for m in model.modules()]
    classes = [type(m) for m in model.modules()]
    random_state = torch.get_rng_state()
    small = rpqfx.rpqify(model, case.policy)
    assert_bits(model, before)
    assert list(model.__dict__) == names and [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == classes and not is_rewritten(model)
    assert torch.equal(torch.get_rng_state(), random_state)  # a fit has a seed of its own
    mine = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    theirs = {t.untyped_storage().data_ptr() for t in (*small.parameters(), *small.buffers())}
    assert not mine & theirs
    assert not {id(m) for m in model.modules()} & {id(m) for m in small.modules()}


@every_case
def test_inplace_keeps_every_object(case: Case):
    model = case.model()
    objects = {name: id(m) for name, m in model.named_modules()}
    result = rpqfx.rpqify(model, case.policy, inplace=True)
    assert result is model and is_rewritten(model)
    left = {name: id(m) for name, m in model.named_modules() if not isinstance(m, RPQWeight)}
    assert left == objects


def test_inplace_gives_what_a_copy_gives():
    case = BY_NAME["gpt"]
    apart, inside = rpqfx.rpqify(case.model(), SMALL), rpqfx.rpqify(case.model(), SMALL, inplace=True)
    assert_bits(apart, bits_of(inside))


# --------------------------------------------------------------------------------------------------- what survives


def test_classes_methods_and_attributes_survive():
    model, small = rewritten(BY_NAME["gpt"])
    assert type(small) is GPT and type(small.blocks[0]) is Block and small.vocab == 40
    assert isinstance(small.head, nn.Linear) and isinstance(small.tok, nn.Embedding)
    assert type(small.head) is RPQLinear and small.head.in_features == 16
    ids = torch.randint(40, (1, 4), generator=torch.Generator().manual_seed(0))
    wanted = filled(model, small).eval().generate(ids, 6)
    assert torch.equal(small.eval().generate(ids, 6), wanted)


def test_a_module_with_a_parameter_of_its_own_is_still_of_its_class():
    for case in (BY_NAME["opaque"], BY_NAME["functional"], BY_NAME["subclassed"]):
        model, small = rewritten(case)
        for (_, before), (_, after) in zip(
            model.named_modules(), ((n, m) for n, m in small.named_modules() if not isinstance(m, RPQWeight)),
            strict=True,
        ):  # fmt: skip
            assert isinstance(after, type(before)) and type(after).__name__.endswith(type(before).__name__)


def test_a_backed_parameter_can_still_be_asked_about():
    _, small = rewritten(BY_NAME["opaque"])
    assert isinstance(small.positive, VirtualWeight)
    assert small.positive.shape == (16, 16) and small.positive.dtype == torch.float64 and len(small.positive) == 16
    torch.testing.assert_close(small.positive.sum(), small.positive_rpq().sum())


def test_hooks_survive_and_fire_once_a_call():
    model, fired = Hooked().double(), []
    model.fc.register_forward_hook(lambda *_: fired.append("fc"))
    model.register_forward_pre_hook(lambda *_: fired.append("model"))
    model.weighted.register_full_backward_hook(lambda *_: fired.append("backward"))
    small = rpqfx.rpqify(model, SMALL, inplace=True)
    small(torch.randn(3, 12, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert fired == ["model", "fc", "backward"]


def test_training_flags_survive_one_by_one():
    model = GPT()
    model.blocks[0].eval()
    model.blocks[1].fc1.eval()
    small = rpqfx.rpqify(model, SMALL)
    flags = {n: m.training for n, m in small.named_modules() if not isinstance(m, RPQWeight)}
    assert flags == {name: module.training for name, module in model.named_modules()}


def test_frozen_weights_stay_frozen_and_others_do_not():
    model = BY_NAME["frozen"].model()
    for init in ("fit", "random"):
        small = rpqfx.rpqify(model, Policy(codebook_dim=4, codebook_bits=2, min_size=64, init=init, scale=True))
        wanted = {name.partition(SUFFIX)[0]: p.requires_grad for name, p in small.named_parameters()}
        assert wanted == {name: p.requires_grad for name, p in model.named_parameters()}


def test_extra_attributes_of_a_parameter_go_to_its_codebooks():
    model = MLP()
    model.fc1.weight.no_decay = True
    small = rpqfx.rpqify(model, SMALL)
    assert small.fc1.weight_rpq.codebooks.no_decay is True
    assert not hasattr(small.fc2.weight_rpq.codebooks, "no_decay")


@every_case
def test_deepcopy_and_pickle_give_the_same_model(case: Case):
    _, small = rewritten(case)
    args, kwargs = case.arguments()
    wanted = small.eval()(*args, **kwargs)
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert type(again) is type(small)
        assert_outputs(again(*args, **kwargs), wanted, 0)
        assert {id(p) for p in again.parameters()}.isdisjoint(id(p) for p in small.parameters())
        assert len(list(again.parameters())) == len(list(small.parameters()))  # what was tied is tied
        assert str(rpqfx.report(again)) == str(rpqfx.report(small))


@every_case
def test_state_dict_round_trip(case: Case):
    _, small = rewritten(case)
    other = copy.deepcopy(small)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    other.load_state_dict(small.state_dict())
    args, kwargs = case.arguments()
    assert_outputs(other.eval()(*args, **kwargs), small.eval()(*args, **kwargs), 0)


def test_a_state_dict_goes_through_torch_save():
    _, small = rewritten(BY_NAME["gpt"])
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    assert_bits(small, torch.load(file, weights_only=True))


def test_half_and_to_convert_codebooks_and_leave_codes_alone():
    _, small = rewritten(BY_NAME["gpt"])
    codes = small.tok.weight_rpq.codes.clone()
    small = small.half()
    assert {p.dtype for p in small.parameters()} == {torch.float16}
    assert torch.equal(small.tok.weight_rpq.codes, codes) and codes.dtype == torch.uint8
    assert small(torch.randint(40, (2, 7))).dtype == torch.float16
    assert {p.dtype for p in small.to(torch.float64).parameters()} == {torch.float64}


def test_parameters_are_what_an_optimiser_finds():
    model, small = rewritten(BY_NAME["gpt"])
    names = {name for name, _ in small.named_parameters()}
    assert {n for n in names if SUFFIX in n} == {f"{n}{SUFFIX}.codebooks" for n in BY_NAME["gpt"].rewritten}
    assert {n for n in names if SUFFIX not in n} == {n for n, _ in model.named_parameters()} - {
        *BY_NAME["gpt"].rewritten
    }


# --------------------------------------------------------------------------------------------------- ties, sharing


def test_tied_weights_stay_one_and_get_gradients_from_both_uses():
    case = BY_NAME["gpt"]
    _, small = rewritten(case)
    assert small.tok.weight_rpq is small.head.weight_rpq
    args, _ = case.arguments()
    small.eval()
    codebooks = small.tok.weight_rpq.codebooks

    def gradient(embed: bool, head: bool) -> Tensor:
        x = small.tok(args[0])
        x = (x if embed else x.detach()) + small.pos[: args[0].shape[1]]
        for block in small.blocks:
            x = block(x)
        x = small.norm(x)
        y = small.head(x) if head else F.linear(x, small.head.weight.detach())
        return torch.autograd.grad(y.logsumexp(-1).sum(), codebooks)[0]

    both, first, second = gradient(True, True), gradient(True, False), gradient(False, True)
    assert first.abs().sum() > 0 and second.abs().sum() > 0
    torch.testing.assert_close(both, first + second)


def test_a_module_used_twice_is_replaced_once():
    _, small = rewritten(BY_NAME["shared"])
    assert small.first is small.again
    assert small.other.weight_rpq is small.tied.weight_rpq and small.other is not small.tied
    assert len({id(w) for w in quantized_weights(small).values()}) == 2


@pytest.mark.parametrize("init", ["fit", "random"])
def test_codebooks_shared_by_role_are_one_parameter_whose_gradient_adds_up(init: str):
    model = GPT(depth=3).double()
    small = rpqfx.rpqify(model, Policy(codebook_dim=4, codebook_bits=2, min_size=64, sharing="role", init=init))
    held = quantized_weights(small)
    for name in ("qkv", "proj", "fc1", "fc2"):
        members = [held[f"blocks.{i}.{name}.weight"] for i in range(3)]
        assert members[0].codebooks is members[1].codebooks is members[2].codebooks
        assert members[0].codes is not members[1].codes
    assert held["blocks.0.qkv.weight"].codebooks is not held["blocks.0.fc1.weight"].codebooks
    codebooks = held["blocks.0.fc1.weight"].codebooks
    outputs = [small.blocks[i].fc1(torch.ones(1, 16, dtype=torch.float64)).sum() for i in range(3)]
    apart = [torch.autograd.grad(y, codebooks, retain_graph=True)[0] for y in outputs]
    torch.testing.assert_close(torch.autograd.grad(sum(outputs), codebooks)[0], sum(apart))
    assert all(float(grad.abs().sum()) > 0 for grad in apart)


def test_codebooks_shared_by_shape_go_by_vector_length():
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 64), nn.Linear(32, 48))
    small = rpqfx.rpqify(model, Policy(codebook_dim=4, codebook_bits=2, min_size=64, sharing="shape", split="row"))
    books = [layer.weight_rpq.codebooks for layer in small]
    assert books[0] is books[2] and books[1] is books[3] and books[0] is not books[1]


def test_one_codebook_for_a_layer_serves_all_its_sub_vectors():
    small = rpqfx.rpqify(MLP(), Policy(codebook_dim=4, codebook_bits=2, min_size=64, sharing="layer"))
    assert all(weight.codebooks.shape[1] == 1 for weight in quantized_weights(small).values())


def test_codebooks_fitted_together_serve_each_member_nearly_as_well_as_its_own():
    """Layers that are noisy copies of one another: shared codebooks lose little, and far less than foreign ones."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(64, 16, generator=g)
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(16, 64) for _ in range(3))})
    with torch.no_grad():
        for layer in model["layers"]:
            layer.weight.copy_(base + 0.05 * torch.randn(64, 16, generator=g))

    def errors(**options: Any) -> list[float]:
        small = rpqfx.rpqify(model, Policy(codebook_dim=4, codebook_bits=4, min_size=64, split="row", **options))
        return [
            float((m.weight - d.weight).detach().norm()) for m, d in zip(small["layers"], model["layers"], strict=True)
        ]

    own, shared, drawn = errors(), errors(sharing="role"), errors(sharing="role", init="random")
    assert max(shared) < 1.5 * max(own)
    assert max(shared) < 0.6 * min(drawn)


def test_members_of_one_group_that_differ_in_dtype_are_refused():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(16, 32), nn.Linear(16, 32).bfloat16()])})
    with pytest.raises(RewriteError, match=r"layers\.0\.weight, layers\.1\.weight cannot share codebooks"):
        rpqfx.rpqify(model, Policy(codebook_dim=4, codebook_bits=2, min_size=64, sharing="role"))


# ------------------------------------------------------------------------------------------------- what a fit loses


def test_the_error_in_the_report_is_the_measured_one():
    for name in ("gpt", "cnn", "functional", "recommender"):
        model, small = rewritten(BY_NAME[name])
        held = quantized_weights(small)
        for record in rpqfx.report(small).rewritten:
            dense = model.get_parameter(record.name)
            measured = (dense - definition(held[record.name])).norm() / dense.norm()
            assert record.error == pytest.approx(float(measured.detach()), rel=1e-4), record.name
            assert 0 < record.error < 1


def test_more_bits_or_more_stages_lose_less():
    model = MLP(width=64)

    def error(**options: Any) -> float:
        small = rpqfx.rpqify(model, Policy(codebook_dim=4, min_size=64, allow_growth=True, **options))
        return float(rpqfx.report(small).rewritten[0].error)

    falling = [error(codebook_bits=bits) for bits in range(1, 6)]
    assert falling == sorted(falling, reverse=True) and falling[-1] < 0.6 * falling[0]
    stages = [error(codebook_bits=3, stages=stages) for stages in (1, 2, 3)]
    assert stages == sorted(stages, reverse=True) and stages[-1] < stages[0]


def test_as_many_entries_as_vectors_lose_nothing():
    model = nn.Sequential(nn.Linear(16, 16))
    small = rpqfx.rpqify(model, Policy(codebook_dim=4, codebook_bits=4, min_size=1, allow_growth=True))
    torch.testing.assert_close(small[0].weight, model[0].weight)


def test_random_codebooks_have_the_weights_own_standard_deviation_and_no_error():
    model = nn.Sequential(nn.Linear(256, 512))
    with torch.no_grad():
        model[0].weight.mul_(3)
    torch.manual_seed(0)
    small = rpqfx.rpqify(model, Policy.from_scratch(codebook_dim=8))
    assert float(small[0].weight.std()) == pytest.approx(float(model[0].weight.std()), rel=0.03)
    assert rpqfx.report(small).rewritten[0].error is None


def test_fits_of_one_seed_are_equal_and_of_another_differ():
    model = MLP(width=64)
    policy = Policy(codebook_dim=4, codebook_bits=3, min_size=64)
    first, again, other = (rpqfx.rpqify(model, policy, seed=seed) for seed in (0, 0, 1))
    assert_bits(first, bits_of(again))
    assert not torch.equal(first.fc1.weight, other.fc1.weight)


# ------------------------------------------------------------------------------- the step itself: all or nothing


def steps(model: nn.Module, policy: Policy = SMALL) -> tuple[Any, list[Any], dict[str, Quantize | KeepDense]]:
    captured = capture(model)
    sites = find_sites(captured)
    return captured, sites, policy.decide(sites)


def test_find_decide_replace_one_by_one_give_what_rpqify_gives():
    model = GPT()
    wanted = rpqfx.rpqify(model, SMALL)
    captured, _, decisions = steps(model)
    assert rewrite(captured, decisions) is model
    assert_bits(model, bits_of(wanted))
    assert str(rpqfx.report(model)) == str(rpqfx.report(wanted))


def test_sites_without_a_decision_stay_and_say_so():
    captured, sites, decisions = steps(MLP())
    del decisions["fc2.weight"]
    model = rewrite(captured, decisions, sites)
    assert type(model.fc2) is nn.Linear and type(model.fc1) is RPQLinear
    assert [record.reason for record in rpqfx.report(model).skipped] == ["no decision"]


def whole(model: nn.Module) -> tuple[dict[str, Tensor], list[Any], list[list[str]]]:
    modules = list(model.modules())
    return bits_of(model), [(id(m), type(m)) for m in modules], [sorted(m.__dict__) for m in modules]


def assert_whole(model: nn.Module, before: tuple[dict[str, Tensor], list[Any], list[list[str]]]) -> None:
    modules = list(model.modules())
    assert [(id(m), type(m)) for m in modules] == before[1]
    assert [sorted(m.__dict__) for m in modules] == before[2]
    after = bits_of(model)
    assert after.keys() == before[0].keys()
    assert all(torch.equal(a, before[0][name]) or bool(a.isnan().any()) for name, a in after.items())


def nan_in_the_last() -> nn.Module:
    model = GPT()
    with torch.no_grad():
        model.blocks[1].fc2.weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize("sharing", ["own", "role"])
def test_a_weight_with_nan_is_named_and_nothing_is_touched(sharing: str):
    model = nan_in_the_last()
    before = whole(model)
    policy = Policy(codebook_dim=4, codebook_bits=2, min_size=64, sharing=sharing)
    with pytest.raises(RewriteError, match=r"blocks\.1\.fc2\.weight has infinite or NaN elements; mend it, or skip it"):
        rpqfx.rpqify(model, policy, inplace=True)
    assert_whole(model, before)


def test_a_weight_with_nan_can_be_skipped_or_drawn_anew():
    model = nan_in_the_last()
    skipping = Policy(codebook_dim=4, codebook_bits=2, min_size=64, rules=(Rule("blocks.1.fc2", skip="it holds NaN"),))
    assert rpqfx.report(rpqfx.rpqify(model, skipping)).skipped[-1].reason == "it holds NaN"
    drawn = rpqfx.rpqify(model, Policy(codebook_dim=4, codebook_bits=2, min_size=64, init="random"))
    assert bool(torch.isfinite(drawn.blocks[1].fc2.weight).all())


def test_factors_that_differ_within_a_channel_of_a_convolution_are_refused():
    model = nn.Sequential(nn.Conv1d(4, 16, 3))
    before = whole(model)
    captured, sites, _ = steps(model, Policy(codebook_bits=2, min_size=0, allow_growth=True))
    wrong = CodebookSpec(16, 12, 6, 4, column_scale_group=1)
    with pytest.raises(
        RewriteError, match=r"0\.weight: 1 elements of a filter share a factor.*give the spec column_scale_group=3"
    ):
        rewrite(captured, {"0.weight": wrong}, sites)
    assert_whole(model, before)
    rewrite(captured, {"0.weight": dataclasses.replace(wrong, column_scale_group=3)}, sites)
    assert model[0].weight_rpq.column_scale.shape == (4,)


def test_a_decision_for_no_site_or_of_another_shape_touches_nothing():
    model = MLP()
    before = whole(model)
    captured, sites, decisions = steps(model)
    with pytest.raises(RewriteError, match=r"decisions for sites that the model does not have: fc9\.weight"):
        rewrite(captured, {**decisions, "fc9.weight": KeepDense("typo")}, sites)
    wrong = Quantize(CodebookSpec(32, 8, 4, 4))
    with pytest.raises(RewriteError, match=r"fc2.weight: the decision has 32 vectors of length 8, the site 8 .* 32"):
        rewrite(captured, {**decisions, "fc2.weight": wrong}, sites)
    assert_whole(model, before)


class Sealed(nn.Module):
    """A class that refuses to be extended."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise TypeError("this class is final")

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Occupied(nn.Linear):
    weight_rpq = "taken"


@pytest.mark.parametrize(
    ("last", "why"),
    [
        (Sealed, "this class is final"),
        (lambda: Occupied(16, 16), "its module has an attribute 'weight_rpq' of its own"),
    ],
    ids=["sealed", "occupied"],
)
def test_a_module_that_cannot_take_codebooks_is_left_dense_with_the_reason(last: Any, why: str):
    model = nn.Sequential(nn.Linear(16, 16), last())
    before = whole(model[1])
    rpqfx.rpqify(model, SMALL, inplace=True)
    assert_whole(model[1], before)
    assert why in str([site.reason for site in rpqfx.report(model).sites if site.name == "1.weight"])
    assert isinstance(model[0], RPQLinear)


def test_install_puts_one_weight_under_all_names():
    model = Shared()
    weight = RPQWeight(CodebookSpec(16, 16, 4, 4), Layout((16, 16)))
    install(model, ("other.weight", "tied.weight"), weight)
    assert model.other.weight_rpq is model.tied.weight_rpq is weight
    assert type(model.first) is nn.Linear


def test_attention_whose_output_projection_alone_is_held_calls_it():
    model = nn.MultiheadAttention(16, 4)
    policy = Policy(codebook_dim=4, codebook_bits=2, min_size=64, rules=(Rule("in_proj_weight", skip="left dense"),))
    small = rpqfx.rpqify(model, policy)
    assert type(small) is RPQMultiheadAttention and type(small.out_proj) is RPQLinear
    assert set(quantized_weights(small)) == {"out_proj.weight"}
    x = torch.randn(5, 2, 16)
    torch.testing.assert_close(small(x, x, x), filled(model, small)(x, x, x), rtol=1e-4, atol=1e-5)


def test_a_held_weight_cannot_be_laid_over():
    _, small = rewritten(BY_NAME["listed"])
    with pytest.raises(RewriteError, match=r"0 is quantized and cannot be assigned"):
        small.weights.register_parameter("0", nn.Parameter(torch.zeros(16, 16)))
    with pytest.raises(RewriteError, match=r"Listed|Linear"):
        rpqfx.rpqify(MLP(), SMALL).fc1.weight = nn.Parameter(torch.zeros(32, 12))


def test_equal_modules_stay_of_one_class():
    model = nn.Sequential(*(Opaque() for _ in range(2)))
    small = rpqfx.rpqify(model, SMALL)
    assert type(small[0]) is type(small[1]) is not Opaque
    assert isinstance(small[0], Opaque) and Listed is type(BY_NAME["listed"].model())


def test_plain_specs_are_decisions():
    """What a callable policy may return, the third step takes too; a spec's shape says which side it lies along."""
    captured, sites, _ = steps(MLP())
    column = sites[0].layout("column")
    spec = CodebookSpec(column.num_vectors, column.dim, 1, entries=2)
    model = rewrite(captured, {sites[0].name: spec})
    assert model.fc1.weight_rpq.layout == column


def test_a_decision_for_what_must_stay_is_refused_and_changes_nothing():
    """Obstacles hold whoever decides."""
    model = nn.Sequential(nn.Linear(12, 48), nn.Linear(48, 16))
    model.favourite = [model[1].weight]
    captured, sites, decisions = steps(model)
    blocked = next(site for site in sites if site.blocked)
    row = blocked.layout("row")
    with pytest.raises(RewriteError, match=f"{blocked.name} cannot be quantized: is also kept"):
        rewrite(
            captured, {**decisions, blocked.name: CodebookSpec(row.num_vectors, row.dim, row.dim, entries=4)}, sites
        )
    assert type(model[0]) is nn.Linear
