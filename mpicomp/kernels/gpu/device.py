"""The device: its memory, copies from and to the host, and launches of the kernels of gpu.cu.

`current()` is CuPy's device, made at the first call. Tests replace it (`use`) by one that runs the
same source on the CPU and has the methods of `Cupy`.
"""

import re
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

from mpicomp.errors import DeviceError

FOLDER = Path(__file__).parent / "src"
THREADS = 256  # of a block: THREADS in src/common.cuh
OPTIONS = ("--std=c++17", "--fmad=false")
_INCLUDE = re.compile(r'^#include "(.+)"$', re.M)
_KERNEL = re.compile(r"KERNEL (\w+)\(([^)]*)\)")
_SCALARS = {"int": np.int32, "u32": np.uint32, "i64": np.int64, "u64": np.uint64,
            "float": np.float32, "double": np.float64}
_BYTES = {"u8": 1, "u16": 2, "u32": 4, "int": 4, "float": 4, "i64": 8, "u64": 8, "double": 8}

_current = None


def current():
    """The device in use; the first call makes it. Raises DeviceError where there is none."""
    return _current or use(Cupy())


def use(device):
    """From now on kernels run on this device; None: on CuPy's, made when it is needed."""
    global _current
    _current = device
    return device


@cache
def source() -> str:
    """gpu.cu with its includes pasted in: one text, for a compiler that sees no files."""
    def pasted(found):
        name = found.group(1)
        text = (FOLDER / name).read_text().replace("#pragma once\n", "\n")
        return f'#line 1 "{name}"\n{text}'

    return _INCLUDE.sub(pasted, (FOLDER / "gpu.cu").read_text())


@cache
def signatures() -> dict:
    """{kernel: [(type, is a pointer), ...]}, read from the source."""
    found = {}
    for name, parameters in _KERNEL.findall(source()):
        words = [p.replace("const", " ").replace("*", " * ").split() for p in parameters.split(",")]
        found[name] = [(w[0], "*" in w) for w in words]
    return found


def address(array) -> int:
    """Where a device array lies."""
    memory = getattr(array, "data", None)  # CuPy's short way
    return array.__cuda_array_interface__["data"][0] if memory is None else memory.ptr


def arguments(name, given):
    """What a launch of `name` takes for these arguments: arrays as they are, numbers in its types.

    Raises TypeError for another number of arguments, or an array where a number is expected.
    """
    expected = signatures()[name]
    if len(given) != len(expected):
        raise TypeError(f"{name} takes {len(expected)} arguments, found {len(given)}")
    return [_argument(name, kind, pointer, value)
            for (kind, pointer), value in zip(expected, given)]


def _argument(name, kind, pointer, value):
    array = hasattr(value, "__cuda_array_interface__")
    if pointer and value is None:
        return np.uint64(0)
    if pointer != array:
        raise TypeError(f"{name} takes {kind} {'array' if pointer else 'number'}, found {value!r}")
    if not pointer:
        return _SCALARS[kind](value)
    if value.size and address(value) % _BYTES[kind]:
        raise ValueError(f"{name}: an array of {kind} begins at an odd address")
    return value


# ---- CuPy ---------------------------------------------------------------------------------------


class Cupy:
    """An NVIDIA GPU through CuPy. Launches go to CuPy's current stream of its current device.

    Raises DeviceError, which names what to install or do, where CuPy or the driver are missing.
    """

    def __init__(self):
        self.cupy = _import_cupy()
        self._functions, self._streams = {}, {}

    def empty(self, size, dtype):
        """A new array whose content is not defined."""
        return self._taken(self.cupy.empty, size, dtype)

    def zeros(self, size, dtype):
        """A new array of zeros."""
        return self._taken(self.cupy.zeros, size, dtype)

    def array(self, values):
        """A NumPy array's copy on the device."""
        out = self.empty(values.size, values.dtype)
        out.set(values)
        return out

    def host(self, array):
        """A device array's copy as a NumPy array; waits for what was launched before."""
        return array.get()

    # ---- between the device and page-locked memory ----

    @contextmanager
    def within(self, number, stream):
        """In this block CuPy works on GPU `number`, on the stream with this address."""
        cuda = self.cupy.cuda
        with cuda.Device(number), cuda.ExternalStream(stream, number):
            yield

    def share(self, tensor):
        """A flat torch tensor's memory as an array of CuPy's, without a copy."""
        return self.cupy.asarray(tensor.detach()) if tensor.numel() else \
            self.cupy.empty(0, np.float32)

    def pinned(self, size):
        """uint8[size] of page-locked host memory, zeros."""
        try:
            memory = self.cupy.cuda.alloc_pinned_memory(max(size, 1))
        except Exception as error:
            raise DeviceError(
                f"there are no {size:,} bytes of page-locked host memory ({error}): use a smaller "
                "bucket_bytes or fewer ranks on this host, or raise its limit (ulimit -l)"
            ) from error
        array = np.frombuffer(memory, np.uint8, size)
        array[:] = 0
        return array

    def mark(self):
        """An event whose `done` is true once everything launched before it has finished."""
        event = self.cupy.cuda.Event(disable_timing=True)
        event.record(self.cupy.cuda.get_current_stream())
        return event

    def leave(self, array, host):
        """Start copying a device array to pinned memory, after all launches so far; its event."""
        out, _ = self._sides()
        out.wait_event(self.mark())
        runtime = self.cupy.cuda.runtime
        runtime.memcpyAsync(host.ctypes.data, address(array), array.nbytes,
                            runtime.memcpyDeviceToHost, out.ptr)
        event = self.cupy.cuda.Event(disable_timing=True)
        event.record(out)
        return event

    def enter(self, host, array):
        """Start copying pinned memory to a device array, concurrently with launches: see `join`."""
        self._put(host, array, self._sides()[1])

    def join(self):
        """Launches from now on wait for all copies that `enter` started."""
        event = self.cupy.cuda.Event(disable_timing=True)
        event.record(self._sides()[1])
        self.cupy.cuda.get_current_stream().wait_event(event)

    def put(self, host, array):
        """Copy pinned memory to a device array, in order with launches."""
        self._put(host, array, self.cupy.cuda.get_current_stream())

    def _put(self, host, array, stream):
        runtime = self.cupy.cuda.runtime
        runtime.memcpyAsync(address(array), host.ctypes.data, array.nbytes,
                            runtime.memcpyHostToDevice, stream.ptr)

    def _sides(self):
        """The current GPU's streams for copies to the host and for copies from it."""
        number, cuda = self.cupy.cuda.runtime.getDevice(), self.cupy.cuda
        if number not in self._streams:
            self._streams[number] = cuda.Stream(non_blocking=True), cuda.Stream(non_blocking=True)
        return self._streams[number]

    # ---- kernels ----

    def launch(self, name, threads, *given):
        """Run a kernel with at least so many threads; nothing for 0."""
        blocks = -(-threads // THREADS)
        if blocks:
            self._function(name)((blocks,), (THREADS,), tuple(arguments(name, given)))

    def _taken(self, make, size, dtype):
        try:
            return make(size, dtype)
        except self.cupy.cuda.memory.OutOfMemoryError as error:
            raise DeviceError(
                f"the GPU has no memory left for {size * np.dtype(dtype).itemsize:,} bytes "
                f"({error}): use a smaller batch or bucket_bytes, fewer ranks on this GPU, or give "
                "back what torch holds with torch.cuda.empty_cache()") from error

    def _function(self, name):
        key = self.cupy.cuda.runtime.getDevice(), name
        if key not in self._functions:
            try:
                module = self.cupy.RawModule(code=source(), options=OPTIONS)
                self._functions |= {(key[0], n): module.get_function(n) for n in signatures()}
            except Exception as error:
                raise DeviceError(
                    f"the CUDA kernels cannot be compiled ({type(error).__name__}: {error}): CuPy "
                    f"{self.cupy.__version__} must fit the driver and CUDA; type  {_install()}"
                ) from error
        return self._functions[key]


def _import_cupy():
    try:
        import cupy
    except Exception as error:  # a CuPy for another CUDA fails in many ways
        what = "is not installed" if isinstance(error, ModuleNotFoundError) else \
            f"cannot be imported ({type(error).__name__}: {error})"
        raise DeviceError(f"gradients are on a GPU, and CuPy {what}: type  {_install()}") from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        raise DeviceError(f"CuPy {cupy.__version__} finds no usable driver ({error}): nvidia-smi "
                          "should list a GPU and a CUDA version at least as new as CuPy's; update "
                          f"the driver, or type  {_install()}") from error
    if not count:
        raise DeviceError("CuPy finds no GPU: nvidia-smi should list one; is CUDA_VISIBLE_DEVICES "
                          "empty, or did the job ask for none (srun --gpus-per-task=1)?")
    return cupy


def _install():
    """What to type for a CuPy that fits the CUDA of the torch that is loaded."""
    version = getattr(getattr(sys.modules.get("torch"), "version", None), "cuda", None)
    major = str(version or "13").split(".")[0]
    return f"pip install 'cupy-cuda{major if major in ('12', '13') else 13}x>=13'" + (
        "" if version else "  (or cupy-cuda12x: nvidia-smi names the driver's CUDA version)")
