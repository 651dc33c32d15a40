"""The keys, or the values, of one layer's heads as codes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from einops import rearrange
from torch import Tensor, nn

from rpqfx.errors import SpecError
from rpqfx.kv.coder.coded import Coded
from rpqfx.kv.coder.transform import Map
from rpqfx.kv.quantizer.moving_averages import Batch
from rpqfx.kv.quantizer.options import QuantizerOptions
from rpqfx.kv.quantizer.quantizer import VectorQuantizer
from rpqfx.validation.spelling import defaults_of, show_options


class HeadCoder(nn.Module):
    r"""Codes of vectors ``x [B, H, T, D]``, with a linear map between code space and channels.

        x_hat[b, h, t] = scale[b, h, t] * (y[b, p, t] @ basis[h]) + mean[h]

    ``p`` is the part that the head belongs to: all heads are one part and share codes (``joint``), or each is its own.
    ``y`` is what a [`VectorQuantizer`][rpqfx.kv.quantizer.quantizer.VectorQuantizer] makes of
    ``((x - mean) / scale) @ analysis``. A query is multiplied with the basis once, so tokens never are
    (``rpqfx.kv.attention.attend``). Coding where coordinates are uncorrelated, with more bits where there is more
    energy and none where there is little, is transform coding (Huang and Schultheiss, "Block Quantization of Correlated
    Gaussian Random Variables", 1963; Goyal, "Theoretical Foundations of Transform Coding", 2001).

    Args:
        heads: ``H``.
        dim: ``D``.
        codebook_dim: ``d``.
        codebook_size: ``K``.
        stages: Residual stages of each sub-vector: one number for all, or ``P * G`` of them, ``G`` for each part.
        transform: Whether there are maps and a mean; without them ``y`` is ``x`` in its own channels.
        joint: Whether heads share codes; takes a transform, and no scale, which each head has its own of.
        strided: Sub-vector ``g`` of a head has its channels ``g, g + D/d, ...`` instead of neighbours.
        normalize: Whether each token and head has a scale, its standard deviation (0 counts as 1).
        device: Of the tensors.
        dtype: Of the tensors.
        **options: Of the quantiser: ``use_cosine_sim``, ``beam``, ``decay``, ...

    Raises:
        SpecError: If the numbers do not go together.
    """

    def __init__(
        self,
        heads: int,
        dim: int,
        *,
        codebook_dim: int = 8,
        codebook_size: int = 256,
        stages: int | Sequence[int] = 2,
        transform: bool = True,
        joint: bool = True,
        strided: bool = False,
        normalize: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[QuantizerOptions],
    ) -> None:
        super().__init__()
        joint = joint and transform and not normalize
        self.parts = 1 if joint else heads
        width = heads * dim // self.parts
        if width % codebook_dim:
            raise SpecError(f"sub-vectors of {codebook_dim} do not divide {width} channels")
        if transform and strided:
            raise SpecError("channels are strided only where there is no transform, which mixes them anyway")
        self.heads, self.dim, self.codebook_dim, self.width = heads, dim, codebook_dim, width
        self.strided, self.normalize = strided, normalize
        self._options: dict[str, Any] = {
            "codebook_dim": codebook_dim,
            "codebook_size": codebook_size,
            "device": device,
            "dtype": dtype,
            **options,
        }
        groups = self.parts * width // codebook_dim
        each = (stages,) * groups if isinstance(stages, int) else tuple(stages)
        self.analysis: Map | None = None
        self.synthesis: Map | None = None
        self.mean: nn.Parameter | None = None
        self._device = device
        if transform:
            self.mean = nn.Parameter(torch.zeros(heads, dim, device=device, dtype=dtype))
            self._size_maps(len(each), 0)
            assert self.analysis is not None and self.synthesis is not None
            eye = torch.eye(width, len(each) * codebook_dim // self.parts).expand(self.parts, -1, -1)
            self.analysis.set(eye.mT)
            self.synthesis.set(eye.mT)
        self._size_quantizer(each)

    def _size_maps(self, groups: int, fine: int) -> None:
        inner = groups // self.parts * self.codebook_dim
        self.analysis = Map(self.parts, inner, self.width, fine, device=self._device)
        self.synthesis = Map(self.parts, inner, self.width, fine, device=self._device)

    def _size_quantizer(self, stages: Sequence[int]) -> None:
        self.quantizer = VectorQuantizer(len(stages) * self.codebook_dim, stages=tuple(stages), **self._options)
        self.quantizer.train(self.training)
        groups, numbers = self.quantizer.slots
        books = self.quantizer.codebooks.shape[1]
        each = len(stages) // self.parts  # sub-vectors of a part
        self.slot_groups = tuple(int(group) % each for group in groups)
        self.slot_books = tuple(
            int(stage) * books + (int(group) if books > 1 else 0) for group, stage in zip(groups, numbers, strict=True)
        )
        counts = [sum(int(group) // each == part for group in groups) for part in range(self.parts)]
        self.head_slots = tuple(itertools.accumulate(counts, initial=0))

    @property
    def codebook_size(self) -> int:
        """``K``."""
        return self.quantizer.codebooks.shape[2]

    @property
    def books(self) -> Tensor:
        """All codebooks, ``[P', K, d]``; ``slot_books`` says which a slot uses."""
        return self.quantizer.codebooks.flatten(0, 1)

    @property
    def code_count(self) -> int:
        """``S``, codes of a token, all heads together."""
        return len(self.slot_books)

    @property
    def basis(self) -> Tensor | None:
        """The map out of code space for each head, ``[H, G * d, D]``, or None where channels are as they are."""
        if self.synthesis is not None:
            return rearrange(self.synthesis(torch.float32), "p k (h d) -> (p h) k d", d=self.dim)
        if not self.strided:
            return None
        eye = torch.eye(self.dim, device=self.books.device).view(-1, self.dim // self.codebook_dim, self.dim)
        return eye.transpose(0, 1).reshape(1, self.dim, self.dim).expand(self.heads, -1, -1)

    def extra_repr(self) -> str:
        """Returns the text that ``print`` shows."""
        return f"heads={self.heads}, dim={self.dim}, codes={self.code_count}, codebook_size={self.codebook_size}"

    @torch.no_grad()
    def set_transform(
        self,
        analysis: Tensor,
        synthesis: Tensor,
        mean: Tensor,
        stages: Sequence[int],
        codebooks: nn.Parameter,
        fine: int = 0,
        counts: Tensor | None = None,
    ) -> None:
        """Takes on the maps that calibration found.

        Args:
            analysis: ``[P, H * D / P, G * d]``.
            synthesis: ``[P, G * d, H * D / P]``.
            mean: ``[H, D]``.
            stages: ``[P * G]``.
            codebooks: ``[R, 1, K, d]``, which other coders may hold as well.
            fine: Coordinates of each part, the first, whose rows of the maps have sixteen bits.
            counts: ``[R, 1, K]``, points that chose each entry, from which moving averages go on.
        """
        assert self.mean is not None
        self._size_maps(len(stages), fine)
        assert self.analysis is not None and self.synthesis is not None
        self.analysis.set(analysis.mT)
        self.synthesis.set(synthesis)
        self.mean.copy_(mean)
        self._size_quantizer(stages)
        self.quantizer.adopt(codebooks, counts)

    def fit(self, x: Tensor, *, seed: int = 0) -> None:
        """Fits codebooks to vectors, the maps as they are.

        Args:
            x: ``[B, H, T, D]``.
            seed: Of the codebooks.
        """
        y, _ = self.to_code_space(x)
        self.quantizer.fit(y.flatten(0, 1), seed=seed)

    def to_code_space(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns ``y``, the coordinates that are coded.

        Args:
            x: ``[B, H, T, D]``.

        Returns:
            ``[B, T, P * G * d]`` and the scale ``[B, H, T]``, or None.
        """
        scale = None
        if self.mean is not None:
            x = x - self.mean[:, None].to(x.dtype)
        if self.normalize:
            scale = x.detach().float().std(-1, correction=0).to(torch.float16)
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            x = x / scale[..., None].to(x.dtype)
        if self.analysis is None:
            order = "b h t (d g) -> b t (h g d)" if self.strided else "b h t (g d) -> b t (h g d)"
            return rearrange(x, order, d=self.codebook_dim), scale
        y = rearrange(x, "b (p h) t d -> b p t (h d)", p=self.parts) @ self.analysis(x.dtype).mT
        return rearrange(y, "b p t k -> b t (p k)"), scale

    def from_code_space(self, y: Tensor, scale: Tensor | None) -> Tensor:
        """Returns vectors ``[B, H, T, D]`` of coordinates: the inverse of ``to_code_space``."""
        if self.synthesis is None:
            order = "b t (h g d) -> b h t (d g)" if self.strided else "b t (h g d) -> b h t (g d)"
            x = rearrange(y, order, h=self.heads, d=self.codebook_dim)
        else:
            x = rearrange(y, "b t (p k) -> b p t k", p=self.parts) @ self.synthesis(y.dtype)
            x = rearrange(x, "b p t (h d) -> b (p h) t d", d=self.dim)
        if scale is not None:
            x = x * scale[..., None].to(x.dtype)
        return x if self.mean is None else x + self.mean[:, None].to(x.dtype)

    def encode(self, x: Tensor) -> Coded:
        """Returns the codes of vectors.

        Args:
            x: ``[B, H, T, D]``.
        """
        y, scale = self.to_code_space(x)
        return Coded(self.quantizer.encode(y).codes.transpose(1, 2), scale)

    def decode(self, codes: Tensor, scale: Tensor | None = None) -> Tensor:
        """Returns the vectors of codes, ``[B, H, T, D]``.

        Args:
            codes: ``[B, S, T]``.
            scale: ``[B, H, T]``, where there is one.
        """
        return self.from_code_space(self.quantizer.decode(codes.transpose(1, 2)), scale)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, batches: list[Batch] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns vectors after coding, straight through for gradients, and the quantiser's loss.

        What coding loses reaches the gradient of ``x`` as if nothing were lost (Bengio et al., 1308.3432).

        Args:
            x: ``[B, H, T, D]``.
            mask: ``[B, T]``, true for tokens that count (others are padding), or None.
            batches: As in ``VectorQuantizer.forward``.
        """
        y, scale = self.to_code_space(x)
        made = self.quantizer(y, mask, batches)
        decoded = self.from_code_space(made.values.detach(), scale)
        return decoded + (x - x.detach()), made.loss

    def get_extra_state(self) -> Tensor:
        """Returns how large the coder is, as a tensor, since the formats of state dicts know nothing else.

        Returns:
            ``[1 + S]`` int64: the dimensions that the analysis keeps fine, and the stages of each sub-vector.
        """
        return torch.tensor([0 if self.analysis is None else self.analysis.fine, *self.quantizer.layout.stages])

    def set_extra_state(self, state: Tensor) -> None:
        """Makes the coder as large as another one.

        Args:
            state: What ``get_extra_state`` of that one returned.
        """
        fine, *stages = state.tolist()
        self.resize(stages, fine)

    def resize(self, stages: Sequence[int], fine: int) -> None:
        """Makes maps and codes as large as those of another coder; the codebooks stay.

        Args:
            stages: Of each sub-vector.
            fine: Dimensions that the analysis keeps fine; 0 where there is no transform.
        """
        if [fine, *stages] == self.get_extra_state().tolist():
            return
        before = self.quantizer
        if self.analysis is not None:
            self._size_maps(len(stages), fine)
        self._size_quantizer(tuple(stages))
        self.quantizer.adopt(before.codebooks, before.ema_counts)


show_options(HeadCoder.__init__, QuantizerOptions, defaults_of(VectorQuantizer))
