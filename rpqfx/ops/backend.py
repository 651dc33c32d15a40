"""Chooses the implementation of an operation: compiled for the CPU, Triton's on a GPU, or torch's own operators.

A backend is a module with the functions below, which mean what ``rpqfx.codebook`` and ``rpqfx.codebook.feature_maps``
say, without gradients. All take every shape; ``choose`` sees to device and dtype.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from rpqfx.ops import reference
from rpqfx.ops.cpu import build, kernels
from rpqfx.ops.cuda import kernels as cuda
from rpqfx.ops.devices import check_devices


class Backend(Protocol):
    """The functions of a backend."""

    def contract(
        self, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Returns ``x @ W.T + bias``."""

    def contract_t(self, y: Tensor, codebooks: Tensor, codes: Tensor, *, signs: Tensor | None) -> Tensor:
        """Returns ``y @ W``."""

    def accumulate(self, x: Tensor, y: Tensor, codes: Tensor, books: int, entries: int, signs: Tensor | None) -> Tensor:
        """Returns the gradient of the codebooks in ``contract``."""

    def contract_grads(
        self, x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns both gradients of ``contract``."""

    def expand(self, codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None) -> Tensor:
        """Returns ``W``."""

    def lookup(
        self, ids: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None
    ) -> Tensor:
        """Returns ``W[ids]``."""

    def collect(self, grad: Tensor, codes: Tensor, books: int, entries: int, signs: Tensor | None) -> Tensor:
        """Returns the adjoint of ``expand``."""

    def gather_sum(self, table: Tensor, codes: Tensor) -> Tensor:
        """Returns sums of maps, picked by codes."""

    def bin_sum(self, y: Tensor, codes: Tensor, entries: int, runs: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Returns the adjoint of ``gather_sum``."""


def choose(x: Tensor, codes: Tensor, *others: Tensor | None) -> Backend:
    """Returns the fastest backend for a tensor that is computed with, and for codes.

    Whatever is not a plain tensor with numbers in it (a fake or a traced one, say) gets torch's own operators.

    Args:
        x: What is computed with.
        codes: ``[R, M, N]``.
        *others: What the backend will be given besides.

    Raises:
        InputError: If they are not on one device, unless ``x`` is on the meta device and stands for a shape. The
            compiled kernels look for themselves.
    """
    plain = type(x) in (Tensor, nn.Parameter) and type(codes) is Tensor and not torch.compiler.is_compiling()
    if plain and x.is_cpu and kernels.take(x.dtype, codes.dtype) and build.ready():
        return cast(Backend, kernels)
    if plain and not x.is_meta:
        check_devices(x, codes, *others)
    if plain and x.is_cuda and cuda.usable(x):
        return cast(Backend, cuda)
    return cast(Backend, reference)
