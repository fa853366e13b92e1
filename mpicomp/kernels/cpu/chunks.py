"""The largest of every block, compiled."""

from mpicomp.kernels import reference
from mpicomp.kernels.cpu.library import (
    accepted,
    all_payloads,
    at,
    floats,
    lib,
    or_reference,
    refused,
)
from mpicomp.kernels.unfit import Unfit


def _plan(sizes, block, k, bits, n):
    """What the compiled functions take for the layout; Unfit unless it has n elements."""
    plan = reference.chunks_plan(sizes, block, k)
    if plan[-1, 0] != n:
        raise Unfit()
    return plan.ctypes.data, len(plan) - 1, block, k, bits


def _chunks_encode(grad, owed, out, sizes, block, k, bits, data):
    plan = _plan(sizes, block, k, bits, grad.size)
    room = at(data, "uint8", reference.chunks_size(sizes, block, k, bits), True)
    reference.chunks_expect_finite(
        lib.mp_chunks_encode(floats(grad, grad.size), owed, out, *plan, room) == 0)


@or_reference(reference.chunks_encode)
def chunks_encode(x, sizes, block, k, bits, data):
    _chunks_encode(x, None, None, sizes, block, k, bits, data)


@or_reference(reference.chunks_encode_owed)
def chunks_encode_owed(grad, owed, out, sizes, block, k, bits, data):
    _chunks_encode(grad, floats(owed, grad.size), floats(out, grad.size, True), sizes, block, k,
                   bits, data)


def _chunks_decode(payloads, sizes, block, k, bits, weight, out, fresh):
    plan = _plan(sizes, block, k, bits, out.size)
    packets = all_payloads(payloads, reference.chunks_size(sizes, block, k, bits))
    return lib.mp_chunks_decode(packets, len(payloads), *plan, weight,
                                floats(out, out.size, True), fresh)


@or_reference(reference.chunks_decode_add)
def chunks_decode_add(data, sizes, block, k, bits, weight, out):
    result = _chunks_decode([data], sizes, block, k, bits, weight, out, False)
    refused(result, reference.chunks_decode_add, data, sizes, block, k, bits, weight, out)


@or_reference(reference.chunks_decode_sum)
def chunks_decode_sum(payloads, sizes, block, k, bits, weight, out):
    accepted(_chunks_decode(payloads, sizes, block, k, bits, weight, out, True))
