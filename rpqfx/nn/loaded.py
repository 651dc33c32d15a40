"""What a codebook-held tensor checks and completes when it is loaded: from a state dict, or from a pickle."""

from __future__ import annotations

from typing import Any

from torch import nn

from rpqfx.codebook import CodebookSpec
from rpqfx.errors import CodeError


class Loaded(nn.Module):
    """Base of ``RPQWeight``."""

    spec: CodebookSpec

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not self.spec.dim_scale:  # modules that were pickled before there was one lack its place
            self._parameters.setdefault("dim_scale", None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        codes = state_dict.get(prefix + "codes")
        if codes is not None and not codes.is_meta and codes.numel():
            low, high = int(codes.long().min()), int(codes.long().max())
            if low < 0 or high >= self.spec.entries:
                raise CodeError(
                    f"{prefix}codes holds {low} to {high}, but the codebook has {self.spec.entries} entries "
                    f"(0 to {self.spec.entries - 1}); the file is of another model or damaged"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
