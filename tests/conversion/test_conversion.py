"""Conversions from end to end: what is seen, what is stored, what stays, and what is refused."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rpqfx
from rpqfx import Policy, Rule
from rpqfx.conversion import conversion, layerwise
from rpqfx.conversion.row_weights import RowWeights
from rpqfx.errors import InputError, PolicyError, RewriteError
from rpqfx.fit.output_moments import OutputMoments
from rpqfx.graph import is_rewritten
from rpqfx.nn import RPQWeight
from tests.helpers import randn, seeds
from tests.models import CASES, GPT, Case, assert_equals_dense, filled, quantized_weights

POLICY = Policy.pretrained(bits_per_weight=3)


def inputs(seed: int, *shape: int, count: int = 3) -> list[Tensor]:
    """Batches whose elements go together, and differ in strength."""
    mix = randn(seed, shape[-1], shape[-1], dtype=torch.float32) * randn(seed + 1, shape[-1], dtype=torch.float32).exp()
    return [randn(seed + 2 + i, *shape, dtype=torch.float32) @ mix for i in range(count)]


def mlp(seed: int = 0, *widths: int) -> nn.Sequential:
    torch.manual_seed(seed)
    widths = widths or (32, 64, 64, 32)
    layers: list[nn.Module] = []
    for first, second in itertools.pairwise(widths):
        layers += [nn.Linear(first, second), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv, self.norm2 = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32)
        self.short = nn.Conv2d(16, 32, 1, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.stem(x)))
        return self.head(self.relu(self.norm2(self.conv(x)) + self.short(x)).mean((2, 3)))


def convnet(seed: int = 0) -> ConvNet:
    torch.manual_seed(seed)
    model = ConvNet()
    for norm in (model.norm1, model.norm2):
        norm.momentum = None
    with torch.no_grad():
        for x in images(0):
            model(x)
    return model.eval()


def images(seed: int, count: int = 3) -> list[Tensor]:
    batches = [randn(seed + i, 8, 3, 10, 10, dtype=torch.float32) for i in range(count)]
    return [F.avg_pool2d(batch, 3, 1, 1) * torch.tensor([1.0, 5.0, 0.2])[:, None, None] for batch in batches]


def gpt(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return GPT(width=32).eval()


def ids(seed: int, count: int = 3) -> list[Tensor]:
    return [torch.randint(40, (4, 12), generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], list[Tensor]], Policy]] = {
    "mlp": (mlp, lambda seed: inputs(seed, 64, 32), POLICY),
    "convnet": (convnet, images, Policy.pretrained(bits_per_weight=3, min_size=256)),
    "gpt": (gpt, ids, Policy.pretrained(bits_per_weight=3, embedding_bits=None)),
}
every_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def converted(name: str) -> tuple[nn.Module, nn.Module]:
    """A model and what calibration makes of it, for tests that change neither."""
    build, draw, policy = MODELS[name]
    model = build()
    return model, rpqfx.convert(model, policy, draw(0))


def error(model: nn.Module, small: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        pairs = [(model(x), small(x)) for x in batches]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs))


def equal(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------------------ the result


@every_model
def test_calibration_brings_outputs_nearer(name: str) -> None:
    _, draw, policy = MODELS[name]
    model, small = converted(name)
    without = error(model, rpqfx.rpqify(model, policy), draw(0))
    assert error(model, small, draw(0)) < 0.8 * without


@every_model
def test_the_dense_model_stays_bit_for_bit_and_shares_nothing_with_the_result(name: str) -> None:
    model, small = converted(name)
    assert equal(model, MODELS[name][0]()) and not is_rewritten(model)
    mine = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not mine & {t.data_ptr() for t in (*small.parameters(), *small.buffers()) if t.numel()}
    assert all(type(weight) is RPQWeight for weight in quantized_weights(small).values())
    assert not any(t.is_meta for t in (*small.parameters(), *small.buffers()))
    assert all(p.grad is None for p in (*small.parameters(), *model.parameters()))


@every_model
def test_the_same_call_gives_the_same_model_and_another_seed_another(name: str) -> None:
    build, draw, policy = MODELS[name]
    same, another = (rpqfx.convert(build(), policy, draw(0), seed=seed) for seed in (0, 1))
    assert equal(converted(name)[1], same) and not equal(same, another)


@every_model
def test_the_result_is_saved_loaded_and_trained(name: str, tmp_path: Any) -> None:
    draw = MODELS[name][1]
    model, small = copy.deepcopy(converted(name))
    rpqfx.save(small, tmp_path / "small.rpq")
    again = rpqfx.load(tmp_path / "small.rpq", lambda: copy.deepcopy(model).to("meta")).train(model.training)
    assert torch.equal(again(draw(0)[0]), small(draw(0)[0]))
    assert rpqfx.report(again).bits_per_weight == rpqfx.report(small).bits_per_weight
    small(draw(0)[0]).square().mean().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in small.parameters())


def test_the_result_compiles_whole() -> None:
    x = inputs(0, 8, 32)
    small = rpqfx.convert(mlp(), POLICY, x)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    wanted = small(x[0])
    torch.testing.assert_close(compiled(x[0]), wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_model_is_calibrated_and_computes_what_its_codebooks_say(case: Case) -> None:
    model, (args, kwargs) = case.model(), case.arguments()
    plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
    model.eval()

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Any:
            return self.model(*plain, **kwargs)

    call = Call().eval()
    small = rpqfx.convert(call, case.policy, [()])
    assert set(quantized_weights(small)) >= {f"model.{name}" for name in case.rewritten}
    assert all(type(weight) is RPQWeight for weight in quantized_weights(small).values())
    with torch.no_grad():
        dense = filled(call, small)
    for name, buffer in small.named_buffers():
        if name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked"):  # estimated anew
            dense.get_buffer(name).copy_(buffer)
    assert_equals_dense(dense, small, (), {})


# -------------------------------------------------------------------------------------------- what calibration sees


def test_later_layers_see_what_rewritten_earlier_ones_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = mlp(), inputs(0, 64, 32)
    seen: dict[tuple[int, ...], Tensor] = {}
    fit = conversion.fit_weight

    def spy(vectors: Tensor, spec: Any, codebooks: Tensor, moment: Tensor | None, *rest: Any, **more: Any) -> Any:
        assert moment is not None
        seen[tuple(vectors.shape)] = moment
        return fit(vectors, spec, codebooks, moment, *rest, **more)

    monkeypatch.setattr(conversion, "fit_weight", spy)
    monkeypatch.setattr(RowWeights, "of", lambda *_: None)  # all rows alike
    small = rpqfx.convert(model, POLICY, batches)
    with torch.no_grad():
        for layer in (0, 2, 4):
            shape = tuple(model[layer].weight.shape)
            mine, dense = ([part[:layer](x) for x in batches] for part in (small, model))
            wanted, other = (torch.cat(rows) for rows in (mine, dense))
            torch.testing.assert_close(seen[shape], wanted.t() @ wanted / len(wanted), rtol=1e-4, atol=1e-4)
            assert layer == 0 or not torch.allclose(seen[shape], other.t() @ other / len(other), rtol=1e-3, atol=1e-3)


def test_what_outputs_feel_brings_them_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On inputs that were not calibrated on, in the mean over models."""
    policy = Policy.pretrained(bits_per_weight=2.5)
    pairs = [(mlp(seed, 32, 96, 96, 6), inputs(seed, 200, 32, count=7)) for seed in range(3)]

    def errors() -> list[float]:
        return [error(model, rpqfx.convert(model, policy, x[:6]), x[6:]) for model, x in pairs]

    aware = errors()
    monkeypatch.setattr(RowWeights, "of", lambda *_: None)
    monkeypatch.setattr(OutputMoments, "trusted", lambda *_: None)
    assert sum(aware) < 0.9 * sum(errors())


def test_inputs_that_layers_share_are_summed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
            self.out = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = self.q(x) * self.k(x)
            x.mul_(2)  # another input by the same name and address
            return self.out(y + self.v(x))

    adds = []
    add = layerwise.Moments.add

    def spy(self: layerwise.Moments, rows: Tensor, weights: Tensor | None = None) -> None:
        adds.append(weights is not None)
        add(self, rows, weights)

    monkeypatch.setattr(layerwise.Moments, "add", spy)
    torch.manual_seed(0)
    batches = inputs(0, 16, 32)
    rpqfx.convert(Split(), Policy(codebook_bits=4, codebook_dim=4, min_size=1), [x.clone() for x in batches])
    assert adds == [False] * (4 * 3 + 3 * 3)  # energies of four weights, then moments of three inputs
    adds.clear()
    rpqfx.convert(Split(), POLICY, [x.clone() for x in batches])
    assert adds == [False] * 4 * 3 + [True] * 4 * 3  # rows weigh what each weight's own outputs feel of them


def test_a_shared_input_is_not_taken_for_that_of_another_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    fit = conversion.fit_weight

    def spy(vectors: Tensor, spec: Any, codebooks: Tensor, moment: Any, *rest: Any, **more: Any) -> Any:
        shapes.append((vectors.shape[1], None if moment is None else len(moment)))
        return fit(vectors, spec, codebooks, moment, *rest, **more)

    monkeypatch.setattr(conversion, "fit_weight", spy)
    rpqfx.convert(convnet(), MODELS["convnet"][2], images(0))
    assert len(shapes) == 4 and all(dim == size for dim, size in shapes)


def test_batch_norms_are_estimated_anew_and_others_keep_theirs() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.other = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.BatchNorm1d(64)

        def forward(self, x: Tensor, more: bool = False) -> Tensor:
            x = self.norm(self.fc(x))
            return self.other(x) if more else x

    torch.manual_seed(0)
    model, batches = Normed().eval(), inputs(0, 32, 64)
    model.other.running_mean.fill_(3)
    small = rpqfx.convert(model, POLICY, batches)
    with torch.no_grad():
        results = [small.fc(x) for x in batches]
    torch.testing.assert_close(small.norm.running_mean, torch.stack([y.mean(0) for y in results]).mean(0))
    torch.testing.assert_close(small.norm.running_var, torch.stack([y.var(0) for y in results]).mean(0))
    assert small.norm.momentum == model.norm.momentum
    assert torch.equal(small.other.running_mean, model.other.running_mean)
    assert torch.equal(rpqfx.rpqify(model, POLICY).norm.running_mean, model.norm.running_mean)


def test_mode_hooks_and_gradient_flags_stay() -> None:
    model = mlp()
    calls: list[int] = []
    model[2].register_forward_hook(lambda *args: calls.append(len(args)))
    model[0].bias.requires_grad_(False)
    model[2].eval()
    small = rpqfx.convert(model, POLICY, inputs(0, 8, 32))
    assert small.training and small[0].training and not small[2].training
    assert not small[0].bias.requires_grad and small[2].bias.requires_grad
    calls.clear()
    small(torch.zeros(1, 32))
    assert calls


# --------------------------------------------------------------------------------------------- weights of every kind


class Odd(nn.Module):
    """Layers used twice, never, only by some batches, and a Parameter with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.sometimes = (nn.Linear(32, 32) for _ in range(3))
        self.one, self.same = nn.Linear(32, 32), nn.Linear(32, 32)
        self.same.weight = self.one.weight

    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = self.sometimes(x) if more else x
        return self.same(torch.tanh(self.one(x)))


def test_layers_used_twice_never_and_by_some_batches_only() -> None:
    torch.manual_seed(0)
    model, x = Odd(), inputs(0, 64, 32)
    policy = Policy.pretrained(bits_per_weight=4)
    small = rpqfx.convert(model, policy, [x[0], {"x": x[1], "more": True}, x[2]])
    assert len(set(quantized_weights(small).values())) == 4 and len(quantized_weights(small)) == 5
    assert small.one.weight_rpq is small.same.weight_rpq
    assert error(model, small, x) < 0.3
    with torch.no_grad():
        rest = quantized_weights(small)["never.weight"]() - model.never.weight
        assert 0 < float(rest.norm() / model.never.weight.norm()) < 1
        y = torch.tanh(model.twice(torch.tanh(model.twice(x[1]))))
        rest = small.sometimes(y) - model.sometimes(y)
        assert float(rest.norm() / model.sometimes(y).norm()) < 0.5


@pytest.mark.parametrize("calibrated", [False, True])
def test_dead_constant_and_zero_weights_are_held(calibrated: bool) -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[3:9] = 0
        model[0].weight[10:20] = 0.25
        model[2].weight.zero_()
    small = rpqfx.convert(model, POLICY, inputs(0, 32, 32) if calibrated else None)
    held = quantized_weights(small)
    assert not held["2.weight"]().detach().any()
    assert bool(torch.isfinite(small(inputs(0, 32, 32)[0])).all())
    assert rpqfx.report(small).bits_per_weight <= 3


@pytest.mark.parametrize("factor", [1e-9, 1e-5, 1e5])
def test_weights_of_any_magnitude_are_held_alike(factor: float) -> None:
    model, batches = mlp(0, 64, 64), inputs(0, 32, 64)
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].weight *= factor
    wanted = error(mlp(0, 64, 64), rpqfx.convert(mlp(0, 64, 64), POLICY, batches), batches)
    small = rpqfx.convert(model, POLICY, batches)
    assert error(model, small, batches) < 2 * wanted + 0.01
    assert rpqfx.report(small).bits_per_weight <= 3


@pytest.mark.parametrize("column", [1e-12, 1e12])
def test_columns_beyond_half_precision_keep_to_the_bits(column: float) -> None:
    model, batches = mlp(0, 64, 64), inputs(0, 32, 64)
    with torch.no_grad():
        model[0].weight[:, 5] *= column
    for batch in batches:
        batch[:, 5] /= column
    small = rpqfx.convert(model, POLICY, batches)
    assert rpqfx.report(small).bits_per_weight <= 3
    assert all(bool(torch.isfinite(weight()).all()) for weight in quantized_weights(small).values())


def test_fewer_vectors_than_entries() -> None:
    policy = Policy(codebook_bits=6, codebook_dim=4, min_size=1, allow_growth=True)
    model, batches = mlp(0, 32, 8, 8), inputs(0, 16, 32)
    small = rpqfx.convert(model, policy, batches)
    assert error(model, small, batches) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@every_model
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    build, draw, policy = MODELS[name]
    model = build().to(dtype)
    batches = [x.to(dtype) if x.is_floating_point() else x for x in draw(0)]
    small = rpqfx.convert(model, policy, batches)
    assert all(weight.codebooks.dtype == dtype for weight in quantized_weights(small).values())
    assert error(model.float(), copy.deepcopy(small).float(), draw(0)) < 0.3
    assert rpqfx.report(small).bits_per_weight <= 3


@pytest.mark.parametrize(
    "extra", [{}, {"signs": True}, {"scale": True, "column_scale": True}, {"stages": 2, "codebook_bits": 3}]
)
@pytest.mark.parametrize("sharing", ["own", "layer", "shape", "role"])
def test_any_policy_may_be_calibrated(extra: dict[str, Any], sharing: str) -> None:
    model, batches = mlp(0, 64, 64, 64), inputs(0, 64, 64)
    policy = Policy(**{"codebook_bits": 4, "codebook_dim": 4, "sharing": sharing, **extra})
    small = rpqfx.convert(model, policy, batches)
    found = error(model, small, batches)
    assert found < 0.25 and found < 1.1 * error(model, rpqfx.rpqify(model, policy), batches)
    for weight in quantized_weights(small).values():
        tensors = [*weight.parameters(), *weight.buffers()]
        assert not any(t.is_meta for t in tensors)


# ------------------------------------------------------------------------------------------------------------- bits


@settings(max_examples=15)
@given(
    seeds, st.lists(st.sampled_from([32, 48, 64, 96, 100]), min_size=2, max_size=4), st.floats(1.0, 6.0), st.booleans()
)
def test_no_more_bits_than_asked_are_stored(seed: int, widths: list[int], bits: float, calibrated: bool) -> None:
    model = mlp(seed, *widths)
    policy = Policy.pretrained(bits_per_weight=bits)
    small = rpqfx.convert(model, policy, inputs(seed, 8, widths[0], count=1) if calibrated else None)
    assert rpqfx.report(small).bits_per_weight <= bits


def test_the_saved_file_agrees(tmp_path: Any) -> None:
    model = mlp(0, 256, 256, 256)
    small = rpqfx.convert(model, Policy.pretrained(bits_per_weight=2.5), inputs(0, 16, 256, count=1))
    rpqfx.save(small, tmp_path / "small.rpq")
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    report = rpqfx.report(small)
    assert report.stored_bits / 8 <= size <= report.stored_bits / 8 + report.other + 16_384
    assert report.bits_per_weight <= 2.5


def test_weights_of_two_dtypes_keep_to_the_bits() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64, dtype=torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).bfloat16())

    for bits in (1.5, 2, 3, 4):
        small = rpqfx.convert(Mixed(), Policy.pretrained(bits_per_weight=bits), inputs(0, 8, 64))
        assert rpqfx.report(small).bits_per_weight <= bits


def test_what_a_rule_gives_a_shape_is_not_counted() -> None:
    model = mlp()
    policy = Policy.pretrained(
        bits_per_weight=2,
        rules=(Rule("2.*", codebook_bits=5, codebook_dim=2, sharing="layer"), Rule("4.*", skip="mine")),
    )
    small = rpqfx.convert(model, policy, inputs(0, 16, 32))
    sites = {site.name: site for site in rpqfx.report(small).sites}
    assert sites["0.weight"].bits_per_weight <= 2 < sites["2.weight"].bits_per_weight
    assert sites["2.weight"].spec.entries == 32 and sites["4.weight"].reason == "mine"


def test_embeddings_have_a_budget_of_their_own() -> None:
    torch.manual_seed(0)
    model = GPT(vocab=400, width=32)
    dense = rpqfx.convert(model, Policy.pretrained(bits_per_weight=3, embedding_bits=None), ids(0))
    assert "tok.weight" not in quantized_weights(dense)
    default = rpqfx.convert(model, Policy.pretrained(bits_per_weight=3), ids(0))
    shares = {site.name: site.bits_per_weight for site in rpqfx.report(default).rewritten}
    assert 4 < shares["tok.weight"] <= 8.5  # the policy's own share for them
    small = rpqfx.convert(model, Policy.pretrained(bits_per_weight=3, embedding_bits=4), ids(0))
    sites = {site.name: site for site in rpqfx.report(small).rewritten}
    table = sites.pop("tok.weight")
    assert table.bits_per_weight <= 4 and table.names == ("tok.weight", "head.weight")
    assert sum(s.stored_bits for s in sites.values()) <= 3 * sum(s.before // 4 for s in sites.values())
    assert small.head.weight_rpq is small.tok.weight_rpq


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(wrong: float, inplace: bool) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 4] = wrong
    with pytest.raises(RewriteError, match=r"2\.weight has infinite or NaN elements"):
        rpqfx.convert(model, POLICY, inputs(0, 8, 32), inplace=inplace)
    assert not is_rewritten(model) and type(model[0].weight) is nn.Parameter


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("wrong", [0, 2])
def test_a_batch_that_the_model_rejects_leaves_the_model_as_it_was(wrong: int, inplace: bool) -> None:
    model, batches = mlp(), inputs(0, 8, 32)
    before = copy.deepcopy(model)
    batches[wrong] = batches[wrong][:, :5]
    with pytest.raises(InputError, match=f"rejects calibration batch {wrong} "):
        rpqfx.convert(model, POLICY, batches, inplace=inplace)
    assert not is_rewritten(model) and equal(model, before) and model.training
    assert torch.equal(model(batches[1]), before(batches[1]))


def test_inputs_that_are_not_finite_are_refused() -> None:
    batches = inputs(0, 8, 32)
    batches[1][0, 0] = float("nan")
    with pytest.raises(InputError, match=r"calibration batch 1 holds NaN \(1 of 256 numbers of a tensor \[8, 32\]\)"):
        rpqfx.convert(mlp(), POLICY, batches)
    batches[1][0, 0] = float("inf")
    with pytest.raises(InputError, match=r"0\.weight: .* second moment has infinite or NaN elements; look at the cal"):
        rpqfx.convert(mlp(), POLICY, batches)


def test_batch_norms_that_cannot_be_estimated_are_put_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)).eval()
    model[1].running_mean.fill_(3)
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match=r"rejects calibration batch 1 .*more than 1 value per channel"):
        rpqfx.convert(model, POLICY, [torch.zeros(4, 64), torch.zeros(1, 64)], inplace=True)
    assert equal(model, before) and not is_rewritten(model) and not model[1].training


@pytest.mark.parametrize("at", range(1, 12))
def test_an_interruption_at_any_time_leaves_the_model_as_it_was(at: int) -> None:
    model, batches = convnet(), images(0)
    before, told = copy.deepcopy(model), []

    def progress(*args: Any) -> None:
        told.append(args)
        if len(told) == at:
            raise KeyboardInterrupt

    policy = MODELS["convnet"][2]
    if at <= 7:  # three batches, four weights
        with pytest.raises(KeyboardInterrupt):
            rpqfx.convert(model, policy, batches, inplace=True, progress=progress)
        assert equal(model, before) and not is_rewritten(model) and type(model.stem) is nn.Conv2d
    else:
        rpqfx.convert(model, policy, batches, inplace=True, progress=progress)
        assert is_rewritten(model) and len(told) == 7
        assert [args[:2] for args in told] == [*((i, 3) for i in (1, 2, 3)), *((i, 4) for i in (1, 2, 3, 4))]


def test_a_decision_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    with pytest.raises(PolicyError, match=r"cannot be had for these 8,192 weights; at least 0\.\d\d can"):
        rpqfx.convert(model, Policy.pretrained(bits_per_weight=0.01), inputs(0, 8, 32), inplace=True)
    monkeypatch.setattr(conversion, "fit_weight", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rpqfx.convert(model, POLICY, inputs(0, 8, 32), inplace=True)
    assert not is_rewritten(model) and model.training


def test_models_without_values_are_refused() -> None:
    with pytest.raises(RewriteError, match=r"0\.weight is on the meta device and has no values to convert"):
        rpqfx.convert(mlp().to("meta"), POLICY, inputs(0, 8, 32))


def test_calibration_comes_as_any_iterable() -> None:
    batches = inputs(0, 8, 32)

    class Stream(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(torch.cat(batches))

    wanted = rpqfx.convert(mlp(), POLICY, batches)
    loader = torch.utils.data.DataLoader(Stream(), batch_size=8)
    for same in (iter(batches), (x for x in batches), tuple((x,) for x in batches), loader):
        assert equal(rpqfx.convert(mlp(), POLICY, same), wanted)
    for one in (batches[0], {"input": batches[0]}):
        with pytest.raises(InputError, match="put it in a list"):
            rpqfx.convert(mlp(), POLICY, one)


def test_no_batches_are_refused() -> None:
    """Whoever gives calibration wants it; a generator that was gone through before is no way to say otherwise."""
    spent = iter(inputs(0, 8, 32))
    list(spent)
    for nothing in ([], (), spent, iter(())):
        with pytest.raises(InputError, match="there are no calibration batches"):
            rpqfx.convert(mlp(), POLICY, nothing)


def test_a_converted_model_is_checked_and_captured_whole() -> None:
    batches = inputs(0, 8, 32)
    small = rpqfx.convert(mlp(), POLICY, batches)
    rpqfx.check_outputs(small, (batches[0],))
    assert equal(small, rpqfx.convert(mlp(), POLICY, batches))
    graph = rpqfx.graph.whole_graph(small)
    torch.testing.assert_close(graph(batches[0]), small(batches[0]))


def test_attributes_of_parameters_stay():
    model = mlp()
    model[0].weight.tag = "mine"
    small = rpqfx.convert(model, POLICY, inputs(0, 8, 32))
    assert small[0].weight_rpq.codebooks.tag == "mine"
