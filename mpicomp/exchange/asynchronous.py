"""What the asynchronous exchanges share: messages checked one by one, and an end to them."""

import threading
from time import perf_counter, sleep

import numpy as np

from mpicomp.errors import MismatchError, PacketError, StallError
from mpicomp.exchange.base import Exchange
from mpicomp.mpi import ranks_text
from mpicomp.transport import packet
from mpicomp.transport.messages import Mailbox
from mpicomp.transport.packet import Header


class Promise:
    """Looks like an MPI request to whoever waits: done when no rank is missing any more."""

    def __init__(self, poll, missing):
        self._poll, self._missing = poll, missing

    def Test(self) -> bool:
        """Take in what has arrived; is it enough?"""
        self._poll()
        return not self._missing()

    def waits_for(self) -> str:
        """Whom, in words."""
        return ranks_text(self._missing())


class Asynchronous(Exchange):
    """Ranks go their own ways: a step has no collective, and replicas are not the same.

    Every message has a header that is checked when it arrives. `settle` is the end of a stretch of
    steps: then everything that any rank sent has been received. `settled` says whether that is so.
    """

    asynchronous = True
    stages = 0

    def __init__(self, wire):
        super().__init__(wire)
        self.post = Mailbox(wire, np.zeros)
        self.lock = threading.RLock()
        self.settled, self.plan = True, None
        self._base, self._next, self._last = 0, {}, {}
        self._problem, self._marked = None, False

    @property
    def communicators(self):
        return [*self.wire.communicators, self.post.comm]

    def restart(self, step):
        """The next message of every rank will be of this step."""
        self._base = step
        self._next.clear()

    def awaited(self, rank, tag) -> int:
        """The step of the next message of this rank with this tag: one more than the last."""
        return self._next.get((rank, tag), self._base)

    def bucket_of(self, tag) -> int:
        """The bucket that a message with this tag is about."""
        return tag

    def take(self, rank, tag, header, parcel) -> None:
        """Receive a message that was found right; release the parcel some time."""
        raise NotImplementedError

    def poll(self):
        """Take in what has arrived. MismatchError or PacketError names who sent what is wrong."""
        with self.lock:
            if self._problem:
                raise self._problem
            try:
                for rank, tag, parcel in self.post.receive():
                    header = self._read(rank, tag, parcel)
                    if header.flags & packet.LAST:
                        self._last[rank] = header.step
                        parcel.release()
                    else:
                        self.take(rank, tag, header, parcel)
            except Exception as problem:
                self._problem = problem  # a thread may have met it: the next to come raises it
                raise

    def _read(self, rank, tag, parcel) -> Header:
        """The header of a message, which must be the next one of this rank."""
        try:
            header = Header.read(parcel.data)
        except PacketError as problem:
            raise PacketError(f"rank {rank}: {problem}") from None
        last = header.flags & packet.LAST
        expected = [("plan digest", header.plan, self.plan),
                    ("bucket", header.bucket, 0 if last else self.bucket_of(tag)),
                    ("step", header.step, header.step if last else self.awaited(rank, tag)),
                    ("length", header.length, parcel.size - packet.SIZE)]
        for what, found, right in expected:
            if found != right:
                raise MismatchError(
                    f"rank {rank} sent {what} {found} to rank {self.wire.rank}, {right} expected "
                    f"(step {header.step}, bucket {header.bucket} there): every rank must go on "
                    "from the same step with the same model and method")
        if not last:
            self._next[rank, tag] = header.step + 1
        return header

    def settle(self, step, timeout) -> int:
        """Return when all that any rank has sent was received by all. Collective.

        Returns the largest step of all ranks, from which all go on.
        """
        if not self._marked:  # it may have been interrupted by a StallError before
            self._mark(step)
        self._wait(lambda: [r for r in self.post.others if r not in self._last]
                   or ([] if self.post.idle else self.post.others), timeout, self.poll)
        self.rest()
        # Nobody sends anything new before all have read all that is old.
        barrier = self.post.comm.Ibarrier()
        self._wait(lambda: [] if barrier.Test() else self.post.others, timeout, lambda: None)
        step = max([step, *self._last.values()])
        self._last.clear()
        self.restart(step)
        self.settled, self._marked = True, False
        return step

    def _mark(self, step):
        """Tell all others that nothing more comes from this rank."""
        with self.lock:
            marker = self.post.new_message(packet.SIZE)
            Header(step, 0, self.plan, 0, packet.LAST).write(marker.data)
            for rank in self.post.others:
                self.post.send(marker, rank, 0)
            marker.release()
            self._marked = True

    @property
    def gone(self):
        """The ranks that have sent their last message: nobody waits for them."""
        return self._last

    def _wait(self, missing, timeout, poll):
        """Until no rank is missing; StallError after `timeout` seconds without one less."""
        quiet, pause, before = perf_counter(), 0.0, None
        while True:
            poll()
            now = missing()
            if not now:
                return
            if now != before:
                quiet, pause, before = perf_counter(), 0.0, now
            elif perf_counter() - quiet > timeout:
                raise StallError(f"rank {self.wire.rank} waited {timeout:g} s in deliver() for "
                                 f"{ranks_text(now)}: deliver() and flush() must be called on all "
                                 "ranks, and before a rank ends")
            sleep(pause)
            pause = min(pause + 2e-5, 1e-3)
