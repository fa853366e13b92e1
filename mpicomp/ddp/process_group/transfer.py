"""Tensors as flat arrays, and MPI's calls on them: in pieces (mpi.pieces), with a time limit each.

Collectives between pairs of ranks (all_gather, gather, scatter, all_to_all) are messages, whose
length is checked when they arrive; those that add use MPI's reductions.
"""

import numpy as np
import torch
import torch.distributed as dist

from mpicomp import mpi
from mpicomp.errors import MismatchError


def as_bytes(tensor, what):
    """uint8[bytes]: a copy of the tensor's elements in host memory, without gaps."""
    return _flat(tensor, what).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, "u1")


def from_bytes(array, tensor):
    """Fill the tensor from what `as_bytes` made of one of the same shape and dtype."""
    if tensor.numel():
        put(torch.from_numpy(array).view(tensor.dtype), tensor)


def room(tensor, what):
    """uint8[bytes], not initialised, of the size of such a tensor."""
    _strided(tensor, what)
    return np.empty(tensor.numel() * tensor.element_size(), np.uint8)


def as_numbers(tensor, what):
    """A flat copy of the tensor's elements, in a dtype that MPI can add.

    Floats of 16 bits and less become float32, to be rounded once, at the end; bool becomes int32.
    """
    flat, dtype = _flat(tensor, what), tensor.dtype
    if dtype == torch.bool:
        flat = flat.to(torch.int32)
    elif dtype.is_complex and dtype.itemsize < 8:
        flat = flat.to(torch.complex64)
    elif dtype.is_floating_point and dtype.itemsize < 4:
        flat = flat.to(torch.float32)
    return flat.numpy()


def put(flat, tensor):
    """Copy flat elements into a tensor of any device, dtype and strides."""
    with torch.no_grad():
        tensor.copy_(flat.view(tensor.shape))


def one_tensor(tensors):
    """The tensor of a message, for which torch gives a list of one."""
    tensor, = [tensors] if isinstance(tensors, torch.Tensor) else tensors
    return tensor


def _flat(tensor, what):
    tensor = _strided(tensor, what).detach().resolve_conj().resolve_neg()
    return tensor.to("cpu", copy=True).contiguous().reshape(-1)


def _strided(tensor, what):
    if tensor.layout != torch.strided:
        raise ValueError(f"{what}: found a tensor of layout {tensor.layout}, expected a dense one; "
                         "of sparse ones there is all_reduce with ReduceOp.SUM alone")
    return tensor


class Pending:
    """Requests of MPI that end together, for mpi.wait. A message of another length is an error."""

    def __init__(self, what, requests, lengths=None):
        """`lengths`: the bytes that each request receives; None where it is no message."""
        from mpi4py import MPI

        self._what, self._requests, self._lengths = what, requests, lengths
        self.statuses = [MPI.Status() for _ in requests]

    def Test(self):
        from mpi4py import MPI

        try:
            done = MPI.Request.Testall(self._requests, self.statuses)
        except MPI.Exception as error:
            if error.Get_error_class() not in (MPI.ERR_TRUNCATE, MPI.ERR_IN_STATUS):
                raise
            raise MismatchError(f"{self._what}: another rank sent more than there is room for "
                                "here: every rank must give tensors of the sizes that the others "
                                "expect") from error
        for status, length in zip(self.statuses, self._lengths or ()) if done else ():
            found = status.Get_count(MPI.BYTE)
            if length is not None and found != length:
                raise MismatchError(
                    f"{self._what}: rank {status.source} sent {found} bytes, expected {length}: "
                    "every rank must give tensors of the sizes that the others expect")
        return done


class Call:
    """One call of torch.distributed on a group: its name `what`, and its arguments besides data.

    given  a root, a ReduceOp, a timedelta or one of torch's option objects, in any order; becomes
           `root`, `op` and `timeout` (seconds), with torch's defaults
    """

    def __init__(self, group, what, given=()):
        self.group, self.comm, self.what = group, group.comm, what
        self.root, self.op, self.timeout = 0, dist.ReduceOp.SUM, group.timeout
        for value in given:
            self._take(value)

    def _take(self, value):
        if isinstance(value, (dist.ReduceOp, dist.ReduceOp.RedOpType)):
            self.op = value
        elif hasattr(value, "total_seconds"):
            if value.total_seconds() > 0:  # -1 ms is torch's "not given"
                self.timeout = value.total_seconds()
        elif isinstance(value, int):
            self.root = value
        elif value is not None:  # options
            for name in "rootRank", "reduceOp", "timeout":
                self._take(getattr(value, name, None))

    def wait(self, requests, lengths=None):
        pending = Pending(self.what, requests, lengths)
        self.group.wait_for_all(pending, self.what, self.timeout)

    # ---- what MPI does ----

    def broadcast(self, array):
        for part in mpi.pieces(array.size):
            self.wait([self.comm.Ibcast(array[part], self.root)])

    def exchange(self, outgoing, incoming):
        """Send {rank: array} and fill {rank: array}, both uint8; this rank's own is copied."""
        requests, lengths, me = [], [], self.comm.rank
        if me in outgoing and me in incoming:
            self._copy(outgoing[me], incoming[me])
        for rank, array in incoming.items():
            if rank != me:
                r, n = receives(self.comm, array, rank, tag_limit())
                requests, lengths = requests + r, lengths + n
        for rank, array in outgoing.items():
            if rank != me:
                requests += sends(self.comm, array, rank, tag_limit())
        self.wait(requests, lengths)

    def _copy(self, source, target):
        if source.size != target.size:
            raise MismatchError(f"{self.what}: rank {self.comm.rank} gives itself {source.size} "
                                f"bytes, and has room for {target.size}")
        target[:] = source

    def reduce(self, tensor, root=None):
        """The reduction over ranks, a flat tensor; with `root`, None on all other ranks."""
        operation, array = self._operation(tensor), as_numbers(tensor, self.what)
        total = np.empty_like(array) if root in (None, self.comm.rank) else None
        for part in mpi.pieces(array.size, array.itemsize):
            if root is None:
                request = self.comm.Iallreduce(array[part], total[part], operation)
            else:
                request = self.comm.Ireduce(array[part], None if total is None else total[part],
                                            operation, root)
            self.wait([request])
        if total is None:
            return None
        total = torch.from_numpy(total)
        if self.op == dist.ReduceOp.AVG:
            whole = not (total.is_floating_point() or total.is_complex())
            total = torch.div(total, self.comm.size, rounding_mode="trunc" if whole else None)
        return total

    def _operation(self, tensor):
        """MPI's operation for torch's; ValueError if there is none for such a tensor."""
        from mpi4py import MPI

        kinds, real = dist.ReduceOp, tensor.dtype.is_floating_point or tensor.dtype.is_complex
        for kind, there in ((kinds.SUM, MPI.SUM), (kinds.AVG, MPI.SUM), (kinds.MAX, MPI.MAX),
                            (kinds.MIN, MPI.MIN), (kinds.PRODUCT, MPI.PROD),
                            (kinds.BAND, MPI.BAND), (kinds.BOR, MPI.BOR), (kinds.BXOR, MPI.BXOR)):
            if self.op == kind:
                break
        else:
            raise ValueError(f"{self.what}: found {self.op}, MPI has SUM, AVG, MAX, MIN, PRODUCT, "
                             "BAND, BOR and BXOR")
        if (there in (MPI.BAND, MPI.BOR, MPI.BXOR) and real
                or there in (MPI.MAX, MPI.MIN) and tensor.dtype.is_complex):
            raise ValueError(f"{self.what}: MPI has no {kind} of {tensor.dtype}")
        return there


def tag_limit():
    """The largest tag that MPI has, used by this module; users' tags are smaller."""
    from mpi4py import MPI

    return MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)  # other communicators may not have it


def _message_pieces(array):
    """As mpi.pieces, but one for an empty array: that is a message, too."""
    return mpi.pieces(array.size) or [slice(0)]


def sends(comm, array, rank, tag):
    """Requests that send the array to a rank."""
    return [comm.Isend(array[part], rank, tag) for part in _message_pieces(array)]


def receives(comm, array, rank, tag):
    """(requests that fill the array, how many bytes each receives)."""
    parts = _message_pieces(array)
    return ([comm.Irecv(array[part], rank, tag) for part in parts],
            [array[part].size for part in parts])
