"""Copying a model, also where plain ``copy.deepcopy`` stumbles."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rpqfx.errors import RewriteError
from rpqfx.graph.functions import rebind


def copy_model(model: nn.Module, keep: Sequence[nn.Parameter] = ()) -> nn.Module:
    """A deep copy of a model.

    Functions that lie in attributes or hooks, and closures over modules of the model, refer to the copy's modules;
    attributes of Parameters come along.

    Args:
        model: The model.
        keep: Parameters that the copy shares rather than copies, because they are about to be replaced.

    Raises:
        RewriteError: If the model holds something that cannot be copied, or a function that a copy would share.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in keep}
    for module in model.modules():  # tensors that a hook computes (weight norm) have a history, which cannot be copied
        for value in module.__dict__.values():
            for tensor in value if isinstance(value, list) else (value,):  # recurrent layers list theirs as well
                if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                    memo[id(tensor)] = tensor.detach().clone()
    for parameter in model.parameters():
        if parameter.layout != torch.strided:  # nn.Parameter copies strided tensors only
            memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    try:
        made = copy.deepcopy(model, memo)
    except Exception as error:  # copying runs foreign code
        raise RewriteError(
            f"the model cannot be copied ({type(error).__name__}: {error}); "
            "pass inplace=True and no example inputs to rewrite it itself"
        ) from error
    for parameter in model.parameters():  # copying forgets what others have noted on a Parameter
        copied = memo.get(id(parameter))
        if copied is not parameter and isinstance(copied, nn.Parameter):
            copied.__dict__.update(
                {key: value for key, value in parameter.__dict__.items() if key not in copied.__dict__}
            )
    rebind(model, made, memo)
    return made
