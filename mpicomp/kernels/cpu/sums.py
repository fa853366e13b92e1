"""What the kernels of all methods share, compiled."""

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.cpu.library import at, floats, lib, or_reference


@or_reference(reference.finite)
def finite(x):
    return bool(lib.mp_finite(at(x, np.float32, 0), x.size))


@or_reference(reference.copy_finite)
def copy_finite(x, to):
    return bool(lib.mp_copy_finite(floats(x, to.size), floats(to, to.size, True), to.size))


@or_reference(reference.adagrad)
def adagrad(x, history, ahead):
    n = x.size
    lib.mp_adagrad(floats(x, n, True), n, floats(history, n), floats(ahead, n, True))
