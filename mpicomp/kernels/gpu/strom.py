"""Strom's threshold and words, on the device."""

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.gpu import device
from mpicomp.kernels.gpu.arguments import (
    checked,
    floats,
    new_fault,
    on_host,
    or_host,
    payload,
    refusal,
    refusals,
    room,
)
from mpicomp.kernels.gpu.sums import host
from mpicomp.kernels.gpu.tiles import compact, gather


def _strom_encode(x, more, out, tau, strict, data):
    n = x.size
    with room(data, 4, 4 * n) as packet:
        def select(words, counts):
            device.current().launch("strom_select", counts.size * device.THREADS, x, more, out, n,
                                    tau, strict, words, counts)

        words, counts, total = compact(n, select)
        gather(words, counts, total, packet)
    return 4 * int(host(total)[0])


@or_host(reference.strom_encode)
def strom_encode(x, tau, strict, data):
    return _strom_encode(floats(x), None, None, tau, strict, data)


def strom_encode_owed(grad, owed, out, tau, strict, data):
    """`strom_encode` of owed + grad; what is then still owed goes to `out`, which may be `owed`."""
    n = grad.size
    return _strom_encode(floats(owed, n), floats(grad), floats(out, n), tau, strict, data)


def _strom_add(data, tau, weight, out, fault):
    words = payload(data, 4)
    quantum = np.float32(weight) * np.float32(tau)
    device.current().launch("words_add", words.size // 4, words, words.size // 4, quantum, out,
                            out.size, fault)


@or_host(reference.strom_decode_add)
def strom_decode_add(data, tau, weight, out):
    fault = new_fault()
    _strom_add(data, tau, weight, floats(out), fault)
    checked(fault, refusal(reference.strom_decode_add, data, tau, weight, out))


def strom_decode_sum(payloads, tau, weight, out):
    """out = the sum of +-(weight * tau) at the indices named, over the payloads in their order."""
    fault = new_fault()
    out[...] = 0
    for data in payloads:
        _strom_add(data, tau, weight, floats(out), fault)
    checked(fault, refusals(lambda _, data, out: reference.strom_decode_add(data, tau, weight, out),
                            payloads, out))


strom_tau = on_host(reference.strom_tau)
strom_rice_encode = on_host(reference.strom_rice_encode)
strom_rice_decode_add = on_host(reference.strom_rice_decode_add)
strom_2bit_encode = on_host(reference.strom_2bit_encode)
strom_2bit_decode_add = on_host(reference.strom_2bit_decode_add)
