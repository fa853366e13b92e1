"""What ranks must agree on before the first step, and arrays that an averager refuses."""

import os

import mpicomp
from mpicomp import mpi
from mpicomp.averager import memory
from mpicomp.averager.slot import is_tensor
from mpicomp.errors import MismatchError, SpecError
from mpicomp.transport.agree import agree


def agree_on_plan(comm, method, named, problem, **options) -> int:
    """The plan digest; raises on all ranks alike if they differ or any has a problem."""
    facts = {"mpicomp": mpicomp.__version__, "method": repr(method), **options, **variables(),
             "parameter": [f"{name} {list(array.shape)} {array.dtype}"
                           f"{' on a GPU' * memory.is_on_gpu(array)}" for name, array in named]}
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


def variables() -> dict:
    """The environment variables that change which calls are made, and what they mean on this rank.

    With MPICOMP_KERNELS, MPICOMP_VECTORS and OMP_NUM_THREADS the bytes are the same, and with
    MPICOMP_PROGRESS the order of calls is: those may differ.
    """
    on_host = os.environ.get("MPICOMP_STAGING") == "host"  # packets go around rings there
    return {"MPICOMP_RING": os.environ.get("MPICOMP_RING") or "not set",
            "MPICOMP_STAGING": "host" if on_host else "not host"}


DTYPES = {"float32": ("numpy", "cupy", "torch"), "float16": ("numpy", "cupy", "torch"),
          "bfloat16": ("torch",)}


def averageable(named_arrays):
    """(list of (name, array), what is wrong with them or None) of pairs or a dictionary."""
    items = getattr(named_arrays, "items", lambda: named_arrays)()
    try:
        named = [(str(name), array) for name, array in items]
    except (TypeError, ValueError):
        return [], SpecError(f"named_arrays: found {type(named_arrays).__name__}, expected (name, "
                             "array) pairs, or a dictionary {name: array}")
    if not named:
        return [], SpecError("named_arrays: found none, expected at least one (name, array) pair")
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        return [], SpecError(f"two arrays are called {twice!r}")
    for name, array in named:
        if not (hasattr(array, "dtype") and hasattr(array, "shape")):
            return [], SpecError(f"{name!r} is {type(array).__name__}, expected a torch tensor or "
                                 "an array of NumPy or CuPy")
        dtype = str(array.dtype).removeprefix("torch.")
        library = "torch" if is_tensor(array) else type(array).__module__.partition(".")[0]
        if library not in DTYPES.get(dtype, ()):
            return [], SpecError(f"{name!r} has dtype {dtype} of {library}, expected float32 or "
                                 "float16, of torch also bfloat16: convert it first")
    return named, None
