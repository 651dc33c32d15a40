"""Follows tensors while a model runs, from products through softmaxes to the products that use them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from rpqfx.graph.operands import Operand, operand_of
from rpqfx.graph.products import Product, is_product
from rpqfx.graph.written_products import Products, Shape, Written

# Functions after which axes of scores or of weights may lie otherwise than before.
_MOVING = frozenset({
    "transpose", "permute", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "flip", "roll", "rot90", "gather",
    "__getitem__", "narrow", "select", "index_select", "cat", "concat", "stack", "split", "chunk", "unbind", "pad",
    "as_strided", "__get__", "unfold", "take_along_dim", "tile", "repeat", "repeat_interleave",
})  # fmt: skip
# Functions that only say otherwise where the numbers of a tensor lie, or how many bits they have.
_VIEWS = frozenset({
    "reshape", "view", "contiguous", "transpose", "permute", "swapaxes", "flatten", "unflatten", "unsqueeze", "squeeze",
    "to", "float", "half", "bfloat16", "type", "type_as", "clone", "__get__", "reshape_as", "view_as", "movedim",
})  # fmt: skip
_COPYING = frozenset({"expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile"})


@dataclass(eq=False)
class Call:
    """A call of a module that is under way."""

    name: str
    module: nn.Module
    batch: int | None
    products: list[Shape] = field(default_factory=list)


@dataclass(eq=False)
class _Event:
    """A product, or a softmax.

    Args:
        calls: The calls of modules that were under way, the outermost first.
        numbers: The number of the product among those of each call.
        keys: How keys lie in its right operand if that holds some, or why this cannot be told; None for a softmax.
        of: Products that the scores of a softmax derive from.
        obstacle: What is not known here about a softmax.
    """

    calls: tuple[Call, ...]
    numbers: tuple[int, ...] = ()
    keys: Operand | str | None = None
    of: tuple[_Event, ...] = ()
    obstacle: str | None = None


@dataclass(frozen=True)
class _Tag:
    """The facts known of a tensor.

    Args:
        events: Products, or softmaxes, that it derives from with no other product or softmax in between.
        moved: Whether axes may lie otherwise since.
        constant: Whether it derives from parameters and buffers alone.
        heads: How many heads its first axis was folded of.
        copies: How often each of its numbers is there.
        fresh: Whether it is the result of a product or a softmax itself.
    """

    events: frozenset[_Event] = frozenset()
    moved: bool = False
    constant: bool = False
    heads: int | None = None
    copies: int = 1
    fresh: bool = False


@dataclass
class Pair:
    """The two products of an attention.

    Args:
        call: Of the innermost module that makes both.
        found: Which they are.
        causal: Whether its weights show that no token sees later ones.
    """

    call: Call
    found: Written
    causal: bool


class ProductWatch(TorchFunctionMode):
    """Notes for each tensor the products and softmaxes that it derives from, while a model runs."""

    def __init__(self, model: nn.Module, known: Collection[nn.Module]) -> None:
        super().__init__()
        self.pairs: list[Pair] = []
        self._model, self._known = model, set(known)
        self._calls: list[Call] = []
        self._tags: Any = WeakTensorKeyDictionary()
        for tensor in (*model.parameters(), *model.buffers()):
            self._tags[tensor] = _Tag(constant=True)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While it lasts, calls of the model's modules are known."""
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    before = module.register_forward_pre_hook(self._opens(name), prepend=True, with_kwargs=True)
                    after = module.register_forward_hook(self._closes, always_call=True)
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            yield

    def _opens(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tokens = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            plain = tokens is not None and tokens.dim() == 3
            self._calls.append(Call(name, module, tokens.shape[0] if plain and tokens is not None else None))

        return hook

    def _closes(self, module: nn.Module, args: Any, output: Any) -> None:
        self._calls.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        product = Product.of(func, args, kwargs) if is_product(func) else None
        before = self._before(func, args, kwargs, product)
        made = func(*args, **kwargs)
        if before is not None:
            target = args[0] if getattr(func, "__name__", "") == "__setitem__" else made
            self._note(func, args, target, before)
        return made

    def _before(self, func: Any, args: Any, kwargs: Any, product: Product | None) -> _Tag | None:
        """The tag of what a function returns, as far as its arguments say it."""
        name = getattr(func, "__name__", "")
        told = args[:1] if name.endswith("_as") or name in ("to", "type") else (args, kwargs)
        given = [self._tags.get(x, _Tag()) for x in _tensors(told)]
        if product is not None:
            for call in self._calls:
                call.products.append(Shape.of(product))
            operands = [self._tags.get(x, _Tag()) for x in (product.left, product.right)]
            if not any(tag.constant for tag in operands):
                return self._product(product, *operands)
        if not given:
            return _Tag(constant=True)
        events = frozenset(() if name in ("linear", "addmm") else (event for tag in given for event in tag.events))
        if name == "softmax" and events:
            return self._softmax(args, kwargs, given[0], events)
        return _Tag(events, any(tag.moved for tag in given), all(tag.constant for tag in given))

    def _product(self, product: Product, left: _Tag, right: _Tag) -> _Tag:
        if any(event.of for event in left.events):
            self._mixed(product, left, right)
        numbers = tuple(len(call.products) - 1 for call in self._calls)
        keys = operand_of(product.right, product.score_axes(), self._heads(product, right), right.copies)
        return _Tag(frozenset({_Event(tuple(self._calls), numbers, keys)}), fresh=True)

    def _heads(self, product: Product, right: _Tag) -> int | None:
        """Returns the number of heads folded into the first axis of the right operand, where it is known."""
        if right.heads is None and product.right.dim() == 3 and self._calls[-1].batch == product.right.shape[0]:
            return 1
        return right.heads

    def _softmax(self, args: Any, kwargs: Any, tag: _Tag, events: frozenset[_Event]) -> _Tag:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        scores = args[0] if args else kwargs["input"]
        obstacle = None
        if any(event.of for event in events):
            obstacle = "takes the softmax of a softmax"
        elif tag.moved:
            obstacle = "moves axes of its scores, or cuts them, before the softmax"
        elif len(events) > 1:
            obstacle = f"has scores that come of {len(events)} products of activations"
        elif dim not in (-1, scores.dim() - 1):
            obstacle = "has its softmax over another axis than the last"
        return _Tag(frozenset({_Event(tuple(self._calls), of=tuple(events), obstacle=obstacle)}), fresh=True)

    def _mixed(self, product: Product, left: _Tag, right: _Tag) -> None:
        """Notes the second product of an attention."""
        softmaxes = [event for event in left.events if event.of]
        first = softmaxes[0]
        scores = first.of[0]
        numbers = tuple(len(call.products) - 1 for call in self._calls)
        common = [i for i, call in enumerate(self._calls) if all(_within(call, e, i) for e in (first, *first.of))]
        if not common or any(call.module in self._known for call in self._calls):
            return
        at = common[-1]
        call = self._calls[at]
        obstacle = first.obstacle
        if len(left.events) > 1:
            obstacle = "mixes values by weights that are more than one softmax"
        elif left.moved:
            obstacle = "moves axes of its weights, or cuts them, after the softmax"
        elif product.func.__name__ == "baddbmm":
            obstacle = "adds to what it mixes values to"
        keys = scores.keys
        values = operand_of(product.right, product.value_axes(), self._heads(product, right), right.copies)
        for operand in (keys, values):
            if isinstance(operand, str) and obstacle is None:
                obstacle = operand
        causal = _is_causal(product.left)
        products = None
        if obstacle is None and isinstance(keys, Operand) and isinstance(values, Operand):
            products = Products(scores.numbers[at], numbers[at], 0, keys, values)
        self.pairs.append(Pair(call, Written(products, obstacle), causal))

    def _note(self, func: Any, args: Any, made: Any, tag: _Tag) -> None:
        name = getattr(func, "__name__", "")
        source = args[0] if args and isinstance(args[0], Tensor) else None
        old = self._tags.get(source, _Tag()) if source is not None else _Tag()
        for x in _tensors(made):
            heads, copies = old.heads, old.copies
            if source is not None and x is not source:
                heads = _folded(source, x, heads)
                copies = copies if name in _VIEWS or name in _COPYING else 1
                if name in _COPYING and source.numel():
                    copies *= x.numel() // source.numel()
            moved = tag.moved or (name in _MOVING and bool(tag.events))
            if tag.fresh:
                heads, copies, moved = None, 1, False
            self._tags[x] = _Tag(tag.events, moved, tag.constant, heads, copies)


def _within(call: Call, event: _Event, depth: int) -> bool:
    return depth < len(event.calls) and event.calls[depth] is call


def _folded(source: Tensor, x: Tensor, known: int | None) -> int | None:
    """Returns the number of heads folded into the first axis of a tensor, given the tensors that it was made of."""
    if x.dim() != 3:
        return None
    if source.dim() == 4 and source.shape[0] * source.shape[1] == x.shape[0] and source.shape[2:] == x.shape[1:]:
        return source.shape[1]
    return known if source.dim() == 3 and source.shape[0] == x.shape[0] else None


def _is_causal(weights: Tensor) -> bool:
    """Returns whether weights ``[..., T_q, T]`` show that no token sees later ones.

    Rows of equal weights say nothing: their tokens may see nothing at all, as padding does.
    """
    if weights.dim() < 2 or weights.shape[-1] != weights.shape[-2]:
        return False
    tokens = weights.shape[-1]
    if tokens == 1:
        return True
    told = (weights.amax(-1) - weights.amin(-1)).abs() > 1e-6
    later = weights.abs().triu(1).amax(-1) > 0
    return bool(told.any()) and not bool((told & later).any())


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (tuple, list)):
        for each in found:
            yield from _tensors(each)
    elif isinstance(found, dict):
        for each in found.values():
            yield from _tensors(each)
