"""1-bit SGD's means and bits, and CNTK's forms of it, on the device."""

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


def _onebit_size(rows, columns, bits=1):
    return columns * (8 + 4 * reference.onebit_words(rows, bits))


def _onebit_means(x, more, out, rows, columns, bits, means, fault):
    """The means of each column's two halves, and bits[words][columns] unless that is None."""
    d, words = device.current(), reference.onebit_words(rows)
    sums = d.empty(2 * words * columns, np.float32)
    counts = d.empty(words * columns, np.uint32)
    d.launch("onebit_signs", words * columns, x, more, out, rows, columns, bits, sums, counts)
    d.launch("onebit_means", columns, fold(sums, 2, words, columns),
             fold(counts, 1, words, columns), rows, columns, means, fault)


def _onebit_encode(x, more, out, rows, columns, data, fault):
    with room(data, 4, _onebit_size(rows, columns)) as packet:
        means, bits = packet[:8 * columns], packet[8 * columns:]
        _onebit_means(x, more, out, rows, columns, bits, means, fault)


@or_host(reference.onebit_encode)
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


@or_host(reference.onebit_decode_add)
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


# ---- CNTK's wire, the threshold at the mean, and more bits --------------------------------------


def _onebit_code_bits(x, means, rows, columns, bits, wire, packet):
    """The codes of x behind the pairs of floats that the packet holds already."""
    threads = reference.onebit_words(rows, bits) * columns
    device.current().launch("onebit_code_bits", threads, x, means, rows, columns, bits,
                            wire == "cntk", packet)


@or_host(reference.onebit_encode_cntk)
def onebit_encode_cntk(x, rows, columns, data):
    d, x = device.current(), floats(x, rows * columns)
    means = d.empty(2 * columns, np.float32)
    with room(data, 4, _onebit_size(rows, columns)) as packet:
        _onebit_means(x, None, None, rows, columns, None, means, new_fault())
        d.launch("onebit_bounds_about_zero", columns, means, rows, columns, packet)
        _onebit_code_bits(x, None, rows, columns, 1, "cntk", packet)


@or_host(reference.onebit_encode_mean)
def onebit_encode_mean(x, rows, columns, wire, data):
    d, x, blocks = device.current(), floats(x, rows * columns), reference.onebit_words(rows)
    sums = d.empty(blocks * columns, np.float32)
    means = d.empty(columns, np.float32)
    with room(data, 4, _onebit_size(rows, columns)) as packet:
        d.launch("onebit_column_sums", sums.size, x, None, rows, columns, sums)
        d.launch("onebit_column_means", columns, fold(sums, 1, blocks, columns), rows, columns,
                 means)
        d.launch("onebit_column_sums", sums.size, x, means, rows, columns, sums)
        d.launch("onebit_bounds_about_mean", columns, means, fold(sums, 1, blocks, columns), rows,
                 columns, wire == "cntk", packet)
        _onebit_code_bits(x, means, rows, columns, 1, wire, packet)


@or_host(reference.onebit_encode_bits)
def onebit_encode_bits(x, rows, columns, bits, wire, data):
    d, x, blocks = device.current(), floats(x, rows * columns), reference.onebit_words(rows)
    sums = d.empty(blocks * columns, np.float64)
    with room(data, 4, _onebit_size(rows, columns, bits)) as packet:
        d.launch("onebit_column_squares", sums.size, x, rows, columns, sums)
        d.launch("onebit_bounds_of_squares", columns, fold(sums, 1, blocks, columns), rows, columns,
                 bits, wire == "cntk", packet)
        _onebit_code_bits(x, None, rows, columns, bits, wire, packet)


def _onebit_decode_bits(payloads, rows, columns, bits, wire, weight, out, fresh, fault):
    size = _onebit_size(rows, columns, bits)
    packets = [payload(data, 4, size) for data in payloads]
    threads = reference.onebit_words(rows, bits) * columns
    device.current().launch("onebit_decode_bits", threads, table(packets), len(packets), rows,
                            columns, bits, wire == "cntk", weight, floats(out, rows * columns),
                            fresh, fault)


@or_host(reference.onebit_decode_add_cntk)
def onebit_decode_add_cntk(data, rows, columns, weight, out):
    fault = new_fault()
    _onebit_decode_bits([data], rows, columns, 1, "cntk", weight, out, False, fault)
    checked(fault, refusal(reference.onebit_decode_add_cntk, data, rows, columns, weight, out))


def onebit_decode_sum_cntk(payloads, rows, columns, weight, out):
    """out = the sum of weight * the level of each bit, over the payloads in their order."""
    fault = new_fault()
    _onebit_decode_bits(payloads, rows, columns, 1, "cntk", weight, out, True, fault)

    def decode_add(_, data, out):
        reference.onebit_decode_add_cntk(data, rows, columns, weight, out)

    checked(fault, refusals(decode_add, payloads, out))


@or_host(reference.onebit_decode_add_bits)
def onebit_decode_add_bits(data, rows, columns, bits, wire, weight, out):
    fault = new_fault()
    _onebit_decode_bits([data], rows, columns, bits, wire, weight, out, False, fault)
    checked(fault, refusal(reference.onebit_decode_add_bits, data, rows, columns, bits, wire,
                           weight, out))


def onebit_decode_sum_bits(payloads, rows, columns, bits, wire, weight, out):
    """out = the sum of weight * what the codes stand for, over the payloads in their order."""
    fault = new_fault()
    _onebit_decode_bits(payloads, rows, columns, bits, wire, weight, out, True, fault)

    def decode_add(_, data, out):
        reference.onebit_decode_add_bits(data, rows, columns, bits, wire, weight, out)

    checked(fault, refusals(decode_add, payloads, out))
