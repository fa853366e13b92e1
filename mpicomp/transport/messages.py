"""Point-to-point messages: sent without waiting, taken in as they arrive, memory used again."""

from collections import defaultdict, deque

from mpicomp import mpi


class Parcel:
    """A message of `size` bytes in a block of memory that goes back when nobody holds it."""

    def __init__(self, post, block, size):
        self._post, self.block, self.size = post, block, size
        self.holders = 1

    @property
    def data(self):
        """The bytes of the message, uint8[size]."""
        return self.block[:self.size]

    def hold(self):
        """One holder more."""
        self.holders += 1
        return self

    def release(self):
        """One holder less; the last one gives the memory back."""
        self.holders -= 1
        if not self.holders:
            self._post.take_back(self.block)


class Post:
    """Sends and receives on a communicator of its own; books bytes; never waits.

    Messages of one sender are handed out in the order in which they were sent, also where a large
    one is still on its way when a small one behind it is here. Blocks are powers of two, kept for
    the next message: after the first steps nothing is allocated. Not safe for threads.
    """

    def __init__(self, wire, zeros):
        self.meter, self.rank, self._fits = wire.meter, wire.rank, wire.fits
        self.comm = mpi.part(wire.comm, "post")
        self.others = [r for r in range(wire.size) if r != wire.rank]
        self.blocks = 0  # made so far
        self._zeros, self._free = zeros, defaultdict(list)
        self._leaving = []  # (request, parcel)
        self._arriving = [deque() for _ in range(wire.size)]  # (request, tag, parcel)

    def parcel(self, size) -> Parcel:
        """Room for a message of so many bytes."""
        self._fits(size)
        room = 1 << max(6, (size - 1).bit_length())
        free = self._free[room]
        if not free:
            self.blocks += 1
            free.append(self._zeros(room, "uint8"))
        return Parcel(self, free.pop(), size)

    def take_back(self, block):
        """A block that nobody holds any more."""
        self._free[block.size].append(block)

    def send(self, parcel, rank, tag):
        """Post a parcel to a rank. Its bytes must stay as they are until it is released."""
        self.meter.count("Isend", parcel.size, 0)
        self._leaving.append((self.comm.Isend(parcel.data, rank, tag), parcel.hold()))

    def receive(self):
        """[(rank, tag, parcel)] of what has arrived; the receiver is its one holder."""
        from mpi4py import MPI

        self._sweep()
        status = MPI.Status()
        while message := self.comm.Improbe(MPI.ANY_SOURCE, MPI.ANY_TAG, status):
            parcel = self.parcel(status.Get_count(MPI.BYTE))
            self._arriving[status.source].append(
                (message.Irecv(parcel.data), status.tag, parcel))
        here = []
        for rank, queue in enumerate(self._arriving):
            while queue and queue[0][0].Test():
                _, tag, parcel = queue.popleft()
                self.meter.received += parcel.size
                here.append((rank, tag, parcel))
        return here

    def _sweep(self):
        """Let go of what has left."""
        still = []
        for request, parcel in self._leaving:
            if request.Test():
                parcel.release()
            else:
                still.append((request, parcel))
        self._leaving = still

    @property
    def idle(self) -> bool:
        """Has everything that was sent left?"""
        return not self._leaving
