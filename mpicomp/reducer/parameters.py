"""Which parameters can be exchanged, and what to do about the others."""

import torch
from torch.nn.parameter import is_lazy

from mpicomp.errors import SpecError
from mpicomp.names import plain
from mpicomp.reducer.slot import DTYPES


def trainable(named_parameters):
    """(the pairs that need gradients, by their plain names, what is wrong with them or None)."""
    try:
        named = list(named_parameters)
    except TypeError:  # a module
        named = [None]
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in named):
        return [], SpecError("named_parameters must be (name, parameter) pairs: pass "
                             "model.named_parameters(), not model.parameters()")
    for name, p in named:
        if wrong := _no_parameter(p):
            return [], SpecError(f"{name!r} {wrong}")
    names = plain(str(name) for name, _ in named)
    named = [(name, p) for name, (_, p) in zip(names, named) if p.requires_grad]
    names = [name for name, _ in named]
    if not named:
        return [], SpecError("no parameter needs a gradient: pass model.named_parameters()")
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        return [], SpecError(f"two parameters are called {twice!r}")
    if len({id(p) for _, p in named}) < len(named):
        return [], SpecError("one parameter is given under two names: pass "
                             "model.named_parameters(), which names each once")
    for name, p in named:
        if p.dtype not in DTYPES:
            how = ("keep it as two real parameters (torch.view_as_real)" if p.is_complex() else
                   "call model.float()")
            return [], SpecError(f"the gradient of {name!r} has dtype {p.dtype}, expected "
                                 f"{', '.join(map(str, DTYPES))}: {how}")
    return named, None


def _no_parameter(p) -> str | None:
    """Why this cannot be exchanged, to follow its name, or None."""
    if not isinstance(p, torch.Tensor):
        return f"is {type(p).__name__}, expected a parameter: pass model.named_parameters()"
    if is_lazy(p):
        return ("has no shape yet: run the model once on every rank, then broadcast_parameters, "
                "then make the Reducer")
    if p.is_meta:
        return ("is on the meta device and has no values: call model.to_empty(device=...) and "
                "initialise it first")
    if not p.is_leaf:
        return "is computed from other tensors (no leaf): pass the parameters that it comes from"
    if type(p).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return (f"is a {type(p).__name__}, which torch distributes or wraps itself: mpicomp "
                "exchanges plain parameters, so leave it out of FSDP or tensor parallelism")
    return None
