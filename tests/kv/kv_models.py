"""Small models that attend in different ways, and inputs for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from rpqfx.kv.attention.rotary import Rotary, apply_rotary

VOCABULARY, WIDTH, HEADS, KV_HEADS = 50, 32, 4, 2


class Attention(nn.Module):
    """Causal attention with fewer heads of keys than of queries."""

    def __init__(self, generator: torch.Generator, rotary: bool = False) -> None:
        super().__init__()
        dim = WIDTH // HEADS
        self.q, self.k, self.v = (nn.Linear(WIDTH, heads * dim) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.rotary = rotary
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(f(x), "b t (h d) -> b h t d", d=WIDTH // HEADS) for f in (self.q, self.k, self.v))
        if self.rotary:
            q, k = apply_rotary(q, angles(x.shape[1], q.shape[-1])), apply_rotary(k, angles(x.shape[1], k.shape[-1]))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(rearrange(y, "b h t d -> b t (h d)"))


class LM(nn.Module):
    """A language model of two such layers."""

    def __init__(self, seed: int = 0, layers: int = 2, rotary: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.table.weight, generator=generator)
        self.layers = nn.ModuleList(Attention(generator, rotary) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x @ self.table.weight.t()


def angles(tokens: int, dim: int, start: int = 0) -> Rotary:
    """Of the tokens from ``start`` on, ``[1, T, D]``."""
    rates = 100.0 ** (-torch.arange(0, dim, 2) / dim)
    angle = (torch.arange(start, start + tokens)[:, None] * rates).repeat(1, 2)[None]
    return Rotary(angle.cos(), angle.sin())


def tokens(seed: int, batch: int = 2, length: int = 40) -> Tensor:
    """``[B, T]`` token numbers."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
