"""The KV cache of a whole model, most of it in codes."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.errors import FormatError, InputError
from rpqfx.kv.cache.layer import LayerStore
from rpqfx.kv.cache.shared_rotary import SharedPositions
from rpqfx.kv.module import KVAttention, attentions


class CodebookCache:
    """Keys and values of a model that ``rpqfx.quantize_kv`` returned, appended token by token.

    Models of transformers take it as ``past_key_values``. Any other model whose forward can be given the next tokens
    alone attends to it inside ``with cache.attended(): model(...)``.

    Args:
        model: What ``quantize_kv`` returned.
        dtype: Of the sinks, the window and the rotary embedding's angles; None for what they come in.

    Raises:
        InputError: If the model has no attention on codes.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.cores = attentions(model)
        if not self.cores:
            raise InputError("this model has no attention on codes; give it some with rpqfx.quantize_kv")
        self.positions = SharedPositions(dtype)
        self.stores: dict[str, LayerStore] = {}
        for name, core in self.cores.items():
            policy = core.policy
            self.stores[name] = LayerStore(
                core.keys, core.values, sinks=policy.sinks, window=policy.window, chunk=policy.chunk, dtype=dtype,
                positions=self.positions.of(name), name=name,
            )  # fmt: skip

    @classmethod
    def for_model(cls, model: nn.Module, dtype: torch.dtype | None = None) -> CodebookCache:
        """Returns a cache of the kind that the model takes: for one of transformers, also a ``transformers.Cache``.

        Args:
            model: What ``quantize_kv`` returned, or what wraps it: an adapter, a module that holds it.
            dtype: Of the sinks and the window; None for what keys and values come in.
        """
        if "transformers" in sys.modules:  # so may be the model, whose kind of cache stands above
            importlib.import_module("rpqfx.kv.transformers")
        for kind in cls.__subclasses__():
            inner = kind.fits(model)
            if inner is not None and attentions(inner):
                return kind(inner, dtype)
        return cls(model, dtype)

    @classmethod
    def fits(cls, model: nn.Module) -> nn.Module | None:
        """Returns the part of ``model`` whose own kind of cache this class is, None where there is none.

        Args:
            model: Any module.
        """
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> CodebookCache:
        """Copies the tokens, not the model's codebooks: a copy goes on with the same model."""
        for core in self.cores.values():
            memo |= {id(part): part for part in (core, core.keys, core.values)}
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return made

    @property
    def total(self) -> int:
        """Tokens."""
        return max(store.total for store in self.stores.values())

    @contextmanager
    def attended(self) -> Iterator[None]:
        """Makes this thread's calls of the model append to this cache, for as long as the context lasts.

        Raises:
            InputError: If the model did not run meanwhile: a copy of it may have, which knows nothing of this cache.
        """
        before = {name: core.underway.store for name, core in self.cores.items()}
        taken = [store.taken for store in self.stores.values()]
        for name, core in self.cores.items():
            core.underway.store = self.stores[name]
        try:
            yield
        finally:
            for name, core in self.cores.items():
                core.underway.store = before[name]
        if [store.taken for store in self.stores.values()] == taken:
            raise InputError(
                "the model that this cache was made for did not run within attended(); a copy of it takes a cache of "
                "its own: CodebookCache.for_model(the_copy), and restore(cache.state()) for the tokens"
            )

    def nbytes(self) -> dict[str, int]:
        """Counts bytes of ``codes``, ``scales``, ``window`` (with sinks), ``positions`` and ``codebooks`` (with maps).

        The last are the model's, whatever the number of tokens and of caches.
        """
        found = {"codes": 0, "scales": 0, "window": 0, "positions": self.positions.nbytes()}
        for store in self.stores.values():
            for key, size in store.nbytes().items():
                found[key] += size
        return {**found, "codebooks": codebook_bytes(self.cores.values())}

    def reset(self) -> None:
        """Drops all tokens."""
        for store in self.stores.values():
            store.reset()
        self.positions.reset()

    def select(self, indices: Tensor) -> None:
        """Keeps some rows of the batch, in any order: ``indices [B']``, an integer."""
        for store in self.stores.values():
            store.select(indices)
        self.positions.map_rows(lambda x: x.index_select(0, indices.to(x.device)))

    def repeat(self, times: int) -> None:
        """Repeats each row of the batch, the copies beside each other."""
        for store in self.stores.values():
            store.repeat(times)
        self.positions.map_rows(lambda x: x.repeat_interleave(times, 0))

    def crop(self, length: int) -> None:
        """Drops the newest tokens.

        Args:
            length: Tokens that stay; if negative, tokens that go.

        Raises:
            InputError: If some of those are in codes already.
        """
        for store in self.stores.values():
            store.crop(length)
        self.positions.crop(max((store.total for store in self.stores.values()), default=0))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Returns all tokens, as tensors to be kept by ``torch.save``; ``restore`` takes them."""
        return {"": self.positions.state(), **{name: store.state() for name, store in self.stores.items()}}

    def restore(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Takes on the result of ``state``.

        Raises:
            FormatError: If it is of other layers or codebooks; the cache is empty then.
        """
        self.reset()
        if set(state) != {"", *self.stores}:
            raise FormatError(f"the cache saved is of other layers: {sorted(set(state) ^ {'', *self.stores})[:4]}")
        try:
            for name, store in self.stores.items():
                store.restore(state[name])
            self.positions.restore(state[""], [name for name, store in self.stores.items() if store.rotated])
        except FormatError:
            self.reset()
            raise


def codebook_bytes(cores: Iterable[KVAttention]) -> int:
    """Returns the bytes of the codebooks, maps and means of attention layers, each tensor once."""
    tensors = {}
    for core in cores:
        for tensor in (*core.parameters(), *core.buffers()):
            tensors[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(tensors.values())
