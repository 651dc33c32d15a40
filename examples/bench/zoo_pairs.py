"""A rewritten model beside its *twin*: the dense model that holds the tensors its codebooks stand for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo_models import Model
from zoo_runs import Run, buffer_error, gradient_error, output_error

from rpqfx.graph.copying import copy_model
from rpqfx.nn import RPQWeight

SUFFIX = "_rpq"


def quantized_weights(small: nn.Module) -> dict[str, RPQWeight]:
    """Every codebook-held Parameter under its qualified name; a tied one under each."""
    return {
        name.removesuffix(SUFFIX): module
        for name, module in small.named_modules(remove_duplicate=False)
        if isinstance(module, RPQWeight)
    }


@torch.no_grad()
def fill(twin: nn.Module, small: nn.Module) -> nn.Module:
    """Sets a dense model's rewritten Parameters to the expanded tensors."""
    for name, weight in quantized_weights(small).items():
        twin.get_parameter(name).copy_(weight())
    return twin


class Pair:
    """A rewritten model and its twin, in float32 and, where that is asked for, in float64."""

    def __init__(self, entry: Model, dense: nn.Module, small: nn.Module) -> None:
        self.entry, self.dense, self.small = entry, dense, small
        self.twin = fill(copy_model(dense), small)

    def copies(self, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        """Both of them, to be changed."""
        small = copy_model(self.small).to(dtype)
        return small, fill(copy_model(self.twin).to(dtype), small)


@torch.no_grad()
def wake(model: nn.Module) -> nn.Module:
    """Disturbs every Parameter that is constant: a zero head or layer scale would hide all that comes before it."""
    generator = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def book_grads(small: nn.Module, twin: nn.Module) -> dict[int, Tensor]:
    """What the twin's gradients are for codebooks and scales, by the tensor's id: they go through expanding."""
    totals: dict[int, Tensor] = {}
    for weight, name in {weight: name for name, weight in quantized_weights(small).items()}.items():
        dense = twin.get_parameter(name).grad
        floats = [t for t in weight.parameters() if t.requires_grad]
        if dense is None or not floats:
            continue
        with torch.enable_grad():
            grads = torch.autograd.grad(weight(), floats, dense.to_dense() if dense.is_sparse else dense)
        for tensor, grad in zip(floats, grads, strict=True):
            totals[id(tensor)] = totals[id(tensor)] + grad if id(tensor) in totals else grad
    return totals


def gradients(small: nn.Module, twin: nn.Module) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """Gradients of all Parameters of the rewritten model, its own and the twin's, by name."""
    books = book_grads(small, twin)
    of_books = {id(t) for weight in quantized_weights(small).values() for t in weight.parameters()}
    dense = dict(twin.named_parameters(remove_duplicate=False))
    trained = {name: p for name, p in small.named_parameters() if p.requires_grad}
    wanted = {name: books.get(id(p)) if id(p) in of_books else dense[name].grad for name, p in trained.items()}
    return {name: p.grad for name, p in trained.items()}, wanted


def differences(small: nn.Module, twin: nn.Module, found: Run, wanted: Run, dtype: torch.dtype) -> tuple[float, str]:
    """The worst relative error of outputs, gradients and buffers, and what has it."""
    mine, theirs = gradients(small, twin)
    errors = [
        (output_error(found.outputs, wanted.outputs), "an output"),
        gradient_error({**found.inputs, **mine}, {**wanted.inputs, **theirs}, dtype),
    ]
    errors.append(buffer_error(found.buffers, wanted.buffers))
    return max(errors, key=lambda error: error[0])
