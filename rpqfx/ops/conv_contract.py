"""A convolution through the maps of its entries: the form that contracts.

The filters are the vectors ``W [N, D]``, ``D`` channels times taps, channels first. A convolution takes an *image* to
one map for each vector; a transposed one takes maps, one for each vector, to an image. Where a sub-vector is a block
of whole channels (``d`` a multiple of the taps), every entry is a small filter. One grouped convolution then makes the
maps of all entries, and each vector's map is a sum of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from rpqfx.codebook import steps
from rpqfx.codebook.signs import fold_codebooks, fold_codes, unfold_codebooks
from rpqfx.ops import library
from rpqfx.ops.conv_forms import Geometry, add_channels

# Numbers of a table of maps (or of bins) that are alive at a time: few enough that memory freed by one block serves the
# next (new memory costs more than the sums in it), and enough that several samples share an index of the codes.
MAP_ELEMENTS = 2**22


@dataclass(frozen=True)
class ConvContract(Geometry):
    """A convolution, or a transposed one, without its filters; there are no channel groups."""

    @staticmethod
    def fits(codebook_dim: int, weight_shape: tuple[int, ...], groups: int) -> bool:
        """Returns whether a layer's entries are filters of whole channels."""
        return groups == 1 and codebook_dim % math.prod(weight_shape[2:]) == 0

    def out(
        self, x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, bias: Tensor | None = None
    ) -> Tensor:
        y = (self._to_image if self.transposed else self._to_vectors)(x, codebooks, codes, signs)
        return add_channels(y, bias)

    def left(self, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        return (self._to_vectors if self.transposed else self._to_image)(y, codebooks, codes, signs)

    def book(self, x: Tensor, y: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        image, vectors = (y, x) if self.transposed else (x, y)
        total: Tensor | None = None
        for part, bins in self._bins(vectors, codes, signs):
            grad = self._filters_grad(image[part], bins, codes)
            total = grad if total is None else total + grad
            del bins, grad  # before the next block's are made
        assert total is not None
        return self._to_codebooks(total, codes, signs)

    def grads(
        self, x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.transposed:  # one needs the bins of x, the other the maps of y: nothing to share
            return self.left(y, codebooks, codes, signs), self.book(x, y, codes, signs)
        filters, left = self._filters(codebooks, signs), []
        total: Tensor | None = None
        for part, bins in self._bins(y, codes, signs):
            left.append(self._image(bins, filters).to(x.dtype))
            grad = self._filters_grad(x[part], bins, codes)
            total = grad if total is None else total + grad
            del bins, grad
        assert total is not None
        return _join(left), self._to_codebooks(total, codes, signs)

    # ------------------------------------------------------------------------ between an image and the vectors' maps

    def _to_vectors(self, image: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        """Returns the convolution of an image with all vectors: ``[B, N, *size]``."""
        filters, codes = self._filters(codebooks, signs), fold_codes(codes, self.entries, signs)
        size = self._vectors_size(tuple(image.shape[2:]))
        axes = {"g": self.books, "s": codes.shape[1] // self.books, "r": codes.shape[0]}
        parts = []
        filters = filters.to(image.dtype)
        for part in _blocks(image.shape[0], filters.shape[0] * axes["s"] * math.prod(size)):
            maps = torch.convolution(
                self._fold(image[part], axes["s"]), filters, None, self.stride, self.padding, self.dilation, False,
                (0,) * len(size), self.books,
            )  # fmt: skip
            for axis, length in enumerate(size, 2):  # an output padding past the stride leaves more than there were
                maps = maps.narrow(axis, 0, length)
            table = rearrange(maps.flatten(2), "(b s) (g r k) l -> b r (g s) k l", **axes)
            parts.append(library.gather_sum(table, codes).unflatten(2, size))
        return _join(parts)

    def _to_image(self, vectors: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        """Returns the adjoint of ``_to_vectors``: ``[B, C, *size]``."""
        filters = self._filters(codebooks, signs)
        return _join([self._image(bins, filters).to(vectors.dtype) for _, bins in self._bins(vectors, codes, signs)])

    def _bins(self, vectors: Tensor, codes: Tensor, signs: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """Yields the vectors' maps, summed by entry, as maps of the entries' filters.

        Yields:
            A slice of the batch, and its maps ``[(b s), (g r k), *size]``.
        """
        entries, codes = self.entries * (1 if signs is None else 2), fold_codes(codes, self.entries, signs)
        share, size = codes.shape[1] // self.books, tuple(vectors.shape[2:])
        blocks = _blocks(vectors.shape[0], codes.shape[0] * codes.shape[1] * entries * math.prod(size))
        runs = (steps.runs(codes, entries),) if len(blocks) > 1 else ()  # sorted once for all
        for part in blocks:
            yield part, rearrange(
                library.bin_sum(vectors[part].flatten(2), codes, entries, *runs),
                "b r (g s) k l -> (b s) (g r k) l", s=share,
            ).unflatten(2, size)  # fmt: skip

    def _image(self, bins: Tensor, filters: Tensor) -> Tensor:
        """Returns the image ``[b, C, *size]`` that the entries' filters make of their maps."""
        share = self.weight_shape[1] // (self.books * filters.shape[1])
        rest = self.output_padding if self.transposed else self._adjoint_padding(bins.shape[2:])
        image = torch.convolution(
            bins, filters.to(bins.dtype), None, self.stride, self.padding, self.dilation, True, rest, self.books
        )
        return rearrange(image, "(b s) (g c) ... -> b (g s c) ...", s=share, g=self.books)

    # ------------------------------------------------------------------------------------- codebooks as filters

    def _filters(self, codebooks: Tensor, signs: Tensor | None) -> Tensor:
        """Returns ``[(g r k), c, *kernel]``: the entries, and their negatives where there are signs."""
        kernel = self.weight_shape[2:]
        filters = rearrange(fold_codebooks(codebooks, signs), "r g k (c t) -> (g r k) c t", t=math.prod(kernel))
        return filters.unflatten(2, kernel)

    def _filters_grad(self, image: Tensor, bins: Tensor, codes: Tensor) -> Tensor:
        """Returns the gradient of ``_filters``, from an image and the maps ``[(b s), (g r k), *size]``."""
        image = self._fold(image, codes.shape[1] // self.books).to(bins.dtype)
        result, start = (image, bins) if self.transposed else (bins, image)
        shape = (bins.shape[1], image.shape[1] // self.books, *self.weight_shape[2:])
        _, grad, _ = torch.ops.aten.convolution_backward(
            result, start, image.new_empty(()).expand(shape), None, self.stride, self.padding, self.dilation,
            self.transposed, self.output_padding, self.books, (False, True, False),
        )  # fmt: skip
        # It lies in memory as its inputs do, of which a compiler may expect another order than the one they have.
        return grad.clone(memory_format=torch.contiguous_format) if torch.compiler.is_compiling() else grad

    def _to_codebooks(self, filters: Tensor, codes: Tensor, signs: Tensor | None) -> Tensor:
        """Returns the adjoint of ``_filters``: ``[R, G, K, d]``."""
        flat = rearrange(filters.flatten(1), "(g r k) d -> r g k d", g=self.books, r=codes.shape[0])
        return unfold_codebooks(flat, signs)

    def _fold(self, image: Tensor, share: int) -> Tensor:
        """Returns ``[(b s), (g c), *size]``: sub-vectors that share a codebook count as samples."""
        return rearrange(image, "b (g s c) ... -> (b s) (g c) ...", g=self.books, s=share)

    def _vectors_size(self, image_size: tuple[int, ...]) -> tuple[int, ...]:
        """Returns spatial size of the vectors' maps."""
        if self.transposed:
            return self.input_size
        axes = zip(image_size, self.stride, self.padding, self.dilation, self.weight_shape[2:], strict=True)
        return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, s, p, d, k in axes)


def _blocks(samples: int, numbers: int) -> list[slice]:
    """Returns slices of a batch whose samples have so many numbers each; one where compilers plan memory."""
    if torch.compiler.is_compiling() or samples * numbers <= MAP_ELEMENTS:
        return [slice(None)]
    size = max(1, MAP_ELEMENTS // numbers)
    return [slice(first, first + size) for first in range(0, samples, size)]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
