"""Checkpoints of torch.distributed.checkpoint load on other numbers of processes, and outlive one that is killed."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import rpqfx
from rpqfx.distributed import broadcast_codes, fully_shard
from tests import forks, processes
from tests.distributed.test_tensor_parallel import split
from tests.distributed.training import NEEDS_INTEGERS, Net, batches, loss_of, losses, mine, net, vocabulary

pytestmark = NEEDS_INTEGERS
BITS = (8, 9)
OPTIONS: dict[str, Any] = {"tied": False, "scale": True, "signs": True}


def folder() -> Path:
    return Path(os.environ["RPQFX_TEST_FOLDER"])


def started(bits: int, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net(bits, seed, **OPTIONS)
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model), torch.optim.AdamW(model.parameters(), 1e-2)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor) -> None:
    optimizer.zero_grad()
    loss_of(model, rows).backward()
    optimizer.step()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    values, moments = get_state_dict(model, optimizer)
    return {"model": values, "optimizer": moments}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(next(batches(1)))


def written() -> None:
    """Trains, saves, and notes what the model returns before and after one more step."""
    for bits in BITS:
        model, optimizer = started(bits)
        for ids in batches(2):
            step(model, optimizer, mine(ids))
        dcp.save(state_of(model, optimizer), checkpoint_id=folder() / f"sharded-{bits}")
        before = outputs(model)
        step(model, optimizer, mine(next(batches(1))))
        after = outputs(model)
        if not dist.get_rank():
            torch.save((before, after), folder() / f"wanted-{bits}")


def read() -> None:
    for bits in BITS:
        before, after = torch.load(folder() / f"wanted-{bits}")
        model, optimizer = started(bits, seed=5)
        state = state_of(model, optimizer)
        dcp.load(state, checkpoint_id=folder() / f"sharded-{bits}")
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )  # fmt: skip
        assert torch.equal(outputs(model), before)
        ids = next(batches(1))
        step(model, optimizer, mine(ids) if len(ids) % dist.get_world_size() == 0 else ids)  # the mean of equal parts
        torch.testing.assert_close(outputs(model), after, rtol=1e-7, atol=1e-9)


def files_of_rpqfx_come_and_go() -> None:
    for bits in BITS:
        whole = net(bits, **OPTIONS)
        path = folder() / f"whole-{bits}.rpq"
        if not dist.get_rank():
            rpqfx.save(whole, path)
        dist.barrier()
        model = rpqfx.load(path, lambda bits=bits: Net(False, vocabulary(bits)).double())
        wanted = outputs(whole)
        assert torch.equal(outputs(fully_shard(model)), wanted)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if not dist.get_rank():  # there it is gathered
            other = net(bits, 3, **OPTIONS)
            other.load_state_dict(state)
            rpqfx.save(other, folder() / "again.rpq")
            again = rpqfx.load(folder() / "again.rpq", lambda bits=bits: Net(False, vocabulary(bits)).double())
            assert torch.equal(outputs(again), wanted)
        dist.barrier()


def split_models_are_saved_and_loaded() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    for bits in BITS:
        model = split(net(bits, scale=True, signs=True), mesh)
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder() / f"split-{bits}")
        other = fully_shard(net(bits, 4, scale=True, signs=True))
        state = {"model": get_model_state_dict(other)}
        dcp.load(state, checkpoint_id=folder() / f"split-{bits}")
        other.load_state_dict(state["model"], strict=False)
        torch.testing.assert_close(outputs(other), outputs(model))
        again = split(net(bits, 5, scale=True, signs=True), mesh)
        state = {"model": get_model_state_dict(again)}
        dcp.load(state, checkpoint_id=folder() / f"split-{bits}")
        assert torch.equal(outputs(again), outputs(model))


def ddp_is_saved_and_loaded() -> None:
    model = broadcast_codes(net(9, seed=dist.get_rank(), **OPTIONS))
    parallel = DistributedDataParallel(model)
    losses(parallel, 2, split=True)
    dcp.save({"model": get_model_state_dict(parallel)}, checkpoint_id=folder() / "ddp")
    other = DistributedDataParallel(broadcast_codes(net(9, 4, **OPTIONS)))
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder() / "ddp")
    other.module.load_state_dict(state["model"])
    assert torch.equal(outputs(other), outputs(parallel))


CLAIMS = [read, files_of_rpqfx_come_and_go, split_models_are_saved_and_loaded, ddp_is_saved_and_loaded]


def run(claims: list[Callable[[], None]], ranks: int, where: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RPQFX_TEST_FOLDER", str(where))
        logs = where / f"logs-{ranks}-{claims[0].__name__}"
        logs.mkdir()
        processes.run(claims, ranks, logs)
        return "".join(processes.failure(logs, claim, ranks) for claim in claims)


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("checkpoints")
    assert not (said := run([written, *CLAIMS], 2, found)), said
    return found


def test_two_processes_write_and_read(where: Path) -> None:
    assert (where / "sharded-8" / ".metadata").exists()


def test_what_several_wrote_is_a_state_dict_for_a_whole_model(where: Path) -> None:
    for bits in BITS:
        dcp_to_torch_save(where / f"sharded-{bits}", where / "whole.pt")
        model = net(bits, 5, **OPTIONS)
        model.load_state_dict(torch.load(where / "whole.pt", weights_only=False)["model"])
        assert torch.equal(outputs(model), torch.load(where / f"wanted-{bits}")[0])


@pytest.mark.slow
def test_four_processes_write_and_one_two_and_three_read(tmp_path: Path) -> None:
    assert not (said := run([written], 4, tmp_path)), said
    for ranks in (1, 2, 3, 4):
        assert not (said := run([read], ranks, tmp_path)), said


# ---------------------------------------------------------------------------------------- a process is killed

KILLED = """
import sys
import torch._dynamo
import torch.multiprocessing as mp
from tests.distributed.test_checkpoint import killed
started = mp.start_processes(killed, (sys.argv[1], sys.argv[2]), nprocs=2, start_method="fork", join=False)
for process in started.processes:
    process.join(90)
print([process.exitcode for process in started.processes])
"""


def killed(rank: int, where: str, when: str) -> None:
    """Saves, and loses the other process in the next step or the next save."""
    torch.set_num_threads(1)
    store = f"file://{where}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
    model, optimizer = started(8)
    step(model, optimizer, mine(next(batches(1))))
    dcp.save(state_of(model, optimizer), checkpoint_id=Path(where, "step-1"))
    wanted = outputs(model)
    if not rank:
        torch.save(wanted, Path(where, "wanted"))

    def die(*args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if rank and when == "step":
        model.blocks[1].register_full_backward_pre_hook(die)
    if rank and when == "save":
        dcp.FileSystemWriter.write_data = die  # type: ignore[method-assign, assignment]
    try:
        step(model, optimizer, mine(next(batches(1))))
        dcp.save(state_of(model, optimizer), checkpoint_id=Path(where, "step-2"))
    except Exception:
        Path(where, "said").write_text(traceback.format_exc())
        os._exit(3)


@pytest.mark.parametrize("when", ["step", "save"])
def test_when_a_process_is_killed_the_others_fail_and_the_last_checkpoint_is_whole(when: str, tmp_path: Path) -> None:
    done = forks.run(KILLED, str(tmp_path), when, environment={**os.environ, "RPQFX_KERNELS": "0"})
    assert done.stdout.split("\n")[-2] == "[3, -9]", done.stdout + done.stderr
    assert (tmp_path / "said").read_text()
    assert not (tmp_path / "step-2" / ".metadata").exists()
    dcp_to_torch_save(tmp_path / "step-1", tmp_path / "whole.pt")
    model = net(8, 5, **OPTIONS)
    model.load_state_dict(torch.load(tmp_path / "whole.pt", weights_only=False)["model"])
    assert torch.equal(outputs(model), torch.load(tmp_path / "wanted"))
    if when == "save":
        with pytest.raises(CheckpointException, match="metadata"):
            dcp.load({"model": {}}, checkpoint_id=tmp_path / "step-2", no_dist=True)
