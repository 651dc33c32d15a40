"""Step one: read a model, one fx graph per module.

Each module's own forward is traced with its children as leaves, so what one module does (control flow on values, a
call that fx cannot follow) never costs another. Graphs are read, never run in place of the module.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_flatten

from rpqfx.errors import CaptureError
from rpqfx.graph.copying import copy_model
from rpqfx.graph.leaves import is_leaf, is_own
from rpqfx.graph.snapshot import Ambient, Flags, Snapshot
from rpqfx.graph.tracer import ONE_AT_A_TIME, NumbersKept, ThreadTracer, outline

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class ModuleGraph:
    """The facts known of one module's forward.

    Args:
        graphs: Its fx graphs, children as leaves: in eval and in train mode, with every argument symbolic and with
            those that have defaults at their defaults, as far as each can be traced. Empty for torch.nn's own layers,
            for leaves and for opaque modules.
        opaque: Why its forward could not be read, or None.
    """

    graphs: tuple[fx.Graph, ...] = ()
    opaque: str | None = None


@dataclass(frozen=True)
class Captured:
    """A model and what was read of it.

    Args:
        model: The model itself, not a copy.
        graphs: By qualified module name; a module with several names is listed under its first.
    """

    model: nn.Module
    graphs: Mapping[str, ModuleGraph]

    @property
    def opaque(self) -> dict[str, str]:
        """Modules whose forward could not be read, with the reason."""
        return {name: found.opaque for name, found in self.graphs.items() if found.opaque}


class ModuleTracer(ThreadTracer):
    """Traces one module's own forward: every child is a leaf, buffers stay symbolic."""

    proxy_buffer_attributes = True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """As the base class; but where arguments are at their defaults, there are none beyond those with names.

        So ``**kwargs`` can be handed on, and a forward behind a decorator is called as it is.
        """
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        if concrete_args is None or not any(map(_is_star, args)):
            return function, args
        return root_fn, [arg for arg in args if not _is_star(arg)]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Always."""
        return True


def capture(
    model: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    leaves: tuple[type[nn.Module], ...] = (),
) -> Captured:
    """Reads a model.

    No forward runs on data unless example inputs are given. With them lazy modules take their shapes (the model itself
    runs for that), and on a copy of the model, in eval mode without gradients, the graphs of each module are held
    against what the module returns; where none reproduces it, the module counts as opaque.

    Args:
        model: Any module; its state is as before when this returns (lazy modules with example inputs apart).
        example_inputs: Positional inputs of one call.
        example_kwargs: Keyword inputs of that call.
        leaves: Classes whose forward is not to be read, besides what [`leaf`][rpqfx.graph.leaf] was given.

    Returns:
        The model with one graph for each module.

    Raises:
        CaptureError: If a lazy module has never run and there are no example inputs.
    """
    runs = example_inputs is not None or example_kwargs is not None
    _take_shapes(model, example_inputs, example_kwargs)
    before = Snapshot(model)
    try:
        graphs = {name: _read(module, leaves) for name, module in model.named_modules()}
        before.restore_model()  # a forward may have set attributes of other modules than its own
        if runs:
            graphs = _checked(model, graphs, example_inputs or (), example_kwargs or {})
        return Captured(model, graphs)
    except BaseException:
        before.restore()
        raise


def _take_shapes(
    model: nn.Module, example_inputs: Sequence[Any] | None, example_kwargs: Mapping[str, Any] | None
) -> None:
    """Has lazy modules take their shapes, by a run of the model if there are any."""
    lazy = _lazy(model)
    if not lazy:
        return
    if example_inputs is None and example_kwargs is None:
        raise CaptureError(
            f"{lazy} that has never run, so its shapes are unknown; run the model once on inputs, model(x)"
        )
    flags, ambient = Flags(model), Ambient()
    try:
        with evaluating(model):
            model(*(example_inputs or ()), **(example_kwargs or {}))
    except BaseException:
        flags.restore()
        ambient.restore()
        raise


def _is_star(argument: Any) -> bool:
    return isinstance(argument, fx.Proxy) and str(argument.node.target).startswith("*")


def _lazy(model: nn.Module) -> str | None:
    """A lazy module that has never run, in words, or None."""
    for name, module in model.named_modules():
        unknown = any(isinstance(p, UninitializedParameter) for p in module._parameters.values())
        if unknown and isinstance(module, LazyModuleMixin):
            return f"{name or 'the model'} is a {type(module).__name__}"
    return None


def _read(module: nn.Module, leaves: tuple[type[nn.Module], ...]) -> ModuleGraph:
    if is_builtin(module) or is_leaf(module) or is_own(module) or isinstance(module, leaves):
        return ModuleGraph()
    if isinstance(module, torch.jit.ScriptModule):
        return ModuleGraph(opaque="it is a ScriptModule")
    if type(module).forward is nn.Module.forward and "forward" not in module.__dict__:
        return ModuleGraph(opaque="it has no forward")
    graphs, errors = [], []
    fixed = (None, values) if (values := _defaults(module)) is not None else (None,)
    for training, values in itertools.product((False, True), fixed):
        try:
            with _quietly():
                graphs.append(ModuleTracer().trace(outline(module, training), values))
        except Exception as error:  # a foreign forward may raise anything; whatever it is, the module is opaque
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": "))
    return ModuleGraph(tuple(graphs)) if graphs else ModuleGraph(opaque=errors[0])


def is_builtin(module: nn.Module) -> bool:
    """Returns whether a module's code is torch's own."""
    kind = parametrize.type_before_parametrizations(module)
    return kind.__module__.startswith("torch.nn") or isinstance(module, _CONTAINERS)


def _defaults(module: nn.Module) -> dict[str, Any] | None:
    """Arguments that need not be given, or None where all must be."""
    parameters = inspect.signature(module.forward).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return found if found or any(p.kind is p.VAR_KEYWORD for p in parameters) else None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without gradients, and without what a traced forward leaves behind: random numbers it drew, warnings."""
    with ONE_AT_A_TIME, warnings.catch_warnings(), NumbersKept(), torch.no_grad():  # filters are the process's
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, for a while."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _checked(
    model: nn.Module, graphs: dict[str, ModuleGraph], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, ModuleGraph]:
    """Runs a copy of the model and, in a hook of each module, its graphs on the same inputs."""
    model = copy_model(model)
    checked = dict(graphs)
    rerun = False  # while a graph runs, its calls of children are not the model's own

    def watch(name: str, traced: tuple[fx.Graph, ...]) -> Any:
        def hook(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            nonlocal rerun
            if rerun:
                return
            rerun = True
            try:
                same = any(_reproduces(fx.GraphModule(module, graph), inputs, named, output) for graph in traced)
            finally:
                rerun = False
            if not same:
                checked[name] = ModuleGraph(opaque="no graph of it reproduces its forward on the example inputs")

        return hook

    for name, module in model.named_modules():
        if graphs[name].graphs:
            module.register_forward_hook(watch(name, graphs[name].graphs), with_kwargs=True, prepend=True)
    with evaluating(model):
        model(*args, **kwargs)
    return checked


def _reproduces(graph: fx.GraphModule, args: Any, kwargs: Any, output: Any) -> bool:
    try:
        return _equal(graph.forward(*args, **kwargs), output)
    except Exception:  # the graph does not even take these inputs
        return False


def _equal(first: Any, second: Any) -> bool:
    left, left_tree = tree_flatten(first)
    right, right_tree = tree_flatten(second)
    if left_tree != right_tree:
        return False
    return all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(left, right, strict=True)
    )
