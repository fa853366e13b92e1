"""A link: one communicator, and everything of an averager that belongs to it."""

import numpy as np

from mpicomp import catalogue, mpi
from mpicomp.errors import SpecError
from mpicomp.mpi.watchdog import Watchdog
from mpicomp.transport.calls import Calls
from mpicomp.transport.pipeline import Pipeline


class Link:
    """The exchange of a method over a communicator, the pipeline that moves it, and small sums.

    comm      a private duplicate
    exchange  of the method; `warm`: of the dense warm-up, None unless `dense`
    pipeline  moves the exchanges of all buckets on
    memory    where the buckets lie
    watchdog  answers to other ranks where this one is
    """

    def __init__(self, comm, method, settings, stats, memory, pipeline=None, dense=False):
        self.comm, self.method, self.stats, self.seed = comm, method, stats, settings.seed
        self.memory, self.watchdog = memory, None
        self.calls = Calls(comm, stats)
        self.pipeline = pipeline or Pipeline(comm, settings.stall_timeout, settings.progress,
                                             memory.again)
        self.exchange = self._open(method)
        self._dense = catalogue.method("dense") if dense else None
        self.warm = self._dense and self._open(self._dense)
        if self.exchange.asynchronous:
            self.pipeline.only_poll()

    def over(self, comm, settings):
        """A link of the same kind over other ranks. Collective over `comm`."""
        return Link(comm, self.method, settings, self.stats, self.memory, self.pipeline.over(comm),
                    dense=self.warm is not None)

    def watch(self, averager):
        """Answer to other ranks where this averager is, and hear which of them have ended."""
        self.watchdog = Watchdog(averager)

    def _open(self, method):
        exchange = method.open(self.calls)
        if refusal := exchange.check(method.compressor):
            mpi.release(self.comm)
            raise SpecError(refusal)
        return exchange

    def open(self, bucket, plan):
        """The exchange's codec for a bucket."""
        return self.exchange.open(self.method.compressor, bucket.layout, bucket.index,
                                  bucket.flight, plan, self.seed)

    def open_warm(self, bucket, plan):
        """The codec of the dense warm-up for a bucket, or None."""
        return self.warm and self.warm.open(self._dense.compressor, bucket.layout, bucket.index,
                                            bucket.flight, plan, self.seed)

    @property
    def timeout(self) -> float:
        """Seconds without progress after which a wait is a StallError."""
        return self.pipeline.timeout

    @property
    def communicators(self) -> list:
        """All that MPI is called on here, to revoke them where a rank has died."""
        found = [*mpi.family(self.comm), *self.calls.communicators, *self.exchange.communicators]
        if self.warm:
            found += self.warm.communicators
        return list({id(comm): comm for comm in found}.values())

    # ---- small collective calls, with the time limit ----

    def broadcast(self, array, what):
        """Rank 0's array in everybody's."""
        mpi.wait(self.comm, self.comm.Ibcast(array, 0), self.timeout, what)

    def sum(self, mine, reason, what):
        """The sum of all ranks' NumPy arrays, booked under `reason`."""
        from mpi4py import MPI

        total = np.zeros_like(mine)
        self.stats.reason = reason
        self.stats.count("Allreduce", mine.nbytes, mine.nbytes)
        mpi.wait(self.comm, self.comm.Iallreduce(mine, total, MPI.SUM), self.timeout, what)
        return total

    def gather(self, value, what):
        """The objects of all ranks, in rank order."""
        return mpi.allgather(self.comm, value, what, self.timeout)
