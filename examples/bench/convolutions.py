"""A convolution three ways, in one run and in turns: dense, filters dequantized for the call, and entries as filters.

python examples/bench/convolutions.py       # two threads, float32, medians of 15, in milliseconds
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from layers import forward, forward_backward, milliseconds
from torch import Tensor

from rpqfx import CodebookSpec, ops

# channels in, out, kernel, length of a sub-vector, entries, batch, size of the image
CASES = (
    (256, 512, 3, 72, 64, 8, 14), (256, 512, 3, 144, 64, 8, 14), (256, 512, 3, 72, 16, 8, 14),
    (256, 512, 3, 72, 256, 8, 14), (128, 512, 3, 72, 64, 4, 28), (64, 256, 3, 72, 16, 4, 56),
    (1024, 1024, 3, 72, 64, 8, 7), (1024, 2048, 1, 64, 256, 8, 14),
)  # fmt: skip


def main() -> None:
    torch.set_num_threads(2)
    print("| channels, kernel, d, K, batch x image | pass | dense | dequantize | lookup | over dense | taken |")
    print("|---|---|---|---|---|---|---|")
    for channels, out, k, d, entries, batch, size in CASES:
        torch.manual_seed(0)
        shape = (out, channels, k, k)
        spec = CodebookSpec(out, channels * k * k, d, entries)
        books = (torch.randn(spec.codebooks_shape) / 50).requires_grad_()
        codes = torch.randint(entries, spec.codes_shape).to(spec.code_dtype)
        dense = (torch.randn(shape) / 50).requires_grad_()
        geometry = {"stride": (1, 1), "padding": (k // 2,) * 2, "dilation": (1, 1), "groups": 1}

        def held(plan: ops.Plan, x: Tensor, books=books, codes=codes, shape=shape, geometry=geometry) -> Tensor:
            return ops.conv(x, ops.Tensors(books, codes), shape, plan=plan, **geometry)

        ways = [partial(F.conv2d, weight=dense, padding=k // 2), partial(held, "dequantize"), partial(held, "lookup")]
        x = torch.randn(batch, channels, size, size, requires_grad=True)
        taken = ops.plan.cheaper_conv(spec.codebooks_shape, spec.codes_shape, batch * size * size, x.device)
        name = f"{channels} to {out}, {k} x {k}, {d}, {entries}, {batch} x {size} x {size}"
        for what, run in (("forward", forward), ("forward + backward", forward_backward)):
            a, b, c = milliseconds(run, ways, x)
            print(f"| {name} | {what} | {a:.2f} | {b:.2f} | {c:.2f} | {a / c:.1f} x | {taken} |", flush=True)


if __name__ == "__main__":
    main()
