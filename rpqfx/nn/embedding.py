"""RPQEmbedding and RPQEmbeddingBag."""

from __future__ import annotations

from typing import Self, Unpack

import torch
from torch import Tensor, nn

from rpqfx.errors import InputError
from rpqfx.nn.bags import bags
from rpqfx.nn.hosting.backed import held, weight_of
from rpqfx.nn.hosting.host import register_layer
from rpqfx.nn.layer import DenseOptions, Device, LayerOptions, RPQLayer
from rpqfx.ops import scale_grad
from rpqfx.validation.spelling import defaults_of, show_options


class _Table(RPQLayer):
    """A table whose vectors are its rows."""

    weight = held("weight")


class RPQEmbedding(_Table, nn.Embedding):
    """A table of embeddings, as ``torch.nn.Embedding``, whose rows are made from codebooks when they are looked up.

    ``padding_idx`` is a row that is zero and stays zero. ``max_norm`` shrinks the rows that are looked up, not the
    ones that are stored. ``sparse`` gives the codebooks a sparse gradient. Further arguments are those of
    ``RPQLayer``.

    Other Args:
        num_embeddings (int): Rows.
        embedding_dim (int): Width of a row.
        padding_idx (int | None): A row of zeros, without a gradient.
        max_norm (float | None): Rows with a larger norm are shrunk to it.
        norm_type (float): ``p`` of that norm.
        scale_grad_by_freq (bool): Divide each row's gradient by its number of uses in the batch.
        sparse (bool): Sparse gradient.
        device (torch.device | str | None): Where the tensors go.
        dtype (torch.dtype | None): Of the codebooks.

    Raises:
        SpecError: If the codebooks do not fit the table.
    """

    _dense = nn.Embedding
    weight = held("weight")

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, max_norm: float | None = None,
        norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False, _weight: None = None,
        _freeze: bool = False, device: Device = None, dtype: torch.dtype | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:  # fmt: skip
        _check_drawn(type(self), _weight)
        dense = nn.Embedding(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, None, _freeze,
            "meta", dtype,
        )  # fmt: skip
        super().__init__(dense, device, options)

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, padding_idx: int | None = None, max_norm: float | None = None,
        norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False, **options: Unpack[DenseOptions],
    ) -> Self:  # fmt: skip
        """Returns a table fitted to ``embeddings``; arguments are the dense layer's, and those of ``from_dense``."""
        dense = nn.Embedding.from_pretrained(
            embeddings, freeze, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
        return cls.from_dense(dense, **options)

    def forward(self, input: Tensor) -> Tensor:
        """Integer ids of any shape to ``[*ids.shape, embedding_dim]``."""
        return _rows(self, input)


class RPQEmbeddingBag(_Table, nn.EmbeddingBag):
    """Sums, means or maxima of bags of embeddings, as ``torch.nn.EmbeddingBag``.

    Costs the rows in the bags, whatever the table's size. Further arguments are those of ``RPQLayer``.

    Other Args:
        num_embeddings (int): Rows.
        embedding_dim (int): Width of a row.
        max_norm (float | None): Rows with a larger norm are shrunk to it.
        norm_type (float): ``p`` of that norm.
        scale_grad_by_freq (bool): Divide each row's gradient by its number of uses in the batch.
        mode (str): ``"sum"``, ``"mean"`` or ``"max"``.
        sparse (bool): Sparse gradient.
        include_last_offset (bool): Whether the last offset is the end of the last bag.
        padding_idx (int | None): A row of zeros that bags do not count.
        device (torch.device | str | None): Where the tensors go.
        dtype (torch.dtype | None): Of the codebooks.

    Raises:
        SpecError: If the codebooks do not fit the table.
    """

    _dense = nn.EmbeddingBag
    weight = held("weight")

    def __init__(
        self, num_embeddings: int, embedding_dim: int, max_norm: float | None = None, norm_type: float = 2.0,
        scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False, _weight: None = None,
        include_last_offset: bool = False, padding_idx: int | None = None, device: Device = None,
        dtype: torch.dtype | None = None, **options: Unpack[LayerOptions],
    ) -> None:  # fmt: skip
        _check_drawn(type(self), _weight)
        dense = nn.EmbeddingBag(
            num_embeddings, embedding_dim, max_norm, norm_type, scale_grad_by_freq, mode, sparse, None,
            include_last_offset, padding_idx, "meta", dtype,
        )  # fmt: skip
        super().__init__(dense, device, options)

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, max_norm: float | None = None, norm_type: float = 2.0,
        scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False, include_last_offset: bool = False,
        padding_idx: int | None = None, **options: Unpack[DenseOptions],
    ) -> Self:  # fmt: skip
        """Returns a table fitted to ``embeddings``; arguments are the dense layer's, and those of ``from_dense``."""
        dense = nn.EmbeddingBag.from_pretrained(
            embeddings, freeze, max_norm, norm_type, scale_grad_by_freq, mode, sparse, include_last_offset, padding_idx
        )
        return cls.from_dense(dense, **options)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Bags ``[B, L]``, or ``[T]`` with ``offsets [B]``, to ``[B, embedding_dim]``."""
        rows = _rows(self, input.reshape(-1))
        last = self.include_last_offset
        return bags(input, rows, self.padding_idx, offsets, per_sample_weights, self.mode, last)


for _kind in (RPQEmbedding, RPQEmbeddingBag):
    show_options(_kind.from_pretrained.__func__, DenseOptions, defaults_of(RPQLayer.from_dense))  # type: ignore[union-attr]


def _check_drawn(kind: type, weight: Tensor | None) -> None:
    if weight is not None:
        raise InputError(f"{kind.__name__} draws its own weight; from_pretrained and from_dense take one")


def _rows(layer: RPQEmbedding | RPQEmbeddingBag, ids: Tensor) -> Tensor:
    """Returns the rows that a table's own options make of ``ids``."""
    held = weight_of(layer, "weight")
    assert held is not None
    rows = held.lookup(ids, layer.sparse)
    if layer.padding_idx is not None and held.layout.zero_vector is None:  # a row with values, but without a gradient
        rows = torch.where((ids == layer.padding_idx)[..., None], rows.detach(), rows)
    if layer.scale_grad_by_freq:
        uses = torch.zeros(layer.num_embeddings, device=ids.device, dtype=rows.dtype)
        flat = ids.reshape(-1).long()
        uses = uses.scatter_add(0, flat, torch.ones_like(flat, dtype=rows.dtype))
        rows = scale_grad(rows, 1 / uses[ids.long()][..., None])
    if layer.max_norm is not None:  # the dense layer shrinks its weight in place, outside of autograd
        fixed = rows.detach()
        norms = fixed.norm(p=layer.norm_type, dim=-1, keepdim=True)
        shrink = torch.where(norms > layer.max_norm, layer.max_norm / (norms + 1e-7), torch.ones_like(norms))
        rows = fixed * shrink + (rows - fixed)
    return rows


register_layer(nn.Embedding, RPQEmbedding)
register_layer(nn.EmbeddingBag, RPQEmbeddingBag)
