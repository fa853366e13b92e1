"""Nonblocking MPI calls with byte counting; each stage has a communicator of its own."""

from typing import TYPE_CHECKING, Any

from mpicomp import mpi
from mpicomp.errors import SpecError
from mpicomp.transport import staging
from mpicomp.transport.meter import Meter

if TYPE_CHECKING:
    from mpi4py import MPI


class Calls:
    """Posts MPI calls, books their bytes in `meter`, and returns the requests.

    Collectives on one communicator must be posted in the same order on all ranks. But a bucket
    posts its second call when its first has completed, and that moment differs between ranks. So
    the k-th call of every bucket uses the k-th duplicate of the communicator (a stage), and on each
    duplicate buckets post in launch order (see pipeline.py).
    """

    def __init__(self, comm: "MPI.Intracomm", meter: Meter, within: bool = False) -> None:
        self.comm, self.meter, self.within = comm, meter, within
        self.size, self.rank = comm.size, comm.rank
        self.spread = not within and mpi.ranks_here(comm) < comm.size  # over several nodes
        self.most = mpi.largest()
        self._stages = []

    def open(self, stages: int) -> None:
        """Make sure that there are at least this many stages. Collective."""
        while len(self._stages) < stages:
            self._stages.append(mpi.part(self.comm, f"stage {len(self._stages)}"))

    @property
    def communicators(self) -> list["MPI.Intracomm"]:
        """All communicators that are used here; Recovery revokes them when a rank has died."""
        return mpi.family(self.comm)

    def fits(self, count: int, what: str = "bytes") -> None:
        """Raise SpecError if MPI cannot count `count` elements in one call."""
        if count > self.most:
            raise SpecError(
                f"a bucket needs an MPI call of {count:,} {what}, this MPI counts to "
                f"{self.most:,}: make bucket_bytes smaller. Where one parameter alone is so large "
                "take a method that sends less, or dense with exchange=allreduce, which counts "
                "floats, or an MPI with large counts (MPI 4, as MPICH 4 is)")

    def book(self, call: str, sent: int, received: int) -> None:
        """Count bytes under the name of an MPI call, or of what replaces that call."""
        self.meter.count(call, sent, received, self.within)

    def allgather(self, stage: int, send: Any, receive: Any) -> Any:
        """Gather every rank's `send` (equal lengths) into `receive`, in rank order; both uint8."""
        self.fits(send.size)
        self.book("Iallgather", send.nbytes, receive.nbytes - send.nbytes)
        return staging.call(self._stages[stage].Iallgather, send, send, receive)

    def allgatherv(self, stage: int, send: Any, receive: Any, lengths: list[int]) -> Any:
        """Gather every rank's `send`, of `lengths` bytes, into `receive`, in rank order."""
        self.fits(sum(lengths))
        self.book("Iallgatherv", send.nbytes, sum(lengths) - send.nbytes)
        return staging.call(self._stages[stage].Iallgatherv, send, send, [receive, lengths])

    def allreduce(self, stage: int, send: Any, receive: Any, op: "MPI.Op") -> Any:
        """Reduce every rank's `send` into `receive` on all ranks; `op` is MPI's."""
        self.book("Iallreduce", send.nbytes, receive.nbytes)
        return staging.call(self._stages[stage].Iallreduce, send, send, receive, op)

    def reduce(self, stage: int, send: Any, receive: Any) -> Any:
        """Sum every rank's `send` into rank 0's `receive` (None on the others)."""
        from mpi4py import MPI

        self.book("Ireduce", send.nbytes if self.rank else 0,
                         0 if self.rank else receive.nbytes)
        return self._stages[stage].Ireduce(send, receive, MPI.SUM, 0)

    def bcast(self, stage: int, buffer: Any) -> Any:
        """Copy rank 0's `buffer` into every rank's `buffer`."""
        self.book("Ibcast", 0 if self.rank else buffer.nbytes,
                         buffer.nbytes if self.rank else 0)
        return self._stages[stage].Ibcast(buffer, 0)

    def send(self, stage: int, array: Any, rank: int, tag: int = 0, booked: bool = True) -> Any:
        """Send `array` to one rank, which must `receive` it; messages keep their order."""
        if booked:
            self.book("Isend", array.nbytes, 0)
        return staging.call(self._stages[stage].Isend, array, array, rank, tag)

    def receive(self, stage: int, array: Any, rank: int, tag: int = 0, booked: bool = True) -> Any:
        """Receive what one rank sends into `array`, which must have the size of the message."""
        if booked:
            self.book("Isend", 0, array.nbytes)
        return staging.call(self._stages[stage].Irecv, None, array, rank, tag)

    def alltoallv(self, stage: int, send: tuple[Any, ...], receive: tuple[Any, ...]) -> Any:
        """Send one part of `send` to each rank and receive one part from each rank.

        Both are (uint8 array, lengths, starts), with one length and one start per rank.
        """
        self.book("Ialltoallv", sum(send[1]), sum(receive[1]))
        return staging.call(self._stages[stage].Ialltoallv, send[0], [send[0], send[1:]],
                            [receive[0], receive[1:]])
