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


@pytest.mark.parametrize("spec", SPECS)
def test_compressors_agree(spec, shim):
    before = DeviceArray.copies
    for shapes in SHAPES.values():
        kernels.use("reference")
        expected = list(steps(spec, shapes, Host))
        kernels.use(None)
        assert list(steps(spec, shapes, Device)) == expected
    assert shim.launches or DeviceArray.copies > before  # on the device, or by the host


SEVERAL = {"eight alike": [(40, 6)] * 8,
           "entries of both widths": [(70, 9), (4, 3, 3, 3), (5,), (0,), (33, 2, 3, 3), (600, 2),
                                      (), (40, 0), (8, 2, 3, 3), (9001,)],
           "empty ones": [(0,), (3, 0, 2), (0, 4)]}
ONEBIT = dict.fromkeys(["onebit", "onebit:wire=cntk", "onebit:threshold=mean", "onebit:bits=2",
                        "onebit:wire=cntk,threshold=mean", "onebit:bits=8,wire=cntk"], 0)
READ = ONEBIT | {"terngrad": 0, "dorefa": 0, "bf16": 0, "block": 0, "sign": 0,
                 "sign:scope=row": 0, "qsgd:norm=l2": 0, "adacomp": 1, "adacomp:bin=7": 1,
                 "dryden": 1, "dryden:proportion=4,min_rows=1": 1}
DROPPING, PAIRS = "dropping:rate=0.9,scope=layer", "dropping:rate=0.9,scope=layer,survivors=onebit"
BATCHED = READ | {"strom:tau=1.0": 1, DROPPING: 2, PAIRS: 1}
DECODED = READ | {"strom:tau=1.0": 0, DROPPING: 0, PAIRS: 0}


def layout_of(shapes):
    return Layout.of((str(i), shape) for i, shape in enumerate(shapes))


@pytest.mark.parametrize("shapes", SEVERAL)
@pytest.mark.parametrize("spec", BATCHED)
def test_encoding_reads_back_one_length_and_not_one_a_layer(spec, shapes, shim):
    """Copies to the host: how many bytes were used, and with dropping whether all were finite."""
    compressor, layout = material.from_spec(spec), layout_of(SEVERAL[shapes])
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


@pytest.mark.parametrize("shapes", SEVERAL)
@pytest.mark.parametrize("spec", DECODED)
def test_decoding_reads_back_one_head_for_all_packets(spec, shapes, shim):
    """Copies to the host: what says where each layer's part of each packet lies, and one fault."""
    compressor, layout = material.from_spec(spec), layout_of(SEVERAL[shapes])
    rng, packets = np.random.default_rng(2), []
    for _ in range(3):
        packet = np.zeros(compressor.capacity(layout), np.uint8)
        grad = rng.standard_normal(layout.size, np.float32)
        state = compressor.init(layout, grad)
        compressor.measure(grad, layout, state)
        packets.append(packet[:compressor.encode(grad, packet, layout, Key(), state)])
    expected, out = np.zeros(layout.size, np.float32), DeviceArray.new(layout.size, np.float32)
    compressor.decode_sum(packets, expected, layout, [Key()] * 3, 1 / 3)
    payloads = [DeviceArray.of(packet) for packet in packets]
    before = DeviceArray.copies
    with kernels.of(out).deferred():
        compressor.decode_sum(payloads, out, layout, [Key()] * 3, 1 / 3)
        assert DeviceArray.copies - before <= DECODED[spec]
    assert DeviceArray.copies - before <= DECODED[spec] + 1
    assert out.get().tobytes() == expected.tobytes()
    before = DeviceArray.copies
    with kernels.of(out).deferred():
        compressor.decode_add(payloads[0], out, layout, Key(), 0.5)
        assert DeviceArray.copies - before <= DECODED[spec]


@pytest.mark.parametrize("shapes", SEVERAL)
@pytest.mark.parametrize("odd", [0, 1, 2])
def test_adacomp_without_a_residual_reads_back_one_length(odd, shapes, shim):
    """Into a packet at any address: the reference's bytes, and nothing behind its capacity."""
    compressor, layout = material.from_spec("adacomp"), layout_of(SEVERAL[shapes])
    grad = np.random.default_rng(3).standard_normal(layout.size, np.float32)
    expected = np.zeros(compressor.capacity(layout), np.uint8)
    kernels.use("reference")
    used = compressor.encode(grad, expected, layout, Key(), None)
    kernels.use(None)
    packet = DeviceArray.new(compressor.capacity(layout), np.uint8, odd=odd)
    given, before = DeviceArray.of(grad), DeviceArray.copies
    assert compressor.encode(given, packet, layout, Key(), None) == used
    assert DeviceArray.copies - before == 1
    assert packet.get()[:used].tobytes() == expected[:used].tobytes()


@pytest.mark.parametrize("sign", [1, -1])
def test_adacomp_refuses_a_mean_that_overflows(sign, shim):
    """Whether elements are sent (of one sign with the gradient) or not: the same words everywhere.

    Nobody would take a packet with such a scale.
    """
    compressor, layout = material.from_spec("adacomp:bin=2"), layout_of([(4,), (8,), (3, 1, 1)])
    owed, grad = np.full(layout.size, 3e38, np.float32), np.full(layout.size, 1e37, np.float32)
    owed[:4], said = 1, []
    for backend in [*kernels.backends(), None]:
        kernels.use(backend)
        memory = Host if backend else Device
        packet = memory.new(np.zeros(compressor.capacity(layout), np.uint8))
        with np.errstate(all="ignore"), pytest.raises(PacketError) as error:
            compressor.encode_owed(memory.new(sign * grad), memory.new(owed), packet, layout, Key(),
                                   None)
        said.append(str(error.value))
    assert said == ["adacomp: a number in the payload is not finite"] * len(said)


def test_adacomp_names_the_first_wrong_packet_and_layer(shim):
    """Of several damaged entries the refusal is that of the reference, packet by packet."""
    compressor, layout = material.from_spec("adacomp:bin=4"), layout_of([(8,), (5,), (3,)])
    good = np.zeros(compressor.capacity(layout), np.uint8)
    grad = np.arange(1, layout.size + 1, dtype=np.float32)
    good = good[:compressor.encode(grad, good, layout, Key(), None)]
    places = np.cumsum(good[12:24].view(np.uint32)) + 24  # behind the entries of each layer
    said = []
    for wrong in ([(0, 0), (1, 1)], [(0, 1), (1, 0)], [(1, 2), (0, 1)], [(1, 0)]):
        packets = [good.copy(), good.copy()]
        for number, layer in wrong:
            packets[number][places[layer] - 1] = 3 << 2  # not the last one of a bin
        for memory in (Host, Device):
            kernels.use("reference" if memory is Host else None)
            with pytest.raises(PacketError) as error:
                compressor.decode_sum([memory.new(p) for p in packets],
                                      memory.new(np.zeros(layout.size, np.float32)), layout,
                                      [Key(), Key()])
            said.append(str(error.value))
    assert said[::2] == said[1::2]
    assert [text.split("below ")[1].split()[0] for text in said[::2]] == ["8", "5", "5", "8"]
