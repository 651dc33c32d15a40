"""Fine-tuning lowers the loss, moves what it may and nothing else, and leaves a plain model whatever happens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import Policy
from rpqfx.errors import InputError, TrainingError
from rpqfx.nn import RPQWeight
from rpqfx.training import Distillation, Rates
from rpqfx.training.decoded_weight import CutWeight
from rpqfx.training.parameters import held
from tests.helpers import generator

FAST = Rates(codebooks=1e-2, scales=1e-2, dense=1e-2, codes=0.2)


class Mixed(nn.Module):
    """A convolution, attention, an embedding that the head is tied to, norms and a matrix that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.batch_norm = nn.BatchNorm1d(16)
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.small = nn.Linear(16, 4)
        self.back = nn.Linear(4, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.table(ids)
        x = x + self.batch_norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.back(self.small(self.norm(x)))
        return {"logits": self.head(x)}


def mixed(seed: int = 0, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A teacher and a student, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        teacher = Mixed().eval()
    policy = {"codebook_dim": 4, "codebook_bits": 3, "sharing": "layer", "scale": True, "min_size": 200, **options}
    return teacher, rpqfx.rpqify(teacher, Policy(**policy))


def batches(count: int = 4, seed: int = 0) -> list[Tensor]:
    g = generator(seed)
    return [torch.randint(40, (4, 6), generator=g) for _ in range(count)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def is_plain(model: nn.Module) -> bool:
    weights = [m for m in model.modules() if isinstance(m, RPQWeight)]
    kept = ("vectors", "_made", "_ids")
    return all(type(w) is RPQWeight and not any(name in w.__dict__ for name in kept) for w in weights)


@pytest.mark.parametrize("recode", [False, True])
@pytest.mark.parametrize("options", [{}, {"stages": 2}, {"signs": True}, {"sharing": "own", "column_scale": True}])
def test_the_loss_falls(options: dict[str, Any], recode: bool) -> None:
    teacher, small = mixed(**options)
    data = batches()
    compare = Distillation()

    def distance() -> float:
        with torch.no_grad():
            return sum(float(compare(small(ids), teacher(ids))) for ids in data)

    before = distance()
    done = rpqfx.finetune(small, teacher=teacher, data=data, steps=30, rates=FAST, recode=recode)
    assert distance() < 0.8 * before
    assert done.steps == 30
    assert done.after < done.before
    assert (done.recoded > 0) == recode
    assert "30 steps" in str(done)
    assert is_plain(small)


def test_codes_that_change_help() -> None:
    losses = []
    for recode in (False, True):
        teacher, small = mixed()
        losses.append(rpqfx.finetune(small, teacher=teacher, data=batches(), steps=60, rates=FAST, recode=recode).after)
    assert losses[1] < losses[0]


def test_only_codebooks_factors_norms_and_biases_move() -> None:
    teacher, small = mixed()
    small.norm.bias.requires_grad_(False)
    small.conv.bias.grad = torch.ones(16)
    flags = {name: p.requires_grad for name, p in small.named_parameters(remove_duplicate=False)}
    small.train()
    small.attention.eval()
    modes = [m.training for m in small.modules()]
    dense, before = state(teacher), state(small)
    rpqfx.finetune(small, teacher=teacher, data=batches(), steps=3, recode=False)
    moved = {name for name, tensor in state(small).items() if not torch.equal(tensor, before[name])}
    named = dict(small.named_parameters(remove_duplicate=False))
    assert moved == {n for n, p in named.items() if p.dim() == 1 or n.endswith("codebooks")}
    assert {name: p.requires_grad for name, p in named.items()} == flags
    assert torch.equal(small.conv.bias.grad, torch.ones(16))
    assert [name for name, p in named.items() if p.grad is not None] == ["conv.bias"]
    assert [m.training for m in small.modules()] == modes
    assert all(torch.equal(tensor, dense[name]) for name, tensor in state(teacher).items())
    assert not teacher.training


def test_train_chooses() -> None:
    teacher, small = mixed()
    before = state(small)
    rpqfx.finetune(small, teacher=teacher, data=batches(), steps=2, recode=False, train=lambda n: n == "small.weight")
    assert [n for n, tensor in state(small).items() if not torch.equal(tensor, before[n])] == ["small.weight"]
    with pytest.raises(InputError, match="chooses no Parameter"):
        rpqfx.finetune(small, teacher=teacher, data=batches(), train=lambda name: False)
    assert is_plain(small)


def test_norms_update() -> None:
    teacher, small = mixed()
    before = small.batch_norm.running_mean.clone()
    rpqfx.finetune(small, teacher=teacher, data=batches(), steps=2)
    assert torch.equal(small.batch_norm.running_mean, before)
    rpqfx.finetune(small, teacher=teacher, data=batches(), steps=2, norms="update")
    assert not torch.equal(small.batch_norm.running_mean, before)
    assert not small.batch_norm.training


def test_stored_bits_stay() -> None:
    teacher, small = mixed(sharing="shape")
    with torch.no_grad():
        for weight in held(small):
            weight.codebooks.copy_(weight.codebooks.half())
            weight.scale.copy_(weight.scale.half())
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in small.state_dict().items()}
    report = rpqfx.report(small)
    tied = {n: id(p) for n, p in small.named_parameters(remove_duplicate=False)}
    rpqfx.finetune(small, teacher=teacher, data=batches(), steps=5, rates=FAST)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in small.state_dict().items()} == shapes
    assert {n: id(p) for n, p in small.named_parameters(remove_duplicate=False)} == tied
    for weight in held(small):
        assert torch.equal(weight.codebooks, weight.codebooks.half().float())
        assert torch.equal(weight.scale, weight.scale.half().float())
    assert str(rpqfx.report(small)) == str(report)


@pytest.mark.parametrize("options", [{}, {"stages": 2, "signs": True, "grad_scale": "sqrt"}, {"column_scale": True}])
def test_gradients_are_those_of_the_weight_itself(options: dict[str, Any]) -> None:
    _, small = mixed(**options)
    small, data = small.double(), batches(2)
    cut = copy.deepcopy(small)
    weights = [CutWeight.of(m) for m in cut.modules() if isinstance(m, RPQWeight)]
    for model in (small, cut):
        for ids in data:
            model(ids)["logits"].square().sum().backward()
    for weight in weights:
        weight.collect()
    expected = {name: p.grad for name, p in small.named_parameters()}
    for name, parameter in cut.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_the_same_seed_gives_the_same_model() -> None:
    results = []
    for seed in (1, 1, 2):
        teacher, small = mixed()
        rpqfx.finetune(small, teacher=teacher, data=batches(), steps=6, seed=seed, rates=FAST)
        results.append(state(small))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not all(torch.equal(results[0][name], results[2][name]) for name in results[0])


def test_batches_add_up() -> None:
    data = batches()
    grown, summed = [], []
    for losses, given, accumulate in ((grown, [torch.cat(data)], 1), (summed, data, 4)):
        teacher, small = mixed()
        done = rpqfx.finetune(small, teacher=teacher, data=given, steps=3, accumulate=accumulate, recode=False)
        losses.extend(done.losses)
    assert grown == pytest.approx(summed, rel=1e-4)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_is_interrupted_leaves_a_model(error: type[BaseException]) -> None:
    teacher, small = mixed()
    flags = [p.requires_grad for p in small.parameters()]

    def stop(done: int, total: int, text: str) -> None:
        assert text.startswith("loss ")
        if done == 3:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        rpqfx.finetune(small, teacher=teacher, data=batches(), steps=9, rates=FAST, progress=stop)
    assert is_plain(small)
    assert [p.requires_grad for p in small.parameters()] == flags
    assert bool(torch.isfinite(small(batches()[0])["logits"]).all())
    assert rpqfx.finetune(small, teacher=teacher, data=batches(), steps=2).steps == 2


def test_a_loss_that_is_not_finite_is_named() -> None:
    teacher, small = mixed()
    good: list[dict[str, Tensor]] = []

    def loss(found: Any, wanted: Any, batch: Any) -> Tensor:
        value = Distillation()(found, wanted)
        if len(good) == 2:
            return value * torch.nan
        good.append(state(small))
        return value

    with pytest.raises(TrainingError, match="loss of step 2 is nan"):
        rpqfx.finetune(small, teacher=teacher, data=batches(), steps=5, loss=loss, rates=FAST)
    assert is_plain(small)
    for name, tensor in state(small).items():  # but for what is rounded to half precision at the end
        torch.testing.assert_close(tensor, good[1][name], rtol=1e-3, atol=1e-7, msg=name)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    teacher, small = mixed()
    before = state(small)

    def loss(found: Any, wanted: Any, batch: Any) -> Tensor:
        return (found["logits"] * 0).abs().sqrt().sum()  # 0, with an infinite slope

    with pytest.raises(TrainingError, match="gradient of step 0"):
        rpqfx.finetune(small, teacher=teacher, data=batches(), steps=5, loss=loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(small).items())


def test_no_teacher_is_needed_with_a_loss() -> None:
    _, small = mixed()

    def loss(found: Any, wanted: Any, batch: Any) -> Tensor:
        assert wanted is None
        return nn.functional.cross_entropy(found["logits"].flatten(0, 1), batch.flatten())

    done = rpqfx.finetune(small, data=batches(), steps=20, loss=loss, rates=FAST)
    assert done.after < done.before


def test_half_precision_products() -> None:
    teacher, small = mixed()
    done = rpqfx.finetune(small, teacher=teacher, data=batches(), steps=20, rates=FAST, autocast=torch.bfloat16)
    assert done.after < done.before
    assert all(p.dtype == torch.float32 for p in small.parameters())


def test_what_is_refused() -> None:
    teacher, small = mixed()
    data = batches()
    with pytest.raises(InputError, match="no weight of this model is quantized"):
        rpqfx.finetune(teacher, teacher=teacher, data=data)
    with pytest.raises(InputError, match="give a teacher"):
        rpqfx.finetune(small, data=data)
    with pytest.raises(InputError, match="there is no data"):
        rpqfx.finetune(small, teacher=teacher, data=[])
    with pytest.raises(InputError, match="put it in a list"):
        rpqfx.finetune(small, teacher=teacher, data=data[0])
    with pytest.raises(InputError, match="ended after 4 batches"):
        rpqfx.finetune(small, teacher=teacher, data=iter(data), steps=5)
    with pytest.raises(InputError, match="steps is a whole number"):
        rpqfx.finetune(small, teacher=teacher, data=data, steps=0)
    with pytest.raises(InputError, match="norms is"):
        rpqfx.finetune(small, teacher=teacher, data=data, norms="other")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="float"):
        rpqfx.finetune(copy.deepcopy(small).half(), teacher=teacher, data=data)
    assert is_plain(small)


def test_outputs_must_be_comparable() -> None:
    _, small = mixed()

    class Other(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return torch.zeros(2)

    with pytest.raises(InputError, match="different things"):
        rpqfx.finetune(small, teacher=Other(), data=batches(), logits=False)
    assert is_plain(small)


def test_data_may_be_many_things() -> None:
    def fresh(number: int) -> Tensor:
        return batches(1, seed=number)[0]

    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            return iter(batches(2))

    for data in (fresh, Loader(), iter(batches(5)), [(ids,) for ids in batches()], [{"ids": i} for i in batches()]):
        teacher, small = mixed()
        assert rpqfx.finetune(small, teacher=teacher, data=data, steps=5).steps == 5
