"""Claims on what stands for keys and values that are not made yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rpqfx.errors import InputError
from rpqfx.kv.cache.layer import LayerStore
from rpqfx.kv.cache.pending import Coming, Pending
from tests.helpers import randn
from tests.kv.coders import plain_coder


def pending(total: int = 0) -> Pending:
    coders = [plain_coder(i, [1, 1], 4, 2, 5) for i in range(2)]
    store = LayerStore(*coders, sinks=1, window=4, chunk=8)
    if total:
        store.append(*(randn(i, 3, 2, total, 8) for i in range(2)))
    keys, values = (randn(i + 5, 3, 2, 4, 8) for i in range(2))
    return Pending.of(Coming(store, keys, values), keys)


WAYS: list[Callable[[Any], Any]] = [
    lambda x: x.transpose(-1, -2),
    lambda x: x.permute(0, 2, 1, 3).reshape(3, -1, 16),
    lambda x: x.reshape(6, -1, 8).transpose(1, 2),
    lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2),
    lambda x: torch.repeat_interleave(x, 2, dim=1).to(torch.float64),
    lambda x: x.contiguous().view(x.shape[0] * x.shape[1], x.size(2), 8).float(),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("total", [0, 5])
def test_it_has_the_shape_of_what_is_made_later(way: Callable[[Any], Any], total: int) -> None:
    found = way(pending(total))
    x: Tensor = randn(9, 3, 2, total + 4, 8)
    wanted = way(x)
    assert isinstance(found, Pending)
    assert (found.shape, found.dtype, found.device) == (wanted.shape, wanted.dtype, wanted.device)
    assert torch.equal(found.replayed(x), wanted)


@pytest.mark.parametrize(
    "use", [lambda x: torch.add(x, 1), lambda x: torch.cat([x, x]), lambda x: x.chunk(2, 1), lambda x: x[:, :1]]
)
def test_what_needs_the_numbers_is_refused(use: Callable[[Any], Any]) -> None:
    with pytest.raises(InputError, match="a cache of codes never makes"):
        use(pending())
