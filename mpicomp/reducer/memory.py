"""Where gradients are while they are exchanged: in host memory, or on the GPU of their parameters.

On a GPU a bucket is torch's memory that CuPy works on, without a copy, on torch's current stream.
"""

import os
from contextlib import nullcontext
from functools import wraps

import numpy as np
import torch

from mpicomp.errors import DeviceError, SpecError
from mpicomp.exchange import exchange as find
from mpicomp.kernels.gpu import device
from mpicomp.transport import probe, staging

WAYS = ("auto", "host", "mirror", "direct")


class Host:
    """NumPy arrays. `note`: why gradients of a GPU come here, or None."""

    device, way = torch.device("cpu"), "host"

    def __init__(self, note=None):
        self.note = note

    def bucket(self, size):
        """(array for kernels, torch tensor), float32[size] of zeros, the same memory."""
        array = np.zeros(size, np.float32)
        return array, torch.from_numpy(array)

    def here(self):
        """The block in which kernels run that work on such arrays."""
        return nullcontext()

    again = here


class Gpu:
    """Arrays on one GPU. Raises DeviceError, which names what to install or do, without CuPy."""

    note = None

    def __init__(self, torch_device):
        self.device, self._stream = torch_device, 0
        self._gpu = device.current()

    def bucket(self, size):
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
        return self._gpu.within(self.device.index or 0, self._stream)

    def again(self):
        """The same on the stream of the last `here`: for a thread, which has none of its own."""
        return self._gpu.within(self.device.index or 0, self._stream)

    def _current_stream(self):
        return torch.cuda.current_stream(self.device).cuda_stream


def is_on_gpu(parameter) -> bool:
    """Does it lie on a CUDA device?"""
    return parameter.is_cuda


def wanted() -> str:
    """What MPICOMP_STAGING says: auto, host, mirror or direct."""
    way = os.environ.get("MPICOMP_STAGING") or "auto"
    if way not in WAYS:
        raise SpecError(f"MPICOMP_STAGING={way} found, expected one of {', '.join(WAYS)}")
    return way


def of(named, exchange):
    """The place for the gradients of these (name, parameter) pairs under this exchange.

    Raises DeviceError where they are on a GPU and kernels cannot run there.
    """
    way = wanted()
    devices = list(dict.fromkeys(p.device for _, p in named))
    if not any(is_on_gpu(p) for _, p in named):
        return Host()
    if way == "host":
        return Host("gradients on a GPU are compressed in host memory (MPICOMP_STAGING=host)")
    if not find(exchange).on_device:
        return Host(f"gradients on a GPU are compressed in host memory: exchange={exchange} works "
                    "there")
    if len(devices) > 1:
        return Host("gradients are compressed in host memory: parameters are on several devices, "
                    + ", ".join(map(str, devices)))
    gpu = Gpu(devices[0])
    staging.use_direct(way == "direct" or way == "auto" and probe.direct())
    return gpu


def on_place(method):
    """Decorates a method of an object with `_place`: kernels in it run there, uncompiled."""
    @wraps(method)
    def call(self, *arguments, **keywords):
        with self._place.here():
            return method(self, *arguments, **keywords)

    return torch.compiler.disable(call)  # no graph can hold an exchange
