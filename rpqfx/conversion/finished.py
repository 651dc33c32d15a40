"""Weights that are fitted already: kept in a folder, and checked when they are read again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from rpqfx.codebook.packing import check_codes
from rpqfx.codebook.spec import CodebookSpec
from rpqfx.conversion.checkpoint import Checkpoint, fingerprint
from rpqfx.conversion.ranks import Ranks
from rpqfx.errors import CodeError

_METHOD = "rows and columns"  # of fitting: a folder that was begun with another holds another conversion


class Finished:
    """Finished work of a conversion. One process reads and writes the folder; all have what is in it.

    Args:
        folder: Where it is kept; None to keep nothing.
        print_of: Fingerprint of all that the result depends on.
        ranks: The processes of the conversion.

    Raises:
        FormatError: If the folder holds another conversion.
        OSError: If it cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, print_of: str, ranks: Ranks) -> None:
        self._kept, self._ranks = folder is not None, ranks
        self._store = None if folder is None or ranks.rank else Checkpoint(folder, print_of)

    def load(self, name: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor] | None:
        """Returns the tensors that were saved under a name, or None; a damaged file counts as none.

        Args:
            name: Name of the piece of work, the same in all processes.
            shapes: Shape of each tensor that there is to be.

        Raises:
            OSError: If there is a file that cannot be read.
        """
        if not self._kept:
            return None
        held = None if self._store is None else self._store.load(name, shapes)
        found: dict[str, Tensor] | None = self._ranks.from_rank(0, "finished work", held)
        return found

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keeps tensors.

        Args:
            name: Name of the piece of work.
            tensors: What is kept.

        Raises:
            OSError: If they cannot be written; what was saved before stays.
        """
        if self._store is not None:
            self._store.save(name, tensors)


def prints_of(model: nn.Module, dense: Iterable[Tensor], calls: Any, words: Sequence[str]) -> str:
    """Returns a fingerprint of all that the result of a conversion depends on.

    Args:
        model: The model.
        dense: Tensors of it that stand-ins hold.
        calls: The calibration batches.
        words: The decisions and the seed.
    """
    inputs, shape = tree_flatten(calls)
    plain = [repr(leaf) for leaf in inputs if isinstance(leaf, (bool, int, float, str))]
    held = [*dense, *model.parameters(), *model.buffers(), *inputs]
    tensors = [tensor for tensor in held if isinstance(tensor, Tensor) and not tensor.is_meta]
    return fingerprint([*words, str(shape), _METHOD, *plain], tensors)


def shapes_of(spec: CodebookSpec) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors of a fitted weight, by name."""
    shapes: dict[str, tuple[int, ...]] = {"codes": spec.codes_shape, "error": ()}
    if spec.scale:
        shapes["scale"] = (spec.num_vectors,)
    if spec.column_scale_group:
        shapes["column_scale"] = (spec.num_column_scales,)
    if spec.signs:
        shapes["signs"] = spec.signs_shape
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
