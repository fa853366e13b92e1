"""Makes a signal to one rank a decision of all ranks, in the same step."""

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
    """Tells all ranks, after the same step, that one of them was sent SIGTERM or SIGUSR1.

        signals = mpicomp.checkpoint.Signals(comm)
        for step in ...:
            signals.post()
            ...                                    # backward and optimizer.step()
            if signals.agreed():
                ...                                # checkpoint.save, leave the loop
        MPI.Finalize(); sys.exit(mpicomp.checkpoint.RESUME)

    `post` starts a MAX allreduce of 8 bytes that runs while the step is computed, so that `agreed`
    need not wait. Signals that come after `post` count in the next step. Once there was a signal,
    every later `agreed` returns it, since it is meant to end the loop. A second signal of the same
    kind, 5 seconds or more after the first, has the effect that it had before: it ends the process.
    So does the first one in a forked process, such as a data loader. Uses a duplicate of `comm`.
    """

    def __init__(self, comm: "MPI.Comm | None",
                 signals: Iterable[int] = (signal.SIGTERM, signal.SIGUSR1)) -> None:
        self.comm = mpi.communicator(comm, what="starting Signals")
        # None: a handler installed from C, which Python cannot restore
        self._before = {number: signal.signal(number, self._heard) or signal.SIG_DFL
                        for number in signals}
        self._process = os.getpid()
        self._mine, self._all = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self._seen, self._request, self._since = 0, None, {}

    def _heard(self, number, frame):
        if os.getpid() != self._process:    # a forked child, which its parent wants to end
            return self._as_before(number)
        self._seen = number
        if time.monotonic() - self._since.setdefault(number, time.monotonic()) >= SAME:
            self._as_before(number)

    def _as_before(self, number):
        signal.signal(number, self._before[number])
        signal.raise_signal(number)

    def post(self) -> None:
        """Start telling the other ranks which signal this rank has received. Collective."""
        from mpi4py import MPI

        self._mine[0] = self._seen
        self._request = self.comm.Iallreduce(self._mine, self._all, MPI.MAX)

    def agreed(self) -> int:
        """The signal that any rank had received when it posted, the same on all ranks, or 0."""
        if self._request is None:
            raise RuntimeError("agreed() without post(): call signals.post() before it in every "
                               "step, on all ranks")
        mpi.wait(self.comm, self._request, mpi.limit(self.comm), "agreeing on signals")
        return int(self._all[0])

    def move(self, comm: "MPI.Comm") -> "MPI.Comm":
        """Go on over a duplicate of another communicator, which is returned; keeps the signal."""
        self.comm, self._request = mpi.communicator(comm, what="moving Signals"), None
        return self.comm

    def close(self) -> None:
        """Restore the handlers that the signals had before."""
        for number, before in self._before.items():
            signal.signal(number, before)
        if self._request is None or self._request.Test():
            mpi.release(self.comm)
