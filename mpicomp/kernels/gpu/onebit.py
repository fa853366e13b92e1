"""1-bit SGD's means and bits, on the device."""

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.gpu import device
from mpicomp.kernels.gpu.arguments import (checked, floats, new_fault, or_host, payload, refusal,
                                           refusals, room, table)
from mpicomp.kernels.gpu.sums import fold


def _onebit_size(rows, columns):
    return columns * (8 + 4 * reference.onebit_words(rows))


def _onebit_encode(x, more, out, rows, columns, data, fault):
    d, words = device.current(), reference.onebit_words(rows)
    sums = d.empty(2 * words * columns, np.float32)
    counts = d.empty(words * columns, np.uint32)
    with room(data, 4, _onebit_size(rows, columns)) as packet:
        means, bits = packet[:8 * columns], packet[8 * columns:]
        d.launch("onebit_signs", words * columns, x, more, out, rows, columns, bits, sums, counts)
        d.launch("onebit_means", columns, fold(sums, 2, words, columns),
                 fold(counts, 1, words, columns), rows, columns, means, fault)


@or_host
def onebit_encode(x, rows, columns, data):
    _onebit_encode(floats(x, rows * columns), None, None, rows, columns, data, new_fault())


def onebit_encode_owed(grad, owed, out, rows, columns, data):
    """`onebit_encode` of owed + grad; what is then still owed goes to `out`."""
    n, fault = rows * columns, new_fault()
    _onebit_encode(floats(owed, n), floats(grad, n), floats(out, n), rows, columns, data, fault)
    _onebit_decode([data], rows, columns, -1.0, out, False, fault)
    checked(fault, refusal(reference.onebit_decode_add, data, rows, columns, -1.0, out))


def _onebit_decode(payloads, rows, columns, weight, out, fresh, fault):
    packets = [payload(data, 4, _onebit_size(rows, columns)) for data in payloads]
    threads = reference.onebit_words(rows) * columns
    device.current().launch("onebit_decode", threads, table(packets), len(packets), rows, columns,
                            weight, floats(out, rows * columns), fresh, fault)


@or_host
def onebit_decode_add(data, rows, columns, weight, out):
    fault = new_fault()
    _onebit_decode([data], rows, columns, weight, out, False, fault)
    checked(fault, refusal(reference.onebit_decode_add, data, rows, columns, weight, out))


def onebit_decode_sum(payloads, rows, columns, weight, out):
    """out = the sum of weight * the mean of each bit, over the payloads in their order."""
    fault = new_fault()
    _onebit_decode(payloads, rows, columns, weight, out, True, fault)

    def decode_add(_, data, out):
        reference.onebit_decode_add(data, rows, columns, weight, out)

    checked(fault, refusals(decode_add, payloads, out))
