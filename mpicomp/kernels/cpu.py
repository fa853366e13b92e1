"""The compiled kernels for NumPy arrays: cpu.cpp, called through ctypes; see `reference` for meanings.

A call that does not fit (another dtype, gaps between elements, too small a buffer) and a function
that is missing here go to the reference, which serves them or says what is wrong. The functions
called `*_owed` and `*_sum` exist here only: several steps of a compressor in one pass over memory.

MPICOMP_AVX2=0 turns vector instructions off. Threads: as many as OMP_NUM_THREADS says, else one,
because the ranks of a node already share its cores.
"""

import ctypes
import os
from ctypes import c_double, c_float, c_int, c_int64, c_uint32, c_uint64, c_void_p
from functools import wraps
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

from mpicomp.kernels import reference
from mpicomp.philox import MASK32

VERSION = 1  # of the compiled functions: mp_version in cpp/common.h
_P, _N, _I, _F, _U = c_void_p, c_int64, c_int, c_float, c_uint32
_KEY = (c_uint64, _U, _U, _U)
_FUNCTIONS = {  # name: (result, arguments)
    "mp_adacomp_decode": (_N, (_P, _P, _P, _N, _N, _I, _F, _P, _N, _I)),
    "mp_adacomp_encode": (_N, (_P, _P, _P, _N, _F, _N, _I, _P, _P)),
    "mp_adagrad": (None, (_P, _N, _P, _P)),
    "mp_avx2": (_I, (_I,)),
    "mp_cast_encode": (None, (_P, _N, _I, _P)),
    "mp_dense_scale": (_N, (_P, _N, _F, _P)),
    "mp_dorefa_decode": (_N, (_P, _P, _N, _I, _I, _F, _P, _N, _I)),
    "mp_dorefa_encode": (_N, (_P, _P, _P, _N, _F, _I, *_KEY, _N, _I, _P)),
    "mp_drop_cut": (_F, (_P, _P, _N, _N, _N)),
    "mp_drop_decode": (_N, (_P, _P, _N, _F, _P, _N, _I)),
    "mp_drop_encode": (_N, (_P, _P, _P, _N, _F, _N, _P, _P)),
    "mp_drop_values": (_N, (_P, _N, _N, _P)),
    "mp_dryden_columns": (None, (_P, _P, _N, _N, _N, _N, *_KEY, _N, _P, _P)),
    "mp_dryden_decode": (_N, (_P, _P, _N, _N, _N, _F, _P, _I)),
    "mp_dryden_encode": (_N, (_P, _P, _P, _N, _N, _P, _P, _P)),
    "mp_finite": (_I, (_P, _N)),
    "mp_float_decode": (_N, (_P, _N, _I, _F, _P, _N, _I)),
    "mp_largest": (_F, (_P, _N)),
    "mp_onebit_decode": (_N, (_P, _N, _N, _N, _F, _P, _I)),
    "mp_onebit_encode": (_N, (_P, _P, _P, _N, _N, _P)),
    "mp_strom_decode": (_N, (_P, _P, _N, _F, _F, _P, _N, _I)),
    "mp_strom_encode": (_N, (_P, _P, _P, _N, _F, _I, _P)),
    "mp_ternary_decode": (_N, (_P, _P, _N, _I, _F, _P, _N, _I)),
    "mp_ternary_encode": (None, (_P, _N, _F, _F, *_KEY, _N, _I, _P)),
    "mp_ternary_level": (None, (_P, _N, c_double, _P)),
    "mp_threads": (_I, (_I,)),
    "mp_version": (_I, ()),
}
_KINDS = {"float32": 0, "float16": 1, "bfloat16": 2}
_PACKINGS = {"2bit": 0, "planar": 1, "int8": 2, "int16": 3}


def _load():
    """The compiled library. Raises OSError where there is none that fits."""
    paths = [Path(__file__).with_name(f"_cpu{suffix}") for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise OSError("they were not compiled")
    library = ctypes.CDLL(str(path))
    try:
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        found = library.mp_version()
    except AttributeError:
        found = None
    if found != VERSION:
        raise OSError(f"{path} was compiled from another version of cpu.cpp")
    return library


_lib = _load()


def __getattr__(name):
    return getattr(reference, name)


def avx2(on=None) -> bool:
    """Are vector instructions used? True or False sets it; they never are where they do not exist."""
    return bool(_lib.mp_avx2(-1 if on is None else int(on)))


def threads(count=0) -> int:
    """The number of threads that long arrays are split over; 1 or more sets it."""
    return _lib.mp_threads(count)


if os.environ.get("MPICOMP_AVX2") == "0":
    avx2(False)
_wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
if _wanted.isdecimal():
    threads(min(int(_wanted), 1024))


# ---- arguments ----------------------------------------------------------------------------------


class _Unfit(Exception):
    """This call is the reference's."""


def _or_reference(function):
    @wraps(function)
    def call(*arguments):
        try:
            return function(*arguments)
        except _Unfit:
            return getattr(reference, function.__name__)(*arguments)

    return call


def _at(array, dtype, least, write=False):
    """The address of `array`, which must hold `least` or more elements of `dtype` side by side."""
    if array.dtype != dtype or array.size < least:
        raise _Unfit
    flags = array.flags
    if not (flags.c_contiguous and flags.aligned) or write and not flags.writeable:
        raise _Unfit
    return array.ctypes.data


def _floats(array, size, write=False):
    """The address of a float32 array of exactly `size` elements."""
    if array.size != size:
        raise _Unfit
    return _at(array, np.float32, size, write)


def _bytes(array, size, write=False):
    """The address of payload of exactly `size` bytes."""
    if array.size != size:
        raise _Unfit
    return _at(array, np.uint8, size, write)


def _all_bytes(payloads, size):
    return (c_void_p * len(payloads))(*[_bytes(data, size) for data in payloads])


def _some_bytes(payloads, multiple):
    """(addresses, sizes) of payloads whose sizes are multiples of `multiple`."""
    if any(data.size % multiple for data in payloads):
        raise _Unfit
    return ((c_void_p * len(payloads))(*[_at(data, np.uint8, 0) for data in payloads]),
            (c_int64 * len(payloads))(*[data.size for data in payloads]))


def _key(key):
    return key.seed & (2**64 - 1), key.rank & MASK32, key.step & MASK32, key.bucket & MASK32


def _refused(result, function, *arguments):
    """Where the compiled function refused a packet the reference says what is wrong with it."""
    if result < 0:
        function(*arguments)
        raise AssertionError(f"the reference's {function.__name__} accepts what cpu.cpp refuses")
    return result


def _sum(decode, decode_add, payloads, out):
    """out = what decode() makes of all payloads; where it cannot, one payload after the other."""
    try:
        if decode() >= 0:
            return
    except _Unfit:
        pass
    out[...] = 0
    for number, data in enumerate(payloads):
        decode_add(number, data)


# ---- sums, dense, casts -------------------------------------------------------------------------


@_or_reference
def finite(x):
    return bool(_lib.mp_finite(_at(x, np.float32, 0), x.size))


@_or_reference
def adagrad(x, history, ahead):
    n = x.size
    _lib.mp_adagrad(_floats(x, n, True), n, _floats(history, n), _floats(ahead, n, True))


def _float_decode(payloads, kind, weight, out, fresh):
    size = (4 if kind == "float32" else 2) * out.size
    return _lib.mp_float_decode(_all_bytes(payloads, size), len(payloads), _KINDS[kind], weight,
                                _floats(out, out.size, True), out.size, fresh)


@_or_reference
def dense_decode_add(data, weight, out):
    result = _float_decode([data], "float32", weight, out, False)
    _refused(result, reference.dense_decode_add, data, weight, out)


def dense_decode_sum(payloads, weight, out):
    """out = the sum of weight * float32[n] over the payloads, in their order."""
    _sum(lambda: _float_decode(payloads, "float32", weight, out, True),
         lambda _, data: reference.dense_decode_add(data, weight, out), payloads, out)


@_or_reference
def dense_scale(data, weight, out):
    n = out.size
    result = _lib.mp_dense_scale(_bytes(data, 4 * n), n, weight, _floats(out, n, True))
    _refused(result, reference.dense_scale, data, weight, out)


@_or_reference
def cast_encode(x, kind, data):
    _lib.mp_cast_encode(_floats(x, x.size), x.size, _KINDS[kind], _bytes(data, 2 * x.size, True))


@_or_reference
def cast_decode_add(data, kind, weight, out):
    result = _float_decode([data], kind, weight, out, False)
    _refused(result, reference.cast_decode_add, data, kind, weight, out)


def cast_decode_sum(payloads, kind, weight, out):
    """out = the sum of weight * the 16-bit floats over the payloads, in their order."""
    _sum(lambda: _float_decode(payloads, kind, weight, out, True),
         lambda _, data: reference.cast_decode_add(data, kind, weight, out), payloads, out)


# ---- Strom --------------------------------------------------------------------------------------


@_or_reference
def strom_encode(x, tau, strict, data):
    return _lib.mp_strom_encode(_floats(x, x.size), None, None, x.size, tau, strict,
                                _at(data, np.uint8, 4 * x.size, True))


def strom_encode_owed(grad, owed, out, tau, strict, data):
    """`strom_encode` of owed + grad; what is then still owed goes to `out`, which may be `owed`."""
    n = grad.size
    return _lib.mp_strom_encode(_floats(grad, n), _floats(owed, n), _floats(out, n, True), n, tau,
                                strict, _at(data, np.uint8, 4 * n, True))


def _strom_decode(payloads, tau, weight, out, fresh):
    return _lib.mp_strom_decode(*_some_bytes(payloads, 4), len(payloads), tau, weight,
                                _floats(out, out.size, True), out.size, fresh)


@_or_reference
def strom_decode_add(data, tau, weight, out):
    result = _strom_decode([data], tau, weight, out, False)
    _refused(result, reference.strom_decode_add, data, tau, weight, out)


def strom_decode_sum(payloads, tau, weight, out):
    """out = the sum of +-(weight * tau) at the indices named, over the payloads in their order."""
    _sum(lambda: _strom_decode(payloads, tau, weight, out, True),
         lambda _, data: reference.strom_decode_add(data, tau, weight, out), payloads, out)


# ---- 1-bit SGD ----------------------------------------------------------------------------------


def _onebit_size(rows, columns):
    return columns * (8 + 4 * reference.onebit_words(rows))


@_or_reference
def onebit_encode(x, rows, columns, data):
    _lib.mp_onebit_encode(_floats(x, rows * columns), None, None, rows, columns,
                          _bytes(data, _onebit_size(rows, columns), True))


def onebit_encode_owed(grad, owed, out, rows, columns, data):
    """`onebit_encode` of owed + grad; what is then still owed goes to `out`, which may be `owed`."""
    n = rows * columns
    result = _lib.mp_onebit_encode(_floats(grad, n), _floats(owed, n), _floats(out, n, True), rows,
                                   columns, _bytes(data, _onebit_size(rows, columns), True))
    _refused(result, reference.onebit_decode_add, data, rows, columns, -1.0, out)


def _onebit_decode(payloads, rows, columns, weight, out, fresh):
    return _lib.mp_onebit_decode(_all_bytes(payloads, _onebit_size(rows, columns)), len(payloads),
                                 rows, columns, weight, _floats(out, rows * columns, True), fresh)


@_or_reference
def onebit_decode_add(data, rows, columns, weight, out):
    result = _onebit_decode([data], rows, columns, weight, out, False)
    _refused(result, reference.onebit_decode_add, data, rows, columns, weight, out)


def onebit_decode_sum(payloads, rows, columns, weight, out):
    """out = the sum of weight * the mean of each bit, over the payloads in their order."""
    _sum(lambda: _onebit_decode(payloads, rows, columns, weight, out, True),
         lambda _, data: reference.onebit_decode_add(data, rows, columns, weight, out),
         payloads, out)


# ---- TernGrad -----------------------------------------------------------------------------------


def _ternary_level(x, clip):
    """(clip * sigma or inf, max |x|), both float32."""
    levels = (c_float * 2)()
    _lib.mp_ternary_level(_floats(x, x.size), x.size, clip, levels)
    return np.float32(levels[0]), np.float32(levels[1])


@_or_reference
def ternary_scale(x, clip):
    level, largest = _ternary_level(x, clip if x.size >= 8 else 0.0)
    return level, min(largest, level)


@_or_reference
def ternary_scale_code(x, clip):
    level, largest = _ternary_level(x, clip)
    return np.float32(np.inf), level if level < np.inf else largest


@_or_reference
def ternary_encode(x, level, scale, key, start, packing, data):
    size = reference.ternary_size(x.size, packing)
    _lib.mp_ternary_encode(_floats(x, x.size), x.size, level, scale, *_key(key), start,
                           _PACKINGS[packing], _bytes(data, size, True))


def _ternary_decode(payloads, scales, packing, weight, out, fresh):
    payloads = _all_bytes(payloads, reference.ternary_size(out.size, packing))
    return _lib.mp_ternary_decode(payloads, (c_float * len(scales))(*scales), len(payloads),
                                  _PACKINGS[packing], weight, _floats(out, out.size, True),
                                  out.size, fresh)


@_or_reference
def ternary_decode_add(data, scale, packing, weight, out):
    result = _ternary_decode([data], [scale], packing, weight, out, False)
    _refused(result, reference.ternary_decode_add, data, scale, packing, weight, out)


def ternary_decode_sum(payloads, scales, packing, weight, out):
    """out = the sum of code * (weight * scale), a scale each, over the payloads in their order."""
    _sum(lambda: _ternary_decode(payloads, scales, packing, weight, out, True),
         lambda i, data: reference.ternary_decode_add(data, scales[i], packing, weight, out),
         payloads, out)


# ---- DoReFa -------------------------------------------------------------------------------------

_WIDTHS = {"bits": 0, **reference.DOREFA_INTEGERS}


@_or_reference
def dorefa_scale(x):
    return np.float32(_lib.mp_largest(_floats(x, x.size), x.size))


def _dorefa_encode(grad, owed, out, scale, bits, packing, key, start, data):
    n = grad.size
    if not scale > 0:
        raise _Unfit
    return _lib.mp_dorefa_encode(
        _floats(grad, n), owed, out, n, scale, bits, *_key(key), start, _WIDTHS[packing],
        _bytes(data, reference.dorefa_size(n, bits, packing), True))


@_or_reference
def dorefa_encode(x, scale, bits, packing, key, start, data):
    _dorefa_encode(x, None, None, scale, bits, packing, key, start, data)


def dorefa_encode_owed(grad, owed, out, scale, bits, packing, key, start, data):
    """`dorefa_encode` of owed + grad; what is then still owed goes to `out`, which may be `owed`."""
    n = grad.size
    try:
        if _dorefa_encode(grad, _floats(owed, n), _floats(out, n, True), scale, bits, packing, key,
                          start, data) >= 0:
            return
    except _Unfit:
        pass
    np.add(owed, grad, out=out)
    reference.dorefa_encode(out, scale, bits, packing, key, start, data)
    reference.dorefa_decode_add(data, scale, bits, packing, -1.0, out)


def _dorefa_decode(payloads, scales, bits, packing, weight, out, fresh):
    payloads = _all_bytes(payloads, reference.dorefa_size(out.size, bits, packing))
    return _lib.mp_dorefa_decode(payloads, (c_float * len(scales))(*scales), len(payloads), bits,
                                 _WIDTHS[packing], weight, _floats(out, out.size, True), out.size,
                                 fresh)


@_or_reference
def dorefa_decode_add(data, scale, bits, packing, weight, out):
    if _dorefa_decode([data], [scale], bits, packing, weight, out, False) < 0:
        reference.dorefa_decode_add(data, scale, bits, packing, weight, out)


def dorefa_decode_sum(payloads, scales, bits, packing, weight, out):
    """out = the sum of weight * what the codes mean, over the payloads in their order."""
    _sum(lambda: _dorefa_decode(payloads, scales, bits, packing, weight, out, True),
         lambda i, data: reference.dorefa_decode_add(data, scales[i], bits, packing, weight, out),
         payloads, out)


# ---- gradient dropping --------------------------------------------------------------------------


def _drop_cut(grad, owed, rate, sample):
    n = grad.size
    if n < 2:
        return np.float32(0)
    size = min(sample, n) if sample else n
    number = max(0, int(size * rate) - 1)
    return np.float32(_lib.mp_drop_cut(_floats(grad, n), owed, n, size, number))


@_or_reference
def drop_cut(x, rate, sample):
    return _drop_cut(x, None, rate, sample)


@_or_reference
def drop_select(x, cut, start, data):
    return _lib.mp_drop_encode(_floats(x, x.size), None, None, x.size, cut, start,
                               _at(data, np.uint8, 4 * x.size, True), None)


@_or_reference
def drop_values(x, count, data):
    if _lib.mp_drop_values(_floats(x, x.size), x.size, count,
                           _at(data, np.uint8, 8 * count, True)) < 0:
        raise _Unfit


def drop_encode_owed(grad, owed, out, scopes, rate, sample, data):
    """Cut, indices and values of owed + grad in one pass; what is then still owed goes to `out`.

    `scopes` are the (start, stop) that have a cut of their own; `data` has 8 * n bytes. Returns
    the bytes used.
    """
    n, count = grad.size, 0
    at = _at(data, np.uint8, 8 * n, True)
    addresses = _floats(grad, n), _floats(owed, n), _floats(out, n, True)
    for start, stop in scopes:  # values wait in the second half for the last index
        part = grad[start:stop]
        more, have, rest = (address + 4 * start for address in addresses)
        count += _lib.mp_drop_encode(more, have, rest, part.size,
                                     _drop_cut(part, have, rate, sample), start, at + 4 * count,
                                     at + 4 * n + 4 * count)
    ctypes.memmove(at + 4 * count, at + 4 * n, 4 * count)
    if not finite(data[4 * count:8 * count].view(np.float32)):
        reference.drop_decode_add(data[:8 * count], -1.0, out)
    return 8 * count


def _drop_decode(payloads, weight, out, fresh):
    return _lib.mp_drop_decode(*_some_bytes(payloads, 8), len(payloads), weight,
                               _floats(out, out.size, True), out.size, fresh)


@_or_reference
def drop_decode_add(data, weight, out):
    result = _drop_decode([data], weight, out, False)
    _refused(result, reference.drop_decode_add, data, weight, out)


def drop_decode_sum(payloads, weight, out):
    """out = the sum of weight * value at the indices named, over the payloads in their order."""
    _sum(lambda: _drop_decode(payloads, weight, out, True),
         lambda _, data: reference.drop_decode_add(data, weight, out), payloads, out)


# ---- AdaComp ------------------------------------------------------------------------------------


def _adacomp_encode(base, grad, out, factor, size, data):
    n, width = base.size, reference.adacomp_width(size)
    if n == 0:
        raise _Unfit
    scale = c_float()
    count = _lib.mp_adacomp_encode(_floats(base, n), _floats(grad, n), out, n, factor - 1, size,
                                   width, ctypes.byref(scale),
                                   _at(data, np.uint8, width * n, True))
    return count, np.float32(scale.value)


@_or_reference
def adacomp_encode(g, grad, factor, size, data):
    return _adacomp_encode(g, grad, None, factor, size, data)


def adacomp_encode_owed(grad, owed, out, factor, size, data):
    """`adacomp_encode` of owed + grad and grad; what is then still owed goes to `out`."""
    n, width = grad.size, reference.adacomp_width(size)
    if n == 0:
        return 0, np.float32(0)
    count, scale = _adacomp_encode(owed, grad, _floats(out, n, True), factor, size, data)
    adacomp_decode_add(data[:width * count], scale, size, -1.0, out)
    return count, scale


def _adacomp_decode(payloads, scales, size, weight, out, fresh):
    width = reference.adacomp_width(size)
    addresses, sizes = _some_bytes(payloads, width)
    counts = (c_int64 * len(payloads))(*[bytes_ // width for bytes_ in sizes])
    return _lib.mp_adacomp_decode(addresses, counts, (c_float * len(scales))(*scales),
                                  len(payloads), size, width, weight,
                                  _floats(out, out.size, True), out.size, fresh)


@_or_reference
def adacomp_decode_add(data, scale, size, weight, out):
    result = _adacomp_decode([data], [scale], size, weight, out, False)
    _refused(result, reference.adacomp_decode_add, data, scale, size, weight, out)


def adacomp_decode_sum(payloads, scales, size, weight, out):
    """out = the sum of +-(weight * scale) at the elements named, over the payloads in order."""
    _sum(lambda: _adacomp_decode(payloads, scales, size, weight, out, True),
         lambda i, data: reference.adacomp_decode_add(data, scales[i], size, weight, out),
         payloads, out)


# ---- Dryden -------------------------------------------------------------------------------------


def _dryden_columns(base, grad, rows, columns, proportion, sample, key, start):
    lower, upper = np.empty(columns, np.float32), np.empty(columns, np.float32)
    sample = sample if 0 < sample < rows else 0
    _lib.mp_dryden_columns(_floats(base, rows * columns), grad, rows, columns, proportion, sample,
                           *_key(key), start, lower.ctypes.data, upper.ctypes.data)
    return lower, upper


@_or_reference
def dryden_columns(x, rows, columns, proportion, sample, key, start):
    return _dryden_columns(x, None, rows, columns, proportion, sample, key, start)


def _dryden_encode(base, grad, out, rows, columns, lower, upper, data):
    room = 4 + 8 * columns + 4 * rows * columns
    return _lib.mp_dryden_encode(_floats(base, rows * columns), grad, out, rows, columns,
                                 _floats(lower, columns), _floats(upper, columns),
                                 _at(data, np.uint8, room, True))


@_or_reference
def dryden_encode_2016(x, rows, columns, lower, upper, data):
    return _dryden_encode(x, None, None, rows, columns, lower, upper, data)


def dryden_encode_owed_2016(grad, owed, out, rows, columns, proportion, sample, key, start, data):
    """Thresholds and `dryden_encode_2016` of owed + grad; what is then still owed goes to `out`."""
    n = rows * columns
    more = _floats(grad, n)
    lower, upper = _dryden_columns(owed, more, rows, columns, proportion, sample, key, start)
    result = _dryden_encode(owed, more, _floats(out, n, True), rows, columns, lower, upper, data)
    return _refused(result, reference.dryden_decode_add_2016, data, rows, columns, -1.0, out)


def _dryden_decode(payloads, rows, columns, weight, out, fresh):
    """Bytes of each packet; None where one is too short or the compiled function refuses it."""
    head, sizes = 4 + 8 * columns, []
    for data in payloads:
        if data.size < head:
            return None
        sizes.append(head + 4 * int(data[:4].view(np.uint32)[0]))
        if data.size < sizes[-1]:
            return None
    addresses = (c_void_p * len(payloads))(*[_at(data, np.uint8, 0) for data in payloads])
    result = _lib.mp_dryden_decode(addresses, (c_int64 * len(sizes))(*sizes), len(payloads),
                                   out.size, columns, weight, _floats(out, rows * columns, True),
                                   fresh)
    return None if result < 0 else sizes


@_or_reference
def dryden_decode_add_2016(data, rows, columns, weight, out):
    sizes = _dryden_decode([data], rows, columns, weight, out, False)
    if sizes is None:
        raise _Unfit
    return sizes[0]


def dryden_decode_sum_2016(payloads, rows, columns, weight, out):
    """out = the sum over the payloads in their order; returns the bytes of this matrix in each."""
    try:
        sizes = _dryden_decode(payloads, rows, columns, weight, out, True)
    except _Unfit:
        sizes = None
    if sizes is None:
        out[...] = 0
        sizes = [reference.dryden_decode_add_2016(data, rows, columns, weight, out)
                 for data in payloads]
    return sizes
