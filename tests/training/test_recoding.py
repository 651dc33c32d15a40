"""Codes that are learned in training: what each recipe holds in memory, how it resumes, and that it learns."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rpqfx
from rpqfx import Policy, Recoding
from rpqfx.errors import InputError
from rpqfx.nn import RPQLinear, RPQWeight
from rpqfx.training import recoding
from rpqfx.training.latent_weight import LatentWeight
from tests.helpers import generator, seeds
from tests.models import GPT, quantized_weights

LATENT = Policy.from_scratch(codebook_dim=4, codebook_bits=4, sharing="layer", min_size=256)
SKETCH = Policy.from_scratch(codebook_dim=4, codebook_bits=4, sharing="layer", stages=2, min_size=256)
POLICIES = {"latent": LATENT, "sketch": SKETCH}
STEPS = 10


class Net(nn.Module):
    """A table that the head is tied to, a convolution, and a layer whose codebooks several sub-vectors own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 16)
        self.mix = nn.Conv1d(16, 32, 3, padding=1)
        self.down = nn.Linear(32, 16)
        self.head = nn.Linear(16, 64, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.mix(self.table(ids).mT).mT)
        return self.head(self.down(x))


def small_of(recipe: str, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return rpqfx.rpqify(Net(), Policy.from_scratch(**{**_options(recipe), **options}))


def _options(recipe: str) -> dict[str, Any]:
    return {
        "codebook_dim": 4,
        "codebook_bits": 4,
        "sharing": "layer",
        "min_size": 256,
        "stages": 1 + (recipe == "sketch"),
    }


def batches(count: int = STEPS) -> list[Tensor]:
    g = generator(3)
    start = torch.randint(64, (count, 8, 1), generator=g)
    return list((start + 5 * torch.arange(9)) % 64)  # each token says what the next one is


def train(model: nn.Module, recode: Recoding, optimizer: torch.optim.Optimizer, data: list[Tensor]) -> list[float]:
    losses = []
    for batch in data:
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        recode.step()
        losses.append(float(loss.detach()))
    return losses


def started(recipe: str, steps: int = STEPS, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Recoding]:
    model = small_of(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    return model, optimizer, Recoding(model, optimizer, steps=steps, recipe=recipe, **options)


def last_loss(recipe: str, seed: int, learned: bool) -> float:
    """The loss after 60 steps, with two bits a code for the sketch: with four on so small a model both learn it all."""
    data = batches(60)
    model = small_of(recipe, seed, **({"codebook_bits": 2, "min_codebook_bits": 2} if recipe == "sketch" else {}))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    if learned:
        return train(model, Recoding(model, optimizer, steps=60, recipe=recipe, seed=seed), optimizer, data)[-1]
    for batch in data:
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("recipe", POLICIES)
def test_the_loss_falls_further_than_with_codes_that_stay(recipe: str) -> None:
    """The sketch on average of seeds: what a single one reaches differs by a third."""
    count = {"latent": 1, "sketch": 4}[recipe]
    found = {learned: sum(last_loss(recipe, seed, learned) for seed in range(count)) for learned in (True, False)}
    assert found[True] < {"latent": 0.8, "sketch": 0.95}[recipe] * found[False]


@given(seed=seeds, stages=st.sampled_from([1, 2]), books=st.sampled_from(["own", "layer"]))
def test_weights_compute_with_the_nearest_entries_of_their_dense_matrices(seed: int, stages: int, books: Any) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(RPQLinear(8, 24, codebook_dim=4, codebook_bits=3, stages=stages, sharing=books))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recode = Recoding(model, optimizer, steps=5, seed=seed)
    weight = model[0].weight_rpq
    assert isinstance(weight, LatentWeight)
    x = torch.randn(5, 8)
    y = model(x)
    y.square().sum().backward()
    dense = rpqfx.codebook.expand(weight.codebooks, weight.codes)
    torch.testing.assert_close(y, F.linear(x, dense, model[0].bias))
    torch.testing.assert_close(weight.latent.grad, 2 * y.detach().mT @ x)  # straight through
    optimizer.step()
    before = (weight.latent - dense).square().sum()
    recode.step()
    after = (weight.latent - rpqfx.codebook.expand(weight.codebooks, weight.codes)).square().sum()
    assert after <= before * (1 + 1e-5)
    if stages == 1:
        parts, entries = weight.latent.detach().unflatten(1, (2, 4)), weight.codebooks.detach()[0]
        for group in range(2):
            book = entries[group if books == "own" else 0]
            for code in range(8):  # each entry is the mean of its sub-vectors
                where = (weight.codes[0, group] == code)[:, None].expand(-1, 4)
                if books == "own" and where.any():
                    torch.testing.assert_close(book[code], parts[:, group][where].view(-1, 4).mean(0))


def test_memory_of_the_sketch_is_that_of_codebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: nothing of a weight's size is there between steps, and within learning one weight's at a time."""
    model, optimizer, recode = started("sketch", schedule=(0.2, 0.5))
    train(model, recode, optimizer, batches())
    sizes = [weight.spec.num_vectors * weight.spec.dim for weight in set(quantized_weights(model).values())]
    state = [value for held in optimizer.state.values() for value in held.values() if isinstance(value, Tensor)]
    floats = [t.numel() for t in (*model.parameters(), *state) if t.is_floating_point()]
    assert max(floats) < min(sizes) and not any(isinstance(m, LatentWeight) for m in model.modules())


def test_memory_of_the_latent_recipe_is_that_of_dense_training_until_it_is_finished() -> None:
    model, optimizer, recode = started("latent")
    train(model, recode, optimizer, batches())
    weights = list(dict.fromkeys(quantized_weights(model).values()))
    dense = sum(weight.spec.num_vectors * weight.spec.dim for weight in weights)
    latents = [p for name, p in model.named_parameters() if name.endswith("latent")]
    assert sum(p.numel() for p in latents) == dense and all(len(optimizer.state[p]) == 3 for p in latents)
    recode.finish()
    recode.finish()
    assert not any(name.endswith("latent") for name in model.state_dict())
    assert all(type(weight) is RPQWeight and weight.codebooks.requires_grad for weight in weights)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert not any(id(p) not in held for p in optimizer.state)


@pytest.mark.parametrize("recipe", POLICIES)
def test_a_finished_model_is_saved_loaded_and_trained_on(recipe: str, tmp_path: Any) -> None:
    model, optimizer, recode = started(recipe)
    train(model, recode, optimizer, batches())
    ids = batches(1)[0]
    before = model(ids)
    recode.finish()
    torch.testing.assert_close(model(ids), before)
    rpqfx.save(model, tmp_path / "m.rpq")
    assert torch.equal(rpqfx.load(tmp_path / "m.rpq", Net)(ids), model(ids))
    assert all(weight.codes.dtype == torch.uint8 for weight in quantized_weights(model).values())
    model(ids).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(ids), before)


@pytest.mark.parametrize("recipe", POLICIES)
@pytest.mark.parametrize("at", [1, 3, 7])
def test_a_checkpoint_resumes_to_the_same_bits(recipe: str, at: int) -> None:
    data = batches()
    model, optimizer, recode = started(recipe)
    wanted = train(model, recode, optimizer, data)
    first = started(recipe)
    losses = train(first[0], first[2], first[1], data[:at])
    kept = copy.deepcopy([part.state_dict() for part in first])
    again = started(recipe)
    for part, state in zip(again, kept, strict=True):
        part.load_state_dict(state)
    losses += train(again[0], again[2], again[1], data[at:])
    assert losses == wanted
    for name, tensor in again[0].state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_sketch_learns_on_schedule_and_keeps_the_function() -> None:
    model, optimizer, recode = started("sketch", steps=20, schedule=(0.1, 0.5))
    assert recode.schedule == (2, 10)
    weight = model.down.weight_rpq
    for number, batch in enumerate(batches(12), 1):
        train(model, _NONE, optimizer, [batch])
        codes, dense = weight.codes.clone(), model.down.weight.detach().clone()
        moved = recode.step()
        assert bool((weight.codes != codes).any()) == bool(moved) == (number in (2, 10))
        if moved:
            assert not weight.codebooks[1].any() and optimizer.state[weight.codebooks]["exp_avg"].count_nonzero() == 0
            error = (model.down.weight - dense).square().sum() / dense.square().sum()
            assert error < 0.5  # 16 entries for four numbers


class _None:
    def step(self) -> int:
        return 0


_NONE: Any = _None()


def test_shared_codebooks_and_tied_tables_are_learned_together() -> None:
    torch.manual_seed(0)
    model = rpqfx.rpqify(GPT(), Policy.from_scratch(codebook_dim=4, codebook_bits=4, sharing="layer", min_size=128))
    weights = quantized_weights(model)
    first = weights["blocks.0.fc1.weight"]
    weights["blocks.1.fc1.weight"].codebooks = first.codebooks
    weights["blocks.1.fc1.weight"].shares_codebooks = True
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recode = Recoding(model, optimizer, steps=2)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len([p for p in model.parameters() if p.requires_grad])
    recode.step()
    assert weights["blocks.1.fc1.weight"].codebooks is first.codebooks
    recode.finish()
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


def test_drawn_weights_have_the_deviation_of_the_layers_own_initialisation() -> None:
    model, _, _ = started("latent")
    latent = model.down.weight_rpq.latent
    assert float(latent.detach().std()) == pytest.approx(1 / math.sqrt(3 * 32), rel=0.1)


REFUSED = {
    "no module": (lambda: Recoding("x", _optimizer(small_of("latent")), steps=3), "Recoding takes a torch.nn.Module"),
    "dense": (lambda: Recoding(Net(), _optimizer(Net()), steps=3), "no weight of this model is quantized"),
    "recipe": (lambda: _recoding("latent", recipe="best"), "recipe is 'latent' or 'sketch', got 'best'"),
    "steps": (lambda: _recoding("latent", steps=0), "steps is a whole number of optimizer steps"),
    "stages": (lambda: _recoding("latent", recipe="sketch"), "has 1 stage, and recipe='sketch' needs two"),
    "every": (lambda: _recoding("sketch", recipe="sketch", every=2), "every=2 would do nothing"),
    "schedule": (lambda: _recoding("latent", schedule=(0.5,)), "schedule=(0.5,) would do nothing"),
    "order": (lambda: _recoding("sketch", recipe="sketch", schedule=(0.5, 0.2)), "shares of all steps, rising"),
    "scale": (lambda: _recoding("latent", {"scale": True}), "table.weight has scale, and learned codes have none"),
    "optimizer": (lambda: Recoding(small_of("latent"), "adam", steps=3), "got str"),
    "other": (lambda: Recoding(small_of("latent"), _optimizer(small_of("latent")), steps=3), "model.parameters()"),
}  # fmt: skip


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


def _recoding(policy: str, options: dict[str, Any] | None = None, **given: Any) -> Recoding:
    model = small_of(policy, **(options or {}))
    return Recoding(model, _optimizer(model), **{"steps": 3, **given})


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_learned_is_refused_by_name(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(InputError) as error:
        make()
    assert message in str(error.value)


def test_calls_at_the_wrong_time_are_refused() -> None:
    model, optimizer, recode = started("latent", steps=1)
    with pytest.raises(InputError, match="is learned by another Recoding already"):
        Recoding(model, optimizer, steps=1)
    recode.step()
    with pytest.raises(InputError, match="all 1 steps are taken"):
        recode.step()
    recode.finish()
    with pytest.raises(InputError, match="finish\\(\\) was called"):
        recode.step()
    other = started("latent", steps=2)[2]
    with pytest.raises(InputError, match="with steps=1, and this one has steps=2"):
        other.load_state_dict(recode.state_dict())
    model, optimizer = small_of("latent"), None
    optimizer = torch.optim.Adam(model.parameters())
    model(batches(1)[0]).sum().backward()
    optimizer.step()
    with pytest.raises(InputError, match="has taken steps already"):
        Recoding(model, optimizer, steps=1)


def test_where_it_is_interrupted_model_and_optimizer_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_of("latent")
    optimizer = _optimizer(model)
    names, held = list(model.state_dict()), [list(group["params"]) for group in optimizer.param_groups]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exchange, calls = recoding.exchange, []

    def stop(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        exchange(*args)

    monkeypatch.setattr(recoding, "exchange", stop)
    with pytest.raises(KeyboardInterrupt):
        Recoding(model, optimizer, steps=3)
    assert list(model.state_dict()) == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for group, own in zip(optimizer.param_groups, held, strict=True):
        assert len(group["params"]) == len(own) and all(a is b for a, b in zip(group["params"], own, strict=True))


def test_finish_goes_on_where_it_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, recode = started("latent")
    settle, calls = LatentWeight.settle, []

    def stop(weight: LatentWeight) -> None:
        settle(weight)
        calls.append(weight)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(LatentWeight, "settle", stop)
    with pytest.raises(KeyboardInterrupt):
        recode.finish()
    recode.finish()
    assert not any(name.endswith("latent") for name in model.state_dict())
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
