"""What the ranks must agree on before the first step, and what a Reducer refuses to start with."""

import os
from numbers import Integral, Real

import torch
from torch.nn.parameter import is_lazy

import mpicomp
from mpicomp import kernels, mpi
from mpicomp.errors import MismatchError, SpecError
from mpicomp.names import plain
from mpicomp.reducer import memory
from mpicomp.reducer.bucket import DTYPES
from mpicomp.transport.agree import agree
from mpicomp.transport.pipeline import WAYS


def agree_on_plan(comm, method, named, problem, **options) -> int:
    """The plan digest; raises on all ranks alike if they differ or any has a problem."""
    facts = {"mpicomp": mpicomp.__version__, "method": repr(method), **options, **settings(),
             "parameter": [f"{name} {list(p.shape)} {p.dtype}{' on a GPU' * memory.is_on_gpu(p)}"
                           for name, p in named]}
    if problem:
        facts["problem"] = str(problem)
    try:
        return agree(comm, facts, "every rank must build the same model and Reducer, with the same "
                     "version of mpicomp and the same environment (mpirun -x VARIABLE)",
                     mpi.limit(comm))
    except SpecError:
        mpi.release(comm)
        raise problem from None  # all ranks have the same one
    except MismatchError:
        mpi.release(comm)
        raise


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


def stall_seconds(given):
    """The seconds of stall_timeout: those given, else MPICOMP_STALL_TIMEOUT's, else 600."""
    if given is not None:
        return given
    told = os.environ.get("MPICOMP_STALL_TIMEOUT", "600")
    try:
        return float(told)
    except ValueError:
        return told  # bad_option says what is wrong with it


def stall_limit(given=None) -> float:
    """`stall_seconds`, or SpecError where that is no number of seconds."""
    seconds = stall_seconds(given)
    if isinstance(seconds, bool) or not isinstance(seconds, Real) or not seconds > 0:
        raise SpecError(f"stall_timeout={seconds!r} found, expected seconds, more than 0 "
                        "(MPICOMP_STALL_TIMEOUT)")
    return seconds


def settings() -> dict:
    """The environment variables that change which calls are made, and what they mean on this rank.

    With MPICOMP_KERNELS, MPICOMP_VECTORS and OMP_NUM_THREADS the bytes are the same, and with
    MPICOMP_PROGRESS the order of calls is: those may differ.
    """
    on_host = os.environ.get("MPICOMP_STAGING") == "host"  # packets go around rings there
    return {"MPICOMP_RING": os.environ.get("MPICOMP_RING") or "not set",
            "MPICOMP_STAGING": "host" if on_host else "not host"}


def bad_setting(progress):
    """What is wrong with a variable of the environment of this rank, or None."""
    for name, known in (("MPICOMP_RING", ("never",)), ("MPICOMP_PROGRESS", WAYS)):
        found = os.environ.get(name)
        if found and found not in known and (progress == "auto" or name != "MPICOMP_PROGRESS"):
            return SpecError(f"{name}={found} found, expected {' or '.join(known)}: type  "
                             f"unset {name}  if you did not mean to set it")
    try:
        kernels.for_numpy()
    except SpecError as error:  # MPICOMP_KERNELS
        return error


def bad_option(bucket_bytes, seed, nonfinite, stall_timeout, require_ratio=None, ratio_window=1,
               progress="auto", check_replicas_every=None):
    """What is wrong with these arguments of Reducer, or None."""
    require_ratio = 1.0 if require_ratio is None else require_ratio
    every = 1 if check_replicas_every is None else check_replicas_every
    for name, value, kind, fits, expected in (
            ("nonfinite", nonfinite, str, lambda v: v in ("raise", "skip"), "'raise' or 'skip'"),
            ("seed", seed, Integral, lambda v: 0 <= v < 2**64, "a whole number below 2**64"),
            ("bucket_bytes", bucket_bytes, Integral, lambda v: v > 0, "a whole number above 0"),
            ("stall_timeout", stall_timeout, Real, lambda v: v > 0, "seconds, more than 0"),
            ("require_ratio", require_ratio, Real, lambda v: v > 0, "a number above 0"),
            ("check_replicas_every", every, Integral, lambda v: v > 0, "a whole number above 0"),
            ("progress", progress, str, lambda v: v in WAYS, "'auto', 'poll' or 'thread'"),
            ("ratio_window", ratio_window, Integral, lambda v: v > 0, "a whole number above 0")):
        if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
            return SpecError(f"{name}={value!r} found, expected {expected}")
    return bad_setting(progress)
