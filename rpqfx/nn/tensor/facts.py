"""Attributes of a quantized tensor that need no values: shape, dtype, device, and attributes that were set."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from rpqfx.errors import RewriteError
from rpqfx.nn.tensor.readonly import check_for_good
from rpqfx.nn.tensor.views import Views


class Facts(Views):
    """A quantized tensor, seen through views, that answers as a tensor does where nothing has to be made."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the codebooks."""
        return self.part.tensors.codebooks.dtype

    @property
    def device(self) -> torch.device:
        """The device of the codebooks."""
        return self.part.tensors.codebooks.device

    @property
    def requires_grad(self) -> bool:
        """Whether the codebooks get a gradient; setting it freezes or frees them."""
        return self.part.tensors.codebooks.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if not self.is_whole:
            raise RewriteError("a view of a weight cannot be frozen alone; set requires_grad of the whole weight")
        self.held.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freezes or frees the codebooks."""
        self.requires_grad = requires_grad
        return self

    @property
    def grad(self) -> None:
        """None: gradients are those of the codebooks."""
        return None

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        """None; anything else is refused."""
        check_for_good(Tensor.grad.__set__, (self, value))  # type: ignore[union-attr]

    def noted(self, name: str) -> Any:
        """Returns an attribute that somebody gave the Parameter that this stands for.

        Args:
            name: Name of the attribute.

        Raises:
            AttributeError: If there is none.
        """
        if name not in self.held.noted or not self.is_whole:
            raise AttributeError(f"a quantized weight has no attribute {name!r}")
        return self.held.noted[name]

    def note(self, name: str, value: Any) -> None:
        """Gives the Parameter that this stands for an attribute; it is kept with the codebooks.

        Args:
            name: Name of the attribute.
            value: Its value.
        """
        self.held.noted = {**self.held.noted, name: value}

    is_leaf = False
    grad_fn = None

    def size(self, dim: int | None = None) -> Any:
        """As ``Tensor.size``."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Returns the number of axes."""
        return self.ndim

    def numel(self) -> int:
        """Returns the number of elements."""
        return self.shape.numel()

    def element_size(self) -> int:
        """Returns the bytes of an element."""
        return self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({tuple(self.shape)}, {self.held.extra_repr()})"
