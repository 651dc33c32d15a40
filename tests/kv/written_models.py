"""Modules that attend by products of their own, written in several ways, and a model of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from tests.kv.kv_models import HEADS, KV_HEADS, VOCABULARY, WIDTH, Attention

Weigh = Callable[[Tensor], Tensor]
DIM = WIDTH // HEADS


def weigh(scores: Tensor) -> Tensor:
    """Weights of scores ``[..., T_q, T]`` that are scaled already."""
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1)


def matmul(q: Tensor, k: Tensor, v: Tensor, weigh: Weigh) -> Tensor:
    return torch.matmul(weigh(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(DIM)), v)


def operators(q: Tensor, k: Tensor, v: Tensor, weigh: Weigh) -> Tensor:
    return weigh(q @ k.mT * DIM**-0.5) @ v


def folded(q: Tensor, k: Tensor, v: Tensor, weigh: Weigh) -> Tensor:
    batch = len(q)
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    out = torch.bmm(weigh(torch.bmm(q * DIM**-0.5, k.transpose(1, 2))), v)
    return out.view(batch, -1, *out.shape[1:])


def added(q: Tensor, k: Tensor, v: Tensor, weigh: Weigh) -> Tensor:
    batch = len(q)
    q, k, v = (rearrange(x, "b h t d -> (b h) t d") for x in (q, k, v))
    none = torch.zeros(len(q), q.shape[1], k.shape[1])
    scores = none.baddbmm(q, k.transpose(-1, -2), beta=1.0, alpha=DIM**-0.5)
    out = torch.bmm(weigh(scores.view(batch, -1, *scores.shape[1:])).view_as(scores), v)
    return rearrange(out, "(b h) t d -> b h t d", b=batch)


def einsum(q: Tensor, k: Tensor, v: Tensor, weigh: Weigh) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(DIM)
    return torch.einsum("bhqk,bkhd->bqhd", weigh(scores), v).transpose(1, 2)


def dotted(q: Tensor, k: Tensor, v: Tensor, weigh: Weigh) -> Tensor:
    scores = torch.einsum("... i d, ... j d -> ... i j", [q, k]) / math.sqrt(DIM)
    return torch.einsum("... i j, ... j d -> ... i d", weigh(scores), v)


WAYS = [matmul, operators, folded, added, einsum, dotted]


class Written(Attention):
    """As the attention it extends, but its products are in its own code."""

    def __init__(self, generator: torch.Generator, way: Callable[..., Tensor] = matmul, weigh: Weigh = weigh) -> None:
        super().__init__(generator)
        self.way, self.weigh = way, weigh

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(f(x), "b t (h d) -> b h t d", d=DIM) for f in (self.q, self.k, self.v))
        k, v = (x[:, :, None].expand(-1, -1, HEADS // KV_HEADS, -1, -1).flatten(1, 2) for x in (k, v))
        return self.out(rearrange(self.way(q, k, v, self.weigh), "b h t d -> b t (h d)"))


class WrittenLM(nn.Module):
    """A language model of such layers, with the weights that ``LM`` has of the same seed."""

    def __init__(
        self, way: Callable[..., Tensor] = matmul, weigh: Weigh = weigh, seed: int = 0, layers: int = 2
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.table.weight, generator=generator)
        self.layers = nn.ModuleList(Written(generator, way, weigh) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x @ self.table.weight.t()
