"""Claims on which modules are found to attend by products of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpqfx.graph.operands import Operand
from rpqfx.graph.written_attention import find_written
from rpqfx.graph.written_products import Products, Written
from tests.kv.kv_models import LM, tokens
from tests.kv.written_models import WrittenLM, added, dotted, einsum, folded, matmul, operators, weigh


@torch.no_grad()
def found_in(model: nn.Module, x: Tensor, known: Any = ()) -> dict[str, Written]:
    return find_written(model.eval(), lambda: model(x), known)


@pytest.mark.parametrize("way", [matmul, operators, einsum, dotted])
def test_each_way_of_writing_it_is_found_with_its_heads(way: Callable[..., Tensor]) -> None:
    found = found_in(WrittenLM(way), tokens(0))
    shared = Operand(2, 8, None, 2, "beside")  # two query heads for each of keys
    assert found == dict.fromkeys(("layers.0", "layers.1"), Written(Products(0, 1, 2, shared, shared)))


@pytest.mark.parametrize("way", [folded, added])
def test_samples_and_heads_in_one_axis_are_told_apart(way: Callable[..., Tensor]) -> None:
    for batch in (1, 3, 4):
        split = Operand(2, 8, 4, 2, "beside")
        found = found_in(WrittenLM(way), tokens(0, batch))
        assert found == dict.fromkeys(("layers.0", "layers.1"), Written(Products(0, 1, 2, split, split)))


class Alone(nn.Module):
    """One module of a function of queries, keys and values ``[B, T, D]``."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.position, self.heads = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(4, 4))
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self, self.q(x), self.k(x), self.v(x))


X = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))
PLAIN = Operand(1, 8, 1)


def relative(own: Alone, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Products with what is no activation are none of the two."""
    return weigh(q @ own.position.T + q @ k.mT) @ v


def talking(own: Alone, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads are mixed between the products (Shazeer et al., 2003.02436)."""
    q, k, v = (x.unflatten(-1, (4, 2)).transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bhij,hg->bgij", q @ k.mT, own.heads)
    return torch.einsum("bhij,hg->bgij", weigh(scores), own.heads) @ v


def other_bits(own: Alone, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).float()
    scores += torch.linspace(0, 1, 6)
    return F.dropout(weigh(scores).type_as(scores), 0.1, own.training) @ v


@pytest.mark.parametrize(("attend", "numbers"), [(relative, (0, 1, 2)), (talking, (0, 1, 2)), (other_bits, (0, 1, 2))])
def test_what_stands_between_the_products_is_no_matter(attend: Any, numbers: tuple[int, int, int]) -> None:
    heads = Operand(4, 2) if attend is talking else PLAIN
    assert found_in(Alone(attend), X) == {"": Written(Products(*numbers, heads, heads))}


def encoder(own: Alone, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def to_others(own: Alone, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weigh(q @ k[:, :4].mT) @ v[:, :4]


def test_tokens_that_see_later_ones_or_others_are_told() -> None:
    for attend in (encoder, to_others):
        assert found_in(Alone(attend), X) == {"": Written(None, causal=False)}


def router(own: Alone, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax of no product of activations, whose weights mix experts."""
    return torch.einsum("bte,bted->btd", F.linear(q, own.position).softmax(-1), torch.stack([k, v] * 3, 2))


def gram(own: Alone, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Products with no softmax between."""
    return (q @ k.mT).tril() @ v


def fused(own: Alone, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("attend", [router, gram, fused])
def test_what_is_no_attention_is_not_found(attend: Any) -> None:
    assert found_in(Alone(attend), X) == {}


def twice(own: Alone, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weigh(q @ k.mT) @ v + weigh(k @ q.mT) @ v


def two_terms(own: Alone, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weigh(q @ k.mT + k @ q.mT) @ v


def difference(own: Alone, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (weigh(q @ k.mT) - 0.5 * weigh(k @ q.mT)) @ v


def turned(own: Alone, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weigh((k @ q.mT).transpose(1, 2)) @ v


def sunk(own: Alone, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    later = torch.ones(6, 6, dtype=torch.bool).triu(1)
    scores = torch.cat([(q @ k.mT).masked_fill(later, float("-inf")), torch.zeros(3, 6, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


def unknown_fold(own: Alone, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (torch.cat(x.split(4, -1)) for x in (q, k, v))  # heads before samples
    return torch.cat((weigh(q @ k.mT) @ v).split(3), -1)


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (twice, "computes 2 attentions"), (two_terms, "2 products of activations"), (difference, "more than one"),
        (turned, "moves axes of its scores"), (sunk, "cuts them, after"), (unknown_fold, "cannot be told apart"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_named(attend: Any, why: str) -> None:
    written = found_in(Alone(attend), X)[""]
    assert written.products is None and written.obstacle is not None and why in written.obstacle


def test_modules_around_and_beside_are_none() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fused = WrittenLM(), LM()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.fused(x)

    model = Around()
    found = found_in(model, tokens(0), [model.inner.layers[1]])
    assert list(found) == ["inner.layers.0"]


def test_a_module_that_attends_around_others_is_named() -> None:
    class Around(Alone):
        def __init__(self) -> None:
            super().__init__(lambda own, q, k, v: weigh(q @ k.mT) @ own.inner(v))
            self.inner = Alone(lambda own, q, k, v: weigh(q @ k.mT) @ v)

    found = found_in(Around(), X)
    assert list(found) == ["", "inner"]
    assert found["inner"].obstacle is None and "holds other modules that attend" in str(found[""].obstacle)
    assert len([hook for module in Around().modules() for hook in module._forward_hooks]) == 0


def test_a_padded_row_says_nothing() -> None:
    def padded(own: Alone, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.ones(6, 6).tril().bool() & (torch.arange(6) >= 2)
        return (q @ k.mT).masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) @ v

    assert found_in(Alone(padded), X)[""].causal
