"""The CUDA source compiles for the architectures that the NVRTC at hand accepts, without a GPU.

NVRTC comes with a CUDA toolkit, with torch's CUDA builds, or alone, as launch/test --cuda installs
it: pip install --no-deps nvidia-cuda-nvrtc (CUDA 13) or nvidia-cuda-nvrtc-cu12. By default one
architecture of each of four generations is tried; MPICOMP_ARCHITECTURES=all tries all.
"""

import ctypes
import os
import re
import sys
from pathlib import Path

import pytest

from mpicomp.kernels.gpu import device


def libraries():
    """Every libnvrtc in reach, by the name of its folder."""
    folders = [Path(p) / "nvidia" for p in sys.path if p]
    found = [lib for folder in folders for lib in folder.glob("*/lib/libnvrtc.so.*")]
    for root in filter(None, (os.environ.get("CUDA_HOME"), "/usr/local/cuda", "/opt/cuda")):
        found += Path(root).glob("lib64/libnvrtc.so")
    found += [Path(p) for p in os.environ.get("MPICOMP_NVRTC", "").split(os.pathsep) if p]
    return sorted({path for path in found if "alt" not in path.name and path.exists()})


LIBRARIES = libraries()
USUAL = {70, 75, 80, 90}  # CUDA 13 has dropped the first
pytestmark = pytest.mark.skipif(not LIBRARIES, reason="no libnvrtc: the CUDA source was not "
                                "compiled; type  launch/test --cuda  (downloads 218 MB)")


class Nvrtc:
    """One libnvrtc, called without a driver."""

    def __init__(self, path):
        for builtins in path.parent.glob("libnvrtc-builtins.so.*"):  # opened by name later
            if "alt" not in builtins.name:
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self.lib = ctypes.CDLL(str(path))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def _call(self, name, *arguments):
        status = getattr(self.lib, name)(*arguments)
        if status:
            explain = self.lib.nvrtcGetErrorString
            explain.restype = ctypes.c_char_p
            raise RuntimeError(f"{name}: {explain(status).decode()}")

    def architectures(self):
        """The numbers of all architectures that this NVRTC compiles for: 75, 80 ..."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return list(found)

    def compile(self, source, *options, result="CUBIN"):
        """The machine code, or PTX; RuntimeError with the compiler's log."""
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"gpu.cu", 0, None,
                   None)
        options = [*device.OPTIONS, *options]
        words = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
        try:
            self._call("nvrtcCompileProgram", program, len(options), words)
        except RuntimeError as error:
            self._call("nvrtcGetProgramLogSize", program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            self._call("nvrtcGetProgramLog", program, log)
            raise RuntimeError(f"{error}\n{log.value.decode()}") from None
        self._call(f"nvrtcGet{result}Size", program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{result}", program, code)
        self._call("nvrtcDestroyProgram", ctypes.byref(program))
        return code.raw


@pytest.fixture(params=LIBRARIES, ids=str)
def nvrtc(request):
    return Nvrtc(request.param)


def wanted():
    """(library, architecture) of every compilation to try."""
    for path in LIBRARIES:
        for number in Nvrtc(path).architectures():
            if number in USUAL or os.environ.get("MPICOMP_ARCHITECTURES") == "all":
                yield path, number


@pytest.mark.parametrize(("path", "number"), list(wanted()), ids=str)
def test_compiles(path, number):
    nvrtc = Nvrtc(path)
    code = nvrtc.compile(device.source(), f"--gpu-architecture=sm_{number}")
    for name in device.signatures():
        assert name.encode() in code, f"CUDA {nvrtc.version}, sm_{number}: {name} is missing"


def test_the_usual_architectures_are_known(nvrtc):
    assert {75, 80, 90} <= set(nvrtc.architectures())


def test_no_two_roundings_become_one(nvrtc):
    """No fused multiply-add, no approximations and no flushed subnormals in any kernel's PTX."""
    oldest = min(nvrtc.architectures())
    ptx = nvrtc.compile(device.source(), f"--gpu-architecture=compute_{oldest}", result="PTX")
    ptx = ptx.decode().strip("\0")
    assert not re.findall(r"\b(?:fma|mad)\.rn\S*|\S+\.(?:approx|ftz)\S*", ptx)
    assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx


def test_an_error_names_its_file_and_line(nvrtc):
    broken = device.source().replace("const float v = value(x, more, i), size = fabsf(v);",
                                     "const float v = valeu(x, more, i), size = fabsf(v);")
    with pytest.raises(RuntimeError, match=r'strom\.cuh\(\d+\): error: identifier "valeu"'):
        nvrtc.compile(broken, "--gpu-architecture=sm_80")


def test_signatures_are_read_from_the_source():
    signatures = device.signatures()
    assert signatures["dense_scale"] == [("float", True), ("float", False), ("float", True),
                                         ("i64", False), ("u32", True)]
    assert len(signatures) == device.source().count("KERNEL ") - 1  # and where it is defined
