"""One element of every run, on the device."""

from mpicomp.kernels import reference
from mpicomp.kernels.gpu import device
from mpicomp.kernels.gpu.arguments import (
    checked,
    floats,
    new_fault,
    or_host,
    payload,
    philox_key,
    refusal,
    room,
)


@or_host(reference.randomk_encode)
def randomk_encode(x, keep, scale, key, data):
    n = floats(x).size
    with room(data, 4, 4 * keep) as packet:
        device.current().launch("randomk_encode", -(-keep // 4), x, n, keep, scale,
                                *philox_key(key), packet)


@or_host(reference.randomk_decode_add)
def randomk_decode_add(data, key, weight, out):
    fault, packet = new_fault(), payload(data, 4)
    keep = packet.size // 4
    device.current().launch("randomk_add", -(-keep // 4), packet, keep, *philox_key(key), weight,
                            floats(out), out.size, fault)
    checked(fault, refusal(reference.randomk_decode_add, data, key, weight, out))
