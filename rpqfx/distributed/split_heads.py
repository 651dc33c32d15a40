"""Attention on codes whose heads are split over processes by the projections around it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from rpqfx.errors import DistributedError, InputError
from rpqfx.kv.attention.score_options import Changes
from rpqfx.kv.cache.pending import Pending
from rpqfx.kv.call_state import angles_of, keep_angles
from rpqfx.kv.module import KVAttention


class HeadParallel(ParallelStyle):
    """Attention on codes between projections whose outputs ``ColwiseParallel`` splits: each process has some heads.

    It goes into the plan for ``kv_codes`` of the attention module, on models that ``rpqfx.quantize_kv`` returned. Heads
    share codes, so the queries, keys and values of all heads are gathered, every process holds the whole cache and
    attends with all heads, and hands on those that are its own. Results are those of one process.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, KVAttention):
            raise DistributedError(
                "HeadParallel is for attention on codes (kv_codes of an attention module, after rpqfx.quantize_kv), "
                f"got {type(module).__name__}; leave it out of the plan"
            )
        if module.latent or module.products is not None:
            raise DistributedError(
                f"{module.name} makes its keys from a latent, or multiplies queries by keys in its own code, and its "
                "heads cannot be split; leave its projections out of the plan, or skip it with a KVRule"
            )
        module.__class__ = SplitAttention
        module.__dict__["mesh"] = device_mesh
        for coder in (module.keys, module.values):
            coder.quantizer.copies = device_mesh.size()  # all processes of the mesh see the same tokens
            if coder.mean is not None and coder.mean.requires_grad:
                coder.mean.register_hook(partial(_of_own_heads, mesh=device_mesh))
        return module


class SplitAttention(KVAttention):
    """Attention on codes that is handed some of the heads."""

    mesh: DeviceMesh

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        changes: Changes | None = None,
    ) -> Tensor:
        """See ``KVAttention``; of this process's heads.

        Raises:
            InputError: As there; and if heads have masks or sinks of their own.
        """
        if (attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[1] != 1) or (
            changes is not None and changes.sinks is not None
        ):
            raise InputError(
                f"{self.name}: heads that are split over processes cannot have masks, or sinks, of their own; leave "
                "its projections out of the plan"
            )
        whole = self._whole(query)
        if isinstance(key, Pending):
            if key.coming.arrival is None:
                key.coming.keys, key.coming.values = self._whole(key.coming.keys), self._whole(key.coming.values)
            out = super().forward(
                whole, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, changes
            )  # fmt: skip
        else:
            keys, known = self._whole(key), angles_of(key)
            if known is not None:
                keep_angles(keys, known)
            out = super().forward(
                whole, keys, self._whole(value), attn_mask, dropout_p, is_causal, scale, enable_gqa, changes
            )
            if (angles := angles_of(keys)) is not None:
                keep_angles(key, angles)
        return out.narrow(1, self.mesh.get_local_rank() * query.shape[1], query.shape[1])

    def _whole(self, x: Tensor) -> Tensor:
        gathered: Tensor = _Gather.apply(x, self.mesh)
        return gathered


class _Gather(torch.autograd.Function):
    """Heads ``[B, H, T, D]`` of all processes, in their order.

    The others' use of this process's heads has no gradient that is not found here too: outputs are of the heads that
    are one's own, and losses of codes are computed from all heads in every process.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.heads, ctx.rank = x.shape[1], mesh.get_local_rank()
        return _gathered(x, mesh, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].narrow(1, ctx.rank * ctx.heads, ctx.heads), None


def _of_own_heads(grad: Tensor, mesh: DeviceMesh) -> Tensor:
    """Returns the gradient of a head's mean ``[H, D]`` as the process has it whose outputs are the head's."""
    return _gathered(grad.chunk(mesh.size())[mesh.get_local_rank()], mesh, 0)


def _gathered(x: Tensor, mesh: DeviceMesh, axis: int) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
    dist.all_gather(parts, x.contiguous(), group=mesh.get_group())
    return torch.cat(parts, axis)
