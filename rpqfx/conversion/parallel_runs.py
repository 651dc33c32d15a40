"""Several runs of a model side by side, which all stop where one of its weights is about to be used.

Each run has a thread, of which one runs at a time. A weight that is changed while all runs wait before it is what all
of them go on with, so the whole model is calibrated layer after layer, each on what the layers before it give, in one
forward pass of every batch, whatever the model's control flow is.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class _Abandoned(BaseException):
    """Raised in a waiting run that is not to go on."""


class _Run(threading.Thread):
    def __init__(self, number: int, job: Callable[[], Any]) -> None:
        super().__init__(daemon=True, name=f"rpqfx-run-{number}")
        self.number = number
        self.job = job
        self.go = threading.Semaphore(0)
        self.stopped = threading.Semaphore(0)
        self.waits: tuple[Hashable, Any] | None = None
        self.error: BaseException | None = None
        self.over = self.abandoned = False
        self._autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ({"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"})
        }

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.abandoned:
                for kind, (enabled, dtype) in self._autocast.items():  # a thread has none of its parent's
                    torch.set_autocast_enabled(kind, enabled)
                    torch.set_autocast_dtype(kind, dtype)
                with torch.no_grad():
                    self.job()
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.over = True
            self.stopped.release()

    def step(self) -> None:
        """Lets the run go on to its next stop, or its end."""
        self.waits = None
        self.go.release()
        self.stopped.acquire()
        if self.error is not None:
            raise RunError(self.number) from self.error


class RunError(Exception):
    """A run raised; the cause is what it raised.

    Args:
        number: Which run.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"run {number} failed")
        self.number = number


class Lockstep(Generic[T]):
    """Runs jobs side by side.

    Args:
        jobs: Callables to run, each in a thread of its own, one at a time.
    """

    def __init__(self, jobs: Sequence[Callable[[], Any]]) -> None:
        self._runs = [_Run(number, job) for number, job in enumerate(jobs)]

    def stop(self, key: Hashable, seen: T) -> None:
        """Called within a job: waits until the others are at a stop, too, and ``key`` was handled."""
        run = threading.current_thread()
        assert isinstance(run, _Run)
        run.waits = (key, seen)
        run.stopped.release()
        run.go.acquire()
        if run.abandoned:
            raise _Abandoned

    def run(
        self,
        handle: Callable[[Hashable, dict[int, T]], None],
        choose: Callable[[Collection[Hashable]], Hashable | None],
    ) -> None:
        """Runs all jobs to their end.

        Args:
            handle: Called when every job waits or is over, with the key that is chosen and what each of the jobs
                waiting for it has seen, by number; they then go on.
            choose: Chooses of the keys that jobs wait for the one that is handled next; or one that none of these jobs
                waits for, as where other processes have jobs that do. None ends all; of no keys it has to be chosen.

        Raises:
            RunError: If a job raised; no other goes on then.
        """
        try:
            for run in self._runs:
                run.start()
            for run in self._runs:
                run.step()
            while (key := choose((at := self._waiting()).keys())) is not None:
                here = at.get(key, [])
                handle(key, {run.number: run.waits[1] for run in here if run.waits is not None})
                for run in here:
                    run.step()
        finally:
            self.close()

    def _waiting(self) -> dict[Hashable, list[_Run]]:
        """Returns the runs that are not over, by the key that each waits for."""
        at: dict[Hashable, list[_Run]] = defaultdict(list)
        for run in self._runs:
            if not run.over:
                assert run.waits is not None
                at[run.waits[0]].append(run)
        return at

    def close(self) -> None:
        """Ends all runs, whether they are over or not; may be called again, where it was interrupted itself."""
        for run in self._runs:
            if not run.over:
                run.abandoned = True
                run.go.release()
        for run in self._runs:
            if run.ident is not None:  # it was started
                run.join()
            run.waits = None
