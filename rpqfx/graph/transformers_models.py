"""Updates what transformers models look up by name, to the names under which their tensors now are.

Such a model keeps, as plain data, which of its tensors are tied, and finds them by the names of dense Parameters; and
it resizes an output head by making a dense one. Attributes of the instance tell it otherwise: its class, and so its
code, stays. transformers itself is never imported, and a model that is none is left alone.
"""

from __future__ import annotations

import re
import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn

from rpqfx.errors import RewriteError
from rpqfx.graph.pretrained_calls import PushToHub, SavePretrained, take_packed
from rpqfx.graph.token_table import GetSubmodule
from rpqfx.nn.hosting.backed import SUFFIX, weight_of
from rpqfx.nn.resize import resize_rows, row_obstacle
from rpqfx.nn.weight import RPQWeight

# What is set on a model's instances, and so to be taken back with a rewrite that is.
ATTRIBUTES = (
    "_tied_weights_keys", "all_tied_weights_keys", "_weight_conversions", "get_submodule", "save_pretrained",
    "push_to_hub", "_resize_token_embeddings",
)  # fmt: skip


def adapt_pretrained(model: nn.Module) -> None:
    """Sets those attributes on every transformers model within a rewritten model.

    Args:
        model: A model whose weights, or keys and values, have just been quantized.
    """
    for module in model.modules():
        if not is_pretrained(module):
            continue
        ties, known = module._tied_weights_keys, getattr(module, "all_tied_weights_keys", None)
        if isinstance(ties, dict) or ties is None:
            module.__dict__["_tied_weights_keys"] = _patterns(module, ties or {}) or ties
        if isinstance(known, dict) and known:
            module.__dict__["all_tied_weights_keys"] = _names(module, known)
        module.__dict__["save_pretrained"] = SavePretrained(module)
        module.__dict__["push_to_hub"] = PushToHub(module)
        take_packed(module)
        if not any(isinstance(child, RPQWeight) for child in module.modules()):
            continue
        # "As on the hub" are names and shapes of dense tensors: codebooks are saved under the names they have.
        module.__dict__["_weight_conversions"] = []
        module.__dict__["get_submodule"] = GetSubmodule(module)
        module.__dict__["_resize_token_embeddings"] = ResizeTokenEmbeddings(module)


def restore_pretrained(model: nn.Module) -> None:
    """Takes those attributes back from every transformers model within a model whose weights are dense again.

    Ties of codebooks of keys and values, which stay, are declared again.

    Args:
        model: A model none of whose weights are quantized any more.
    """
    for module in model.modules():
        if not is_pretrained(module):
            continue
        known = module.__dict__.get("all_tied_weights_keys")
        for name in ATTRIBUTES:
            module.__dict__.pop(name, None)
        if isinstance(known, dict):
            module.__dict__["all_tied_weights_keys"] = {_dense(a): _dense(b) for a, b in known.items()}
    adapt_pretrained(model)


def _dense(name: str) -> str:
    """The name of a weight, given that of one of its stored tensors; other names stay."""
    path, suffix, _ = name.rpartition(f"{SUFFIX}.")
    return path if suffix else name


def is_pretrained(module: nn.Module) -> bool:
    """Returns whether a module is a transformers model (by what it has; transformers need not be installed)."""
    return all(hasattr(type(module), name) for name in ("_tied_weights_keys", "tie_weights", *ATTRIBUTES[-1:]))


def _patterns(model: nn.Module, ties: dict[str, str]) -> dict[str, str]:
    """Ties (target: source), with a pattern for all stored tensors in place of a weight that is quantized.

    Patterns, not names: of names that stand for Parameters, others (peft) conclude that their owner is a layer.
    """
    whole = {target for target, source in ties.items() if _tied(model, target, source) is not None}
    found = _shared(model, whole)
    for target, source in ties.items():
        if target not in whole:
            if _held(model, target) is None and _held(model, source) is None:
                found[target] = source
            continue
        found[re.escape(f"{target}{SUFFIX}.")] = re.escape(f"{source}{SUFFIX}.")
        bias = f"{target.rpartition('.')[0]}.bias"
        if bias not in ties and bias in dict(model.named_parameters(remove_duplicate=False)):
            found[re.escape(bias)] = re.escape(bias)  # tied to itself: tie_weights() pads the biases of what it ties
    return found


def _shared(model: nn.Module, whole: set[str]) -> dict[str, str]:
    """Patterns for codebooks that several weights, or several layers' keys and values, share.

    Those names of weights that are tied as a whole are left out.
    """
    groups: dict[int, list[str]] = defaultdict(list)
    for path, child in model.named_modules(remove_duplicate=False):
        books = child._parameters.get("codebooks")
        if books is not None and path.removesuffix(SUFFIX) not in whole:
            groups[id(books)].append(re.escape(f"{path}.codebooks"))
    return {other: names[0] for names in groups.values() for other in names[1:]}


def _names(model: nn.Module, ties: dict[str, str]) -> dict[str, str]:
    """Ties (target: source), with the name of each stored tensor in place of a weight that is quantized."""
    found: dict[str, str] = {}
    for target, source in ties.items():
        held = _tied(model, target, source)
        if held is None:
            found[target] = source
        else:
            tensors = [*held.named_parameters(recurse=False), *held.named_buffers(recurse=False)]
            found |= {f"{target}{SUFFIX}.{name}": f"{source}{SUFFIX}.{name}" for name, _ in tensors}
    return found


def _tied(model: nn.Module, target: str, source: str) -> RPQWeight | None:
    """The quantized tensor that both names stand for, if there is one."""
    held = _held(model, target)
    return held if held is _held(model, source) else None


def _held(model: nn.Module, name: str) -> RPQWeight | None:
    path, _, attribute = name.rpartition(".")
    try:
        return weight_of(model.get_submodule(path), attribute)
    except AttributeError:  # a pattern, or a whole module
        return None


class ResizeTokenEmbeddings:
    """Stands for a transformers model's ``_resize_token_embeddings``, which makes a dense output head.

    Args:
        model: The model; not kept alive, as it keeps this object.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __reduce__(self) -> Any:
        return ResizeTokenEmbeddings, (self._model(),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Lets the model do what it does, and puts the new rows of its head into the codebooks of the old.

        Args:
            *args: As for the model's own method.
            **kwargs: Likewise.

        Raises:
            RewriteError: If a table cannot get more or fewer rows; the model is as it was then.
        """
        model: Any = self._model()
        head = model.get_output_embeddings()
        for table in (model.get_input_embeddings(), head):
            for held in _weights(table):
                obstacle = row_obstacle(held)
                if obstacle is not None:
                    raise RewriteError(obstacle)
        result = type(model)._resize_token_embeddings(model, *args, **kwargs)
        new = model.get_output_embeddings()
        if new is not head and list(_weights(head)) and not list(_weights(new)):
            _take_over(head, new)
            model.set_output_embeddings(head)
        return result


def _weights(table: nn.Module | None) -> Iterator[RPQWeight]:
    """The quantized ``weight`` of a table, if there is one."""
    held = None if table is None else weight_of(table, "weight")
    if held is not None:
        yield held


def _take_over(head: nn.Module, new: nn.Module) -> None:
    """Makes a quantized head of the size of a dense one, with its rows and bias."""
    for held in _weights(head):
        resize_rows(held, new._parameters["weight"].detach())  # type: ignore[union-attr]
    bias, values = head._parameters.get("bias"), new._parameters.get("bias")
    if bias is not None and values is not None:
        bias.data = values.detach()
    head.out_features = new.out_features
