"""One model serves, and several are rewritten, in many threads at once: to the bit what one thread gets alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rpqfx
from tests.figures import record

THREADS = 8
POLICY = rpqfx.Policy.from_scratch(codebook_dim=8, codebook_bits=4)
FITTED = rpqfx.Policy(codebook_dim=4, codebook_bits=3, allow_growth=True, min_size=64)


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Threads take turns as often as the interpreter allows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What calls return that start together, each in a thread of its own; raises what one of them raised."""
    barrier = threading.Barrier(len(calls))
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            barrier.wait(60)
            results[number] = calls[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)
    return results


def served(model: Callable[..., Tensor], inputs: Sequence[Any], rounds: int) -> None:
    """Each thread calls with an input of its own and finds, each time, what a thread alone had found."""

    def call(given: Any) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            with torch.no_grad():
                return [model(*given) for _ in range(rounds)]

        return run

    alone = [at_once(call(given))[0][0] for given in inputs]
    for want, found in zip(alone, at_once(*[call(given) for given in inputs]), strict=True):
        assert all(torch.equal(want, each) for each in found)


class Everything(nn.Module):
    """Every kind of layer, and Parameters that a module uses itself."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(64, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.norm = parametrizations.weight_norm(nn.Linear(32, 64))
        self.old = torch.nn.utils.weight_norm(nn.Linear(64, 32))
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.two = nn.Bilinear(32, 32, 32)
        self.up = nn.Parameter(torch.randn(32, 64) / 6)
        self.experts = nn.Parameter(torch.randn(4, 64, 32) / 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.tokens(ids).mT).mT
        x = x + self.old(torch.relu(self.norm(x)))
        x = F.dropout(self.lstm(x)[0], 0.5, self.training)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.two(x, x) + (torch.relu(x @ self.up).flatten(0, 1)[None] @ self.experts).mean(0).view_as(x)
        return x + (x @ self.up) @ self.up.T


def everything() -> nn.Module:
    torch.manual_seed(0)
    return Everything().eval()


def ids_of(thread: int) -> Tensor:
    return torch.randint(64, (2, 5 + thread), generator=torch.Generator().manual_seed(thread))


def everything_rewritten() -> nn.Module:
    return rpqfx.rpqify(everything(), rpqfx.Policy(**{**vars(POLICY), "min_size": 64, "allow_growth": True}))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_one_model_serves_many_threads() -> None:
    small = everything_rewritten()
    kinds = {record.kind for record in rpqfx.report(small).rewritten}
    assert kinds >= {"embedding", "conv", "linear", "recurrent", "attention", "bilinear", "experts"}
    served(small, [(ids_of(thread),) for thread in range(THREADS)], 6)


class Own(nn.Module):
    """A class that no other test has rewritten, so that threads meet where its new class is made."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        numbers = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(64, 16, generator=numbers))
        self.fc = nn.Linear(64, 16)
        self.seen = 0
        with torch.no_grad():
            self.fc.weight.copy_(torch.randn(16, 64, generator=numbers))
            self.fc.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return self.fc(F.dropout(x @ self.weight.T, 0.5, self.training))


def test_many_threads_rewrite_models_of_their_own() -> None:
    def rewritten(seed: int) -> Callable[[], nn.Module]:
        return lambda: rpqfx.rpqify(Own(seed).eval(), FITTED)

    together = at_once(*[rewritten(seed) for seed in range(THREADS)])
    for seed, small in enumerate(together):
        alone = rewritten(seed)()
        assert {type(m) for m in small.modules()} == {type(m) for m in alone.modules()}
        want, found = alone.state_dict(), small.state_dict()
        assert want.keys() == found.keys() and all(torch.equal(want[key], found[key]) for key in want)
        assert rpqfx.report(small).rewritten == rpqfx.report(alone).rewritten


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_many_threads_rewrite_and_serve_many_times() -> None:
    rewrites, calls = 25, 50

    def rewritten(seed: int, times: int) -> Callable[[], list[dict[str, Tensor]]]:
        return lambda: [rpqfx.rpqify(Own(seed).eval(), FITTED).state_dict() for _ in range(times)]

    for seed, found in enumerate(at_once(*[rewritten(seed, rewrites) for seed in range(THREADS)])):
        [want] = rewritten(seed, 1)()
        assert all(torch.equal(want[key], state[key]) for state in found for key in want)
    served(everything_rewritten(), [(ids_of(thread),) for thread in range(THREADS)], calls)
    record(
        "reliability/threads",
        "pytest -m slow tests/contracts/test_threads.py",
        attack=f"{THREADS} threads that take turns every microsecond: each rewrites models, then all call one model",
        tried=THREADS * (rewrites + calls),
        outcome=f"{THREADS * rewrites} models and {THREADS * calls} outputs, to the last bit those of one thread",
        seeds=list(range(THREADS)),
    )


def test_a_model_is_served_while_others_copy_and_rewrite_it() -> None:
    model, torchs = Own(0).eval(), (nn.Module.__call__, nn.Module.__getattr__)
    x = torch.randn(3, 16)
    with torch.no_grad():
        want = at_once(lambda: model(x))[0]
    rounds = 3

    def serve() -> list[Tensor]:
        with torch.no_grad():
            return [model(x) for _ in range(200)]

    def rewrite() -> list[nn.Module]:
        return [rpqfx.rpqify(model, FITTED) for _ in range(rounds)]

    def capture() -> list[nn.Module]:
        return [rpqfx.graph.whole_graph(small) for small in rewrite()]

    *found, one, two, graph = at_once(
        serve,
        serve,
        rewrite,
        rewrite,
        lambda: [rpqfx.graph.whole_graph(rpqfx.rpqify(model, FITTED)) for _ in range(rounds)],
    )
    assert all(torch.equal(want, each) for each in [*found[0], *found[1]])
    alone = rpqfx.rpqify(model, FITTED).state_dict()
    for small in [*one, *two, *graph]:
        assert all(torch.equal(alone[key], value) for key, value in small.state_dict().items())
    assert type(model) is Own and not model.training and (nn.Module.__call__, nn.Module.__getattr__) == torchs


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + torch.rand(64))


def test_finding_weights_leaves_the_random_numbers_of_the_process_alone() -> None:
    model, block = Drawing(), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    before = torch.get_rng_state()
    rpqfx.rpqify(model, FITTED)
    rpqfx.route(block, rpqfx.RoutePolicy(attention=None))
    assert torch.equal(torch.get_rng_state(), before)


class Masked(nn.Module):
    """Attention and a feed-forward block, under a mask of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        y = self.layer.self_attn(x, x, x, key_padding_mask=src_key_padding_mask, need_weights=False)[0]
        return self.layer.linear2(torch.relu(self.layer.linear1(x + y)))


def test_a_routed_model_serves_many_threads() -> None:
    torch.manual_seed(0)
    small = rpqfx.route(Masked().eval(), rpqfx.RoutePolicy(feed_forward=3, attention=4, light_window=4))
    inputs = []
    for thread in range(THREADS):
        x = torch.randn(2, 8 + thread, 32)
        inputs.append((x, torch.arange(8 + thread).expand(2, -1) >= 7 + thread // 2))
    served(lambda x, mask: small(x, src_key_padding_mask=mask), inputs, 10)
