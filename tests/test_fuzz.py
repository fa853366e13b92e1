"""Damaged packets, 2,000 of each compressor; see fuzz.py for the million and the sanitizers."""

import signal
import subprocess
import sys
from pathlib import Path

import fuzz
import material
import numpy as np
import pytest
from shim.device import COMPILER

from mpicomp import kernels
from mpicomp.compressors.registry import from_spec

MUTATIONS = 2_000


@pytest.mark.parametrize("name", sorted(material.registry()))
def test_damaged_packets_are_refused_or_finite_on_all_backends_alike(name):
    refused, decoded = fuzz.fuzz(name, MUTATIONS, list(kernels.backends()))
    assert refused + decoded >= MUTATIONS
    assert refused > MUTATIONS // 20 and decoded > MUTATIONS // 50  # the mutations are not blunt


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: the CUDA source cannot be run here")
@pytest.mark.parametrize("name", sorted(material.registry()))
def test_the_cuda_kernels_refuse_and_decode_the_same(name):
    backends = [*kernels.backends()][-1:] + ["shim"]
    refused, decoded = fuzz.fuzz(name, MUTATIONS, backends)
    assert refused + decoded >= MUTATIONS


@pytest.mark.parametrize("access", ["print(x[size])", "x[size] = 0"])
def test_behind_a_fence_nothing_is_read_or_written(access):
    """The test of what surrounds the arrays of the CUDA kernels."""
    program = (f"import ctypes, fuzz; size = 5; kept = fuzz.fenced(size); kept[:] = 1\n"
               f"x = (ctypes.c_ubyte * 9).from_address(kept.ctypes.data)\n"
               f"print(x[size - 1], flush=True)\n{access}")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          cwd=Path(fuzz.__file__).parent)
    assert done.returncode == -signal.SIGSEGV and done.stdout == "1\n", done.stderr


def test_damaged_headers_are_refused_or_in_range():
    refused, read = fuzz.fuzz_headers(MUTATIONS)
    assert refused > MUTATIONS // 20 and read > MUTATIONS // 20


def crooked(change):
    """A target whose compressor does something wrong in decode_add."""
    target = fuzz.Target(from_spec("dense"), material.LAYOUTS["vector of 7"], ["reference"], 0)
    inner = target.compressor.decode_add

    def decode_add(payload, out, *arguments):
        inner(payload, out, *arguments)
        change(target, payload, out)

    object.__setattr__(target.compressor, "decode_add", decode_add)
    return target


@pytest.mark.parametrize("change, words", [
    (lambda target, payload, out: out.__setitem__(2, np.nan), "NaN or Inf"),
    (lambda target, payload, out: payload.__setitem__(0, payload[0] ^ 1), "changed the payload"),
    (lambda target, payload, out: target.wide.__setitem__(-1, 1), "outside of the output")])
def test_the_fuzz_notices_a_decoder_that_is_wrong(change, words):
    target, rng = crooked(change), fuzz.random.Random(1)
    with pytest.raises(fuzz.Found, match=words):
        for _ in range(100):
            target.attack(rng)
