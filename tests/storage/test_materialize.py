"""A model that was rewritten on the meta device gets its codebooks, and nothing of a dense weight's size."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rpqfx
from rpqfx import Policy, Rule
from rpqfx.errors import RewriteError
from rpqfx.nn import RPQWeight
from tests.models import BY_NAME, CNN, GPT, MLP, SMALL, Encoder, Recommender, quantized_weights

SCRATCH = Policy.from_scratch(codebook_dim=4, codebook_bits=2, min_codebook_bits=1, min_size=64)


def on_meta(build: Any, policy: Policy = SCRATCH, **options: Any) -> nn.Module:
    with torch.device("meta"):
        model = build()
    return rpqfx.rpqify(model, policy, **options)


class Allocated(TorchDispatchMode):
    """The most elements of any tensor that is really made."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self.most = max(self.most, leaf.numel())
        return result


@pytest.mark.parametrize("init", ["fit", "random"])
def test_rewriting_on_the_meta_device_allocates_nothing(init: str):
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(50_000, 512), nn.Linear(512, 512))
    with Allocated() as seen:
        small = rpqfx.rpqify(model, Policy(codebook_dim=64, codebook_bits=4, init=init))
    assert seen.most <= 1
    assert all(t.is_meta for t in (*small.parameters(), *small.buffers()))
    with Allocated() as seen:
        nn.Linear(4, 5)
    assert seen.most == 20  # the check can fail


def test_materialising_allocates_codebooks_and_codes_only():
    small = on_meta(
        lambda: nn.Sequential(nn.Embedding(5000, 512), nn.Linear(512, 2048)), Policy.from_scratch(codebook_dim=64)
    )
    with Allocated() as seen:
        assert rpqfx.materialize(small) is small
    most = max(t.numel() for t in (*small.parameters(), *small.buffers()))
    assert seen.most <= most < 512 * 2048 / 4
    assert not any(t.is_meta for t in (*small.parameters(), *small.buffers()))
    assert small(torch.arange(4)).shape == (4, 2048)


@pytest.mark.parametrize("build", [MLP, CNN, GPT, Encoder, Recommender])
def test_every_tensor_has_a_value_and_the_model_runs_and_trains(build: Any):
    case = next(case for case in BY_NAME.values() if case.build is build)
    small = on_meta(build)
    torch.manual_seed(0)
    rpqfx.materialize(small, init=fallback(small))
    for name, tensor in (*small.named_parameters(), *small.named_buffers()):
        assert not tensor.is_meta and bool(torch.isfinite(tensor.float()).all()), name
    args, kwargs = case.arguments(torch.float32)
    small(*args, **kwargs).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def fallback(model: nn.Module) -> Any:
    """Only for modules that keep Parameters of their own and cannot reset them."""

    def init(module: nn.Module) -> None:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        else:
            for parameter in module._parameters.values():
                nn.init.normal_(parameter, std=0.1)

    return init if isinstance(model, GPT) else None


def test_modes_and_frozen_parameters_stay():
    with torch.device("meta"):
        model = MLP()
    model.fc1.weight.requires_grad_(False)
    model.fc2.bias.requires_grad_(False)
    model.drop.eval()
    small = rpqfx.materialize(rpqfx.rpqify(model, SCRATCH))
    flags = {name: p.requires_grad for name, p in small.named_parameters()}
    assert flags == {
        "fc1.weight_rpq.codebooks": False, "fc1.bias": True, "fc2.weight_rpq.codebooks": True, "fc2.bias": False,
    }  # fmt: skip
    assert small.training and not small.drop.training
    assert all(isinstance(p, nn.Parameter) for p in small.parameters())


# ----------------------------------------------------------------------------------------------------- what values


def test_weights_have_the_standard_deviation_of_the_dense_layers_own_initialisation():
    def build() -> nn.Module:
        return nn.ModuleDict(
            {
                "linear": nn.Linear(256, 1024),
                "conv": nn.Conv2d(64, 512, 3, groups=2),
                "up": nn.ConvTranspose2d(512, 64, 3),
                "table": nn.Embedding(4096, 64),
                "bag": nn.EmbeddingBag(4096, 64),
                "pairs": nn.Bilinear(64, 64, 32),
                "attention": nn.MultiheadAttention(256, 4),
            }
        )

    torch.manual_seed(0)
    dense = build()
    small = rpqfx.materialize(on_meta(build, Policy.from_scratch(codebook_dim=8, codebook_bits=7, stages=2)))
    held = quantized_weights(small)
    assert set(held) == {n for n, p in dense.named_parameters() if p.dim() > 1}
    for name, weight in held.items():
        assert float(weight().std()) == pytest.approx(float(dense.get_parameter(name).std()), rel=0.05), name


@pytest.mark.parametrize("name", ["initializer_range", "init_std"])
def test_codebooks_follow_a_configurations_scale_and_no_rule_in_code(name: str):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(2048, 64), nn.Linear(64, 2048)

        def _init_weights(self, module: nn.Module) -> None:
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.5)

    policy = Policy.from_scratch(codebook_dim=8, codebook_bits=7)
    plain = rpqfx.materialize(on_meta(Model, policy))
    assert float(plain.table.weight_rpq().detach().std()) == pytest.approx(1.0, rel=0.05)
    assert float(plain.fc.weight_rpq().detach().std()) == pytest.approx((3 * 64) ** -0.5, rel=0.05)
    assert float(plain.fc.bias.detach().std()) == pytest.approx((3 * 64) ** -0.5, rel=0.05)

    def configured() -> nn.Module:
        model = Model()
        model.config = type("Config", (), {name: 0.02})()
        return model

    told = rpqfx.materialize(on_meta(configured, policy))
    for weight in (told.table.weight_rpq, told.fc.weight_rpq):
        assert float(weight().detach().std()) == pytest.approx(0.02, rel=0.05)


def test_codes_are_balanced_and_the_padding_row_is_zero():
    small = rpqfx.materialize(on_meta(lambda: nn.Embedding(64, 16, padding_idx=5)))
    for codes in small.weight_rpq.codes.reshape(-1, 64):
        assert torch.bincount(codes.long()).tolist() == [16] * 4
    assert small.weight[5].abs().sum() == 0 and small.weight[4].abs().sum() > 0


def test_other_modules_are_initialised_by_their_own_reset_parameters():
    small = rpqfx.materialize(
        on_meta(CNN, Policy.from_scratch(codebook_dim=9, codebook_bits=1, min_codebook_bits=1, min_size=64))
    )
    assert small.bn.weight.tolist() == [1.0] * 16 and small.bn.bias.tolist() == [0.0] * 16
    assert small.bn.running_var.tolist() == [1.0] * 16 and int(small.bn.num_batches_tracked) == 0
    bound = 1 / 16**0.5
    assert 0 < float(small.head.bias.abs().max()) <= bound


def test_a_seed_gives_the_same_model_again():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(rpqfx.materialize(on_meta(MLP)))
    first, again, other = (model.fc1.weight for model in models)
    assert torch.equal(first, again) and not torch.equal(first, other)


# ------------------------------------------------------------------------------------------------- ties and sharing


def test_ties_and_shared_codebooks_stay():
    rules = (Rule("blocks.1.*", plan="lookup"),)
    policy = Policy.from_scratch(codebook_dim=4, codebook_bits=2, min_size=64, sharing="role", rules=rules)
    small = on_meta(GPT, policy)
    names = [name for name, _ in small.named_parameters()]
    rpqfx.materialize(small, init=fallback(small))
    assert [name for name, _ in small.named_parameters()] == names
    assert small.tok.weight_rpq is small.head.weight_rpq
    assert small.blocks[0].qkv.weight_rpq.codebooks is small.blocks[1].qkv.weight_rpq.codebooks
    assert small.blocks[0].qkv.weight_rpq.codes is not small.blocks[1].qkv.weight_rpq.codes
    assert [block.qkv.weight_rpq.plan for block in small.blocks] == ["auto", "lookup"]


def test_a_dense_tie_stays_a_tie():
    def build() -> nn.Module:
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "big": nn.Linear(64, 64)})
        model["b"].weight = model["a"].weight
        return model

    small = rpqfx.materialize(on_meta(build, Policy.from_scratch(codebook_dim=8, codebook_bits=2, min_size=1000)))
    assert small["a"].weight is small["b"].weight and not small["a"].weight.is_meta


def test_tensors_that_are_somewhere_already_stay_as_they_are():
    small = on_meta(MLP)
    small.fc2.bias = nn.Parameter(torch.full((8,), 3.0))
    small.register_buffer("table", torch.arange(3))
    kept = small.fc2.bias
    rpqfx.materialize(small)
    assert small.fc2.bias is kept and small.table.tolist() == [0, 1, 2]


def test_materialising_twice_changes_nothing():
    small = rpqfx.materialize(on_meta(MLP))
    before = {name: t.clone() for name, t in small.state_dict().items()}
    rpqfx.materialize(small)
    assert all(torch.equal(t, before[name]) for name, t in small.state_dict().items())


# ------------------------------------------------------------------------- modules that cannot initialise themselves


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def scaled() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), Scale(), nn.LayerNorm(16), Scale())


def test_a_module_without_reset_parameters_is_refused_before_anything_is_allocated():
    small = on_meta(scaled)
    with pytest.raises(RewriteError, match=r"no reset_parameters, .* would stay .*: 1, 3; pass init="):
        rpqfx.materialize(small)
    assert all(t.is_meta for t in (*small.parameters(), *small.buffers()))


def test_init_is_called_with_every_other_module_that_was_on_the_meta_device():
    small, seen = on_meta(scaled), []

    def init(module: nn.Module) -> None:
        seen.append(type(module).__name__)
        for parameter in module._parameters.values():
            nn.init.constant_(parameter, 0.5)

    rpqfx.materialize(small, init=init)
    assert sorted(seen) == ["LayerNorm", "RPQLinear", "Scale", "Scale"]
    assert small[1].factor.tolist() == small[0].bias.tolist() == [0.5] * 16
    assert float(small[0].weight.std()) > 0.05  # codebooks are not init's business


class Pretrained(nn.Module):
    """Initialises its modules as transformers models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = scaled()
        self.pos = nn.Parameter(torch.zeros(3, 16))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Scale):
            nn.init.constant_(module.factor, 2.0)
        elif isinstance(module, nn.LayerNorm):
            nn.init.constant_(module.weight, 3.0)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Pretrained):
            nn.init.constant_(module.pos, 4.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + self.pos)


def test_a_models_own_init_weights_is_used():
    small = rpqfx.materialize(on_meta(Pretrained))
    assert small.body[1].factor.tolist() == [2.0] * 16 and small.body[2].weight.tolist() == [3.0] * 16
    assert small.pos.tolist() == [[4.0] * 16] * 3
    assert 0 < float(small.body[0].bias.abs().max()) <= 0.25


def test_a_dense_model_on_the_meta_device_can_be_materialised_too():
    with torch.device("meta"):
        model = MLP()
    torch.manual_seed(0)
    rpqfx.materialize(model)
    assert 0.5 < float(model.fc1.weight.std()) / (1 / 36**0.5) < 1.5


def test_a_copy_made_on_the_meta_device_is_materialised_by_itself():
    small = on_meta(MLP, SMALL)
    other = rpqfx.materialize(copy.deepcopy(small))
    assert all(p.is_meta for p in small.parameters()) and not any(p.is_meta for p in other.parameters())
    assert all(isinstance(w, RPQWeight) for w in quantized_weights(other).values())
