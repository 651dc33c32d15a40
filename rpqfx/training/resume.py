"""A fine-tuning's state on disk, so that one that was interrupted goes on to the same bits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from rpqfx.conversion.checkpoint import Checkpoint, Work, fingerprint
from rpqfx.errors import FormatError
from rpqfx.graph.calibration.batches import arguments
from rpqfx.graph.generators import generator_states, set_generator_states
from rpqfx.training.data import Data, feed, is_replayed
from rpqfx.training.loop import Run

FINE_TUNING = Work("fine-tuning", "model, teacher, loss, setting or data")

_STATE = "state"
_PLAIN = (bool, int, float, str, type(None))
_GENERATOR, _FIRST = "generator ", "first generator "


class Resume:
    """The place of a run in a folder: its last state, which takes the place of the one before.

    Args:
        folder: Made if it is not there.
        run: Has just started.
        words: All that the run depends on, in words.
        tensors: And in numbers.
        data: Its batches.
        seed: Seeds the order of batches.

    Raises:
        FormatError: If the folder holds another fine-tuning.
        OSError: If it cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike[str], run: Run, words: Iterable[str], tensors: Iterable[Tensor],
        data: Data, seed: int,
    ) -> None:  # fmt: skip
        self._folder, self._run, self._data, self._seed = folder, run, data, seed
        self._devices = run.devices
        self._store = Checkpoint(folder, fingerprint(words, tensors), FINE_TUNING)
        self._first = generator_states(self._devices)
        self.seconds = 0.0
        self.finished = False

    def start(self) -> Iterator[Any]:
        """Makes the run what it was when it was last saved, if it was.

        Returns:
            The batches that are next.

        Raises:
            FormatError: If the data does not give the batches that it gave.
        """
        state = self._store.load(_STATE, mapped=True)
        if state is None:
            return feed(self._data, self._seed)
        self._run.resume(state)
        self.seconds = float(state["seconds"])
        if "last" not in state:
            self.finished = True
            return iter(())
        self._first = _under(state, _FIRST)
        set_generator_states(self._first)  # what data draws, it draws again
        batches = self._replayed(state["last"])
        set_generator_states(_under(state, _GENERATOR))
        return batches

    def _replayed(self, last: Tensor) -> Iterator[Any]:
        seen = self._run.seen
        if not is_replayed(self._data):
            return feed(self._data, self._seed, seen)
        batches = feed(self._data, self._seed, seen - 1)
        again = next(batches, None)
        if again is None or not torch.equal(_sum(again), last):
            raise FormatError(
                f"{self._folder} holds a fine-tuning that had come to batch {seen}, and data gives another one in its "
                "place when it is gone through again; give an iterable that repeats itself, a sequence, or a callable "
                "from a number to a batch"
            )
        return batches

    def save(self, seconds: float) -> None:
        """Keeps the state of the run between two steps.

        Args:
            seconds: Time that it took so far.

        Raises:
            OSError: If it cannot be written; what was saved before stays.
        """
        state = self._run.state()
        state["seconds"] = torch.tensor(seconds, dtype=torch.float64)
        state["last"] = _sum(self._run.last) if is_replayed(self._data) else torch.empty(0)
        state |= {f"{_FIRST}{name}": value for name, value in self._first.items()}
        state |= {f"{_GENERATOR}{name}": value for name, value in generator_states(self._devices).items()}
        self._store.save(_STATE, state)

    def finish(self, seconds: float) -> None:
        """Keeps the result of the run, which takes less room than its state.

        Args:
            seconds: Time that it took.

        Raises:
            OSError: If it cannot be written; what was saved before stays.
        """
        self._store.save(_STATE, {**self._run.result(), "seconds": torch.tensor(seconds, dtype=torch.float64)})


def dependencies(run: Run, data: Data) -> tuple[list[str], Iterator[Tensor]]:
    """Returns all that a run's result depends on, as far as it can be known: words and tensors.

    Code cannot: models and losses count by the names of their classes, and a loss by its plain attributes.

    Args:
        run: Has just started.
        data: Batches; those in a list or tuple count by value, other sequences by their length.
    """
    words = [repr(run.settings), repr(run.trained.names), _described(run.loss)]
    words += [] if run.easing is None else [repr(run.easing)]
    words += [f"{w.spec} {w.layout} {w.shares_codebooks}" for w in run.weights]
    models = [one for one in (run.model, run.teacher) if one is not None]
    for one in models:
        words += [type(one).__qualname__, repr([name for name, _ in _tensors(one)])]
    inputs: list[Any] = []
    if isinstance(data, (list, tuple)):
        inputs, shape = tree_flatten([arguments(batch, f"batch {number}") for number, batch in enumerate(data)])
        words += [str(shape), *(repr(leaf) for leaf in inputs if isinstance(leaf, _PLAIN))]
    else:
        words += [type(data).__qualname__, str(len(data)) if isinstance(data, Sequence) else ""]
    held = (tensor for one in models for _, tensor in _tensors(one) if not tensor.is_meta)
    return words, (tensor for some in (held, inputs) for tensor in some if isinstance(tensor, Tensor))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _described(loss: Any) -> str:
    kind = loss if hasattr(loss, "__qualname__") else type(loss)
    plain = {key: value for key, value in getattr(loss, "__dict__", {}).items() if isinstance(value, _PLAIN)}
    return f"{kind.__module__}.{kind.__qualname__} {sorted(plain.items())}"


def _sum(batch: Any) -> Tensor:
    """Returns a hash of a batch, in a tensor."""
    leaves, shape = tree_flatten(arguments(batch, "a batch"))
    words = [str(shape), *(repr(leaf) for leaf in leaves if isinstance(leaf, _PLAIN))]
    digest = fingerprint(words, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
    return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value.clone() for name, value in state.items() if name.startswith(prefix)}
