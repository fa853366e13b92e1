"""What the kernels of all methods share, on the device."""

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.gpu import device
from mpicomp.kernels.gpu.arguments import (
    anywhere,
    checked,
    floats,
    is_device_array,
    new_fault,
    or_host,
)

SWEEP = 1 << 19  # threads of a launch that goes over an array of any length


def zeros(size, dtype=np.float32):
    """A new device array of zeros."""
    return device.current().zeros(size, dtype)


def host(array):
    """A small array's content as a NumPy array."""
    return device.current().host(array) if is_device_array(array) else array


def finite_fault(x, fault):
    """Set `fault` where an element of x is not finite."""
    device.current().launch("all_finite", min(x.size, SWEEP), x, x.size, fault)


@or_host(reference.finite)
def finite(x):
    fault = new_fault()
    finite_fault(floats(x), fault)
    return not host(fault)[0]


def copy_finite(x, to):
    """Copy x to `to`, both flat; returns whether every element is finite."""
    to[...] = x
    return finite(to)


def within(x, least, most, complain):
    """complain(x, on the host) unless every element is from `least` to `most`; see `deferred`."""
    x, fault = anywhere(x), new_fault()
    device.current().launch("all_within", min(x.size, SWEEP), x, x.size, least, most, fault)
    checked(fault, lambda: complain(host(x)))


@or_host(reference.adagrad)
def adagrad(x, history, ahead):
    n = floats(x).size
    device.current().launch("adagrad", n, x, n, floats(history, n), floats(ahead, n))


def fold(a, planes, rows, columns):
    """The folds over the rows of a[planes][rows][columns], as an array [planes][columns]."""
    d = device.current()
    kernel = {"f4": "fold_floats", "f8": "fold_doubles", "u4": "fold_counts"}[a.dtype.str[1:]]
    while rows > 1:
        blocks = -(-rows // 32)
        sums = d.empty(planes * blocks * columns, a.dtype)
        d.launch(kernel, sums.size, a, planes, rows, columns, sums)
        a, rows = sums, blocks
    return a


def largest(x):
    """max |x| as bits, uint32[1]."""
    d, most = device.current(), zeros(1, np.uint32)
    threads = min(-(-x.size // 32) * 32, SWEEP)
    d.launch("largest_magnitude", threads, x, x.size, most)
    return most


def lanes_of(x):
    """The 32 lanes of `total` of x, each folded: float32[32]."""
    blocks = -(-x.size // 1024)
    sums = device.current().empty(32 * blocks, np.float32)
    device.current().launch("total_floats", 32 * blocks, x, x.size, sums)
    return fold(sums, 1, blocks, 32)
