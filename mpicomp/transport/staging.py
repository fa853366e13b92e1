"""Staging: copies packets between a GPU and the host memory that MPI sends from and receives into.

An exchange makes the buffers of its MPI calls with `buffers_for`. For a gradient in host memory
they are NumPy arrays, and the functions below do nothing. For one on a GPU they are
`MirroredBuffer`s: the same bytes twice, on the device for the kernels and in page-locked host
memory for MPI. A packet is copied to the host on a stream of its own, during backward, followed by
an event; the MPI call is made when the event has completed (`DeferredCall`). What arrives is copied
to the device on a third stream. Headers stay on the host, and only used bytes are copied.

If MPI takes device pointers (`use_direct`, see probe.py), it gets the device's side, and only
headers are copied. Reductions, and numbers that ranks agree on, always use host memory.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np

from mpicomp import kernels

_direct = False


def use_direct(direct) -> None:
    """Choose whether buffers made from now on give MPI their device's side."""
    global _direct
    _direct = bool(direct)


def _device():
    from mpicomp.kernels.gpu import device

    return device.current()


def _is_even(array) -> bool:
    """Is its address a multiple of 4, as kernels that read words need?"""
    from mpicomp.kernels.gpu import device

    return not array.size or device.address(array) % 4 == 0


def is_device_array(array) -> bool:
    """Is it in the memory of a GPU?"""
    return hasattr(array, "__cuda_array_interface__")


class _Memory:
    """Both sides of a MirroredBuffer and its slices; each is allocated when first used."""

    def __init__(self, size, direct, array=None):
        self.size, self.direct, self._array = size, direct, array
        self.event = None  # follows the last copy to the host

    @cached_property
    def host(self):
        return _device().pinned(self.size)

    @cached_property
    def device(self):
        if self._array is not None:
            return self._array
        made = _device().zeros(self.size, np.uint8)
        _device().mark().synchronize()  # other streams and MPI write here: after the zeros
        return made


class MirroredBuffer:
    """A buffer for MPI and for kernels on a device; has slices and views as a NumPy array has.

    host        NumPy, page-locked
    device      the same bytes on the GPU
    for_mpi     the one of them that MPI gets; assignments write to it
    """

    def __init__(self, memory, start, stop, dtype=np.uint8):
        self.memory, self.start, self.stop, self.dtype = memory, start, stop, np.dtype(dtype)

    size = property(lambda self: (self.stop - self.start) // self.dtype.itemsize)
    nbytes = property(lambda self: self.stop - self.start)
    host = property(lambda self: self.memory.host[self.start:self.stop].view(self.dtype))
    device = property(lambda self: self.memory.device[self.start:self.stop].view(self.dtype))
    for_mpi = property(lambda self: self.device if self.memory.direct else self.host)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        first, last, _ = index.indices(self.size)
        width = self.dtype.itemsize
        start = self.start + first * width
        return MirroredBuffer(self.memory, start, max(start, self.start + last * width), self.dtype)

    def __setitem__(self, index, value):
        part = self if index is Ellipsis else self[index]
        part.for_mpi[...] = value.for_mpi if isinstance(value, MirroredBuffer) else value

    def view(self, dtype):
        return MirroredBuffer(self.memory, self.start, self.stop, dtype)


def buffers_for(array: Any, reduced: bool = False) -> Callable[..., Any]:
    """A function zeros(size, dtype=float32) that makes MPI's buffers for an exchange of `array`.

    `reduced`: the buffers are for reductions, which need host memory.
    """
    if not is_device_array(array):
        return kernels.of(array).zeros

    def zeros(size, dtype=np.float32):
        dtype = np.dtype(dtype)
        size *= dtype.itemsize
        return MirroredBuffer(_Memory(size, _direct and not reduced), 0, size, dtype)

    return zeros


def mirror(array: Any) -> Any:
    """A buffer for MPI's reduction of `array`: itself, or a MirroredBuffer around it."""
    if not is_device_array(array):
        return array
    memory = _Memory(array.nbytes, False, array.view(np.uint8))
    return MirroredBuffer(memory, 0, array.nbytes, array.dtype)


def device(buffer: Any) -> Any:
    """The kernels' view of a buffer."""
    return buffer.device if isinstance(buffer, MirroredBuffer) else buffer


def host(buffer: Any) -> Any:
    """The host view of a buffer; headers are written here."""
    return buffer.host if isinstance(buffer, MirroredBuffer) else buffer


def leave(buffer: Any, head: int = 0, used: int | None = None) -> None:
    """Start copying a finished packet to the host: the first `head` bytes are already there,
    `used` bytes (default: all) follow on the device.

    MPI calls made with the buffer from now on wait for the copy.
    """
    if not isinstance(buffer, MirroredBuffer):
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


def read(buffer: Any) -> Any:
    """Received bytes for the host to read, such as headers."""
    if isinstance(buffer, MirroredBuffer):
        return _device().host(buffer.device) if buffer.memory.direct else buffer.host
    return buffer


def arrive(buffer: Any, now: bool = False) -> Any:
    """Received bytes for kernels to read in a `decoding` block, or with `now` at once."""
    if not isinstance(buffer, MirroredBuffer):
        return buffer
    target, direct = buffer.device, buffer.memory.direct
    if not _is_even(target):  # behind a packet of odd length: new memory, for this stream only
        target, now = _device().empty(buffer.size, buffer.dtype), True
        if direct:
            target[...] = buffer.device
    if not direct and buffer.size:
        (_device().put if now else _device().enter)(buffer.host, target)
    return target


@contextmanager
def decoding(array: Any) -> Iterator[None]:
    """Wait for received bytes before decoding; raise PacketError on exit if a kernel found a bad
    packet."""
    if not is_device_array(array):
        yield
        return
    _device().join()
    with kernels.of(array).deferred():
        yield


def encoding(array: Any) -> AbstractContextManager[None]:
    """A block at whose end errors of kernels are looked at once."""
    return kernels.of(array).deferred() if is_device_array(array) else nullcontext()


def fetched(array: Any) -> Any:
    """The array in host memory: a copy of a device array, or itself."""
    return _device().host(array) if is_device_array(array) else array


def fitting(values: Any, array: Any) -> Any:
    """The values on the device if `array` is there, else as they are."""
    if is_device_array(array) and not is_device_array(values):
        return _device().array(np.ascontiguousarray(values))
    return values


class DeferredCall:
    """An MPI call that waits until its packet has left the device; after that, its request."""

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


def departure(buffer: Any) -> list[Any]:
    """Requests that complete when the packet in a buffer has left the device; [] for the host's."""
    return [DeferredCall(buffer.memory.event)] if isinstance(buffer, MirroredBuffer) else []


def call(function, sent, *buffers):
    """function(*buffers) with the sides that MPI gets; returns its request, or a DeferredCall.

    `sent` is the buffer that the call sends from, None for a receive. A list in `buffers` is a
    message specification of MPI's, whose first part is a buffer.
    """
    def real(part):
        if isinstance(part, list):
            return [real(part[0]), *part[1:]]
        return part.for_mpi if isinstance(part, MirroredBuffer) else part

    parts = [part[0] if isinstance(part, list) else part for part in buffers]
    if not any(isinstance(part, MirroredBuffer) for part in parts):
        return function(*buffers)
    event = sent.memory.event if isinstance(sent, MirroredBuffer) else None
    return DeferredCall(event, lambda: function(*map(real, buffers)))
