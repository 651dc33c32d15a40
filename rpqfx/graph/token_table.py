"""The name by which peft finds the table of tokens of a transformers model.

Prompt tuning needs that table. peft asks the model for a submodule ``embeddings.word_embeddings``, as some models have,
and where there is none it looks for a Parameter with as many rows as the vocabulary has tokens. Codebooks have other
shapes, so a rewritten model answers to the name itself.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from rpqfx.nn.hosting.backed import weight_of

_NAME = "embeddings.word_embeddings"


class GetSubmodule:
    """Stands for a transformers model's ``get_submodule``, and knows one name more.

    Args:
        model: The model; not kept alive, as it keeps this object.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __reduce__(self) -> Any:
        return GetSubmodule, (self._model(),)

    def __call__(self, target: str) -> nn.Module:
        """Returns the submodule of that name, or for peft's name of it the table, where it is quantized.

        Args:
            target: Qualified name.

        Raises:
            AttributeError: If there is no such submodule.
        """
        model: Any = self._model()
        try:
            return type(model).get_submodule(model, target)
        except AttributeError:
            table = model.get_input_embeddings() if target == _NAME else None
            if not isinstance(table, nn.Module) or weight_of(table, "weight") is None:
                raise
            return table
