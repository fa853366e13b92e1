"""MpiGroup: a process group's messages, barriers, parts and properties."""

from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from mpicomp import mpi
from mpicomp.ddp.process_group.collectives import Collectives
from mpicomp.ddp.process_group.transfer import Call, one_tensor, tag_limit
from mpicomp.ddp.process_group.watch import GroupDog
from mpicomp.ddp.process_group.work import Message
from mpicomp.errors import StallError

if TYPE_CHECKING:
    from mpi4py import MPI

BACKEND = "mpicomp"
_NOT_GIVEN = timedelta(minutes=30)  # torch's default for new_group


class MpiGroup(Collectives):
    """A torch.distributed process group over MPI. Tensors on a GPU pass through host memory.

    comm     a communicator that only this group uses
    timeout  seconds after which a wait raises StallError; a call may have its own
    """

    def __init__(self, comm: "MPI.Intracomm", timeout: float) -> None:
        super().__init__(comm.rank, comm.size)
        self.comm, self.timeout = comm, timeout
        self.open, self._name = set(), ""  # `open`: Messages under way
        self.dog = GroupDog(comm, tag_limit() - 1)

    def wait(self, request, what, timeout):
        mpi.wait(self.comm, request, timeout, f"in torch.distributed's {what}")

    def wait_for_all(self, request, what, timeout):
        """As `wait`, for a call of all ranks: MismatchError as soon as one of them has ended."""
        self.wait(_Watched(request, self.dog), what, timeout)

    @torch._disable_dynamo
    def monitored_barrier(self, timeout=None, wait_all_ranks=False):
        """A barrier whose StallError on rank 0 names all ranks that did not come."""
        self.meet("monitored_barrier", range(self.comm.size), timeout)

    def meet(self, what, ranks, timeout=None):
        """A barrier of these ranks of the group; StallError names those that did not come.

        The least of them waits for the others, which wait for its answer a second longer.
        """
        call, first, (here, there) = Call(self, what, (timeout,)), min(ranks), torch.zeros(2, 1)
        others = [rank for rank in ranks if rank != first]
        if self.comm.rank != first:
            self._exchange(call, {first: here}, {})
            call.timeout += 1
            return self._exchange(call, {}, {first: there})
        come = {rank: Message(self, what).receive(there, rank, tag_limit())
                for rank in others}
        try:
            self.wait(_All(come.values()), what, call.timeout)
        except StallError as error:
            absent = [rank for rank, message in come.items() if not message.over]
            raise StallError(f"rank {self.comm.rank} waited {call.timeout:g} s in torch."
                             f"distributed's {what} for {mpi.ranks_text(absent)}: ended, stopped, "
                             "or never came here") from error
        self._exchange(call, dict.fromkeys(others, here), {})

    # ---- messages ----

    @torch._disable_dynamo
    def send(self, tensors, dstRank, tag=0):
        tensor = one_tensor(tensors)
        return Message(self, f"send to rank {dstRank}").send(tensor, dstRank, self._tag(tag))

    @torch._disable_dynamo
    def recv(self, tensors, srcRank, tag=0):
        tensor = one_tensor(tensors)
        return Message(self, f"recv from rank {srcRank}").receive(tensor, srcRank, self._tag(tag))

    @torch._disable_dynamo
    def recv_anysource(self, tensors, tag=0):
        from mpi4py import MPI

        tensor = one_tensor(tensors)
        return Message(self, "recv").receive(tensor, MPI.ANY_SOURCE, self._tag(tag))

    def _tag(self, tag):
        most = tag_limit() - 2  # the others are this package's
        if not 0 <= tag <= most:
            raise ValueError(f"found tag {tag}, this MPI has tags from 0 to {most}")
        return tag

    # ---- what torch asks of a group ----

    def part(self, ranks, timeout):
        """A new group of these ranks of this one. Collective over them alone."""
        self.meet("new_group", ranks)
        comm = self.comm.Create_group(self.comm.group.Incl(ranks))
        return MpiGroup(comm, self.timeout if timeout == _NOT_GIVEN else timeout.total_seconds())

    def shutdown(self):
        """Part of dist.destroy_process_group()."""
        self.dog.end()

    abort = shutdown

    def set_timeout(self, timeout):
        self.timeout = timeout.total_seconds()

    def getBackendName(self):
        return BACKEND

    def setGroupName(self, name):
        self._name = name

    def getGroupName(self):
        return self._name


class _Watched:
    """A request whose wait ends at once with an error if a rank that it needs has ended."""

    def __init__(self, request, dog):
        self._request, self._dog = request, dog

    def Test(self):
        if self._request.Test():
            return True
        self._dog.check_left()
        return False


class _All:
    """Messages that must all end."""

    def __init__(self, messages):
        self._messages = list(messages)

    def Test(self):
        return all([message.Test() for message in self._messages])


def _absent(name, instead):
    def method(self, *_, **__):
        raise NotImplementedError(f"the process group {BACKEND!r} has no {name}: {instead}")
    method.__name__ = name
    return method


for _name, _instead in {
        "split_group": "type  dist.new_group(ranks)",
        "merge_remote_group": "ranks of MPI cannot join later",
        "_start_coalescing": "leave the device out of  _coalescing_manager(group)",
        "_end_coalescing": "leave the device out of  _coalescing_manager(group)"}.items():
    setattr(MpiGroup, _name, _absent(_name, _instead))
