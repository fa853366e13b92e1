"""The loops over gradients and payloads, in three backends that offer the same functions.

`of(array)` is the backend whose functions take that array. `reference` (NumPy, slow and plain) is
the specification: the others have functions of the same names, which write the same bytes. `cpu`
(C++, several times faster) serves NumPy arrays wherever it was compiled; `use` or the environment
variable MPICOMP_KERNELS=reference|cpu chooses. `gpu` (CUDA) serves arrays on a device.

Functions are called <method>_<what>. Those called *_owed and *_sum are fused, several steps of a
compressor in one pass over memory: the reference shows which steps. `out` of an *_owed may be the
array `owed` itself.
"""

import os
from functools import cache
from types import ModuleType
from typing import Any

from mpicomp.errors import SpecError
from mpicomp.kernels import reference

_chosen = None


def of(array: Any) -> ModuleType:
    """The kernels for arrays of this kind: NumPy's or, in memory of a device, CuPy's."""
    if hasattr(array, "__cuda_array_interface__"):
        from mpicomp.kernels import gpu

        return gpu
    return _chosen or for_numpy()


def for_numpy() -> ModuleType:
    """The kernels for NumPy's arrays. Raises SpecError where MPICOMP_KERNELS names none."""
    return _chosen or use(os.environ.get("MPICOMP_KERNELS") or None)


def backends() -> dict[str, ModuleType]:
    """The backends that work here: {"reference": module, ...}."""
    compiled = _compiled()[0]
    return {"reference": reference, **({"cpu": compiled} if compiled else {})}


def use(name: str | None = None) -> ModuleType:
    """From now on `of` is the backend called `name`; None: the fastest. Returns the module.

    Raises SpecError for a name that is not in `backends`.
    """
    global _chosen
    known = backends()
    if name is not None and name not in known:
        raise SpecError(f"kernels {name!r} were asked for, there are: {', '.join(known)}"
                        + (f" ({_compiled()[1]})" if name == "cpu" else ""))
    _chosen = known[name or list(known)[-1]]
    return _chosen


def note() -> str | None:
    """Why training will be slower than it could be, in one sentence; None where it will not."""
    if for_numpy() is not reference or os.environ.get("MPICOMP_KERNELS") == "reference":
        return None
    return ("mpicomp runs on its NumPy kernels, 5 to 50 times slower than the compiled ones "
            f"{cure()}")


def cure() -> str:
    """Why there are no compiled kernels, and what to type."""
    from mpicomp import installed

    reason = f"({_compiled()[1]})"
    if other := installed.shadowed():
        return (f"{reason}: {installed.HERE}, which the working directory or PYTHONPATH brings, "
                f"stands before the installed {other}: leave that folder, or type  "
                f"{installed.to_compile()}")
    return f"{reason}: install a C++17 compiler and type  {installed.to_compile()}"


@cache
def _compiled():
    """(the module `cpu` or None, why it is None)."""
    try:
        from mpicomp.kernels import cpu
    except OSError as error:
        return None, str(error)
    return cpu, ""
