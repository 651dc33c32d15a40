"""The operators that compiled training graphs see: their schemas, fakes and what compilers keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import rpqfx
from rpqfx.nn import RPQConv2d, RPQConvTranspose2d, RPQLinear
from tests.helpers import randn, stored

SPEC = rpqfx.CodebookSpec(12, 8, 2, entries=4, signs=True)
CONV = ([12, 2, 2, 2], [1, 2], [1, 0], [1, 1], False, [0, 0], 1)


def arguments() -> dict[str, tuple[Any, ...]]:
    books, codes, _, signs = stored(SPEC, 0)
    held = (books, codes, signs)
    x, y, image = randn(1, 5, 8), randn(2, 5, 12), randn(3, 2, 2, 5, 6)
    out = randn(4, 2, 12, 6, 3)
    return {
        "contract": (x, *held),
        "contract_t": (y, *held),
        "accumulate": (x, y, codes, signs, SPEC.books, SPEC.entries),
        "contract_grads": (x, y, *held),
        "matmul": (x, *held),
        "matmul_t": (y, *held),
        "matmul_book": (x, y, codes, signs, SPEC.books, SPEC.entries),
        "conv": (image, *held, *CONV),
        "gather_sum": (randn(5, 3, 1, 4, 4, 6), codes),
        "bin_sum": (randn(6, 3, 12, 6), codes, SPEC.entries),
        "conv_book": (image, out, codes, signs, *CONV, SPEC.books, SPEC.entries),
    }


@pytest.mark.parametrize("name", sorted(arguments()))
def test_operators_keep_torchs_rules(name: str) -> None:
    """Schema, fake and dispatch agree (gradients are those of the Functions around them)."""
    operator = getattr(torch.ops.rpqfx, name).default
    torch.library.opcheck(operator, arguments()[name], test_utils=("test_schema", "test_faketensor"))


def kept_by_compiler(layer: nn.Module, x: Tensor) -> list[int]:
    """Elements of every tensor that a compiled forward hands to its backward."""
    kept: list[int] = []

    def forward_compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args
        kept.extend(node.meta["val"].numel() for node in outputs[1:] if isinstance(node, torch.fx.Node))
        return graph.forward

    backend = aot_autograd(fw_compiler=forward_compiler, bw_compiler=lambda graph, _: graph.forward)
    torch.compile(layer, fullgraph=True, backend=backend)(x).sum().backward()
    return kept


@pytest.mark.parametrize(
    ("layer", "x", "weight"),
    [
        (lambda: RPQLinear(96, 160, codebook_dim=48, bits=2, bias=False), (7, 96), 96 * 160),
        (lambda: RPQLinear(96, 160, codebook_dim=2, bits=4, bias=False), (7, 96), 96 * 160),
        (lambda: RPQLinear(96, 160, codebook_dim=2, bits=4, bias=False, split="column"), (7, 96), 96 * 160),
        (lambda: RPQLinear(512, 2048, codebook_dim=128, bits=6, bias=False), (64, 512), 512 * 2048),
        (lambda: RPQLinear(2048, 512, codebook_dim=128, bits=6, bias=False, split="column"), (64, 2048), 512 * 2048),
        (lambda: RPQConv2d(8, 24, 3, codebook_dim=3, bits=2, bias=False), (2, 8, 5, 5), 24 * 72),
        (lambda: RPQConv2d(8, 96, 3, codebook_dim=72, bits=1, bias=False), (2, 8, 5, 5), 96 * 72),
        (lambda: RPQConvTranspose2d(96, 8, 3, codebook_dim=72, bits=1, bias=False), (2, 96, 5, 5), 96 * 72),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning")
def test_compilers_keep_no_weight(layer: Any, x: tuple[int, ...], weight: int) -> None:
    """The input, the codebooks and the codes pass from a compiled forward to its backward, and nothing else."""
    torch._dynamo.reset()
    made, image = layer(), torch.randn(x, requires_grad=True)
    kept = kept_by_compiler(made, image)
    allowed = {image.numel(), *(tensor.numel() for tensor in (*made.parameters(), *made.buffers()))}
    assert kept and set(kept) <= allowed and weight not in allowed


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning")
def test_that_claim_can_fail() -> None:
    """A layer that expands in plain sight is caught."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = RPQLinear(96, 160, codebook_dim=2, bits=4).weight_rpq

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.held())

    torch._dynamo.reset()
    assert max(kept_by_compiler(Plain(), torch.randn(7, 96, requires_grad=True))) >= 96 * 160
