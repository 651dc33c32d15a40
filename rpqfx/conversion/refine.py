"""Blocks of a model, refined to give what the dense blocks gave."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from rpqfx.conversion.fitting import stored
from rpqfx.graph.snapshot import Flags
from rpqfx.nn.weight import RPQWeight

_CONTAINERS = (nn.Sequential, nn.ModuleList)
_RATE = 2e-3  # of a Parameter's root mean square a step, at first
_SMALL = 0.05  # instead of it where a Parameter is zero, as biases may be


class Call(NamedTuple):
    """One call of a block.

    Args:
        args: Positional inputs.
        kwargs: Keyword inputs.
        output: What it returned.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def blocks_of(model: nn.Module, weights: Iterable[str]) -> dict[str, nn.Module]:
    """The blocks of a model: the outermost modules listed in a Sequential or a ModuleList that hold weights.

    Args:
        model: The model.
        weights: Qualified names of the weights that count.

    Returns:
        By qualified name.
    """
    owners = [name.rpartition(".")[0] for name in weights]
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        inside = any(path == block or path.startswith(f"{block}.") for block in found)
        if not path or inside or not isinstance(model.get_submodule(parent), _CONTAINERS):
            continue
        if any(owner == path or owner.startswith(f"{path}.") for owner in owners):
            found[path] = module
    return found


class Watch:
    """Tells when blocks have run, and runs them again where they were changed meanwhile.

    Args:
        blocks: By name.
        ran: Called with name and call after each run of a block, in the thread that runs it.
        again: Whether the block's output is made again after that.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], ran: Callable[[str, Call], None], again: bool) -> None:
        self._handles = []
        self._inputs: dict[tuple[str, int], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._repeats: set[int] = set()
        for name, block in blocks.items():
            self._handles.append(block.register_forward_pre_hook(self._before(name), with_kwargs=True))
            self._handles.append(block.register_forward_hook(self._after(name, ran, again)))

    def _before(self, name: str) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            thread = threading.get_ident()
            if thread not in self._repeats:
                self._inputs[name, thread] = _kept(args), _kept(kwargs)

        return hook

    def _after(self, name: str, ran: Callable[[str, Call], None], again: bool) -> Callable[..., Any]:
        def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            thread = threading.get_ident()
            if thread in self._repeats:
                return None
            call = Call(*self._inputs.pop((name, thread)), output)
            ran(name, call)
            if not again:
                return None
            self._repeats.add(thread)
            try:
                return block(*_kept(call.args), **_kept(call.kwargs))
            finally:
                self._repeats.discard(thread)

        return hook

    def repeated(self) -> set[int]:
        """Threads whose calls of blocks are not to be heard; may be added to."""
        return self._repeats

    def close(self) -> None:
        """Stops listening."""
        for handle in self._handles:
            handle.remove()


def refine(
    block: nn.Module, calls: Sequence[Call], targets: Sequence[Any], steps: int, watch: Watch
) -> tuple[float, float]:
    """Fits a block's codebooks, factors, norms and biases to what the dense block returned.

    Codebooks that other blocks use stay. Adam (Kingma and Ba, 1412.6980) with steps relative to each Parameter's size,
    on the relative squared error, as AQLM does after each block (2401.06118, section 3.4). Where the error did not
    fall, everything is put back.

    Args:
        block: Its weights are in codebooks.
        calls: With the inputs that the rewritten model gives it.
        targets: What the dense block returned in the dense model's runs.
        steps: One call each, taken in turn.
        watch: Is told not to listen.

    Returns:
        Relative squared error before and after.
    """
    chosen = refinable(block)
    ours = {id(p) for w in block.modules() if isinstance(w, RPQWeight) for p in w.parameters()}
    held = [p for p in chosen if id(p) in ours]
    flags = Flags(block)
    before = [p.detach().clone() for p in chosen]
    thread = threading.get_ident()
    watch.repeated().add(thread)
    try:
        for p in block.parameters():
            p.requires_grad_(False)
        for p in chosen:
            p.requires_grad_(True)
        start = _error(block, calls, targets)
        groups = [{"params": [p], "lr": _RATE * (float(p.detach().square().mean().sqrt()) or _SMALL)} for p in chosen]
        optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / max(1, steps))
        for step in range(steps):
            call, target = calls[step % len(calls)], targets[step % len(calls)]
            with torch.enable_grad():
                loss = _distance(block(*_kept(call.args), **_kept(call.kwargs)), target)
                grads = torch.autograd.grad(loss, chosen, allow_unused=True)
            for p, grad in zip(chosen, grads, strict=True):
                p.grad = grad
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            for p in held:
                p.copy_(stored(p, p.dtype))
        end = _error(block, calls, targets)
        if not end < start:
            with torch.no_grad():
                for p, old in zip(chosen, before, strict=True):
                    p.copy_(old)
            end = start
        return start, end
    finally:
        watch.repeated().discard(thread)
        flags.restore()


def refinable(block: nn.Module) -> list[nn.Parameter]:
    """Parameters that belong to a block alone and are small: of codebooks, factors, norms, biases.

    Args:
        block: Its weights are in codebooks.
    """
    shared = {id(w.codebooks) for w in block.modules() if isinstance(w, RPQWeight) and w.shares_codebooks}
    held = {id(p) for w in block.modules() if isinstance(w, RPQWeight) for p in w.parameters()}
    return [p for p in block.parameters() if id(p) not in shared and (id(p) in held or p.dim() <= 1)]


@torch.no_grad()
def _error(block: nn.Module, calls: Sequence[Call], targets: Sequence[Any]) -> float:
    found = [_distance(block(*_kept(c.args), **_kept(c.kwargs)), t) for c, t in zip(calls, targets, strict=True)]
    return float(torch.stack(found).mean())


def _distance(output: Any, target: Any) -> Tensor:
    """Relative squared error over floating tensors, each row's own: a few rows may be a thousand times as large."""
    total = torch.zeros(())
    for a, b in zip(tree_leaves(output), tree_leaves(target), strict=True):
        if isinstance(a, Tensor) and a.is_floating_point() and a.shape == b.shape and a.dim() > 1:
            wide = b.detach().float()
            size = wide.square().mean(-1, keepdim=True)
            total = total.to(a.device) + ((a.float() - wide).square() / (size + size.median())).mean()
    return total


def _kept(inputs: Any) -> Any:
    """Inputs for another run: what a run could change, such as a cache, is copied; tensors are not."""
    plain = (Tensor, int, float, bool, str, bytes, type(None), torch.dtype, torch.device)
    return tree_map(lambda leaf: leaf if isinstance(leaf, plain) else copy.deepcopy(leaf), inputs)
