"""Weights that were quantized while they were loaded, kept on disk until all of them are."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rpqfx.conversion.checkpoint import Checkpoint, Work, fingerprint
from rpqfx.errors import FormatError
from rpqfx.nn.layout import Layout
from rpqfx.nn.weight import RPQWeight
from rpqfx.policies.decision import Quantize

_LOADING = Work("loading", "model, policy or seed")
_DENSE, _ERROR, _STD = "dense", "error", "std"  # what is kept beside a weight's tensors
_FACTORS = ("scale", "column_scale")


class Kept:
    """A folder with a file for each weight that is done.

    Args:
        folder: Made if it is not there.
        words: All that the fits depend on but the weights, whose sums lie in their files.

    Raises:
        FormatError: If the folder holds other work.
        OSError: If it cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], words: Iterable[str]) -> None:
        self._folder = os.fspath(folder)
        self._store = Checkpoint(folder, fingerprint(words, ()), _LOADING)

    def load(
        self, name: str, decision: Quantize, layout: Layout, dense: Tensor
    ) -> tuple[RPQWeight, float | None] | None:
        """Returns a weight and the error of its fit, or None where it is not done.

        Args:
            name: Name of the weight.
            decision: How it is quantized.
            layout: Layout of the weight's tensor.
            dense: What is to be fitted.

        Raises:
            FormatError: If the folder has it of another dense weight.
        """
        held = self._store.load(name)
        if held is None:
            return None
        if bytes(held.pop(_DENSE).tolist()).hex() != fingerprint((), (dense,)):
            raise FormatError(f"{self._folder} holds {name} of another model; give an empty folder, or remove it")
        error, std = float(held.pop(_ERROR)), float(held.pop(_STD))
        held = {part: tensor.to(dense.device) for part, tensor in held.items()}
        books = held["codebooks"]
        weight = RPQWeight(decision.spec, layout, std=std, plan=decision.plan, device="meta", dtype=books.dtype)
        weight.codebooks, weight.codes = nn.Parameter(books, dense.requires_grad), held["codes"]
        for factor in _FACTORS:
            value = held.get(factor)
            setattr(weight, factor, None if value is None else nn.Parameter(value, dense.requires_grad))
        weight.signs = held.get("signs")
        return weight, None if error < 0 else error

    def save(self, name: str, dense: Tensor, weight: RPQWeight, error: float | None) -> None:
        """Keeps a weight.

        Args:
            name: Name of the weight.
            dense: What was fitted.
            weight: What came of it.
            error: Of the fit.

        Raises:
            OSError: If it cannot be written; what was kept before stays.
        """
        parts = {"codebooks": weight.codebooks, "codes": weight.codes, "signs": weight.signs}
        parts |= {factor: getattr(weight, factor) for factor in _FACTORS}
        held = {part: tensor.detach() for part, tensor in parts.items() if tensor is not None}
        held[_DENSE] = torch.tensor(list(bytes.fromhex(fingerprint((), (dense,)))), dtype=torch.uint8)
        held[_ERROR] = torch.tensor(-1.0 if error is None else error, dtype=torch.float64)
        held[_STD] = torch.tensor(weight.std, dtype=torch.float64)
        self._store.save(name, held)
