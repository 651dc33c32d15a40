"""Channel groups, and which group and stage each code of a vector belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rpqfx.codebook.spec import MAX_ENTRIES, nearest_divisor
from rpqfx.errors import CodeError, InputError, SpecError


class Run(NamedTuple):
    """Groups that have the same number of stages, so that one loop serves them all."""

    groups: tuple[int, ...]
    stages: int


@dataclass(frozen=True)
class Groups:
    """The groups of channels that a vector is cut into, and the places of the codes of each.

    A slot is a pair of a group and a stage. Slots are group-major: those of group 0 come first, stages in order.

    Args:
        dim: Channels of a vector.
        codebook_dim: ``d``, channels of a group. Divides ``dim``.
        stages: Residual stages, one number for all groups or one for each; a group with none is always zero.
        codebook_size: ``K``, entries of a codebook, 2 to 65,536.
        shared: Whether all groups use the same codebooks.
        strided: Whether channel ``c`` belongs to group ``c % M`` (groups are contiguous where not).

    Raises:
        SpecError: If a number is out of range or does not divide.
    """

    dim: int
    codebook_dim: int
    stages: tuple[int, ...]
    codebook_size: int
    shared: bool
    strided: bool
    count: int = field(init=False)
    """``S``, codes of a vector."""
    codebooks_shape: tuple[int, int, int, int] = field(init=False)
    """``(R, G, K, d)``; ``R`` is the most stages that a group has."""
    slot_groups: tuple[int, ...] = field(init=False)
    """The group of each slot."""
    slot_stages: tuple[int, ...] = field(init=False)
    """The stage of each slot."""
    runs: tuple[Run, ...] = field(init=False)
    """The groups by their number of stages, those without any left out."""

    def __post_init__(self) -> None:
        slots = [(group, stage) for group, own in enumerate(self.stages) for stage in range(own)]
        numbers = sorted(set(self.stages) - {0})
        books = 1 if self.shared else self.groups
        derived = {
            "count": len(slots),
            "codebooks_shape": (max(self.stages), books, self.codebook_size, self.codebook_dim),
            "slot_groups": tuple(group for group, _ in slots),
            "slot_stages": tuple(stage for _, stage in slots),
            "runs": tuple(Run(tuple(m for m, own in enumerate(self.stages) if own == n), n) for n in numbers),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @classmethod
    def make(
        cls, dim: int, codebook_dim: int, stages: int | Sequence[int], codebook_size: int, shared: bool, strided: bool
    ) -> Groups:
        """Returns groups, after checking the numbers; the arguments are those of the class."""
        if dim < 1 or codebook_dim < 1:
            raise SpecError(f"dim and codebook_dim are at least 1, got {dim} and {codebook_dim}")
        if dim % codebook_dim:
            lower, upper = (
                next((d for d in numbers if dim % d == 0), nearest_divisor(dim, codebook_dim))
                for numbers in (range(min(codebook_dim, dim), 0, -1), range(codebook_dim, dim + 1))
            )
            near = f"{lower} or {upper}" if lower != upper else str(lower)
            raise SpecError(f"codebook_dim {codebook_dim} does not divide dim {dim}; the nearest that do: {near}")
        if not 2 <= codebook_size <= MAX_ENTRIES:
            raise SpecError(f"a codebook has 2 to {MAX_ENTRIES} entries (1 to 16 bits), got {codebook_size}")
        groups = dim // codebook_dim
        each = (stages,) * groups if isinstance(stages, int) else tuple(int(number) for number in stages)
        if len(each) != groups:
            raise SpecError(
                f"stages is one number or one for each of the {groups} groups ({dim} channels, {codebook_dim} a "
                f"group), got {len(each)} numbers"
            )
        if min(each) < 0:
            raise SpecError(f"a group has 0 stages or more, got {min(each)}")
        return cls(dim, codebook_dim, each, codebook_size, bool(shared), bool(strided))

    @property
    def groups(self) -> int:
        """``M``, groups of channels."""
        return len(self.stages)

    def groups_with(self, stage: int) -> int:
        """Returns how many groups have a stage."""
        return sum(own > stage for own in self.stages)

    def check_codes(self, codes: Tensor) -> None:
        """Raises unless codes are integers ``[..., S]`` in range; on a GPU looking at them would wait for it."""
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise InputError(f"codes are integers, got {codes.dtype}")
        if codes.shape[-1:] != (self.count,):
            raise InputError(f"codes have the shape {list(codes.shape)}, expected {self.count} on the last axis")
        if codes.device.type != "cpu" or not codes.numel() or torch.compiler.is_compiling():
            return
        low, high = (int(end) for end in (codes.int() if codes.dtype == torch.uint16 else codes).aminmax())
        if low < 0 or high >= self.codebook_size:
            raise CodeError(f"codes are 0 to {self.codebook_size - 1}, these are {low} to {high}")

    def split(self, x: Tensor) -> Tensor:
        """Returns sub-vectors ``[T, M, d]`` of vectors ``[T, dim]``."""
        if self.strided:
            return x.unflatten(1, (self.codebook_dim, self.groups)).transpose(1, 2)
        return x.unflatten(1, (self.groups, self.codebook_dim))

    def join(self, parts: Tensor) -> Tensor:
        """Returns the inverse of ``split``."""
        return (parts.transpose(1, 2) if self.strided else parts).flatten(1)

    def parts_of(self, parts: Tensor, run: Run) -> Tensor:
        """Returns the part of the groups of a run, ``[T, n, ...]`` of ``[T, M, ...]``."""
        if len(run.groups) == self.groups:
            return parts
        return torch.stack([parts[:, group] for group in run.groups], 1)

    def books_of(self, books: Tensor, run: Run) -> Tensor:
        """Returns the codebooks of a run's groups, ``[1 or n, ...]`` of ``[G, ...]``."""
        if self.shared or len(run.groups) == self.groups:
            return books
        return torch.stack([books[group] for group in run.groups])

    def codes_of(self, codes: Tensor, run: Run) -> Tensor:
        """Returns the codes of a run's groups, ``[T, n, stages]`` of ``[T, S]``."""
        if len(run.groups) == self.groups:
            return codes.view(len(codes), self.groups, run.stages)
        starts = [sum(self.stages[:group]) for group in run.groups]
        return torch.stack([codes[:, start : start + run.stages] for start in starts], 1)

    def in_order(self, found: Sequence[Tensor], empty: Tensor | None = None) -> list[Tensor]:
        """Joins the results of runs, ``[T, n, ...]`` each, group by group; ``empty`` for groups without stages."""
        by_group = {m: part[:, i] for run, part in zip(self.runs, found, strict=True) for i, m in enumerate(run.groups)}
        return [by_group.get(m, empty) for m in range(self.groups) if m in by_group or empty is not None]  # type: ignore[misc]
