"""The base of RPQ layers: how they are built, converted from dense layers, and initialised.

An RPQ layer subclasses its torch.nn namesake, so ``isinstance`` and every attribute still hold; only its weight is
elsewhere. It is built by building the namesake on the meta device and backing its weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn

from rpqfx.codebook import CodebookSpec, GradScale
from rpqfx.errors import InputError, SpecError
from rpqfx.nn.hosting.backed import Backed, backed_weights, weight_of
from rpqfx.nn.hosting.host import back
from rpqfx.nn.layout import Layout
from rpqfx.nn.weight import RPQWeight
from rpqfx.ops import Plan
from rpqfx.validation.spelling import check_names, defaults_of, show_options

Split = Literal["row", "column"]
Device = torch.device | str | int | None


class CodebookOptions(TypedDict, total=False):
    """The options by which a layer's weight is quantized (see ``rpqfx.codebook.CodebookSpec.make``)."""

    codebook_dim: int | None
    num_subvectors: int | None
    codebook_bits: int | None
    stages: int
    sharing: Literal["own", "layer"]
    scale: bool
    signs: bool
    grad_scale: GradScale
    column_scale: bool


class LayerOptions(CodebookOptions, total=False):
    """Arguments of the constructor of a layer beside those of its torch.nn namesake."""

    split: Split
    plan: Plan


_DEFAULTS = defaults_of(CodebookSpec.make) | {"split": "row", "plan": "auto"}


class DenseOptions(CodebookOptions, total=False):
    """Arguments of ``RPQLayer.from_dense`` beside the dense layer."""

    init: Literal["fit", "random"]
    split: Split
    plan: Plan
    steps: int
    seed: int


class RPQLayer(Backed):
    """Base of the layers.

    Every constructor takes the arguments of its torch.nn namesake, in its order, and by keyword:

    Keyword Args:
        codebook_dim (int | None): Length ``d`` of a sub-vector; left out, the divisor nearest to 64 (of a convolution,
            whole channels, where there is one near).
        num_subvectors (int | None): Number ``M`` of sub-vectors instead.
        codebook_bits (int | None): ``log2`` of the entries of a codebook, 1 to 16; left out, 8 or what the layer has
            vectors for.
        stages (int): Residual stages; 1 if left out.
        sharing (str): One codebook a sub-vector (``"own"``, if left out) or one for the layer (``"layer"``).
        scale (bool): Whether each vector has a trainable factor; not if left out.
        signs (bool): Whether each use of an entry has a random fixed sign; not if left out.
        grad_scale (str): How gradients of vectors that share an entry are gathered: ``"sum"`` (if left out),
            ``"sqrt"`` or ``"mean"``.
        column_scale (bool): Whether each element of a vector, or each channel of a filter, has a trainable factor; not
            if left out.
        split (str): Whether vectors lie along the weight's rows or columns (matrices only).
        plan (str): Which way products run: ``"dequantize"``, ``"lookup"`` or the cheaper by a cost model (``"auto"``,
            if left out). Kept as [`weight_rpq.plan`][rpqfx.nn.RPQWeight.plan], where it may be changed.

    Raises:
        SpecError: If the codebooks do not fit the weight, or the plan is none.
    """

    _dense: ClassVar[type[nn.Module]]
    _weights: ClassVar[tuple[str, ...]] = ("weight",)

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if "__init__" in vars(cls):
            show_options(cls.__init__, LayerOptions, _DEFAULTS)

    def __init__(self, dense: nn.Module, device: Device, options: Mapping[str, Any]) -> None:
        # ``dense`` is on the meta device; the layer takes its place with tensors on ``device``.
        nn.Module.__init__(self)
        check_names(type(self).__name__, options, LayerOptions.__annotations__)
        codebooks = dict(options)
        self._hold(dense, codebooks.pop("split", "row"), codebooks.pop("plan", "auto"), codebooks)
        self.to_empty(device=torch.get_default_device() if device is None else device)
        self.reset_parameters()

    def _hold(self, dense: nn.Module, split: Split, plan: Plan, options: dict[str, Any]) -> None:
        """Takes over a dense layer's attributes and backs its weights, on its device."""
        self.__dict__.update(dense.__dict__)
        shapes = self._shapes(dense, split, options)
        back(self, {name: random_weight(dense, name, spec, layout, plan=plan) for name, spec, layout in shapes})

    @classmethod
    def _shapes(
        cls, dense: nn.Module, split: Split, options: Mapping[str, Any]
    ) -> Iterator[tuple[str, CodebookSpec, Layout]]:
        """Yields how each weight that the dense layer has is held."""
        for name in cls._weights:
            if dense._parameters.get(name) is not None:
                layout = cls.layout(dense, name, split)
                taps = math.prod(getattr(dense, "kernel_size", ()))
                yield name, CodebookSpec.make(layout.num_vectors, layout.dim, taps=taps, **options), layout

    @classmethod
    def layout(cls, dense: nn.Module, name: str, split: Split = "row") -> Layout:
        """Returns how a Parameter of the dense layer is seen as vectors.

        Args:
            dense: The dense layer.
            name: Name of its Parameter.
            split: Vectors along rows or columns.

        Raises:
            SpecError: If this layer's vectors can only be rows and ``split`` says otherwise.
        """
        shape = tuple(getattr(dense, name).shape)
        if split == "column" and not cls._splits():
            raise SpecError(f"{cls.__name__}'s vectors are the rows of its weight; split='column' does not apply")
        return Layout(shape, transposed=split == "column", zero_vector=zero_row(dense))

    @classmethod
    def _splits(cls) -> bool:
        return False

    @classmethod
    def from_dense(
        cls,
        dense: nn.Module,
        *,
        init: Literal["fit", "random"] = "fit",
        split: Split = "row",
        plan: Plan = "auto",
        steps: int = 10,
        seed: int = 0,
        **options: Unpack[CodebookOptions],
    ) -> Self:
        """Returns the layer that stands for a dense one; the dense layer is left alone and shares nothing with it.

        Args:
            dense: A module of exactly the torch.nn class.
            init: Codebooks fitted to the weight by k-means (``"fit"``) or drawn with its standard deviation.
            split: Vectors along rows or columns.
            plan: Which way products run.
            steps: Lloyd steps at most.
            seed: Seeds the k-means starts of the fit.
            **options: As in the constructor.

        Raises:
            InputError: If ``dense`` is of another class.
            SpecError: If the codebooks do not fit the weight, or the plan is none.
        """
        if type(dense) is not cls._dense:
            raise InputError(
                f"{cls.__name__}.from_dense takes a {cls._dense.__name__}, got {type(dense).__name__}; "
                "rpqfx.rpqify rewrites modules of any class"
            )
        weights, memo = {}, {}
        for name, spec, layout in cls._shapes(dense, split, options):
            tensor = dense._parameters[name]
            assert tensor is not None
            memo[id(tensor)] = tensor  # the copy below is about to drop it
            if init == "fit":
                weights[name] = RPQWeight.from_dense(tensor, spec, layout, steps=steps, seed=seed, plan=plan)
            else:
                weights[name] = random_weight(dense, name, spec, layout, plan=plan)
        made = copy.deepcopy(dense, memo)
        back(made, weights)
        return made  # type: ignore[return-value]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the layer anew, with the standard deviation of its torch.nn namesake's own initialisation."""
        redraw(self)
        self.reset_rest()

    @torch.no_grad()
    def reset_rest(self) -> None:
        """Draws what is not quantized: the bias, from the interval from which torch.nn draws both."""
        bias = self._parameters.get("bias")
        if bias is not None:
            bound = math.sqrt(3) * initial_std(self, "weight")
            bias.uniform_(-bound, bound)


show_options(RPQLayer.from_dense.__func__, CodebookOptions, _DEFAULTS)  # type: ignore[attr-defined]


def zero_row(table: nn.Module) -> int | None:
    """Returns the padding row of an embedding, where that row is zero (or has no values yet): it then stays zero.

    A padding row with values of its own (torch only keeps gradients from it) is a row like any other.

    Args:
        table: Any module; what is no embedding has none.
    """
    padding = getattr(table, "padding_idx", None)
    weight = table._parameters.get("weight")
    if padding is None or weight is None:
        return None
    return padding if weight.is_meta or not bool(weight[padding].any()) else None


def random_weight(
    module: nn.Module,
    name: str,
    spec: CodebookSpec,
    layout: Layout,
    std: float | None = None,
    plan: Plan = "auto",
) -> RPQWeight:
    """Returns random codebooks with the standard deviation of a module's Parameter, on its device.

    Args:
        module: The owner.
        name: Name of the Parameter.
        spec: Shape of the codebooks.
        layout: How the Parameter is seen as vectors.
        std: Standard deviation for a Parameter without values (on the meta device); torch.nn's own if left out.
        plan: Which way products run.
    """
    tensor = module._parameters[name]
    assert tensor is not None
    std = initial_std(module, name) if std is None else std
    if not tensor.is_meta and tensor.numel() > 1:
        measured = float(tensor.detach().float().std())
        std = measured if math.isfinite(measured) and measured > 0 else std
    weight = RPQWeight(spec, layout, std=std, plan=plan, device=tensor.device, dtype=tensor.dtype)
    return weight.requires_grad_(tensor.requires_grad)


def redraw(module: nn.Module) -> None:
    """Draws what a module holds in codebooks anew, each tensor as torch.nn draws it.

    Args:
        module: The owner.
    """
    for name, weight in backed_weights(module).items():
        weight.std = initial_std(module, name)
        weight.reset_parameters()


def initial_std(module: nn.Module, name: str) -> float:
    """Returns the standard deviation that torch.nn's own initialisation gives a Parameter.

    Args:
        module: The owner: a torch.nn layer, an RPQ layer, or any other module (which counts as linear).
        name: Name of the Parameter.
    """
    held = weight_of(module, name)
    shape = held.layout.shape if held is not None else tuple(module._parameters[name].shape)  # type: ignore[union-attr]
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return 1.0
    if isinstance(module, nn.MultiheadAttention):  # xavier_uniform_
        return math.sqrt(2 / (shape[0] + shape[1]))
    if isinstance(module, nn.Bilinear):  # uniform within 1 / sqrt(in1_features)
        return 1 / math.sqrt(3 * shape[1])
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):  # uniform within 1 / sqrt(hidden_size)
        return 1 / math.sqrt(3 * module.hidden_size)
    return 1 / math.sqrt(3 * max(1, math.prod(shape[1:])))  # uniform within 1 / sqrt(fan_in)


def apply_linear(module: nn.Module, name: str, x: Tensor, bias: Tensor | None, rows: slice | None = None) -> Tensor:
    """``x @ W.T + bias`` with a module's Parameter, or some of its rows, wherever it is held.

    Args:
        module: The owner.
        name: Name of the Parameter.
        x: ``[..., in]``.
        bias: Bias of the rows in use.
        rows: Rows of the Parameter; all if left out.
    """
    held = weight_of(module, name)
    if held is not None:
        return held.linear(x, bias, rows)
    dense = module._parameters[name]
    assert dense is not None
    return nn.functional.linear(x, dense if rows is None else dense[rows], bias)
