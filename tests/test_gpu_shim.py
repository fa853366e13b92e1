"""The test of the tests: the shim tells a kernel that breaks the rules from one that does not.

Every barrier of the compaction, the scan and the selection is taken out in turn, and each time
some of the schedules give another result. Kernels made wrong on purpose are refused with a reason.
"""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
from shim import arrays
from shim.arrays import DeviceArray
from shim.device import COMPILER, KernelError, Shim

from mpicomp.kernels import gpu, reference
from mpicomp.kernels.gpu import device

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (c++, g++ or clang++): "
                                "the CUDA source cannot be run on the CPU")
FOLDER = device.FOLDER
FILES = ("common.cuh", "tiles.cuh", "select.cuh", "strom.cuh")
BARRIER = re.compile(r"^ *__syncthreads\(\);.*$", re.M)
SEEDS = range(0, 90, 15)

WRONG = """
KERNEL return_early(u32* out) {
    if (threadIdx.x == 7) return;
    __syncthreads();
    out[threadIdx.x] = 1;
}

KERNEL barrier_in_a_branch(u32* out) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    out[threadIdx.x] = 1;
}

KERNEL lane_left_out(u32* out) {
    if (lane() != 3) out[threadIdx.x] = __ballot_sync(FULL, 1);
}

KERNEL wrong_mask(u32* out) { out[threadIdx.x] = __ballot_sync(lane() < 16 ? FULL : 0xFFFFu, 1); }

KERNEL beyond_the_end(u32* out) { out[threadIdx.x + 1] = 1; }

KERNEL half_a_warp(u32* out) {
    if (lane() < 16) out[threadIdx.x] = __ballot_sync(0xFFFFu, lane() % 2);
    __syncthreads();
    if (lane() >= 16) out[threadIdx.x] = __shfl_xor_sync(0xFFFF0000u, threadIdx.x, 1);
}
"""
REASONS = {"return_early": "a thread left while others wait", "barrier_in_a_branch": "different",
           "lane_left_out": "a lane that does not come", "wrong_mask": "mask|different"}


def source(*texts):
    return "\n".join(text.replace("#pragma once", "") for text in texts)


@pytest.fixture(scope="module")
def wrong():
    """The source with the wrong kernels, and its device."""
    text = source((FOLDER / "common.cuh").read_text(), WRONG)
    return text, Shim(text)


@pytest.fixture
def run(wrong, monkeypatch):
    """Launches one of the wrong kernels in one block; returns what it wrote."""
    text, shim = wrong
    monkeypatch.setattr(device, "signatures", lambda: {
        name: [("u32", True)] for name in re.findall(r"KERNEL (\w+)", text)})

    def launch(name):
        out = DeviceArray.new(device.THREADS, np.uint32, fill=0)
        shim.launch(name, device.THREADS, out)
        return out.get()

    return launch


@pytest.mark.parametrize("name", REASONS)
def test_a_broken_rule_is_an_error(name, run):
    for _ in range(6):
        with pytest.raises(KernelError, match=REASONS[name]):
            run(name)


def test_a_write_beyond_the_end_is_found(run):
    run("beyond_the_end")
    with pytest.raises(AssertionError, match="outside"):
        arrays.check()
    arrays.LIVE.clear()


def test_a_mask_may_name_a_part_of_a_warp(run):
    for _ in range(6):
        out = run("half_a_warp").reshape(-1, 32)
        assert (out[:, :16] == 0xAAAA).all()
        assert (out[:, 16:].reshape(-1) == (np.arange(256).reshape(-1, 32)[:, 16:] ^ 1).reshape(-1)
                ).all()


def works(shim):
    """Do compaction, scan and selection give what the reference does, in several schedules?"""
    x = np.random.default_rng(3).standard_normal(9001, np.float32)
    expected = np.zeros(4 * x.size, np.uint8)
    used = reference.strom_encode(x, 0.7, True, expected)
    numbers = np.random.default_rng(4).integers(0, 9, 5000)
    for seed in SEEDS:
        shim.seed = seed
        data, counts = DeviceArray.new(4 * x.size, np.uint8), DeviceArray.of(numbers)
        total = DeviceArray.new(1, np.int64)
        shim.launch("scan_sums", device.THREADS, counts, counts.size, total)
        if (total.get()[0] != numbers.sum()
                or (counts.get() != np.cumsum(numbers) - numbers).any()
                or gpu.strom_encode(DeviceArray.of(x), 0.7, True, data) != used
                or (data.get()[:used] != expected[:used]).any()
                or float(gpu.dropping_cut(DeviceArray.of(x), 0.9, 0))
                != reference.dropping_cut(x, 0.9, 0)):
            return False
    return True


def check_source(path):
    """Exit with 0 where this source works and 1 where it does not: what a new process runs."""
    resource.setrlimit(resource.RLIMIT_CPU, (25, 25))  # garbage may be counted up to for ever
    try:
        fine = works(device.use(Shim(Path(path).read_text())))
    except (KernelError, IndexError):
        fine = False
    sys.exit(not fine)


def verdict(text, path):
    """The exit status of `check_source`; a missing barrier may well end the process."""
    path.write_text(text)
    code = f"import test_gpu_shim; test_gpu_shim.check_source({str(path)!r})"
    folders = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL,
                          env={**os.environ, "PYTHONPATH": folders}, timeout=ranks.JOB).returncode


def test_every_barrier_is_needed(tmp_path):
    text = source(*[(FOLDER / name).read_text() for name in FILES])
    barriers = list(BARRIER.finditer(text))
    assert len(barriers) == 6
    assert verdict(text, tmp_path / "whole.cu") == 0
    for number, barrier in enumerate(barriers):
        without = text[:barrier.start()] + text[barrier.end():]
        assert verdict(without, tmp_path / f"{number}.cu") != 0, text[:barrier.end()][-300:]
