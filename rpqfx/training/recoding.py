"""Codes that are learned while a model trains from scratch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from rpqfx.errors import InputError
from rpqfx.graph.snapshot import Snapshot
from rpqfx.nn.wrappers import unwrapped
from rpqfx.policies.arguments import check_model
from rpqfx.training.codebook_groups import CodebookGroup, groups_of_weights
from rpqfx.training.latent_weight import LatentWeight
from rpqfx.training.optimizer_parameters import exchange, forget, position_of
from rpqfx.training.parameters import held
from rpqfx.validation.values import check_seed, whole

Recipe = Literal["latent", "sketch"]
RECIPES = ("latent", "sketch")
SCHEDULE = (0.05, 0.1, 0.2, 0.4)


class Recoding:
    """Learns the codes of a model that trains from scratch, beside the optimizer of its Parameters.

        small = rpqfx.rpqify(model, rpqfx.Policy.from_scratch(codebook_dim=4, codebook_bits=8, sharing="layer"))
        optimizer = torch.optim.AdamW(small.parameters(), 1e-3)
        recode = rpqfx.Recoding(small, optimizer, steps=1000)
        for batch in data:
            loss(small, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            recode.step()
        recode.finish()

    Random codes carry no information: ``K`` entries that ``N`` vectors share at random explain ``K / N`` of a matrix.
    Learned codes take ``log2(K) / d`` bits a weight in a file, which holds random ones as a seed. When it is made, each
    layer is drawn as torch.nn draws a dense one, one layer after the other, and codebooks and codes are fitted to it by
    k-means. Then there are two recipes:

    - ``"latent"``: a dense Parameter stands behind each weight while it trains. The layers compute with the nearest
      entries, and the gradient goes to the dense Parameter as if nothing had been rounded. After every ``every`` steps
      codes become those of the nearest entries, and entries the means of what they stand for (LUT-Q, Cardinaux et al.,
      1811.05355). It takes the memory of dense training, and gives the best models. The optimizer has the dense
      Parameters in the place of the codebooks, with the same options; ``finish`` gives it the codebooks back.
    - ``"sketch"``: there is never more than one dense matrix at a time. Weights have two stages of residual codes, of
      which the first is learned and the second stays random. At the shares ``schedule`` of all steps each weight is
      expanded and clustered anew: the clusters become the first stage, and the second starts at zero with new random
      codes, in which the next steps go on (CCE, Tsang and Ahle, 2210.05974). The optimizer forgets its state of those
      codebooks. It takes the memory of training in codebooks.

    Everything is a function of tensors that are equal on all ranks of ``DistributedDataParallel``, and of the seed, so
    all ranks choose the same codes; make it before the model is wrapped.

    A checkpoint is the state dicts of model, optimizer and this object; to resume, make all three as before, then load
    all three. Training goes on to the same bits.

    Args:
        model: A quantized model, whose weights are drawn anew; it changes in place. Codes without signs, ``scale``
            and ``column_scale``; of two stages for ``"sketch"``.
        optimizer: It has all codebooks, and has taken no step yet.
        steps: Optimizer steps of the whole training.
        recipe: ``"latent"`` or ``"sketch"``.
        every: Steps between two searches for codes (``"latent"`` only).
        schedule: Shares of ``steps`` after which codes are learned anew, rising, above 0 and below 1 (``"sketch"``
            only).
        seed: Seeds drawn matrices, clusters and codes.

    Raises:
        InputError: If nothing in the model is quantized, an argument is out of range or does not apply to the
            recipe, or the optimizer has not all codebooks that train.
        RewriteError: If accelerate has offloaded the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        steps: int,
        recipe: Recipe = "latent",
        every: int | None = None,
        schedule: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        check_model(model, "Recoding")
        if not isinstance(optimizer, Optimizer):
            raise InputError(f"Recoding takes the optimizer of the model's Parameters, got {type(optimizer).__name__}")
        if recipe not in RECIPES:
            raise InputError(f"recipe is 'latent' or 'sketch', got {recipe!r}")
        whole("steps", steps, 1, what="of optimizer steps", error=InputError)
        check_seed(seed)
        self.recipe, self.steps, self.seed = recipe, steps, seed
        self.every = _every(every, recipe)
        self.schedule = _schedule(schedule, recipe, steps)
        self.taken = 0
        """Steps so far."""
        self._optimizer, self._finished = optimizer, False
        model = unwrapped(model)
        self._groups = groups_of_weights(model, held(model))
        _check(self._groups, optimizer, recipe)
        before = Snapshot(model, values=[tensor for group in self._groups for tensor in group.stored()])
        parameters = [list(group["params"]) for group in optimizer.param_groups]
        try:
            self._start()
        except BaseException:
            before.restore()
            for group, own in zip(optimizer.param_groups, parameters, strict=True):
                group["params"][:] = own
            raise

    def _start(self) -> None:
        for number, group in enumerate(self._groups):
            values = group.drawn(self.seed + number)
            if self.recipe == "sketch":
                group.learn_first_stage(values, self._seed(number))
                continue
            group.learn(values, self._seed(number))
            trained = group.codebooks.requires_grad
            for weight, matrix in zip(group.weights, values, strict=True):
                LatentWeight.of(weight, matrix, trained)
        if self.recipe == "latent":
            for group in self._groups:
                exchange(self._optimizer, [group.codebooks], [weight.latent for weight in group.latent_weights])

    def _seed(self, number: int) -> int:
        """Returns one for each codebook and time of learning."""
        return self.seed + 1_000_003 * (self.taken + 1) + number

    @torch.no_grad()
    def step(self) -> int:
        """Takes note of one optimizer step, and learns codes where it is time to.

        Call it after each ``optimizer.step()``.

        Returns:
            How many sub-vectors have got other codes; those of a random second stage do not count.

        Raises:
            InputError: If training was finished, or all steps are taken.
        """
        if self._finished:
            raise InputError("finish() was called, and codes are not learned any more; make another Recoding")
        if self.taken >= self.steps:
            raise InputError(f"all {self.steps} steps are taken; give Recoding the number of steps of the training")
        self.taken += 1
        if self.recipe == "latent":
            if self.taken % self.every and self.taken != self.steps:
                return 0
            return sum(group.follow() for group in self._groups)
        if self.taken not in self.schedule:
            return 0
        changed = 0
        for number, group in enumerate(self._groups):
            changed += group.learn_first_stage(group.decoded(), self._seed(number))
            forget(self._optimizer, group.codebooks)
        return changed

    def finish(self) -> None:
        """Drops what is needed for learning only: the model is a plain one in codebooks. May be called again.

        After ``"latent"`` the optimizer has the codebooks in the place of the dense Parameters.
        """
        if self._finished:
            return
        if self.recipe == "latent":
            for group in self._groups:
                latents = [weight.latent for weight in group.latent_weights]
                if latents:  # none, where an interrupted call came that far
                    exchange(self._optimizer, latents, [group.codebooks])
                for weight in group.latent_weights:
                    weight.settle()
        self._finished = True

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint has to hold beside the state dicts of model and optimizer."""
        return {"recipe": self.recipe, "steps": self.steps, "seed": self.seed, "taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another one was.

        Args:
            state: A state that ``state_dict`` returned.

        Raises:
            InputError: If that was another recipe, seed or number of steps.
        """
        mine = self.state_dict()
        wrong = [key for key in ("recipe", "steps", "seed") if state.get(key) != mine[key]]
        if wrong or type(state.get("taken")) is not int:
            theirs, ours = (", ".join(f"{key}={of.get(key)!r}" for key in wrong or ["taken"]) for of in (state, mine))
            raise InputError(f"the state is of a Recoding with {theirs}, and this one has {ours}")
        self.taken = state["taken"]


def _every(every: int | None, recipe: str) -> int:
    if every is None:
        return 1
    if recipe != "latent":
        raise InputError(f"every={every!r} would do nothing with recipe={recipe!r}, which has a schedule")
    whole("every", every, 1, what="of steps", error=InputError)
    return every


def _schedule(schedule: Sequence[float] | None, recipe: str, steps: int) -> tuple[int, ...]:
    """Steps after which codes are learned."""
    if recipe != "sketch":
        if schedule is not None:
            raise InputError(f"schedule={schedule!r} would do nothing with recipe={recipe!r}; every says when")
        return ()
    shares = tuple(SCHEDULE if schedule is None else schedule)
    numbers = all(isinstance(share, (int, float)) and 0 < share < 1 for share in shares)
    if not shares or not numbers or list(shares) != sorted(set(shares)):
        raise InputError(f"schedule has shares of all steps, rising, above 0 and below 1, got {schedule!r}")
    return tuple(max(1, round(share * steps)) for share in shares)


def _check(groups: Iterable[CodebookGroup], optimizer: Optimizer, recipe: str) -> None:
    for group in groups:
        name, spec = group.name, group.weights[0].spec
        options = {"signs": "signs", "scale": "scale", "column_scale": "column_scale_group"}
        odd = [name for name, own in options.items() if any(getattr(w.spec, own) for w in group.weights)]
        if odd:
            raise InputError(f"{name} has {' and '.join(odd)}, and learned codes have none; leave it out of the policy")
        if recipe == "sketch" and spec.stages != 2:
            raise InputError(
                f"{name} has {spec.stages} stage{'s' * (spec.stages != 1)}, and recipe='sketch' needs two, one that is "
                "learned and one that is random: Policy.from_scratch(stages=2, ...)"
            )
        if any(isinstance(weight, LatentWeight) for weight in group.weights):
            raise InputError(f"{name} is learned by another Recoding already; call its finish() first")
        if group.codebooks.requires_grad and position_of(optimizer, group.codebooks) is None:
            raise InputError(f"the optimizer does not have the codebooks of {name}; give it model.parameters()")
        if optimizer.state.get(group.codebooks):
            raise InputError("the optimizer has taken steps already; make the Recoding before the first one")
