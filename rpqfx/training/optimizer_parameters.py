"""Parameters of an optimizer, exchanged for others while it trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer


def position_of(optimizer: Optimizer, parameter: nn.Parameter) -> tuple[int, int] | None:
    """Returns the number of the group that holds a Parameter, and its place there; None where none does.

    Args:
        optimizer: Any.
        parameter: The Parameter to look for.
    """
    for number, group in enumerate(optimizer.param_groups):
        for place, held in enumerate(group["params"]):
            if held is parameter:
                return number, place
    return None


def exchange(optimizer: Optimizer, old: Sequence[nn.Parameter], new: Sequence[nn.Parameter]) -> None:
    """Puts Parameters in the place of others, in the same group; the state of the others is forgotten.

    Where the optimizer does not have the first of the others, nothing is done.

    Args:
        optimizer: It is changed.
        old: The Parameters that go.
        new: The Parameter that takes the place of the first of ``old``.
    """
    at = position_of(optimizer, old[0])
    if at is None:
        return
    number, place = at
    gone = {id(parameter) for parameter in old}
    params = optimizer.param_groups[number]["params"]
    params[place : place + 1] = new
    for group in optimizer.param_groups:
        group["params"][:] = [held for held in group["params"] if id(held) not in gone]
    for parameter in old:
        parameter.grad = None
        optimizer.state.pop(parameter, None)


@torch.no_grad()
def forget(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Sets an optimizer's moments of a Parameter, which are of its shape, to zero; counts of steps stay.

    Args:
        optimizer: It is changed.
        parameter: The Parameter that the moments belong to.
    """
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            value.zero_()
