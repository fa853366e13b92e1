"""The memory that buckets lie in: the host's, or that of the GPU on which the arrays are.

On a GPU a bucket is torch's memory that CuPy works on, without a copy, on torch's current stream.
"""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from mpicomp.errors import DeviceError, SpecError
from mpicomp.exchange import exchange as find
from mpicomp.kernels.gpu import device
from mpicomp.transport import probe, staging

F = TypeVar("F", bound=Callable[..., Any])
WAYS = ("auto", "host", "mirror", "direct")


class Host:
    """NumPy arrays. `note`: why arrays of a GPU come here, or None."""

    def __init__(self, note=None):
        self.note = note

    def bucket(self, size):
        """(array for kernels, the same as a torch tensor or None), float32[size] of zeros."""
        return np.zeros(size, np.float32), None

    def here(self):
        """The block in which kernels run that work on such arrays."""
        return nullcontext()

    again = here


class Gpu:
    """torch's memory on one GPU. Raises DeviceError, which names what to do, without CuPy."""

    note = None

    def __init__(self, torch_device):
        self.device, self._stream = torch_device, 0
        self._gpu = device.current()

    def bucket(self, size):
        """As of `Host`."""
        import torch

        try:
            flat = torch.zeros(size, dtype=torch.float32, device=self.device)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"the GPU has no memory left for a bucket of {4 * size:,} bytes "
                f"({str(error).splitlines()[0]}): use a smaller model or batch, or fewer ranks on "
                "this GPU") from error
        return self._gpu.share(flat), flat

    def here(self):
        """Kernels run on torch's current stream."""
        self._stream = self._current_stream()
        return self._gpu.within(self._number, self._stream)

    def again(self):
        """The same on the stream of the last `here`: for a thread, which has none of its own."""
        return self._gpu.within(self._number, self._stream)

    @property
    def _number(self):
        return self.device.index or 0

    def _current_stream(self):
        import torch

        return torch.cuda.current_stream(self.device).cuda_stream


class CupyGpu(Gpu):
    """CuPy's own memory, on CuPy's current stream: no torch."""

    def bucket(self, size):
        """As of `Host`."""
        return self._gpu.cupy.zeros(size, np.float32), None

    @property
    def _number(self):
        return int(self.device)

    def _current_stream(self):
        return self._gpu.cupy.cuda.get_current_stream().ptr


def is_on_gpu(array) -> bool:
    """Does it lie on a CUDA device?"""
    return getattr(array, "is_cuda", False) or _is_cupy(array)


def _is_cupy(array):
    return type(array).__module__.partition(".")[0] == "cupy"


def wanted() -> str:
    """What MPICOMP_STAGING says: auto, host, mirror or direct."""
    way = os.environ.get("MPICOMP_STAGING") or "auto"
    if way not in WAYS:
        raise SpecError(f"MPICOMP_STAGING={way} found, expected one of {', '.join(WAYS)}")
    return way


def of(named, exchange):
    """The memory for these (name, array) pairs under this exchange.

    Raises DeviceError where they are on a GPU and kernels cannot run there.
    """
    way = wanted()
    if not any(is_on_gpu(array) for _, array in named):
        return Host()
    devices = list(dict.fromkeys(array.device for _, array in named))
    if way == "host":
        return Host("gradients on a GPU are compressed in host memory (MPICOMP_STAGING=host)")
    if not find(exchange).on_device:
        return Host(f"gradients on a GPU are compressed in host memory: exchange={exchange} works "
                    "there")
    if len(devices) > 1:
        return Host("gradients are compressed in host memory: parameters are on several devices, "
                    + ", ".join(map(str, devices)))
    gpu = (CupyGpu if _is_cupy(named[0][1]) else Gpu)(devices[0])
    staging.use_direct(way == "direct" or way == "auto" and probe.direct())
    return gpu


def in_memory(method: F) -> F:
    """Decorates a method of an object with `memory`: kernels in it run where the arrays are."""
    @wraps(method)
    def call(self, *arguments, **keywords):
        with self.memory.here():
            return method(self, *arguments, **keywords)

    return call


def uncompiled(method: F) -> F:
    """Decorates a method that torch.compile must call as it is; without torch it is that itself."""
    apart = []

    @wraps(method)
    def call(*arguments, **keywords):
        if "torch" not in sys.modules:
            return method(*arguments, **keywords)
        if not apart:
            apart.append(sys.modules["torch"]._disable_dynamo(method))
        return apart[0](*arguments, **keywords)

    return call
