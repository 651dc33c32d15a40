"""Checks of the arguments of public calls: models, policies, containers of batches, callables."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rpqfx.codebook import CodebookSpec
from rpqfx.errors import InputError, PolicyError, RPQError
from rpqfx.validation.values import shown


def check_model(model: Any, call: str, error: type[RPQError] = InputError) -> None:
    """Raises an error unless a call was given a model.

    Args:
        model: The argument.
        call: Name of the call, for the message.
        error: Class of the error.

    Raises:
        RPQError: Of the class ``error``, if it is no ``torch.nn.Module``; says what to pass instead.
    """
    if isinstance(model, nn.Module):
        return
    said = f"{call} takes a torch.nn.Module, got "
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise error(f"{said}the class {model.__name__}; make one first: {call}({model.__name__}(...), ...)")
    if isinstance(model, Mapping):
        raise error(
            f"{said}{type(model).__name__}; if it is a state dict, build the model, give it the values with "
            "load_state_dict, and pass the model"
        )
    if isinstance(model, (str, os.PathLike)):
        raise error(
            f"{said}the path {shown(os.fspath(model))}; load the model first (rpqfx.load for what rpqfx.save wrote, "
            "from_pretrained or torch.load for others) and pass that"
        )
    if getattr(model, "goes_with", None) is not None:
        raise error(f"{said}a {type(model).__name__}; the model comes first: {call}(model, policy)")
    raise error(f"{said}{type(model).__name__}")


def check_policy(policy: Any, kind: type, *, call: str | None = None, any_callable: bool = False) -> None:
    """Raises an error unless a call was given a policy of its own kind.

    Args:
        policy: The argument.
        kind: ``Policy``, ``KVPolicy`` or ``RoutePolicy``.
        call: The call's name, for messages; the one that takes such policies if left out.
        any_callable: Whether it may be a function as well.

    Raises:
        PolicyError: If it is something else; says what to pass instead.
    """
    if isinstance(policy, kind):
        return
    call, name = call or kind.goes_with, kind.__name__  # type: ignore[attr-defined]
    said = f"{call} takes a {name}, got "
    if policy is None:
        raise PolicyError(
            f"{said}none; rpqify(model, Policy()) fits codebooks to the weights that are there, Policy.from_scratch() "
            "draws them for training, and convert(model, Policy.pretrained(bits_per_weight=3), batches) converts a "
            "trained model"
        )
    if isinstance(policy, type):
        example = f"{name}()" if policy is kind else f"{name}(...)"
        raise PolicyError(f"{said}the class {policy.__name__}; pass a value: {call}(model, {example})")
    if isinstance(other := getattr(policy, "goes_with", None), str):
        what = type(policy).__name__
        hint = f"that is for {other}"
        if what.endswith("Rule"):
            hint = f"put it in a policy: {name}(rules=(rule,))" if other == name else f"it goes into a {other}"
        raise PolicyError(f"{said}a {what}; {hint}")
    if isinstance(policy, str):
        raise PolicyError(f"{said}the text {shown(policy)}; if it is JSON, read it with {name}.from_json(text)")
    if isinstance(policy, Mapping):
        raise PolicyError(f"{said}a {type(policy).__name__}; make a policy of it: {name}(**options)")
    if isinstance(policy, CodebookSpec):
        raise PolicyError(f"{said}a CodebookSpec, which fits one shape; pass a function from a site to its spec")
    if any_callable and callable(policy) and not isinstance(policy, nn.Module):
        return
    raise PolicyError(f"{said}{shown(policy)}")


def example_call(
    model: nn.Module, example_inputs: Any, example_kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Returns the positional and the keyword inputs of one call of a model.

    Args:
        model: The model.
        example_inputs: A sequence of inputs, or the one tensor that the model takes; None for none.
        example_kwargs: A mapping from names to inputs; None for none.

    Raises:
        InputError: If they are something else, or not the inputs that the model's forward has arguments for.
    """
    args, kwargs = example_inputs, {} if example_kwargs is None else example_kwargs
    if isinstance(args, Mapping):
        raise InputError("example_inputs are positional, got a mapping; pass it as example_kwargs")
    if (args is not None and not isinstance(args, (Tensor, Sequence))) or isinstance(args, str):
        raise InputError(f"example_inputs is a sequence of inputs or one tensor, got {type(args).__name__}")
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        raise InputError(f"example_kwargs is a mapping from names to inputs, got {shown(kwargs)}")
    args, kwargs = (args,) if isinstance(args, Tensor) else tuple(args or ()), dict(kwargs)
    try:
        if not model._forward_pre_hooks:  # which may give it others
            inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the example inputs are not those of one call of {type(model).__name__}: {error}; example_inputs are the "
            "positional ones, example_kwargs those by keyword"
        ) from error
    except ValueError:  # a forward without a signature
        pass
    return args, kwargs


def check_progress(progress: Any, *, switches: bool = True) -> None:
    """Raises an error unless ``progress`` can be called.

    Args:
        progress: The argument.
        switches: Whether True and False mean something.

    Raises:
        InputError: If it is something else.
    """
    if progress is None or callable(progress) or (switches and isinstance(progress, bool)):
        return
    forms = "a callable that is given (done, total, name), True, False or None" if switches else "a callable or None"
    raise InputError(f"progress is {forms}, got {shown(progress)}")


def check_path(path: Any, name: str) -> None:
    """Raises an error unless an argument is a path.

    Args:
        path: The argument.
        name: Name of the argument, for the message.

    Raises:
        InputError: If it is something else.
    """
    if not isinstance(path, (str, os.PathLike)) or isinstance(path, nn.Module):
        raise InputError(f"{name} is a path, got {shown(path)}")
