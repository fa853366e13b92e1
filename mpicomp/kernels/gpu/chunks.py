"""The largest of every block, on the device."""

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.gpu import device
from mpicomp.kernels.gpu.arguments import (
    checked,
    constants,
    floats,
    new_fault,
    or_host,
    payload,
    refusal,
    refusals,
    room,
)
from mpicomp.kernels.unfit import Unfit


def _plan(sizes, block, k, n):
    """(plan on the device, tensors, kept elements, blocks); Unfit unless it has n elements."""
    plan = reference.chunks_plan(sizes, block, k)
    if plan[-1, 0] != n:
        raise Unfit()
    return constants(plan.reshape(-1)), len(plan) - 1, int(plan[-1, 1]), int(plan[-1, 2])


def _parts(tensors, kept, bits):
    """Where the floats, the offsets and the codes of a payload lie."""
    first, offsets, codes = reference.chunks_sizes(tensors, kept, bits)
    return (slice(0, first), slice(first, first + offsets),
            slice(first + offsets, first + offsets + codes))


def _chunks_encode(x, more, out, sizes, block, k, bits, data):
    d, (rows, tensors, kept, blocks) = device.current(), _plan(sizes, block, k, x.size)
    offsets, values = d.empty(kept, np.uint32), d.empty(kept, np.float32)
    largest, fault = d.zeros(tensors, np.uint32), new_fault()
    sums = d.zeros(4 * tensors, np.uint64)
    with room(data, 4, reference.chunks_size(sizes, block, k, bits)) as packet:
        d.launch("chunks_select", blocks * device.THREADS, x, more, out, rows, tensors, block, k,
                 offsets, values, largest, fault)
        for upper in (False, True) if bits == 2 else ():
            d.launch("chunks_sums", kept, values, rows, tensors, largest, upper, sums)
        parts = [packet[part] for part in _parts(tensors, kept, bits)]
        if bits < 32:
            d.launch("chunks_scales", tensors, rows, tensors, largest, sums, bits, parts[0])
        d.launch("chunks_pack", -(-kept // 4), offsets, values, rows, tensors, block, k, largest,
                 sums, bits, *parts, out)
    checked(fault, lambda: reference.chunks_expect_finite(False))


@or_host(reference.chunks_encode)
def chunks_encode(x, sizes, block, k, bits, data):
    _chunks_encode(floats(x), None, None, sizes, block, k, bits, data)


def chunks_encode_owed(grad, owed, out, sizes, block, k, bits, data):
    """`chunks_encode` of owed + grad; what is then still owed goes to `out`, perhaps `owed`."""
    n = grad.size
    _chunks_encode(floats(owed, n), floats(grad), floats(out, n), sizes, block, k, bits, data)


def _chunks_add(data, sizes, block, k, bits, weight, out, fault):
    rows, tensors, kept, _ = _plan(sizes, block, k, out.size)
    data = payload(data, 1, reference.chunks_size(sizes, block, k, bits))
    first, offsets, codes = _parts(tensors, kept, bits)
    device.current().launch("chunks_add", kept, payload(data[first], 4), data[offsets],
                            data[codes], rows, tensors, block, k, bits, weight, out, fault)


@or_host(reference.chunks_decode_add)
def chunks_decode_add(data, sizes, block, k, bits, weight, out):
    fault = new_fault()
    _chunks_add(data, sizes, block, k, bits, weight, floats(out), fault)
    checked(fault, refusal(reference.chunks_decode_add, data, sizes, block, k, bits, weight, out))


def chunks_decode_sum(payloads, sizes, block, k, bits, weight, out):
    """out = the sum of weight * what is said, over the payloads in their order."""
    fault = new_fault()
    out[...] = 0
    for data in payloads:
        _chunks_add(data, sizes, block, k, bits, weight, floats(out), fault)
    checked(fault, refusals(lambda _, data, out: reference.chunks_decode_add(
        data, sizes, block, k, bits, weight, out), payloads, out))
