"""What the ranks must agree on before the first step, and what a Reducer refuses to start with."""

import zlib

import torch

import mpicomp
from mpicomp.agree import agree
from mpicomp.bucket import DTYPES
from mpicomp.errors import SpecError


def agree_on_plan(comm, method, named, problem, **options) -> int:
    """The plan digest; raises on all ranks alike if they differ or any has a problem."""
    facts = {"mpicomp": mpicomp.__version__, "method": repr(method), **options,
             "parameter": [f"{name} {list(p.shape)} {p.dtype}" for name, p in named]}
    if problem:
        facts["problem"] = str(problem)
    return agree(comm, facts, "every rank must build the same model and Reducer")


def check_replicas(comm, named) -> None:
    """Raise MismatchError on all ranks unless all hold the same parameter values."""
    if comm.size > 1:
        facts = [f"{name} {zlib.crc32(_bytes(p)):08x}" for name, p in named]
        agree(comm, {"value of parameter": facts},
              "call mpicomp.broadcast_parameters(model) before the first step")


def trainable(named_parameters):
    """(the pairs that need gradients, what is wrong with them or None)."""
    named = list(named_parameters)
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in named):
        return [], SpecError("named_parameters must be (name, parameter) pairs: pass "
                             "model.named_parameters(), not model.parameters()")
    named = [(name, p) for name, p in named if p.requires_grad]
    names = [name for name, _ in named]
    if not named:
        return [], SpecError("no parameter needs a gradient: pass model.named_parameters()")
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        return [], SpecError(f"two parameters are called {twice!r}")
    for name, p in named:
        if p.dtype not in DTYPES:
            return [], SpecError(f"the gradient of {name!r} has dtype {p.dtype}, expected "
                                 f"{', '.join(map(str, DTYPES))}: call model.float()")
    return named, None


def bad_option(bucket_bytes, seed, nonfinite):
    if nonfinite not in ("raise", "skip"):
        return SpecError(f"nonfinite={nonfinite!r} found, expected 'raise' or 'skip'")
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        return SpecError(f"seed={seed!r} found, expected a whole number from 0 to 2**64 - 1")
    if not bucket_bytes > 0:
        return SpecError(f"bucket_bytes={bucket_bytes!r} found, expected more than 0")


def _bytes(parameter):
    """The parameter's memory as bytes, whatever its dtype."""
    flat = parameter.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""
