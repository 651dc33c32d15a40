"""Weights that have their codebooks in common, as one matrix of sub-vectors to be clustered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from rpqfx import ops
from rpqfx.codebook.drawn_codes import balanced_codes, new_seed
from rpqfx.fit.k_means import kmeans
from rpqfx.fit.refitting import refit
from rpqfx.fit.residual import encode, train
from rpqfx.nn.weight import RPQWeight
from rpqfx.training.latent_weight import LatentWeight

_BEAM = 4
_LLOYD_STEPS = 10


class CodebookGroup:
    """Weights that have one set of codebooks ``[R, G, K, d]``; most often there is one.

    Args:
        name: Name of the first weight, for errors.
        weights: They have equal specs but for the number of vectors.
    """

    def __init__(self, name: str, weights: Sequence[RPQWeight]) -> None:
        self.name, self.weights = name, list(weights)

    @property
    def codebooks(self) -> nn.Parameter:
        """The codebooks, ``[R, G, K, d]``."""
        return self.weights[0].codebooks

    @property
    def latent_weights(self) -> list[LatentWeight]:
        """The weights, where a dense Parameter is behind each."""
        return [weight for weight in self.weights if isinstance(weight, LatentWeight)]

    def stored(self) -> list[Tensor]:
        """Returns the tensors that learning changes."""
        return [self.codebooks, *(weight.stored_codes for weight in self.weights)]

    def drawn(self, seed: int) -> list[Tensor]:
        """Returns a dense matrix ``[N, D]`` for each weight, with the standard deviation of its layer's initialisation.

        Args:
            seed: Seeds the matrices.
        """
        device = self.codebooks.device
        generator = torch.Generator(device).manual_seed(seed)
        shapes = [(weight.spec.num_vectors, weight.spec.dim) for weight in self.weights]
        drawn = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
        return [
            (matrix * weight.std).to(self.codebooks.dtype) for matrix, weight in zip(drawn, self.weights, strict=True)
        ]

    @torch.no_grad()
    def decoded(self) -> list[Tensor]:
        """Returns the matrix ``[N, D]`` that each weight stands for."""
        return [ops.expand(weight.tensors.detach()) for weight in self.weights]

    @torch.no_grad()
    def learn(self, values: Sequence[Tensor], seed: int) -> None:
        """Fits codebooks and codes, all stages, to dense matrices.

        Args:
            values: One ``[N, D]`` for each weight.
            seed: Seeds the starts of k-means.
        """
        spec = self.weights[0].spec
        for book, points in enumerate(self._points(values)):
            books, codes = train(
                points, spec.stages, spec.entries, steps=_LLOYD_STEPS, beam=_BEAM if spec.stages > 1 else 1, seed=seed
            )
            self.codebooks[:, book] = books.to(self.codebooks.dtype)
            self._write(book, slice(None), codes)

    @torch.no_grad()
    def learn_first_stage(self, values: Sequence[Tensor], seed: int) -> int:
        """Fits the first stage to dense matrices; the second starts at zero, with new random codes.

        Args:
            values: One ``[N, D]`` for each weight.
            seed: Seeds the starts of k-means, and of the codes.

        Returns:
            How many sub-vectors have got another first code.
        """
        before = [weight.codes[0].clone() for weight in self.weights]
        generator = torch.Generator().manual_seed(seed)
        for weight in self.weights:
            weight.code_seed, spec = new_seed(generator), weight.spec
            weight.codes = balanced_codes(spec.codes_shape, spec.entries, weight.code_seed, self.codebooks.device)
        for book, points in enumerate(self._points(values)):
            entries, codes = kmeans(points, self.weights[0].spec.entries, steps=_LLOYD_STEPS, seed=seed)
            self.codebooks[0, book] = entries.to(self.codebooks.dtype)
            self._write(book, slice(1), codes[:, None])
        self.codebooks[1:] = 0
        return sum(int((weight.codes[0] != old).sum()) for weight, old in zip(self.weights, before, strict=True))

    @torch.no_grad()
    def follow(self) -> int:
        """Gives each sub-vector of the dense Parameters the nearest entry, and each entry the mean of its sub-vectors.

        Entries that no sub-vector is near to stay where they are.

        Returns:
            How many sub-vectors have got other codes.
        """
        changed = 0
        values = [weight.latent.detach() for weight in self.latent_weights]
        for book, points in enumerate(self._points(values)):
            old, books = self._codes(book), self.codebooks[:, book].float()
            codes = encode(points, books, beam=_BEAM if len(books) > 1 else 1, codes=old if len(books) > 1 else None)
            changed += int((codes != old).any(1).sum())
            self.codebooks[:, book] = refit(points, codes, books).to(self.codebooks.dtype)
            self._write(book, slice(None), codes)
        return changed

    def _points(self, values: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yields the sub-vectors ``[n, d]`` of each codebook, float32 (float64 stays)."""
        books, d = self.codebooks.shape[1], self.codebooks.shape[3]
        parts = [rearrange(matrix, "n (g s d) -> g (s n) d", g=books, d=d) for matrix in values]
        for book in range(books):
            points = torch.cat([part[book] for part in parts])
            yield points if points.dtype == torch.float64 else points.float()

    def _codes(self, book: int) -> Tensor:
        """Returns the codes of those sub-vectors, ``[n, R]`` int64."""
        books = self.codebooks.shape[1]
        each = [rearrange(weight.codes, "r (g s) n -> g (s n) r", g=books)[book] for weight in self.weights]
        return torch.cat(each).long()

    def _write(self, book: int, stages: slice, codes: Tensor) -> None:
        """Sets some stages of those sub-vectors to codes ``[n, R']``."""
        books = self.codebooks.shape[1]
        start = 0
        for weight in self.weights:
            own = weight.codes.clone()
            seen = rearrange(own, "r (g s) n -> g r s n", g=books)[book]
            count = seen.shape[1] * seen.shape[2]
            seen[stages] = rearrange(codes[start : start + count], "(s n) r -> r s n", s=seen.shape[1]).to(own.dtype)
            weight.codes = own
            start += count


def groups_of_weights(model: nn.Module, weights: Sequence[RPQWeight]) -> list[CodebookGroup]:
    """Returns the weights of a model by the codebooks that they have in common, in the order of the model.

    Args:
        model: The model.
        weights: Its quantized weights.
    """
    names = {module: name.removesuffix("_rpq") for name, module in model.named_modules()}
    together: dict[int, list[RPQWeight]] = {}
    for weight in weights:
        together.setdefault(id(weight.codebooks), []).append(weight)
    return [CodebookGroup(names[members[0]], members) for members in together.values()]
