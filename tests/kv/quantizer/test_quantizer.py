"""The quantiser: every ability of the one in vqllm (arXiv 2410.15704), and what a module of torch has to be."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.errors import CodeError, InputError, SpecError
from rpqfx.kv.quantizer.quantizer import VectorQuantizer
from rpqfx.ops.cpu import build
from tests.helpers import generator, randn, seeds
from tests.kv.helpers import arguments, book, channels, made, naive_decode

batches = st.sampled_from([(), (1,), (5,), (2, 3), (0,), (2, 0, 3)])


def naive_encode(quantizer: VectorQuantizer, x: Tensor) -> tuple[Tensor, float]:
    """Greedy codes of one vector by loops over groups, stages and entries; and its scale."""
    scale = float(((x - x.mean()).square().mean()).sqrt()) if quantizer.normalize else 1.0
    scale = scale or 1.0
    codes = []
    for group, stages in enumerate(quantizer.layout.stages):
        rest = x[channels(quantizer, group)] / scale
        for stage in range(stages):
            costs = []
            for entry in book(quantizer, stage, group):
                if quantizer.use_cosine_sim:
                    costs.append(-float(rest @ entry) / max(1e-12, float(rest.norm() * entry.norm())))
                else:
                    costs.append(float((rest - entry).square().sum()))
            codes.append(costs.index(min(costs)))
            rest = rest - book(quantizer, stage, group)[codes[-1]]
    return torch.tensor(codes, dtype=torch.int64), scale


@given(arguments(beam=1), seeds, batches)
def test_codes_are_those_of_a_loop(given: dict[str, Any], seed: int, batch: tuple[int, ...]) -> None:
    """Shared or own codebooks, any entries, lengths and stages, strided or not, scaled or not, by either measure."""
    quantizer = made(seed, **given)
    x = randn(seed + 1, *batch, given["dim"])
    codes, scale = quantizer.encode(x)
    assert codes.shape == (*batch, quantizer.layout.count) and codes.dtype == torch.uint8
    assert (scale is not None) == given["normalize"]
    rows = x.reshape(-1, given["dim"])
    for i, row in enumerate(rows):
        expected, factor = naive_encode(quantizer, row)
        ours = codes.reshape(len(rows), -1)[i].long()
        if given["codebook_dim"] > 1 or not given["use_cosine_sim"]:  # in one dimension cosines are equal
            assert torch.equal(ours, expected)
        if scale is not None:
            assert float(scale.reshape(-1)[i]) == pytest.approx(factor)


@given(arguments(), seeds, batches)
def test_values_are_what_the_codes_stand_for(given: dict[str, Any], seed: int, batch: tuple[int, ...]) -> None:
    """Decoding is the loop over slots; forward gives the same values and codes, to the bit."""
    quantizer = made(seed, **given)
    x = randn(seed + 1, *batch, given["dim"])
    codes, scale = quantizer.encode(x)
    values = quantizer.decode(codes, scale)
    assert values.shape == x.shape
    flat = codes.reshape(x.shape[:-1].numel(), quantizer.layout.count), None if scale is None else scale.reshape(-1)
    for i, row in enumerate(values.reshape(-1, given["dim"])):
        torch.testing.assert_close(
            row, naive_decode(quantizer, flat[0][i], None if flat[1] is None else flat[1][i]).detach()
        )
    out = quantizer(x)
    assert torch.equal(out.codes, codes) and torch.equal(out.values, values)
    assert out.loss.shape == () and out.loss >= 0


@given(arguments(), seeds)
def test_gradients_go_straight_through_once(given: dict[str, Any], seed: int) -> None:
    """As if the values were the input, however many stages there are; the codebooks get theirs from the loss alone."""
    quantizer = made(seed, **given)
    x = randn(seed + 1, 4, given["dim"]).requires_grad_()
    weight = randn(seed + 2, 4, given["dim"])
    values = quantizer(x).values
    grad_x, grad_books = torch.autograd.grad(
        (values * weight).sum(), (x, quantizer.codebooks), allow_unused=True
    )  # fmt: skip
    assert torch.equal(grad_x, weight) and grad_books is None


@given(arguments(use_cosine_sim=False), seeds)
def test_a_wider_beam_as_wide_as_all_sums_finds_the_nearest(given: dict[str, Any], seed: int) -> None:
    stages = given["stages"] if isinstance(given["stages"], int) else max(given["stages"])
    wide = made(seed, **{**given, "beam": given["codebook_size"] ** max(0, stages - 1)})
    greedy = made(seed, **{**given, "beam": 1})
    x = randn(seed + 1, 6, given["dim"])
    errors = [(q.decode(*q.encode(x)).detach() - x).square().sum(1) for q in (wide, greedy)]
    assert (errors[0] <= errors[1] + 1e-9).all()


def test_the_recipe_of_vqllm() -> None:
    """8 stages of 2,048 entries of length 32, shared, keys' channels strided, scaled: 11 bits a code, 2.75 a number."""
    quantizer = VectorQuantizer(
        128, codebook_dim=32, codebook_size=2048, stages=8, strided=True, normalize=True, beam=1, decay=0.99,
        threshold_ema_dead_code=1.0
    )  # fmt: skip
    assert quantizer.codebooks.shape == (8, 1, 2048, 32) and not quantizer.codebooks.requires_grad
    x = randn(0, 2, 3, 20, 128, dtype=torch.float32)
    out = quantizer(x, torch.rand(2, 1, 20) < 0.8)
    assert out.codes.shape == (2, 3, 20, 32) and out.codes.dtype == torch.int16
    assert out.codes.shape[-1] * 11 / 128 == 2.75
    scale = quantizer.encode(x).scale
    assert scale is not None and scale.shape == (2, 3, 20) and out.loss.isfinite()
    assert quantizer.ema_counts.shape == (8, 1, 2048) and quantizer.codebooks.isfinite().all()


def test_each_stage_takes_more_off() -> None:
    x = randn(0, 1000, 16, dtype=torch.float32)
    given: dict[str, Any] = {"codebook_dim": 4, "codebook_size": 16, "strided": True, "normalize": True, "beam": 1}
    errors = []
    for stages in (1, 2, 4):
        quantizer = VectorQuantizer(16, stages=stages, **given).fit(x)
        errors.append(float((quantizer(x).values - x).square().mean()))
    assert 1 > errors[0] > 2 * errors[1] > 4 * errors[2]


def test_a_group_without_stages_is_zero() -> None:
    quantizer = made(0, 8, codebook_dim=2, stages=[1, 0, 2, 0])
    values = quantizer(randn(1, 5, 8)).values
    assert not values[:, [2, 3, 6, 7]].any() and values[:, [0, 1, 4, 5]].all()
    nothing = VectorQuantizer(8, stages=0)
    out = nothing(torch.ones(2, 3, 8))
    assert out.codes.shape == (2, 3, 0) and torch.equal(out.values, torch.zeros(2, 3, 8)) and out.loss == 0
    assert torch.equal(nothing.decode(*nothing.fit(torch.ones(4, 8)).encode(torch.ones(2, 8))), torch.zeros(2, 8))


def test_scales_are_standard_deviations_and_one_for_a_constant() -> None:
    quantizer = made(0, 4, codebook_dim=2, normalize=True)
    x = torch.tensor([[1.0, 3, 1, 3], [5, 5, 5, 5], [0, 0, 0, 0]])
    assert quantizer.encode(x).scale.tolist() == [1.0, 1.0, 1.0]
    assert quantizer.encode(x * 8).scale.tolist() == [8.0, 1.0, 1.0]
    y = randn(1, 3, 4)
    assert torch.equal(quantizer.encode(y * 4).codes, quantizer.encode(y).codes)


@pytest.mark.parametrize(
    ("entries", "dtype"),
    [(2, torch.uint8), (256, torch.uint8), (257, torch.int16), (32_768, torch.int16), (65_536, torch.uint16)],
)
def test_codes_are_the_narrowest_integers(entries: int, dtype: torch.dtype) -> None:
    quantizer = made(0, 4, codebook_dim=2, codebook_size=entries, stages=1, beam=1)
    x = quantizer.codebooks.detach()[0, 0, [[0, entries - 1], [1, entries // 2]]].view(2, 4)
    codes = quantizer.encode(x).codes
    assert codes.dtype == dtype
    assert codes.tolist() == [[0, entries - 1], [1, entries // 2]]
    assert torch.equal(quantizer.decode(codes), x)


# ------------------------------------------------------------------------------------------------- training


def test_codebooks_train_by_gradient() -> None:
    x = randn(0, 500, 8, dtype=torch.float32)
    fitted = VectorQuantizer(8, codebook_size=16, codebook_dim=4, beam=1).fit(x)
    quantizer = copy.deepcopy(fitted)
    with torch.no_grad():
        quantizer.codebooks += 0.3 * randn(1, *quantizer.codebooks.shape, dtype=torch.float32)
    optimiser = torch.optim.Adam(quantizer.parameters(), 0.02)
    losses = []
    for _ in range(80):
        losses.append(float(quantizer(x).loss.detach()))
        optimiser.zero_grad()
        quantizer(x).loss.backward()
        optimiser.step()
    best = float(fitted(x).loss.detach())
    assert losses[0] > 1.15 * best and losses[-1] < best


@given(arguments(), seeds)
def test_padding_counts_nowhere(given: dict[str, Any], seed: int) -> None:
    """Loss and gradients are those of the tokens that count, even where padding is NaN."""
    quantizer = made(seed, **given)
    x = randn(seed + 1, 2, 3, given["dim"])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    spoilt = torch.where(mask[..., None], x, float("nan")).requires_grad_()
    ours = quantizer(spoilt, mask)
    kept = x[mask].requires_grad_()
    theirs = quantizer(kept)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert torch.equal(ours.values[mask], theirs.values)
    if quantizer.layout.count:
        mine = torch.autograd.grad(ours.loss, (spoilt, quantizer.codebooks))
        other = torch.autograd.grad(theirs.loss, (kept, quantizer.codebooks))
        torch.testing.assert_close(mine[0][mask], other[0])
        torch.testing.assert_close(mine[1], other[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_quantised_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input may be short, the codebooks may, and autocast may be on: codes are as exact as what they come from."""
    wide = made(0, 16, dtype=torch.float32, codebook_size=64)
    x = randn(1, 50, 16, dtype=dtype).requires_grad_()
    exact = wide(x.float())
    ours = wide(x)
    assert ours.values.dtype == dtype and ours.loss.dtype == torch.float32
    assert torch.equal(ours.codes, exact.codes) and torch.equal(ours.values, exact.values.to(dtype))
    (ours.loss + ours.values.sum()).backward()
    assert x.grad.dtype == dtype
    many = randn(2, 3000, 16, dtype=torch.float32)
    codes = wide.encode(many).codes
    monkeypatch.setattr(build, "ready", lambda: False)  # it is torch's operators that autocast rounds in
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = wide(x.float())
        assert torch.equal(wide.encode(many).codes, codes)
    assert torch.equal(again.codes, exact.codes) and torch.equal(again.values, exact.values)
    assert again.loss == exact.loss
    short = copy.deepcopy(wide).to(dtype)
    codes = short.encode(x.detach()).codes
    assert torch.equal(codes, short.float().encode(x.detach().float()).codes)


# ------------------------------------------------------------------------------------------------ as a module


@pytest.mark.parametrize(
    "given", [{}, {"decay": 0.9, "threshold_ema_dead_code": 1.0}, {"stages": [2, 0, 1, 3], "shared": False}]
)
def test_saved_copied_and_pickled_it_is_the_same(given: dict[str, Any]) -> None:
    quantizer = VectorQuantizer(16, codebook_dim=4, codebook_size=9, **given)
    x = randn(0, 7, 16, dtype=torch.float32)
    quantizer(x)
    loaded = VectorQuantizer(16, codebook_dim=4, codebook_size=9, **given)
    loaded.load_state_dict(quantizer.state_dict())
    names = {"codebooks", "ema_counts", "ema_sums", "ema_steps"} if "decay" in given else {"codebooks"}
    assert set(quantizer.state_dict()) == names
    for other in (loaded, copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert other.slots == quantizer.slots
        twin = copy.deepcopy(quantizer)
        assert torch.equal(other(x).values, twin(x).values)
        assert torch.equal(other.codebooks, twin.codebooks)


def test_torch_seeds_the_entries() -> None:
    books = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        books.append(VectorQuantizer(64, stages=3, shared=False).codebooks.detach())
    assert torch.equal(books[0], books[1]) and not torch.equal(books[0], books[2])
    for stage in range(3):
        assert float(books[0][stage].std()) == pytest.approx(0.5**stage, rel=0.05)
    uneven = VectorQuantizer(16, stages=[1, 2], shared=False)
    assert not uneven.codebooks[1, 0].any() and uneven.codebooks[1, 1].all()
    meta = VectorQuantizer(16, device="meta", decay=0.9)
    meta.to_empty(device="cpu").reset_parameters()
    assert meta.codebooks.isfinite().all() and (meta.ema_counts == 1).all() and meta.ema_counts.dtype == torch.float32


def test_printing_shows_what_it_is() -> None:
    shown = repr(VectorQuantizer(16, stages=[1, 2], strided=True, normalize=True, decay=0.9, shared=False))
    for part in (
        "16, codebook_dim=8",
        "codebook_size=256",
        "stages=[1, 2]",
        "strided",
        "normalize",
        "own codebooks",
        "decay=0.9",
    ):
        assert part in shown
    assert (
        repr(VectorQuantizer(16)) == "VectorQuantizer(16, codebook_dim=8, codebook_size=256, stages=2, shared, beam=8)"
    )


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"shared_stages": 0}, SpecError, "shared_stages 0 does not divide"),
        ({"shared_stages": 2, "stages": [2, 3]}, SpecError, r"shared_stages 2 does not divide \[2, 3\] stages"),
        ({"beam": 0}, SpecError, "beam is at least 1"),
        ({"decay": 1.0}, SpecError, "decay is from 0 to less than 1"),
        ({"threshold_ema_dead_code": 1.0}, SpecError, "needs a decay"),
        ({"decay": 0.9, "threshold_ema_dead_code": -1.0}, SpecError, "not negative"),
        ({"commitment": float("nan")}, SpecError, "not negative"),
        ({"dtype": torch.int64}, InputError, "floating point"),
        ({"codebook_dim": 5}, SpecError, "the nearest that do: 4 or 8"),
        ({"stages": [1, 1, 1]}, SpecError, "2 groups"),
        ({"codebook_size": 70_000}, SpecError, "65536"),
    ],
)
def test_arguments_that_cannot_be_are_refused(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        VectorQuantizer(16, **given)


def test_tensors_that_do_not_fit_are_refused() -> None:
    quantizer, scaled = VectorQuantizer(16, codebook_size=9), VectorQuantizer(16, normalize=True)
    codes = torch.zeros(3, 4, dtype=torch.uint8)
    for run, kind, message in [
        (lambda: quantizer(torch.zeros(3, 15)), InputError, r"\[3, 15\], expected 16"),
        (lambda: quantizer.encode(torch.zeros(16).long()), InputError, "floating"),
        (lambda: quantizer(torch.zeros(3, 16), torch.ones(2).bool()), InputError, "mask has the shape"),
        (lambda: quantizer.decode(codes[:, :3]), InputError, "expected 4"),
        (lambda: quantizer.decode(codes + 9), CodeError, "codes are 0 to 8, these are 9 to 9"),
        (lambda: quantizer.decode(codes, torch.ones(3)), InputError, "has no scale"),
        (lambda: scaled.decode(codes), InputError, "has a scale, give it"),
        (lambda: scaled.decode(codes, torch.ones(4)), InputError, r"scale is \[4\], expected \[3\]"),
        (lambda: quantizer.fit(torch.full((3, 16), float("nan"))), InputError, "3 of 3 points are not finite"),
    ]:
        with pytest.raises(kind, match=message):
            run()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("given", [{}, {"beam": 1}, {"use_cosine_sim": True}, {"normalize": True}])
def test_what_is_not_finite_comes_out_as_such(bad: float, given: dict[str, Any]) -> None:
    """Codes are in range all the same, neighbours are as without it, and values are never quietly wrong."""
    quantizer = made(0, 16, dtype=torch.float32, **given)
    x = randn(1, 6, 16, dtype=torch.float32)
    clean = quantizer(x)
    x[2, 5] = bad
    out = quantizer(x)
    assert not out.values[2, 5].isfinite()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(out.values[others], clean.values[others])


# ------------------------------------------------------------------------------------------------- compiled


@pytest.mark.traced
@pytest.mark.parametrize(
    "given",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"use_cosine_sim": True, "shared": False}, marks=pytest.mark.slow),
        {"stages": [1, 0, 0, 1], "normalize": True, "strided": True, "beam": 1},
        pytest.param({"stages": [1, 0, 0, 2], "normalize": True, "strided": True, "beam": 1}, marks=pytest.mark.slow),
        pytest.param({"decay": 0.9, "threshold_ema_dead_code": 1.0, "shared_stages": 2}, marks=pytest.mark.slow),
    ],
)
def test_compiled_whole_it_is_the_same(given: dict[str, Any]) -> None:
    """In training and evaluation, forward, encode and decode, with batches of any size."""
    quantizer = made(0, 16, dtype=torch.float32, codebook_dim=4, codebook_size=9, **given)
    for mode in (True, False) if "use_cosine_sim" in given else (True,) if "decay" in given else (False,):
        torch.compiler.reset()
        plain, traced = copy.deepcopy(quantizer).train(mode), copy.deepcopy(quantizer).train(mode)
        run = torch.compile(traced, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (5, 7):
            x = randn(rows, 2, rows, 16, dtype=torch.float32)
            mask = torch.rand(2, rows, generator=generator(rows)) < 0.7
            leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
            outs = plain(leaves[0], mask), run(leaves[1], mask)
            for out in outs:
                (out.loss + out.values.square().sum()).backward()
            for ours, other in zip(outs[1], outs[0], strict=True):
                torch.testing.assert_close(ours, other)
            torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
            for ours, other in zip(traced.state_dict().values(), plain.state_dict().values(), strict=True):
                torch.testing.assert_close(ours, other)
        if not mode and "decay" not in given:
            torch.testing.assert_close(traced.codebooks.grad, plain.codebooks.grad)
    whole = torch.compile(lambda y: plain.decode(*plain.encode(y)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(x), plain.decode(*plain.encode(x)))


@pytest.mark.slow
def test_inductor_compiles_it() -> None:
    quantizer = made(0, 16, dtype=torch.float32, stages=[2, 3])
    run = torch.compile(copy.deepcopy(quantizer), fullgraph=True)
    x = randn(1, 50, 16, dtype=torch.float32)
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    outs = quantizer(leaves[0]), run(leaves[1])
    for out in outs:
        (out.loss + out.values.square().sum()).backward()
    for ours, other in zip(outs[1], outs[0], strict=True):
        torch.testing.assert_close(ours, other)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
