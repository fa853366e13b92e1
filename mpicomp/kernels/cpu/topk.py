"""The elements of largest magnitude, compiled."""

from mpicomp.kernels import reference
from mpicomp.kernels.cpu.library import at, floats, lib, or_reference


@or_reference(reference.topk_select)
def topk_select(x, keep, start, data):
    n, address = x.size, floats(x, x.size)
    room = at(data, "uint8", 4 * keep, True)
    if keep:
        cut = lib.mp_dropping_cut(address, None, n, n, n - keep)
        lib.mp_topk_select(address, n, keep, cut, start, room)
