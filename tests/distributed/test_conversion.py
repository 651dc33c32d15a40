"""A conversion that processes share is that of one process to the last bit, and ends in all of them or in none."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import rpqfx
import rpqfx.distributed
from rpqfx import Policy
from rpqfx.conversion import conversion, shared_rows
from rpqfx.errors import DistributedError, FormatError, InputError
from rpqfx.graph import is_rewritten
from rpqfx.ops.cpu import build
from tests import forks, processes
from tests.conversion.test_conversion import Odd, convnet, equal, images, inputs, mlp
from tests.models import GPT

RANKS = 2
POLICY = Policy.pretrained(bits_per_weight=3, min_size=256)


def folder() -> Path:
    return Path(os.environ["RPQFX_TEST_FOLDER"])


def same_folder(name: str) -> Path:
    """A folder that all processes name, and that none of them has made."""
    dist.barrier()
    return folder() / f"{name}-{dist.get_world_size()}"


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(width=32).eval()


def tokens(count: int = 5) -> list[Tensor]:
    return list(torch.randint(40, (count, 3, 12), generator=torch.Generator().manual_seed(0)))


def odd() -> nn.Module:
    torch.manual_seed(0)
    return Odd()


def odd_batches() -> list[Any]:
    x = inputs(0, 64, 32)
    return [x[0], {"x": x[1], "more": True}, x[2]]


def agrees(model: nn.Module, policy: Any, calibration: Any, **options: Any) -> None:
    """Asserts that the result of all processes is that of this one."""
    small = rpqfx.distributed.convert(model, policy, calibration, **options)
    wanted = rpqfx.convert(model, policy, calibration)
    assert equal(small, wanted) and not is_rewritten(model)
    assert [site.error for site in rpqfx.report(small).sites] == [site.error for site in rpqfx.report(wanted).sites]
    assert rpqfx.report(small).notes == rpqfx.report(wanted).notes
    for tensor, other in zip(small.parameters(), wanted.parameters(), strict=True):
        assert tensor.requires_grad == other.requires_grad and tensor.device == other.device


# ------------------------------------------------------------------------------------------------- the result


def a_tied_table_and_attention_are_converted_as_by_one_process() -> None:
    agrees(gpt(), POLICY, tokens())


def convolutions_and_batch_norms_are_converted_as_by_one_process() -> None:
    agrees(convnet(), POLICY, images(0))


def layers_used_twice_never_and_by_some_batches_only_are_too() -> None:
    agrees(odd(), POLICY, odd_batches())


def policies_without_a_rate_and_codebooks_that_are_shared_are_too() -> None:
    options: dict[str, Any] = {"codebook_dim": 4, "codebook_bits": 3, "min_size": 256, "scale": True}
    agrees(mlp(), Policy(sharing="shape", column_scale=True, **options), inputs(0, 16, 32))
    agrees(mlp(), Policy(signs=True, stages=2, **options), inputs(0, 16, 32))


def more_processes_than_batches_or_no_batch_at_all_are_too() -> None:
    agrees(mlp(), POLICY, inputs(0, 16, 32, count=1))
    agrees(mlp(), POLICY, None)


def every_kind_of_model_is_converted_as_by_one_process() -> None:
    for batches in range(1, 8):
        agrees(gpt(), POLICY, tokens(batches))
    for dtype in (torch.float64, torch.bfloat16):
        agrees(mlp().to(dtype), POLICY, [x.to(dtype) for x in inputs(0, 40, 32, count=6)])
    agrees(mlp(0, 64, 128, 128, 64), Policy.pretrained(bits_per_weight=2), inputs(0, 200, 64, count=7))
    agrees(convnet(), Policy.pretrained(bits_per_weight=4, min_size=64), images(1, count=6))


# ---------------------------------------------------------------------------------------- what is shared out


def each_process_runs_its_batches_trains_its_codebooks_and_codes_its_rows() -> None:
    runs, trained, rows = [0], [0], [0]
    train, search = conversion.train_codebooks, shared_rows.column_search

    class Counted(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            runs[0] += 1
            return super().forward(input)

    def training(*args: Any, **options: Any) -> Tensor:
        trained[0] += 1
        return train(*args, **options)

    def searching(matrix: Tensor, *rest: Any) -> Any:
        rows[0] += len(matrix)
        return search(matrix, *rest)

    model = Counted(*mlp(0, 32, 64, 64, 64, 32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "train_codebooks", training)
        patch.setattr(shared_rows, "column_search", searching)
        rpqfx.convert(model, POLICY, inputs(0, 16, 32, count=8))
        alone = runs[0], trained[0], rows[0]
        runs[0] = trained[0] = rows[0] = 0
        rpqfx.distributed.convert(model, POLICY, inputs(0, 16, 32, count=8))
    assert alone == (16, 4, 224)
    ranks = dist.get_world_size()
    assert (runs[0], trained[0]) == (16 // ranks, 4 // ranks)
    assert rows[0] == (224 // ranks if build.ready() else 224)


# ------------------------------------------------------------------------------------------- what ends all


def an_error_in_one_process_is_raised_there_and_named_in_the_others() -> None:
    for rank in range(dist.get_world_size()):
        for at in (1, 5, 12):
            model, seen = mlp(), []

            def stop(
                done: int, total: int, name: str, *, rank: int = rank, at: int = at, seen: list[str] = seen
            ) -> None:
                seen.append(name)
                if dist.get_rank() == rank and len(seen) == at:
                    raise ZeroDivisionError("my own")

            error, text = ZeroDivisionError, "my own"
            if dist.get_rank() != rank:
                error, text = DistributedError, f"^rank {rank} has failed with ZeroDivisionError: my own"
            with pytest.raises(error, match=text):
                rpqfx.distributed.convert(model, POLICY, inputs(0, 16, 32, count=9), inplace=True, progress=stop)
            assert len(seen) <= 13 and not is_rewritten(model) and equal(model, mlp())
    agrees(mlp(), POLICY, inputs(0, 16, 32))  # the group is as good as before


def a_batch_that_is_rejected_in_one_process_ends_all() -> None:
    batches = inputs(0, 16, 32, count=4)
    batches[3] = batches[3][:, :7]
    mine = 3 % dist.get_world_size() == dist.get_rank()
    error: type[Exception] = InputError if mine else DistributedError
    with pytest.raises(error, match="calibration batch 3"):
        rpqfx.distributed.convert(mlp(), POLICY, batches)


def what_is_refused_before_any_work_is_refused_everywhere() -> None:
    last = dist.get_rank() == dist.get_world_size() - 1
    given: dict[str, Any] = {"model": mlp(), "policy": POLICY, "calibration": inputs(0, 16, 32)}
    others: dict[str, dict[str, Any]] = {
        "the model": {"model": mlp(3)},
        "the calibration batches": {"calibration": inputs(1, 16, 32)},
        "the policy": {"policy": Policy.pretrained(bits_per_weight=4, min_size=256)},
        "seed": {"seed": 1},
        "checkpoint": {"checkpoint": folder() / "elsewhere"},
    }
    for what, other in others.items():
        with pytest.raises(DistributedError, match=rf"{what} of rank {dist.get_world_size() - 1} differs"):
            rpqfx.distributed.convert(**{**given, **(other if last else {})})
    wrong: dict[str, Any] = {**given, **({"calibration": []} if last else {})}
    with pytest.raises(InputError if last else DistributedError, match="no calibration batches"):
        rpqfx.distributed.convert(**wrong)
    assert not (folder() / "elsewhere").exists()


def threads_that_differ_are_refused() -> None:
    torch.set_num_threads(1 + (dist.get_rank() == 1))
    try:
        with pytest.raises(DistributedError, match=r"torch.get_num_threads\(\) of rank 1 differs .* \(2, and 1\)"):
            rpqfx.distributed.convert(mlp(), POLICY, inputs(0, 16, 32))
    finally:
        torch.set_num_threads(1)


def models_that_compute_other_things_are_noticed() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()

        def forward(self, x: Tensor) -> Tensor:
            if dist.get_rank() == 1:
                raise TimeoutError("only here")
            return self.layers(x)

    with pytest.raises((InputError, DistributedError), match="only here"):
        rpqfx.distributed.convert(Uneven(), POLICY, inputs(0, 16, 32))


def a_part_of_the_processes_converts_alone() -> None:
    first = dist.new_group([0])
    if dist.get_rank():
        with pytest.raises(DistributedError, match="not in the group"):
            rpqfx.distributed.convert(mlp(), POLICY, inputs(0, 16, 32), group=first)
    else:
        agrees(mlp(), POLICY, inputs(0, 16, 32), group=first)


# ---------------------------------------------------------------------------------------------- checkpoints


def what_was_interrupted_goes_on_in_any_number_of_processes() -> None:
    batches, fits = inputs(0, 16, 32), [0]
    wanted, place = rpqfx.convert(mlp(), POLICY, batches), same_folder("checkpoint")

    def stop(done: int, total: int, name: str) -> None:
        if total == 3 and done == 2 and "batch" not in name:
            raise KeyboardInterrupt

    def fit(*args: Any, **options: Any) -> Any:
        fits[0] += 1
        return fit_weight(*args, **options)

    fit_weight = conversion.fit_weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "fit_weight", fit)
        with pytest.raises((KeyboardInterrupt, DistributedError)):
            rpqfx.distributed.convert(mlp(), POLICY, batches, checkpoint=place, progress=stop)
        assert fits == [2]
        if not dist.get_rank():
            assert equal(rpqfx.convert(mlp(), POLICY, batches, checkpoint=folder_copy(place)), wanted)
            assert fits == [3]
        fits[0] = 0
        dist.barrier()
        small = rpqfx.distributed.convert(mlp(), POLICY, batches, checkpoint=place)
        assert equal(small, wanted) and fits == [1]
        assert equal(rpqfx.distributed.convert(mlp(), POLICY, batches, checkpoint=place), wanted) and fits == [1]
    with pytest.raises(DistributedError if dist.get_rank() else FormatError, match="holds a conversion of another"):
        rpqfx.distributed.convert(mlp(), POLICY, batches, checkpoint=place, seed=1)


def folder_copy(place: Path) -> Path:
    other = place.with_name(f"{place.name}-copy")
    other.mkdir()
    for path in place.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    return other


CLAIMS = [
    a_tied_table_and_attention_are_converted_as_by_one_process,
    convolutions_and_batch_norms_are_converted_as_by_one_process,
    layers_used_twice_never_and_by_some_batches_only_are_too,
    policies_without_a_rate_and_codebooks_that_are_shared_are_too,
    more_processes_than_batches_or_no_batch_at_all_are_too,
    each_process_runs_its_batches_trains_its_codebooks_and_codes_its_rows,
    an_error_in_one_process_is_raised_there_and_named_in_the_others,
    a_batch_that_is_rejected_in_one_process_ends_all,
    what_is_refused_before_any_work_is_refused_everywhere,
    threads_that_differ_are_refused,
    models_that_compute_other_things_are_noticed,
    a_part_of_the_processes_converts_alone,
    what_was_interrupted_goes_on_in_any_number_of_processes,
]


def run(claims: list[Callable[[], None]], ranks: int, where: Path, kernels: bool) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RPQFX_TEST_FOLDER", str(where))
        return processes.run(claims, ranks, where, kernels=kernels)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(CLAIMS, RANKS, tmp_path_factory.mktemp("conversion"), build.ready())


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_in_two_processes(claim: Callable[[], None], said: Path) -> None:
    found = processes.failure(said, claim, RANKS)
    assert not found, found


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_at_length(ranks: int, kernels: bool, tmp_path: Path) -> None:
    if kernels and not build.ready():
        pytest.skip("there is no compiled kernel")
    claims = [*CLAIMS, every_kind_of_model_is_converted_as_by_one_process]
    if ranks == 3:
        claims.remove(each_process_runs_its_batches_trains_its_codebooks_and_codes_its_rows)  # counts do not divide
    run(claims, ranks, tmp_path, kernels)
    found = "".join(processes.failure(tmp_path, claim, ranks) for claim in claims)
    assert not found, found


def test_without_a_process_group_there_is_an_error_that_says_so() -> None:
    with pytest.raises(DistributedError, match=r"init_process_group first, or rpqfx\.convert in one process"):
        rpqfx.distributed.convert(mlp(), POLICY, inputs(0, 16, 32))


def test_a_group_that_sends_from_a_gpu_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    with pytest.raises(DistributedError, match=r'does not \(cuda:nccl\); give one that does: .*backend="gloo"'):
        rpqfx.distributed.convert(mlp(), POLICY, inputs(0, 16, 32))


# ---------------------------------------------------------------------------------------- a process is killed

KILLED = """
import sys
import torch._dynamo
import torch.multiprocessing as mp
from tests.distributed.test_conversion import lost
started = mp.start_processes(lost, tuple(sys.argv[1:]), nprocs=3, start_method="fork", join=False)
for process in started.processes:
    process.join(90)
print([process.exitcode for process in started.processes])
"""
BATCHES = 6


def lost(rank: int, where: str, who: str, how: str) -> None:
    """Converts with a checkpoint, while one of the processes is killed, or sleeps for longer than the timeout."""
    torch.set_num_threads(1)
    wait = timedelta(seconds=30 if how == "killed" else 3)
    dist.init_process_group("gloo", init_method=f"file://{where}/store", rank=rank, world_size=3, timeout=wait)

    def end(done: int, total: int, name: str) -> None:
        if rank == int(who) and total == 3 and done == 2:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(20)

    try:
        rpqfx.distributed.convert(
            mlp(), POLICY, inputs(0, 16, 32, count=BATCHES), checkpoint=Path(where, "folder"), progress=end
        )
    except DistributedError:
        Path(where, f"said-{rank}").write_text(traceback.format_exc())
        os._exit(3)


def ended(tmp_path: Path, who: int, how: str) -> list[str]:
    kernels = {} if build.ready() else {"RPQFX_KERNELS": "0"}  # as in this process, which compares results
    done = forks.run(KILLED, str(tmp_path), str(who), how, environment={**os.environ, **kernels})
    statuses = [3, 3, 3]
    statuses[who] = -9 if how == "killed" else 3
    assert done.stdout.split("\n")[-2] == str(statuses), done.stdout + done.stderr
    return [(tmp_path / f"said-{rank}").read_text() for rank in range(3) if rank != who]


def goes_on(tmp_path: Path) -> None:
    batches = inputs(0, 16, 32, count=BATCHES)
    place = tmp_path / "folder"
    assert len(list(place.glob("*.pt"))) >= 3 + 1  # three codebooks, and a weight
    assert equal(rpqfx.convert(mlp(), POLICY, batches, checkpoint=place), rpqfx.convert(mlp(), POLICY, batches))


def test_when_a_process_is_killed_the_others_name_it_and_the_checkpoint_is_whole(tmp_path: Path) -> None:
    for text in ended(tmp_path, 1, "killed"):
        assert "DistributedError: rank 1 does not answer" in text, text
    goes_on(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("who", "how"), [(0, "killed"), (2, "killed"), (1, "late")])
def test_others_that_are_lost_are_named(who: int, how: str, tmp_path: Path) -> None:
    for text in ended(tmp_path, who, how):
        assert f"DistributedError: rank {who} does not answer" in text, text
    goes_on(tmp_path)
