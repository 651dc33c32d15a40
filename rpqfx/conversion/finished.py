"""Checks of the tensors that a checkpoint stores for a fitted weight."""

from __future__ import annotations

from torch import Tensor

from rpqfx.codebook.packing import check_codes
from rpqfx.codebook.spec import CodebookSpec
from rpqfx.errors import CodeError


def shapes_of(spec: CodebookSpec) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors of a fitted weight, by name."""
    shapes: dict[str, tuple[int, ...]] = {"codes": spec.codes_shape, "error": ()}
    if spec.scale:
        shapes["scale"] = (spec.num_vectors,)
    if spec.dim_scale:
        shapes["dim_scale"] = (spec.dim_scales,)
    return shapes


def in_range(codes: Tensor, spec: CodebookSpec) -> bool:
    """Says whether codes are of the spec's dtype and point into its codebooks."""
    if codes.dtype is not spec.code_dtype:
        return False
    try:
        check_codes(codes, spec.entries)
    except CodeError:
        return False
    return True
