"""The quantized tensor as a module: codebooks, codes, and the ways a layer uses them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rpqfx import ops
from rpqfx.codebook import CodebookSpec, pack_signs
from rpqfx.codebook.drawn_codes import balanced_codes, drawn_stages, may_be_seed, new_seed
from rpqfx.codebook.stored_codes import is_shorter
from rpqfx.errors import InputError, SpecError
from rpqfx.fit import fit_codebooks
from rpqfx.nn.code_bytes import to_bytes
from rpqfx.nn.layout import Layout
from rpqfx.nn.shards import is_part_of, is_shard
from rpqfx.nn.weight_products import Products

ReadAs = Literal["expanded", "virtual", "tensor"]


class RPQWeight(Products):
    """A quantized tensor; calling it gives the tensor, or some of its rows.

    Tensors: ``codebooks [R, G, K, d]`` (Parameter), ``codes [R, M, N]`` (buffer, the narrowest integer; one of two
    bytes lies there as bytes, and codes of a tiled spec as tiles (``rpqfx.nn.code_bytes``)), and where the spec has
    them ``scale [N]`` (Parameter),
    ``column_scale [D / share]`` (Parameter) and ``signs [R, M, ceil(N/8)]`` (buffer, uint8, eight signs a byte).

    Example:
        >>> spec = CodebookSpec.make(9216, 9216, codebook_dim=128, codebook_bits=8)
        >>> RPQWeight(spec)().shape
        torch.Size([9216, 9216])

    Args:
        spec: Shape of the codebooks.
        layout: How the tensor is seen as vectors; the matrix ``[N, D]`` if left out.
        std: Standard deviation of the tensor that ``reset_parameters`` draws.
        plan: Which way products run (see the attribute).
        device: Where the tensors go.
        dtype: Dtype of codebooks, scale and ``column_scale``, floating.

    Raises:
        SpecError: If spec and layout disagree, or the plan is none.
        InputError: If the dtype is not a real floating one.
    """

    read_as: ReadAs = "expanded"
    """What reading it gives: an ``ExpandedWeight``; a ``VirtualWeight``, for code that is known to take one; or a
    ``FixedWeight``, to torch a plain tensor, for code that treats others differently."""
    plain_when_compiled: bool = False
    """Whether compiled code reads a plain tensor instead of a ``VirtualWeight``: torch.compile exchanges the operands
    of ``w @ x`` where ``w`` is no tensor, without a word."""

    noted: Mapping[str, Any] = MappingProxyType({})
    """Attributes that somebody gave the Parameter that this stands for; what reads it finds them there."""

    shares_codebooks: bool = False
    """Whether its codebooks are those of other weights, too."""

    def __init__(
        self,
        spec: CodebookSpec,
        layout: Layout | None = None,
        *,
        std: float = 1.0,
        plan: ops.Plan = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layout = layout or Layout((spec.num_vectors, spec.dim))
        if (layout.num_vectors, layout.dim) != (spec.num_vectors, spec.dim):
            raise SpecError(
                f"the spec has {spec.num_vectors} vectors of length {spec.dim}, "
                f"the tensor {layout.num_vectors} of length {layout.dim}"
            )
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise InputError(f"codebooks are floating point, got {dtype}")
        self.spec, self.layout, self.std, self.plan = spec, layout, std, plan
        self.codebooks = nn.Parameter(torch.empty(spec.codebooks_shape, device=device, dtype=dtype))
        self.codes = torch.empty(spec.stored_codes_shape, device=device, dtype=spec.code_dtype)
        for name, count in (("scale", spec.num_vectors if spec.scale else 0), ("column_scale", spec.num_column_scales)):
            factors = nn.Parameter(torch.empty(count, device=device, dtype=dtype)) if count else None
            self.register_parameter(name, factors)
        signs = torch.empty(spec.signs_shape, device=device, dtype=torch.uint8) if spec.signs else None
        self.register_buffer("signs", signs)
        self.reset_parameters()

    @classmethod
    def from_dense(
        cls,
        tensor: Tensor,
        spec: CodebookSpec,
        layout: Layout | None = None,
        *,
        steps: int = 10,
        seed: int = 0,
        plan: ops.Plan = "auto",
    ) -> RPQWeight:
        """Returns codebooks fitted to a tensor by k-means (``rpqfx.fit.fit_codebooks``).

        Args:
            tensor: A tensor of the layout's shape; finite.
            spec: Shape of the codebooks.
            layout: How the tensor is seen as vectors.
            steps: Lloyd steps at most.
            seed: Seeds the k-means starts.
            plan: Which way products run.

        Raises:
            InputError: If the tensor is not real, floating and finite.
            SpecError: If spec and layout disagree, or the plan is none.
        """
        if not tensor.is_floating_point():
            raise InputError(f"only real floating tensors can be fitted, got {tensor.dtype}")
        layout = layout or Layout(tuple(tensor.shape))
        std = float(tensor.detach().float().std()) if tensor.numel() > 1 else 1.0
        if not math.isfinite(std):
            raise InputError("the tensor has infinite or NaN elements; mend or skip it before fitting codebooks")
        weight = cls(spec, layout, std=std, plan=plan, device="meta", dtype=tensor.dtype)
        fit = fit_codebooks(layout.to_vectors(tensor.detach()), spec, steps=steps, seed=seed)
        weight.codebooks = nn.Parameter(fit.codebooks, requires_grad=tensor.requires_grad)
        weight.codes = fit.codes
        weight.signs = fit.signs
        if fit.scale is not None:
            weight.scale = nn.Parameter(fit.scale, requires_grad=tensor.requires_grad)
        if spec.column_scale_group:
            weight.column_scale = nn.Parameter(fit.codebooks.new_ones(spec.num_column_scales), tensor.requires_grad)
        return weight

    def take_notes(self, tensor: Tensor) -> None:
        """Keeps the attributes that somebody gave a Parameter, for those who read it and those who find the codebooks.

        Args:
            tensor: The Parameter that this stands for.
        """
        self.noted = dict(tensor.__dict__)
        self.codebooks.__dict__.update(tensor.__dict__)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws codebooks whose tensor has standard deviation ``std``, and balanced codes.

        Gathering preserves variance, and stages add theirs, so entries are drawn with ``std / sqrt(R)``. Codes of a
        sub-vector are a shuffled repetition of 0..K-1. The seed of the codes, ``code_seed``, is one number of torch's
        CPU generator; signs and codebooks are numbers of their device's.
        """
        if self.codebooks.is_meta:
            return
        self.codebooks.normal_(0, self.std / math.sqrt(self.spec.stages))
        device = self.stored_codes.device
        self.code_seed = new_seed()
        self.codes = balanced_codes(self.spec.codes_shape, self.spec.entries, self.code_seed, device)
        for factors in (self.scale, self.column_scale):
            if factors is not None:
                factors.fill_(1)
        if self.signs is not None:
            self.signs.copy_(pack_signs(torch.rand(self.spec.codes_shape, device=device) < 0.5))

    def drawn_stages(self) -> tuple[int, ...]:
        """Returns the stages for which a file holds ``code_seed``: those whose codes are still the ones of the seed.

        The codes are drawn again and compared; no change of them is missed, however it was made. Where they are shared
        out over processes, this one's part is compared, all stages at once. There are no such stages where codes are on
        the meta device, or no longer than what stands for them.
        """
        stored, spec = self.stored_codes, self.saved_spec
        if self.code_seed is None or stored.is_meta or not may_be_seed(spec):
            return ()
        if is_shard(stored):
            drawn = balanced_codes(spec.codes_shape, spec.entries, self.code_seed, stored.device)
            same = is_part_of(stored.detach(), to_bytes(drawn, spec.tiled))
            found = tuple(range(spec.stages)) if same else ()
        else:
            found = drawn_stages(self.codes.detach(), spec.entries, self.code_seed)
        return found if is_shorter(spec.codes_shape, spec.entries, len(found)) else ()

    @property
    def plan(self) -> ops.Plan:
        """Which way ``linear``, ``linear_t`` and ``conv`` run; both ways give the same result.

        ``"lookup"`` goes through the table of dot products, ``"dequantize"`` makes the tensor for the length of the
        call, and ``"auto"`` takes the one that a cost model holds for cheaper. May be set at any time; ``rpqfx.tune``
        sets what it measured. It is no tensor, so a state dict is without it. Weights that share codebooks each have
        their own.

        Raises:
            SpecError: When set to anything else.
        """
        return self._plan

    @plan.setter
    def plan(self, plan: ops.Plan) -> None:
        if plan not in ops.PLANS:
            raise SpecError(f"plan is one of {', '.join(ops.PLANS)}, got {plan!r}")
        self._plan = plan

    def extra_repr(self) -> str:
        """Returns the numbers of the spec, and what was chosen besides."""
        spec = self.spec
        text = f"N={spec.num_vectors}, D={spec.dim}, M={spec.num_subvectors}, d={spec.codebook_dim}, K={spec.entries}"
        text += f", R={spec.stages}" if spec.stages > 1 else ""
        text += f", G={spec.num_codebooks}" if spec.num_codebooks != spec.num_subvectors else ""
        factors = {"scale": spec.scale, "column_scale": spec.column_scale_group, "signs": spec.signs}
        flags = [name for name, there in factors.items() if there]
        flags += ["tiled"] if spec.tiled else []
        flags += ["columns"] if self.layout.transposed else []
        flags += [f"{self.layout.experts} codebooks of {self.layout.shape[0]} experts"] if self.layout.experts else []
        flags += [f"plan={self.plan}"] if self.plan != "auto" else []
        return ", ".join([text, *flags])
