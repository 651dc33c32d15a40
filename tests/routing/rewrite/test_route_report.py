"""Claims on the report of routed blocks."""

from __future__ import annotations

import html.parser
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rpqfx import Policy, RoutePolicy, report_routes, route, rpqify
from rpqfx.errors import InputError
from rpqfx.routing.rewrite import routed
from rpqfx.routing.rewrite.work import works_of
from tests.routing.rewrite.models import LENGTH, Attention, Gated, Layer, Plain, encoder, x_of


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    """By torch's own count, of matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("policy", [RoutePolicy(5, 6), RoutePolicy(5, 6, light=0), RoutePolicy(2, 3, window=6),
                                    RoutePolicy(5, 6, light_init="fit"), RoutePolicy(1.0, 1.0, light_init="fit"),
                                    RoutePolicy(1.0, 1.0), RoutePolicy(0.25, None)])  # fmt: skip
@pytest.mark.parametrize("name", ["gated", "plain", "attention"])
def test_multiply_adds_are_those_that_torch_counts(name: str, policy: RoutePolicy) -> None:
    dense: nn.Module = {"gated": Gated, "plain": Plain, "attention": Attention}[name]()
    if name == "attention" and (policy.attention is None or policy.light_init == "fit"):
        pytest.skip("leaves nothing routed, or fitted")
    x = x_of(0)
    small = route(dense, policy, calibration=[x] if policy.light_init == "fit" else None)
    (block,) = report_routes(small, x).blocks
    assert block.before == multiply_adds(dense, x)
    assert block.now == multiply_adds(small, x)
    assert block.saved == pytest.approx(1 - block.now / block.before)
    assert block.kind == ("attention" if name == "attention" else "feed_forward")


def test_codebooks_count_as_the_weights_they_stand_for() -> None:
    codes = Policy(codebook_dim=4, codebook_bits=2, min_size=0)
    plain, small = (route(model, RoutePolicy(5, 6)) for model in (Layer(), rpqify(Layer(), codes)))
    assert [(w.weights, w.width) for w in works_of(plain)] == [(w.weights, w.width) for w in works_of(small)]
    assert {w.kind for w in works_of(route(encoder(), RoutePolicy(5, 6)))} == {"attention", "feed_forward"}


class Told(Plain):
    """Is told which tokens are padding, and makes nothing of it."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def test_tokens_are_counted_without_padding_and_words_are_those_that_were_heavy() -> None:
    small, x, mask = route(Told(), RoutePolicy(feed_forward=4)), x_of(0), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 10:] = 0
    words = [[f"w{i}" for i in range(LENGTH)], [f"<{i}>" for i in range(LENGTH)]]
    made = report_routes(small, {"x": x, "attention_mask": mask}, words=words)
    assert (made.blocks[0].tokens, made.blocks[0].heavy) == (LENGTH + 10, 8)
    (found,) = routed(small).values()
    choice = found.chooser(x, mask.bool())
    for i in range(2):
        heavy = [at for at, share in enumerate(made.often[i]) if share]
        assert heavy == sorted(choice.indices[i, 0].tolist())  # type: ignore[index]
    assert set(made.often[0]) == {0.0, 1.0}


class Marks(html.parser.HTMLParser):
    """The words of a page with their titles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self._title: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._title = str(dict(attrs).get("title")) if tag == "span" else None

    def handle_data(self, data: str) -> None:
        if self._title is not None:
            self.found.append((data, self._title))
            self._title = None


def test_all_forms_say_the_same() -> None:
    small, x = route(Layer(), RoutePolicy(5, 6)), x_of(0)
    words = [[f"<b{i}> &" for i in range(LENGTH)] for _ in range(2)]
    made = report_routes(small, x, words=words)
    names = list(routed(small))
    for text in (str(made), made.to_markdown(), made.to_html()):
        assert all(name in text for name in names) and f"{made.saved:.1%}" in text
    assert f"{made.blocks[0].now:,}" in str(made)
    page = Marks()
    page.feed(made.to_html())
    assert page.found == [(w, f"{s:.0%}") for sample, often in zip(words, made.often, strict=True)
                          for w, s in zip(sample, often, strict=True)]  # fmt: skip
    assert json.loads(json.dumps(made.to_dict()))["blocks"][0]["saved"] == made.blocks[0].saved
    assert "sample 1, heavy most often" in str(made) and "sample" not in str(report_routes(small, x))


def test_the_model_is_left_as_it_is() -> None:
    small, x = route(Layer(), RoutePolicy(5, 6)).train(), x_of(0)
    report_routes(small, x)
    assert small.training and not any(each.chooser._forward_hooks for each in routed(small).values())


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("nothing in this model is routed", lambda: report_routes(Plain(), x_of(0))),
        ("torch.nn.Module", lambda: report_routes(3, x_of(0))),  # type: ignore[arg-type]
        ("words are those of 1 samples", lambda: report_routes(route(Plain()), x_of(0), words=[["a"] * LENGTH])),
        ("a word for each token", lambda: report_routes(route(Plain()), x_of(0), words=[["a"], ["b"]])),
        ("inputs is a tensor", lambda: report_routes(route(Plain()), 3)),
    ],
)
def test_what_cannot_be_reported_is_refused(match: str, call: Any) -> None:
    with pytest.raises(InputError, match=match):
        call()
