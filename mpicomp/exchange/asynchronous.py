"""What the asynchronous exchanges share: point-to-point messages, each checked when it arrives."""

import threading
from time import perf_counter, sleep

import numpy as np

from mpicomp.errors import MismatchError, PacketError, StallError
from mpicomp.exchange.base import Exchange
from mpicomp.mpi import ranks_text
from mpicomp.transport import packet
from mpicomp.transport.messages import Mailbox
from mpicomp.transport.packet import Header


class PendingRanks:
    """Has the `Test` of an MPI request: done when no rank is missing any more."""

    def __init__(self, poll, missing):
        self._poll, self._missing = poll, missing

    def Test(self) -> bool:
        """Take in what has arrived; is it enough?"""
        self._poll()
        return not self._missing()

    def waits_for(self) -> str:
        """The ranks that are missing, in words."""
        return ranks_text(self._missing())


class Asynchronous(Exchange):
    """A step makes no collective call, and replicas differ between steps.

    Every message has a header that is checked when it arrives. `settle` ends a run of steps: all
    that any rank has sent is then received. `settled` says whether that is so.

    A packet counts as applied as soon as it is sent, so a step cannot be taken back, and its bucket
    needs no commit.
    """

    asynchronous = True
    lacks = {"delay": "gradients are late anyhow", "sparse": "ranks do not meet in a step"}
    stages = 0

    def __post_init__(self, wire):
        super().__post_init__(wire)
        self.post = Mailbox(wire, np.zeros)
        self.lock = threading.RLock()
        self.settled, self.plan = True, None
        self._base, self._next, self._last = 0, {}, {}
        self._problem, self._marked = None, False

    @property
    def communicators(self):
        return [*self.wire.communicators, self.post.comm]

    def restart(self, step):
        """Expect the next message of every rank to be of this step."""
        self._base = step
        self._next.clear()

    def awaited(self, rank, tag) -> int:
        """The step of the next message of this rank with this tag: one more than the last."""
        return self._next.get((rank, tag), self._base)

    def bucket_of(self, tag) -> int:
        """The bucket that a message with this tag belongs to."""
        return tag

    def take(self, rank, tag, header, parcel) -> None:
        """Handle a message whose header is right; release the parcel when it is used up."""
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
                self._problem = problem  # maybe in a thread: the next caller raises it
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
        """Wait until all ranks have received all that any has sent. Collective.

        Returns the largest step of all ranks, from which all go on. StallError after `timeout`
        seconds in which no rank has come closer.
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
        """Send all others the last message of this run of steps."""
        with self.lock:
            marker = self.post.new_message(packet.SIZE)
            Header(step, 0, self.plan, 0, packet.LAST).write(marker.data)
            for rank in self.post.others:
                self.post.send(marker, rank, 0)
            marker.release()
            self._marked = True

    @property
    def gone(self):
        """The ranks that have sent their last message: none is to be waited for."""
        return self._last

    def _wait(self, missing, timeout, poll):
        """Poll until no rank is missing; StallError after `timeout` seconds without a change."""
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
