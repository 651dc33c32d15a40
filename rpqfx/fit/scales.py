"""Factors of rows and columns: chosen before a matrix is coded, and again when the codes are known."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 1e-6  # of the mean energy: inputs below are as good as silent
_ROUNDS = 20


@torch.no_grad()
def balance(matrix: Tensor, energy: Tensor | None, *, share: int = 1, power: float = 0.75, clip: float = 4.0) -> Tensor:
    """Returns divisors of the columns of a matrix, so that one codebook serves them all.

    Columns with strong inputs are made large, since codes err alike in all columns: by ``energy ** (power / 2)``, as
    activation-aware scaling does (Lin et al., "AWQ", 2306.00978). But no element may come out larger than ``clip``
    root mean squares: codebooks have nothing near those, and the few weights that make massive activations (Sun et al.,
    2402.17762) must not be cut off.

    Args:
        matrix: ``[N, D]``.
        energy: ``[D]``, mean squared input of each column; None where nothing is known of the inputs.
        share: Consecutive columns that have one factor.
        power: 0 for no regard to inputs, 1 for errors that weigh alike.
        clip: In root mean squares of the divided matrix.

    Returns:
        ``[D // share]``, positive; the divided matrix has root mean square 1, unless it is zero.
    """
    large = matrix.abs().amax(0).view(-1, share).amax(1)
    squares = matrix.square().sum(0).view(-1, share).sum(1)
    if not bool(squares.any()):  # factors near zero would not fit into half precision
        return torch.ones_like(large)
    if energy is None:
        factors = torch.ones_like(large)
    else:
        mean = energy.view(-1, share).mean(1)
        factors = (mean / mean.mean().clamp_min(torch.finfo(mean.dtype).tiny)).clamp_min(_FLOOR) ** (power / 2)
    factors = factors.to(matrix.dtype)
    root = _root(squares, factors, matrix.numel())
    for _ in range(_ROUNDS):
        factors = factors * (clip * root / (large * factors).clamp_min(1e-30)).clamp_max(1)
        root = _root(squares, factors, matrix.numel())
    return root / factors


@torch.no_grad()
def refit_columns(
    matrix: Tensor,
    decoded: Tensor,
    moment: Tensor,
    share: int = 1,
    ridge: float = 1e-3,
    outputs: Tensor | None = None,
) -> Tensor:
    """Finds the factors of columns that bring the products nearest, with the codes as they are.

    Minimises ``tr G (W - Q diag(t)) H (W - Q diag(t))^T`` over ``t``, a linear system.

    Args:
        matrix: ``W [N, D]``.
        decoded: ``Q [N, D]``.
        moment: ``H [D, D]``.
        share: Consecutive columns that have one factor.
        ridge: Pull toward 1, relative to the system's diagonal.
        outputs: ``G [N, N]``; the identity if left out.

    Returns:
        ``t [D // share]``.
    """
    felt = decoded if outputs is None else outputs @ decoded
    system = ((decoded.t() @ felt) * moment).double()
    right = ((matrix @ moment) * felt).sum(0).double()
    groups = len(right) // share
    system = system.view(groups, share, groups, share).sum((1, 3))
    pull = ridge * system.diagonal() + torch.finfo(matrix.dtype).tiny
    solved = torch.linalg.solve(system + torch.diag(pull), right.view(groups, share).sum(1) + pull)
    return solved.to(matrix.dtype)


@torch.no_grad()
def refit_rows(
    matrix: Tensor, decoded: Tensor, moment: Tensor, ridge: float = 1e-3, outputs: Tensor | None = None
) -> Tensor:
    """Finds the same for one factor a row.

    Args:
        matrix: ``W [N, D]``.
        decoded: ``Q [N, D]``.
        moment: ``H [D, D]``.
        ridge: Pull toward 1, relative to the system's diagonal, where rows are not independent.
        outputs: ``G [N, N]``; the identity if left out, and then rows are.

    Returns:
        ``[N]``; 1 where a row decodes to nothing that the inputs see.
    """
    seen = decoded @ moment
    if outputs is None:
        norms = (seen * decoded).sum(1)
        return torch.where(norms > 0, (seen * matrix).sum(1) / norms.clamp_min(1e-30), torch.ones_like(norms))
    system = ((seen @ decoded.t()) * outputs).double()
    right = ((seen @ matrix.t()) * outputs).sum(1).double()
    pull = ridge * system.diagonal() + torch.finfo(matrix.dtype).tiny
    return torch.linalg.solve(system + torch.diag(pull), right + pull).to(matrix.dtype)


def _root(squares: Tensor, factors: Tensor, count: int) -> Tensor:
    return ((squares * factors.square()).sum() / count).sqrt().clamp_min(1e-12)
