"""A torch.distributed process group whose collectives are MPI's, for a torch built without MPI.

Stock wheels of torch have gloo, which needs an address and open ports, and no MPI. This one needs
neither: DistributedDataParallel, Lightning and Accelerate use it to compare and broadcast the
model's parameters and buffers, and for barriers; gradients go through mpicomp.ddp.comm_hook.
It has broadcast, all_reduce, all_gather (into a list or one tensor, and of objects) and
barrier, all of them blocking.
"""

import numpy as np
import torch
import torch.distributed as dist

from mpicomp import mpi
from mpicomp.errors import LaunchError

BACKEND = "mpicomp"
_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.bool: torch.uint8}
_lent = []  # communicator and timeout of the default group, for `_create`


def init_process_group(comm=None, timeout=600.0):
    """Make torch's default process group out of an MPI communicator (None: COMM_WORLD).

    In place of torch.distributed.init_process_group(...), before DistributedDataParallel. Rank
    and world size are those of `comm`, of which a duplicate is used. `timeout` is in seconds: a
    collective that waits longer raises StallError. Collective over `comm`.
    """
    if dist.is_initialized():
        raise LaunchError("init_process_group: torch's default process group exists already "
                          f"(backend {dist.get_backend()}); call this one first, or use that one")
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _create, extended_api=True,
                                      devices=["cpu", "cuda"])
    comm = mpi.communicator(comm, timeout, "making torch's process group")
    _lent[:] = comm, timeout
    dist.init_process_group(BACKEND, rank=comm.rank, world_size=comm.size, store=dist.HashStore())


def _create(options, _):
    """What torch calls for the default group, and on the members of dist.new_group(ranks)."""
    comm, timeout = _lent
    ranks = options.global_ranks_in_group
    if ranks:
        comm = mpi.subgroup(comm, list(ranks), timeout)
    return MpiGroup(comm, timeout)


class MpiGroup(dist.ProcessGroup):
    """See the module. Tensors on a GPU pass through host memory."""

    def __init__(self, comm, timeout):
        super().__init__(comm.rank, comm.size)
        self.comm, self.timeout = comm, timeout

    def getBackendName(self):
        return BACKEND

    def broadcast(self, tensors, opts):
        for tensor in tensors:
            array = _array(tensor).view(np.uint8)
            self._wait(self.comm.Ibcast(array, opts.rootRank), "broadcast")
            _put_back(array, tensor)
        return _Done(tensors)

    def allreduce(self, tensors, opts):
        op, weight = self._operation(opts.reduceOp)
        for tensor in tensors:
            wide = tensor.to(_WIDER.get(tensor.dtype, tensor.dtype))
            array = _array(wide)
            total = np.empty_like(array)
            self._wait(self.comm.Iallreduce(array, total, op), "all_reduce")
            result = torch.from_numpy(total).view(wide.shape)
            tensor.copy_(result if weight is None else result * weight)
        return _Done(tensors)

    def allgather(self, outputs, inputs, opts=None):
        for gathered, tensor in zip(outputs, inputs, strict=True):
            array = _array(tensor).view(np.uint8)
            everyone = np.empty((self.comm.size, array.size), np.uint8)
            self._wait(self.comm.Iallgather(array, everyone), "all_gather")
            for part, output in zip(everyone, gathered, strict=True):
                _put_back(part, output)
        return _Done(outputs)

    def _allgather_base(self, output, tensor, opts=None):
        self.allgather([list(output.view(self.comm.size, -1))], [tensor.reshape(-1)])
        return _Done([output])

    all_gather_single = _allgather_base  # its name from torch 2.13 on

    def barrier(self, opts=None):
        self._wait(self.comm.Ibarrier(), "barrier")
        return _Done([])

    def _wait(self, request, what):
        mpi.wait(self.comm, request, self.timeout, f"in torch.distributed's {what}")

    def _operation(self, op):
        """(MPI's operation, what to multiply the result by or None) for a ReduceOp."""
        from mpi4py import MPI

        kinds = dist.ReduceOp
        if op == kinds.AVG:
            return MPI.SUM, 1.0 / self.comm.size
        for kind, there in ((kinds.SUM, MPI.SUM), (kinds.MAX, MPI.MAX), (kinds.MIN, MPI.MIN),
                            (kinds.PRODUCT, MPI.PROD), (kinds.BAND, MPI.BAND),
                            (kinds.BOR, MPI.BOR), (kinds.BXOR, MPI.BXOR)):
            if op == kind:
                return there, None
        raise ValueError(f"all_reduce: found {op}, MPI has SUM, AVG, MAX, MIN, PRODUCT and bits")


class _Done(dist.Work):
    """The handle of a collective that is over."""

    def __init__(self, result):
        super().__init__()
        self._result, self._future = result, torch.futures.Future()
        self._future.set_result(result)

    def wait(self, timeout=None):
        return True

    def is_completed(self):
        return True

    def is_success(self):
        return True

    def result(self):
        return self._result

    def get_future(self):
        return self._future


def _array(tensor):
    """The tensor's elements as a flat array of its own, whatever its device and strides."""
    flat = tensor.detach().to("cpu", copy=True).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if tensor.dtype == torch.bfloat16 else flat.numpy()


def _put_back(array, tensor):
    """Bytes into the tensor."""
    if tensor.numel():
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(array).view(tensor.dtype).view(tensor.shape))
