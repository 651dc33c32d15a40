"""Claims on the training of routers and light branches."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import KVPolicy, Policy, RoutePolicy, Rule, finetune_routes, route, rpqify
from rpqfx.errors import FormatError, InputError, TrainingError
from rpqfx.routing.rewrite import routed
from rpqfx.training import Rates
from rpqfx.training.easing import Easing
from tests.routing.rewrite.models import LENGTH, Gated, Layer, Plain, x_of

STEPS = 6
FAST = Rates(dense=1e-2, codebooks=1e-2)
CODES = Policy(codebook_dim=4, codebook_bits=2, min_size=0)
NO_ROUTES = Policy(codebook_dim=4, codebook_bits=2, min_size=0, rules=(Rule("*.routed*", skip="light"),))
FIT = RoutePolicy(feed_forward=2, attention=None, window=6, light=2.0, light_init="fit")
SOME = RoutePolicy(feed_forward=2, attention=3, window=6, light=2.0)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def batches(count: int = 3) -> list[Tensor]:
    return [x_of(seed) for seed in range(count)]


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Layer(causal=True, block=Gated), Layer(causal=True)).eval()


def fitted(model: nn.Module, policy: RoutePolicy = FIT) -> nn.Module:
    return route(model, policy, calibration=batches() if policy.light_init == "fit" else None)


def kv(model: nn.Module) -> nn.Module:
    policy = KVPolicy(window=2, codebook_dim=4, codebook_size=4)
    return rpqfx.quantize_kv(model, policy, calibration=batches(), progress=False)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "zero": lambda: fitted(dense(), SOME),
    "fit": lambda: fitted(dense()),
    "of codebooks": lambda: fitted(rpqify(dense(), CODES)),
    "into codebooks": lambda: rpqify(fitted(dense()), CODES),
    "into codebooks, routes apart": lambda: rpqify(fitted(dense(), SOME), NO_ROUTES),
    "attention on codes": lambda: fitted(kv(dense())),
    "attention on codes, last": lambda: kv(fitted(dense())),
}


def trained(model: nn.Module, **options: Any) -> Any:
    given = {"teacher": dense(), "data": batches(), "steps": STEPS, "rates": FAST, **options}
    return finetune_routes(model, **given)


def mean_error(model: nn.Module) -> float:
    with torch.no_grad():
        return float(torch.stack([(model(x) - dense()(x)).square().mean() for x in batches()]).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_only_routes_change_and_the_model_comes_nearer(kind: str) -> None:
    small = KINDS[kind]()
    before, modes = copy.deepcopy(small.state_dict()), [m.training for m in small.modules()]
    flags = [p.requires_grad for p in small.parameters()]
    far = mean_error(small)
    done = trained(small, steps=30, anneal=0.2)
    changed = {name for name, value in small.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".routed." in name for name in changed), changed
    assert any("routing_token" in name for name in changed) and any(".light." in name for name in changed)
    assert any("codebooks" in name for name in changed) == (kind == "into codebooks")
    assert mean_error(small) < far
    assert [m.training for m in small.modules()] == modes and [p.requires_grad for p in small.parameters()] == flags
    assert all(not each.chooser.easing for each in routed(small).values())
    assert done.steps == 30 and "numbers trained" in str(done)
    assert ("quantized" in str(done)) == ("codebooks" in kind)


def test_all_may_be_trained() -> None:
    small = fitted(dense())
    before = copy.deepcopy(small.state_dict())
    trained(small, train=lambda name: True)
    assert not any(torch.equal(value, before[name]) for name, value in small.named_parameters())


@pytest.mark.parametrize(("anneal", "steps"), [(0.5, 8), (1.0, 5), (0.0, 3), (0.3, 1)])
def test_heavy_tokens_go_evenly_from_all_to_the_number(anneal: float, steps: int) -> None:
    small, seen = fitted(dense()), []
    choosers = [each.chooser for each in routed(small).values()]

    def look(done: int, total: int, said: str) -> None:
        seen.append([chooser._slots(LENGTH) for chooser in choosers])

    shares = [Easing(small, anneal, steps).left(number) for number in range(steps)]
    if anneal:
        assert shares == pytest.approx([max(0.0, 1 - (n + 1) / (anneal * steps)) for n in range(steps)])
    trained(small, anneal=anneal, steps=steps, progress=look)
    wanted = [2 + -(-(LENGTH - 2) * share // 1) if share else 2 for share in shares]
    assert [counts[0] for counts in seen] == pytest.approx(wanted, abs=1)
    assert seen[-1] == [2, 2] and seen == sorted(seen, reverse=True)


def test_what_eases_a_share_eases_it_for_every_length() -> None:
    chooser = next(iter(routed(route(Plain(), RoutePolicy(feed_forward=0.25))).values())).chooser
    for easing, share in ((0.0, 0.25), (0.5, 0.625), (1.0, 1.0)):
        chooser.easing = easing
        choice = chooser(x_of(0, 2, 16))
        assert (16 if choice.indices is None else choice.indices.shape[-1]) == 16 * share


def stopped(model: nn.Module, folder: Any, at: int, **options: Any) -> None:
    def stop(done: int, total: int, words: str) -> None:
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(model, checkpoint=folder, checkpoint_every=2, progress=stop, **options)


@pytest.mark.parametrize("kind", ["zero", "fit", "into codebooks"])
def test_it_goes_on_to_the_same_bits(kind: str, tmp_path: pathlib.Path) -> None:
    wanted = KINDS[kind]()
    result = trained(wanted, clip=0.5)
    for at in (1, 5):
        stopped(KINDS[kind](), tmp_path, at, clip=0.5)
    found = KINDS[kind]()
    again = trained(found, clip=0.5, checkpoint=tmp_path, checkpoint_every=2)
    assert again.losses == result.losses
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in wanted.state_dict().items())


def test_a_checkpoint_is_of_one_schedule_and_policy(tmp_path: pathlib.Path) -> None:
    stopped(fitted(dense()), tmp_path, 3)
    other = fitted(dense(), dataclasses.replace(FIT, feed_forward=3))
    for model, options in ((fitted(dense()), {"anneal": 0.25}), (other, {})):
        with pytest.raises(FormatError, match="another"):
            trained(model, checkpoint=tmp_path, **options)


def test_a_run_that_fails_leaves_a_model_that_chooses_as_it_did() -> None:
    small = fitted(dense())

    def bad(found: Tensor, wanted: Tensor, batch: Any) -> Tensor:
        return found.sum() * float("nan")

    with pytest.raises(TrainingError):
        trained(small, loss=bad)
    assert not any(each.chooser.easing for each in routed(small).values())
    assert torch.equal(small(x_of(0)), fitted(dense())(x_of(0)))


def short(count: int = 3) -> list[Tensor]:
    return [x_of(seed, 2, 5) for seed in range(count)]


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("nothing in this model is routed", lambda: trained(dense())),
        ("torch.nn.Module", lambda: trained(3)),  # type: ignore[arg-type]
        ("meta device", lambda: trained(route(dense().to("meta"), FIT))),
        ("call model.float", lambda: trained(fitted(dense(), SOME).bfloat16())),
        ("is zero, so that its entries cannot learn", lambda: trained(rpqify(fitted(dense(), SOME), CODES))),
        ("every token is heavy", lambda: trained(fitted(dense()), data=short(), anneal=0.0)),
        ("every token is heavy", lambda: trained(fitted(dense()), data=short())),
        ("anneal is a share", lambda: trained(fitted(dense()), anneal=1.5)),
        ("anneal is a share", lambda: trained(fitted(dense()), anneal=True)),
        ("give a teacher", lambda: trained(fitted(dense()), teacher=None)),
        ("chooses no Parameter", lambda: trained(fitted(dense()), train=lambda name: False)),
    ],
)
def test_what_cannot_be_trained_is_refused(match: str, call: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=match):
        call()


def test_the_students_own_teacher_is_refused() -> None:
    small = fitted(dense())
    with pytest.raises(InputError, match="nothing to teach"):
        trained(small, teacher=small)
