"""Builds gpu.cu with shim.h by the C++ compiler, and launches its kernels as `gpu.device` asks."""

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np

from mpicomp.kernels.gpu import device
from shim.arrays import DeviceArray

SHIM = Path(__file__).with_name("shim.h")
OPTIONS = ("-std=c++17", "-O1", "-g0", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno",
           "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Wno-attributes")
TYPES = {"u8": "unsigned char", "u16": "unsigned short", "u32": "unsigned", "i64": "long long",
         "u64": "unsigned long long"}
TURN = threading.Lock()  # one launch at a time: fibers and shared memory are the library's
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


class KernelError(AssertionError):
    """A kernel broke the rules of barriers and warps."""


def parameters(source):
    """{kernel: its parameters as text} of a CUDA source."""
    return dict(re.findall(r"KERNEL (\w+)\(([^)]*)\)", source))


def entry(name, text):
    """C++ that runs one kernel over all its blocks."""
    words = [p.replace("const", " ").replace("*", " * ").split() for p in text.split(",")]
    kinds = [(TYPES.get(w[0], w[0]) + (" *" if "*" in w else ""), w[-1]) for w in words]
    declared = "".join(f", {kind} {n}" for kind, n in kinds)
    members = " ".join(f"{kind} {n};" for kind, n in kinds)
    return f"""
namespace {{ struct {name}_arguments {{ {members} }}; }}
extern "C" const char* shim_{name}(long long blocks, int threads,
                                  unsigned long long seed{declared}) {{
    {name}_arguments given{{{", ".join(n for _, n in kinds)}}};
    return shim::run(blocks, threads, seed, [](void* all) {{
        auto& a = *static_cast<{name}_arguments*>(all);
        {name}({", ".join("a." + n for _, n in kinds)});
    }}, &given);
}}
"""


def build(source):
    """The library of this CUDA source, from the cache where it was built before."""
    text = f'#include "{SHIM}"\n{source}\n' + "".join(
        entry(name, text) for name, text in parameters(source).items())
    key = hashlib.blake2b((text + SHIM.read_text() + " ".join(OPTIONS)).encode(), digest_size=12)
    folder = Path(tempfile.gettempdir()) / f"mpicomp-shim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{key.hexdigest()}.so"
    with open(folder / "lock", "w") as lock:  # one process builds, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            compile_into(library, text)
    return ctypes.CDLL(str(library))


def compile_into(library, text):
    """Build this C++ as a library; the file is there when it is whole."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        code, built = Path(scratch) / "kernels.cpp", Path(scratch) / "kernels.so"
        code.write_text(text)
        done = subprocess.run([COMPILER, *OPTIONS, str(code), "-o", str(built)], text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stderr[-4000:]
        os.replace(built, library)


class Shim:
    """A device whose threads are fibers; `seed` shuffles them. See mpicomp.kernels.gpu.device."""

    def __init__(self, source=None, seed=0):
        self.library, self.seed, self.launches = build(source or device.source()), seed, []

    def empty(self, size, dtype):
        return DeviceArray.new(size, dtype)

    def zeros(self, size, dtype):
        return DeviceArray.new(size, dtype, fill=0)

    def array(self, values):
        return DeviceArray.of(values)

    def host(self, array):
        return array.get()

    def launch(self, name, threads, *given):
        blocks = -(-threads // device.THREADS)
        values = device.arguments(name, given)
        self.launches.append(name)
        if blocks:
            self.run(name, blocks, values)

    def run(self, name, blocks, values):
        """A launch of so many blocks, with arguments in the kernel's types."""
        function = getattr(self.library, f"shim_{name}")
        function.restype = ctypes.c_char_p
        self.seed += 1
        with TURN:
            wrong = function(ctypes.c_longlong(blocks), device.THREADS,
                             ctypes.c_ulonglong(self.seed), *[_passed(value) for value in values])
        if wrong:
            raise KernelError(f"{name}: {wrong.decode()}")


_NUMBERS = {np.int32: ctypes.c_int, np.uint32: ctypes.c_uint, np.int64: ctypes.c_longlong,
            np.uint64: ctypes.c_ulonglong, np.float32: ctypes.c_float, np.float64: ctypes.c_double}


def _passed(value):
    if isinstance(value, DeviceArray):
        return ctypes.c_void_p(device.address(value))
    return _NUMBERS[type(value)](value.item())
