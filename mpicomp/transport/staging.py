"""Staging: what MPI is given in place of a device array, and how bytes get there and back.

An exchange makes the buffers of its MPI calls with `rooms`. For a gradient in host memory they are
NumPy arrays and the functions below do nothing. For one on a GPU they are `Room`s: the same bytes
on the device, where kernels read and write them, and in page-locked host memory, which MPI is
given. What kernels wrote goes out on a stream of its own, beside backward, with an event behind
it; the MPI call is made when that has come (`Later`). What arrives goes in on another stream.
Headers live on the host, and only bytes that are used cross over.

Where MPI takes device pointers (`use_direct`, see probe.py) it is given the device's side, and
only headers cross over. Reductions, and numbers that are agreed on, always use host memory.
"""

from contextlib import contextmanager, nullcontext
from functools import cached_property

import numpy as np

from mpicomp import kernels

_direct = False


def use_direct(direct) -> None:
    """Do rooms made from now on give MPI their device's side?"""
    global _direct
    _direct = bool(direct)


def _device():
    from mpicomp.kernels.gpu import device

    return device.current()


def _is_even(array) -> bool:
    """Does it begin where kernels can read numbers of four bytes?"""
    from mpicomp.kernels.gpu import device

    return not array.size or device.address(array) % 4 == 0


def is_device_array(array) -> bool:
    """Does it lie on a GPU?"""
    return hasattr(array, "__cuda_array_interface__")


class _Memory:
    """The two sides of a room and all its parts; each is taken when it is first used."""

    def __init__(self, size, direct, array=None):
        self.size, self.direct, self._array = size, direct, array
        self.event = None  # behind the last that left the device

    @cached_property
    def host(self):
        return _device().pinned(self.size)

    @cached_property
    def device(self):
        return _device().zeros(self.size, np.uint8) if self._array is None else self._array


class Room:
    """A part of a buffer of MPI's for a device array; slices and views as of a NumPy array.

    host    NumPy, page-locked        device  the same bytes on the GPU
    wire    the one of them that MPI is given
    Assignments copy on the wire's side.
    """

    def __init__(self, memory, start, stop, dtype=np.uint8):
        self.memory, self.start, self.stop, self.dtype = memory, start, stop, np.dtype(dtype)

    size = property(lambda self: (self.stop - self.start) // self.dtype.itemsize)
    nbytes = property(lambda self: self.stop - self.start)
    host = property(lambda self: self.memory.host[self.start:self.stop].view(self.dtype))
    device = property(lambda self: self.memory.device[self.start:self.stop].view(self.dtype))
    wire = property(lambda self: self.device if self.memory.direct else self.host)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        first, last, _ = index.indices(self.size)
        width = self.dtype.itemsize
        start = self.start + first * width
        return Room(self.memory, start, max(start, self.start + last * width), self.dtype)

    def __setitem__(self, index, value):
        part = self if index is Ellipsis else self[index]
        part.wire[...] = value.wire if isinstance(value, Room) else value

    def view(self, dtype):
        return Room(self.memory, self.start, self.stop, dtype)


def rooms(array, reduced=False):
    """zeros(size, dtype=float32) for MPI's buffers of an exchange on this array.

    `reduced`: MPI is to add or compare what is in them.
    """
    if not is_device_array(array):
        return kernels.of(array).zeros

    def zeros(size, dtype=np.float32):
        dtype = np.dtype(dtype)
        size *= dtype.itemsize
        return Room(_Memory(size, _direct and not reduced), 0, size, dtype)

    return zeros


def mirror(array):
    """An array of kernels as MPI's buffer for a reduction: itself, or a room around it."""
    if not is_device_array(array):
        return array
    memory = _Memory(array.nbytes, False, array.view(np.uint8))
    return Room(memory, 0, array.nbytes, array.dtype)


def device(buffer):
    """The side of a buffer that kernels work on."""
    return buffer.device if isinstance(buffer, Room) else buffer


def host(buffer):
    """The side of a buffer that the host writes headers to, and finds them with mirrors."""
    return buffer.host if isinstance(buffer, Room) else buffer


def leave(buffer, head=0, used=None) -> None:
    """A packet is written: `head` bytes on the host, and `used` (all) behind them by kernels.

    MPI calls made with the buffer from now on wait until it is where MPI will look.
    """
    if not isinstance(buffer, Room):
        return
    memory, payload = buffer.memory, buffer.view(np.uint8)[head:]
    payload = payload if used is None else payload[:used]
    if memory.direct:
        if head:
            front = buffer.view(np.uint8)[:head]
            _device().put(front.host, front.device)
        memory.event = _device().mark()
    elif payload.size:
        memory.event = _device().leave(payload.device, payload.host)


def read(buffer):
    """What has arrived in a buffer, for the host to read: headers."""
    if isinstance(buffer, Room):
        return _device().host(buffer.device) if buffer.memory.direct else buffer.host
    return buffer


def arrive(buffer, now=False):
    """What has arrived in a buffer, for kernels to read `decoding`; with `now`, at once."""
    if not isinstance(buffer, Room):
        return buffer
    target, direct = buffer.device, buffer.memory.direct
    if not _is_even(target):  # behind another packet: new memory, which only this stream may use
        target, now = _device().empty(buffer.size, buffer.dtype), True
        if direct:
            target[...] = buffer.device
    if not direct and buffer.size:
        (_device().put if now else _device().enter)(buffer.host, target)
    return target


@contextmanager
def decoding(array):
    """In this block kernels find what has arrived; wrong packets are told at its end."""
    if not is_device_array(array):
        yield
        return
    _device().join()
    with kernels.of(array).deferred():
        yield


def encoding(array):
    """A block in which kernels look at faults once, at its end."""
    return kernels.of(array).deferred() if is_device_array(array) else nullcontext()


def fetched(array):
    """The array in host memory: a copy of a device array, or itself."""
    return _device().host(array) if is_device_array(array) else array


def fitting(values, array):
    """NumPy values in the kind of memory that `array` has."""
    if is_device_array(array) and not is_device_array(values):
        return _device().array(np.ascontiguousarray(values))
    return values


class Later:
    """An MPI call that is made when its packet has left the device; then as its request."""

    def __init__(self, event, call=lambda: None):
        self._event, self._call, self._posted, self._request = event, call, False, None

    @property
    def ready(self) -> bool:
        """May `post` be called?"""
        return self._event is None or self._event.done

    def post(self):
        self._request, self._posted = self._call(), True

    def Test(self) -> bool:
        return self._posted and (self._request is None or self._request.Test())


def departure(buffer) -> list:
    """[what to wait for until the packet in a buffer has left the device], if there is such."""
    return [Later(buffer.memory.event)] if isinstance(buffer, Room) else []


def call(function, sent, *buffers):
    """function(*the buffers as MPI takes them), at once or `Later`.

    `sent` is the buffer that the call sends from, None for a receive. Lists in `buffers` are
    MPI's messages, whose first part is a buffer.
    """
    def real(part):
        if isinstance(part, list):
            return [real(part[0]), *part[1:]]
        return part.wire if isinstance(part, Room) else part

    parts = [part[0] if isinstance(part, list) else part for part in buffers]
    if not any(isinstance(part, Room) for part in parts):
        return function(*buffers)
    event = sent.memory.event if isinstance(sent, Room) else None
    return Later(event, lambda: function(*map(real, buffers)))
