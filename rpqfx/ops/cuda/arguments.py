"""Checks of the arguments of the CUDA kernels, which would read out of bounds where those were wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from rpqfx.errors import InputError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rows_of(name: str, x: Tensor, width: int) -> Tensor:
    """Returns ``x [..., width]`` as contiguous rows."""
    check_dtype(name, x)
    if x.shape[-1] != width:
        raise InputError(f"{name} is {x.shape[-1]} wide, the codes and codebooks say {width}")
    return x.reshape(-1, width).contiguous()


def check_codes(codes: Tensor, signs: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Returns codes and signs, contiguous, after checking that they fit codebooks of a shape."""
    if codes.dtype not in (torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64):
        raise InputError(f"codes are integers, got {codes.dtype}")
    stages, sub_vectors, num_vectors = codes.shape
    if stages != shape[0] or sub_vectors % shape[1]:
        raise InputError(f"codes {tuple(codes.shape)} do not go with codebooks {tuple(shape)}")
    if signs is None:
        return codes.contiguous(), None
    check_shape("signs", signs, (stages, sub_vectors, -(-num_vectors // 8)))
    if signs.dtype is not torch.uint8:
        raise InputError(f"signs are uint8 (see pack_signs), got {signs.dtype}")
    return codes.contiguous(), signs.contiguous()


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raises InputError where a tensor has another shape."""
    if tuple(x.shape) != shape:
        raise InputError(f"{name} has the shape {tuple(x.shape)}, expected {shape}")


def check_dtype(name: str, x: Tensor) -> None:
    """Raises InputError where the kernels do not take a dtype."""
    if x.dtype not in DTYPES:
        raise InputError(f"{name} is {x.dtype}; the kernels take float32, float16 and bfloat16")
