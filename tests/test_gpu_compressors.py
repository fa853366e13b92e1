"""Whole compressors on device arrays: the reference's bytes, floats and refusals, packet by packet.

The arrays are those of tests/shim, which mix with NumPy's no more than CuPy's do.
"""

import material
import numpy as np
import pytest
import test_kernel_parity as parity
from shim import arrays
from shim.arrays import DeviceArray
from shim.device import COMPILER, Shim

from mpicomp import kernels
from mpicomp.errors import PacketError
from mpicomp.kernels.gpu import device
from mpicomp.layout import Layout
from mpicomp.philox import Key

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (c++, g++ or clang++): "
                                "the CUDA source cannot be run on the CPU")
SHAPES = {"network": material.SHAPES["network"], "matrices": [(530, 5), (3,), (130, 7)],
          "nothing": [], "several tiles": [(9001,)]}
SPECS = [repr(c) for c in material.compressors()]


@pytest.fixture
def shim():
    """A device whose kernels run on the CPU."""
    yield device.use(Shim())
    device.use(None)
    arrays.check()


class Host:
    """NumPy arrays, for the reference."""

    new = staticmethod(lambda values: values.copy())
    get = staticmethod(lambda values: values)


class Device:
    """Device arrays, for the kernels of gpu.cu."""

    new = staticmethod(DeviceArray.of)
    get = staticmethod(lambda values: values.get())


def steps(spec, shapes, memory):
    """Every byte and float of two steps, with error feedback where it is allowed, and of sums."""
    compressor = material.from_spec(spec)
    layout = Layout.of((str(i), shape) for i, shape in enumerate(shapes))
    zeros = np.zeros(layout.size, np.float32)
    state = compressor.init(layout, memory.new(zeros))
    owed, packets = memory.new(zeros), []
    for step in range(2):
        drawn = np.random.default_rng([step, layout.size]).standard_normal(layout.size, np.float32)
        grad = memory.new(drawn)
        packet = memory.new(np.zeros(compressor.capacity(layout), np.uint8))
        given = grad
        if compressor.feedback:
            given = owed.copy()
            given += grad
        shared = compressor.measure(given, layout, state)
        yield b"" if shared is None else memory.get(shared).tobytes()
        key = Key(5, 1, step, 2)
        encode = (compressor.encode_owed, grad, owed) if compressor.feedback else \
            (compressor.encode, grad)
        used = encode[0](*encode[1:], packet, layout, key, state)
        packets.append((packet[:used], key))
        yield memory.get(owed).tobytes()
        yield memory.get(packet[:used]).tobytes()
    yield from sums(compressor, layout, *zip(*packets, strict=True), memory)


def sums(compressor, layout, payloads, keys, memory):
    """The sum of packets one by one, and all at once: as they are, and with damage in one."""
    mean = memory.new(np.zeros(layout.size, np.float32))
    at_once = memory.new(np.full(layout.size, 7, np.float32))
    for packet, key in zip(payloads, keys, strict=True):
        compressor.decode_add(packet, mean, layout, key, 1 / 3)
    yield memory.get(mean).tobytes()
    damaged = parity.damaged(memory.get(payloads[0]), np.random.default_rng(layout.size))
    for wrong in list(damaged)[:3]:
        try:
            compressor.decode_sum([payloads[1], memory.new(wrong)], at_once, layout, keys, 1 / 3)
            yield memory.get(at_once).tobytes()
        except PacketError as error:
            yield str(error)


@pytest.mark.limit(120)
@pytest.mark.parametrize("spec", SPECS)
def test_compressors_agree(spec, shim):
    before = DeviceArray.copies
    for shapes in SHAPES.values():
        kernels.use("reference")
        expected = list(steps(spec, shapes, Host))
        kernels.use(None)
        assert list(steps(spec, shapes, Device)) == expected
    assert shim.launches or DeviceArray.copies > before  # on the device, or by the host


BATCHED = {"strom:tau=1.0": 1, "dropping:rate=0.9,scope=layer": 2, "dryden": 1, "onebit": 0,
           "terngrad": 0, "dorefa": 0, "bf16": 0}


@pytest.mark.parametrize("spec", BATCHED)
def test_encoding_reads_back_one_length_and_not_one_a_layer(spec, shim):
    """Copies to the host: how many bytes were used, and with dropping whether all were finite."""
    compressor = material.from_spec(spec)
    layout = Layout.of((str(i), (40, 6)) for i in range(8))
    grad = DeviceArray.of(np.random.default_rng(1).standard_normal(layout.size, np.float32))
    packet = DeviceArray.new(compressor.capacity(layout), np.uint8)
    state = compressor.init(layout, grad)
    owed = DeviceArray.new(layout.size, np.float32, fill=0)
    compressor.measure(grad, layout, state)
    before = DeviceArray.copies
    with kernels.of(grad).deferred():
        if compressor.feedback:
            compressor.encode_owed(grad, owed, packet, layout, Key(), state)
        else:
            compressor.encode(grad, packet, layout, Key(), state)
        assert DeviceArray.copies - before <= BATCHED[spec]


DECODED = {"strom:tau=1.0": 0, "dropping:rate=0.9,scope=layer": 0, "dryden": 1, "onebit": 0,
           "terngrad": 0, "dorefa": 0, "bf16": 0}


@pytest.mark.parametrize("together", [False, True], ids=["one packet", "three"])
@pytest.mark.parametrize("spec", DECODED)
def test_decoding_reads_back_one_list_and_not_one_a_packet_or_a_layer(spec, together, shim):
    compressor = material.from_spec(spec)
    layout = Layout.of((str(i), (40, 6)) for i in range(8))
    grad = DeviceArray.of(np.random.default_rng(1).standard_normal(layout.size, np.float32))
    packet, out = DeviceArray.new(compressor.capacity(layout), np.uint8), grad.copy()
    state = compressor.init(layout, grad)
    compressor.measure(grad, layout, state)
    packet = packet[:compressor.encode(grad, packet, layout, Key(), state)]
    before = DeviceArray.copies
    with kernels.of(out).deferred():
        if together:
            compressor.decode_sum([packet] * 3, out, layout, [Key()] * 3, 0.25)
        else:
            compressor.decode_add(packet, out, layout, Key(), 0.25)
        assert DeviceArray.copies - before <= DECODED[spec]
