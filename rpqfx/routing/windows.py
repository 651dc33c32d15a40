"""Attention of each token to those nearby: the light branch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from rpqfx.errors import SpecError
from rpqfx.routing.left_padding import moved, moved_back, padding_in_front, places

# Tokens of one call of scaled_dot_product_attention on a CPU. Gradients of the keys and values that blocks share are
# made apart before they are added up; in segments these come from memory that is there already.
SEGMENT = 4096


def local_attention(qkv: Tensor, block: int, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Attention of each block of tokens to itself and the blocks beside it.

    Args:
        qkv: Queries, keys and values, ``[B, n, 3, h, e]``: in one, so that their gradients are too.
        block: Tokens of a block.
        causal: Whether a token sees none after it: the block before its own, and its own up to itself.
        mask: ``[B, n]`` bool, False for tokens that no other may see.

    Returns:
        ``[B, n, h, e]``. It costs ``n`` times three blocks (two if causal), and makes nothing of shape n x n.
    """
    batch, n = qkv.shape[:2]
    rest = -n % block
    if rest:
        qkv = F.pad(qkv, (0, 0, 0, 0, 0, 0, 0, rest))
    qkv = rearrange(qkv, "b (c w) s h e -> (b c) w s h e", w=block)
    bias = _bias(batch, n, block, causal, mask, qkv)
    segments, biases = (qkv,), (bias,)
    if qkv.device.type == "cpu" and not torch.compiler.is_compiling():
        segments, biases = (x.split(max(1, SEGMENT // block)) for x in (qkv, bias))
    qs, ks, vs = zip(*(part.unbind(2) for part in segments), strict=True)
    out = []
    for i, (part, some) in enumerate(zip(qs, biases, strict=True)):
        part = rearrange(part, "c w h e -> c h w e")
        part = F.scaled_dot_product_attention(part, _around(ks, i, causal), _around(vs, i, causal), some)
        out.append(rearrange(part, "c h w e -> c w h e"))
    whole = rearrange(torch.cat(out) if len(out) > 1 else out[0], "(b c) w h e -> b (c w) h e", b=batch)
    return whole[:, :n] if rest else whole


def _around(parts: tuple[Tensor, ...], i: int, causal: bool) -> Tensor:
    """Each block of a segment with those beside it, ``[c, h, 3 w, e]``: views into one copy of the segment."""
    part = parts[i]
    none = torch.zeros_like(part[:1])
    before = parts[i - 1][-1:] if i else none
    after = [] if causal else [parts[i + 1][:1] if i + 1 < len(parts) else none]
    line = rearrange(torch.cat([before, part, *after]), "c w h e -> (c w) h e")
    return line.unfold(0, (2 if causal else 3) * part.shape[1], part.shape[1]).permute(0, 1, 3, 2)


def _bias(batch: int, n: int, block: int, causal: bool, mask: Tensor | None, like: Tensor) -> Tensor:
    """``[B * c, 1, 1 or w, 2 w or 3 w]``: 0, or so far below it that the softmax has 0, where a token may not look.

    It is finite: a row where nothing may be seen, of a token that is masked itself, has some mean rather than NaN.
    """
    seen = torch.ones(batch, n, dtype=torch.bool, device=like.device) if mask is None else mask
    seen = rearrange(F.pad(seen, (0, -n % block)), "b (c w) -> b c w", w=block)
    beside = F.pad(seen, (0, 0, 1, 1))
    seen = torch.cat([beside[:, :-2], seen, *([] if causal else [beside[:, 2:]])], -1)
    seen = rearrange(seen, "b c s -> (b c) 1 1 s")
    if causal:
        near = torch.ones(block, 2 * block, dtype=torch.bool, device=like.device)
        own = near.tril(block) & near.triu(block)  # seen in any case: a mean of all would be of later ones too
        seen = (seen & near.tril(block)) | own
    hidden = torch.finfo(like.dtype).min / 2
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, hidden)


class LocalAttention(nn.Module):
    """Norm, projections, ``local_attention``, projection.

    Args:
        dim: Width of tokens.
        dim_head: Width of a head.
        heads: How many.
        window_size: Tokens in sight: blocks are half as long, or as long if causal.
        causal: Whether a token sees none after it.
        device: Where the tensors go.
        dtype: Of the Parameters.

    Raises:
        SpecError: If the window is odd and not causal.
    """

    def __init__(
        self,
        dim: int,
        *,
        dim_head: int = 64,
        heads: int = 8,
        window_size: int = 128,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if window_size < 1 or (window_size % 2 and not causal):
            raise SpecError(f"a window reaches equally far to both sides, so its size must be even; got {window_size}")
        self.heads, self.causal = heads, causal
        self.block = window_size if causal else window_size // 2
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False, device=device, dtype=dtype)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[B, n, d]`` to ``[B, n, d]``; the mask ``[B, n]`` is False for tokens that none may see.

        If causal, blocks begin at a sample's first token that may be seen, wherever padding puts it.
        """
        if not x.numel():
            return self.to_out(x.new_zeros(*x.shape[:2], self.to_out.in_features))
        if self.causal and mask is not None:
            lead = padding_in_front(mask)
            at = places(lead, x.shape[1])
            out = moved_back(self._attend(moved(x, at), moved(mask, at)), at)
            alone = self.to_out(self.to_qkv(self.norm(x)).chunk(3, -1)[2])  # as what comes first sees itself
            return torch.where((torch.arange(x.shape[1], device=x.device) < lead[:, None])[..., None], alone, out)
        return self._attend(x, mask)

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        qkv = rearrange(self.to_qkv(self.norm(x)), "b n (s h e) -> b n s h e", s=3, h=self.heads)
        out = local_attention(qkv, self.block, causal=self.causal, mask=mask)
        return self.to_out(rearrange(out, "b n h e -> b n (h e)"))
