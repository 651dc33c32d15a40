"""A rewritten model trains in several processes as a dense one does, with codes of every width.

Two processes are started once, for all claims, because starting them takes most of the time. Each claim is a function
that both run; what fails in one is raised here.
"""

from __future__ import annotations

import copy
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rpqfx
from rpqfx import Policy, Rule
from rpqfx.nn import RPQWeight
from tests import forks

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="gloo is not built in")
RANKS = 2
BITS = (8, 9, 16)
# What DistributedDataParallel of torch before 2.13 sends counts as changed, and a backward that needs it is refused.
SENDS_UNSEEN = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


class Net(nn.Module):
    """A table whose codes have some number of bits, a layer, a Parameter of its own, and a branch not always taken."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.emb, self.fc, self.norm = nn.Embedding(1 << bits, 8), nn.Linear(8, 64), nn.LayerNorm(64)
        self.w, self.other = nn.Parameter(torch.randn(64, 32) / 8), nn.Linear(8, 64)

    def forward(self, ids: Tensor, other: bool = False) -> Tensor:
        x = self.emb(ids)
        return self.norm(self.other(x) if other else self.fc(x)) @ self.w


def net(bits: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    rules = (Rule("emb", codebook_bits=bits, scale=True),)
    policy = Policy.from_scratch(codebook_dim=4, codebook_bits=4, min_size=64, allow_growth=True, rules=rules)
    return rpqfx.rpqify(Net(bits), policy)


def batch(bits: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(bits)
    return torch.randint(1 << bits, (8, 5), generator=g), torch.randn(8, 5, 32, generator=g)


def mine(x: Tensor) -> Tensor:
    return x.chunk(RANKS)[dist.get_rank()]


def codes(model: nn.Module) -> list[Tensor]:
    return [m.codes.long().clone() for m in model.modules() if isinstance(m, RPQWeight)]


def assert_same_on_all_ranks(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        first = tensor.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, tensor)


def loss_of(model: Callable[..., Tensor], bits: int, split: bool, other: bool = False) -> Tensor:
    ids, y = batch(bits)
    ids, y = (mine(ids), mine(y)) if split else (ids, y)
    return F.mse_loss(model(ids, other), y)


def assert_gradients_of_the_whole_batch(parallel: nn.Module, single: nn.Module, unused: str = "") -> None:
    wanted = dict(single.named_parameters())
    for name, parameter in parallel.named_parameters():
        found, want = parameter.grad, wanted[name].grad
        if want is None:
            assert unused and name.startswith(unused) and (found is None or not found.any()), name
        else:
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6, msg=name)


# --------------------------------------------------------------------------------------------- DistributedDataParallel


def ddp_starts_from_rank_0_and_gives_the_gradients_of_the_whole_batch() -> None:
    for bits in BITS:
        parallel = DistributedDataParallel(net(bits, seed=dist.get_rank()), find_unused_parameters=True)
        assert_same_on_all_ranks(codes(parallel))
        single = copy.deepcopy(parallel.module)
        assert parallel.module.emb.weight_rpq.codes.dtype == single.emb.weight_rpq.spec.code_dtype
        for other in (False, True):
            parallel.zero_grad()
            single.zero_grad()
            loss_of(parallel, bits, split=True, other=other).backward()
            loss_of(single, bits, split=False, other=other).backward()
            assert_gradients_of_the_whole_batch(parallel.module, single, unused="fc" if other else "other")
        optimizers = [torch.optim.AdamW(model.parameters(), 1e-2) for model in (parallel, single)]
        for optimizer in optimizers:
            optimizer.step()
        assert_same_on_all_ranks([p.detach() for p in parallel.parameters()])
        torch.testing.assert_close(parallel(batch(bits)[0]), single(batch(bits)[0]), rtol=1e-3, atol=1e-3)


def ddp_sends_the_codes_of_rank_0_with_every_forward() -> None:
    for bits in BITS:
        parallel = DistributedDataParallel(net(bits, 0), find_unused_parameters=True)
        wanted = codes(parallel)
        if dist.get_rank():
            for module in parallel.modules():
                if isinstance(module, RPQWeight):
                    module.codes.copy_(module.codes.long().flip(-1))
        loss_of(parallel, bits, split=True)
        assert all(torch.equal(a, b) for a, b in zip(codes(parallel), wanted, strict=True))


def ddp_gathers_gradients_of_several_forwards() -> None:
    parallel = DistributedDataParallel(net(9, 0), find_unused_parameters=True)
    single = copy.deepcopy(parallel.module)
    with parallel.no_sync():
        loss_of(parallel, 9, split=True).backward()
    loss_of(parallel, 9, split=True).backward()
    (2 * loss_of(single, 9, split=False)).backward()
    assert_gradients_of_the_whole_batch(parallel.module, single, unused="other")
    model = net(9, 0)
    del model.other
    if not SENDS_UNSEEN:
        from rpqfx.distributed import broadcast_codes

        broadcast_codes(model)
    parallel = DistributedDataParallel(model)
    (loss_of(parallel, 9, split=True) + loss_of(parallel, 9, split=True)).backward()  # codes are sent in between
    assert_gradients_of_the_whole_batch(parallel.module, single)


def ddp_with_a_static_graph_and_checkpointing() -> None:
    model = net(9, 0)
    del model.other
    parallel = DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True)
    single = copy.deepcopy(parallel.module)
    ids, y = batch(9)
    for _ in range(3):
        parallel.zero_grad()
        single.zero_grad()
        F.mse_loss(parallel(mine(ids)), mine(y)).backward()
        F.mse_loss(torch.utils.checkpoint.checkpoint(single, ids, use_reentrant=False), y).backward()
        assert_gradients_of_the_whole_batch(parallel.module, single)


# ----------------------------------------------------------------------------------------------------------- sharding


def fully_shard_of_any_module_computes_the_same() -> None:
    from torch.distributed.fsdp import fully_shard

    for bits in (8, 9):
        for what in ("model", "layers", "weights"):
            model = net(bits, 0)
            single = copy.deepcopy(model)
            for module in list(model.modules()):
                if (what == "weights" and isinstance(module, RPQWeight)) or (what == "layers" and module is model.fc):
                    fully_shard(module)
            fully_shard(model)
            for _ in range(2):
                found, wanted = loss_of(model, bits, split=True), loss_of(single, bits, split=False)
                parts = [torch.empty_like(found) for _ in range(RANKS)]
                dist.all_gather(parts, found.detach())
                torch.testing.assert_close(torch.stack(parts).mean(), wanted.detach())
                found.backward()
                wanted.backward()
                for optimized in (model, single):
                    optimizer = torch.optim.SGD(optimized.parameters(), 0.1)
                    optimizer.step()
                    optimizer.zero_grad()
            for name, parameter in model.named_parameters():
                whole: Any = parameter
                wanted = dict(single.named_parameters())[name]
                torch.testing.assert_close(whole.full_tensor(), wanted.detach(), rtol=1e-4, atol=1e-5, msg=name)


def fully_sharded_data_parallel_computes_the_same() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    for bits in (8, 9):
        for policy in (None, ModuleWrapPolicy({nn.Linear, nn.Embedding})):
            model = net(bits, 0)
            single = copy.deepcopy(model)
            cpu = torch.device("cpu")
            sharded = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)
            for trained in (sharded, single):
                optimizer = torch.optim.SGD(trained.parameters(), 0.1)
                loss_of(trained, bits, split=trained is sharded).backward()
                optimizer.step()
            ids, _ = batch(bits)
            torch.testing.assert_close(sharded(ids), single(ids), rtol=1e-3, atol=1e-4)


def state_dicts_of_sharded_models_are_gathered_and_loaded() -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    for bits in (8, 9):
        model, single = net(bits, 0), net(bits, 0)
        fully_shard(model)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        assert state.keys() == single.state_dict().keys()
        other = net(bits, 1)
        other.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(codes(other), codes(single), strict=True))
        again = net(bits, 1 + dist.get_rank())
        fully_shard(again)
        set_model_state_dict(again, single.state_dict(), options=StateDictOptions(full_state_dict=True))
        assert all(torch.equal(a, b) for a, b in zip(codes(again), codes(single), strict=True))
        assert torch.equal(again(batch(bits)[0]), single(batch(bits)[0]))


CLAIMS = [
    ddp_starts_from_rank_0_and_gives_the_gradients_of_the_whole_batch,
    ddp_sends_the_codes_of_rank_0_with_every_forward,
    ddp_gathers_gradients_of_several_forwards,
    ddp_with_a_static_graph_and_checkpointing,
    fully_shard_of_any_module_computes_the_same,
    fully_sharded_data_parallel_computes_the_same,
    state_dicts_of_sharded_models_are_gathered_and_loaded,
]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    for claim in CLAIMS:
        try:
            claim()
            said = ""
        except Exception:  # the other process has to go on as well
            said = traceback.format_exc()
        Path(folder, f"{claim.__name__}.{rank}").write_text(said)
        dist.barrier()
    dist.destroy_process_group()


START = """
import sys
import torch._dynamo  # which an optimiser imports, for both processes at once
import torch.multiprocessing as mp
from tests.contracts.test_distributed import RANKS, work
mp.start_processes(work, (sys.argv[1],), nprocs=RANKS, start_method="fork")
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    # Whether kernels are there is no matter of these tests, and building takes long.
    done = forks.run(START, str(folder), environment={**os.environ, "RPQFX_KERNELS": "0"})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
@pytest.mark.parametrize("rank", range(RANKS))
def test_in_two_processes(claim: Callable[[], None], rank: int, said: Path):
    found = (said / f"{claim.__name__}.{rank}").read_text()
    assert not found, found
