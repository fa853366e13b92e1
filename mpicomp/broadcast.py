"""Make every rank start from the same parameters and the same optimizer state."""

import numpy as np
import torch

from mpicomp import mpi
from mpicomp.agree import agree

PIECE = 1 << 30  # bytes of one call: MPI 3 counts to 2**31 - 1


def broadcast_parameters(module_or_state_dict, comm=None, root=0):
    """Give every rank the parameters and buffers of rank `root`, in place.

    Takes a torch.nn.Module, a state_dict, or (name, tensor) pairs. Raises MismatchError on every
    rank if names, shapes or dtypes differ.
    """
    source = module_or_state_dict
    if isinstance(source, torch.nn.Module):
        source = source.state_dict()
    named = [(k, v) for k, v in dict(source).items() if isinstance(v, torch.Tensor)]
    with _private(comm, "broadcasting parameters") as comm:
        lazy = [k for k, v in named if torch.nn.parameter.is_lazy(v)]
        agree(comm, {"problem": f"{lazy[0]!r} has no shape yet: run the model once on every rank, "
                                "then broadcast"} if lazy else
              {"tensor": [f"{k} {list(v.shape)} {v.dtype}" for k, v in named]},
              "every rank must build the same model")
        for _, tensor in named:
            _broadcast(tensor, comm, root)


def broadcast_optimizer_state(optimizer, comm=None, root=0):
    """Give every rank the optimizer state (momenta, step counts, learning rates) of rank `root`."""
    with _private(comm, "broadcasting an optimizer's state") as comm:
        mine = optimizer.state_dict()
        tensors = {}
        stripped = _strip(mine, tensors) if comm.rank == root else None
        told, shapes = mpi.bcast(comm, (stripped, [(t.shape, t.dtype) for t in tensors.values()]),
                                 "broadcasting an optimizer's state", root)
        received = list(tensors.values()) if comm.rank == root else [
            torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
        received = [_broadcast(t.clone(), comm, root) for t in received]
        if comm.rank != root:
            optimizer.load_state_dict(_fill(told, received))


class _private:
    """A duplicate communicator for the length of a `with` block."""

    def __init__(self, comm, what):
        self.comm = mpi.communicator(comm, what=what)

    def __enter__(self):
        return self.comm

    def __exit__(self, *_):
        mpi.release(self.comm)


def _broadcast(tensor, comm, root):
    """Overwrite `tensor` with root's, byte by byte, whatever its dtype and strides."""
    flat = tensor.detach().to("cpu", copy=True).contiguous().view(-1).view(torch.uint8).numpy() \
        if tensor.numel() else np.empty(0, np.uint8)
    for at in range(0, flat.size, PIECE):
        mpi.wait(comm, comm.Ibcast(flat[at:at + PIECE], root), mpi.limit(comm),
                 "broadcasting tensors")
    if tensor.numel():
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(flat).view(tensor.dtype).view(tensor.shape))
    return tensor


def _strip(value, tensors):
    """A copy of nested dicts and lists in which the n-th tensor is replaced by ("tensor", n)."""
    if isinstance(value, torch.Tensor):
        tensors[len(tensors)] = value.detach().cpu()
        return _Slot(len(tensors) - 1)
    if isinstance(value, dict):
        return {k: _strip(v, tensors) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_strip(v, tensors) for v in value)
    return value


def _fill(value, tensors):
    """The inverse of `_strip`."""
    if isinstance(value, _Slot):
        return tensors[value.number]
    if isinstance(value, dict):
        return {k: _fill(v, tensors) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_fill(v, tensors) for v in value)
    return value


class _Slot:
    """The place of a tensor that travels apart."""

    def __init__(self, number):
        self.number = number
