"""The observations of one attention module in a first run, before anything is fitted."""

from __future__ import annotations

import torch
from torch import Tensor

from rpqfx.errors import RewriteError

# Of the largest number, by how much attention may round otherwise than the model's own does.
_APART = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
_APART_OTHERS = 1e-3
_CLOSED = -1e3  # added to a score, hides a key


class Trial:
    """Observes one attention module's calls.

    Args:
        name: Of the module, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._held = False
        self.ahead: str | None = None
        """Why the module is none that a cache serves, or None."""

    def hold(self, key: Tensor, value: Tensor) -> None:
        """Notes what a cache holds, where that is something else than what is attended to.

        Args:
            key: ``[B, H, T, D]``.
            value: ``[B, H, T, D_v]``.
        """
        self.keys, self.values, self._held = key, value, True

    def see(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> None:
        """Notes whether tokens attend to their own past alone.

        Args:
            query: ``[B, H_q, T_q, D]``.
            key: ``[B, H, T, D]``.
            value: ``[B, H, T, D_v]``.
            mask: Boolean, or added to scores.
            is_causal: Whether a query sees no later keys.
        """
        if not self._held:
            self.keys, self.values = key, value
        queries, tokens = query.shape[-2], key.shape[-2]
        if queries != tokens:
            self.ahead = f"it attends from {queries} tokens to {tokens} others"
        elif tokens > 1 and not is_causal and not _causal(mask, tokens):
            self.ahead = "its tokens attend to later ones, so that no cache is filled token by token"

    def compare(self, ours: Tensor, theirs: Tensor, options: list[str]) -> None:
        """Compares attention as it is computed here with the model's own.

        Args:
            ours: With nothing coded.
            theirs: Of the function that the model would call.
            options: Names of arguments beyond the usual ones, for the message.

        Raises:
            RewriteError: If they differ by more than rounding.
        """
        gap, size = (ours - theirs).abs().max(), theirs.abs().max()
        if not bool(gap <= _APART.get(theirs.dtype, _APART_OTHERS) * size + 1e-30):
            told = f"with the arguments {', '.join(options)}" if options else "with the usual arguments"
            raise RewriteError(
                f"{self.name} computes attention in a way that is not known here ({told}, results differ by "
                f"{float(gap / size.clamp_min(1e-30)):.1g} of their size with nothing coded); skip it with a KVRule"
            )


def _causal(mask: Tensor | None, tokens: int) -> bool:
    if mask is None:
        return False
    opened = mask if mask.dtype == torch.bool else mask > _CLOSED
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).triu(1)
    return not bool((opened & later).any())
