"""One whole GraphModule of a rewritten model, for those who want the graph itself."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from rpqfx.errors import CaptureError
from rpqfx.graph.leaves import is_leaf
from rpqfx.graph.snapshot import Snapshot
from rpqfx.graph.tracer import ONE_AT_A_TIME, ThreadTracer
from rpqfx.nn.layer import RPQLayer
from rpqfx.nn.weight import RPQWeight


class _WholeTracer(ThreadTracer):
    """Leaves: torch.nn's own layers, the RPQ ones, the codebooks of any other module, and what ``leaf`` was given."""

    failed = ""  # innermost module whose forward raised

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """As the base class; remembers where it went wrong."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if threading.get_ident() == self._thread:
                self.failed = self.failed or self.path_of_module(m)
            raise

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or isinstance(m, (RPQLayer, RPQWeight)) or super().is_leaf_module(m, module_qualified_name)


def whole_graph(
    model: nn.Module, example_inputs: Sequence[Any] | None = None, example_kwargs: Mapping[str, Any] | None = None
) -> fx.GraphModule:
    """The model as one fx graph, its codebook layers as leaf nodes.

    Where symbolic tracing cannot follow the model and example inputs are given, ``torch.export`` captures it
    instead: then the graph is of aten operators, and the layers are inlined.

    Args:
        model: A rewritten model. The graph is of the mode (train or eval) it is in.
        example_inputs: Positional inputs of one call.
        example_kwargs: Keyword inputs of that call.

    Returns:
        A GraphModule that shares the model's Parameters.

    Raises:
        CaptureError: If it cannot be captured whole; names the module and the line.
    """
    before = Snapshot(model)
    try:
        return _whole_graph(model, example_inputs, example_kwargs)
    except BaseException:
        before.restore()
        raise


def _whole_graph(
    model: nn.Module, example_inputs: Sequence[Any] | None, example_kwargs: Mapping[str, Any] | None
) -> fx.GraphModule:
    tracer = _WholeTracer()
    try:
        return fx.GraphModule(model, tracer.trace(model), type(model).__name__)
    except Exception as error:  # a foreign forward may raise anything; the cause is chained
        if example_inputs is None and example_kwargs is None:
            raise CaptureError(
                f"cannot trace {_where(tracer, model, error)} symbolically ({type(error).__name__}: {error}); "
                "pass example_inputs to capture the model with torch.export, or use the rewritten modules as they are"
            ) from error
    try:
        with ONE_AT_A_TIME:
            return torch.export.export(
                model, tuple(example_inputs or ()), dict(example_kwargs or {}), strict=False
            ).module()
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot capture the model either: {type(error).__name__}: {error}; "
            "use the rewritten modules as they are"
        ) from error


def _where(tracer: _WholeTracer, model: nn.Module, error: BaseException) -> str:
    """The module that was being traced and the last line outside of torch."""
    path = tracer.failed
    owner = model.get_submodule(path)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename.replace("\\", "/")]
    line = f" at {frames[-1].filename}:{frames[-1].lineno}" if len(frames) > 1 else ""
    return f"{path or 'the model'} ({type(owner).__name__}){line}"
