"""RPQMultiheadAttention."""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from rpqfx.errors import InputError
from rpqfx.nn.hosting.backed import held
from rpqfx.nn.hosting.host import register_layer
from rpqfx.nn.layer import DenseOptions, Device, LayerOptions, RPQLayer, Split, apply_linear
from rpqfx.nn.linear import RPQLinear
from rpqfx.ops import Plan
from rpqfx.validation.spelling import defaults_of, show_options


class Attends(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` computed step by step, wherever its projections are held."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments, masks and results as ``torch.nn.MultiheadAttention.forward``.

        Raises:
            InputError: If ``is_causal`` is given without the mask it describes.
        """
        if is_causal and attn_mask is None:
            raise InputError("is_causal=True says what attn_mask is; pass that mask too, as for torch.nn")
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q[None], k[None], v[None]
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        q, k, v, mask = self._append(q, k, v, self._mask(q, key_padding_mask, attn_mask, batched))
        rate = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = torch.matmul(q / math.sqrt(self.head_dim), k.transpose(-1, -2))
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), rate)
            out = torch.matmul(weights, v)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, rate)
        out = self.out_proj(rearrange(out, "b h l e -> l b (h e)"))  # torch.nn's order in memory: dropout follows it
        if batched:
            out = out.transpose(0, 1) if self.batch_first else out
        else:
            out = out[:, 0]
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        return out, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.embed_dim
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if not self._qkv_same_embed_dim:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            inputs = zip(names, (query, key, value), biases, strict=True)
            q, k, v = (apply_linear(self, name, x, bias) for name, x, bias in inputs)
            return q, k, v
        if query is key and key is value:
            q, k, v = apply_linear(self, "in_proj_weight", query, self.in_proj_bias).chunk(3, -1)
            return q, k, v
        parts = []
        for i, (x, bias) in enumerate(zip((query, key, value), biases, strict=True)):
            rows = slice(i * width, (i + 1) * width)
            parts.append(apply_linear(self, "in_proj_weight", x, bias, rows))
        q, k, v = parts
        return q, k, v

    def _mask(
        self, q: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, batched: bool
    ) -> Tensor | None:
        """Returns both masks as one to be added to the scores ``[B, H, L, S]``."""

        def added(mask: Tensor) -> Tensor:
            if mask.dtype != torch.bool:
                return mask.to(q.dtype)
            return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))

        total = None
        if attn_mask is not None:
            total = added(attn_mask)
            if total.dim() == 3:
                total = rearrange(total, "(b h) l s -> b h l s", h=self.num_heads)
            else:
                total = total[None, None]
        if key_padding_mask is not None:
            padding = added(key_padding_mask if batched else key_padding_mask[None])[:, None, None]
            total = padding if total is None else total + padding
        return total

    def _append(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Splits heads; appends the trained and the zero key and value, which no mask hides."""
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1).to(k.dtype)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1).to(v.dtype)], 1)
            extra += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            extra += 1
        if mask is not None and extra:
            mask = F.pad(mask, (0, extra))
        q, k, v = (rearrange(x, "b l (h e) -> b h l e", h=self.num_heads) for x in (q, k, v))
        return q, k, v, mask


class RPQMultiheadAttention(RPQLayer, Attends):
    """Attention with several heads, as ``torch.nn.MultiheadAttention``, with all four projections quantized.

    Further arguments are those of ``RPQLayer``; they hold for each projection.

    Other Args:
        embed_dim (int): Width of queries and of the result.
        num_heads (int): Heads; divides ``embed_dim``.
        dropout (float): Of the attention weights, in training.
        bias (bool): Whether projections have a bias.
        add_bias_kv (bool): Whether a trained key and value are appended.
        add_zero_attn (bool): Whether a zero key and value are appended.
        kdim (int | None): Width of keys, ``embed_dim`` if left out.
        vdim (int | None): Width of values, ``embed_dim`` if left out.
        batch_first (bool): Whether inputs are ``[B, L, E]`` rather than ``[L, B, E]``.
        device (torch.device | str | None): Where the tensors go.
        dtype (torch.dtype | None): Of codebooks and biases.

    Raises:
        SpecError: If the codebooks do not fit a weight.
    """

    _dense = nn.MultiheadAttention
    _weights = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    in_proj_weight = held("in_proj_weight")
    q_proj_weight = held("q_proj_weight")
    k_proj_weight = held("k_proj_weight")
    v_proj_weight = held("v_proj_weight")

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, add_bias_kv: bool = False,
        add_zero_attn: bool = False, kdim: int | None = None, vdim: int | None = None, batch_first: bool = False,
        device: Device = None, dtype: torch.dtype | None = None, **options: Unpack[LayerOptions],
    ) -> None:  # fmt: skip
        dense = nn.MultiheadAttention(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, "meta", dtype
        )
        super().__init__(dense, device, options)

    @classmethod
    def _splits(cls) -> bool:
        return True

    def _hold(self, dense: nn.Module, split: Split, plan: Plan, options: dict[str, Any]) -> None:
        super()._hold(dense, split, plan, options)
        out = RPQLinear.__new__(RPQLinear)
        nn.Module.__init__(out)
        out._hold(dense.out_proj, split, plan, options)  # type: ignore[arg-type]
        self.out_proj = out  # type: ignore[assignment]

    @classmethod
    def from_dense(cls, dense: nn.Module, **options: Unpack[DenseOptions]) -> RPQMultiheadAttention:
        """As ``RPQLayer.from_dense``, output projection included."""
        made = super().from_dense(dense, **options)
        plain = nn.Linear.__new__(nn.Linear)  # torch's own subclass of Linear, which only marks it for quantisation
        plain.__dict__ = dict(made.out_proj.__dict__)
        made.out_proj = RPQLinear.from_dense(plain, **options)  # type: ignore[assignment]
        return made

    def reset_parameters(self) -> None:
        """Draws all projections anew, then the rest."""
        if isinstance(self.out_proj, RPQLinear):
            self.out_proj.reset_parameters()
        super().reset_parameters()

    @torch.no_grad()
    def reset_rest(self) -> None:
        """Biases become zero; the appended key and value are drawn as torch.nn draws them."""
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                bias.zero_()
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                nn.init.xavier_normal_(extra)


_FIT = defaults_of(RPQLayer.from_dense)
show_options(RPQMultiheadAttention.from_dense.__func__, DenseOptions, _FIT)  # type: ignore[attr-defined]
register_layer(nn.MultiheadAttention, RPQMultiheadAttention)
