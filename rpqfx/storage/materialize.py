"""Giving a model that was rewritten on the meta device its tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.errors import InputError, RewriteError
from rpqfx.graph.snapshot import Snapshot
from rpqfx.nn.hosting.recurrent import BackedCell
from rpqfx.nn.hosting.reparametrised import hooked, refresh
from rpqfx.nn.layer import RPQLayer
from rpqfx.nn.offloaded import check_not_offloaded, offloaded
from rpqfx.nn.tensor.virtual import initialising
from rpqfx.nn.weight import RPQWeight
from rpqfx.nn.wrappers import refuse_sharded, unwrapped
from rpqfx.policies.arguments import check_model
from rpqfx.validation.values import shown


def materialize(
    model: nn.Module, device: torch.device | str = "cpu", init: Callable[[nn.Module], None] | None = None
) -> nn.Module:
    """Allocates and initialises what is on the meta device, in place; no dense weight is ever made.

    Codebooks and codes are drawn as [`RPQWeight.reset_parameters`][rpqfx.nn.RPQWeight.reset_parameters] says. Any
    other module that owns a meta tensor is initialised by ``init``; left out, by the model's ``_init_weights(module)``
    where it has that (as transformers models do), and else by its own ``reset_parameters``. Tensors that are already
    somewhere stay as they are. Tied and shared tensors stay tied.

    Args:
        model: A model, wholly or partly on the meta device; also a wrapped one (``torch.compile``, ...).
        device: Where the tensors go.
        init: Called with each module that owns a tensor that was on the meta device.

    Returns:
        ``model``.

    Raises:
        InputError: If ``model`` is no module, the device none that holds values, or there is nothing for ``init``.
        RewriteError: If a module can not be initialised in any of these ways, the model is sharded, or accelerate has
            offloaded a tensor, which has values elsewhere. Where this or anything else is raised, the model is as it
            was, on the meta device.
    """
    check_model(model, "materialize")
    where = device_with_values(device)
    check_init(init)
    refuse_sharded(model, "materialize")
    check_not_offloaded(offloaded(model), "given new values")
    return fill(model, where, init)


def fill(
    model: nn.Module, where: torch.device, init: Callable[[nn.Module], None] | None,
    within: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
) -> nn.Module:  # fmt: skip
    """Does what ``materialize`` does, once its arguments have been looked at.

    Args:
        model: A model, wholly or partly on the meta device.
        where: The device of the tensors.
        init: Called with each module that owns a tensor that was on the meta device.
        within: Makes a context in which a module has tensors that can be written to.

    Returns:
        ``model``.

    Raises:
        InputError: If there is nothing for ``init``.
        RewriteError: If a module can not be initialised.
    """
    owners = [(name, m) for name, m in model.named_modules() if _owns_meta(m)]
    if init is not None and not owners:
        raise InputError("init would do nothing: no tensor of the model is on the meta device; leave it out")
    before = Snapshot(model, values={t: None for _, m in owners for t in _tensors(m) if not t.is_meta})
    try:
        _fill(model, owners, where, init, within)
        return model
    except BaseException:
        before.restore()
        raise


def _fill(
    model: nn.Module, owners: list[tuple[str, nn.Module]], where: torch.device,
    init: Callable[[nn.Module], None] | None, within: Callable[[nn.Module], AbstractContextManager[Any]],
) -> None:  # fmt: skip
    general = getattr(unwrapped(model), "_init_weights", None)
    if init is None:
        stuck = [name or type(m).__name__ for name, m in owners if not _resets(m) and not general]
        if stuck:
            raise RewriteError(
                "these modules have no reset_parameters, or none that knows all of their tensors, which would stay "
                "without values: "
                f"{', '.join(stuck[:5])}{' ...' if len(stuck) > 5 else ''}; pass init=, a function of a module"
            )
    made: dict[int, Tensor] = {}
    for _, module in owners:
        groups: tuple[Any, ...] = (module._parameters, module._buffers)
        for group in groups:
            for name, tensor in group.items():
                if tensor is not None and tensor.is_meta:
                    if id(tensor) not in made:
                        made[id(tensor)] = _allocate(tensor, where)
                    group[name] = made[id(tensor)]
    for _, module in owners:  # codebooks first: what reads them then finds valid codes
        if isinstance(module, RPQWeight):
            with within(module):
                module.reset_parameters()
    for _, module in owners:
        if not isinstance(module, RPQWeight):
            with within(module):
                _initialise(module, init, general)
    for _, module in owners:
        refresh(module)


def _initialise(
    module: nn.Module, init: Callable[[nn.Module], None] | None, general: Callable[[nn.Module], None] | None
) -> None:
    """Gives a module's dense tensors their values; its codebooks have theirs."""
    with initialising():
        if init is not None:
            init(module)
        elif isinstance(module, (RPQLayer, BackedCell)):
            module.reset_rest()
        elif general is not None:
            general(module)
        else:
            reset: Any = module.reset_parameters
            reset()


def _resets(module: nn.Module) -> bool:
    """Returns whether a module draws all its tensors; torch's layers know nothing of what norms and pruning add."""
    return hasattr(module, "reset_parameters") and not hooked(module)


def _owns_meta(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in _tensors(module))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def check_init(init: Any) -> None:
    """Raises an error unless ``init`` is a function, or left out.

    Args:
        init: The caller's argument.

    Raises:
        InputError: If it is neither.
    """
    if init is not None and (not callable(init) or isinstance(init, nn.Module)):
        raise InputError(f"init is a function of a module, got {shown(init)}")


def device_with_values(device: Any) -> torch.device:
    """Returns the device to allocate on.

    Args:
        device: The caller's argument.

    Raises:
        InputError: If it is none, or none that holds values.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"device is where tensors go, such as 'cpu' or 'cuda', got {shown(device)}: {error}"
        ) from error
    if found.type == "meta":
        raise InputError("device='meta' holds no values; give 'cpu', 'cuda' or another device that does")
    return found


def _allocate(tensor: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_like(tensor, device=device)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
