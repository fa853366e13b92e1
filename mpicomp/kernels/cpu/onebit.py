"""1-bit SGD's means and bits, compiled."""

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


def _onebit_size(rows, columns):
    return columns * (8 + 4 * reference.onebit_words(rows))


@or_reference(reference.onebit_encode)
def onebit_encode(x, rows, columns, data):
    lib.mp_onebit_encode(floats(x, rows * columns), None, None, rows, columns,
                         payload(data, _onebit_size(rows, columns), True))


@or_reference(reference.onebit_encode_owed)
def onebit_encode_owed(grad, owed, out, rows, columns, data):
    n = rows * columns
    result = lib.mp_onebit_encode(floats(grad, n), floats(owed, n), floats(out, n, True), rows,
                                  columns, payload(data, _onebit_size(rows, columns), True))
    refused(result, reference.onebit_decode_add, data, rows, columns, -1.0, out)


def _onebit_decode(payloads, rows, columns, weight, out, fresh):
    return lib.mp_onebit_decode(all_payloads(payloads, _onebit_size(rows, columns)), len(payloads),
                                rows, columns, weight, floats(out, rows * columns, True), fresh)


@or_reference(reference.onebit_decode_add)
def onebit_decode_add(data, rows, columns, weight, out):
    result = _onebit_decode([data], rows, columns, weight, out, False)
    refused(result, reference.onebit_decode_add, data, rows, columns, weight, out)


@or_reference(reference.onebit_decode_sum)
def onebit_decode_sum(payloads, rows, columns, weight, out):
    accepted(_onebit_decode(payloads, rows, columns, weight, out, True))
