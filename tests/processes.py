"""Runs the claims of a test module in several processes, which are started once for all of them.

Starting them takes most of the time. Each claim is a function that every process runs; what fails in one is raised in
the process of the tests. A claim that fails in one process alone leaves the others waiting for it, which ends after
``WAIT``.
"""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests import forks

WAIT = timedelta(seconds=60)

START = """
import sys
import torch._dynamo  # which an optimiser imports, for all processes at once
import torch.multiprocessing as mp
from tests.processes import work
module, ranks, folder, *claims = sys.argv[1:]
mp.start_processes(work, (module, int(ranks), folder, claims), nprocs=int(ranks), start_method="fork")
"""


def run(claims: Sequence[Callable[[], None]], ranks: int, folder: Path, *, kernels: bool = False) -> Path:
    """Runs claims in several processes, one after the other.

    Args:
        claims: Functions of one test module.
        ranks: How many processes run each of them.
        folder: Where they write what went wrong.
        kernels: Whether they run compiled kernels, which have to be compiled already: that takes longer than ``WAIT``.

    Returns:
        ``folder``, for ``failure``.
    """
    module, names = claims[0].__module__, [claim.__name__ for claim in claims]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not kernels:  # most of these tests are not about what computes, and loading kernels takes a while
        environment["RPQFX_KERNELS"] = "0"
    done = forks.run(START, module, str(ranks), str(folder), *names, environment=environment)
    assert done.returncode == 0, done.stderr
    return folder


def failure(folder: Path, claim: Callable[[], None], ranks: int) -> str:
    """Returns what a claim raised in any of the processes, or nothing."""
    return "\n".join(text for rank in range(ranks) if (text := (folder / f"{claim.__name__}.{rank}").read_text()))


def work(rank: int, module: str, ranks: int, folder: str, claims: Sequence[str]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{ranks}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=WAIT)
    found = importlib.import_module(module)
    for name in claims:
        try:
            getattr(found, name)()
            said = ""
        except Exception:  # the other processes have to go on as well
            said = f"rank {rank}:\n{traceback.format_exc()}"
        Path(folder, f"{name}.{rank}").write_text(said)
        dist.barrier()
    dist.destroy_process_group()
