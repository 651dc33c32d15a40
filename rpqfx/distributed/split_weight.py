"""A quantized weight of which each process holds some rows or some columns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from rpqfx import ops
from rpqfx.codebook import CodebookSpec
from rpqfx.codebook.tiles import TILE
from rpqfx.errors import DistributedError
from rpqfx.nn.placement import name_of
from rpqfx.nn.shards import is_shard
from rpqfx.nn.weight import RPQWeight


class SplitWeight(RPQWeight):
    """A weight whose ``spec`` and ``layout`` are of this process's part, while its tensors are parts of whole ones.

    Codes, signs and factors are split with the vectors or sub-vectors that they belong to, codebooks where each
    sub-vector has its own; what every process needs is whole in all of them, and its gradient is added up.
    """

    whole_spec: CodebookSpec
    axis: int
    """The axis of the matrix that is shared out: 0 where processes have rows, 1 where they have columns."""
    first: int
    """The first of them."""

    @property
    def saved_spec(self) -> CodebookSpec:
        """The spec of all processes' parts together."""
        return self.whole_spec

    @property
    def mesh(self) -> DeviceMesh:
        """The processes that have a part each."""
        return _as_part(self.codebooks).device_mesh

    @property
    def tensors(self) -> ops.Tensors:
        """The tensors of this process's part."""
        stored = _as_part(self.stored_codes).to_local().detach()
        tiled = self.tiled_vectors(stored)
        signs = None if self.signs is None else _as_part(self.signs).to_local().detach()
        factor = self.whole_spec.grad_factor
        return ops.Tensors(
            _local(self.codebooks, factor), stored if tiled else self._read(stored),
            None if self.scale is None else _local(self.scale), signs,
            None if self.column_scale is None else _local(self.column_scale), tiled,
        )  # fmt: skip

    def lookup(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """Rows of the part, and zeros for rows that other processes have."""
        if self.axis == 1 or ids.is_floating_point():
            return super().lookup(ids, sparse)
        rows = self.layout.rows
        inside = (ids >= self.first) & (ids < self.first + rows)
        elsewhere = (ids >= 0) & (ids < self.mesh.size() * rows)  # others stay as they are, and are refused as ever
        some = torch.where(inside, ids - self.first, torch.where(elsewhere, 0, ids))
        return super().lookup(some, sparse).masked_fill(~inside[..., None], 0)

    def reset_parameters(self) -> None:
        """Refuses to draw a part by itself.

        Raises:
            DistributedError: Always, unless there are no values to draw.
        """
        if self.codebooks.is_meta:
            return
        raise DistributedError(
            f"{name_of(self)} is split over processes, and each would draw a part by itself; draw a model before it is "
            "split"
        )


def collect(x: Tensor, mesh: DeviceMesh, factor: float = 1.0) -> Tensor:
    """Returns a tensor as it is; its gradient is added up over processes and multiplied.

    Args:
        x: The same in all processes.
        mesh: A device mesh of one axis.
        factor: What the sum is multiplied by.
    """
    return _Collected.apply(x, mesh, factor)


class _Collected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh | None, factor: float) -> Tensor:
        """The tensor as it is."""
        ctx.mesh, ctx.factor = mesh, factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The sum of all processes' gradients."""
        total = grads[0] * ctx.factor
        if ctx.mesh is not None:
            dist.all_reduce(total, group=ctx.mesh.get_group())
        return total, None, None


def split_weight(weight: RPQWeight, mesh: DeviceMesh, axis: int, src: int | None = 0) -> None:
    """Makes a weight a part of itself, in place: this process's rows or columns of the matrix.

    Args:
        weight: Whole.
        mesh: The processes, of one axis.
        axis: 0 for rows of the matrix, 1 for columns.
        src: The process, by its rank in the mesh, whose values all have a part of; None where they are the same anyway.

    Raises:
        DistributedError: If the matrix cannot be split so. The weight is then as it was.
    """
    if isinstance(weight, SplitWeight):
        if weight.axis == axis and weight.mesh == mesh:  # tied
            return
        raise DistributedError(f"{name_of(weight)} is split already, and along {_AXES[weight.axis]}")
    _refuse(weight, mesh, axis)
    layout, ranks, rank = weight.layout, mesh.size(), mesh.get_local_rank()
    length = layout.shape[axis] // ranks
    if src is not None:
        for tensor in (*weight.parameters(), *weight.buffers()):
            dist.broadcast(tensor.detach(), group=mesh.get_group(), group_src=src)
    with torch.no_grad():
        part = weight.whole().narrow(axis, rank * length, length)
        assert part is not None
        mine = part.tensors
    along = axis in layout.vector_axes
    spec = replace(
        weight.spec, num_vectors=part.layout.num_vectors, dim=part.layout.dim, num_codebooks=mine.codebooks.shape[1],
        grad_scale="sum",  # the whole weight's factor is applied where gradients are added up
    )  # fmt: skip
    own = weight.spec.num_codebooks > 1 and not along  # type: ignore[operator]
    stored = weight.stored_codes
    if weight.spec.tiled:
        codes, codes_axis = mine.codes, 0 if along else 1
    else:
        codes = mine.codes if stored.dtype == mine.codes.dtype else mine.codes.contiguous().view(torch.uint8)
        codes_axis = 2 if along else 1
    parts: dict[str, tuple[Tensor | None, Placement]] = {
        "codebooks": (mine.codebooks, Shard(1) if own else Replicate()),
        "scale": (mine.scale, Shard(0) if along else Replicate()),
        "column_scale": (mine.column_scale, Replicate() if along else Shard(0)),
        "codes": (codes, Shard(codes_axis)),
        "signs": (mine.signs, Shard(2 if along else 1)),
    }
    whole_spec = weight.spec
    weight.__class__ = SplitWeight
    assert isinstance(weight, SplitWeight)
    weight.spec, weight.layout, weight.whole_spec = spec, part.layout, whole_spec
    weight.axis, weight.first = axis, rank * length
    for name, (own_part, placement) in parts.items():
        for group in (weight._parameters, weight._buffers):
            before = group.get(name)
            if before is not None and own_part is not None:
                group[name] = as_part(own_part, before, mesh, placement)  # type: ignore[assignment]


def as_part(mine: Tensor, whole: Tensor, mesh: DeviceMesh, placement: Placement) -> Tensor:
    """Returns the ``DTensor`` of which this process has a part, a Parameter where the whole tensor is one.

    Args:
        mine: This process's part.
        whole: What it is a part of.
        mesh: The processes, of one axis.
        placement: How it is split.
    """
    local = mine.detach().clone(memory_format=torch.contiguous_format)
    strides = torch.empty(whole.shape, device="meta").stride()
    made = DTensor.from_local(local, mesh, [placement], run_check=False, shape=whole.shape, stride=strides)
    return nn.Parameter(made, whole.requires_grad) if isinstance(whole, nn.Parameter) else made


_AXES = ("rows", "columns")


def _refuse(weight: RPQWeight, mesh: DeviceMesh, axis: int) -> None:
    """Raises where a matrix cannot be split over processes."""
    layout, spec, ranks = weight.layout, weight.spec, mesh.size()
    where = f"the {_AXES[axis]} of {name_of(weight)} cannot be split over {ranks} processes"
    if is_shard(weight.stored_codes) or is_shard(weight.codebooks):
        raise DistributedError(
            f"{where}: it is sharded by FSDP already; call parallelize_module first, then fully_shard"
        )
    if mesh.ndim != 1:
        raise DistributedError(f"{where}: the mesh has {mesh.ndim} axes; give one of them, as in mesh['tp']")
    if weight.shares_codebooks:
        raise DistributedError(
            f"{where}: other layers have the same codebooks, and would be trained apart; rewrite with sharing='own' or "
            "'layer'"
        )
    if weight.codebooks.is_meta:
        raise DistributedError(f"{where}: it has no values; call rpqfx.materialize(model) first")
    size = layout.shape[axis]
    if size % ranks:
        raise DistributedError(f"{where}: there are {size} of them, which {ranks} does not divide")
    length = size // ranks
    if axis in layout.dim_axes:
        step = spec.codebook_dim * (spec.num_subvectors // spec.num_codebooks if spec.num_codebooks > 1 else 1)  # type: ignore[operator]
        if length % step:
            raise DistributedError(
                f"{where}: {length} for each are no whole number of sub-vectors of length {step} with codebooks "
                f"of their own; rewrite with a codebook_dim that divides {length}"
            )
        if spec.column_scale_group and length % spec.column_scale_group:
            raise DistributedError(
                f"{where}: {spec.column_scale_group} of them share a factor; rewrite with column_scale=False"
            )
        return
    if spec.signs and length % 8:
        raise DistributedError(
            f"{where}: the signs of 8 vectors are a byte, and each process would have {length} vectors"
        )
    if spec.tiled and length % TILE:
        raise DistributedError(
            f"{where}: codes lie in tiles of {TILE} vectors, and each process would have {length}; rewrite without "
            "tiles"
        )


def _as_part(tensor: Tensor) -> DTensor:
    assert isinstance(tensor, DTensor)
    return tensor


def _local(parameter: Tensor, factor: float = 1.0) -> Tensor:
    """This process's part of a Parameter; gradients of what is whole in all processes are added up."""
    part = _as_part(parameter)
    summed = part.device_mesh if part.placements[0].is_replicate() else None
    local = part.to_local()
    return local if summed is None and factor == 1.0 else _Collected.apply(local, summed, factor)
