"""The compiled kernels give the bytes and floats of the reference, to the bit.

Every function that is compiled, fused ones included, is called with the arguments of the
reference's: over sizes, seeds, special values and payloads that nobody wrote, with every level of
vector instructions that this CPU has, in one thread and in several. Whole compressors follow, over
layouts. Buffers have guards on both sides and begin at odd addresses.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType

import levels
import material
import numpy as np
import pytest

import mpicomp.compressors
from mpicomp import kernels
from mpicomp.compressors import Residual
from mpicomp.errors import PacketError
from mpicomp.kernels import gpu, reference
from mpicomp.layout import Layout
from mpicomp.philox import Key

cpu = kernels.backends().get("cpu")
pytestmark = pytest.mark.skipif(cpu is None, reason=f"no compiled kernels: {kernels.note()}")

SIZES = (0, 1, 2, 3, 7, 8, 31, 32, 33, 255, 256, 257, 4096, 100003)
MATRICES = ((1, 1), (1, 5), (31, 3), (32, 8), (33, 9), (64, 16), (257, 607), (40, 2000), (1100, 37),
            (4097, 16), (100003, 1), (300, 1), (255, 1))
# level of vector instructions, threads, elements for a thread, elements from which on stores are
# streamed; what this CPU does not have is left out
CALM, THREADS = (1, 1 << 17, 1 << 20), (2, 50, 50)
MODES = sorted({(0, *CALM), (0, *THREADS), (levels.MOST, *CALM), (min(1, levels.MOST), *THREADS)})


@pytest.fixture(autouse=True)
def as_before():
    """Whatever a test sets, the compiled kernels run as before afterwards."""
    yield
    levels.reset()
    kernels.use(None)


def each_mode():
    """Sets one mode of the compiled kernels after the other."""
    for mode in MODES:
        levels.run_with(*mode)
        yield mode


# ---- values -------------------------------------------------------------------------------------


def gradients(size, seed=0):
    """(name, float32[size]): ordinary, with ties and both zeros, and of all magnitudes."""
    rng = np.random.default_rng([size, seed])
    yield "normal", rng.standard_normal(size, np.float32)
    few = np.array([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.5, np.nextafter(np.float32(0.5), 1)])
    yield "few", rng.choice(few.astype(np.float32), size)
    yield "any", any_floats(rng, size)
    yield "zero", np.zeros(size, np.float32)


def any_floats(rng, size):
    """Finite floats of every exponent, subnormals included."""
    bits = rng.integers(0, 2**32, size, np.uint32)
    bits[(bits >> 23 & 0xFF) == 0xFF] ^= 1 << 30
    return bits.view(np.float32)


def guarded(array, odd=0):
    """A copy of `array` within a larger one, beginning `odd` bytes off; and that larger one."""
    whole = np.full(array.nbytes + 128 + odd, 0xA5, np.uint8)
    inner = whole[64 + odd:64 + odd + array.nbytes].view(array.dtype)
    inner[:] = array
    return inner, whole


def outcome(module, name, arguments):
    """What module.name does with copies of the arguments: result or error, arrays, guards."""
    copies, wholes = [], []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            odd = 1 if argument.dtype == np.uint8 else 4
            argument, whole = guarded(argument, odd)
            wholes.append((whole[:64 + odd].tobytes(), whole[-64:].tobytes()))
        copies.append(argument)
    with np.errstate(all="ignore"):
        try:
            result = getattr(module, name)(*copies)
        except PacketError as error:
            return str(error), None, wholes
    return bits(result), [a for a in copies if isinstance(a, np.ndarray)], wholes


def bits(result):
    """Something that is equal where every bit is."""
    if isinstance(result, tuple):
        return tuple(bits(part) for part in result)
    if isinstance(result, np.ndarray):
        return result.dtype, result.tobytes()
    if isinstance(result, np.floating):
        return result.dtype, result.tobytes()
    return result


def same(name, *arguments, used=None):
    """Every mode makes the reference's of these arguments; used(result) bytes of the last count."""
    said, arrays, guards = outcome(reference, name, arguments)
    end = None if used is None or arrays is None else used(said)
    for mode in each_mode():
        here = outcome(cpu, name, arguments)
        assert here[0] == said, (name, mode)
        assert here[2] == guards, f"{name} wrote outside of its buffers, {mode}"
        if arrays is None:
            continue
        for number, (mine, expected) in enumerate(zip(here[1], arrays, strict=True)):
            if number == len(arrays) - 1:
                mine, expected = mine[:end], expected[:end]
            assert mine.tobytes() == expected.tobytes(), f"{name}, array {number}, {mode}"
    return None if arrays is None else arrays[-1][:end]


def damaged(data, rng):
    """The payload as it is, and with bytes that nobody wrote in some places."""
    yield data
    for _ in range(3 if data.size else 0):
        wrong = data.copy()
        wrong[rng.integers(0, data.size, rng.integers(1, 4))] = rng.integers(0, 256)
        yield wrong
    yield rng.integers(0, 256, data.size, np.uint8)


def packed(data, rng, *arguments, name):
    """`name` decodes data, damaged and not, in the same way."""
    size = arguments[-1]
    out = rng.standard_normal(size, np.float32)
    for wrong in damaged(data, rng):
        same(name, wrong, *arguments[:-1], out)


def summed(data, rng, *arguments, name):
    """`name` sums none, one and three payloads, one of them damaged or not, in the same way."""
    size = arguments[-1]
    for wrong in [None, *damaged(data, rng)]:
        for payloads in ([], [data]) if wrong is None else ([data, wrong, data],):
            given = [[a.scale] * len(payloads) if isinstance(a, Scale) else a
                     for a in arguments[:-1]]
            same(name, payloads, *given, np.full(size, 7, np.float32))


@dataclass
class Scale:
    """An argument of `summed`: the scale of each payload."""

    scale: float


def owing(name, grad, rng, *arguments, used=None):
    """`name` encodes owed + grad in the same way, with `out` elsewhere; returns the payload."""
    owed = rng.standard_normal(grad.size, np.float32)
    return same(name, grad, owed, np.full(grad.size, 7, np.float32), *arguments, used=used)


# ---- one function after the other ---------------------------------------------------------------


def each_gradient(sizes=SIZES):
    for size in sizes:
        for kind, x in gradients(size):
            yield kind, x, np.random.default_rng([size, 7])


def check_finite():
    for size in SIZES:
        x = np.ones(size, np.float32)
        same("finite", x)
        same("copy_finite", x, np.zeros(size, np.float32))
        for wrong in (np.inf, -np.inf, np.nan):
            for at in {0, size // 2, size - 1} if size else ():
                y = x.copy()
                y[at] = wrong
                same("finite", y)
                same("copy_finite", y, np.zeros(size, np.float32))


def check_adagrad():
    for _, x, rng in each_gradient():
        same("adagrad", x, rng.random(x.size, np.float32), np.zeros(x.size, np.float32))


def check_dense():
    for _, x, rng in each_gradient():
        for name in ("dense_decode_add", "dense_scale"):
            packed(x.view(np.uint8), rng, -0.3, x.size, name=name)
        summed(x.view(np.uint8), rng, -0.3, x.size, name="dense_decode_sum")


def check_casts():
    for _, x, rng in each_gradient():
        for kind in ("float16", "bfloat16"):
            data = same("cast_encode", x, kind, np.zeros(2 * x.size, np.uint8))
            packed(data, rng, kind, 0.25, x.size, name="cast_decode_add")
            summed(data, rng, kind, 0.25, x.size, name="cast_decode_sum")
    every = np.arange(2**16, dtype=np.uint16).view(np.uint8)
    for start in range(0, 2**17, 512):  # every 16-bit float, those that are not finite refused
        for kind in ("float16", "bfloat16"):
            same("cast_decode_add", every[start:start + 512], kind, 1.0, np.zeros(256, np.float32))


def check_strom():
    for _, x, rng in each_gradient():
        for strict in (True, False):
            for tau in (0.5, 1e-30, 3.0):
                data = same("strom_encode", x, tau, strict, np.zeros(4 * x.size, np.uint8),
                            used=int)
                packed(data, rng, tau, -1.0, x.size, name="strom_decode_add")
                owing("strom_encode_owed", x, rng, tau, strict, np.zeros(4 * x.size, np.uint8),
                      used=int)
        summed(data, rng, tau, -1.0, x.size, name="strom_decode_sum")


def check_onebit():
    for rows, columns in MATRICES:
        for _, x, rng in each_gradient([rows * columns]):
            data = np.zeros(columns * (8 + 4 * -(-rows // 32)), np.uint8)
            data = same("onebit_encode", x, rows, columns, data)
            packed(data, rng, rows, columns, 0.3, x.size, name="onebit_decode_add")
            summed(data, rng, rows, columns, 0.3, x.size, name="onebit_decode_sum")
            owing("onebit_encode_owed", x, rng, rows, columns, np.zeros_like(data))


def check_terngrad():
    for kind, x, rng in each_gradient():
        for clip in (0.0, 2.5, 0.1):
            same("terngrad_scale", x, clip)
            same("terngrad_scale_code", x, clip)
        with np.errstate(all="ignore"):
            level, scale = reference.terngrad_scale(x, 2.5)
        if kind == "zero":
            scale = np.float32(0)
        for packing in ("2bit", "planar", "int8", "int16"):
            for start in (0, 1, 2, 3, 4 * 2**20 + 1):
                data = np.full(reference.terngrad_size(x.size, packing), 255, np.uint8)
                key = Key(2**40 + 3, 2**32 - 1, start, 5)
                data = same("terngrad_encode", x, level, scale, key, start, packing, data)
            if scale < 1e36:
                packed(data, rng, scale, packing, -0.25, x.size, name="terngrad_decode_add")
                summed(data, rng, Scale(scale), packing, -0.25, x.size, name="terngrad_decode_sum")


def check_dorefa():
    for _, x, rng in each_gradient():
        same("dorefa_scale", x)
        scale = reference.dorefa_scale(x)
        for bits_, packing in ([(b, "bits") for b in range(1, 9)]
                               + [(3, "int8"), (8, "int16"), (8, "int32")]):
            data = np.full(reference.dorefa_size(x.size, bits_, packing), 255, np.uint8)
            data = same("dorefa_encode", x, scale, bits_, packing, Key(1, 2, 3, 4), 6, data)
            for value in (scale, np.float32(3e38)):
                packed(data, rng, value, bits_, packing, 0.25, x.size, name="dorefa_decode_add")
            if bits_ not in (1, 3, 8):
                continue
            summed(data, rng, Scale(scale), bits_, packing, 0.25, x.size, name="dorefa_decode_sum")
            owing("dorefa_encode_owed", x, rng, scale, bits_, packing, Key(1, 2, 3, 4), 6,
                  np.zeros_like(data))


BLOCKS = ((128, "int", 127, "max", False), (32, "int", 7, "max", True),
          (1120, "int", 5, "l2", True), (64, "fp8", 448, "max", False),
          (128, "fp8", 448, "max", True))


def check_block():
    for kind, x, rng in each_gradient():
        for *grid, norm, random in BLOCKS:
            key = Key(2**40 + 3, 2**32 - 1, 3, 5) if random else None
            empty = np.full(reference.block_bytes(x.size, *grid), 255, np.uint8)
            data = same("block_encode", x, *grid, norm, key, 6, empty)
            owing("block_encode_owed", x, rng, *grid, norm, key, 6, empty)
            if kind == "any":
                packed(data, rng, *grid, -0.3, x.size, name="block_decode_add")
                summed(data, rng, *grid, -0.3, x.size, name="block_decode_sum")
            for wrong in (np.inf, np.nan) if kind == "few" and x.size else ():
                y = x.copy()
                y[x.size // 2] = wrong
                same("block_encode", y, *grid, norm, key, 6, empty)
                owing("block_encode_owed", y, rng, *grid, norm, key, 6, empty)


def check_sign():
    for kind, x, rng in each_gradient():
        for length in (max(x.size, 1), 7, 512, 2049):
            empty = np.full(reference.sign_bytes(x.size, length), 255, np.uint8)
            data = same("sign_encode", x, length, empty)
            owing("sign_encode_owed", x, rng, length, empty)
            if kind == "normal":
                packed(data, rng, length, -0.3, x.size, name="sign_decode_add")
                summed(data, rng, length, -0.3, x.size, name="sign_decode_sum")
            for wrong in (np.inf, np.nan) if kind == "few" and x.size else ():
                y = x.copy()
                y[x.size // 2] = wrong
                owing("sign_encode_owed", y, rng, length, empty)


def test_signs_of_a_tensor_whose_sum_has_branches():
    """Longer than 2^20 elements, as one group and as two; see BRANCH in src/terngrad.h."""
    n = 2**20 + 2**15 + 77
    rng = np.random.default_rng(n)
    x = rng.standard_normal(n, np.float32)
    for length in (n, 2**20 + 40):
        data = np.zeros(reference.sign_bytes(n, length), np.uint8)
        owing("sign_encode_owed", x, rng, length, data)


def check_dropping():
    for _, x, rng in each_gradient():
        for rate, sample in ((0.9, 0), (0.0, 20), (0.99, 1000), (0.5, 7)):
            same("dropping_cut", x, rate, sample)
            cut = reference.dropping_cut(x, rate, sample)
            data = np.zeros(8 * x.size, np.uint8)
            same("dropping_select", x, cut, 0, data, used=lambda count: 4 * count)
            same("dropping_select", x, cut, 11, data[:4 * x.size], used=lambda count: 4 * count)
            count = reference.dropping_select(x, cut, 0, data)
            data = same("dropping_values", x, count, data)[:8 * count]
            packed(data, rng, -1.0, x.size, name="dropping_decode_add")
            scopes = [(0, x.size // 3), (x.size // 3, x.size)]
            owing("dropping_encode_owed", x, rng, scopes, rate, sample,
                  np.zeros(8 * x.size, np.uint8), used=int)
            same("dropping_signs_encode", x, scopes, rate, sample, True,
                 np.zeros(16 + 4 * x.size, np.uint8), used=int)
        summed(data, rng, -1.0, x.size, name="dropping_decode_sum")


def check_chunks():
    for _, x, rng in each_gradient():
        sizes = (x.size // 3, 0, x.size - x.size // 3)
        for block, k, bits_ in ((4096, 64, 2), (500, 7, 8), (100, 100, 32), (2000, 800, 2)):
            of = sizes, block, k, bits_
            data = np.full(reference.chunks_size(*of), 255, np.uint8)
            data = same("chunks_encode", x, *of, data)
            owing("chunks_encode_owed", x, rng, *of, np.zeros_like(data))
            packed(data, rng, *of, -1.0, x.size, name="chunks_decode_add")
        summed(data, rng, *of, 0.3, x.size, name="chunks_decode_sum")


def check_topk():
    for _, x, rng in each_gradient():
        for keep in {0, min(1, x.size), x.size // 9, x.size}:
            data = np.zeros(8 * keep, np.uint8)
            data[:4 * keep] = same("topk_select", x, keep, 0, data, used=lambda _, k=keep: 4 * k)
            same("topk_select", x, keep, 11, data[:4 * keep])
            data = same("dropping_values", x, keep, data)
            packed(data, rng, -1.0, x.size, name="dropping_decode_add")


def check_randomk():
    for _, x, rng in each_gradient():
        for keep in {0, min(1, x.size), x.size // 9, x.size}:
            for scale in (True, False):
                data = np.zeros(4 * keep, np.uint8)
                data = same("randomk_encode", x, keep, scale, Key(9, 2**32 - 1, 7, 6), data)
            packed(data, rng, Key(9, 2**32 - 1, 7, 6), 0.3, x.size, name="randomk_decode_add")


def check_powersgd():
    """Ranks from 1 to 32, tensors between matrices, dependent columns, zeros; matrices of several
    tiles of columns."""
    for shapes in ([(40, 70, 4), (1, 9, 0), (33, 9, 2), (0, 5, 0), (9, 1100, 3)], [(70, 80, 32)],
                   [(2, 3, 1)], [(64, 2, 1), (5, 1, 0)], []):
        starts = np.cumsum([0, *(n * m for n, m, _ in shapes)]).tolist()
        parts = tuple((at, *shape) for at, shape in zip(starts, shapes))
        common, rest = reference.powersgd_sizes(parts)
        for name, x in gradients(starts[-1]):
            rng, x = np.random.default_rng(len(name)), x if name != "any" else np.sign(x)
            basis = rng.standard_normal(x.size, np.float32)
            data, key = np.zeros(4 * (common + rest), np.uint8), Key(9, 2**32 - 1, 7, 6)
            product = same("powersgd_project", x, parts, basis, np.zeros(common, np.float32))
            product[common // 2:] = np.round(product[common // 2:])
            data = same("powersgd_encode", x, parts, product, data)
            same("powersgd_learn", data, parts, key, basis)
            if common:
                product[-1] = np.inf
                same("powersgd_encode", x, parts, product, data)
            packed(data, rng, parts, -1.0, x.size, name="powersgd_decode_add")
            for wrong in list(damaged(data, rng))[:3]:
                if wrong.size == data.size:
                    same("powersgd_learn", wrong, parts, key, basis)


def check_adacomp():
    for _, x, rng in each_gradient():
        grad = rng.standard_normal(x.size, np.float32)
        for size in (1, 7, 50, 64, 65, 500, 512, 2**14):
            for g, factor in ((x, 2.0), (x, 1.0), (x * (rng.random(x.size) < 0.003), 2.0)):
                width = reference.adacomp_width(size)
                data = np.zeros(width * x.size, np.uint8)
                data = same("adacomp_encode", g.astype(np.float32), grad, factor, size, data,
                            used=lambda result, width=width: width * result[0])
                packed(data, rng, 0.7, size, -1.0, x.size, name="adacomp_decode_add")
        check_adacomp_layers(x, rng)


def check_adacomp_layers(x, rng):
    """Two layers, their bins of both widths of an entry."""
    cut, grad = x.size // 3, rng.standard_normal(x.size, np.float32)
    first, second = Layout.of([("a", (cut,)), ("b", (x.size - cut,))]).segments
    for sizes in ((500, 7), (65, 64)):
        layers = [(0, first, sizes[0], 2), (1, second, sizes[1], 1)]
        packet = np.zeros(16 + 2 * x.size, np.uint8)
        same("adacomp_encode_layers", x, None, None, 2.0, layers, packet, used=int)
        owing("adacomp_encode_layers", grad, rng, 2.0, layers, packet, used=int)
        parts = []
        for number, segment, size, width in layers:
            data = np.zeros(width * segment.size, np.uint8)
            part = x[segment.slice]
            with np.errstate(all="ignore"):
                count, _ = reference.adacomp_encode(part, part, 1.0, size, data)
            parts.append((segment.slice, size, data[:width * count]))
        for wrong in damaged(parts[1][2], rng):
            read = [(*parts[0], [0.5, 2.0]), (*parts[1], [3.0, 0.25])]
            read = [(at, size, [data, wrong if data is parts[1][2] else data], scales)
                    for at, size, data, scales in read]
            for name in ("adacomp_decode_layers", "adacomp_decode_sum"):
                same(name, read, 0.3, np.full(x.size, 7, np.float32))


def test_an_adacomp_entry_that_steps_back_over_a_chunk_is_refused():
    """A bin of 500 lies across element 4096, where the next part of a sum begins."""
    entries = np.array([(500 - 2 + 8) << 2, 100 << 2 | 1, 5 << 2 | 3], np.uint16).view(np.uint8)
    with pytest.raises(PacketError, match="ascend"):
        cpu.adacomp_decode_sum([(slice(0, 8192), 500, [entries], [np.float32(1)])], 1.0,
                               np.zeros(8192, np.float32))


def check_dryden():
    for rows, columns in MATRICES:
        for _, x, rng in each_gradient([rows * columns]):
            for proportion, sample in ((64, 128), (4, 20), (1, 0), (64, 0)):
                key = Key(9, 8, 7, 6)
                arguments = x, rows, columns, proportion, sample, key, 5
                cuts = reference.dryden_columns(*arguments)
                for mine, cut in zip(cpu.dryden_columns(*arguments), cuts, strict=True):
                    assert (mine == cut).all()  # a threshold of zero may have either sign
                data = np.zeros(4 + 8 * columns + 4 * x.size, np.uint8)
                data = same("dryden_encode_2016", x, rows, columns, *cuts, data, used=int)
                packed(data, rng, rows, columns, 0.25, x.size, name="dryden_decode_add_2016")
                whole = np.zeros(4 + 8 * columns + 4 * x.size, np.uint8)
                owing("dryden_encode_owed_2016", x, rng, [(0, rows, columns)], proportion, sample,
                      key, whole, used=int)
            for fresh in (True, False):
                for wrong in damaged(data, rng):
                    same("dryden_decode_sum_2016", [data, wrong], [(0, rows, columns)], 0.25,
                         np.full(x.size, 7, np.float32), fresh)


STRIPS = ((128, 64), (257, 607), (40, 2000), (1100, 130), (2048, 96), (33, 129))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("in_place", [False, True])
def test_dryden_in_strips(in_place, threads):
    """Matrices that are read once, in strips of columns, give what the reference makes of them."""
    for rows, columns in STRIPS:
        size = rows * columns
        for (kind, owed), (_, grad) in zip(gradients(size), gradients(size, 1), strict=True):
            for proportion, sample in ((64, 32), (4, 20), (1, 9)):
                of = rows, columns, proportion, sample, Key(9, 8, 7, 6), 0
                theirs = a_matrix(reference, owed, grad, in_place, of)
                for level in {0, levels.MOST}:
                    levels.run_with(level, threads, 50, 50)
                    assert a_matrix(cpu, owed, grad, in_place, of) == theirs, (kind, level, *of)


def a_matrix(module, owed, grad, in_place, of):
    """Packet, what is still owed and guards, or the error, of one matrix with a residual."""
    owed, whole = guarded(owed, 4)
    out, other = (owed, whole) if in_place else guarded(np.zeros_like(owed), 4)
    rows, columns = of[:2]
    data = np.zeros(4 + 8 * columns + 4 * owed.size, np.uint8)
    with np.errstate(all="ignore"):
        try:
            used = module.dryden_encode_owed_2016(grad, owed, out, [(0, rows, columns)], *of[2:5],
                                                  data)
        except PacketError as error:
            return str(error)
    return data[:used].tobytes(), whole.tobytes(), other.tobytes()


CHECKS = {check_finite: ["finite", "copy_finite"], check_adagrad: ["adagrad"],
          check_dense: ["dense_decode_add", "dense_decode_sum", "dense_scale"],
          check_casts: ["cast_encode", "cast_decode_add", "cast_decode_sum"],
          check_strom: ["strom_encode", "strom_encode_owed", "strom_decode_add",
                        "strom_decode_sum"],
          check_onebit: ["onebit_encode", "onebit_encode_owed", "onebit_decode_add",
                         "onebit_decode_sum"],
          check_terngrad: ["terngrad_scale", "terngrad_scale_code", "terngrad_encode",
                           "terngrad_decode_add", "terngrad_decode_sum"],
          check_dorefa: ["dorefa_scale", "dorefa_encode", "dorefa_encode_owed",
                         "dorefa_decode_add", "dorefa_decode_sum"],
          check_block: ["block_encode", "block_encode_owed", "block_decode_add",
                        "block_decode_sum"],
          check_sign: ["sign_encode", "sign_encode_owed", "sign_decode_add", "sign_decode_sum"],
          check_dropping: ["dropping_cut", "dropping_select", "dropping_values",
                           "dropping_encode_owed", "dropping_signs_encode", "dropping_decode_add",
                           "dropping_decode_sum"],
          check_chunks: ["chunks_encode", "chunks_encode_owed", "chunks_decode_add",
                         "chunks_decode_sum"],
          check_topk: ["topk_select"],
          check_powersgd: ["powersgd_project", "powersgd_encode", "powersgd_decode_add",
                           "powersgd_learn"],
          check_randomk: ["randomk_encode", "randomk_decode_add"],
          check_adacomp: ["adacomp_encode", "adacomp_encode_layers", "adacomp_decode_add",
                          "adacomp_decode_layers", "adacomp_decode_sum"],
          check_dryden: ["dryden_columns", "dryden_encode_2016", "dryden_encode_owed_2016",
                         "dryden_decode_add_2016", "dryden_decode_sum_2016"]}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_functions_agree(check):
    check()


# what a backend has beside kernels
OWN = {"cpu": {"limits", "threads", "vectors"}, "gpu": {"deferred"}}


def offered(module):
    """{name: function} of the kernels of a backend."""
    return {name: value for name, value in vars(module).items()
            if isinstance(value, FunctionType) and name not in OWN[module.__name__[16:]]}


def test_every_compiled_function_is_checked():
    compiled = {name for name, function in offered(cpu).items()
                if function is not getattr(reference, name)}
    assert compiled == {name for names in CHECKS.values() for name in names}


def test_all_backends_offer_the_same_functions():
    """Those of the reference, which has the steps they are made of beside them."""
    assert offered(cpu).keys() == offered(gpu).keys()
    assert all(isinstance(getattr(reference, name), FunctionType) for name in offered(cpu))


def test_compressors_call_kernels_that_are_offered():
    files = Path(mpicomp.compressors.__file__).parent.glob("*.py")
    called = {name for path in files
              for name in re.findall(r"\b(?:k|kernels\.of\(\w+\))\.(\w+)", path.read_text())}
    assert {"onebit_encode_owed", "dense_decode_sum", "zeros"} <= called <= offered(cpu).keys()


# ---- whole compressors --------------------------------------------------------------------------

SHAPES = {**material.SHAPES, "matrices": [(1100, 32), (64, 48), (3,), (130, 7)],
          "long": [(100003,)]}
SPECS = [repr(c) for c in material.compressors() if not isinstance(c, Residual)]


def a_step(spec, shapes, seed, backend, in_place):
    """Bytes and floats of three steps, with error feedback where allowed, and of their sum."""
    k = kernels.use(backend)
    compressor = material.from_spec(spec)
    layout = Layout.of((str(i), shape) for i, shape in enumerate(shapes))
    owes = compressor.feedback
    state = compressor.init(layout, np.zeros(layout.size, np.float32))
    owed, ahead = k.zeros(layout.size), k.zeros(layout.size)
    packets, seen = [], []
    for step in range(3):
        grad = np.random.default_rng([seed, step]).standard_normal(layout.size, np.float32)
        packet = np.zeros(compressor.capacity(layout), np.uint8)
        shared = compressor.measure(owed + grad if owes else grad, layout, state)
        seen.append(b"" if shared is None else shared.tobytes())
        key = Key(seed, 1, step, 2)
        if owes:
            out = owed if in_place else ahead
            used = compressor.encode_owed(grad, owed, packet, layout, key, state, out=out)
            owed, ahead = (out, ahead) if in_place else (ahead, owed)
            seen.append(owed.tobytes())
        else:
            used = compressor.encode(grad, packet, layout, key, state)
        packets.append((packet[:used], key))
        seen.append(packet[:used].tobytes())
    return [*seen, *sums(compressor, layout, *zip(*packets, strict=True))]


def sums(compressor, layout, payloads, keys):
    """The sum of packets one by one, and all at once: as they are, and with damage in one."""
    mean, at_once = np.zeros(layout.size, np.float32), np.full(layout.size, 7, np.float32)
    for packet, key in zip(payloads, keys, strict=True):
        compressor.decode_add(packet, mean, layout, key, 1 / 3)
    compressor.decode_sum(payloads, at_once, layout, keys, 1 / 3)
    yield mean.tobytes()
    yield at_once.tobytes()
    compressor.decode_sum([], at_once, layout, [], 1 / 3)
    assert not at_once.any()
    for wrong in damaged(payloads[1], np.random.default_rng(layout.size)):
        try:
            compressor.decode_sum([payloads[0], wrong, payloads[2]], at_once, layout, keys, 1 / 3)
            yield at_once.tobytes()
        except PacketError as error:
            yield str(error)


@pytest.mark.parametrize("spec", SPECS)
def test_compressors_agree(spec):
    for seed, shapes in enumerate(SHAPES.values()):
        expected = a_step(spec, shapes, seed, "reference", False)
        for mode in each_mode():
            for in_place in (False, True):
                assert a_step(spec, shapes, seed, "cpu", in_place) == expected, mode


# ---- which kernels run --------------------------------------------------------------------------


def test_a_backend_can_be_chosen(monkeypatch):
    x = np.zeros(1, np.float32)
    for name, module in kernels.backends().items():
        kernels.use(name)
        assert kernels.of(x) is module
    kernels.use(None)
    assert kernels.of(x) is cpu
    with pytest.raises(kernels.SpecError, match="reference, cpu"):
        kernels.use("gpu?")


def test_what_does_not_fit_goes_to_the_reference():
    gaps = np.arange(20, dtype=np.float32)[::2]
    assert cpu.finite(gaps)
    data = np.zeros(40, np.uint8)
    assert cpu.strom_encode(gaps, 3.0, True, data) == 4 * 8
    owed = np.zeros(20, np.float32)[::2]
    assert cpu.strom_encode_owed(gaps, owed, owed, 3.0, True, data) == 4 * 8
    assert owed[9] == 18 - 3


def started_with(**variables):
    """(exit status, the level and threads of a new process and the most it can set; stderr)."""
    program = ("from mpicomp.kernels import cpu; print(cpu.vectors(), cpu.threads(), "
               "cpu.vectors(9))")
    outside = {name: value for name, value in os.environ.items()
               if name not in ("MPICOMP_VECTORS", "OMP_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", program], env=outside | variables, text=True,
                          capture_output=True)
    return done.returncode, [int(word) for word in done.stdout.split()], done.stderr


def test_the_environment_caps_instructions_and_chooses_threads():
    status, (best, threads, most), _ = started_with()
    assert (status, threads) == (0, 1) and best == most
    for level, name in enumerate(cpu.LEVELS):
        status, found, error = started_with(MPICOMP_VECTORS=name, OMP_NUM_THREADS="3")
        if level <= best:
            assert (status, found) == (0, [level, 3, level])
        else:
            assert status == 1 and f"MPICOMP_VECTORS={name}: {name} is not here; this" in error


def test_a_level_that_does_not_exist_is_refused_with_those_that_do():
    status, _, error = started_with(MPICOMP_VECTORS="AVX2")
    assert status == 1
    assert "SpecError: MPICOMP_VECTORS=AVX2: no such level; this machine has none" in error
