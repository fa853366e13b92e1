"""Point-to-point messages for asynchronous exchanges, in blocks of memory that are reused."""

from collections import defaultdict, deque

from mpicomp import mpi


class Message:
    """A message of `size` bytes; its block returns to the mailbox with the last `release`."""

    def __init__(self, mailbox, block, size):
        self._mailbox, self.block, self.size = mailbox, block, size
        self.holders = 1

    @property
    def data(self):
        """The bytes of the message, uint8[size]."""
        return self.block[:self.size]

    def hold(self):
        """Add a holder; returns the message."""
        self.holders += 1
        return self

    def release(self):
        """Remove a holder; the last one returns the block."""
        self.holders -= 1
        if not self.holders:
            self._mailbox.take_back(self.block)


class Mailbox:
    """Sends and receives messages on a communicator of its own; books bytes; never waits.

    Messages of one sender are delivered in the order in which they were sent, even if a large one
    is still arriving when a small one behind it is complete. Block sizes are powers of two, and
    blocks are kept, so that nothing is allocated after the first steps. Not thread-safe.
    """

    def __init__(self, calls, zeros):
        self.meter, self.rank, self._fits = calls.meter, calls.rank, calls.fits
        self.comm = mpi.part(calls.comm, "mailbox")
        self.others = [r for r in range(calls.size) if r != calls.rank]
        self.blocks = 0  # made so far
        self._zeros, self._free = zeros, defaultdict(list)
        self._leaving = []  # (request, message)
        self._arriving = [deque() for _ in range(calls.size)]  # (request, tag, message)

    def new_message(self, size) -> Message:
        """An empty message of `size` bytes. SpecError if MPI cannot count so many."""
        self._fits(size)
        room = 1 << max(6, (size - 1).bit_length())
        free = self._free[room]
        if not free:
            self.blocks += 1
            free.append(self._zeros(room, "uint8"))
        return Message(self, free.pop(), size)

    def take_back(self, block):
        """Keep a block that has no holder left for later messages."""
        self._free[block.size].append(block)

    def send(self, message, rank, tag):
        """Start sending. The bytes must not change until the message is released."""
        self.meter.count("Isend", message.size, 0)
        self._leaving.append((self.comm.Isend(message.data, rank, tag), message.hold()))

    def receive(self):
        """[(rank, tag, message)] of all that have arrived; the caller is their only holder."""
        from mpi4py import MPI

        self._sweep()
        status = MPI.Status()
        while matched := self.comm.Improbe(MPI.ANY_SOURCE, MPI.ANY_TAG, status):
            message = self.new_message(status.Get_count(MPI.BYTE))
            self._arriving[status.source].append(
                (matched.Irecv(message.data), status.tag, message))
        here = []
        for rank, queue in enumerate(self._arriving):
            while queue and queue[0][0].Test():
                _, tag, message = queue.popleft()
                self.meter.received += message.size
                here.append((rank, tag, message))
        return here

    def _sweep(self):
        """Release the messages whose sends have completed."""
        still = []
        for request, message in self._leaving:
            if request.Test():
                message.release()
            else:
                still.append((request, message))
        self._leaving = still

    @property
    def idle(self) -> bool:
        """Have all sends completed?"""
        return not self._leaving
