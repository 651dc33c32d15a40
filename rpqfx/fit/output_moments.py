"""Second moments of outputs' gradients, trusted as far as one half of the batches foretells the other."""

from __future__ import annotations

import torch
from torch import Tensor

from rpqfx.errors import InputError
from rpqfx.fit.error_feedback import feedback_between_rows

# How much of the elements off the diagonal is tried, until it gets worse. At 0 rows are independent, and nothing is
# taken over.
_TRIED = ((0.6, 0.9), (0.3,))
# The least share of the error that has to be won for feedback between rows to be worth its time.
_LEAST = 0.02


class OutputMoments:
    """Second moments of the gradients of a weight's outputs, in two halves, two bytes an element each."""

    def __init__(self) -> None:
        self._halves: list[Tensor | None] = [None, None]
        self.rows = 0

    @property
    def total(self) -> Tensor | None:
        """The sum over all gradients, ``[N, N]``; None before the first."""
        known = [half.float() for half in self._halves if half is not None]
        return sum(known[1:], known[0]) if known else None

    def add(self, batch: int, gradients: Tensor) -> None:
        """Adds the gradients of one batch.

        Args:
            batch: Its number; even and odd ones are apart.
            gradients: ``[B, N]``.
        """
        self.rows += len(gradients)
        half, new = self._halves[batch % 2], gradients.t() @ gradients
        self._halves[batch % 2] = (new if half is None else half.to(new.dtype) + new).bfloat16()

    @torch.no_grad()
    def trusted(self, rows: Tensor) -> Tensor | None:
        """Returns the second moment with as much off its diagonal as each half says best of the other.

        A moment of few gradients, as of a model whose outputs are one vector a sample, knows its small eigenvalues
        badly, and they are what feedback rests on. So both halves' moments, their elements off the diagonal made
        smaller, are tried on the other half: on what errors as large as each row's weights come to when later rows take
        over.

        Args:
            rows: ``[N]``, how large errors of each row are.

        Returns:
            ``[N, N]``, or None where feedback would win less than 2 % of the error.

        Raises:
            InputError: If a moment is not finite.
        """
        if any(half is None for half in self._halves):
            return None
        one, other = (half.to(rows.dtype) for half in self._halves if half is not None)
        if not bool(torch.isfinite(one).all() and torch.isfinite(other).all()):
            raise InputError("the outputs' gradients' second moment has infinite or NaN elements")
        size = rows[:, None] * rows
        first, second = one * size, other * size
        plain = float((first + second).diagonal().sum())
        if not plain > 0:
            return None
        best, least = None, (1 - _LEAST) * plain
        for shares in _TRIED:
            for share in shares:
                left = _left(first, second, share) + _left(second, first, share)
                if left >= least:
                    break
                best, least = share, left
            if best is not None:
                break
        return None if best is None else _shrunk(one + other, best)


def _left(seen: Tensor, unseen: Tensor, share: float) -> float:
    """Returns the error of unit noise in each row by one moment, where rows take over by another."""
    order, spread = feedback_between_rows(_shrunk(seen, share))
    return float(((unseen[order][:, order] @ spread) * spread).sum())


def _shrunk(moment: Tensor, share: float) -> Tensor:
    return share * moment + torch.diag((1 - share) * moment.diagonal())
