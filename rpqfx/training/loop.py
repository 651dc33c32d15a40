"""A fine-tuning, step after step, on a model that is whole again whenever it stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rpqfx.errors import InputError, TrainingError
from rpqfx.graph.calibration.batches import arguments
from rpqfx.graph.snapshot import Flags
from rpqfx.nn.weight import RPQWeight
from rpqfx.training.decoded_weight import CutWeight
from rpqfx.training.easing import Easing
from rpqfx.training.latent import Latent
from rpqfx.training.parameters import Choose, Good, Rates, Trained

Loss = Callable[[Any, Any, Any], Tensor]

_BETAS = (0.9, 0.95)
_WARM = 0.05
_REMEDY = "the model is as it was before that step's update. Try lower rates, or look for bad numbers in the data"


@dataclass(frozen=True)
class Settings:
    """The settings of a fine-tuning; see ``finetune`` for what each means."""

    steps: int
    recode: bool
    recode_every: int
    rates: Rates
    norms: Literal["keep", "update"]
    autocast: torch.dtype | None
    accumulate: int
    clip: float
    seed: int


class _Still(NamedTuple):
    """The state of a model between two steps, besides its Parameters.

    Args:
        codes: Codes of each weight.
        statistics: Statistics of batch norms.
    """

    codes: list[Tensor]
    statistics: list[Tensor]

    def restore(self, weights: Iterable[RPQWeight], norms: Iterable[Tensor]) -> None:
        """Puts them back."""
        for weight, codes in zip(weights, self.codes, strict=True):
            weight.codes = codes
        for buffer, value in zip(norms, self.statistics, strict=True):
            buffer.copy_(value)


class Run:
    """Steps of a model, and all that they need.

    Args:
        model: The student; unchanged until ``start``.
        teacher: The dense model, or None.
        loss: From the student's output, the teacher's and the batch.
        settings: How it is trained.
        weights: The student's quantized weights.
        easing: How many tokens a routed model has heavy in each step, or None.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, loss: Loss, settings: Settings,
        weights: Sequence[RPQWeight], easing: Easing | None = None,
    ) -> None:  # fmt: skip
        self.model, self.teacher, self.loss, self.settings = model, teacher, loss, settings
        self.weights, self.easing = weights, easing
        self._kind = next(model.parameters()).device.type
        self._flags = Flags(model, teacher)
        self._norms = [b for m in model.modules() if isinstance(m, _BatchNorm) for b in m.buffers()]
        self.losses: list[float] = []
        self.recoded = self.seen = 0
        self._good: Good | None = None
        self._still = _Still([], [])
        self._phase: Literal["whole", "changing", "bad"] = "whole"

    def start(self, train: Choose | None) -> None:
        """Makes the model one that is trained; ``stop`` is due from here on.

        Args:
            train: Chooses Parameters by name.

        Raises:
            InputError: If no Parameter is chosen.
        """
        settings = self.settings
        for module in (m for model in (self.model, self.teacher) if model is not None for m in model.modules()):
            module.training = False
        for module in self.model.modules() if settings.norms == "update" else ():
            if isinstance(module, _BatchNorm):
                module.training = True
        self.trained = Trained(self.model, self.weights, train)
        own = {id(parameter) for parameter in self.trained.all}
        changing = [w for w in self.weights if settings.recode or any(id(p) in own for p in w.parameters())]
        self._cut = [CutWeight.of(weight) for weight in changing]
        self._latents = {cut: Latent(cut) for cut in self._cut if settings.recode and Latent.fits(cut)}
        self.tensors = [*self.trained.all, *self._norms]
        groups = self.trained.groups(settings.rates, self._latents.values())
        self._adam = torch.optim.Adam(groups, betas=_BETAS)
        self._rates = [group["lr"] for group in self._adam.param_groups]
        self._good = Good(self.tensors, self.weights)
        self._rest()

    def step(self, batches: Iterator[Any]) -> None:
        """Makes one step.

        Args:
            batches: The next ones are taken.

        Raises:
            InputError: If there are no more batches.
            TrainingError: If the loss or its gradient is not finite.
        """
        assert self._good is not None
        number, total = len(self.losses), 0.0
        if self.easing is not None:
            self.easing.at(number)
        for _ in range(self.settings.accumulate):
            loss = self._forward(batches) / self.settings.accumulate
            total += float(loss.detach())
            if not math.isfinite(total):
                self._phase = "bad"
                raise TrainingError(f"the loss of step {number} is {total}; {_REMEDY}")
            self._backward(loss, number)
        self._good.keep()
        for cut in self._cut:
            cut.collect()
            if cut in self._latents and cut.vectors.grad is not None:
                self._latents[cut].push(cut.vectors.grad)
        self._clip(number)
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * _share(number, self.settings.steps)
        self._phase = "changing"
        self._adam.step()
        self._adam.zero_grad()
        if (number + 1) % self.settings.recode_every == 0:
            apart: dict[tuple[int, int], Tensor] = {}
            self.recoded += sum(latent.recode(apart) for latent in self._latents.values())
        self._rest()
        self.losses.append(total)
        for cut in self._cut:
            cut.decode()

    def _forward(self, batches: Iterator[Any]) -> Tensor:
        batch = next(batches, None)
        if batch is None:
            raise InputError(
                f"data ended after {self.seen} batches; give a sequence, which is gone through again, or more"
                if self.seen
                else "there is no data: it holds no batch"
            )
        args, kwargs = arguments(batch, f"batch {self.seen}")
        self.seen, self.last = self.seen + 1, batch
        autocast = self.settings.autocast
        with torch.autocast(self._kind, autocast, enabled=autocast is not None):
            wanted = None
            if self.teacher is not None:
                with torch.no_grad():
                    wanted = self.teacher(*args, **kwargs)
            found = self.model(*args, **kwargs)
        return self.loss(found, wanted, batch)

    def _backward(self, loss: Tensor, number: int) -> None:
        if loss.requires_grad:
            loss.backward()
        elif self.easing is None or not self.easing.left(number):
            why = ": every token is heavy; give longer sequences than the policy's window or number of tokens"
            raise InputError(
                f"the loss of step {number} depends on nothing that is trained{why if self.easing is not None else ''}"
            )

    def _clip(self, number: int) -> None:
        tensors = self._stepped()
        norm = nn.utils.get_total_norm([tensor.grad for tensor in tensors if tensor.grad is not None])
        if not bool(torch.isfinite(norm)):
            raise TrainingError(f"the gradient of step {number} is not finite; {_REMEDY}")
        nn.utils.clip_grads_with_norm_(tensors, self.settings.clip, norm)

    @property
    def devices(self) -> set[torch.device]:
        """Where what is trained is."""
        return {tensor.device for tensor in self.trained.all}

    def _stepped(self) -> list[Tensor]:
        """Returns all that the optimiser changes."""
        return [tensor for group in self._adam.param_groups for tensor in group["params"]]

    def _rest(self) -> None:
        """Says that the tensors are those of a whole number of steps."""
        still = _Still([weight.codes for weight in self.weights], [b.clone() for b in self._norms])
        self._still, self._phase = still, "whole"

    @torch.no_grad()
    def stop(self) -> None:
        """Makes the model a plain one again, as the last whole step left it; may be called again.

        After a loss that is not finite it is what it was when the loss last was. Numbers that were exact in half
        precision are rounded to it.
        """
        if self._good is not None:
            if self._phase != "whole":
                self._good.restore()
            if self._phase != "bad":
                self._still.restore(self.weights, self._norms)
        for weight in self.weights:
            if isinstance(weight, CutWeight):
                weight.uncut()
        if self._good is not None:
            self.trained.round()
        if self.easing is not None:
            self.easing.stop()
        self._flags.restore()

    def state(self) -> dict[str, Tensor]:
        """Returns all that the next steps depend on, besides settings, models, and data."""
        assert self._good is not None
        state = self.result()
        state |= {f"good {number}": kept for number, kept in enumerate(self._good.kept)}
        state |= {f"good codes {number}": codes for number, codes in enumerate(self._good.codes)}
        state |= {f"latent {number}": latent.values.detach() for number, latent in enumerate(self._latents.values())}
        for number, tensor in enumerate(self._stepped()):
            state |= {f"adam {number} {key}": value for key, value in self._adam.state[tensor].items()}
        return state

    def result(self) -> dict[str, Tensor]:
        """Returns what a finished run leaves."""
        state = {f"tensor {number}": tensor.detach() for number, tensor in enumerate(self.tensors)}
        state |= {f"codes {number}": weight.codes for number, weight in enumerate(self.weights)}
        state["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        state["counts"] = torch.tensor([self.seen, self.recoded])
        return state

    @torch.no_grad()
    def resume(self, state: dict[str, Tensor]) -> None:
        """Takes on what ``state`` or ``result`` returned, in a run that has just started.

        Args:
            state: On the CPU; copied.
        """
        assert self._good is not None
        self._phase = "changing"
        for number, tensor in enumerate(self.tensors):
            tensor.copy_(state[f"tensor {number}"])
        for number, weight in enumerate(self.weights):
            weight.codes = _copied(state[f"codes {number}"], weight.codes)
        for number, latent in enumerate(self._latents.values()):
            if f"latent {number}" in state:
                latent.values.copy_(state[f"latent {number}"])
        self._resume_moments(state)
        self.losses = state["losses"].tolist()
        self.seen, self.recoded = state["counts"].tolist()
        self._rest()
        for number, kept in enumerate(self._good.kept):
            kept.copy_(state.get(f"good {number}", kept))
        for number, codes in enumerate(self._good.codes):
            self._good.codes[number] = _copied(state.get(f"good codes {number}", codes), codes)
        for cut in self._cut:
            cut.decode()

    def _resume_moments(self, state: dict[str, Tensor]) -> None:
        """Puts back the moments of the optimiser."""
        self._adam.zero_grad()
        for number, tensor in enumerate(self._stepped()):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                saved = state.get(f"adam {number} {key}")
                if saved is not None:
                    self._adam.state[tensor][key] = saved.clone() if key == "step" else _copied(saved, tensor)


def _share(number: int, steps: int) -> float:
    """Returns how much of the rates a step has: a short warm-up, and a cosine to zero."""
    warm = max(1, math.ceil(_WARM * steps))
    return min((number + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * number / steps))


def _copied(saved: Tensor, like: Tensor) -> Tensor:
    """Returns a tensor as it was saved, where another one is."""
    return torch.empty_like(like).copy_(saved)
