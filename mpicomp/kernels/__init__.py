"""The few loops that everything else is made of, in as many versions as there are kinds of array.

`of(array)` is the module whose functions take that array. `reference` (NumPy, slow and obvious) is
the specification: every other backend has functions of the same names and writes the same bytes.
"""

from mpicomp.kernels import reference


def of(array):
    """The kernels for arrays of this kind."""
    return reference


def backends() -> dict:
    """The backends that work here: {"reference": module, ...}."""
    return {"reference": reference}
