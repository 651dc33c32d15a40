"""``convert`` in several processes, which share out batches, codebooks and rows, to the result of one process."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn

from rpqfx.conversion.convert import converted
from rpqfx.distributed.process_ranks import ProcessRanks
from rpqfx.policies.policy import Decide, Policy
from rpqfx.reporting.progress import Progress


def convert(
    model: nn.Module,
    policy: Policy | Decide,
    calibration: Iterable[Any] | None,
    *,
    group: dist.ProcessGroup | None = None,
    inplace: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> nn.Module:
    """Fits a trained model to codebooks as ``rpqfx.convert`` does, the work shared out over processes.

    Every process makes the same call, with the whole model and all batches, and gets the whole result. It is that of
    ``rpqfx.convert`` in one process to the last bit, where the processes compute as that one would: on the same kind of
    device, with as many threads each. Processes share out

    - batches, forwards and backwards; statistics of each are added up in the order of batches;
    - second moments of outputs, which each process keeps and weighs for some weights;
    - codebooks, of which each process trains some;
    - rows of a weight, where the compiled kernel codes them (float32 on a CPU).

    Args:
        model: As for ``rpqfx.convert``, the same values in every process; whole, not sharded and not in DDP.
        policy: As for ``rpqfx.convert``.
        calibration: As for ``rpqfx.convert``: all batches in every process. More processes than batches find nothing to
            run.
        group: The processes. It has to send from the CPU (gloo), also where the model is on a GPU, which is then each
            process's current one; all processes if left out.
        inplace: As for ``rpqfx.convert``.
        checkpoint: As for ``rpqfx.convert``. Rank 0 alone reads and writes the folder, and any number of processes can
            go on with it.
        seed: As for ``rpqfx.convert``.
        progress: As for ``rpqfx.convert``; a line is shown by rank 0 alone, a callable is called in every process.

    Returns:
        The converted model, the same in every process.

    Raises:
        DistributedError: If there is no process group, or none that sends from the CPU; if processes make different
            calls; or if another process raised, which is named with its error, or is gone, which is known at once or
            after the group's timeout.
        RPQError: As ``rpqfx.convert``. Whatever is raised in whichever process, it ends the call in all of them, and
            each has its model as it was.
    """
    ranks = ProcessRanks(group)
    try:
        return converted(
            model, policy, calibration, inplace=inplace, checkpoint=checkpoint, seed=seed,
            progress=progress if callable(progress) or not ranks.rank else False, ranks=ranks,
        )  # fmt: skip
    except BaseException as error:
        ranks.tell(error)
        raise
