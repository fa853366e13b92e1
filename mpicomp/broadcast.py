"""broadcast_parameters and broadcast_optimizer_state: every rank starts from rank root's values."""

import io
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
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
from mpicomp.transport.agree import agree

if TYPE_CHECKING:
    from mpi4py import MPI

EXTRA = "_extra_state"  # torch's key in a state_dict for what get_extra_state() returned
WHAT = "broadcasting parameters"  # for errors of waits


def broadcast_parameters(
        module_or_state_dict: torch.nn.Module | Mapping[str, Any]
        | Iterable[torch.Tensor | tuple[str, torch.Tensor]],
        comm: "MPI.Comm | None" = None, root: int = 0) -> None:
    """Give every rank the parameters and buffers of rank `root`, in place.

    Takes a torch.nn.Module, a state_dict, (name, tensor) pairs, or a list of tensors such as
    model.parameters(). Of a module it broadcasts all parameters, all buffers (persistent or not),
    other tensors that its own state_dict() returns, and extra state (get_extra_state, pickled).

    Raises the same MismatchError or SpecError on every rank if names, shapes or dtypes differ, if a
    tensor cannot be written to, or if entries that are not tensors differ: those are compared, not
    broadcast. StallError if a rank does not come within MPICOMP_STALL_TIMEOUT seconds (600).
    """
    source, extra = module_or_state_dict, []
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
              "every rank must build the same model")
        for name, tensor in named:
            problem = _broadcast(tensor, comm, root, name) or problem
        if extra:
            problem = _broadcast_extra_state(extra, blob, comm, root) or problem

        def afterwards():
            if problem:
                raise SpecError(problem)
            if others and isinstance(source, torch.nn.Module):
                return [("state", name, fingerprint(leaf)) for name, leaf in _besides(source)]
            return [("entry", name, fingerprint(leaf)) for name, leaf in others]

        compare(comm, afterwards, mpi.limit(comm))


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, comm: "MPI.Comm | None" = None,
                              root: int = 0) -> None:
    """Give every rank the optimizer state (momenta, step counts, learning rates) of rank `root`.

    Raises MismatchError on every rank if classes, groups or their parameters differ, or if a rank
    cannot load the state; StallError as `broadcast_parameters`.
    """
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
              "every rank must build the same optimizer")
        told, kinds = _unpickled(mpi.bcast_bytes(comm, blob, WHAT, root))
        mine = list(tensors.values()) if comm.rank == root else [
            torch.empty(shape, dtype=dtype) for shape, dtype in kinds]
        for tensor in mine:
            problem = _broadcast(tensor, comm, root, "optimizer state") or problem
        if comm.rank != root:
            problem = problem or _try("optimizer state, by load_state_dict()",
                                      lambda: optimizer.load_state_dict(_fill(told, mine)))
        agree(comm, {"problem": problem} if problem else {})


@contextmanager
def _private(comm, what):
    """A duplicate of `comm` for the length of a `with` block."""
    comm = mpi.communicator(comm, mpi.stall_limit(), what)
    try:
        yield comm
    finally:
        mpi.release(comm)


# ---- what is given


def _content(source):
    """([(name, tensor)] to broadcast, [(name, value)] of other entries to compare afterwards)."""
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
    """[(name, value)] of a list of pairs, or of tensors, whose names are then their numbers."""
    if all(isinstance(item, torch.Tensor) for item in items):
        return [(str(number), tensor) for number, tensor in enumerate(items)]
    for item in items:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise SpecError(f"a list that holds a {type(item).__name__} found, expected (name, "
                           "tensor) pairs or tensors only: pass model.named_parameters(), or "
                           "several modules as torch.nn.ModuleList(modules)")
    return [pair for name, value in items for pair in leaves(value, name)]


def _besides(module):
    """[(name, value)] that only the module's own state_dict() returns, without extra state."""
    return [pair for pair in extra_entries(module) if EXTRA not in pair[0].split(".")]


def _with_extra_state(source):
    """[(name, submodule)] of all that keep extra state."""
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
    """What must be the same of a tensor on all ranks, as a line of text."""
    line = f"{name} {list(tensor.shape)} {tensor.dtype}"
    if tensor.layout is not torch.strided:
        return f"{line} {tensor.layout}"
    shape = list(without_expanded(tensor).shape)
    return line if shape == list(tensor.shape) else f"{line} expanded from {shape}"


# ---- how it travels


def _broadcast(tensor, comm, root, name):
    """Overwrite `tensor` with root's, byte by byte; returns why torch could not, or None."""
    if not tensor.numel():
        return None
    if tensor.layout is not torch.strided or tensor.is_quantized:
        blob = _pickled(tensor, comm.rank == root, name)
        theirs = _unpickled(mpi.bcast_bytes(comm, blob, WHAT, root))
        target = tensor  # a detached one would keep what it gets to itself
    else:
        flat = as_bytes(tensor)
        flat = flat.numpy() if comm.rank == root else np.empty(flat.numel(), np.uint8)
        mpi.bcast_array(comm, flat, WHAT, root)
        target = without_expanded(tensor)
        theirs = torch.from_numpy(flat).view(tensor.dtype).view(target.shape)
    if comm.rank == root:
        return None
    return _try(repr(name), lambda: target.copy_(theirs))


def _broadcast_extra_state(parts, blob, comm, root):
    """Give [(name, module)] root's extra state; returns why one did not take it, or None."""
    problem = None
    states = _unpickled(mpi.bcast_bytes(comm, blob, WHAT, root))
    for (name, part), state in zip(parts, states, strict=True):
        if comm.rank != root:
            problem = _try(f"extra state of {name!r}, by set_extra_state()",
                           lambda: part.set_extra_state(state)) or problem
    return problem


def _try(what, work):
    """What went wrong in work(), in words, or None."""
    try:
        with torch.no_grad():
            work()
    except Exception as error:  # other ranks hear of it at the end
        return f"{what} could not be written ({type(error).__name__}: {error})"


def _pickled(value, here, what):
    """The pickled value if `here`, else nothing; SpecError names `what` if it cannot be pickled."""
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
    """Stands for a tensor that is broadcast by itself."""

    def __init__(self, number):
        self.number = number
