"""Collects gradients of products' results on calibration batches: row weights and second moments of outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.conversion.dense_weight import StandIn
from rpqfx.conversion.moments import Moments, input_rows, lies_along
from rpqfx.conversion.observe import Observer
from rpqfx.conversion.ranks import Ranks
from rpqfx.conversion.row_weights import RowWeights, limited
from rpqfx.fit.output_moments import OutputMoments
from rpqfx.graph.calibration.probe import probe
from rpqfx.nn.layout import Layout
from rpqfx.nn.weight import RPQWeight

# Vectors of a weight whose outputs' second moment is kept: it takes as many numbers as the square of this at most.
_MOST_VECTORS = 4096
# Gradients that a second moment is made of: so many for each vector, or so many numbers where vectors are few.
_GRADIENTS_PER_VECTOR = 8
_GRADIENT_ELEMENTS = 2**24


@dataclass
class _BatchFelt:
    """Gradients of one batch, by the numbers of weights.

    Args:
        sums: Mean squared gradients of results.
        tables: Metrics of vectors that are looked up.
        rows: Energies of rows, added up, and how many rows there are.
    """

    sums: dict[int, float] = field(default_factory=dict)
    rows: dict[int, tuple[float, int]] = field(default_factory=dict)
    tables: dict[int, Moments] = field(default_factory=dict)


class Gradients(Observer):
    """Observes inputs, as ``Observer`` does, and gradients of each product's result.

    The gradient is of a random direction in which the model's outputs could change: of logits (outputs under that
    name) one drawn so that its mean square is the Fisher information, and so the squared gradient what the Kullback-
    Leibler divergence grows by; of others a Gaussian one, for the squared error.

    Args:
        model: The model; its Parameters are left without gradients.
        weights: What to listen to.
        seed: Seed of the random directions.
        ranks: The processes that share out the runs, and the weights whose ``outputs`` they keep.

    Attributes:
        sums: Mean squared gradient of each weight's results, summed over batches.
        rows: How much the model's output feels of each row of inputs.
        outputs: Second moments ``[N, N]`` of the gradients of the results, for weights of up to 4,096 vectors; where
            several processes share the runs, for those weights that are this one's (``owner``).
        tables: Metrics ``[D, D]`` of the vectors that are looked up: of the gradients of what was looked up, and of
            inputs, weighted, where the same weight has products (a tied head). A vector is met about as often as an
            input as it is a likely output, so one metric serves all of them.
    """

    def __init__(
        self, model: nn.Module, weights: Iterable[StandIn], seed: int = 0, ranks: Ranks | None = None
    ) -> None:  # fmt: skip
        super().__init__(weights, ranks=ranks)
        self._model = model
        self.sums: dict[RPQWeight, float] = {}
        self.rows = RowWeights()
        self.outputs: dict[RPQWeight, OutputMoments] = {}
        self.tables: dict[RPQWeight, Moments] = {}
        self._seed = seed
        self._asked: dict[RPQWeight, tuple[str, Tensor, Layout, tuple[Any, ...]]] = {}
        self._share = 1
        self._felt_now = _BatchFelt()
        self._waiting: dict[int, list[Tensor]] = {}

    def owner(self, weight: RPQWeight) -> int:
        """Returns which process keeps the second moment of a weight's outputs.

        Args:
            weight: One of those that are listened to.
        """
        return self._numbers[weight] % self._ranks.size

    def watch(self, runs: Sequence[Callable[[], Any]], after: Callable[[int], None]) -> None:
        """Runs a model forwards and backwards, batch after batch.

        Args:
            runs: What runs each batch.
            after: Called with each batch's number when it is done.
        """
        self._share = max(1, len(runs))
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            super().watch([partial(self._backwards, run, number) for number, run in enumerate(runs)], after)
        finally:
            for parameter in trained:
                parameter.requires_grad_()

    def _backwards(self, run: Callable[[], Any], number: int) -> None:
        with torch.enable_grad():
            loss = probe(run(), self._seed + number)
            if loss is not None:
                loss.backward()

    def _collect(self, first: int) -> None:
        super()._collect(first)
        weights = list(self.seen)
        for felt in self._ranks.gather("gradients' statistics", self._felt_now):
            for number, energy in felt.sums.items():
                self.sums[weights[number]] = self.sums.get(weights[number], 0.0) + energy
            for number, (total, rows) in felt.rows.items():
                self.rows.count(weights[number], total, rows)
            for number, moments in felt.tables.items():
                self.tables.setdefault(weights[number], Moments()).merge(moments)
        self._felt_now = _BatchFelt()
        if self._ranks.size == 1:  # then they are added at once, and no gradient is kept
            return
        for start in range(0, len(weights), self._ranks.size):  # not all at once: they take as much as the model
            theirs = [self._waiting.pop(start + rank, []) for rank in range(self._ranks.size)]
            for number, gradients in enumerate(self._ranks.exchange("outputs' gradients", theirs)):
                for some in gradients:
                    weight = weights[start + self._ranks.rank]
                    self.outputs.setdefault(weight, OutputMoments()).add(first + number, some)

    def asked(self, weight: RPQWeight, product: str, x: Tensor, layout: Layout, geometry: tuple[Any, ...]) -> None:
        """See ``Listener``."""
        super().asked(weight, product, x, layout, geometry)
        self._asked[weight] = product, x, layout, geometry

    def made(self, weight: RPQWeight, y: Tensor) -> Tensor:
        """See ``Listener``."""
        product, x, layout, geometry = self._asked.pop(weight)
        if not torch.is_grad_enabled() or not y.is_floating_point():
            return y
        if not y.requires_grad:
            y = y.detach().requires_grad_().clone()  # a leaf could not be changed in place
        if product == "lookup":
            y.register_hook(partial(self._looked_up, weight, layout))
        else:
            number = self._numbers[weight]
            place = self.batch, self._now.uses[number] - 1
            kept = x if number in self._now.looked_up else None  # others are met again when their turn comes
            y.register_hook(partial(self._felt, weight, place, product, kept, layout, geometry))
        return y

    def _looked_up(self, weight: RPQWeight, layout: Layout, grad: Tensor) -> None:
        if grad.shape[-1] == weight.layout.dim == layout.dim and not layout.transposed:
            rows = grad.detach().reshape(-1, layout.dim)
            energies = _energies(rows)
            shares = _shares(energies) / weight.layout.num_vectors
            self._table(weight).add(_known(rows, energies), shares)

    def _table(self, weight: RPQWeight) -> Moments:
        return self._felt_now.tables.setdefault(self._numbers[weight], Moments())

    def _felt(
        self, weight: RPQWeight, place: tuple[int, int], product: str, x: Tensor | None, layout: Layout,
        geometry: tuple[Any, ...], grad: Tensor,
    ) -> None:  # fmt: skip
        grad = grad.detach()
        number, sums = self._numbers[weight], self._felt_now.sums
        sums[number] = sums.get(number, 0.0) + float(torch.linalg.vector_norm(grad.float())) ** 2 / grad.numel()
        if layout.dim != weight.layout.dim or not lies_along(product, layout, geometry):
            return
        groups = 1
        if product == "conv":
            groups = geometry[3]
            grad = grad if grad.dim() == len(layout.shape) else grad[None]
            grad = grad.unflatten(1, (groups, -1)).movedim(2, -1)  # [B, groups, *places, N / groups]
        rows = grad.reshape(-1, grad.shape[-1])
        energies = _energies(rows)
        weights = limited(energies)
        self.rows.put(weight, *place, weights)
        total, count = self._felt_now.rows.get(number, (0.0, 0))
        self._felt_now.rows[number] = total + float(weights.sum(dtype=torch.float64)), count + len(weights)
        if x is not None:
            self._table(weight).add_all(input_rows(product, x, layout, geometry), weights)
        count = weight.layout.num_vectors
        if groups == 1 and rows.shape[1] == count <= _MOST_VECTORS:
            most = max(_GRADIENTS_PER_VECTOR * count, _GRADIENT_ELEMENTS // count) // self._share + 1
            step = -(-len(rows) // most)
            some = _known(rows[::step], energies[::step]) * _shares(energies)[::step].sqrt()[:, None]
            if self._ranks.size == 1:
                self.outputs.setdefault(weight, OutputMoments()).add(self.batch, some)
            else:
                self._waiting.setdefault(number, []).append(some)


def _energies(rows: Tensor) -> Tensor:
    """Returns mean squares ``[B]`` of gradients ``[B, N]``; zero of one that is not finite, as that says nothing.

    Attention that looks nowhere gives such.
    """
    energies = torch.linalg.vector_norm(rows.float(), dim=1).square() / rows.shape[1]
    return torch.where(torch.isfinite(energies), energies, 0)


def _known(rows: Tensor, energies: Tensor) -> Tensor:
    """Returns gradients ``[B, N]`` in float32, those without energy as zero."""
    return torch.where(energies[:, None] > 0, rows.float(), 0)


def _shares(energies: Tensor) -> Tensor:
    """Returns how much of each gradient counts, ``[B]``, so that none has more than its share of the energy."""
    return limited(energies) / energies.clamp_min(torch.finfo(energies.dtype).tiny)
