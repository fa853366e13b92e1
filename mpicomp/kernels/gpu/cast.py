"""Dense float32 and the two 16-bit floats, on the device."""

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

_KINDS = {"float32": 0, "float16": 1, "bfloat16": 2}


def _float_decode(payloads, kind, weight, out, fresh, decode_add):
    n, width, fault = floats(out).size, 4 if kind == "float32" else 2, new_fault()
    packets = [payload(data, width, width * n) for data in payloads]
    device.current().launch("float_decode", n, table(packets), len(packets), _KINDS[kind], weight,
                            out, n, fresh, fault)
    checked(fault, refusals(decode_add, payloads, out))


@or_host(reference.dense_decode_add)
def dense_decode_add(data, weight, out):
    _float_decode([data], "float32", weight, out, False,
                  lambda _, data, out: reference.dense_decode_add(data, weight, out))


def dense_decode_sum(payloads, weight, out):
    """out = the sum of weight * float32[n] over the payloads, in their order."""
    _float_decode(payloads, "float32", weight, out, True,
                  lambda _, data, out: reference.dense_decode_add(data, weight, out))


@or_host(reference.dense_scale)
def dense_scale(data, weight, out):
    n, fault = floats(out).size, new_fault()
    device.current().launch("dense_scale", n, payload(data, 4, 4 * n), weight, out, n, fault)
    checked(fault, refusal(reference.dense_scale, data, weight, out))


@or_host(reference.cast_encode)
def cast_encode(x, kind, data):
    n = floats(x).size
    with room(data, 2, 2 * n) as words:
        device.current().launch("cast_encode", n, x, n, _KINDS[kind], words)


@or_host(reference.cast_decode_add)
def cast_decode_add(data, kind, weight, out):
    _float_decode([data], kind, weight, out, False,
                  lambda _, data, out: reference.cast_decode_add(data, kind, weight, out))


def cast_decode_sum(payloads, kind, weight, out):
    """out = the sum of weight * the 16-bit floats over the payloads, in their order."""
    _float_decode(payloads, kind, weight, out, True,
                  lambda _, data, out: reference.cast_decode_add(data, kind, weight, out))
