"""AdaComp's bins and entries, on the device."""

import numpy as np

from mpicomp.errors import PacketError
from mpicomp.kernels import reference
from mpicomp.kernels.gpu import device
from mpicomp.kernels.gpu.arguments import (
    Unfit,
    checked,
    floats,
    new_fault,
    or_host,
    payload,
    refusal,
    room,
)
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


def _encode_layer(x, more, out, grad, ahead, size, packet, ends, scale, count, fault):
    """Write a layer's entries ends[0] bytes into `packet`, and its scale and count; see ends[1]."""
    d, n, width = device.current(), x.size, reference.adacomp_width(size)
    if n == 0:
        d.launch("adacomp_head", 1, None, 0, None, width, ends, scale, count, fault)
        return
    most = (1 << 8 * width - 2) - (size - 1)
    largest, counts = _bins(x, more, out, grad, ahead, size)
    previous, place, entries, total = _places(counts, most)
    d.launch("adacomp_head", 1, lanes_of(largest), counts.size, total, width, ends, scale, count,
             fault)
    d.launch("adacomp_write", 32 * counts.size, x, out, grad, ahead, n, size, largest, counts,
             most, previous, place, entries, scale, width, ends, packet)


@or_host(reference.adacomp_encode)
def adacomp_encode(g, grad, factor, size, data):
    d, n, width = device.current(), floats(g).size, reference.adacomp_width(size)
    if n == 0:
        raise Unfit()
    scale, count = d.empty(1, np.float32), d.empty(1, np.uint32)
    with room(data, width, width * n) as packet:
        _encode_layer(g, None, None, floats(grad, n), np.float32(factor - 1), size, packet,
                      d.zeros(2, np.int64), scale, count, new_fault())
    return int(host(count)[0]), scale[0]


def adacomp_encode_layers(grad, owed, out, factor, layers, data):
    """A packet of owed + grad, or of grad alone; what is then still owed goes to `out`.

    `layers` are (number, segment, bin, bytes of an entry) in the order of their entries in `data`,
    which begins with all scales and all counts. Returns the bytes used, the only thing that is read
    back, once for all layers: where the entries of one begin is kept on the device.
    """
    d, n, fault = device.current(), grad.size, new_fault()
    floats(grad)
    if owed is not None:
        floats(owed, n), floats(out, n)
    head, ahead = 4 * len(layers), np.float32(factor - 1)
    most = sum(segment.size * width for _, segment, _, width in layers)
    ends = d.zeros(len(layers) + 1, np.int64)
    with room(data, 4, 2 * head + most) as packet:
        scales, counts = packet[:head].view(np.float32), packet[head:2 * head].view(np.uint32)
        for place, (i, segment, size, _) in enumerate(layers):
            at = segment.slice
            x, more, rest = (grad[at], None, None) if owed is None else \
                (owed[at], grad[at], out[at])
            _encode_layer(x, more, rest, grad[at], ahead, size, packet[2 * head:],
                          ends[place:place + 2], scales[i:i + 1], counts[i:i + 1], fault)
    used = 2 * head + int(host(ends[len(layers):])[0])
    if owed is not None:
        checked(fault, _refuse_scale)
    return used


def _refuse_scale():
    raise PacketError("adacomp: a number in the payload is not finite")


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


@or_host(reference.adacomp_decode_add)
def adacomp_decode_add(data, scale, size, weight, out):
    fault = new_fault()
    _adacomp_add(data, scale, size, weight, floats(out), fault)
    checked(fault, refusal(reference.adacomp_decode_add, data, scale, size, weight, out))


def adacomp_heads(payloads, size):
    """The first `size` bytes of each payload, or all that it has, with one copy for all of them."""
    heads = device.current().empty(size * len(payloads), np.uint8)
    for number, data in enumerate(payloads):
        part = data[:size]
        heads[number * size:number * size + part.size] = part
    rows = host(heads).reshape(len(payloads), size)
    return [row[:data.size] for row, data in zip(rows, payloads)]


def adacomp_decode_layers(layers, weight, out):
    """out[at] += +-(weight * scale) at the elements named, for every layer and packet in order.

    `layers` are (at, bin, the entries in each packet, the scale in each packet): a slice, a number,
    device arrays, numbers on the host. All faults are one.
    """
    def complain():
        with np.errstate(all="ignore"):
            for packet in zip(*[zip(data, scales) for _, _, data, scales in layers]):
                for (at, size, *_), (data, scale) in zip(layers, packet):
                    reference.adacomp_decode_add(host(data), scale, size, weight,
                                                 np.zeros(at.stop - at.start, np.float32))

    fault = new_fault()
    for at, size, entries, scales in layers:
        for data, scale in zip(entries, scales):
            try:
                _adacomp_add(data, scale, size, weight, floats(out[at]), fault)
            except Unfit:
                complain()
                raise
    checked(fault, complain)


def adacomp_decode_sum(layers, weight, out):
    """`adacomp_decode_layers` from zero."""
    out[...] = 0
    adacomp_decode_layers(layers, weight, out)
