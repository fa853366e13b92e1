"""The library compiled from src/cpu.cpp, through ctypes, and checks of what is handed to it."""

import ctypes
import os
from ctypes import c_double, c_float, c_int, c_int64, c_uint32, c_uint64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

from mpicomp.errors import SpecError
from mpicomp.kernels.unfit import Unfit, otherwise
from mpicomp.philox import MASK32

VERSION = 6  # of the compiled functions: mp_version in src/common.h
_P, _N, _I, _F, _U = c_void_p, c_int64, c_int, c_float, c_uint32
_KEY = (c_uint64, _U, _U, _U)
_FUNCTIONS = {  # name: (result, arguments)
    "mp_adacomp_decode": (_N, (_P, _P, _P, _N, _N, _I, _F, _P, _N, _I)),
    "mp_adacomp_encode": (_N, (_P, _P, _P, _N, _F, _N, _I, _P, _P)),
    "mp_adagrad": (None, (_P, _N, _P, _P)),
    "mp_block_decode": (_N, (_P, _N, _N, _I, _I, _F, _P, _N, _I)),
    "mp_block_encode": (_N, (_P, _P, _P, _N, _N, _I, _I, _I, _I, *_KEY, _N, _P)),
    "mp_cast_encode": (None, (_P, _N, _I, _P)),
    "mp_chunks_decode": (_N, (_P, _N, _P, _N, _N, _N, _I, _F, _P, _I)),
    "mp_chunks_encode": (_N, (_P, _P, _P, _P, _N, _N, _N, _I, _P)),
    "mp_copy_finite": (_I, (_P, _P, _N)),
    "mp_dense_scale": (_N, (_P, _N, _F, _P)),
    "mp_dorefa_decode": (_N, (_P, _P, _N, _I, _I, _F, _P, _N, _I)),
    "mp_dorefa_encode": (_N, (_P, _P, _P, _N, _F, _I, *_KEY, _N, _I, _P)),
    "mp_dropping_cut": (_F, (_P, _P, _N, _N, _N)),
    "mp_dropping_decode": (_N, (_P, _P, _N, _F, _P, _N, _I)),
    "mp_dropping_encode": (_N, (_P, _P, _P, _N, _F, _N, _P, _P)),
    "mp_dropping_values": (_N, (_P, _N, _N, _P)),
    "mp_dryden_columns": (None, (_P, _P, _N, _N, _N, _N, *_KEY, _N, _P, _P)),
    "mp_dryden_decode": (_N, (_P, _P, _N, _N, _N, _F, _P, _I)),
    "mp_dryden_encode": (_N, (_P, _P, _P, _N, _N, _P, _P, _P)),
    "mp_dryden_encode_owed": (_N, (_P, _P, _P, _N, _N, _N, _N, *_KEY, _N, _P)),
    "mp_finite": (_I, (_P, _N)),
    "mp_finite_bytes": (_I, (_P, _N)),
    "mp_float_decode": (_N, (_P, _N, _I, _F, _P, _N, _I)),
    "mp_largest": (_F, (_P, _N)),
    "mp_limits": (None, (_N, _N)),
    "mp_onebit_decode": (_N, (_P, _N, _N, _N, _F, _P, _I)),
    "mp_onebit_encode": (_N, (_P, _P, _P, _N, _N, _P)),
    "mp_powersgd_decode": (_N, (_P, _P, _N, _F, _P)),
    "mp_powersgd_encode": (_N, (_P, _P, _N, _P, _P)),
    "mp_powersgd_learn": (_N, (_P, _P, _N, *_KEY, _P)),
    "mp_powersgd_project": (None, (_P, _P, _N, _P, _P)),
    "mp_randomk_decode": (_N, (_P, _N, *_KEY, _F, _P, _N)),
    "mp_randomk_encode": (None, (_P, _N, _N, _I, *_KEY, _P)),
    "mp_sign_decode": (_N, (_P, _N, _N, _F, _P, _N, _I)),
    "mp_sign_encode": (_N, (_P, _P, _P, _N, _N, _P)),
    "mp_strom_decode": (_N, (_P, _P, _N, _F, _F, _P, _N, _I)),
    "mp_strom_encode": (_N, (_P, _P, _P, _N, _F, _I, _P)),
    "mp_terngrad_decode": (_N, (_P, _P, _N, _I, _F, _P, _N, _I)),
    "mp_terngrad_encode": (None, (_P, _N, _F, _F, *_KEY, _N, _I, _P)),
    "mp_terngrad_level": (None, (_P, _N, c_double, _P)),
    "mp_threads": (_I, (_I,)),
    "mp_topk_select": (None, (_P, _N, _N, _F, _N, _P)),
    "mp_vectors": (_I, (_I,)),
    "mp_version": (_I, ()),
}


def _load():
    """The compiled library. Raises OSError where there is none that fits."""
    paths = [Path(__file__).with_name(f"_cpu{suffix}") for suffix in EXTENSION_SUFFIXES]
    if other := os.environ.get("MPICOMP_KERNELS_LIBRARY"):
        paths = [Path(other)]  # as tests/fuzz.py builds it, with sanitizers
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


lib = _load()


def _most_vectors():
    """The level that MPICOMP_VECTORS names, otherwise the best of this CPU. Raises SpecError."""
    best, wanted = lib.mp_vectors(len(LEVELS)), os.environ.get("MPICOMP_VECTORS") or None
    if wanted is not None and wanted not in LEVELS[:best + 1]:
        why = (f"{wanted} is not here" if wanted in LEVELS else "no such level")
        raise SpecError(f"MPICOMP_VECTORS={wanted}: {why}; this machine has "
                        f"{', '.join(LEVELS[:best + 1])}. Unset it for {LEVELS[best]}")
    return lib.mp_vectors(best if wanted is None else LEVELS.index(wanted))


LEVELS = ("none", "avx2", "avx512")
MOST_VECTORS = _most_vectors()  # of this process, as a place in LEVELS


def vectors(most=-1) -> int:
    """The vector instructions in use, as a place in LEVELS; 0 or more sets the most to be used."""
    return lib.mp_vectors(min(most, MOST_VECTORS))


def threads(count=0) -> int:
    """The number of threads that long arrays are split over; 1 or more sets it."""
    return lib.mp_threads(count)


def limits(grain=1 << 17, stream=1 << 20) -> None:
    """Elements that are worth a thread of their own, and from which on stores bypass the caches."""
    lib.mp_limits(grain, stream)


_wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
if _wanted.isdecimal():
    threads(min(int(_wanted), 1024))


# ---- arguments ----------------------------------------------------------------------------------


def or_reference(theirs):
    """Decorates a compiled function: a call that is Unfit goes to `theirs`, the reference's."""
    return otherwise(theirs, theirs)


def at(array, dtype, least, write=False):
    """The address of `array`, which must hold `least` or more elements of `dtype` side by side."""
    if array.dtype != dtype or array.size < least:
        raise Unfit()
    flags = array.flags
    if not (flags.c_contiguous and flags.aligned) or write and not flags.writeable:
        raise Unfit()
    return array.ctypes.data


def floats(array, size, write=False):
    """The address of a float32 array of exactly `size` elements."""
    if array.size != size:
        raise Unfit()
    return at(array, np.float32, size, write)


def payload(array, size, write=False):
    """The address of payload of exactly `size` bytes."""
    if array.size != size:
        raise Unfit()
    return at(array, np.uint8, size, write)


def all_payloads(payloads, size):
    """The addresses of one or more payloads of exactly `size` bytes each."""
    if not payloads:
        raise Unfit()
    return (c_void_p * len(payloads))(*[payload(data, size) for data in payloads])


def some_payloads(payloads, multiple):
    """(addresses, sizes) of one or more payloads whose sizes are multiples of `multiple`."""
    if not payloads or any(data.size % multiple for data in payloads):
        raise Unfit()
    return ((c_void_p * len(payloads))(*[at(data, np.uint8, 0) for data in payloads]),
            (c_int64 * len(payloads))(*[data.size for data in payloads]))


def philox_key(key):
    """What the compiled functions take for a philox.Key."""
    return key.seed & (2**64 - 1), key.rank & MASK32, key.step & MASK32, key.bucket & MASK32


def refused(result, function, *arguments):
    """`result`; where the compiled function refused a packet, the reference says why and raises."""
    if result < 0:
        function(*arguments)
        raise AssertionError(f"the reference's {function.__name__} accepts what cpu.cpp refuses")
    return result


def accepted(result) -> None:
    """Raise Unfit where the compiled function refused to fill an array that the reference can."""
    if result < 0:
        raise Unfit()
