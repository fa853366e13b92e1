"""Dense float32 and the two 16-bit floats, compiled."""

from mpicomp.kernels import reference
from mpicomp.kernels.cpu.library import (
    accepted,
    all_payloads,
    floats,
    lib,
    or_reference,
    payload,
    refused,
)

_KINDS = {"float32": 0, "float16": 1, "bfloat16": 2}


def _float_decode(payloads, kind, weight, out, fresh):
    size = (4 if kind == "float32" else 2) * out.size
    return lib.mp_float_decode(all_payloads(payloads, size), len(payloads), _KINDS[kind], weight,
                               floats(out, out.size, True), out.size, fresh)


@or_reference(reference.dense_decode_add)
def dense_decode_add(data, weight, out):
    result = _float_decode([data], "float32", weight, out, False)
    refused(result, reference.dense_decode_add, data, weight, out)


@or_reference(reference.dense_decode_sum)
def dense_decode_sum(payloads, weight, out):
    accepted(_float_decode(payloads, "float32", weight, out, True))


@or_reference(reference.dense_scale)
def dense_scale(data, weight, out):
    n = out.size
    result = lib.mp_dense_scale(payload(data, 4 * n), n, weight, floats(out, n, True))
    refused(result, reference.dense_scale, data, weight, out)


@or_reference(reference.cast_encode)
def cast_encode(x, kind, data):
    lib.mp_cast_encode(floats(x, x.size), x.size, _KINDS[kind], payload(data, 2 * x.size, True))


@or_reference(reference.cast_decode_add)
def cast_decode_add(data, kind, weight, out):
    result = _float_decode([data], kind, weight, out, False)
    refused(result, reference.cast_decode_add, data, kind, weight, out)


@or_reference(reference.cast_decode_sum)
def cast_decode_sum(payloads, kind, weight, out):
    accepted(_float_decode(payloads, kind, weight, out, True))
