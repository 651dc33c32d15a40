r"""The heart of rpqfx: a matrix that is never stored, and the four ways to use it.

A weight is seen as ``N`` vectors of length ``D`` (the rows of a Linear, the entries of an Embedding, the filters
of a convolution). Each vector is cut into ``M`` sub-vectors of length ``d``, and each sub-vector is an entry of a
small codebook, or a sum of one entry per residual stage:

    W[n, m*d:(m+1)*d] = scale[n] * sum_r sign[r,m,n] * codebooks[r, g(m), codes[r,m,n], :]

Axes, in this order wherever they meet:

    R  residual stages           M  sub-vectors per vector (M * d = D)     N  vectors
    G  codebooks per stage       K  entries per codebook                   d  length of a sub-vector
    S  sub-vectors per codebook  (G * S = M, so g(m) = m // S: own codebooks G = M, one for the layer G = 1)

The stored tensors are ``codebooks [R, G, K, d]`` (floating), ``codes [R, M, N]`` (the narrowest integer), and two
optional ones, ``scale [N]`` and ``signs [R, M, ceil(N/8)]`` (one bit each, a set bit means minus).

With the matrix product written as the form ``sum_bn y[b,n] * x[b,:] . W[n,:]``, which is linear in ``x``, in ``y``
and in the codebooks, its three partial derivatives are the three products of training: ``contract`` (the
layer), ``contract_t`` (the gradient of its input) and ``accumulate`` (the gradient of its codebooks). None
makes ``W``. This is asymmetric distance computation (Jegou, Douze, Schmid, "Product Quantization for Nearest
Neighbor Search", 2011, section III) used as a layer.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from rpqfx.errors import InputError, SpecError

MAX_ENTRIES = 65_536
GradScale = Literal["sum", "sqrt", "mean"]

# Elements of the table of dot products that is alive at a time; larger batches are worked off in blocks of rows.
_TABLE_ELEMENTS = 2**24
# Up to this many rows a scatter into bins beats sorting the codes first (measured, CPU).
_SCATTER_ROWS = 48


@dataclass(frozen=True)
class CodebookSpec:
    """The shape of one codebook-held matrix.

    Args:
        num_vectors: ``N``, the number of vectors.
        dim: ``D``, the length of a vector.
        codebook_dim: ``d``, the length of a sub-vector. Divides ``dim``.
        entries: ``K``, the entries of a codebook, 2 to 65,536.
        stages: ``R``, residual stages that are summed.
        books: ``G``, codebooks per stage. Divides the number of sub-vectors; ``None`` means one for each.
        scale: Whether each vector has a trainable factor.
        signs: Whether each use of an entry has a random, fixed sign (one bit).
        grad_scale: How the gradients of the vectors that share an entry are gathered: their ``"sum"``, the sum
            divided by the square root of their mean number (``"sqrt"``), or their ``"mean"``.

    Raises:
        SpecError: If a number is out of range or does not divide.
    """

    num_vectors: int
    dim: int
    codebook_dim: int
    entries: int = 256
    stages: int = 1
    books: int | None = None
    scale: bool = False
    signs: bool = False
    grad_scale: GradScale = "sum"

    def __post_init__(self) -> None:
        for name in ("num_vectors", "dim", "codebook_dim", "stages"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 2 <= self.entries <= MAX_ENTRIES:
            raise SpecError(f"a codebook has 2 to {MAX_ENTRIES} entries (1 to 16 bits), got {self.entries}")
        if self.dim % self.codebook_dim:
            near = nearest_divisor(self.dim, self.codebook_dim)
            raise SpecError(
                f"codebook_dim {self.codebook_dim} does not divide the vector length {self.dim}; "
                f"the nearest that does is {near} ({self.dim // near} codebooks)"
            )
        if self.books is None:
            object.__setattr__(self, "books", self.sub_vectors)
        if self.books < 1 or self.sub_vectors % self.books:  # type: ignore[operator]
            raise SpecError(f"{self.books} codebooks cannot be shared evenly by {self.sub_vectors} sub-vectors")
        if self.grad_scale not in ("sum", "sqrt", "mean"):
            raise SpecError(f"grad_scale is 'sum', 'sqrt' or 'mean', got {self.grad_scale!r}")

    @classmethod
    def make(
        cls,
        num_vectors: int,
        dim: int,
        *,
        codebook_dim: int | None = None,
        codebooks: int | None = None,
        bits: int | None = None,
        stages: int = 1,
        sharing: Literal["own", "layer"] = "own",
        scale: bool = False,
        signs: bool = False,
        grad_scale: GradScale = "sum",
    ) -> CodebookSpec:
        """A spec from what a person says of a layer.

        Args:
            num_vectors: ``N``.
            dim: ``D``.
            codebook_dim: ``d``; left out, the divisor of ``dim`` nearest to 64.
            codebooks: ``M`` instead of ``codebook_dim``.
            bits: ``log2(K)``, 1 to 16; left out, 8 or as many as the layer has vectors for.
            stages: ``R``.
            sharing: One codebook for each sub-vector (``"own"``) or one for the layer (``"layer"``).
            scale: As in the class.
            signs: As in the class.
            grad_scale: As in the class.

        Raises:
            SpecError: If both or neither of two exclusive numbers fit, something does not divide, or a codebook
                would have more entries than sub-vectors to serve.
        """
        if codebook_dim is not None and codebooks is not None:
            raise SpecError(f"give codebook_dim ({codebook_dim}) or codebooks ({codebooks}), not both")
        if codebooks is not None:
            if codebooks < 1 or dim % codebooks:
                near = dim // nearest_divisor(dim, max(1, dim // max(1, codebooks)))
                raise SpecError(
                    f"{codebooks} codebooks do not divide the vector length {dim}; the nearest count that does: {near}"
                )
            codebook_dim = dim // codebooks
        if codebook_dim is None:
            codebook_dim = nearest_divisor(dim, 64)
        served = num_vectors if sharing == "own" else num_vectors * dim // max(1, codebook_dim)
        if bits is None:
            bits = max(1, min(8, served.bit_length() - 1))
        if not 1 <= bits <= 16:
            raise SpecError(f"bits is 1 to 16 (2 to {MAX_ENTRIES} entries), got {bits}")
        if 2**bits > max(2, served):
            raise SpecError(
                f"{2**bits} entries ({bits} bits) for {served} sub-vectors: a codebook larger than what it serves; "
                f"use at most {max(1, served.bit_length() - 1)} bits or leave the layer dense"
            )
        books = None if sharing == "own" else 1
        return cls(num_vectors, dim, codebook_dim, 2**bits, stages, books, scale, signs, grad_scale)

    @property
    def sub_vectors(self) -> int:
        """``M``, the number of sub-vectors of a vector."""
        return self.dim // self.codebook_dim

    @property
    def bits(self) -> int:
        """Bits that one code takes, ``ceil(log2(K))``."""
        return (self.entries - 1).bit_length()

    @property
    def code_dtype(self) -> torch.dtype:
        """The narrowest torch integer that holds the codes."""
        return code_dtype(self.entries)

    @property
    def codebooks_shape(self) -> tuple[int, int, int, int]:
        """``(R, G, K, d)``."""
        return (self.stages, self.books or self.sub_vectors, self.entries, self.codebook_dim)

    @property
    def codes_shape(self) -> tuple[int, int, int]:
        """``(R, M, N)``."""
        return (self.stages, self.sub_vectors, self.num_vectors)

    @property
    def signs_shape(self) -> tuple[int, int, int]:
        """``(R, M, ceil(N / 8))``."""
        return (self.stages, self.sub_vectors, -(-self.num_vectors // 8))

    @property
    def users_per_entry(self) -> float:
        """How many sub-vectors share one entry, on average: ``M * N / (G * K)``."""
        return math.prod(self.codes_shape[1:]) / math.prod(self.codebooks_shape[1:3])

    @property
    def grad_factor(self) -> float:
        """What the summed gradient of an entry is multiplied by (see ``grad_scale``)."""
        power = {"sum": 0.0, "sqrt": 0.5, "mean": 1.0}[self.grad_scale]
        return float(max(self.users_per_entry, 1.0) ** -power)

    def stored_bytes(self, dtype: torch.dtype = torch.float32, *, codebooks: bool = True) -> int:
        """Bytes of all stored tensors, with codebooks and scale in ``dtype``.

        Args:
            dtype: The floating dtype.
            codebooks: Leave out the codebooks where False (they are counted with another layer that shares them).
        """
        total = math.prod(self.codes_shape) * self.code_dtype.itemsize
        total += math.prod(self.codebooks_shape) * dtype.itemsize if codebooks else 0
        total += self.num_vectors * dtype.itemsize if self.scale else 0
        return total + (math.prod(self.signs_shape) if self.signs else 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CodebookSpec:
        """The inverse of ``to_dict``."""
        return cls(**values)


def code_dtype(entries: int) -> torch.dtype:
    """The narrowest torch integer that holds the codes of ``entries`` entries.

    Args:
        entries: ``K``.

    Returns:
        uint8, int16 or uint16 (int16 before uint16: more torch operators take it).
    """
    if entries <= 256:
        return torch.uint8
    return torch.int16 if entries <= 32_768 else torch.uint16


def nearest_divisor(dim: int, target: int) -> int:
    """The divisor of ``dim`` nearest to ``target`` on a log scale, the smaller of two equally near.

    Args:
        dim: The number to divide, at least 1.
        target: The divisor asked for, at least 1.

    Returns:
        A divisor of ``dim``; always exists, since 1 and ``dim`` are divisors.
    """
    divisors = {d for i in range(1, math.isqrt(dim) + 1) if dim % i == 0 for d in (i, dim // i)}
    return min(divisors, key=lambda d: (max(d, target) / min(d, target), d))


# ---------------------------------------------------------------------------------------- the four functions


def expand(codebooks: Tensor, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None) -> Tensor:
    """The matrix itself.

    Args:
        codebooks: ``[R, G, K, d]``.
        codes: ``[R, M, N]``, integer.
        scale: ``[N]`` or None.
        signs: ``[R, M, ceil(N/8)]`` uint8, packed by ``pack_signs``, or None.

    Returns:
        ``W [N, D]``, of the codebooks' dtype.

    Raises:
        InputError: If the codebooks are complex.
    """
    codebooks, codes = _fold_signs(_real(codebooks), codes, signs)
    rows = _entries(codebooks, codes)
    return rows if scale is None else rows * scale[:, None]


def lookup(
    ids: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None
) -> Tensor:
    """Some rows of the matrix, ``W[ids]``, at the cost of those rows alone.

    Args:
        ids: Integer tensor of any shape, values 0 to N - 1.
        codebooks: ``[R, G, K, d]``.
        codes: ``[R, M, N]``.
        scale: ``[N]`` or None.
        signs: Packed signs or None.

    Returns:
        ``[*ids.shape, D]``.

    Raises:
        InputError: If the codebooks are complex.
    """
    flat = ids.reshape(-1)
    bits = None if signs is None else pack_signs(unpack_signs(signs, codes.shape[-1]).index_select(-1, flat))
    factors = None if scale is None else scale.index_select(0, flat)
    rows = expand(codebooks, codes.index_select(-1, flat), factors, bits)
    return rows.reshape(*ids.shape, rows.shape[-1])


def contract(
    x: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None
) -> Tensor:
    """``x @ W.T`` without ``W``: dot each sub-vector of ``x`` with every entry, then gather and sum.

    Args:
        x: ``[..., D]``.
        codebooks: ``[R, G, K, d]``, of ``x``'s dtype.
        codes: ``[R, M, N]``.
        scale: ``[N]`` or None.
        signs: Packed signs or None.

    Returns:
        ``[..., N]``. For ``B`` rows it costs ``B*K*D*R`` multiply-adds and ``B*M*N*R`` additions, against
        ``B*N*D`` for a dense product. float16 and bfloat16 are summed in float32.

    Raises:
        InputError: If ``x`` or the codebooks are complex.
    """
    codebooks, codes = _fold_signs(_real(codebooks), codes, signs)
    rows = _real(x).reshape(-1, x.shape[-1])
    index = _table_index(codes, codebooks)
    out = [_gather_sum(_table(block, codebooks), index).to(x.dtype) for block in _blocks(rows, codes, codebooks)]
    y = (out[0] if len(out) == 1 else torch.cat(out)).reshape(*x.shape[:-1], codes.shape[-1])
    return y if scale is None else y * scale


def contract_t(
    y: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None
) -> Tensor:
    """``y @ W`` without ``W``: sum ``y`` into one bin per entry, then one small product.

    Args:
        y: ``[..., N]``.
        codebooks: ``[R, G, K, d]``, of ``y``'s dtype.
        codes: ``[R, M, N]``.
        scale: ``[N]`` or None.
        signs: Packed signs or None.

    Returns:
        ``[..., D]``, at the cost of ``contract``, whose adjoint this is.

    Raises:
        InputError: If ``y`` or the codebooks are complex.
    """
    codebooks, codes = _fold_signs(_real(codebooks), codes, signs)
    rows = _real(y if scale is None else y * scale).reshape(-1, y.shape[-1])
    books = codebooks.to(_sum_dtype(codebooks.dtype))
    spread = _spread(codes, books.shape[2], rows.shape[0])
    out = []
    for block in _blocks(rows, codes, codebooks):
        bins = rearrange(_bins(block, codes, books.shape[2], spread), "r (g s) k b -> r g s k b", g=books.shape[1])
        x = torch.einsum("rgskb,rgkd->bgsd", bins, books)
        out.append(rearrange(x, "b g s d -> b (g s d)").to(y.dtype))
    dim = codes.shape[1] * codebooks.shape[3]
    return (out[0] if len(out) == 1 else torch.cat(out)).reshape(*y.shape[:-1], dim)


# ------------------------------------------------------------------------------------------- their gradients


def accumulate(x: Tensor, y: Tensor, codes: Tensor, books: int, entries: int, signs: Tensor | None = None) -> Tensor:
    """The gradient of the codebooks in ``contract(x)`` when ``y`` is the gradient of its result.

    Args:
        x: ``[..., D]``.
        y: ``[..., N]``.
        codes: ``[R, M, N]``.
        books: ``G``.
        entries: ``K``.
        signs: Packed signs or None.

    Returns:
        ``[R, G, K, d]``, of ``x``'s dtype.
    """
    stages, sub_vectors, _ = codes.shape
    d = x.shape[-1] // sub_vectors
    like = x.new_empty((stages, books, entries, d), dtype=_sum_dtype(x.dtype))
    like, codes = _fold_signs(like, codes, signs)
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    spread = _spread(codes, like.shape[2], y.shape[0])
    total = torch.zeros_like(like)
    for x_block, y_block in zip(_blocks(x, codes, like), _blocks(y, codes, like), strict=True):
        bins = rearrange(_bins(y_block, codes, like.shape[2], spread), "r (g s) k b -> r g s k b", g=books)
        parts = rearrange(x_block.to(bins.dtype), "b (g s d) -> b g s d", g=books, d=d)
        total = total + torch.einsum("rgskb,bgsd->rgkd", bins, parts)
    return _unfold_signs(total, signs).to(x.dtype)


def collect(grad: Tensor, codes: Tensor, books: int, entries: int, signs: Tensor | None = None) -> Tensor:
    """The adjoint of ``expand``: sums the gradient of every use of an entry.

    Args:
        grad: ``[N, D]``, the gradient of the rows that ``codes`` describe.
        codes: ``[R, M, N]``.
        books: ``G``.
        entries: ``K``.
        signs: Packed signs or None.

    Returns:
        ``[R, G, K, d]``, of ``grad``'s dtype.
    """
    stages, sub_vectors, _ = codes.shape
    like = grad.new_empty((stages, books, entries, grad.shape[-1] // sub_vectors))
    like, codes = _fold_signs(like, codes, signs)
    parts = rearrange(grad.to(_sum_dtype(grad.dtype)), "n (m d) -> n m d", m=sub_vectors)
    index = rearrange(_entry_index(codes, like), "r m n -> r n m")
    total = parts.new_zeros(math.prod(like.shape[:3]), like.shape[3])
    for stage in index:
        total = total.index_add(0, stage.reshape(-1), parts.reshape(-1, like.shape[3]))
    return _unfold_signs(total.view(like.shape), signs).to(grad.dtype)


def collect_sparse(grad: Tensor, codes: Tensor, books: int, entries: int, signs: Tensor | None = None) -> Tensor:
    """``collect`` as a sparse tensor that lists only the entries in use.

    Args:
        grad: ``[N, D]``.
        codes: ``[R, M, N]``.
        books: ``G``.
        entries: ``K``.
        signs: Packed signs or None.

    Returns:
        A sparse COO tensor ``[R, G, K, d]``: three sparse dimensions, one dense, not coalesced.
    """
    stages, sub_vectors, num_vectors = codes.shape
    parts = rearrange(grad, "n (m d) -> m n d", m=sub_vectors).expand(stages, -1, -1, -1)
    if signs is not None:
        parts = torch.where(unpack_signs(signs, num_vectors)[..., None], -parts, parts)
    shape = (stages, books, entries, parts.shape[-1])
    index = _entry_index(codes, grad.new_empty(()).expand(shape)).reshape(-1)
    index = torch.stack([index // (books * entries), index // entries % books, index % entries])
    return torch.sparse_coo_tensor(index, parts.reshape(-1, shape[3]), shape, check_invariants=False)


# ----------------------------------------------------------------------------------------------------- signs


def pack_signs(minus: Tensor) -> Tensor:
    """Eight signs a byte.

    Args:
        minus: ``[..., N]`` bool, True for minus.

    Returns:
        ``[..., ceil(N/8)]`` uint8, the first sign in the lowest bit.
    """
    padded = F.pad(minus.to(torch.uint8), (0, -minus.shape[-1] % 8))
    positions = _bit_positions(minus.device)
    weights = torch.bitwise_left_shift(torch.ones_like(positions), positions)
    return (rearrange(padded, "... (byte bit) -> ... byte bit", bit=8) * weights).sum(-1, dtype=torch.uint8)


def unpack_signs(signs: Tensor, num_vectors: int) -> Tensor:
    """The inverse of ``pack_signs``.

    Args:
        signs: ``[..., ceil(N/8)]`` uint8.
        num_vectors: ``N``.

    Returns:
        ``[..., N]`` bool.
    """
    bits = torch.bitwise_right_shift(signs[..., None], _bit_positions(signs.device)) & 1
    return rearrange(bits, "... byte bit -> ... (byte bit)")[..., :num_vectors].bool()


def _bit_positions(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _fold_signs(codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> tuple[Tensor, Tensor]:
    """A signed codebook is a plain one that also lists each entry's negative: K entries become 2 * K."""
    if signs is None:
        return codebooks, codes
    minus = unpack_signs(signs, codes.shape[-1])
    return torch.cat([codebooks, -codebooks], 2), codes.int() + codebooks.shape[2] * minus


def _unfold_signs(codebooks: Tensor, signs: Tensor | None) -> Tensor:
    """The adjoint of ``_fold_signs`` in the codebooks."""
    if signs is None:
        return codebooks
    plus, minus = codebooks.chunk(2, 2)
    return plus - minus


# -------------------------------------------------------------------------------------------------- the steps


def _real(x: Tensor) -> Tensor:
    if x.is_complex():
        raise InputError(f"codebooks hold real numbers, got {x.dtype}; rewrite the real and imaginary parts apart")
    return x


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _blocks(rows: Tensor, codes: Tensor, codebooks: Tensor) -> tuple[Tensor, ...]:
    """Rows in blocks whose tables stay small; one block where a compiler plans the memory."""
    per_row = codes.shape[0] * codes.shape[1] * codebooks.shape[2]
    if torch.compiler.is_compiling() or rows.shape[0] * per_row <= _TABLE_ELEMENTS:
        return (rows,)
    return rows.split(max(1, _TABLE_ELEMENTS // per_row))


def _entry_index(codes: Tensor, codebooks: Tensor) -> Tensor:
    """``[R, M, N]`` int64: where each code's entry lies in ``codebooks.reshape(R*G*K, d)``."""
    stages, books, entries, _ = codebooks.shape
    sub_vectors = codes.shape[1]
    book = torch.arange(sub_vectors, device=codes.device) // (sub_vectors // books)
    book = book + books * torch.arange(stages, device=codes.device)[:, None]
    return codes.long() + (book * entries)[..., None]


def _entries(codebooks: Tensor, codes: Tensor) -> Tensor:
    """``[N, D]``: the entry of each code side by side, stages summed."""
    index = rearrange(_entry_index(codes, codebooks), "r m n -> r n m")
    flat = rearrange(codebooks, "r g k d -> (r g k) d")
    rows = flat.index_select(0, index[0].reshape(-1))
    for stage in index[1:]:
        rows = rows + flat.index_select(0, stage.reshape(-1))
    return rows.reshape(codes.shape[2], codes.shape[1] * codebooks.shape[3])


def _table(x: Tensor, codebooks: Tensor) -> Tensor:
    """``[(g r k s), b]``: every sub-vector of ``x [b, D]`` dotted with every entry it could meet."""
    stages, books, entries, d = codebooks.shape
    left = rearrange(codebooks, "r g k d -> g (r k) d")
    right = rearrange(x, "b (g s d) -> g d (s b)", g=books, d=d)
    dots = torch.bmm(left, right).view(books * stages * entries * (x.shape[1] // (books * d)), x.shape[0])
    return dots.to(_sum_dtype(x.dtype))


def _table_index(codes: Tensor, codebooks: Tensor) -> Tensor:
    """``[n, (r m)]`` int32: the row of ``_table`` that each code picks."""
    stages, books, entries, _ = codebooks.shape
    sub_vectors = codes.shape[1]
    share = sub_vectors // books
    m = torch.arange(sub_vectors, device=codes.device, dtype=torch.int32)
    r = torch.arange(stages, device=codes.device, dtype=torch.int32)[:, None]
    first = ((m // share) * stages + r) * entries * share + m % share
    return rearrange(codes.int() * share + first[..., None], "r m n -> n (r m)").contiguous()


def _gather_sum(table: Tensor, index: Tensor) -> Tensor:
    """``[b, n]``: sums the table rows that ``index [n, p]`` names."""
    return F.embedding_bag(index, table, mode="sum").t().contiguous()


def _spread(codes: Tensor, entries: int, rows: int) -> tuple[Tensor, Tensor] | None:
    """For each (stage, sub-vector), its vectors ordered by code, and where each entry's run begins.

    None for a few rows, where a scatter needs no order. Compiled graphs always sort: they serve every batch.
    """
    if rows <= _SCATTER_ROWS and not torch.compiler.is_compiling():
        return None
    codes = codes.int()
    ones = torch.ones((), dtype=torch.int64, device=codes.device).expand(codes.shape)
    counts = ones.new_zeros(*codes.shape[:2], entries).scatter_add(2, codes.long(), ones).reshape(-1)
    return codes.argsort(-1).reshape(-1), counts.cumsum(0) - counts


def _bins(y: Tensor, codes: Tensor, entries: int, spread: tuple[Tensor, Tensor] | None) -> Tensor:
    """``[r, m, k, b]``: ``y [b, n]`` summed over the vectors that use an entry."""
    y = y.to(_sum_dtype(y.dtype))
    stages, sub_vectors, num_vectors = codes.shape
    if spread is not None:
        order, first = spread
        bins = F.embedding_bag(order, y.t().contiguous(), first, mode="sum")
        return bins.view(stages, sub_vectors, entries, y.shape[0])
    shape = (y.shape[0], stages * sub_vectors, num_vectors)
    index = rearrange(codes.long(), "r m n -> (r m) n").expand(shape)
    bins = y.new_zeros(*shape[:2], entries).scatter_add(2, index, y[:, None].expand(shape))
    return rearrange(bins, "b (r m) k -> r m k b", r=stages)
