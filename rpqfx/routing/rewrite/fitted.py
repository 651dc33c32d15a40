"""Light branches and routing tokens that begin with what the heavy branches make of calibration inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.errors import InputError
from rpqfx.fit.reduced_rank import AffineFit, PairSums, least_squares, reduced_rank
from rpqfx.graph.calibration.batches import Batches
from rpqfx.graph.module_graphs import evaluating
from rpqfx.routing.rewrite.chooser import Chooser
from rpqfx.routing.rewrite.feedforward import FeedForwardRoute
from rpqfx.routing.rewrite.find import Block

_RIDGE = 1e-3

Placed = tuple[Block, FeedForwardRoute]


def fit_branches(model: nn.Module, placed: Sequence[Placed], batches: Sequence[Any]) -> None:
    """Fits the light branches and the routers of feed-forward blocks, in place.

    All batches run twice, with every token heavy. A light branch becomes the affine map of half as high a rank as it
    has hidden units that is nearest to the block's outputs in least squares: GELU has
    ``gelu(z) - gelu(-z) = z``, so two units carry one number. Then a routing token becomes the direction along which
    the logarithm of the branch's error grows, in least squares too, with dot products of unit variance: the tokens that
    are chosen are those on which the light branch is expected to be worst.

    Args:
        model: The routed model.
        placed: Its feed-forward blocks, with routes that stand in.
        batches: As ``calibration_of`` returned them.

    Raises:
        InputError: If the model rejects a batch, none reaches a block, or a block's inputs or outputs are not finite.
    """
    runs = Batches(model, batches).runs
    choosers = [module for module in model.modules() if isinstance(module, Chooser)]
    with evaluating(model), all_heavy(choosers):
        pairs = _watched(placed, runs, lambda route, x, y: (x, y))
        maps = {route: _mapped(block, pairs[route], route) for block, route in placed}
        errors = _watched(placed, runs, lambda route, x, y: (x, _log_error(maps[route], x, y)))
        for _, route in placed:
            _aim(route.chooser, errors[route])


@contextmanager
def all_heavy(choosers: Sequence[Chooser]) -> Iterator[None]:
    """Has every token chosen, for a while."""
    before = [chooser.easing for chooser in choosers]
    try:
        for chooser in choosers:
            chooser.easing = 1.0
        yield
    finally:
        for chooser, easing in zip(choosers, before, strict=True):
            chooser.easing = easing


def _watched(
    placed: Sequence[Placed], runs: Sequence[Callable[[], Any]],
    pair: Callable[[FeedForwardRoute, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> dict[FeedForwardRoute, PairSums]:  # fmt: skip
    """Runs all batches, and adds up a pair of each block's inputs and outputs."""
    sums = {route: PairSums() for _, route in placed}
    hooks = []
    try:
        for block, route in placed:
            watch = _Watch(route, sums[route], pair)
            hooks.append(block.first[0].register_forward_pre_hook(watch.before))
            hooks.append(block.last.register_forward_hook(watch.behind))
        for run in runs:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return sums


class _Watch:
    """Hooks of one block."""

    def __init__(
        self, route: FeedForwardRoute, sums: PairSums,
        pair: Callable[[FeedForwardRoute, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> None:  # fmt: skip
        self._route, self._sums, self._pair, self._input = route, sums, pair, torch.empty(0)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the first of its layers: keeps the input."""
        self._input = args[0]

    def behind(self, module: nn.Module, args: Any, out: Tensor) -> None:
        """Behind its last layer: adds the tokens that are no padding."""
        x, y = self._route.line(self._input), self._route.line(out)
        kept = self._route.chooser.padding.of(x)
        x, y = (t.flatten(0, 1) if kept is None else t[kept] for t in (x, y))
        self._sums.add(*self._pair(self._route, x, y))


def _mapped(block: Block, sums: PairSums, route: FeedForwardRoute) -> AffineFit:
    """Makes a light branch the nearest map, and returns it."""
    if not sums.count:
        raise InputError(
            f"no calibration batch reaches {block.name}, so there is nothing to fit its light branch to; give batches "
            "that do, or skip it with a RouteRule"
        )
    light = route.light
    assert isinstance(light, nn.Sequential)
    first, last = light[0], light[-1]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    try:
        fit = reduced_rank(sums, first.out_features // 2, _RIDGE)
    except InputError as error:
        raise InputError(f"{block.name}: {error}; look at the calibration batches, or skip it") from error
    _write(first, last, fit)
    return fit


@torch.no_grad()
def _write(first: nn.Linear, last: nn.Linear, fit: AffineFit) -> None:
    """Writes a map of rank ``r`` into ``2 r`` of the units between two layers; others keep their input weights."""
    r = fit.down.shape[1]
    size = torch.where(fit.sizes > 0, fit.sizes, torch.ones_like(fit.sizes))  # hidden units vary by about 1
    down, up = (fit.down / size).T, (fit.up * size[:, None]).T
    bias = -(down @ fit.shift)
    first.weight[: 2 * r] = torch.cat([down, -down]).to(first.weight.dtype)
    first.bias[: 2 * r] = torch.cat([bias, -bias]).to(first.bias.dtype)
    last.weight.zero_()
    last.weight[:, : 2 * r] = torch.cat([up, -up], 1).to(last.weight.dtype)
    last.bias.copy_(fit.offset)


def _log_error(fit: AffineFit, x: Tensor, y: Tensor) -> Tensor:
    """``[B, 1]``: the logarithm of how far the map is off."""
    x = x if x.dtype == torch.float64 else x.float()
    error = (y.to(x.dtype) - fit.to(x.dtype)(x)).norm(dim=-1, keepdim=True)
    return error.clamp_min(torch.finfo(torch.float32).tiny).log()


@torch.no_grad()
def _aim(chooser: Chooser, sums: PairSums) -> None:
    """Points a routing token at the tokens with large errors; where none are larger than others it stays."""
    _, _, xx, xy = sums.centred()
    direction = least_squares(xx, xy, _RIDGE)[0][:, 0]
    variance = float(direction @ xx @ direction) / sums.count
    token = chooser.router.routing_token
    assert token is not None
    if variance > 0:
        token.copy_((direction / variance**0.5).expand_as(token))
