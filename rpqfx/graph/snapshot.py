"""A model as it was before it was rewritten."""

from __future__ import annotations

from torch import nn

from rpqfx.report import detach_records


class Snapshot:
    """What a rewrite changes of a model, to be put back where its result turns out to be wrong.

    Args:
        model: The model, before.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = [(m, type(m), dict(m.__dict__), dict(m._parameters), dict(m._modules)) for m in model.modules()]

    def restore(self) -> None:
        """Makes the model what it was; its tensors were never touched."""
        for module, kind, attributes, parameters, children in self._modules:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._parameters, module._modules = parameters, children
        detach_records(self._model)
