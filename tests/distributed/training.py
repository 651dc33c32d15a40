"""A model, its batches, and the losses of one process and of several on the same batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import rpqfx
from rpqfx import Policy, Rule
from rpqfx.distributed.sharding import shards_integers
from rpqfx.nn import RPQWeight

NEEDS_INTEGERS = pytest.mark.skipif(not shards_integers(), reason="FSDP of this torch shards no integers")
VOCABULARY, DIM, WIDTH, ROWS = 64, 16, 32, 16


class Net(nn.Module):
    """A table that the head is tied to, two blocks whose codebooks may be shared, and norms."""

    def __init__(self, tied: bool = True, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, DIM)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, WIDTH), nn.GELU(), nn.Linear(WIDTH, DIM)) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def vocabulary(bits: int) -> int:
    """Rows of a table that a codebook of so many bits serves two at a time."""
    return max(VOCABULARY, 2 << bits)


def net(
    codebook_bits: int = 4, seed: int = 0, *, tied: bool = True, sharing: Any = "own",
    dtype: torch.dtype = torch.float64, device: str = "cpu", **options: Any,
) -> nn.Module:  # fmt: skip
    """A rewritten model whose blocks have codes of four bits, and its tables of ``codebook_bits``."""
    torch.manual_seed(seed)
    rules = tuple(
        Rule(name, codebook_bits=codebook_bits, min_codebook_bits=codebook_bits, sharing="own", split="row")
        for name in ("embed*", "head*")
    )
    policy = Policy.from_scratch(
        codebook_dim=4,
        codebook_bits=4,
        sharing=sharing,
        min_size=64,
        allow_growth=True,
        rules=rules[: 1 + (not tied)],
        **options,
    )
    with torch.device(device):
        return rpqfx.rpqify(Net(tied, vocabulary(codebook_bits)).to(dtype), policy)


def batches(steps: int, rows: int = ROWS) -> Iterator[Tensor]:
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randint(VOCABULARY, (rows, 9), generator=g)


def mine(x: Tensor) -> Tensor:
    """This process's rows of a batch."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(model: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def losses(
    model: nn.Module, steps: int = 20, *, split: bool, rows: Callable[[Tensor], Tensor] = mine, parts: int = 1,
    between: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:  # fmt: skip
    """Losses of training steps, the mean of all processes where each has its own rows.

    Args:
        model: Trained in place.
        steps: How many.
        split: Whether each process has rows of its own.
        rows: Which.
        parts: Backward passes a step.
        between: Context of all but the last of them.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    found = []
    for ids in batches(steps):
        some = rows(ids) if split else ids
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for number, part in enumerate(some.chunk(parts), 1):
            with between() if number < parts else nullcontext():
                loss = loss_of(model, part) / parts
                loss.backward()
            total += loss.detach()
        if split:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        found.append(total)
        optimizer.step()
    return torch.stack(found)


def expected(model: nn.Module, **options: Any) -> Tensor:
    """The losses of a copy in one process."""
    return losses(copy.deepcopy(model), split=False, **options)


def codes_of(model: nn.Module) -> list[Tensor]:
    return [m.codes.long().clone() for m in model.modules() if isinstance(m, RPQWeight)]


def shift_codes(model: nn.Module, by: int = 1) -> None:
    """Gives a model other codes than it has."""
    for module in model.modules():
        if isinstance(module, RPQWeight):
            module.codes = (module.codes.long() + by) % module.spec.entries
