"""Styles of torch's ``parallelize_module`` for layers whose weights are quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor import parallel as dense

from rpqfx.distributed.split_routes import within_routes
from rpqfx.distributed.split_weight import SplitWeight, as_part, collect, split_weight
from rpqfx.errors import DistributedError
from rpqfx.nn.embedding import RPQEmbedding
from rpqfx.nn.hosting.backed import Backed, weight_of
from rpqfx.nn.linear import RPQLinear
from rpqfx.nn.weight import RPQWeight


class SplitLinear(RPQLinear):
    """A linear layer of which this process has some outputs, or some inputs."""

    def forward(self, input: Tensor) -> Tensor:
        """This process's outputs, or its part of the sum that all outputs are."""
        weight = weight_of(self, "weight")
        assert isinstance(weight, SplitWeight)
        bias: Any = self._parameters["bias"]
        if bias is None:
            return weight.linear(input)
        if weight.axis == 0:
            return weight.linear(input, bias.to_local())
        y, whole = weight.linear(input), collect(bias.to_local(), weight.mesh)
        return y + (whole if weight.first == 0 else 0 * whole)  # once in the sum of all processes


class ColwiseParallel(dense.ColwiseParallel):
    """Splits the outputs of a layer over processes, as torch's style of this name does.

    Takes ``RPQLinear`` and ``RPQEmbedding`` as well as what torch's takes. Of a linear layer the rows of the weight are
    split, of an embedding its columns: codes, signs and factors go with the vectors or sub-vectors that they belong to.
    Codebooks are split where each sub-vector has its own and sub-vectors are split, and else are whole in all
    processes, which then add up their gradients.

    Other Args:
        input_layouts (Placement | None): Of the input where it is no ``DTensor``; replicated if left out.
        output_layouts (Placement | None): Of the output; split along its last axis if left out.
        use_local_output (bool): Whether the output is a plain tensor; it is if left out.

    Raises:
        DistributedError: When it is applied to a layer that cannot be split so: what each process would get is no whole
            number of sub-vectors or tiles, or the codebooks are those of other layers, too.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, Backed):
            with within_routes(module, self):
                return super()._apply(module, device_mesh)
        if isinstance(module, RPQEmbedding) and module.max_norm is not None:
            raise DistributedError(
                "an embedding with max_norm cannot be split along its columns: norms are of whole rows"
            )
        axis = 1 if isinstance(module, RPQEmbedding) else 0
        return _split(module, device_mesh, axis, self, (Replicate(),), (Shard(-1),))


class RowwiseParallel(dense.RowwiseParallel):
    """Splits the inputs of a layer over processes, as torch's style of this name does.

    Takes ``RPQLinear`` and ``RPQEmbedding`` as well as what torch's takes. Of a linear layer the columns of the weight
    are split, of an embedding its rows; what each process computes is a part of a sum.

    Other Args:
        input_layouts (Placement | None): Of the input where it is no ``DTensor``; split along its last axis if left
            out.
        output_layouts (Placement | None): Of the output; replicated if left out.
        use_local_output (bool): Whether the output is a plain tensor; it is if left out.

    Raises:
        DistributedError: As ``ColwiseParallel``.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, Backed):
            with within_routes(module, self):
                return super()._apply(module, device_mesh)
        table = isinstance(module, RPQEmbedding)
        taken: tuple[Placement, ...] = (Replicate(),) if table else (Shard(-1),)
        return _split(module, device_mesh, 0 if table else 1, self, taken, (Partial(),))


def _split(
    module: nn.Module, mesh: DeviceMesh, axis: int, style: Any, taken: tuple[Placement, ...],
    made: tuple[Placement, ...],
) -> nn.Module:  # fmt: skip
    """Splits a layer in place.

    Args:
        module: A layer with a quantized weight.
        mesh: The processes.
        axis: The axis of the weight that is cut.
        style: Says how inputs come and outputs go.
        taken: How the layer takes its input.
        made: How the layer makes its output.
    """
    weight = weight_of(module, "weight")
    if weight is None or not isinstance(module, (RPQLinear, RPQEmbedding)):
        raise DistributedError(
            f"{type(style).__name__} splits RPQLinear and RPQEmbedding, got {type(module).__name__}, whose own code "
            "reads what it holds quantized; leave it out of the plan, and use fully_shard for it"
        )
    with within_routes(module, style):
        return _split_weight_and_bias(module, weight, mesh, axis, style, taken, made)


def _split_weight_and_bias(
    module: nn.Module, weight: RPQWeight, mesh: DeviceMesh, axis: int, style: Any, taken: tuple[Placement, ...],
    made: tuple[Placement, ...],
) -> nn.Module:  # fmt: skip
    src = getattr(style, "src_data_rank", 0)
    split_weight(weight, mesh, axis, src)
    bias = module._parameters.get("bias")
    if bias is not None:
        if src is not None:
            dist.broadcast(bias.detach(), group=mesh.get_group(), group_src=src)
        mine, placement = bias, Replicate()
        if axis == 0:
            mine, placement = bias.chunk(mesh.size())[mesh.get_local_rank()], Shard(0)  # type: ignore[assignment]
        module._parameters["bias"] = as_part(mine, bias, mesh, placement)  # type: ignore[assignment]
    if type(module) is RPQLinear:
        module.__class__ = SplitLinear
    module.register_forward_pre_hook(_taking(mesh, style.input_layouts, taken))
    module.register_forward_hook(_making(mesh, made, style.output_layouts, style.use_local_output))
    return module


def _taking(mesh: DeviceMesh, given: tuple[Placement, ...], wanted: tuple[Placement, ...]) -> Callable[..., Any]:
    """Returns a hook that gives a layer this process's part of its input."""

    def take(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        x = inputs[0]
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, given, run_check=False)
        x = x.redistribute(placements=wanted)
        whole = wanted[0].is_replicate() and x.is_floating_point()  # each process makes a part of its gradient
        return (x.to_local(grad_placements=[Partial()] if whole else None), *inputs[1:])

    return take


def _making(
    mesh: DeviceMesh, made: tuple[Placement, ...], wanted: tuple[Placement, ...], local: bool
) -> Callable[..., Any]:  # fmt: skip
    """Returns a hook that makes of this process's part of an output what the next layer takes."""

    def make(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        y = DTensor.from_local(output, mesh, made, run_check=False).redistribute(placements=wanted)
        return y.to_local() if local else y

    return make
