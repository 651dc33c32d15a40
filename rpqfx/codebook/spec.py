"""The shape of one quantized matrix, and the arithmetic of its sizes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rpqfx.codebook.tiles import MOST_ENTRIES, tiles_shape
from rpqfx.errors import SpecError
from rpqfx.validation.values import shown

MAX_ENTRIES = 65_536
GradScale = Literal["sum", "sqrt", "mean"]


@dataclass(frozen=True)
class CodebookSpec:
    """The shape of one quantized matrix.

    Args:
        num_vectors: ``N``, the number of vectors.
        dim: ``D``, the length of a vector.
        codebook_dim: ``d``, the length of a sub-vector. Divides ``dim``.
        entries: ``K``, the entries of a codebook, 2 to 65,536.
        stages: ``R``, residual stages that are summed.
        num_codebooks: ``G``, codebooks per stage. Divides the number of sub-vectors; ``None`` means one for each.
        scale: Whether each vector has a trainable factor.
        signs: Whether each use of an entry has a random, fixed sign (one bit).
        grad_scale: How the gradients of the vectors that share an entry are gathered: their ``"sum"``, the sum
            divided by the square root of their mean number (``"sqrt"``), or their ``"mean"``.
        column_scale_group: How many consecutive elements of a vector share a trainable factor, which all vectors have:
            1 for a factor each (a Linear's inputs), a filter's taps for one a channel, 0 for none. Divides ``dim``.
        tiled: Whether codes lie in memory in tiles, two to a byte (``rpqfx.codebook.tiles``), which products with few
            rows read fastest. Takes at most 16 entries, at least two stages, and no signs.

    Raises:
        SpecError: If a number is out of range or does not divide.
    """

    num_vectors: int
    dim: int
    codebook_dim: int
    entries: int = 256
    stages: int = 1
    num_codebooks: int | None = None
    scale: bool = False
    signs: bool = False
    grad_scale: GradScale = "sum"
    column_scale_group: int = 0
    tiled: bool = False

    def __post_init__(self) -> None:
        for name in ("num_vectors", "dim", "codebook_dim", "entries", "stages", "num_codebooks", "column_scale_group"):
            value = getattr(self, name)
            if not isinstance(value, int) and (value is not None or name != "num_codebooks"):
                raise SpecError(f"{name} is a whole number, got {shown(value)}")
        for name in ("num_vectors", "dim", "codebook_dim", "stages"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 2 <= self.entries <= MAX_ENTRIES:
            raise SpecError(f"a codebook has 2 to {MAX_ENTRIES} entries (1 to 16 bits), got {self.entries}")
        if self.dim % self.codebook_dim:
            near = nearest_divisor(self.dim, self.codebook_dim)
            raise SpecError(
                f"codebook_dim {self.codebook_dim} does not divide the vector length {self.dim}; "
                f"the nearest that does is {near} ({self.dim // near} sub-vectors)"
            )
        if self.num_codebooks is None:
            object.__setattr__(self, "num_codebooks", self.num_subvectors)
        if self.num_codebooks < 1 or self.num_subvectors % self.num_codebooks:  # type: ignore[operator]
            raise SpecError(
                f"{self.num_codebooks} codebooks cannot be shared evenly by {self.num_subvectors} sub-vectors"
            )
        if self.grad_scale not in ("sum", "sqrt", "mean"):
            raise SpecError(f"grad_scale is 'sum', 'sqrt' or 'mean', got {self.grad_scale!r}")
        if self.column_scale_group < 0 or (self.column_scale_group and self.dim % self.column_scale_group):
            raise SpecError(
                "column_scale_group is 0 or how many elements of a vector share a factor, which divides its length "
                f"{self.dim}; got {self.column_scale_group}"
            )
        if self.tiled and (self.entries > MOST_ENTRIES or self.stages < 2 or self.signs):
            raise SpecError(
                f"tiles hold codes of at most {MOST_ENTRIES} entries, of two stages or more, without signs; got "
                f"{self.entries} entries, {self.stages} stages, signs={self.signs}: leave tiled out"
            )

    @classmethod
    def make(
        cls,
        num_vectors: int,
        dim: int,
        *,
        codebook_dim: int | None = None,
        num_subvectors: int | None = None,
        taps: int = 1,
        codebook_bits: int | None = None,
        stages: int = 1,
        sharing: Literal["own", "layer"] = "own",
        scale: bool = False,
        signs: bool = False,
        grad_scale: GradScale = "sum",
        column_scale: bool = False,
    ) -> CodebookSpec:
        """Returns a spec from what a person says of a layer.

        Args:
            num_vectors: ``N``.
            dim: ``D``.
            codebook_dim: ``d``; left out, ``default_codebook_dim``.
            num_subvectors: ``M`` instead of ``codebook_dim``.
            taps: Positions of a filter, where the vectors are filters of a convolution.
            codebook_bits: ``log2(K)``, 1 to 16; left out, 8 or as many as the layer has vectors for.
            stages: ``R``.
            sharing: One codebook for each sub-vector (``"own"``) or one for the layer (``"layer"``).
            scale: As in the class.
            signs: As in the class.
            grad_scale: As in the class.
            column_scale: Whether each element of a vector, or each channel of a filter, has a trainable factor.

        Raises:
            SpecError: If both or neither of two exclusive numbers fit, something does not divide, or a codebook
                would have more entries than sub-vectors to serve.
        """
        if codebook_dim is not None and num_subvectors is not None:
            raise SpecError(f"give codebook_dim ({codebook_dim}) or num_subvectors ({num_subvectors}), not both")
        if num_subvectors is not None:
            if num_subvectors < 1 or dim % num_subvectors:
                near = dim // nearest_divisor(dim, max(1, dim // max(1, num_subvectors)))
                raise SpecError(
                    f"num_subvectors {num_subvectors} does not divide the vector length {dim}; the nearest that does "
                    f"is {near}"
                )
            codebook_dim = dim // num_subvectors
        if codebook_dim is None:
            codebook_dim = default_codebook_dim(dim, taps)
        served = num_vectors if sharing == "own" else num_vectors * dim // max(1, codebook_dim)
        if codebook_bits is None:
            codebook_bits = max(1, min(8, served.bit_length() - 1))
        if not 1 <= codebook_bits <= 16:
            raise SpecError(f"codebook_bits is 1 to 16 (2 to {MAX_ENTRIES} entries), got {codebook_bits}")
        if 2**codebook_bits > max(2, served):
            raise SpecError(
                f"{2**codebook_bits} entries (codebook_bits={codebook_bits}) for {served} sub-vectors: a codebook "
                f"larger than what it serves; use at most {max(1, served.bit_length() - 1)} bits or leave the layer "
                "dense"
            )
        num_codebooks = None if sharing == "own" else 1
        shared = taps if column_scale else 0
        return cls(
            num_vectors, dim, codebook_dim, 2**codebook_bits, stages, num_codebooks, scale, signs, grad_scale, shared
        )

    @property
    def num_subvectors(self) -> int:
        """``M``, the number of sub-vectors of a vector."""
        return self.dim // self.codebook_dim

    @property
    def codebook_bits(self) -> int:
        """Bits that one code takes, ``ceil(log2(K))``."""
        return (self.entries - 1).bit_length()

    @property
    def code_dtype(self) -> torch.dtype:
        """The narrowest torch integer that holds the codes."""
        return code_dtype(self.entries)

    @property
    def codebooks_shape(self) -> tuple[int, int, int, int]:
        """``(R, G, K, d)``."""
        return (self.stages, self.num_codebooks or self.num_subvectors, self.entries, self.codebook_dim)

    @property
    def codes_shape(self) -> tuple[int, int, int]:
        """``(R, M, N)``."""
        return (self.stages, self.num_subvectors, self.num_vectors)

    @property
    def stored_codes_shape(self) -> tuple[int, int, int]:
        """The shape of codes as they lie in memory: ``codes_shape``, or that of their tiles."""
        return tiles_shape(*self.codes_shape) if self.tiled else self.codes_shape

    @property
    def signs_shape(self) -> tuple[int, int, int]:
        """``(R, M, ceil(N / 8))``."""
        return (self.stages, self.num_subvectors, -(-self.num_vectors // 8))

    @property
    def num_column_scales(self) -> int:
        """How many factors the elements of a vector have (see ``column_scale_group``); 0 for none."""
        return self.dim // self.column_scale_group if self.column_scale_group else 0

    @property
    def users_per_entry(self) -> float:
        """How many sub-vectors share one entry, on average: ``M * N / (G * K)``."""
        return math.prod(self.codes_shape[1:]) / math.prod(self.codebooks_shape[1:3])

    @property
    def grad_factor(self) -> float:
        """Factor of the summed gradient of an entry (see ``grad_scale``)."""
        if self.grad_scale == "sum":  # asked for at every call of a layer
            return 1.0
        power = 0.5 if self.grad_scale == "sqrt" else 1.0
        return float(max(self.users_per_entry, 1.0) ** -power)

    def stored_bytes(self, dtype: torch.dtype = torch.float32, *, codebooks: bool = True) -> int:
        """Returns the bytes of all stored tensors, with codebooks and factors in ``dtype``.

        Args:
            dtype: The floating dtype.
            codebooks: Leave out the codebooks where False (they are counted with another layer that shares them).
        """
        total = math.prod(self.stored_codes_shape) * self.code_dtype.itemsize
        total += math.prod(self.codebooks_shape) * dtype.itemsize if codebooks else 0
        total += ((self.num_vectors if self.scale else 0) + self.num_column_scales) * dtype.itemsize
        return total + (math.prod(self.signs_shape) if self.signs else 0)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CodebookSpec:
        """Returns the inverse of ``to_dict``."""
        return cls(**values)


def code_dtype(entries: int) -> torch.dtype:
    """Returns the narrowest torch integer that holds the codes of ``entries`` entries.

    Args:
        entries: ``K``.

    Returns:
        uint8, int16 or uint16 (int16 before uint16: more torch operators take it).
    """
    if entries <= 256:
        return torch.uint8
    return torch.int16 if entries <= 32_768 else torch.uint16


def nearest_divisor(dim: int, target: int) -> int:
    """Returns the divisor of ``dim`` nearest to ``target`` on a log scale, the smaller of two equally near.

    Args:
        dim: The number to divide, at least 1.
        target: The divisor that is wanted, at least 1.

    Returns:
        A divisor of ``dim``; always exists, since 1 and ``dim`` are divisors.
    """
    divisors = {d for i in range(1, math.isqrt(dim) + 1) if dim % i == 0 for d in (i, dim // i)}
    return min(divisors, key=lambda d: (max(d, target) / min(d, target), d))


def default_codebook_dim(dim: int, taps: int = 1) -> int:
    """Returns the length of a sub-vector where none is given: the divisor of ``dim`` nearest to 64.

    The sub-vectors of filters are blocks of whole channels, so that a convolution can contract, where such a divisor is
    within a factor of two of 64.

    Args:
        dim: ``D``.
        taps: Positions of a filter; divides ``dim``. 1 for what is no convolution.

    Returns:
        A divisor of ``dim``: 72 for 3 x 3 filters of 256 channels, 64 for 1 x 1 filters.
    """
    whole = [d for d in range(taps, min(dim, 128) + 1, taps) if dim % d == 0 and d >= 32]
    return min(whole, key=lambda d: (max(d, 64) / min(d, 64), d), default=nearest_divisor(dim, 64))
