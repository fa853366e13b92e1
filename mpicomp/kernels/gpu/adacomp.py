"""AdaComp's bins and entries, on the device."""

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.gpu import device
from mpicomp.kernels.gpu.arguments import (Unfit, checked, floats, new_fault, or_host, payload,
                                           refusal, refusals, room)
from mpicomp.kernels.gpu.sums import host, lanes_of
from mpicomp.kernels.gpu.tiles import scanned


def _bins(x, more, out, grad, ahead, size):
    """(largest |g| of each bin, how many it sends)."""
    d, n = device.current(), x.size
    bins = -(-n // size)
    largest, counts = d.empty(bins, np.float32), d.empty(bins, np.int64)
    d.launch("adacomp_bins", 32 * bins, x, more, out, grad, ahead, n, size, largest, counts)
    return largest, counts


def _places(counts, most):
    """(last bin before, place within 256 bins, scanned entries of these, total) of each bin."""
    d, bins = device.current(), counts.size
    tiles = -(-bins // device.THREADS)
    last, entries = d.empty(tiles, np.int64), d.empty(tiles, np.int64)
    previous, place = d.empty(bins, np.int64), d.empty(bins, np.int64)
    d.launch("adacomp_last", bins, counts, bins, last)
    scanned(last, "scan_largest")
    d.launch("adacomp_places", bins, counts, bins, most, last, previous, place, entries)
    return previous, place, entries, scanned(entries)


def _adacomp_encode(x, more, out, grad, factor, size, data, fault):
    d, n, width = device.current(), x.size, reference.adacomp_width(size)
    if n == 0:
        raise Unfit()
    most, ahead = (1 << 8 * width - 2) - (size - 1), np.float32(factor - 1)
    largest, counts = _bins(x, more, out, grad, ahead, size)
    scale = d.empty(1, np.float32)
    d.launch("adacomp_scale", 1, lanes_of(largest), counts.size, scale, fault)
    previous, place, entries, total = _places(counts, most)
    with room(data, width, width * n) as packet:
        d.launch("adacomp_write", 32 * counts.size, x, out, grad, ahead, n, size, largest, counts,
                 most, previous, place, entries, scale, width, packet)
    return int(host(total)[0]), scale[0]


@or_host
def adacomp_encode(g, grad, factor, size, data):
    return _adacomp_encode(floats(g), None, None, floats(grad, g.size), factor, size, data,
                           new_fault())


def adacomp_encode_owed(grad, owed, out, factor, size, data):
    """`adacomp_encode` of owed + grad and grad; what is then still owed goes to `out`."""
    n, width, fault = grad.size, reference.adacomp_width(size), new_fault()
    if n == 0:
        return 0, np.float32(0)
    count, scale = _adacomp_encode(floats(owed, n), floats(grad), floats(out, n), grad, factor,
                                   size, data, fault)
    if count:
        checked(fault, refusal(reference.adacomp_decode_add, data[:width * count], scale, size,
                               -1.0, out))
    return count, scale


def _adacomp_add(data, scale, size, weight, out, fault):
    d, width = device.current(), reference.adacomp_width(size)
    entries = payload(data, width)
    count = entries.size // width
    if count == 0:
        return
    quantum = np.float32(weight) * np.float32(float(scale))
    if not np.isfinite(quantum):
        raise Unfit()
    steps = d.empty(-(-count // device.THREADS), np.int64)
    d.launch("adacomp_steps", count, entries, width, count, size, steps)
    scanned(steps)
    d.launch("adacomp_add", count, entries, width, count, size, steps, quantum, out, out.size,
             fault)


@or_host
def adacomp_decode_add(data, scale, size, weight, out):
    fault = new_fault()
    _adacomp_add(data, scale, size, weight, floats(out), fault)
    checked(fault, refusal(reference.adacomp_decode_add, data, scale, size, weight, out))


def adacomp_decode_sum(payloads, scales, size, weight, out):
    """out = the sum of +-(weight * scale) at the elements named, over the payloads in order."""
    def decode_add(number, data, out):
        reference.adacomp_decode_add(data, host(scales[number]), size, weight, out)

    fault, complain = new_fault(), refusals(decode_add, payloads, out)
    out[...] = 0
    for data, scale in zip(payloads, scales):
        try:
            _adacomp_add(data, scale, size, weight, floats(out), fault)
        except Unfit:
            complain()
            raise
    checked(fault, complain)
