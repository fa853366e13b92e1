"""Arguments of launches: arrays that fit, tables of addresses, faults, and the host in their place.

A function that has no kernel, or a call that does not fit one, is served by the host: arrays are
copied there, the reference works on them, and what it wrote is copied back.
"""

from contextlib import contextmanager
from functools import wraps

import numpy as np

from mpicomp.kernels.gpu import device
from mpicomp.kernels.unfit import Unfit, otherwise
from mpicomp.philox import MASK32

_tables = {}  # content of a small device array: that array
_deferred = None  # (fault, complain) of the block `deferred`


def is_device_array(value) -> bool:
    """Does it lie on a device?"""
    return hasattr(value, "__cuda_array_interface__")


def floats(array, size=None):
    """The array, which must be float32 side by side, `size` of them where that is given.

    Floats in a payload may begin at an odd address: the host takes those.
    """
    if not is_device_array(array) or array.dtype != np.float32 or not array.flags.c_contiguous:
        raise Unfit()
    if size is not None and array.size != size or array.size and device.address(array) % 4:
        raise Unfit()
    return array


def payload(array, width, size=None):
    """Payload bytes (`size`, where given) for reading numbers of `width` bytes: moved if odd."""
    if not is_device_array(array) or array.dtype != np.uint8 or not array.flags.c_contiguous:
        raise Unfit()
    if array.size % width or size is not None and array.size != size:
        raise Unfit()
    if array.size and device.address(array) % width:
        moved = device.current().empty(array.size, np.uint8)
        moved[...] = array
        return moved
    return array


def anywhere(array):
    """A few floats of a payload, flat: moved if they begin at an odd address."""
    if array.dtype != np.float32:
        raise Unfit()
    return payload(array.reshape(-1).view(np.uint8), 4).view(np.float32)


@contextmanager
def room(array, width, size):
    """The first `size` bytes of a buffer for writing numbers of `width` bytes."""
    if not is_device_array(array) or array.dtype != np.uint8 or array.size < size:
        raise Unfit()
    if not array.flags.c_contiguous:
        raise Unfit()
    array = array[:size]
    if not size or device.address(array) % width == 0:
        yield array
        return
    moved = device.current().empty(size, np.uint8)
    moved[...] = array
    yield moved
    array[...] = moved


def scalar(value):
    """A float32 as an array of one on the device; one that is there is moved only where odd."""
    if is_device_array(value):
        return floats(anywhere(value), 1)
    return device.current().array(np.array([value], np.float32))


def table(arrays):
    """The addresses of these arrays as a device array, kept for the next step's call."""
    return constants(np.array([device.address(a) if a.size else 0 for a in arrays], np.uint64))


def constants(content):
    """A small array on the device, kept for the next step's call."""
    key = id(device.current()), content.dtype.str, content.tobytes()
    if key not in _tables:
        if len(_tables) > 4096:
            _tables.clear()
        _tables[key] = device.current().array(content)
    return _tables[key]


def philox_key(key):
    """What kernels take for a philox.Key."""
    return (key.bucket & MASK32, key.step & MASK32, key.rank & MASK32, key.seed & MASK32,
            key.seed >> 32 & MASK32)


# ---- faults -------------------------------------------------------------------------------------


def new_fault():
    """A word for kernels to set where they find what no encoder wrote."""
    return device.current().zeros(1, np.uint32)


def checked(fault, complain) -> None:
    """Where `fault` was set, complain(): the reference, on the host's copies, says what is wrong.

    Reads it back now or, in a block `deferred`, with all others at its end.
    """
    if _deferred is not None:
        _deferred.append((fault, complain))
    elif device.current().host(fault)[0]:
        _raise(complain)


@contextmanager
def deferred():
    """In this block faults are not looked at; at its end all are, with one copy."""
    global _deferred
    outer, _deferred = _deferred, []
    try:
        yield
        pending = _deferred
    finally:
        _deferred = outer
    if outer is not None:
        outer.extend(pending)
    elif pending:
        every = device.current().empty(len(pending), np.uint32)
        for number, (fault, _) in enumerate(pending):
            every[number:number + 1] = fault
        for bad, (_, complain) in zip(device.current().host(every), pending):
            if bad:
                _raise(complain)


def _raise(complain):
    complain()
    raise AssertionError("the reference accepts what the kernels of gpu.cu refuse")


def refusal(function, *arguments):
    """A function for `checked` that calls this one of the reference with the host's copies."""
    def complain():
        with np.errstate(all="ignore"):
            function(*[_to_host(a) for a in arguments])

    return complain


def refusals(decode_add, payloads, out):
    """The same for decode_add(number, payload, out) of each payload."""
    def complain():
        with np.errstate(all="ignore"):
            for number, data in enumerate(payloads):
                decode_add(number, _to_host(data), np.zeros(out.size, np.float32))

    return complain


# ---- the host in a kernel's place ---------------------------------------------------------------


def _to_host(value):
    return device.current().host(value) if is_device_array(value) else value


def on_host(theirs):
    """The reference's function `theirs` for device arrays, by way of copies in host memory."""
    @wraps(theirs)
    def call(*arguments, **keywords):
        copies = [_to_host(a) for a in arguments]
        before = [c.copy() if isinstance(c, np.ndarray) else None for c in copies]
        result = theirs(*copies, **keywords)
        for argument, copy, old in zip(arguments, copies, before):
            if is_device_array(argument) and copy.tobytes() != old.tobytes():
                argument[...] = device.current().array(copy).reshape(argument.shape)
        if isinstance(result, tuple):
            return tuple(_to_device(part) for part in result)
        return _to_device(result)

    return call


def _to_device(value):
    return device.current().array(value) if isinstance(value, np.ndarray) else value


def or_host(theirs):
    """Decorates a function of device arrays: a call that is Unfit goes to `on_host(theirs)`."""
    return otherwise(theirs, on_host(theirs))
