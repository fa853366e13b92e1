"""A signal to one rank becomes a decision of all ranks, in the same step."""

import os
import signal
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from mpicomp import mpi

if TYPE_CHECKING:
    from mpi4py import MPI

RESUME = os.EX_TEMPFAIL  # 75: "ended early and saved; start it again to go on"
SAME = 5.0  # seconds; Slurm ends a job with two SIGTERM: one to its steps, one through srun


class Signals:
    """SIGTERM and SIGUSR1 ask a training to save and end: all ranks do so after the same step.

        signals = mpicomp.checkpoint.Signals(comm)
        for step in ...:
            signals.post()
            ...                                    # backward and optimizer.step()
            if signals.agreed():
                ...                                # checkpoint.save, leave the loop
        MPI.Finalize(); sys.exit(mpicomp.checkpoint.RESUME)

    `post` starts a MAX over ranks of 8 bytes that travels while the step is computed, so that
    `agreed` finds it done. Signals that come after `post` count in the next step. From then on
    every `agreed` gives the signal: it is meant to be acted on once, by ending. A second signal of
    the same kind, after 5 seconds or more, does what it did before: it ends the process. So does
    the first in a process that was forked from this one, such as a loader of data. Uses a duplicate
    of `comm`.
    """

    def __init__(self, comm: "MPI.Comm | None",
                 signals: Iterable[int] = (signal.SIGTERM, signal.SIGUSR1)) -> None:
        self.comm = mpi.communicator(comm, what="starting Signals")
        # None: a handler of C's, which Python cannot put back
        self._before = {number: signal.signal(number, self._heard) or signal.SIG_DFL
                        for number in signals}
        self._process = os.getpid()
        self._mine, self._all = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self._seen, self._request, self._since = 0, None, {}

    def _heard(self, number, frame):
        if os.getpid() != self._process:    # a child of ours, whose parent wants it to end
            return self._as_before(number)
        self._seen = number
        if time.monotonic() - self._since.setdefault(number, time.monotonic()) >= SAME:
            self._as_before(number)

    def _as_before(self, number):
        signal.signal(number, self._before[number])
        signal.raise_signal(number)

    def post(self) -> None:
        """Tell the others what this rank has heard so far. Collective."""
        from mpi4py import MPI

        self._mine[0] = self._seen
        self._request = self.comm.Iallreduce(self._mine, self._all, MPI.MAX)

    def agreed(self) -> int:
        """The signal that any rank had heard when it posted, the same on all ranks, or 0."""
        if self._request is None:
            raise RuntimeError("agreed() without post(): call signals.post() before it in every "
                               "step, on all ranks")
        mpi.wait(self.comm, self._request, mpi.limit(self.comm), "agreeing on signals")
        return int(self._all[0])

    def move(self, comm: "MPI.Comm") -> "MPI.Comm":
        """Go on over another communicator, whose duplicate it returns; what was heard counts."""
        self.comm, self._request = mpi.communicator(comm, what="moving Signals"), None
        return self.comm

    def close(self) -> None:
        """Signals do again what they did before."""
        for number, before in self._before.items():
            signal.signal(number, before)
        if self._request is None or self._request.Test():
            mpi.release(self.comm)
