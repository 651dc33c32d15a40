"""The operators that compiled training graphs see: their schemas, fakes and what compilers keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import rpqfx
from rpqfx.nn import RPQConv2d, RPQConvTranspose2d, RPQLinear
from tests.helpers import randn, stored

# Small, since gradients are checked number by number; the signs of nine vectors are two bytes.
SPEC = rpqfx.CodebookSpec(9, 4, 2, entries=3, signs=True)
CONV = ([9, 2, 1, 2], [1, 2], [1, 0], [1, 1], False, [0, 0], 1)


def arguments() -> dict[str, tuple[Any, ...]]:
    books, codes, _, signs = stored(SPEC, 0)
    held = (books, codes, signs)
    x, y, image = randn(1, 2, 4), randn(2, 2, 9), randn(3, 2, 2, 1, 4)
    out = randn(4, 2, 9, 3, 2)
    plain, scale = held[:2], randn(5, 9)
    table, maps = randn(6, 2, *codes.shape[:2], SPEC.entries, 3), randn(7, 2, 9, 3)
    return {
        "contract": (x, *held, scale),
        "contract_t": (y, *held),
        "accumulate": (x, y, codes, signs, SPEC.num_codebooks, SPEC.entries),
        "contract_grads": (x, y, *held),
        "matmul": (x, *held, None),
        "matmul_t": (y, *held),
        "matmul_book": (x, y, codes, signs, SPEC.num_codebooks, SPEC.entries),
        "conv": (image, *held, *CONV),
        "conv_book": (image, out, codes, signs, *CONV, SPEC.num_codebooks, SPEC.entries),
        "expand": (*plain, scale, signs),
        "expand dims": (*plain, None, signs, randn(9, 4)),
        "lookup": (torch.tensor([[3, 0], [8, 3]]), *plain, scale, signs),
        "lookup dims": (torch.tensor([[3, 0], [8, 3]]), *plain, scale, signs, randn(9, 4)),
        "collect": (randn(8, 9, 4), codes, signs, SPEC.num_codebooks, SPEC.entries),
        "gather_sum": (table, codes),
        "bin_sum": (maps, codes, SPEC.entries),
    }


RULES = ("test_schema", "test_autograd_registration", "test_faketensor")


TRACED = "test_aot_dispatch_dynamic"
# One of each kind of operator; the others are traced in the same way.
OF_A_KIND = {"contract", "matmul_t", "contract_grads", "conv", "conv_book", "expand", "lookup", "bin_sum"}


def ruled() -> Iterator[Any]:
    for name in sorted(arguments()):
        for dtype in (torch.float32, torch.float64):
            slow = dtype is torch.float64 or name not in OF_A_KIND
            yield pytest.param(name, dtype, RULES, id=f"{name}-{dtype}")
            marks = [pytest.mark.slow] * slow
            yield pytest.param(name, dtype, (TRACED,), id=f"{name}-{dtype}, traced", marks=marks)


@pytest.mark.parametrize(("name", "dtype", "rules"), list(ruled()))
def test_operators_keep_torchs_rules(name: str, dtype: torch.dtype, rules: tuple[str, ...]) -> None:
    """Schema, fake, gradient and tracing agree, in the dtypes of the kernels and of the plain operators."""
    args = [cast(arg, dtype) for arg in arguments()[name]]
    torch.library.opcheck(getattr(torch.ops.rpqfx, name.split()[0]).default, args, test_utils=rules)


@pytest.mark.parametrize("name", sorted(arguments()))
def test_gradients_of_operators_are_right_to_the_second_order(name: str) -> None:
    operator = getattr(torch.ops.rpqfx, name.split()[0])
    args = [cast(arg, torch.float64) for arg in arguments()[name]]
    places = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.requires_grad]

    def run(*floats: Tensor) -> Any:
        return operator(*[floats[places.index(i)] if i in places else arg for i, arg in enumerate(args)])

    assert places
    inputs = [args[i] for i in places]
    assert torch.autograd.gradcheck(run, inputs) and torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("name", ["contract", "contract_t", "matmul", "matmul_t", "conv"])
def test_autocast_runs_products_in_its_dtype(name: str) -> None:
    """As dense products do; the gradient of the codebooks is float32 all the same."""
    args = [cast(arg, torch.float32) for arg in arguments()[name]]
    with torch.autocast("cpu", torch.bfloat16):
        y = getattr(torch.ops.rpqfx, name)(*args)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert args[1].grad.dtype == torch.float32


def cast(arg: Any, dtype: torch.dtype) -> Any:
    """Floating tensors as leaves of that dtype, all else as it is."""
    if not isinstance(arg, Tensor) or not arg.is_floating_point():
        return arg
    return arg.detach().to(dtype).requires_grad_()


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


def slow(*given: Any) -> Any:
    return pytest.param(*given, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("layer", "x", "weight"),
    [
        slow(lambda: RPQLinear(96, 160, codebook_dim=48, codebook_bits=2, bias=False), (7, 96), 96 * 160),
        slow(lambda: RPQLinear(96, 160, codebook_dim=2, codebook_bits=4, bias=False), (7, 96), 96 * 160),
        (lambda: RPQLinear(96, 160, codebook_dim=2, codebook_bits=4, bias=False, split="column"), (7, 96), 96 * 160),
        slow(lambda: RPQLinear(512, 2048, codebook_dim=128, codebook_bits=6, bias=False), (64, 512), 512 * 2048),
        slow(
            lambda: RPQLinear(2048, 512, codebook_dim=128, codebook_bits=6, bias=False, split="column"),
            (64, 2048), 2**20,
        ),
        (lambda: RPQConv2d(8, 24, 3, codebook_dim=3, codebook_bits=2, bias=False), (2, 8, 5, 5), 24 * 72),
        slow(
            lambda: RPQLinear(96, 160, codebook_dim=2, codebook_bits=4, bias=False, column_scale=True),
            (7, 96), 96 * 160,
        ),
        slow(
            lambda: RPQConv2d(8, 96, 3, codebook_dim=72, codebook_bits=1, bias=False, column_scale=True),
            (2, 8, 5, 5), 96 * 72,
        ),
        slow(lambda: RPQConv2d(8, 96, 3, codebook_dim=72, codebook_bits=1, bias=False), (2, 8, 5, 5), 96 * 72),
        slow(
            lambda: RPQConvTranspose2d(96, 8, 3, codebook_dim=72, codebook_bits=1, bias=False),
            (2, 96, 5, 5), 96 * 72,
        ),
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
            self.held = RPQLinear(96, 160, codebook_dim=2, codebook_bits=4).weight_rpq

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.held())

    torch._dynamo.reset()
    assert max(kept_by_compiler(Plain(), torch.randn(7, 96, requires_grad=True))) >= 96 * 160
