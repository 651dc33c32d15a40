"""Claims on which blocks are found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpqfx import Policy, rpqify
from rpqfx.graph.module_graphs import capture
from rpqfx.routing.rewrite.find import find_blocks
from tests.routing.rewrite.models import FEED_FORWARD, HEADS, WIDTH, Attention, Layer, encoder


@pytest.mark.parametrize("name", FEED_FORWARD)
def test_feed_forward_blocks_are_found_however_written(name: str) -> None:
    model = nn.ModuleDict({"block": FEED_FORWARD[name]()})
    (block,) = find_blocks(capture(model))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert block.kind == "feed_forward" and block.name == "block"
    assert [*block.first, block.last] == linears


def test_codebook_layers_are_linear_layers() -> None:
    small = rpqify(Layer(), Policy(codebook_dim=4, codebook_bits=3, min_size=0))
    assert [block.name for block in find_blocks(capture(small))] == ["block", "attention"]


def test_torch_layers_and_attention() -> None:
    names = [(block.name, block.kind) for block in find_blocks(capture(encoder()))]
    assert ("layers.1", "feed_forward") in names and ("layers.1.self_attn", "attention") in names
    decoder = nn.TransformerDecoderLayer(WIDTH, HEADS, 40)
    found = {block.name: block.obstacle for block in find_blocks(capture(decoder))}
    assert found["self_attn"] is None and "other tokens" in str(found["multihead_attn"]) and found[""] is None


class Odd(nn.Module):
    """Two linear layers, with something in between."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


class Shown(Odd):
    """What lies between is used otherwise too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.a(x))
        return self.b(h), h


class Twice(Odd):
    """One of the layers is called twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))) + self.a(x)


class Mixed(Odd):
    """Two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)) * y)


@pytest.mark.parametrize(
    "model",
    [
        Odd(lambda h: h), Odd(lambda h: F.dropout(h, 0.1)), Odd(lambda h: torch.softmax(h, 1)),
        Odd(lambda h: torch.cumsum(F.relu(h), 1)), Odd(lambda h: torch.cat(h.chunk(2, 1), 1)),
        Odd(lambda h: F.relu(h).transpose(0, 1)), Shown(F.relu), Twice(F.relu), Mixed(F.relu),
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), nn.Linear(4, 4)),
    ],
)  # fmt: skip
def test_what_is_no_block_is_not_found(model: nn.Module) -> None:
    assert find_blocks(capture(model)) == []


def test_attention_that_may_know_positions_is_not_routed() -> None:
    attention = Attention()
    attention.table = nn.Parameter(torch.zeros(HEADS, 5))
    assert "table" in str(find_blocks(capture(attention))[0].obstacle)
    attention = Attention()
    attention.positions = nn.Embedding(5, HEADS)
    assert "embedding" in str(find_blocks(capture(attention))[0].obstacle)


@pytest.mark.parametrize("causal", [False, True])
def test_causal_attention_is_known(causal: bool) -> None:
    assert find_blocks(capture(Attention(causal)))[0].causal is causal
