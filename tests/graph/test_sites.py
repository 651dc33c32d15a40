"""What is found in a model: each tensor once, what it is for, and why some must stay as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import rpqfx
from rpqfx.errors import PolicyError, SpecError
from rpqfx.graph import Site, capture, find_sites, is_rewritten, leaf
from tests.models import (
    BY_NAME,
    CNN,
    GPT,
    MLP,
    SMALL,
    Conv1D,
    CrossAttention,
    Decoder,
    Encoder,
    Experts,
    Listed,
    Opaque,
    Pairs,
    Recommender,
    Shared,
)


def sites_of(model: nn.Module, *inputs: Any) -> dict[str, Site]:
    return {site.name: site for site in find_sites(capture(model, inputs or None))}


class Own(nn.Module):
    """One Parameter ``w`` of a shape, used as a function says."""

    def __init__(self, use: Any, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.w)


# ------------------------------------------------------------------------------------------------- kinds and names


def test_modules_are_of_their_kind():
    kinds = {name: site.kind for m in (CNN(), Decoder(), Pairs(), Recommender()) for name, site in sites_of(m).items()}
    assert kinds == {
        "stem.weight": "conv",
        "grouped.weight": "conv",
        "depthwise.weight": "conv",
        "point.weight": "conv",
        "head.weight": "linear",
        "up1.weight": "conv_transpose",
        "up2.weight": "conv_transpose",
        "up3.weight": "conv_transpose",
        "bilinear.weight": "bilinear",
        "items.weight": "embedding_bag",
        "users.weight": "embedding_bag",
        "city.weight": "embedding",
        "out.weight": "linear",
    }


def test_attention_has_its_projections_and_its_output():
    kinds = {name: site.kind for name, site in sites_of(CrossAttention()).items() if "bias" not in name}
    projections = {f"attn.{p}_proj_weight": "attention" for p in "qkv"}
    assert kinds == {
        **projections,
        "attn.out_proj.weight": "linear",
        "self_attn.in_proj_weight": "attention",
        "self_attn.out_proj.weight": "linear",
    }


def test_a_site_tells_shape_dtype_owner_and_bytes():
    site = sites_of(MLP().bfloat16())["fc1.weight"]
    assert (site.shape, site.dtype, site.module_type) == ((32, 12), torch.bfloat16, nn.Linear)
    assert (site.numel, site.dense_bytes, site.module_names) == (384, 768, ("fc1",))
    assert site.blocked is None and site.uses == ("model calls it",)


def test_vectors_and_biases_are_no_sites():
    assert set(sites_of(MLP())) == {"fc1.weight", "fc2.weight"}


def test_every_parameter_of_two_axes_is_listed_once_in_the_models_order():
    for case in BY_NAME.values():
        model = case.model()
        wanted = [name for name, p in model.named_parameters() if p.dim() > 1]
        assert [site.name for site in find_sites(capture(model))] == wanted


def test_an_embedding_and_its_head_are_one_site():
    site = sites_of(GPT())["tok.weight"]
    assert site.names == ("tok.weight", "head.weight") and site.module_names == ("tok", "head")
    assert site.kind == "embedding" and not site.splits


def test_a_module_under_two_names_and_a_parameter_in_two_modules_are_one_site_each():
    found = sites_of(Shared())
    assert {name: site.names for name, site in found.items()} == {
        "first.weight": ("first.weight", "again.weight"),
        "other.weight": ("other.weight", "tied.weight"),
    }


def test_members_of_containers_are_named_and_known():
    found = sites_of(Listed())
    assert {name: (s.kind, s.flipped) for name, s in found.items()} == {
        "weights.0": ("linear", False),
        "weights.1": ("linear", False),
        "named.out": ("linear", True),
    }


# ------------------------------------------------------------------------------------------------- functional uses

LINEAR = {
    "F.linear": (lambda x, w: F.linear(x, w), False),
    "F.linear by keyword": (lambda x, w: F.linear(input=x, weight=w), False),
    "x @ w": (lambda x, w: x @ w, True),
    "x @ w.T": (lambda x, w: x @ w.T, False),
    "x @ w.t()": (lambda x, w: x @ w.t(), False),
    "x @ w.mT": (lambda x, w: x @ w.mT, False),
    "x @ w.transpose": (lambda x, w: x @ w.transpose(-1, -2), False),
    "x @ torch.t(w)": (lambda x, w: x @ torch.t(w), False),
    "w @ x": (lambda x, w: w @ x, False),
    "w.T @ x": (lambda x, w: w.T @ x, True),
    "matmul": (lambda x, w: torch.matmul(x, w), True),
    "x.matmul": (lambda x, w: x.matmul(w), True),
    "mm": (lambda x, w: torch.mm(x, w.t()), False),
    "addmm": (lambda x, w: torch.addmm(x, x, w), True),
    "addmm transposed": (lambda x, w: torch.addmm(x, x, w.t()), False),
    "einsum bc,dc->bd": (lambda x, w: torch.einsum("bc,dc->bd", x, w), False),
    "einsum cd,bc->bd": (lambda x, w: torch.einsum("cd, bc -> bd", w, x), True),
}


@pytest.mark.parametrize("name", LINEAR)
def test_products_with_a_parameter_are_linear(name: str):
    use, flipped = LINEAR[name]
    site = sites_of(Own(use, 8, 8))["w"]
    assert (site.kind, site.flipped, site.splits, site.blocked) == ("linear", flipped, True, None)


@pytest.mark.parametrize("name", LINEAR)
def test_vectors_of_a_product_lie_along_its_outputs(name: str):
    """The layout's vectors are what one output needs, so that ``split="row"`` means the same for every spelling."""
    use, _ = LINEAR[name]
    model = Own(use, 8, 8)
    site = sites_of(model)["w"]
    vectors = site.layout("row").to_vectors(model.w.detach())
    x = torch.zeros(8, 8)
    changed = Own(use, 8, 8)
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        site.layout("row").to_vectors(changed.w)[2] += 1
        assert not torch.equal(vectors, site.layout("row").to_vectors(changed.w))
        x = torch.randn(8, 8)
        moved = (model(x) - changed(x)).abs() > 1e-6
    assert moved.any(0).sum() == 1 or moved.any(1).sum() == 1  # one output, for every x


OTHERS = {
    "embedding": (lambda ids, w: F.embedding(ids, w), (8, 4), "embedding", 1),
    "conv1d": (lambda x, w: F.conv1d(x, w, padding=1), (8, 4, 3), "conv", 1),
    "conv2d": (lambda x, w: F.conv2d(x, weight=w), (8, 4, 3, 3), "conv", 1),
    "conv3d": (lambda x, w: F.conv3d(x, w), (8, 4, 3, 3, 3), "conv", 1),
    "conv_transpose1d": (lambda x, w: F.conv_transpose1d(x, w), (8, 4, 3), "conv_transpose", 1),
    "conv_transpose2d": (lambda x, w: F.conv_transpose2d(x, w), (8, 4, 3, 3), "conv_transpose", 1),
    "conv_transpose3d": (lambda x, w: F.conv_transpose3d(x, w), (8, 4, 3, 3, 3), "conv_transpose", 1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_lookups_and_convolutions_are_known(name: str):
    use, shape, kind, lead = OTHERS[name]
    site = sites_of(Own(use, *shape))["w"]
    assert (site.kind, site.lead, site.splits, site.blocked) == (kind, lead, False, None)


# w is [3, 8, 4]: three experts' matrices. Whether their outputs are the last axis.
EXPERTS = {
    "bmm": (lambda x, w: torch.bmm(x, w), True),
    "bmm first": (lambda x, w: torch.bmm(w, x), False),
    "bmm transposed": (lambda x, w: x.bmm(w.mT), False),
    "baddbmm": (lambda x, w: torch.baddbmm(x, x, w), True),
    "baddbmm transposed": (lambda x, w: torch.baddbmm(x, x, w.transpose(1, 2)), False),
    "x @ experts": (lambda x, w: x @ w, True),
    "x @ experts.mT": (lambda x, w: x @ w.transpose(-1, -2), False),
    "einsum over experts": (lambda x, w: torch.einsum("ebc,ecd->ebd", x, w), True),
    "einsum over experts, rows": (lambda x, w: torch.einsum("bed,ecd->bec", x, w), False),
    "einsum of heads apart": (lambda x, w: torch.einsum("bc,ecd->bed", x, w), True),
    "F.linear of one": (lambda x, w: F.linear(x, w[1]), False),
    "one @": (lambda x, w: x @ w[0].T, False),
    "x @ one": (lambda x, w: x @ w[0], True),
    "one by number": (lambda x, w: x @ w[x.argmax()], True),
    "unbound": (lambda x, w: F.linear(x, w.unbind(0)[2]), False),
    "a slice": (lambda x, w: x @ w[:, :4], True),
    "grouped": (lambda x, w: F.grouped_mm(x, w, offs=x), True),
    "grouped transposed": (lambda x, w: F.grouped_mm(x, w.transpose(-2, -1), offs=x), False),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_known(name: str):
    use, flipped = EXPERTS[name]
    site = sites_of(Own(use, 3, 8, 4))["w"]
    assert (site.kind, site.experts, site.flipped, site.splits, site.blocked) == ("experts", True, flipped, True, None)
    layout = site.layout()
    assert (layout.num_vectors, layout.dim) == ((12, 8) if flipped else (24, 4))
    own = site.layout(experts="own")
    assert (own.num_vectors, own.dim, own.unit) == ((4, 24, 8) if flipped else (8, 12, 4))


HEADS = {
    "heads after": (lambda x, w: torch.einsum("btd,dhk->bthk", x, w), (8, 3, 4), 1, True),
    "heads before": (lambda x, w: torch.einsum("btd,hkd->bthk", x, w), (3, 4, 8), 2, False),
    "heads summed": (lambda x, w: torch.einsum("bthk,hkd->btd", x, w), (3, 4, 8), 2, True),
}


@pytest.mark.parametrize("name", HEADS)
def test_axes_of_heads_are_rows_or_columns_together(name: str):
    use, shape, lead, flipped = HEADS[name]
    site = sites_of(Own(use, *shape))["w"]
    assert (site.kind, site.experts, site.lead, site.flipped) == ("linear", False, lead, flipped)


# w is [8, 4]. What a use makes of the whole, through views of it.
PIECES = {
    "a slice": (lambda x, w: F.linear(x, w[:4]), False),
    "chunk": (lambda x, w: F.linear(x, torch.chunk(w, 2)[1]), False),
    "split": (lambda x, w: F.linear(x, w.split(4)[1]), False),
    "narrow": (lambda x, w: x @ w.narrow(0, 2, 4), True),
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces_are_used_as_their_whole(name: str):
    use, flipped = PIECES[name]
    site = sites_of(Own(use, 8, 4))["w"]
    assert (site.kind, site.flipped, site.blocked) == ("linear", flipped, None)


def test_gpt2s_conv1d_is_linear_with_its_weight_turned():
    site = sites_of(nn.Sequential(Conv1D(24, 16)))["0.weight"]
    assert (site.kind, site.flipped, site.module_type) == ("linear", True, Conv1D)
    assert (site.layout("row").num_vectors, site.layout("row").dim) == (24, 16)


def test_experts_are_one_matrix_of_all_their_rows():
    site = sites_of(Experts())["up"]
    assert (site.layout().num_vectors, site.layout().dim) == (3 * 24, 16)
    assert (site.layout("column").num_vectors, site.layout("column").dim) == (3 * 16, 24)


def test_a_parameter_that_its_own_module_does_not_use_is_offered():
    """Some other module may read it, such as one whose forward cannot be followed."""

    class Store(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 8))

        def forward(self, x):
            return x

    site = sites_of(Store())["w"]
    assert (site.kind, site.blocked) == ("parameter", None)


def test_a_module_that_cannot_be_read_still_offers_its_parameters():
    found = sites_of(Opaque())
    assert {found[name].kind for name in ("positive", "negative", "gain")} == {"parameter"}
    assert all(site.blocked is None for site in found.values())
    assert found["first.weight"].kind == "linear"


# ----------------------------------------------------------------------------------- splits, heads, the zero vector


def test_only_products_can_be_split_by_columns():
    splits = {name: s.splits for m in (CNN(), Encoder(), Pairs(), Recommender()) for name, s in sites_of(m).items()}
    assert {name for name, can in splits.items() if can} == {
        "head.weight",
        "out.weight",
        "bilinear.weight",
        *(f"encoder.layers.{i}.{n}" for i in range(2) for n in ("linear1.weight", "linear2.weight")),
        *(f"encoder.layers.{i}.self_attn.{n}" for i in range(2) for n in ("in_proj_weight", "out_proj.weight")),
    }


def test_a_column_layout_is_the_other_way_round():
    sites = sites_of(MLP())
    row, column = (sites["fc1.weight"].layout(split) for split in ("row", "column"))
    assert (row.num_vectors, row.dim) == (column.dim, column.num_vectors) == (32, 12)
    with pytest.raises(SpecError, match=r"stem.weight: vectors of a conv lie along its outputs.*split='row'"):
        sites_of(CNN())["stem.weight"].layout("column")


def test_padding_idx_is_the_zero_vector():
    found = sites_of(Recommender())
    assert {name: site.zero_vector for name, site in found.items()} == {
        "items.weight": 3,
        "users.weight": None,
        "city.weight": 0,
        "out.weight": None,
    }


class Named(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Config:
    num_attention_heads = 6


@pytest.mark.parametrize("name", ["num_heads", "n_heads", "heads", "n_head", "nhead", "num_attention_heads"])
def test_heads_are_a_modules_own_attribute(name: str):
    assert sites_of(Named(**{name: 4}))["fc.weight"].heads == 4


def test_heads_come_from_the_nearest_ancestor_then_a_config_then_the_commonest():
    near = Named(num_heads=2)
    near.inner = Named(n_head=8)
    model = nn.ModuleDict({"a": near, "b": Named(config=Config()), "c": Named(num_heads=2), "d": Named()})
    heads = {name: site.heads for name, site in sites_of(model).items()}
    assert heads == {"a.fc.weight": 2, "a.inner.fc.weight": 8, "b.fc.weight": 6, "c.fc.weight": 2, "d.fc.weight": 2}


def test_no_heads_anywhere_is_none():
    assert sites_of(Named(num_heads="four", heads=True, nhead=0))["fc.weight"].heads is None


# ---------------------------------------------------------------------------------- what must stay, each with why


def reason(model: nn.Module, name: str) -> str:
    blocked = sites_of(model)[name].blocked
    assert blocked is not None, f"{name} is not blocked"
    return blocked


def hooked() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.weight.register_hook(lambda grad: grad * 2)
    return layer


def viewed() -> nn.Module:
    whole = torch.randn(32, 16)
    layers = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    layers[0].weight, layers[1].weight = nn.Parameter(whole[:16]), nn.Parameter(whole[16:])
    return layers


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pos


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(256, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Special(nn.Parameter):
    pass


class Holder(nn.Module):
    def __init__(self, value: Tensor | nn.Parameter) -> None:
        super().__init__()
        self.weight = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class KeepsList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.favourites = {"one": [], "two": self.fc.weight}

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Traceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.fc = nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x @ self.w)


BLOCKED = {
    "reflections": (
        lambda: parametrizations.orthogonal(nn.Linear(16, 16), orthogonal_map="householder"),
        "parametrizations.weight.original",
        "an orthogonal map of reflections reads signs from its diagonal",
    ),
    "magnitudes": (
        lambda: parametrizations.weight_norm(nn.Linear(16, 16)),
        "parametrizations.weight.original0",
        "only one axis is longer than 1: a vector, not a weight",
    ),
    "layer scale": (LayerScale, "gamma", "only one axis is longer than 1: a vector, not a weight"),
    "layer scale in an opaque module": (
        lambda: leaf(LayerScale()),
        "gamma",
        "only one axis is longer than 1: a vector, not a weight",
    ),
    "kept in a dictionary": (KeepsList, "fc.weight", "is also kept in the plain attribute 'favourites' of the model"),
    "sparse": (lambda: Holder(torch.eye(16).to_sparse()), "weight", "its layout is torch.sparse_coo, not strided"),
    "integer": (lambda: Holder(torch.ones(16, 16, dtype=torch.int8)), "weight", "its dtype is torch.int8"),
    "complex": (lambda: Holder(torch.ones(16, 16, dtype=torch.complex64)), "weight", "its dtype is torch.complex64"),
    "float8": (
        lambda: Holder(torch.ones(16, 16).to(torch.float8_e4m3fn)),
        "weight",
        "its dtype is torch.float8_e4m3fn",
    ),
    "views of one storage": (viewed, "0.weight", "shares its storage with 1.weight through a view"),
    "gradient hook": (hooked, "weight", "it has a gradient hook, which codebooks would not call"),
    "graph module": (lambda: fx.symbolic_trace(Traceable()), "w", "it belongs to an fx GraphModule itself"),
    "added": (Positions, "pos", "used by add, not as a weight of a product, a convolution or a lookup"),
    "subclass": (lambda: Holder(Special(torch.randn(16, 16))), "weight", "it is a Special, not a plain Parameter"),
    "empty": (lambda: nn.Linear(0, 16), "weight", "it is empty"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", BLOCKED)
def test_what_must_stay_says_why(name: str):
    build, parameter, why = BLOCKED[name]
    assert why in reason(build(), parameter)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", BLOCKED)
def test_what_must_stay_is_left_exactly_as_it_was(name: str):
    build, parameter, why = BLOCKED[name]
    model = nn.ModuleDict({"inner": build(), "fc": nn.Linear(16, 16)})
    small = rpqfx.rpqify(model, SMALL)
    kept = small.get_parameter(f"inner.{parameter}")
    assert type(small["inner"]) is type(model["inner"]) or isinstance(model["inner"], fx.GraphModule)
    if kept.layout == torch.strided:
        same = kept.detach().view(torch.uint8) if kept.numel() else kept
        other = model.get_parameter(f"inner.{parameter}").detach()
        assert torch.equal(same, other.view(torch.uint8) if other.numel() else other)
    records = {record.name: record for record in rpqfx.report(small).sites}
    assert why.split(" of the model")[0].split("shares")[0] in records[f"inner.{parameter}"].reason


def test_a_layers_own_weight_is_one_whatever_its_shape():
    model = nn.Sequential(nn.Linear(64, 1), nn.LSTM(1, 16), nn.Conv1d(1, 64, 1), nn.Embedding(64, 1))
    assert all(site.blocked is None for site in sites_of(model).values())


def test_weights_of_a_gpus_recurrent_layer_lie_in_one_buffer_of_its_own():
    """As on a GPU, where the layer packs them; a view that somebody else has is still an obstacle."""
    model = nn.ModuleDict({"rnn": nn.RNN(16, 16), "fc": nn.Linear(16, 16)})
    buffer = torch.randn(512)
    model["rnn"].weight_ih_l0.data, model["rnn"].weight_hh_l0.data = (
        buffer[:256].view(16, 16),
        buffer[256:].view(16, 16),
    )
    assert all(site.blocked is None for site in sites_of(model).values())
    model["fc"].weight.data = buffer[256:].view(16, 16)
    assert "shares its storage" in reason(model, "rnn.weight_ih_l0")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized tensor creation functions")
def test_quantised_modules_are_named():
    quantised = pytest.importorskip("torch.ao.nn.quantized")
    if not torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no engine for quantised layers")
    model = nn.Sequential(quantised.Linear(16, 16), nn.Linear(16, 16))
    found = sites_of(model)
    (name,) = (name for name in found if name.startswith("0"))
    assert found[name].blocked == "its module is already quantised and keeps no floating weight"
    assert found["1.weight"].blocked is None
    assert "already quantised" in str(rpqfx.report(rpqfx.rpqify(model, SMALL)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_script_modules_parameters_stay():
    model = nn.Sequential(torch.jit.script(nn.Linear(16, 16)), nn.Linear(16, 16))
    assert reason(model, "0.weight") == "its module is a ScriptModule"


def test_buffers_are_no_sites():
    model = MLP()
    model.register_buffer("table", torch.randn(64, 64))
    assert set(sites_of(model)) == {"fc1.weight", "fc2.weight"}


def test_is_rewritten_looks_into_the_depth():
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 16)))
    assert not is_rewritten(model)
    assert is_rewritten(rpqfx.rpqify(model, SMALL))


class OwnAttribute(nn.Module):
    """Has a child where the codebooks of its Parameter would be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(96, 64) / 8)
        self.weight_rpq = nn.Linear(96, 64)

    def forward(self, x):
        return self.weight_rpq(nn.functional.linear(x, self.weight))


class Final(nn.Module):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise TypeError("no subclasses of Final")

    def __init__(self) -> None:
        super().__init__()
        self.w, self.fc = nn.Parameter(torch.randn(64, 96) / 8), nn.Linear(96, 64)

    def forward(self, x):
        return self.fc(x @ self.w)


class OnceOnly(type):
    def __call__(cls, *args: Any) -> Any:
        return super().__call__(*args)

    def __new__(mcls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> Any:
        if any(isinstance(base, OnceOnly) for base in bases):
            raise ValueError(f"{bases[0].__name__} has no heirs")
        return super().__new__(mcls, name, bases, body)


class Heirless(nn.Module, metaclass=OnceOnly):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.fc = nn.Parameter(torch.randn(64, 96) / 8), nn.Linear(96, 64)

    def forward(self, x):
        return self.fc(x @ self.w)


class AsksForLeaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(64, 64), nn.Linear(64, 96)

    def forward(self, x):
        assert self.fc.weight.is_leaf and isinstance(self.fc.weight, nn.Parameter)
        return self.fc(x)


class Locked(nn.Module):
    """Lets nobody set an attribute once it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.fc = nn.Parameter(torch.randn(64, 96) / 8), nn.Linear(96, 64)
        self.locked = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "locked" in self.__dict__:
            raise AttributeError("locked")
        super().__setattr__(name, value)

    def forward(self, x):
        return self.fc(x @ self.w)


class Slotted(nn.Module):
    __slots__ = ("factor",)

    def __init__(self) -> None:
        super().__init__()
        self.w, self.fc = nn.Parameter(torch.randn(64, 96) / 8), nn.Linear(96, 64)

    def forward(self, x):
        return self.fc(x @ self.w)


@pytest.mark.parametrize(
    ("kind", "held", "reason"),
    [
        (OwnAttribute, {"weight_rpq.weight"}, "its module has an attribute 'weight_rpq' of its own"),
        (Final, {"fc.weight"}, "no subclasses of Final"),
        (Heirless, {"fc.weight"}, "has no heirs"),
        (AsksForLeaf, set(), "asks for is_leaf"),
        (Locked, {"w", "fc.weight"}, None),
        (Slotted, {"w", "fc.weight"}, None),
    ],
)
def test_odd_classes_are_held_or_left_with_a_reason(kind: type[nn.Module], held: set[str], reason: str | None) -> None:
    policy, x = rpqfx.Policy.from_scratch(codebook_dim=8, codebook_bits=4), torch.randn(3, 64)
    model = nn.Sequential(kind(), nn.Linear(64, 96)) if held else nn.Sequential(kind())
    dense = copy.deepcopy(model)
    if not held:
        with pytest.raises(PolicyError, match=reason):
            rpqfx.rpqify(model, policy)
        return
    small = rpqfx.rpqify(model, policy)
    report = rpqfx.report(small)
    assert {record.name for record in report.rewritten} == {*(f"0.{name}" for name in held), "1.weight"}
    assert [record.reason for record in report.sites if record.reason] == [] or reason is not None
    assert all(reason in record.reason for record in report.sites if record.reason and reason)
    with torch.no_grad():
        for record in report.rewritten:
            path, _, name = record.name.rpartition(".")
            expanded = getattr(small.get_submodule(path), f"{name}_rpq")()
            dense.get_parameter(record.name).copy_(expanded)
    torch.testing.assert_close(small(x), dense(x))
    torch.testing.assert_close(copy.deepcopy(small)(x), dense(x))
    small(x).sum().backward()
