"""What the tests share: drawing codebooks, the slow plain expansion, and the dense twin of a layer.

Hypothesis draws seeds, and tensors come from an explicit generator of that seed, so that a failure shrinks and
replays.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from rpqfx import ops
from rpqfx.codebook import CodebookSpec, pack_signs
from rpqfx.nn import Layout, RPQWeight, VirtualWeight
from rpqfx.ops import forms

SUFFIX = "_rpq"
seeds = st.integers(0, 2**31 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


@contextlib.contextmanager
def forms_run() -> Iterator[set[str]]:
    """Names of the forms of matrix products that run meanwhile, forward or backward."""
    ran: set[str] = set()

    def noted(form: type, name: str) -> Callable[..., Any]:
        run = getattr(form, name)
        return lambda *args: ran.add(form.__name__) or run(*args)

    with pytest.MonkeyPatch.context() as patch:
        for form in (forms.Contract, forms.Matmul):
            for name in ("out", "left", "book", "grads"):
                patch.setattr(form, name, noted(form, name))
        yield ran


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


# ---------------------------------------------------------------------------------------------------- codebooks


@st.composite
def specs(
    draw: st.DrawFn, scale: bool | None = None, signs: bool | None = None, column_scale: bool = False
) -> CodebookSpec:
    """Any small spec, sharing and odd numbers of vectors and entries included; perhaps with ``column_scale``."""
    d, sub_vectors = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    shares = [0, *divisors(d * sub_vectors)] if column_scale else [0]
    return CodebookSpec(
        num_vectors=draw(st.integers(1, 20)),
        dim=d * sub_vectors,
        codebook_dim=d,
        entries=draw(st.integers(2, 9)),
        stages=draw(st.integers(1, 3)),
        num_codebooks=draw(st.sampled_from(divisors(sub_vectors))),
        scale=draw(st.booleans()) if scale is None else scale,
        signs=draw(st.booleans()) if signs is None else signs,
        column_scale_group=draw(st.sampled_from(shares)),
    )


def stored(spec: CodebookSpec, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """Random ``codebooks, codes, scale, signs`` of a spec."""
    g = generator(seed)
    codebooks = torch.randn(spec.codebooks_shape, generator=g, dtype=torch.float64).to(dtype)
    codes = torch.randint(spec.entries, spec.codes_shape, generator=g).to(spec.code_dtype)
    scale = torch.rand(spec.num_vectors, generator=g, dtype=torch.float64).to(dtype) + 0.5
    minus = torch.rand(spec.codes_shape, generator=g) < 0.5
    return codebooks, codes, scale if spec.scale else None, pack_signs(minus) if spec.signs else None


def stored_all(spec: CodebookSpec, seed: int, dtype: torch.dtype = torch.float64) -> ops.Tensors:
    """``stored`` with the factors of the columns."""
    dims = (
        torch.rand(max(1, spec.num_column_scales), generator=generator(seed + 1), dtype=torch.float64).to(dtype) + 0.5
    )
    return ops.Tensors(*stored(spec, seed, dtype), dims if spec.column_scale_group else None)


def floats(tensors: ops.Tensors) -> dict[str, Tensor]:
    """Those of a matrix's tensors that are trained, by name, as leaves that want a gradient."""
    names = ("codebooks", "scale", "column_scale")
    return {name: t.requires_grad_() for name in names if (t := getattr(tensors, name)) is not None}


def is_minus(signs: Tensor, stage: int, sub_vector: int, vector: int) -> bool:
    return bool(int(signs[stage, sub_vector, vector // 8]) >> vector % 8 & 1)


def naive_expand(
    codebooks: Tensor, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The definition of the matrix, entry by entry. Differentiable, slow and plain."""
    stages, sub_vectors, num_vectors = codes.shape
    share = sub_vectors // codebooks.shape[1]
    rows = []
    for n in range(num_vectors):
        parts = []
        for m in range(sub_vectors):
            part = torch.zeros_like(codebooks[0, 0, 0])
            for r in range(stages):
                entry = codebooks[r, m // share, int(codes[r, m, n])]
                part = part + (-entry if signs is not None and is_minus(signs, r, m, n) else entry)
            parts.append(part)
        row = torch.cat(parts)
        rows.append(row if scale is None else row * scale[n])
    if column_scale is None:
        return torch.stack(rows)
    share = len(rows[0]) // len(column_scale)
    return torch.stack(rows) * torch.stack([column_scale[j // share] for j in range(len(rows[0]))])


@st.composite
def codebook_options(draw: st.DrawFn, sizes: Iterable[tuple[int, int]], split: bool = False) -> dict[str, Any]:
    """Codebook arguments of a layer whose weights have these (rows, columns)."""
    options: dict[str, Any] = {}
    sizes = list(sizes)
    if split:
        options["split"] = draw(st.sampled_from(["row", "column"]))
        sizes = [(d, n) for n, d in sizes] if options["split"] == "column" else sizes
    d = draw(st.sampled_from(divisors(math.gcd(*[dim for _, dim in sizes]))))
    if len({dim for _, dim in sizes}) == 1 and draw(st.booleans()):
        options["num_subvectors"] = sizes[0][1] // d
    else:
        options["codebook_dim"] = d
    options["codebook_bits"] = draw(st.integers(1, max(1, min(4, min(n for n, _ in sizes).bit_length() - 1))))
    options["stages"] = draw(st.integers(1, 2))
    options["sharing"] = draw(st.sampled_from(["own", "layer"]))
    options["scale"] = draw(st.booleans())
    options["column_scale"] = draw(st.booleans())
    options["signs"] = draw(st.booleans())
    options["grad_scale"] = draw(st.sampled_from(["sum", "sqrt", "mean"]))
    return options


# --------------------------------------------------------------------------------------------- the dense twin


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Every parameter of a module anew from a seed; codes and signs too, so that nothing is balanced."""
    g = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64))
        for child in module.modules():
            if isinstance(child, RPQWeight):
                child.codes.copy_(torch.randint(child.spec.entries, child.codes.shape, generator=g))
                if child.signs is not None:
                    minus = torch.rand(child.codes.shape, generator=g) < 0.5
                    child.signs.copy_(pack_signs(minus))
    return module


def naive_tensor(weight: RPQWeight, leaves: Mapping[str, Tensor | None] | None = None) -> Tensor:
    """The tensor that an RPQWeight stands for, from its definition; ``leaves`` take the place of its Parameters."""
    layout: Layout = weight.layout
    held = {**weight._parameters, **(leaves or {})}
    vectors = naive_expand(held["codebooks"], weight.codes, held["scale"], weight.signs, held["column_scale"])
    if layout.zero_vector is not None:
        keep = torch.ones(len(vectors), 1, dtype=vectors.dtype)
        keep[layout.zero_vector] = 0
        vectors = vectors * keep
    return seen_as(layout, vectors)


def seen_as(layout: Layout, vectors: Tensor) -> Tensor:
    """Vectors as the tensor that a layout says they are, from the definition of layouts."""
    if layout.experts is None:
        return (vectors.t() if layout.transposed else vectors).reshape(layout.shape)
    experts, rows, cols = layout.shape
    count, length = (cols, rows) if layout.transposed else (rows, cols)
    matrices = []
    for e in range(experts):
        if layout.experts == "shared":
            matrix = vectors[e * count : (e + 1) * count]
        else:
            matrix = vectors[:, e * length : (e + 1) * length]
        matrices.append(matrix.t() if layout.transposed else matrix)
    return torch.stack(matrices)


def dense_twin(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """What the torch.nn namesake of a layer holds.

    Returns:
        Copies of the layer's parameters as leaves, the dense parameters made of them (clones, each by the name it
        has in torch.nn), and for each leaf the factor that ``grad_scale`` puts on its gradient.
    """
    leaves = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in module.named_parameters()}
    held = {name: child for name, child in module.named_modules() if isinstance(child, RPQWeight)}
    dense = {name: leaf for name, leaf in leaves.items() if name.rpartition(".")[0] not in held}
    factors = dict.fromkeys(leaves, 1.0)
    for name, child in held.items():
        tensor = naive_tensor(child, {part: leaves[f"{name}.{part}"] for part, _ in child.named_parameters()})
        dense[name.removesuffix(SUFFIX)] = tensor.clone()
        factors[f"{name}.codebooks"] = child.spec.grad_factor
    return leaves, dense, factors


def assert_same(ours: Tensor, theirs: Tensor, what: str = "result", tolerance: float = 1e-9) -> None:
    ours = ours.to_dense() if ours.is_sparse else ours
    torch.testing.assert_close(
        ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def gradients(
    outputs: Any, wanted: dict[str, Tensor], seed: int = 0, factors: dict[str, float] | None = None
) -> dict[str, Tensor]:
    """Gradients of a random linear function of the outputs; zeros where there is no path."""
    results = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out is not None]
    total = sum((out * randn(seed + i, *out.shape).to(out.dtype)).sum() for i, out in enumerate(results))
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    grads = {}
    for (name, tensor), grad in zip(wanted.items(), found, strict=True):
        grad = torch.zeros_like(tensor) if grad is None else grad.to_dense() if grad.is_sparse else grad
        grads[name] = grad * (factors or {}).get(name, 1.0)
    return grads


def assert_equals_dense(
    layer: nn.Module,
    dense: nn.Module,
    *inputs: Any,
    call: Callable[..., Any] | None = None,
    seed: int = 0,
    tolerance: float = 1e-9,
    **kwargs: Any,
) -> None:
    """Outputs and all gradients of a layer are those of ``dense`` holding the expanded weight.

    Args:
        layer: The layer under test.
        dense: The torch.nn module with the same arguments; its own parameters are not used.
        *inputs: Of forward. Floating tensors get a gradient; the same tensor twice stays the same tensor.
        call: Runs ``dense`` instead of ``functional_call``, as ``call(dense, parameters, *inputs, **kwargs)``.
        seed: Of dropout and of the outputs' cotangents.
        tolerance: Relative and absolute.
        **kwargs: Of forward. Floating tensors among them get no gradient.
    """
    leaves, weights, factors = dense_twin(layer)
    call = call or (lambda module, weights, *args, **kwargs: torch.func.functional_call(module, weights, args, kwargs))

    def fresh() -> tuple[list[Any], dict[str, Tensor]]:
        seen: dict[int, Any] = {}
        for x in inputs:
            floating = isinstance(x, Tensor) and x.is_floating_point()
            seen.setdefault(id(x), x.detach().clone().requires_grad_() if floating else x)
        args = [seen[id(x)] for x in inputs]
        wanted = {f"input {i}": x for i, x in enumerate(args) if isinstance(x, Tensor) and x.requires_grad}
        return args, wanted

    ours_in, ours_wanted = fresh()
    theirs_in, theirs_wanted = fresh()
    torch.manual_seed(seed)
    ours = layer(*ours_in, **kwargs)
    torch.manual_seed(seed)
    theirs = call(dense, weights, *theirs_in, **kwargs)
    pairs = zip(
        ours if isinstance(ours, tuple) else (ours,),
        theirs if isinstance(theirs, tuple) else (theirs,),
        strict=True,
    )
    for mine, other in pairs:
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine.shape == other.shape and mine.dtype == other.dtype
            assert_same(mine, other, "output", tolerance)
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    assert set(parameters) == {name for name, leaf in leaves.items() if leaf.requires_grad}
    mine = gradients(ours, {**parameters, **ours_wanted}, seed)
    other = gradients(theirs, {**{name: leaves[name] for name in parameters}, **theirs_wanted}, seed, factors)
    for name, grad in mine.items():
        assert_same(grad, other[name], f"gradient of {name}", tolerance)


def one_by_one(function: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> Tensor:
    """What vmap has to equal: a call for each index of the mapped axes."""
    size = next(a.shape[d] for a, d in zip(args, in_dims, strict=True) if d is not None)
    return torch.stack(
        [
            function(*[a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)])
            for i in range(size)
        ]
    )


def assert_as_dense(weight: RPQWeight, function: Callable[[Any], Tensor]) -> None:
    """A function of a VirtualWeight gives what it gives of the dense tensor, in value and gradient."""
    parameters = dict(weight.named_parameters())
    ours, theirs = (
        function(VirtualWeight(weight)),
        function(naive_tensor(weight)),
    )
    ours = ours.expand_dense() if isinstance(ours, VirtualWeight) else ours
    assert type(ours) is Tensor and ours.dtype == theirs.dtype
    assert_same(ours, theirs)
    expected = gradients(theirs, parameters)
    for name, grad in gradients(ours, parameters).items():
        assert_same(grad, expected[name], name)
