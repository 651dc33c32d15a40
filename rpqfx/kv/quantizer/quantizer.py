"""Residual vector quantisation of the last axis of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rpqfx.codebook.spec import code_dtype
from rpqfx.errors import InputError, SpecError
from rpqfx.kv.quantizer.checks import check_points, check_vectors, counted_tokens
from rpqfx.kv.quantizer.ema_steps import recomputed
from rpqfx.kv.quantizer.encode import assign, decode, exact, walk
from rpqfx.kv.quantizer.groups import Groups
from rpqfx.kv.quantizer.kmeans_init import start
from rpqfx.kv.quantizer.losses import stage_losses
from rpqfx.kv.quantizer.moving_averages import Averaged, Batch, take_step


class Codes(NamedTuple):
    """The quantized form of vectors."""

    codes: Tensor
    """``[..., S]``, the narrowest integer."""
    scale: Tensor | None
    """``[...]``, the factor of each vector, or None."""


class Quantized(NamedTuple):
    """The result of a training step."""

    values: Tensor
    """``[..., dim]``: what the codes stand for; gradients go to the input as if nothing had been done to it."""
    codes: Tensor
    """``[..., S]``, the narrowest integer."""
    loss: Tensor
    """Scalar, float32: add it to the loss of the model."""


class VectorQuantizer(Averaged):
    """Residual vector quantisation of the last axis of a tensor, as of keys or values of attention heads.

    A vector is cut into ``M = dim / codebook_dim`` groups of channels, and each group is the sum of an entry of each of
    its stages (vqllm, "Residual vector quantization for KV cache compression in large language model", 2024, arXiv
    2410.15704). Codebooks start at random; ``fit`` gives them a k-means start. Afterwards they train by the gradient
    of the loss, or with ``decay`` as moving averages (van den Oord et al., 2017, arXiv 1711.00937; Razavi et al.,
    2019, arXiv 1906.00446), in training mode at every call of ``forward``.

    Distances, averages and losses are float32 (float64 for float64) whatever the dtypes, under autocast as well.

    Args:
        dim: Channels of a vector.
        codebook_dim: ``d``, channels of a group. Divides ``dim``.
        codebook_size: ``K``, entries of a codebook, 2 to 65,536.
        stages: Residual stages: one number, or one for each group. A group without any is always zero.
        shared_stages: Stages in a row that share a codebook. Divides all numbers of stages.
        shared: Whether all groups use the same codebooks.
        strided: Whether channel ``c`` belongs to group ``c % M``; else groups are runs of channels.
        normalize: Whether each vector is divided by its standard deviation first (the population's; by 1 where it is
            0). To gradients it is a constant.
        use_cosine_sim: Whether a stage takes the entry of the largest cosine with what is left (of several, the first),
            not the nearest. What it takes off is the entry itself, whatever its length.
        beam: Sums that go on from stage to stage. By cosine there is one.
        decay: How much of the moving averages stays from step to step; None trains codebooks by gradient.
        threshold_ema_dead_code: Entries whose average count falls below this become random inputs of the batch; 0 for
            never.
        commitment: Weight of the part of the loss that draws inputs to their entries.
        seed: Of the inputs that entries are revived by.
        device: Where the codebooks go.
        dtype: Of the codebooks, floating.

    Raises:
        SpecError: If a number is out of range or does not divide.
        InputError: If the dtype is not a real floating one.
    """

    codebooks: nn.Parameter
    """``[R / shared_stages, G, K, d]``: ``R`` the most stages of a group, ``G`` 1 if shared or ``M``. See ``books``."""

    def __init__(
        self,
        dim: int,
        *,
        codebook_dim: int = 8,
        codebook_size: int = 256,
        stages: int | Sequence[int] = 2,
        shared_stages: int = 1,
        shared: bool = True,
        strided: bool = False,
        normalize: bool = False,
        use_cosine_sim: bool = False,
        beam: int = 8,
        decay: float | None = None,
        threshold_ema_dead_code: float = 0.0,
        commitment: float = 0.25,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layout = Groups.make(dim, codebook_dim, stages, codebook_size, shared, strided)
        self.shared_stages, self.normalize, self.use_cosine_sim = shared_stages, normalize, use_cosine_sim
        self.beam, self.decay, self.commitment, self.seed = beam, decay, commitment, seed
        self.threshold_ema_dead_code = threshold_ema_dead_code
        if shared_stages < 1 or any(own % shared_stages for own in self.layout.stages):
            raise SpecError(f"shared_stages {shared_stages} does not divide {sorted(set(self.layout.stages))} stages")
        if beam < 1:
            raise SpecError(f"beam is at least 1, got {beam}")
        if decay is not None and not 0 <= decay < 1:
            raise SpecError(f"decay is from 0 to less than 1, got {decay}")
        if threshold_ema_dead_code and decay is None:
            raise SpecError("threshold_ema_dead_code is an average count of an entry's uses, and needs a decay")
        for name, value in (("threshold_ema_dead_code", threshold_ema_dead_code), ("commitment", commitment)):
            if not value >= 0:
                raise SpecError(f"{name} is not negative, got {value}")
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise InputError(f"codebooks are floating point, got {dtype}")
        used = self.layout.codebooks_shape
        shape = (used[0] // shared_stages, *used[1:])
        self.codebooks = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=decay is None)
        self._register_averages(shape, device)
        self.reset_parameters()

    @property
    def dim(self) -> int:
        """Channels of a vector."""
        return self.layout.dim

    @property
    def slots(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The group and the stage of each of the ``S`` codes of a vector."""
        return self.layout.slot_groups, self.layout.slot_stages

    @property
    def books(self) -> Tensor:
        """``[R, G, K, d]``: the codebooks of each stage. These are ``codebooks``, if none is repeated."""
        return self.codebooks if self.shared_stages == 1 else self.codebooks.repeat_interleave(self.shared_stages, 0)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws normal entries: of variance 1, less at each later stage as far as ``K`` entries can lessen it."""
        self.codebooks.normal_()
        for i, books in enumerate(self.codebooks):
            stage = i * self.shared_stages
            books *= self.layout.codebook_size ** (-stage / self.layout.codebook_dim)
            for group, own in enumerate(self.layout.stages if len(books) > 1 else ()):
                if own <= stage:
                    books[group] = 0
        self._average_from(None)

    def fit(self, points: Tensor, weights: Tensor | None = None, *, seed: int = 0, steps: int = 10) -> VectorQuantizer:
        """Starts the codebooks by k-means, each on at most 100,000 of the sub-vectors.

        What is made small is the weighted squared error of the points themselves, so with ``normalize`` those of a
        large scale count for more.

        Args:
            points: ``[N, dim]``, floating and finite, ``N >= 1``.
            weights: ``[N]`` or ``[N, M]``, finite and not negative: how much squared errors count.
            seed: Of the sample and of k-means.
            steps: Steps of k-means at most, and rounds over the stages at most.

        Returns:
            Itself.

        Raises:
            InputError: If points or weights are not as said.
        """
        check_points(points, weights, self.dim, self.layout.groups)
        with torch.no_grad(), exact(points):
            parts, scale = self._parts(points)
            shape = (len(points), self.layout.groups)
            if weights is not None:
                weights = weights.to(parts).view(len(points), -1).expand(shape)
            if scale is not None:
                square = scale.square()[:, None].expand(shape)
                weights = square if weights is None else weights * square
            books, counts = start(
                parts, weights, self.layout, shared_stages=self.shared_stages, beam=self.beam,
                use_cosine_sim=self.use_cosine_sim, seed=seed, steps=steps,
            )  # fmt: skip
            self.codebooks.copy_(books[:: self.shared_stages])
            self._average_from(self._each_book(counts).clamp_min(1))
        return self

    @torch.no_grad()
    def encode(self, x: Tensor) -> Codes:
        """Returns the codes of vectors.

        Args:
            x: ``[..., dim]``, floating.

        Returns:
            Codes ``[..., S]``, ordered as ``slots``, and with ``normalize`` the scale ``[...]`` (float32, or float64).

        Raises:
            InputError: If x is not floating or not ``dim`` wide.
        """
        check_vectors(x, self.dim)
        parts, scale = self._parts(x)
        codes = assign(parts, self.books.to(parts.dtype), self.layout, self.beam, self.use_cosine_sim)
        return Codes(self._narrow(codes, x), None if scale is None else scale.view(x.shape[:-1]))

    def decode(self, codes: Tensor, scale: Tensor | None = None) -> Tensor:
        """Returns the vectors that codes stand for.

        Args:
            codes: ``[..., S]``, an integer.
            scale: ``[...]``, with ``normalize``.

        Returns:
            ``[..., dim]`` of the codebooks' dtype.

        Raises:
            InputError: If the codes are not integers or not ``S`` wide, or the scale is missing or one too many.
            CodeError: If a code is out of range (on a CPU; elsewhere looking would wait for the device).
        """
        self.layout.check_codes(codes)
        if (scale is not None) != self.normalize:
            raise InputError("this quantizer has a scale, give it" if self.normalize else "this quantizer has no scale")
        if scale is not None and scale.shape != codes.shape[:-1]:
            raise InputError(f"scale is {list(scale.shape)}, expected {list(codes.shape[:-1])}")
        parts = decode(_rows(codes), self.books, self.layout)
        values = self.layout.join(parts).view(*codes.shape[:-1], self.dim)
        return values if scale is None else (values * scale[..., None]).to(values.dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None, batches: list[Batch] | None = None) -> Quantized:
        """Returns the decoded vectors, with straight-through gradients.

        The loss adds up all stages. Of each it is the squared distance of what is left to the entry, averaged over
        tokens and groups: ``commitment`` times that, with gradients to the input alone, and where codebooks train by
        gradient once more, with gradients to the entries alone. In training mode with a ``decay``, the moving
        averages take a step, at once; what activation checkpointing runs again in a backward pass takes none.

        Args:
            x: ``[..., dim]``, floating.
            mask: ``[...]`` bool or what expands to that, False for tokens that count neither in the loss nor in
                averages: padding. Their values are quantised like others.
            batches: Gets, in training mode with a ``decay``, what the averages are to take a step by, which they then
                do not take by themselves: ``rpqfx.kv.quantizer.moving_averages.take_step`` does.

        Raises:
            InputError: If x is not floating or not ``dim`` wide, or the mask does not go with it.
        """
        check_vectors(x, self.dim)
        with exact(x):
            parts, scale = self._parts(x)
            books = self.books.to(parts.dtype)
            codes = assign(parts.detach(), books.detach(), self.layout, self.beam, self.use_cosine_sim)
            counted = counted_tokens(x, mask)
            steps = list(walk(parts, codes, books, self.layout))
            loss = stage_losses(steps, counted, self.layout, self.commitment, by_gradient=self.decay is None)
            values = self.layout.join(decode(codes, books.detach(), self.layout))
            values = (values if scale is None else values * scale[:, None]).view(x.shape).to(x.dtype)
            if self.training and self.decay is not None:
                if batches is not None:
                    batches.append(self._batch(steps, counted))
                elif not recomputed():
                    take_step([self._batch(steps, counted)])
        # Not x + (values - x): that would round the values. What is added is zero, with the gradient of x.
        return Quantized(values + (x - x.detach()), self._narrow(codes, x), loss)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns sub-vectors ``[T, M, d]`` as they are quantised, and the scales ``[T]``."""
        rows = _rows(x).to(torch.promote_types(x.dtype, torch.float32))
        if not self.normalize:
            return self.layout.split(rows), None
        given = rows.detach()
        scale = (given - given.mean(1, keepdim=True)).square().mean(1).sqrt()
        scale = torch.where(scale == 0, 1, scale)
        return self.layout.split(rows / scale[:, None]), scale

    def _narrow(self, codes: Tensor, x: Tensor) -> Tensor:
        return codes.to(code_dtype(self.layout.codebook_size)).view(*x.shape[:-1], self.layout.count)

    def extra_repr(self) -> str:
        """Returns the text that printing shows."""
        layout = self.layout
        even = len(set(layout.stages)) == 1
        shown = [
            f"{layout.dim}, codebook_dim={layout.codebook_dim}, codebook_size={layout.codebook_size}",
            f"stages={layout.stages[0] if even else list(layout.stages)}",
            f"shared_stages={self.shared_stages}" if self.shared_stages > 1 else "",
            "strided" if layout.strided else "",
            *(name for name in ("normalize", "use_cosine_sim") if getattr(self, name)),
            "shared" if layout.shared else "own codebooks",
            f"beam={self.beam}" if not self.use_cosine_sim else "",
            f"decay={self.decay}" if self.decay is not None else "",
        ]
        return ", ".join(part for part in shown if part)


def _rows(x: Tensor) -> Tensor:
    """Returns ``[T, width]``, of widths of zero, too."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])
