"""The compiled kernels for NumPy arrays: cpu.cpp, called through ctypes; see `reference` for meanings.

A call that does not fit (another dtype, gaps between elements, too small a buffer) and a function
that is missing here go to the reference, which serves them or says what is wrong. The functions
called `*_owed` and `*_sum` exist here only: several steps of a compressor in one pass over memory.

MPICOMP_AVX2=0 turns vector instructions off. Threads: as many as OMP_NUM_THREADS says, else one,
because ranks that share a node already use its cores.
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

VERSION = 1  # of the compiled functions: mp_version in cpu.cpp
_KINDS = {"float32": 0, "float16": 1, "bfloat16": 2}
_PACKINGS = {"2bit": 0, "planar": 1, "int8": 2, "int16": 3}


def _load():
    """The compiled library. Raises OSError where there is none that fits."""
    here = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = here / f"_cpu{suffix}"
        if path.exists():
            library = ctypes.CDLL(str(path))
            if library.mp_version() != VERSION:
                raise OSError(f"{path} was compiled from another version of cpu.cpp")
            return library
    raise OSError("the extension mpicomp.kernels._cpu was not compiled")


_lib = _load()
P, N, I, F = c_void_p, c_int64, c_int, c_float
for _name, _result, _types in (
        ("mp_avx2", I, (I,)),
        ("mp_threads", I, (I,)),
        ("mp_finite", I, (P, N)),
        ("mp_cast_encode", None, (P, N, I, P)),
        ("mp_float_decode", N, (P, N, I, F, P, N, I)),
        ("mp_strom_encode", N, (P, P, P, N, F, I, P)),
        ("mp_strom_decode", N, (P, P, N, F, F, P, N, I)),
        ("mp_onebit_encode", N, (P, P, P, N, N, P)),
        ("mp_onebit_decode", N, (P, N, N, N, F, P, I)),
        ("mp_ternary_scale", None, (P, N, c_double, P)),
        ("mp_ternary_encode", None,
         (P, N, F, F, c_uint64, c_uint32, c_uint32, c_uint32, N, I, P)),
        ("mp_ternary_decode", N, (P, P, N, I, F, P, N, I))):
    _function = getattr(_lib, _name)
    _function.restype, _function.argtypes = _result, _types


def __getattr__(name):
    return getattr(reference, name)


def avx2(on=None) -> bool:
    """Are vector instructions used? True or False sets it; they are never used where they lack."""
    return bool(_lib.mp_avx2(-1 if on is None else int(on)))


def threads(count=0) -> int:
    """The number of threads that long arrays are split over; 1 or more sets it."""
    return _lib.mp_threads(count)


if os.environ.get("MPICOMP_AVX2") == "0":
    avx2(False)
_wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
if _wanted.isdigit():
    threads(int(_wanted))


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


def _at(array, dtype, size, write=False):
    """The address of `array`, which must hold at least `size` elements of `dtype` side by side."""
    flags = getattr(array, "flags", None)
    if (flags is None or array.dtype != dtype or array.size < size or not flags.c_contiguous
            or not flags.aligned or write and not flags.writeable):
        raise _Unfit
    return array.ctypes.data


def _floats(array, size, write=False):
    if array.size != size:
        raise _Unfit
    return _at(array, np.float32, size, write)


def _payload(array, size, write=False):
    if array.size != size:
        raise _Unfit
    return _at(array, np.uint8, size, write)


def _pointers(addresses):
    return (c_void_p * len(addresses))(*addresses)


def _refused(result, function, *arguments):
    """Let the reference say what is wrong with a packet, if anything is."""
    if result < 0:
        function(*arguments)
        raise AssertionError(f"{function.__name__}: the reference accepts what cpu.cpp refuses")
    return result


# ---- sums, dense, casts --------------------------------------------------------------------------


@_or_reference
def finite(x):
    return bool(_lib.mp_finite(_at(x, np.float32, 0), x.size))


def _float_decode(payloads, kind, width, weight, out, fresh):
    pointers = _pointers([_payload(data, width * out.size) for data in payloads])
    result = _lib.mp_float_decode(pointers, len(payloads), _KINDS[kind], weight,
                                  _floats(out, out.size, True), out.size, fresh)
    if result < 0:
        for data in payloads:
            reference.cast_decode_add(data, kind, weight, out)
        _refused(result, reference.cast_decode_add, payloads[0], kind, weight, out)


@_or_reference
def dense_decode_add(data, weight, out):
    _float_decode([data], "float32", 4, weight, out, False)


@_or_reference
def cast_encode(x, kind, data):
    _lib.mp_cast_encode(_floats(x, x.size), x.size, _KINDS[kind], _payload(data, 2 * x.size, True))


@_or_reference
def cast_decode_add(data, kind, weight, out):
    _float_decode([data], kind, 2, weight, out, False)


# ---- Strom ----------------------------------------------------------------------------------------


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
    if any(data.size % 4 for data in payloads):
        raise _Unfit
    pointers = _pointers([_at(data, np.uint8, 0) for data in payloads])
    sizes = (c_int64 * len(payloads))(*[data.size for data in payloads])
    return _lib.mp_strom_decode(pointers, sizes, len(payloads), tau, weight,
                                _floats(out, out.size, True), out.size, fresh)


@_or_reference
def strom_decode_add(data, tau, weight, out):
    result = _strom_decode([data], tau, weight, out, False)
    _refused(result, reference.strom_decode_add, data, tau, weight, out)


# ---- 1-bit SGD --------------------------------------------------------------------------------------


def _onebit_bytes(rows, columns):
    return columns * (8 + 4 * reference.onebit_words(rows))


@_or_reference
def onebit_encode(x, rows, columns, data):
    _lib.mp_onebit_encode(_floats(x, rows * columns), None, None, rows, columns,
                          _payload(data, _onebit_bytes(rows, columns), True))


def onebit_encode_owed(grad, owed, out, rows, columns, data):
    """`onebit_encode` of owed + grad; what is then still owed goes to `out`, which may be `owed`."""
    n = rows * columns
    result = _lib.mp_onebit_encode(_floats(grad, n), _floats(owed, n), _floats(out, n, True), rows,
                                   columns, _payload(data, _onebit_bytes(rows, columns), True))
    _refused(result, reference.onebit_decode_add, data, rows, columns, -1.0, out)


def _onebit_decode(payloads, rows, columns, weight, out, fresh):
    size = _onebit_bytes(rows, columns)
    pointers = _pointers([_payload(data, size) for data in payloads])
    return _lib.mp_onebit_decode(pointers, len(payloads), rows, columns, weight,
                                 _floats(out, rows * columns, True), fresh)


@_or_reference
def onebit_decode_add(data, rows, columns, weight, out):
    result = _onebit_decode([data], rows, columns, weight, out, False)
    _refused(result, reference.onebit_decode_add, data, rows, columns, weight, out)


# ---- TernGrad -----------------------------------------------------------------------------------------


@_or_reference
def ternary_scale(x, clip):
    levels = (c_float * 2)()
    _lib.mp_ternary_scale(_floats(x, x.size), x.size, clip, levels)
    return np.float32(levels[0]), np.float32(levels[1])


@_or_reference
def ternary_encode(x, level, scale, key, start, packing, data):
    size = reference.ternary_size(x.size, packing)
    _lib.mp_ternary_encode(_floats(x, x.size), x.size, level, scale, key.seed & (2**64 - 1),
                           key.rank & MASK32, key.step & MASK32, key.bucket & MASK32, start,
                           _PACKINGS[packing], _payload(data, size, True))


def _ternary_decode(payloads, scales, packing, weight, out, fresh):
    size = reference.ternary_size(out.size, packing)
    pointers = _pointers([_payload(data, size) for data in payloads])
    return _lib.mp_ternary_decode(pointers, (c_float * len(scales))(*scales), len(payloads),
                                  _PACKINGS[packing], weight, _floats(out, out.size, True),
                                  out.size, fresh)


@_or_reference
def ternary_decode_add(data, scale, packing, weight, out):
    result = _ternary_decode([data], [scale], packing, weight, out, False)
    _refused(result, reference.ternary_decode_add, data, scale, packing, weight, out)
