"""The handles that a group's calls return: `done` for a collective, a Message for send and recv."""

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future

from mpicomp.ddp.process_group.transfer import Pending, as_bytes, from_bytes, receives, room, sends
from mpicomp.mpi import waiting


def done(result):
    """The handle of a finished collective, with its result.

    It is an object of torch's own: DDP.join keeps handles in C++, and would wait for ever for a
    Python object that has been collected.
    """
    future = torch.futures.Future()
    future.set_result(result)
    return _create_work_from_future(future)


class Message(dist.Work):
    """A message under way, which the group keeps alive until it is over: MPI uses its memory.

    The tensor is filled when `wait` has returned, or `is_completed` has returned True.
    """

    def __init__(self, group, what):
        super().__init__()
        self._group, self._what, self._error = group, what, None
        self._tensor, self._rest, self._source = None, (), -1
        self.over = False

    def send(self, tensor, rank, tag):
        array = as_bytes(tensor, self._what)
        self._pending = Pending(self._what, sends(self._group.comm, array, rank, tag))
        self._group.open.add(self)
        return self

    def receive(self, tensor, rank, tag):
        """From any rank with MPI.ANY_SOURCE: the other pieces then follow from the first's."""
        from mpi4py import MPI

        self._tensor, self._array, first = tensor, room(tensor, self._what), None
        if rank == MPI.ANY_SOURCE:
            first = waiting.PIECE
            self._rest = self._array[first:]
        self._source, self._tag = rank, tag
        self._expect(self._array[:first])
        self._group.open.add(self)
        return self

    def _expect(self, array):
        self._pending = Pending(self._what, *receives(self._group.comm, array, self._source,
                                                      self._tag))

    def Test(self):
        """Is it over? The tensor is then filled. (For mpi.wait.)"""
        if self._error is not None:
            raise self._error
        if self.over:
            return True
        try:
            if not self._pending.Test():
                return False
        except Exception as error:
            self._error = error
            self._group.open.discard(self)
            raise
        self._source = self._pending.statuses[0].source
        if len(self._rest):
            rest, self._rest = self._rest, ()
            self._expect(rest)
            return self.Test()
        self.over = True
        self._group.open.discard(self)
        if self._tensor is not None:
            from_bytes(self._array, self._tensor)
        return True

    # ---- as of torch's Work ----

    def wait(self, timeout=None):
        if not self.over:
            seconds = timeout.total_seconds() if timeout else 0
            self._group.wait(self, self._what, seconds if seconds > 0 else self._group.timeout)
        return True

    def is_completed(self):
        return self.Test()

    def is_success(self):
        return self.over

    def exception(self):
        return self._error

    def result(self):
        return [] if self._tensor is None else [self._tensor]

    def source_rank(self):
        return self._source

    _source_rank = source_rank
