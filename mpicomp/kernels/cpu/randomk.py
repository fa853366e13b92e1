"""One element of every run, compiled."""

from mpicomp.kernels import reference
from mpicomp.kernels.cpu.library import at, floats, lib, or_reference, philox_key, refused


@or_reference(reference.randomk_encode)
def randomk_encode(x, keep, scale, key, data):
    lib.mp_randomk_encode(floats(x, x.size), x.size, keep, scale, *philox_key(key),
                          at(data, "uint8", 4 * keep, True))


@or_reference(reference.randomk_decode_add)
def randomk_decode_add(data, key, weight, out):
    result = lib.mp_randomk_decode(at(data, "uint8", data.size), data.size // 4, *philox_key(key),
                                   weight, floats(out, out.size, True), out.size)
    refused(result, reference.randomk_decode_add, data, key, weight, out)
