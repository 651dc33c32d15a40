"""Caches of codes and routed blocks compute and train in several processes as in one: DDP, and heads that are split."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import rpqfx
from rpqfx.distributed import ColwiseParallel, HeadParallel, RowwiseParallel, broadcast_codes, fully_shard
from rpqfx.errors import DistributedError, InputError, RewriteError
from rpqfx.kv import CodebookCache, KVPolicy, commitment, quantize_kv
from rpqfx.routing.rewrite import RoutePolicy, route
from tests import processes
from tests.distributed.training import expected, losses, mine

RANKS = 2
TOLERANCE: dict[str, Any] = {"rtol": 0, "atol": 1e-5}
DIM, HEADS, KV_HEADS, VOCABULARY = 32, 4, 4, 64


class Attention(nn.Module):
    """Grouped attention that counts heads by what its projections give, as transformers does."""

    def __init__(self) -> None:
        super().__init__()
        width = DIM // HEADS
        self.q, self.o = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.k, self.v = (nn.Linear(DIM, KV_HEADS * width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(DIM), nn.LayerNorm(DIM), Attention()
        self.up, self.down = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, DIM), nn.Linear(DIM, VOCABULARY, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def decoder(coded: bool = False) -> nn.Module:
    """A model of dense layers, or of codebooks."""
    torch.manual_seed(0)
    model = Decoder().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    policy = rpqfx.Policy.from_scratch(codebook_dim=4, codebook_bits=4, min_size=64, allow_growth=True)
    return rpqfx.rpqify(model, policy) if coded else model


def tokens(count: int = 1, length: int = 24) -> list[Tensor]:
    return list(torch.randint(VOCABULARY, (count, 8, length), generator=torch.Generator().manual_seed(1)))


def cached(coded: bool = False, fit: bool = False, **options: Any) -> nn.Module:
    """A model whose cache has codebooks that are fitted, or drawn, which takes less long."""
    return copy.deepcopy(_cached(coded, fit, **options))


@functools.cache
def _cached(coded: bool, fit: bool, **options: Any) -> nn.Module:
    policy = KVPolicy(
        **{"bits_per_value": 3, "window": 4, "sinks": 1, "chunk": 8, "codebook_dim": 4, "codebook_size": 16, **options}
    )
    return quantize_kv(decoder(coded), policy, calibration=tokens(), fit=fit, seed=0, progress=False)


def moved(model: nn.Module) -> nn.Module:
    """A model whose light branches say something, which start at zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def routed(coded: bool = False, **options: Any) -> nn.Module:
    return copy.deepcopy(_routed(coded, **options))


@functools.cache
def _routed(coded: bool, **options: Any) -> nn.Module:
    return moved(route(decoder(coded), RoutePolicy(**{"feed_forward": 0.5, "attention": 0.5, "window": 8, **options})))


def split(model: nn.Module, **styles: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return parallelize_module(model, mesh, {
        "blocks.*.attention.q": ColwiseParallel(), "blocks.*.attention.k": ColwiseParallel(),
        "blocks.*.attention.v": ColwiseParallel(), "blocks.*.attention.o": RowwiseParallel(),
        "blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel(), **styles,
    })  # fmt: skip


def split_cache(model: nn.Module) -> nn.Module:
    return split(model, **{"blocks.*.attention.kv_codes": HeadParallel()})


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens()[0])


def from_a_cache(model: nn.Module) -> Tensor:
    """What tokens give that come in pieces."""
    model.eval()
    cache, ids, found = CodebookCache.for_model(model), tokens()[0], []
    with torch.no_grad():
        for part in (ids[:, :14], *ids[:, 14:].split(1, 1)):
            with cache.attended():
                found.append(model(part))
    return torch.cat(found, 1)


# ------------------------------------------------------------------------------------------------------ under DDP


def caches_and_routes_train_in_ddp_as_in_one_process() -> None:
    for model in (cached(True, fit=True), routed(True)):
        train_in_ddp(model)


def dense_models_with_caches_and_routes_do_too() -> None:
    for model in (
        cached(),
        routed(),
        cached(transform=False, normalize=True),
        routed(True, window=None, look_ahead=True),
    ):
        train_in_ddp(model)


def train_in_ddp(model: nn.Module) -> None:
    wanted = expected(model.train(), steps=4)
    coded = any(isinstance(m, rpqfx.nn.RPQWeight) for m in model.modules())
    parallel = DistributedDataParallel(broadcast_codes(model) if coded else model, find_unused_parameters=True)
    torch.testing.assert_close(losses(parallel, 4, split=True), wanted, **TOLERANCE)


def averages_follow_all_processes_under_ddp() -> None:
    model = cached(decay=0.9).train()
    single = copy.deepcopy(model)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    for ids in tokens(3):
        parallel(mine(ids)).square().mean().backward()
        without_all_reduce(single, ids)
    assert_same_averages(model, single)


def without_all_reduce(model: nn.Module, ids: Tensor) -> None:
    """A step of one process alone, which has the whole batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rpqfx.kv.quantizer.ema._several_ranks", lambda: False)
        model(ids).square().mean().backward()


def assert_same_averages(model: nn.Module, single: nn.Module) -> None:
    wanted = single.state_dict()
    names = [name for name in wanted if "ema_sums" in name or name.endswith("quantizer.codebooks")]
    assert any("ema_sums" in name for name in names)
    for name, found in model.state_dict().items():
        if name in names:
            torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-4, msg=name)


# ------------------------------------------------------------------------------------------------- with heads split


def split_attention_on_codes_is_that_of_one_process() -> None:
    compute_as_one(cached(True, fit=True))
    compute_as_one(cached(transform=False))


def every_kind_of_cache_that_is_split_is_that_of_one_process() -> None:
    for options in (
        {"joint": False},
        {"normalize": True},
        {"transform": False, "strided": True},
        {"bits_per_value": 5},
    ):
        for coded in (False, True):
            compute_as_one(cached(coded, fit=coded, **options))


def compute_as_one(model: nn.Module) -> None:
    wanted, from_cache = outputs(model), from_a_cache(model)
    split_cache(model)
    torch.testing.assert_close(outputs(model), wanted, **TOLERANCE)
    torch.testing.assert_close(from_a_cache(model), from_cache, **TOLERANCE)


def split_attention_on_codes_trains_as_in_one_process() -> None:
    model = cached(True, fit=True).train()
    wanted = with_commitment(copy.deepcopy(model))
    torch.testing.assert_close(with_commitment(split_cache(model)), wanted, **TOLERANCE)


def with_commitment(model: nn.Module) -> Tensor:
    """Losses of steps, with the quantisers' own."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    found = []
    for ids in tokens(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()) + commitment(model)
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def averages_count_each_token_once_where_heads_are_split() -> None:
    model = cached(decay=0.9).train()
    single = copy.deepcopy(model)
    split_cache(model)
    for ids in tokens(3):
        model(ids).square().mean().backward()
        without_all_reduce(single, ids)
    assert_same_averages(model, single)


def split_routes_are_those_of_one_process() -> None:
    for coded in (False, True):
        model = routed(coded)
        wanted, training = outputs(model), expected(model.train(), steps=3)
        split(model)
        torch.testing.assert_close(outputs(model), wanted, **TOLERANCE)
        torch.testing.assert_close(losses(model.train(), 3, split=False), training, **TOLERANCE)


# ------------------------------------------------------------------------------------------------ what is refused


def heads_that_are_split_without_their_cache_are_refused_by_name() -> None:
    model = split(cached())
    with pytest.raises(InputError, match=r"blocks\.0\.attention: .*HeadParallel.*blocks\.0\.attention\.kv_codes"):
        outputs(model)
    with pytest.raises(InputError, match=r"HeadParallel"):
        from_a_cache(model)


def what_is_no_attention_on_codes_has_no_heads_to_split() -> None:
    with pytest.raises(DistributedError, match=r"HeadParallel is for attention on codes .* got LayerNorm"):
        split(decoder(), **{"blocks.*.norm1": HeadParallel()})


def models_that_are_shared_out_already_are_refused() -> None:
    for make, why in ((split, "processes have parts of"), (fully_shard, "FSDP shards")):
        for coded in (False, True):
            model = make(decoder(coded))
            with pytest.raises(RewriteError, match=f"quantize_kv needs whole tensors, and {why}"):
                quantize_kv(model, calibration=tokens())
            with pytest.raises(RewriteError, match=f"route needs whole tensors, and {why}"):
                route(model, RoutePolicy(window=8))
    parallel = DistributedDataParallel(decoder())
    for call in (lambda: quantize_kv(parallel, calibration=tokens()), lambda: route(parallel, RoutePolicy(window=8))):
        with pytest.raises(RewriteError, match=r"is in DistributedDataParallel.*hand in its \.module"):
            call()


def routes_of_sequences_that_are_split_are_refused() -> None:
    for coded in (False, True):
        styles = {"blocks.*.up": ColwiseParallel(input_layouts=Shard(1))}
        with pytest.raises(DistributedError, match=r"routed.*chooses among all tokens.*input_layouts=Replicate"):
            split(routed(coded), **styles)
        styles = {"blocks.*.down": RowwiseParallel(output_layouts=Shard(1))}
        with pytest.raises(DistributedError, match=r"routed.*output_layouts=Replicate"):
            split(routed(coded), **styles)


CLAIMS = [
    caches_and_routes_train_in_ddp_as_in_one_process,
    averages_follow_all_processes_under_ddp,
    split_attention_on_codes_is_that_of_one_process,
    split_attention_on_codes_trains_as_in_one_process,
    averages_count_each_token_once_where_heads_are_split,
    split_routes_are_those_of_one_process,
    heads_that_are_split_without_their_cache_are_refused_by_name,
    what_is_no_attention_on_codes_has_no_heads_to_split,
    models_that_are_shared_out_already_are_refused,
    routes_of_sequences_that_are_split_are_refused,
]
LONG = [dense_models_with_caches_and_routes_do_too, every_kind_of_cache_that_is_split_is_that_of_one_process]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processes.run(CLAIMS, RANKS, tmp_path_factory.mktemp("attention"))


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_in_two_processes(claim: Callable[[], None], said: Path) -> None:
    found = processes.failure(said, claim, RANKS)
    assert not found, found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_at_length(ranks: int, tmp_path: Path) -> None:
    claims = [*CLAIMS, *LONG] if ranks == 4 else LONG
    processes.run(claims, ranks, tmp_path)
    assert not "".join(processes.failure(tmp_path, claim, ranks) for claim in claims)
