"""Make every rank start from the same parameters and the same optimizer state."""

import io
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from mpicomp import mpi
from mpicomp.errors import SpecError
from mpicomp.reducer.replicas import (
    as_bytes,
    compare,
    extra_entries,
    fingerprint,
    in_words,
    leaves,
    without_expanded,
)
from mpicomp.reducer.startup import stall_limit
from mpicomp.transport.agree import agree

if TYPE_CHECKING:
    from mpi4py import MPI

PIECE = 1 << 30  # bytes of one call: MPI 3 counts to 2**31 - 1
EXTRA = "_extra_state"  # what torch calls the entry of get_extra_state() in a state_dict


def broadcast_parameters(
        module_or_state_dict: torch.nn.Module | Mapping[str, Any]
        | Iterable[torch.Tensor | tuple[str, torch.Tensor]],
        comm: "MPI.Comm | None" = None, root: int = 0) -> None:
    """Give every rank the parameters and buffers of rank `root`, in place.

    Takes a torch.nn.Module, a state_dict, (name, tensor) pairs, or a list of tensors such as
    model.parameters(). For a module that is everything: all parameters, all buffers (persistent or
    not), other tensors that a state_dict() of its own returns, and extra state (get_extra_state,
    pickled).

    Raises the same MismatchError or SpecError on every rank if names, shapes or dtypes differ, if a
    tensor cannot be written to, and if entries that are not tensors differ: those are compared and
    not broadcast. StallError if a rank does not come within MPICOMP_STALL_TIMEOUT seconds (600).
    """
    source, timeout, extra = module_or_state_dict, stall_limit(), []
    with _private(comm, "broadcasting parameters") as comm:
        named, others, problem = [], [], None
        if not 0 <= root < comm.size:
            problem = f"root={root} found, expected a rank from 0 to {comm.size - 1}"
        try:
            extra = _with_extra_state(source)
            named, others = _content(source)
            blob = _pickled([part.get_extra_state() for _, part in extra], comm.rank == root,
                            "the model's extra state")
        except Exception as error:  # whatever it is, the others wait to hear of it
            problem = problem or in_words(error)
        for name, tensor in named:
            problem = problem or _impossible(name, tensor)
        facts = {"root": root, "extra state": [name for name, _ in extra],
                 "tensor": [] if problem else [_line(*pair) for pair in named]}
        agree(comm, facts | ({"problem": problem} if problem else {}),
              "every rank must build the same model", timeout)
        for name, tensor in named:
            problem = _broadcast(tensor, comm, root, timeout, name) or problem
        if extra:
            states = _unpickled(_tell(comm, blob, root, timeout))
            for (name, part), state in zip(extra, states, strict=True):
                if comm.rank != root:
                    problem = _try(f"extra state of {name!r}, by set_extra_state()",
                                   lambda: part.set_extra_state(state)) or problem

        def afterwards():
            if problem:
                raise SpecError(problem)
            if others and isinstance(source, torch.nn.Module):
                return [("state", name, fingerprint(leaf)) for name, leaf in _besides(source)]
            return [("entry", name, fingerprint(leaf)) for name, leaf in others]

        compare(comm, afterwards, timeout)


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, comm: "MPI.Comm | None" = None,
                              root: int = 0) -> None:
    """Give every rank the optimizer state (momenta, step counts, learning rates) of rank `root`.

    Raises MismatchError on every rank if classes, groups or the parameters in them differ, or one
    cannot load the state; StallError as `broadcast_parameters`.
    """
    timeout = stall_limit()
    with _private(comm, "broadcasting an optimizer's state") as comm:
        tensors, problem = {}, None
        try:
            groups = [f"group {i} with parameters of shapes {[list(p.shape) for p in g['params']]}"
                      for i, g in enumerate(optimizer.param_groups)]
            told = _strip(optimizer.state_dict(), tensors)
            kinds = [(t.shape, t.dtype) for t in tensors.values()]
            blob = _pickled((told, kinds), comm.rank == root, "the optimizer's state")
        except Exception as error:  # whatever it is, the others wait to hear of it
            groups, problem = [], in_words(error)
        agree(comm, {"optimizer": type(optimizer).__name__, "root": root,
                     "number of param_groups": len(groups), "parameters of": groups}
              | ({"problem": problem} if problem else {}),
              "every rank must build the same optimizer", timeout)
        told, kinds = _unpickled(_tell(comm, blob, root, timeout))
        mine = list(tensors.values()) if comm.rank == root else [
            torch.empty(shape, dtype=dtype) for shape, dtype in kinds]
        for tensor in mine:
            problem = _broadcast(tensor, comm, root, timeout, "optimizer state") or problem
        if comm.rank != root:
            problem = problem or _try("optimizer state, by load_state_dict()",
                                      lambda: optimizer.load_state_dict(_fill(told, mine)))
        agree(comm, {"problem": problem} if problem else {}, timeout=timeout)


class _private:
    """A duplicate communicator for the length of a `with` block."""

    def __init__(self, comm, what):
        self.comm = mpi.communicator(comm, what=what)

    def __enter__(self):
        return self.comm

    def __exit__(self, *_):
        mpi.release(self.comm)


# ---- what is given


def _content(source):
    """(tensors to broadcast, entries to compare afterwards), both as (name, value) pairs."""
    if isinstance(source, torch.nn.Module):
        named = [*source.named_parameters(), *source.named_buffers()]
        if any(_impossible(*pair) for pair in named):
            return named, []
        others = _besides(source)
        return named + [pair for pair in others if isinstance(pair[1], torch.Tensor)], others
    kind = type(source).__name__
    if isinstance(source, torch.optim.Optimizer):
        raise SpecError(f"{kind} found, expected a model: type  "
                       "mpicomp.broadcast_optimizer_state(optimizer)  for an optimizer")
    if isinstance(source, Mapping):
        pairs = list(leaves(source))
    elif isinstance(source, torch.Tensor) or not hasattr(source, "__iter__"):
        raise SpecError(f"{kind} found, expected a model, a state_dict, (name, tensor) pairs or a "
                       "list of tensors: type  mpicomp.broadcast_parameters(model)")
    else:
        pairs = _pairs(list(source))
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SpecError(f"two tensors are called {twice!r}: give each a name of its own")
    named = [pair for pair in pairs if isinstance(pair[1], torch.Tensor)]
    return named, [pair for pair in pairs if not isinstance(pair[1], torch.Tensor)]


def _pairs(items):
    """(name, value) of a list of tensors, which are numbered, or of pairs."""
    if all(isinstance(item, torch.Tensor) for item in items):
        return [(str(number), tensor) for number, tensor in enumerate(items)]
    for item in items:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise SpecError(f"a list that holds a {type(item).__name__} found, expected (name, "
                           "tensor) pairs or tensors only: pass model.named_parameters(), or "
                           "several modules as torch.nn.ModuleList(modules)")
    return [pair for name, value in items for pair in leaves(value, name)]


def _besides(module):
    """What only the module's own state_dict() returns, without extra state (sent by itself)."""
    return [pair for pair in extra_entries(module) if EXTRA not in pair[0].split(".")]


def _with_extra_state(source):
    """(name, module) of all parts that keep extra state."""
    if not isinstance(source, torch.nn.Module):
        return []
    return [(name or "the model", part) for name, part in source.named_modules()
            if type(part).get_extra_state is not torch.nn.Module.get_extra_state]


def _impossible(name, tensor):
    """Why this tensor cannot be broadcast, in words, or None."""
    if is_lazy(tensor):
        return f"{name!r} has no shape yet: run the model once on every rank, then broadcast"
    if tensor.is_meta:
        return (f"{name!r} is on the meta device and has no values: type  "
                "model.to_empty(device='cpu')  on every rank first")
    if tensor.layout not in (torch.strided, torch.sparse_coo):
        return (f"{name!r} has the layout {tensor.layout}, which cannot be broadcast in place: "
                "keep it as to_sparse_coo() or dense")
    return None


def _line(name, tensor):
    """What must be the same on all ranks of a tensor."""
    line = f"{name} {list(tensor.shape)} {tensor.dtype}"
    if tensor.layout is not torch.strided:
        return f"{line} {tensor.layout}"
    shape = list(without_expanded(tensor).shape)
    return line if shape == list(tensor.shape) else f"{line} expanded from {shape}"


# ---- how it travels


def _broadcast(tensor, comm, root, timeout, name):
    """Overwrite `tensor` with root's, byte by byte; returns what torch has against it, or None."""
    if not tensor.numel():
        return None
    if tensor.layout is not torch.strided or tensor.is_quantized:
        theirs = _unpickled(_tell(comm, _pickled(tensor, comm.rank == root, name), root, timeout))
        target = tensor  # a detached one would keep what it gets to itself
    else:
        flat = as_bytes(tensor)
        flat = flat.numpy() if comm.rank == root else np.empty(flat.numel(), np.uint8)
        _move(comm, flat, root, timeout)
        target = without_expanded(tensor)
        theirs = torch.from_numpy(flat).view(tensor.dtype).view(target.shape)
    if comm.rank == root:
        return None
    return _try(repr(name), lambda: target.copy_(theirs))


def _try(what, work):
    """What went wrong in work(), in words, or None."""
    try:
        with torch.no_grad():
            work()
    except Exception as error:  # the others learn of it at the end
        return f"{what} could not be written ({type(error).__name__}: {error})"


def _move(comm, array, root, timeout):
    """Bcast of bytes that waits for a time only."""
    for at in range(0, array.size, PIECE):
        mpi.wait(comm, comm.Ibcast(array[at:at + PIECE], root), timeout, "broadcasting parameters")


def _tell(comm, blob, root, timeout):
    """The bytes `blob` of root, whose length only root knows."""
    size = np.array([len(blob)])
    _move(comm, size.view(np.uint8), root, timeout)
    array = np.frombuffer(blob, np.uint8) if comm.rank == root else np.empty(size[0], np.uint8)
    _move(comm, array, root, timeout)
    return array.tobytes()


def _pickled(value, here, what):
    """Bytes of a value, where they are wanted."""
    buffer = io.BytesIO()
    if here:
        try:
            torch.save(value, buffer)
        except Exception as error:
            raise SpecError(f"{what} cannot be pickled ({error})") from error
    return buffer.getvalue()


def _unpickled(blob):
    return torch.load(io.BytesIO(blob), map_location="cpu", weights_only=False)


def _strip(value, tensors):
    """A copy of nested dicts and lists in which the n-th tensor is replaced by ("tensor", n)."""
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        tensors[len(tensors)] = value.detach().cpu().contiguous()
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
