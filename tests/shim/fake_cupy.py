"""A module that stands for CuPy, for tests of what is built on it, without a GPU.

Arrays are those of arrays.py, kernels run in the shim, and streams are as lazy as CUDA allows: what
is put on any but torch's own is done only when somebody asks an event behind it for the third time,
or makes torch's stream wait for it. So whoever does not wait sends, or decodes, what lay there
before. Kernels must run on torch's stream (TORCH_STREAM) of the parameters' GPU.
"""

import ctypes
import threading
from types import ModuleType, SimpleNamespace

import numpy as np

from shim.arrays import DeviceArray
from shim.device import Shim

TORCH_STREAM = 777
LOOKS = 3  # at an event before it is done


class Stream:
    """A queue of copies. `eager`: what is put on it is done at once, as torch's."""

    def __init__(self, eager=False):
        self.eager, self.queue, self.finished, self.ptr = eager, [], 0, id(self)

    def put(self, work):
        self.queue.append(work)
        if self.eager:
            self.run(len(self.queue))

    def run(self, position):
        """Do everything up to a position in the queue."""
        while self.finished < position:
            self.queue[self.finished]()
            self.queue[self.finished] = None
            self.finished += 1

    def wait_event(self, event):
        self.put(event.synchronize)


class Event:
    def __init__(self, disable_timing=False):
        self.looks = 0

    def record(self, stream):
        self.stream, self.position = stream, len(stream.queue)

    @property
    def done(self):
        self.looks += 1
        if self.looks >= LOOKS:
            self.synchronize()
        return self.stream.finished >= self.position

    def synchronize(self):
        self.stream.run(self.position)


class FakeCupy(ModuleType):
    """The module. `out` and `into` count the bytes of memcpyAsync; `launches` names kernels."""

    __version__ = "0"

    def __init__(self):
        super().__init__("cupy")
        self.shim, self.launches, self.out, self.into = Shim(), [], 0, 0
        self.here = threading.local()
        self.torch_stream = Stream(eager=True)
        self.torch_stream.ptr = TORCH_STREAM
        self.streams = {TORCH_STREAM: self.torch_stream}
        self.cuda = SimpleNamespace(
            Device=self._device, ExternalStream=self._external, Stream=self._new_stream,
            Event=Event, get_current_stream=self.current, alloc_pinned_memory=self._pinned,
            memory=SimpleNamespace(OutOfMemoryError=MemoryError),
            runtime=SimpleNamespace(
                getDeviceCount=lambda: 2, getDevice=lambda: getattr(self.here, "device", 0),
                memcpyAsync=self._copy, memcpyDeviceToHost=2, memcpyHostToDevice=1))

    # ---- arrays

    def empty(self, size, dtype):
        return DeviceArray.new(size, dtype)

    def zeros(self, size, dtype):
        return DeviceArray.new(size, dtype, fill=0)

    def asarray(self, tensor):
        return DeviceArray(tensor.numpy())

    def RawModule(self, code, options):
        assert "--fmad=false" in options
        return SimpleNamespace(get_function=lambda name: lambda grid, block, given:
                               self._launch(name, grid, given))

    def _launch(self, name, grid, given):
        assert self.current() is self.torch_stream, f"{name} is not launched on torch's stream"
        self.launches.append(name)
        self.shim.run(name, grid[0], given)

    # ---- streams

    def current(self):
        stack = getattr(self.here, "stack", [])
        assert stack, "CuPy is used outside of the block that says on which stream"
        return stack[-1]

    def _new_stream(self, non_blocking):
        assert non_blocking
        stream = Stream()
        self.streams[stream.ptr] = stream
        return stream

    def _device(self, number):
        return _Entered(self.here, "devices", number)

    def _external(self, ptr, number):
        return _Entered(self.here, "stack", self.streams[ptr])

    def _copy(self, target, source, size, kind, stream):
        if kind == 2:
            self.out += size
        else:
            assert kind == 1
            self.into += size
        self.streams[stream].put(lambda: ctypes.memmove(target, source, size))

    def _pinned(self, size):
        return bytearray(np.full(size, 0xA5, np.uint8).tobytes())


class _Entered:
    """A block in which a thread's list has one entry more."""

    def __init__(self, here, name, value):
        self.here, self.name, self.value = here, name, value

    def __enter__(self):
        vars(self.here).setdefault(self.name, []).append(self.value)

    def __exit__(self, *_):
        vars(self.here)[self.name].pop()
