"""Processes of torch.distributed that share a conversion: what one has for another, and who has failed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rpqfx.conversion.ranks import Ranks
from rpqfx.distributed.parcels import packed, unpacked
from rpqfx.errors import DistributedError


class _Failure:
    """Sent in the place of what the others wait for.

    Args:
        text: What went wrong.
    """

    def __init__(self, text: str) -> None:
        self.text = text


class ProcessRanks(Ranks):
    """The processes of a group, each of which knows by every exchange whether all others are there.

    Each process sends to every other directly, so that one that is gone is known by its rank. Where one raises, it
    sends that in the place of what the others wait for, and all end.

    Args:
        group: A group that sends from the CPU; all processes if None.

    Raises:
        DistributedError: If there is no such group, or this process is not in it.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if not dist.is_initialized():
            raise DistributedError(
                "convert of rpqfx.distributed is for several processes; call torch.distributed.init_process_group "
                "first, or rpqfx.convert in one process"
            )
        self.rank, self.size, self._group = dist.get_rank(group), dist.get_world_size(group), group
        if self.rank < 0:
            raise DistributedError("convert: this process is not in the group; only those that are call it")
        if "cpu:" not in (backends := dist.get_backend_config(group)):
            raise DistributedError(
                f"convert sends from the CPU, and the group's back end does not ({backends}); give one that does: "
                'group=torch.distributed.new_group(backend="gloo")'
            )
        self._over = False

    def exchange(self, what: str, parcels: Sequence[Any]) -> list[Any]:
        """See ``Ranks``.

        Raises:
            DistributedError: If another process has failed or is gone, or is somewhere else in its work.
        """
        if self.size == 1:
            return list(parcels)
        received = self._swap(what, parcels)
        failed = {rank: said.text for rank, (_, said) in enumerate(received) if isinstance(said, _Failure)}
        if failed:
            self._over = True
            raise DistributedError(
                "; ".join(f"rank {rank} has failed with {text}" for rank, text in failed.items())
                + ". No process keeps what was converted; mend the cause and call it again in all of them"
            )
        steps = [step for step, _ in received]
        if len(set(steps)) > 1:
            raise DistributedError(
                f"processes are at different steps of the conversion ({', '.join(steps)}, by rank), as where a model "
                "computes other things in another process; make it compute the same from the same inputs"
            )
        return [said for _, said in received]

    def tell(self, error: BaseException) -> None:
        """Tells the others that this process has failed, unless they know.

        Args:
            error: What went wrong.
        """
        if self._over or self.size == 1:
            return
        with contextlib.suppress(DistributedError):  # where another process is gone, too, this error counts
            self._swap("a failure", [_Failure(f"{type(error).__name__}: {error}")] * self.size)

    def _swap(self, what: str, parcels: Sequence[Any]) -> list[tuple[str, Any]]:
        """Sends each process a parcel, and returns the one that each has sent here.

        An exchange that an interrupt ends halfway can be followed by no other.
        """
        self._over = True
        others = [rank for rank in range(self.size) if rank != self.rank]
        made: dict[int, Tensor] = {}
        for parcel in parcels:
            if id(parcel) not in made:  # what goes to several is packed once
                made[id(parcel)] = packed((what, parcel))
        sent = {rank: made[id(parcels[rank])] for rank in others}
        lengths = {rank: torch.tensor([parcel.numel()]) for rank, parcel in sent.items()}
        found = {rank: torch.zeros(1, dtype=torch.int64) for rank in others}
        self._send(lengths, found)
        contents = {rank: torch.empty(int(length), dtype=torch.uint8) for rank, length in found.items()}
        self._send(sent, contents)
        self._over = False
        mine = (what, parcels[self.rank])
        return [mine if rank == self.rank else unpacked(contents[rank]) for rank in range(self.size)]

    def _send(self, sent: dict[int, Tensor], received: dict[int, Tensor]) -> None:
        """Sends tensors and fills others.

        Raises:
            DistributedError: If a process is gone. All others have what this one sends by then, so that each of them
                finds the same one gone.
        """
        waits: list[tuple[int, Any]] = []
        lost: list[tuple[int, Exception]] = []
        for start, tensors, side in ((dist.isend, sent, "group_dst"), (dist.irecv, received, "group_src")):
            for rank, tensor in tensors.items():
                try:
                    waits.append((rank, start(tensor, group=self._group, **{side: rank})))
                except RuntimeError as error:
                    lost.append((rank, error))
        for rank, work in waits:
            try:
                work.wait()
            except RuntimeError as error:
                lost.append((rank, error))
        if lost:
            gone, why = lost[0]
            raise DistributedError(
                f"rank {gone} does not answer ({str(why).partition(chr(10))[0]}): it was ended, or took longer than "
                "the group's timeout. No process keeps what was converted; with checkpoint=, the same call goes on "
                "from what rank 0 has finished"
            ) from why
