"""Nonblocking MPI calls that are counted, each stage on a communicator of its own."""

from mpicomp import mpi
from mpicomp.errors import SpecError
from mpicomp.transport import staging


class Wire:
    """Posts collectives and books their bytes.

    Collectives on one communicator must be posted in the same order on all ranks, but a bucket's
    second call goes out when its first has arrived, which happens at other times on other ranks.
    So the k-th call of every bucket has the k-th duplicate of the communicator to itself, and on
    each of them buckets go in plan order (see pipeline.py).
    """

    def __init__(self, comm, meter, within=False):
        self.comm, self.meter, self.within = comm, meter, within
        self.size, self.rank = comm.size, comm.rank
        self.spread = not within and mpi.ranks_here(comm) < comm.size  # over several nodes
        self.most = mpi.largest()
        self._stages = []

    def open(self, stages):
        """Have at least this many stages. Collective: call it when all ranks do."""
        while len(self._stages) < stages:
            self._stages.append(mpi.part(self.comm, f"stage {len(self._stages)}"))

    @property
    def communicators(self) -> list:
        """All that are used here, to revoke them where a rank has died."""
        return mpi.family(self.comm)

    def fits(self, count, what="bytes"):
        """Raise SpecError where MPI cannot count so many elements in one call."""
        if count > self.most:
            raise SpecError(
                f"a bucket needs an MPI call of {count:,} {what}, this MPI counts to "
                f"{self.most:,}: make bucket_bytes smaller. Where one parameter alone is so large "
                "take a method that sends less, or dense with exchange=allreduce, which counts "
                "floats, or an MPI with large counts (MPI 4, as MPICH 4 is)")

    def book(self, call, sent, received):
        """Count bytes; `call` is one of MPI's, or says what stands for it."""
        self.meter.count(call, sent, received, self.within)

    def allgather(self, stage, send, receive):
        """Every rank's `send` (equal lengths) side by side in `receive`; both uint8."""
        self.fits(send.size)
        self.book("Iallgather", send.nbytes, receive.nbytes - send.nbytes)
        return staging.call(self._stages[stage].Iallgather, send, send, receive)

    def allgatherv(self, stage, send, receive, lengths):
        """Every rank's `send`, of the given lengths in bytes, side by side in `receive`."""
        self.fits(sum(lengths))
        self.book("Iallgatherv", send.nbytes, sum(lengths) - send.nbytes)
        return staging.call(self._stages[stage].Iallgatherv, send, send, [receive, lengths])

    def allreduce(self, stage, send, receive, op):
        """The sum or maximum of every rank's `send` in `receive`."""
        self.book("Iallreduce", send.nbytes, receive.nbytes)
        return staging.call(self._stages[stage].Iallreduce, send, send, receive, op)

    def reduce(self, stage, send, receive):
        """The sum of every rank's `send` in rank 0's `receive` (None elsewhere)."""
        from mpi4py import MPI

        self.book("Ireduce", send.nbytes if self.rank else 0,
                         0 if self.rank else receive.nbytes)
        return self._stages[stage].Ireduce(send, receive, MPI.SUM, 0)

    def bcast(self, stage, buffer):
        """Rank 0's `buffer` in everybody's."""
        self.book("Ibcast", 0 if self.rank else buffer.nbytes,
                         buffer.nbytes if self.rank else 0)
        return self._stages[stage].Ibcast(buffer, 0)

    def send(self, stage, array, rank, tag=0, booked=True):
        """`array` to one rank, which must `receive` it; messages keep their order."""
        if booked:
            self.book("Isend", array.nbytes, 0)
        return staging.call(self._stages[stage].Isend, array, array, rank, tag)

    def receive(self, stage, array, rank, tag=0, booked=True):
        """What one rank sends, into `array`, which must have its size."""
        if booked:
            self.book("Isend", 0, array.nbytes)
        return staging.call(self._stages[stage].Irecv, None, array, rank, tag)

    def alltoallv(self, stage, send, receive):
        """`send` and `receive` are (uint8 array, lengths, starts), one length and start a rank."""
        self.book("Ialltoallv", sum(send[1]), sum(receive[1]))
        return staging.call(self._stages[stage].Ialltoallv, send[0], [send[0], send[1:]],
                            [receive[0], receive[1:]])
