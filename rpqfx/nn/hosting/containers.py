"""Containers that own Parameters which are quantized.

A container counts and lists its children. Codebooks are a child as well, but not one that its owner put in, so they are
left out of lengths, indices and iteration. They stay in ``named_modules`` and in the state dict.
"""

from __future__ import annotations

import contextlib
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from rpqfx.errors import RewriteError
from rpqfx.nn.hosting.backed import SUFFIX, Backed, backed_weights
from rpqfx.nn.hosting.host import register_adapter
from rpqfx.nn.weight import RPQWeight


class BackedContainer(Backed):
    """A container whose codebooks are none of its items."""

    def _items(self) -> dict[str, nn.Module]:
        return {name: child for name, child in self._modules.items() if not _holds(name, child)}  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._items())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items().values())

    def __delitem__(self, key: Any) -> None:
        with self._aside():
            super().__delitem__(key)  # type: ignore[misc]

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Takes the codebooks out of the children while torch numbers all of them anew."""
        held = {name + SUFFIX: weight for name, weight in backed_weights(self).items()}
        for name in held:
            del self._modules[name]
        try:
            yield
        finally:
            self._modules.update(held)


class BackedList(BackedContainer):
    """A ``ModuleList`` or ``Sequential`` whose codebooks are none of its items."""

    def insert(self, index: int, module: nn.Module) -> Any:
        """As in torch."""
        with self._aside():
            return super().insert(index, module)  # type: ignore[misc]


class BackedDict(BackedContainer):
    """A ``ModuleDict`` whose codebooks are none of its items."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._items())

    def __contains__(self, key: str) -> bool:
        return key in self._items()

    def keys(self) -> KeysView[str]:
        """Returns the number of items."""
        return self._items().keys()

    def items(self) -> ItemsView[str, nn.Module]:
        """With their names."""
        return self._items().items()

    def values(self) -> ValuesView[nn.Module]:
        """Returns the items."""
        return self._items().values()


class BackedParametrizations(BackedList):
    """The list of one tensor's parametrizations, with an original in codebooks.

    To its readers the originals are always several (``is_tensor`` is False), because torch would otherwise overwrite
    the only one in place when parametrizations are removed; with several it makes a new Parameter of the result.
    """

    @property
    def is_tensor(self) -> bool:
        """False."""
        return False

    @property
    def original0(self) -> Any:
        """The first original, also where it is called ``original``."""
        if "original" + SUFFIX in self._modules:
            return self.original
        name = "original0"
        return next(group[name] for group in (self._parameters, self._buffers, self.__dict__) if name in group)

    def right_inverse(self, value: Tensor) -> None:
        """Refuses to lay a tensor over codebooks."""
        raise RewriteError(
            "this weight is computed from one that is quantized and cannot be assigned; train or load the "
            "codebooks, or assign it before rewriting"
        )


def _holds(name: str, child: nn.Module | None) -> bool:
    return name.endswith(SUFFIX) and isinstance(child, RPQWeight)


register_adapter(nn.ModuleList, BackedList)
register_adapter(nn.Sequential, BackedList)
register_adapter(nn.ModuleDict, BackedDict)
register_adapter(ParametrizationList, BackedParametrizations)
