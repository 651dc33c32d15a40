"""A weight without values, or on another device than its input, is an error that names it, and never a crash."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx.errors import InputError
from rpqfx.nn.placement import name_of
from tests import forks
from tests.helpers import randn


@pytest.fixture(scope="module", autouse=True)
def set_aside() -> Iterator[None]:
    """Keeps what other tests have left out of the search for a weight's name: it asks every object that is alive."""
    gc.freeze()
    yield
    gc.unfreeze()


POLICY = {"codebook_dim": 8, "codebook_bits": 3, "min_size": 1}


class Experts(nn.Module):
    """One matrix an expert, met in an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 16, 32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->beo", x, self.w)


class Foreign(nn.Module):
    """Products that codebooks serve, and a use that only the tensor serves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(16, 64)), nn.Parameter(torch.randn(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a @ (self.b * 2) + nn.functional.embedding(torch.tensor([3], device=x.device), self.b)


class Added(nn.Module):
    """Sums with a weight before a product with it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.w[:1], x).sum() + torch.stack([self.w[0], x[0]]).sum() + x @ self.w.t()


def _ids(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.zeros(shape, dtype=torch.int64)


def _x(*shape: int) -> Callable[[], Tensor]:
    return lambda: randn(0, *shape, dtype=torch.float32)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "Linear": (lambda: nn.Linear(32, 64), _x(3, 32), 1),
    "Linear, 1 row": (lambda: nn.Linear(32, 64, bias=False), _x(1, 32), 1),
    "Linear, 512 rows": (lambda: nn.Linear(32, 64), _x(512, 32), 1),
    "Linear, bfloat16": (lambda: nn.Linear(32, 64).bfloat16(), lambda: randn(0, 3, 32, dtype=torch.bfloat16), 1),
    "Linear, float16": (lambda: nn.Linear(32, 64).half(), lambda: randn(0, 3, 32, dtype=torch.float16), 1),
    "Embedding": (lambda: nn.Embedding(64, 32), _ids(4, 8), 1),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(64, 32), _ids(4, 8), 1),
    "Conv1d": (lambda: nn.Conv1d(16, 32, 3), _x(2, 16, 8), 1),
    "Conv2d": (lambda: nn.Conv2d(8, 32, 3, groups=2), _x(2, 8, 8, 8), 1),
    "Conv3d": (lambda: nn.Conv3d(8, 32, 2), _x(1, 8, 4, 4, 4), 1),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(32, 8, 3), _x(2, 32, 4, 4), 1),
    "LSTM": (lambda: nn.LSTM(16, 32), _x(4, 2, 16), 1),
    "GRU": (lambda: nn.GRU(16, 32), _x(4, 2, 16), 1),
    "RNN": (lambda: nn.RNN(16, 32), _x(4, 2, 16), 1),
    "GRUCell": (lambda: nn.GRUCell(16, 32), _x(2, 16), 1),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(32, 4), _x(4, 2, 32), 3),
    "Bilinear": (lambda: nn.Bilinear(16, 16, 32), _x(4, 16), 2),
    "experts": (Experts, _x(4, 16), 1),
    "foreign": (Foreign, _x(4, 16), 1),
    "foreign, sums": (Added, _x(4, 16), 1),
}  # fmt: skip


def rewritten(kind: str, device: str = "meta") -> tuple[nn.Module, Callable[[], Any]]:
    """A rewritten layer inside a model, and a call of it with an input on the CPU."""
    make, x, count = KINDS[kind]
    torch.manual_seed(0)
    with torch.device(device):
        model = nn.ModuleDict({"block": nn.ModuleList([make()])})
    model = rpqfx.rpqify(model, rpqfx.Policy.from_scratch(**POLICY))
    return model, lambda: model["block"][0](*[x()] * count)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_values_says_so(kind: str) -> None:
    """By every plan, with gradients and without."""
    model, call = rewritten(kind)
    for plan, grad in itertools.product(("auto", "lookup", "dequantize"), (False, True)):
        for module in model.modules():
            if isinstance(module, rpqfx.nn.RPQWeight):
                module.plan = plan
        with torch.set_grad_enabled(grad), pytest.raises(InputError) as found:
            call()
        text = str(found.value)
        assert "block.0." in text and "rpqfx.materialize" in text and "meta" in text
        assert type(model["block"][0]).__name__ in text
    rpqfx.materialize(model)
    call()


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_worked_out_on_the_meta_device(kind: str) -> None:
    model, _ = rewritten(kind)
    _, x, count = KINDS[kind]
    y = model["block"][0](*[x().to("meta")] * count)
    _, call = rewritten(kind, device="cpu")
    first = lambda y: y[0] if isinstance(y, tuple) else y  # noqa: E731
    assert first(y).is_meta and first(y).shape == first(call()).shape


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("plan", ["lookup", "dequantize"])
@pytest.mark.parametrize("name", ["codebooks", "codes", "scale", "signs", "column_scale"])
def test_one_tensor_without_values_is_enough(name: str, plan: Any, grad: bool) -> None:
    layer = rpqfx.nn.RPQLinear(
        32, 64, codebook_dim=8, codebook_bits=3, plan=plan,
        **{name: True} if name in ("scale", "signs", "column_scale") else {}
    )  # fmt: skip
    weight = layer.weight_rpq
    meta = getattr(weight, name).detach().to("meta")
    setattr(weight, name, nn.Parameter(meta) if meta.is_floating_point() else meta)
    calls: list[Callable[[], Any]] = [lambda: layer(torch.ones(2, 32)), lambda: weight(torch.tensor([1, 2])), weight]
    calls += [lambda: weight.linear_t(torch.ones(2, 64)), lambda: layer.weight, lambda: weight.linear(torch.ones(32))]
    for call in calls:
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(InputError, match=rf"(?s)weight \(RPQLinear\).*{name}.* on meta"),
        ):
            call()


def test_a_bias_without_values_is_named() -> None:
    layer = rpqfx.nn.RPQLinear(32, 64, codebook_dim=8, codebook_bits=3)
    layer.bias = nn.Parameter(layer.bias.detach().to("meta"))
    with pytest.raises(InputError, match="bias on meta"):
        layer(torch.ones(2, 32))


def test_an_input_on_the_meta_device_meets_weights_with_values_as_in_torch() -> None:
    layer = rpqfx.nn.RPQLinear(32, 64, bias=False, codebook_dim=8, codebook_bits=3)
    assert layer(torch.ones(2, 32, device="meta")).shape == (2, 64)


@pytest.mark.parametrize("name", ["contract", "contract_t", "matmul", "expand", "lookup", "accumulate", "collect"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_look_at_devices_themselves(name: str, dtype: torch.dtype) -> None:
    """Whatever calls them, and whichever backend serves them."""
    books, codes = torch.zeros(1, 2, 4, 3, dtype=dtype), torch.zeros(1, 2, 8, dtype=torch.uint8)
    x, y = torch.ones(2, 6, dtype=dtype), torch.ones(2, 8, dtype=dtype)
    arguments: dict[str, list[Any]] = {
        "contract": [x, books, codes, None, None],
        "contract_t": [y, books, codes, None],
        "matmul": [x, books, codes, None, None],
        "expand": [books, codes, None, None],
        "lookup": [torch.tensor([1]), books, codes, None, None],
        "accumulate": [x, y, codes, None, 2, 4],
        "collect": [torch.ones(8, 6, dtype=dtype), codes, None, 2, 4],
    }
    given = arguments[name]
    operator = getattr(torch.ops.rpqfx, name)
    operator(*given)
    places = [i for i, arg in enumerate(given) if isinstance(arg, Tensor)]
    for some in itertools.chain.from_iterable(itertools.combinations(places, n) for n in range(1, len(places))):
        mixed = [arg.to("meta") if i in some else arg for i, arg in enumerate(given)]
        with pytest.raises(TypeError, match="meta"):
            operator(*mixed)


def test_a_weight_is_named_by_its_place_in_the_model() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 32)), nn.Linear(32, 64))
    small = rpqfx.rpqify(model, rpqfx.Policy.from_scratch(**POLICY))
    assert name_of(small[0][0].weight_rpq) == "0.0.weight (RPQLinear)"
    copied = copy.deepcopy(small)
    assert name_of(copied[1].weight_rpq) == "1.weight (RPQLinear)"
    assert name_of(small[1].weight_rpq) == "1.weight (RPQLinear)"
    layer = rpqfx.nn.RPQLinear(8, 8)
    assert name_of(layer.weight_rpq) == "weight (RPQLinear)"


@pytest.mark.slow
def test_compiled_code_says_the_same() -> None:
    torch._dynamo.reset()
    layer = rpqfx.nn.RPQLinear(32, 64, codebook_dim=8, codebook_bits=3, device="meta")
    with pytest.raises(Exception, match="meta"):
        torch.compile(layer, backend="eager")(torch.ones(2, 32))


FORMER_CRASHES = """
import torch, rpqfx
from torch import nn
for rows in (1, 64, 512):
    for plan in ("auto", "lookup", "dequantize"):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(512, 2048, bias=False))
        model = rpqfx.rpqify(model, rpqfx.Policy.from_scratch(codebook_dim=64, codebook_bits=5, plan=plan))
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                try:
                    model(torch.randn(rows, 512))
                except rpqfx.errors.InputError as error:
                    assert "0.weight (RPQLinear)" in str(error), error
                else:
                    raise SystemExit("accepted")
print("done")
"""


def test_what_once_ended_the_process_does_not() -> None:
    done = forks.run(FORMER_CRASHES)
    assert done.stdout == "done\n", done.stderr
