"""The CUDA kernels, run on the CPU by tests/shim, give the bytes and floats of the reference.

The checks are those of the compiled CPU kernels (test_kernel_parity), at modest sizes: every
function, special values, payloads that nobody wrote, buffers at odd addresses with guards around
them. Threads and blocks run in shuffled order, and another one in every launch.
"""

import numpy as np
import pytest
import test_kernel_parity as parity
from shim import arrays
from shim.arrays import DeviceArray
from shim.device import COMPILER, Shim

from mpicomp.kernels import gpu, reference
from mpicomp.kernels.gpu import device

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (c++, g++ or clang++): "
                                "the CUDA source cannot be run on the CPU")
SIZES = (0, 1, 2, 7, 33, 257, 4099)
# In AdaComp a warp takes a bin, which may be a single element; in the others a block searches.
SMALL = dict.fromkeys(("adacomp", "chunks", "dropping", "dryden"), (0, 1, 33, 700))
MATRICES = ((1, 1), (1, 5), (33, 9), (1100, 3), (40, 60), (2051, 1))


@pytest.fixture
def shim():
    """A device whose kernels run on the CPU."""
    yield device.use(Shim())
    device.use(None)
    arrays.check()


class Copying:
    """The GPU's functions for NumPy arrays: copied there at the same odd address, and back."""

    def __getattr__(self, name):
        def call(*arguments):
            moved = [_there(a) for a in arguments]
            result = getattr(gpu, name)(*moved)
            for here, there in zip(arguments, moved):
                if isinstance(here, np.ndarray):
                    here[...] = there.get()
            return _back(result)

        return call


def _there(value):
    if type(value) in (list, tuple):
        return type(value)(map(_there, value))
    return DeviceArray.of(value, value.ctypes.data % 8) if isinstance(value, np.ndarray) else value


def _back(value):
    if isinstance(value, tuple):
        return tuple(map(_back, value))
    if isinstance(value, DeviceArray):
        return value.get() if value.shape else value.get()[()]
    return value


def less_damaged(data, rng):
    """The payload as it is, and with one byte that nobody wrote."""
    yield data
    if data.size:
        wrong = data.copy()
        wrong[rng.integers(0, data.size)] = rng.integers(0, 256)
        yield wrong


def check_5trit():
    for _, x, rng in parity.each_gradient():
        level, scale = reference.terngrad_scale(x, 2.5)
        for start in (0, 3):
            data = np.full(reference.terngrad_size(x.size, "5trit"), 255, np.uint8)
            data = parity.same("terngrad_encode_5trit", x, level, scale, parity.Key(1, 2, 3, 4),
                               start, data)
        if scale < 1e36:
            parity.packed(data, rng, scale, -0.25, x.size, name="terngrad_decode_add_5trit")


def check_cntk():
    for rows, columns, x, rng in matrices():
        data = parity.same("onebit_encode_cntk", x, rows, columns, payload(rows, columns))
        damaged(data, rng, rows, columns, 0.3, x.size, name="onebit_decode_add_cntk")
        parity.summed(data, rng, rows, columns, 0.3, x.size, name="onebit_decode_sum_cntk")


def check_threshold():
    for rows, columns, x, _ in matrices():
        for wire in ("means", "cntk"):
            parity.same("onebit_encode_mean", x, rows, columns, wire, payload(rows, columns))


def check_bits():
    for rows, columns in MATRICES:  # bounds and ranges are infinite, which decoding refuses
        x = np.random.default_rng(rows).uniform(-3e38, 3e38, rows * columns).astype(np.float32)
        for bits in (2, 4, 8):
            parity.same("onebit_encode_bits", x, rows, columns, bits, "means",
                        payload(rows, columns, bits))
    for rows, columns, x, rng in matrices():
        for bits in (2, 4, 8):
            for wire in ("means", "cntk"):
                data = payload(rows, columns, bits)
                data = parity.same("onebit_encode_bits", x, rows, columns, bits, wire, data)
                damaged(data, rng, rows, columns, bits, wire, -0.3, x.size,
                        name="onebit_decode_add_bits")
                parity.summed(data, rng, rows, columns, bits, wire, -0.3, x.size,
                              name="onebit_decode_sum_bits")


def check_signs():
    for _, x, rng in parity.each_gradient():
        for rate in (0.9, 0.0, 0.5):
            cut, means = reference.dropping_cut(x, rate, 0), np.zeros(2, np.float32)
            for start in (0, 11):
                parity.same("dropping_signs", x, cut, start, means, np.zeros(4 * x.size, np.uint8),
                            used=lambda count: 4 * count)
            data = np.zeros(4 * x.size, np.uint8)
            data = data[:4 * reference.dropping_signs(x, cut, 0, means, data)]
            starts = [0, 0, x.size // 3, x.size // 3, x.size // 2, x.size]
            pairs = rng.standard_normal(2 * len(starts), np.float32)
            parity.packed(data, rng, pairs, starts, 0.3, x.size, name="dropping_signs_decode_add")
            pairs[rng.integers(0, pairs.size)] = np.inf
            parity.packed(data, rng, pairs, starts, 0.3, x.size, name="dropping_signs_decode_add")


def matrices():
    """(rows, columns, x, rng) of each matrix and kind of gradient."""
    for rows, columns in MATRICES:
        for _, x, rng in parity.each_gradient([rows * columns]):
            yield rows, columns, x, rng


def payload(rows, columns, bits=1):
    return np.full(columns * (8 + 4 * -(-rows * bits // 32)), 255, np.uint8)


def damaged(data, rng, rows, columns, *arguments, name):
    """`parity.packed`, and with bounds of one column that meet, are far apart, or in disorder."""
    parity.packed(data, rng, rows, columns, *arguments, name=name)
    wire = arguments[1] if name == "onebit_decode_add_bits" else "cntk"
    for lower, upper in BOUNDS:
        wrong = data.copy()
        words = wrong.view(np.float32)
        column = rng.integers(0, columns)
        at = (column * (words.size // columns), 1) if wire == "cntk" else (column, columns)
        words[at[0]], words[at[0] + at[1]] = lower, upper
        parity.same(name, wrong, rows, columns, *arguments[:-1],
                    rng.choice(np.array([-0.0, 1], np.float32), arguments[-1]))


HOST = (parity.check_powersgd,)  # the reference serves it
BOUNDS = ((-0.0, 0.0), (1, 1), (0, 9e-37), (0, 2e-36), (-2e38, 2e38), (2, 1), (0, -np.inf),
          (np.inf, np.inf), (np.nan, 1), (0, np.inf), (-np.inf, 0))
CHECKS = {**parity.CHECKS, check_5trit: ["terngrad_encode_5trit", "terngrad_decode_add_5trit"],
          check_cntk: ["onebit_encode_cntk", "onebit_decode_add_cntk", "onebit_decode_sum_cntk"],
          check_threshold: ["onebit_encode_mean"],
          check_signs: ["dropping_signs", "dropping_signs_decode_add"],
          check_bits: ["onebit_encode_bits", "onebit_decode_add_bits", "onebit_decode_sum_bits"]}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_functions_agree(check, shim, monkeypatch):
    monkeypatch.setattr(parity, "cpu", Copying())
    sizes, every = SMALL.get(check.__name__[6:], SIZES), parity.each_gradient
    monkeypatch.setattr(parity, "SIZES", sizes)
    monkeypatch.setattr(parity, "each_gradient", lambda own=sizes: every(own))
    monkeypatch.setattr(parity, "MATRICES", MATRICES)
    monkeypatch.setattr(parity, "damaged", less_damaged)
    with np.errstate(all="ignore"):
        check()
    assert shim.launches or check in HOST
