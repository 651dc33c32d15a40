"""An attention module that its own hooks make routed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.errors import InputError
from rpqfx.routing.gather import put, take
from rpqfx.routing.rewrite.call_state import Underway
from rpqfx.routing.rewrite.chooser import Chooser
from rpqfx.routing.rewrite.masks import pairs, seen_tokens, singles
from rpqfx.routing.router import Choice

_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")
_OTHERS = ("encoder_hidden_states", "key_value_states", "context", "memory")
_MASKS = ("mask", "bias")
_PLAIN = (Tensor, bool, int, float, complex, str, torch.dtype, torch.device)


class AttentionRoute(nn.Module):
    """The router and the light branch of an attention module, which is itself the heavy branch.

    The module is called with the chosen tokens, with their masks and positions, as though they were a sequence; so
    queries, keys and values are chosen together. What it returns is multiplied by scores and added to the light
    branch, as in ``FeedForwardRoute``.

    Args:
        chooser: Chooses tokens.
        light: Local attention of all tokens, or None.
        name: Of the module, for messages.
    """

    def __init__(self, chooser: Chooser, light: nn.Module | None, name: str) -> None:
        super().__init__()
        self.chooser, self.light, self.name = chooser, light, name
        self._call = Underway()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Hook: chooses, and hands on what was chosen.

        Raises:
            InputError: If the call has a cache, or something of which it is unclear how it belongs to tokens.
        """
        given = named(module, args, kwargs)
        x = next(iter(given.values()), None)
        self._call.end()  # of a call that failed
        if not isinstance(x, Tensor) or any(given.get(name) is not None for name in _OTHERS):
            return None  # of other tokens: not routed
        if any(given.get(name) is not None for name in _CACHES):
            raise InputError(
                f"{self.name}: routed attention makes no keys of tokens that are not chosen, so it fills no cache; "
                "call the model with use_cache=False, or route it with attention=None"
            )
        if x.dim() != 3:
            raise InputError(f"{self.name}: tokens are [B, n, d], got {list(x.shape)}; skip it with a RouteRule")
        kept = self._mask_of(given, x)
        choice = self.chooser(x, kept)
        self._call.begin(x, choice, kept)
        if choice.indices is None:
            return None
        chosen = {name: self._chosen(name, value, x, choice) for name, value in list(given.items())[1:]}
        chosen[next(iter(given))] = take(x, choice)[:, 0]
        return tuple(chosen[name] for name in list(given)[: len(args)]), {name: chosen[name] for name in kwargs}

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Hook: puts results in the places of their tokens, with the light branch."""
        x, choice, kept = self._call.end()
        if x is None or choice is None:
            return out
        first, *rest = out if isinstance(out, tuple) else (out,)
        if choice.indices is None:
            first = first if self.light is None else first + self.light(x, kept)
        else:
            light = first.new_zeros(*x.shape[:2], first.shape[-1]) if self.light is None else self.light(x, kept)
            first = put(light, choice, first * choice.scores[:, 0, :, None].to(first.dtype))
            rest = [None] * len(rest)  # weights of the chosen ones fit nothing that asks for them
        return (first, *rest) if isinstance(out, tuple) else first

    def _mask_of(self, given: dict[str, Any], x: Tensor) -> Tensor | None:
        """``[B, n]`` bool, False for tokens that none may see, as far as the call or the model's says so."""
        for name, mask in given.items():
            if isinstance(mask, Tensor) and _is_mask(name):
                if mask.shape == x.shape[:2]:
                    return mask.bool()
                if mask.dim() == 4 and mask.shape[-1] == x.shape[1]:
                    return seen_tokens(mask, x.shape[0])
        return self.chooser.padding.of(x)

    def _chosen(self, name: str, value: Any, x: Tensor, choice: Choice) -> Any:
        """An argument, of the chosen tokens only."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._chosen(name, each, x, choice) for each in value)
        if isinstance(value, Mapping):
            return {key: self._chosen(name, each, x, choice) for key, each in value.items()}
        if value is not None and not isinstance(value, _PLAIN):
            raise InputError(
                f"{self.name}: it is unclear what {name}={type(value).__name__}(...) means for chosen tokens; "
                "leave it out of the call, or skip the block with a RouteRule"
            )
        if not isinstance(value, Tensor) or x.shape[1] not in value.shape:
            return value
        n = x.shape[1]
        if _is_mask(name):
            if value.shape == x.shape[:2] and value.shape[0] != n:
                return singles(value, choice)
            if value.dim() in (2, 4) and value.shape[-1] == n and value.shape[-2] in (1, n):
                return pairs(value, choice)
        elif value.dim() > 1 and value.shape[1] == n and value.shape[0] in (1, x.shape[0]):
            return singles(value, choice)
        raise InputError(
            f"{self.name}: it is unclear which axis of {name!r}, {list(value.shape)}, counts the {n} tokens; "
            "skip it with a RouteRule"
        )


class TorchAttentionRoute(AttentionRoute):
    """The same of a ``torch.nn.MultiheadAttention``."""

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """See ``AttentionRoute.before``.

        Raises:
            InputError: If attention weights are asked for, or a mask looks ahead of the router.
        """
        assert isinstance(module, nn.MultiheadAttention)
        given = named(module, args, kwargs)
        query = given["query"]
        self._call.end()  # of a call that failed
        if query.dim() != 3 or not (query is given["key"] and query is given["value"]):
            return None  # of other tokens: not routed
        x = query if module.batch_first else query.transpose(0, 1)
        padding = given.get("key_padding_mask")
        kept = self.chooser.padding.of(x) if padding is None else _hidden(padding).logical_not()
        choice = self.chooser(x, kept)
        self._call.begin(x, choice, kept)
        if choice.indices is None:
            return None
        if given.get("need_weights", True):
            raise InputError(
                f"{self.name}: attention weights are not made where tokens are routed; call it with need_weights=False"
            )
        mask = given.get("attn_mask")
        if given.get("is_causal") and self.chooser.window is None:
            raise InputError(f"{self.name} is causal, but is routed by later tokens too; route with a window")
        chosen = take(x, choice)[:, 0]
        chosen = chosen if module.batch_first else chosen.transpose(0, 1)
        hidden = None if mask is None else _all_pairs(mask, module.num_heads, choice, x.dtype)
        told = {**given, "query": chosen, "key": chosen, "value": chosen, "attn_mask": hidden, "is_causal": False}
        told["key_padding_mask"] = _all_singles(padding, choice, x)
        return (), told

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """See ``AttentionRoute.after``."""
        assert isinstance(module, nn.MultiheadAttention)
        if self._call.input is None or module.batch_first:
            return super().after(module, args, kwargs, out)
        first, weights = super().after(module, args, kwargs, (out[0].transpose(0, 1), out[1]))
        return first.transpose(0, 1), weights


def _all_pairs(mask: Tensor, heads: int, choice: Choice, dtype: torch.dtype) -> Tensor:
    """``[B * h, k, k]``, added to scores."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    whole = mask if mask.dim() == 2 else mask.unflatten(0, (-1, heads))
    return pairs(whole, choice).expand(-1, heads, -1, -1).flatten(0, 1)


def _all_singles(padding: Tensor | None, choice: Choice, like: Tensor) -> Tensor | None:
    """``[B, k]``, added to scores."""
    if padding is None and choice.mask is None:
        return None
    hidden = torch.zeros(choice.scores.shape[::2], device=like.device, dtype=like.dtype)
    if padding is not None:
        hidden = hidden.masked_fill(singles(_hidden(padding), choice), float("-inf"))
    return hidden if choice.mask is None else hidden.masked_fill(~choice.mask[:, 0], float("-inf"))


def _hidden(padding: Tensor) -> Tensor:
    return padding if padding.dtype == torch.bool else padding < 0


def _is_mask(name: str) -> bool:
    return any(word in name for word in _MASKS)


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a module is called with, by name: positional first, in their order."""
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}
