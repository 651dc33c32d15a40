"""The tensors of a model that are trained, how fast, and the last good state of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.errors import InputError
from rpqfx.nn.offloaded import check_not_offloaded, offloaded
from rpqfx.nn.weight import RPQWeight
from rpqfx.training.latent import Latent
from rpqfx.validation.values import number

Choose = Callable[[str], bool]


@dataclass(frozen=True)
class Rates:
    """Learning rates of Adam, by kind of tensor; those of kinds that a model has not are not used.

    Args:
        codebooks: Relative to the root mean square of a codebook, as it is at the start.
        scales: Learning rate of ``scale`` and ``column_scale``, relative in the same way.
        dense: Learning rate of norms, biases and whatever dense Parameters are trained besides.
        codes: Learning rate of the latent matrices that codes follow, relative to the codebook.

    Raises:
        InputError: If one is no finite number, or negative.
    """

    codebooks: float = 1e-3
    scales: float = 1e-3
    dense: float = 1e-3
    codes: float = 3e-3

    def __post_init__(self) -> None:
        for name in ("codebooks", "scales", "dense", "codes"):
            meaning = "a learning rate, finite and not negative"
            number(name, getattr(self, name), meaning, lambda rate: 0 <= rate < float("inf"), error=InputError)


def held(model: nn.Module) -> list[RPQWeight]:
    """Returns the quantized weights of a model.

    Raises:
        InputError: If there are none, or they cannot be trained as they are.
        RewriteError: If accelerate has offloaded the model.
    """
    weights = [module for module in model.modules() if isinstance(module, RPQWeight)]
    if not weights:
        raise InputError(
            "no weight of this model is quantized, so there is nothing to fine-tune; pass what rpqify returned"
        )
    for weight in weights:
        if weight.codebooks.is_meta:
            check_not_offloaded(offloaded(model), "trained")
            raise InputError("the model is on the meta device, where nothing runs; call rpqfx.materialize first")
        if weight.codebooks.dtype.itemsize < 4:
            raise InputError(
                f"steps are too small for codebooks in {weight.codebooks.dtype}; call model.float() first, and give "
                "autocast=torch.bfloat16 for products in half precision"
            )
    return weights


class Trained:
    """The Parameters that are trained.

    Args:
        model: The model; only what is trained of it asks for gradients afterwards, and none are there.
        weights: Its quantized weights.
        train: Chooses by qualified name; left out, all codebooks and factors, and dense Parameters of one axis.
    """

    def __init__(self, model: nn.Module, weights: Sequence[RPQWeight], train: Choose | None) -> None:
        codebooks = {id(weight.codebooks) for weight in weights}
        factors = {id(p) for weight in weights for p in (weight.scale, weight.column_scale) if p is not None}
        self.names: list[str] = []
        self.codebooks: list[nn.Parameter] = []
        self.scales: list[nn.Parameter] = []
        self.dense: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            inside = id(parameter) in codebooks or id(parameter) in factors
            chosen = (inside or parameter.dim() == 1) if train is None else train(name)
            if not chosen or not parameter.is_floating_point():
                continue
            kind = self.codebooks if id(parameter) in codebooks else self.scales if inside else self.dense
            kind.append(parameter)
            self.names.append(name)
        if not self.all:
            raise InputError("train chooses no Parameter; it is given names as model.named_parameters() has them")
        self._half = {id(p) for p in self.all if _is_half(p)}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in self.all:
            parameter.requires_grad_()

    @property
    def all(self) -> list[nn.Parameter]:
        """All of them."""
        return [*self.codebooks, *self.scales, *self.dense]

    def groups(self, rates: Rates, latents: Iterable[Latent]) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser."""
        groups = [{"params": [p], "lr": rates.codebooks * _size(p)} for p in self.codebooks]
        groups += [{"params": [p], "lr": rates.scales * _size(p)} for p in self.scales]
        groups += [{"params": self.dense, "lr": rates.dense}] if self.dense else []
        return groups + [{"params": [latent.values], "lr": rates.codes * _size(latent.values)} for latent in latents]

    @torch.no_grad()
    def round(self) -> None:
        """Rounds what was exact in half precision to that again; a second time changes nothing."""
        for parameter in self.all:
            if id(parameter) in self._half:
                parameter.copy_(parameter.clamp(-_LARGEST, _LARGEST).half())


class Good:
    """The last state that gave a finite loss.

    Args:
        tensors: All that changes of a model, but for codes.
        weights: The weights whose codes may change.
    """

    def __init__(self, tensors: Sequence[Tensor], weights: Sequence[RPQWeight]) -> None:
        self._tensors, self._weights = tensors, weights
        self.kept = [tensor.detach().clone() for tensor in tensors]
        self.codes = [weight.codes for weight in weights]

    @torch.no_grad()
    def keep(self) -> None:
        """Keeps the state as it is now."""
        for kept, tensor in zip(self.kept, self._tensors, strict=True):
            kept.copy_(tensor)
        self.codes = [weight.codes for weight in self._weights]

    @torch.no_grad()
    def restore(self) -> None:
        """Makes the model what it was when it was last kept."""
        for kept, tensor in zip(self.kept, self._tensors, strict=True):
            tensor.copy_(kept)
        for weight, codes in zip(self._weights, self.codes, strict=True):
            weight.codes = codes


_LARGEST = torch.finfo(torch.float16).max


def _is_half(tensor: Tensor) -> bool:
    """Whether all numbers are exact in half precision; matrices of zeros, such as of light branches, tell nothing."""
    if tensor.dim() > 1 and not bool(tensor.any()):
        return False
    return bool((tensor.detach().half().to(tensor.dtype) == tensor).all())


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt())
