"""Signs and a mean magnitude for each group, on the device."""

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.gpu import device
from mpicomp.kernels.gpu.arguments import (
    checked,
    floats,
    new_fault,
    or_host,
    payload,
    refusal,
    refusals,
    room,
    table,
)
from mpicomp.kernels.gpu.sums import fold


def _sign_encode(x, more, out, length, data, fault):
    d, n = device.current(), floats(x).size
    groups, blocks = reference.sign_groups(n, length), -(-length // 1024) if length else 0
    with room(data, 1, reference.sign_bytes(n, length)) as packet:
        if not n:
            return
        sums = d.empty(groups * blocks * 32, np.float32)
        d.launch("sign_sums", sums.size, x, more, n, length, sums)
        lanes = fold(sums, groups, blocks, 32)
        d.launch("sign_means", groups, lanes, n, length, packet, fault)
        d.launch("sign_bits", groups * -(-length // 8), x, more, out, n, length, packet)


@or_host(reference.sign_encode)
def sign_encode(x, length, data):
    _sign_encode(x, None, None, length, data, new_fault())


def sign_encode_owed(grad, owed, out, length, data):
    """`sign_encode` of owed + grad; what is then still owed goes to `out`."""
    n, fault = grad.size, new_fault()
    _sign_encode(floats(owed, n), floats(grad), floats(out, n), length, data, fault)
    checked(fault, refusal(reference.sign_decode_add, data, length, -1.0, out))


def _sign_decode(payloads, length, weight, out, fresh):
    n, fault = floats(out).size, new_fault()
    packets = [payload(data, 1, reference.sign_bytes(n, length)) for data in payloads]
    device.current().launch("sign_decode", n, table(packets), len(packets), length, weight, out, n,
                            fresh, fault)

    def decode_add(_, data, out):
        reference.sign_decode_add(data, length, weight, out)

    checked(fault, refusals(decode_add, payloads, out))


@or_host(reference.sign_decode_add)
def sign_decode_add(data, length, weight, out):
    _sign_decode([data], length, weight, out, False)


def sign_decode_sum(payloads, length, weight, out):
    """out = the sum of weight * the value of each bit, over the payloads in their order."""
    _sign_decode(payloads, length, weight, out, True)
