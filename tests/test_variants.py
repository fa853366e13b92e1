"""Variants that papers and their code describe beside the default: scalers, packings, codings."""

import numpy as np
import pytest

from mpicomp import kernels, philox
from mpicomp.compressors import Residual
from mpicomp.compressors.registry import from_spec
from mpicomp.errors import PacketError, SpecError
from mpicomp.kernels import reference
from mpicomp.layout import Layout
from mpicomp.philox import Key


def floats(*values):
    return np.array(values, np.float32)


def pack(compressor, x, layout, key=Key()):
    state = compressor.init(layout, x)
    compressor.measure(x, layout, state)
    room = np.full(compressor.capacity(layout), 0xA5, np.uint8)
    return room[:compressor.encode(x, room, layout, key, state)]


def decode(compressor, payload, layout):
    out = np.zeros(layout.size, np.float32)
    compressor.decode_add(payload, out, layout, Key())
    return out


def vector(n):
    return Layout.of([("v", (n,))])


# ---- TernGrad ---------------------------------------------------------------------------------

G1 = floats(.5, -.25, .125, 0, -.5, .25, .375, -4, .5, -.25)
G2 = floats(1, -.5, .25, .5, -1, 0, .75, -.25, .5, .25)


@pytest.mark.parametrize("g, paper, code", [(G1, 3.165981, 3.165981), (G2, 1.0, 1.430690)])
def test_terngrad_scalers_of_paper_and_code(g, paper, code):
    for scaler, expected in (("paper", paper), ("code", code)):
        for share in ("yes", "no"):
            payload = pack(from_spec(f"terngrad:scaler={scaler},share={share}"), g, vector(10))
            assert payload[:4].view(np.float32)[0] == pytest.approx(expected, abs=1e-6)


def test_terngrad_code_clips_at_the_scaler_of_all(monkeypatch):
    """A rank's values between its own c * sigma and the shared scaler are not cut."""
    compressor, layout = from_spec("terngrad:scaler=code,clip=1.0"), vector(10)
    state = compressor.init(layout, G1)
    assert compressor.measure(G1, layout, state)[0] == pytest.approx(1.266393, abs=1e-6)
    said = []
    for shared in (2, 8):
        state.scale[:] = shared  # as if another rank's were larger
        room = np.zeros(compressor.capacity(layout), np.uint8)
        total = np.zeros(10)
        for step in range(400):
            compressor.encode(G1, room, layout, Key(step=step), state)
            total += decode(compressor, room, layout)
        said.append(total[7] / 400)
    assert said[0] == -2  # |g| = 4 exceeds the scaler: always sent
    assert said[1] == pytest.approx(-4, abs=1)  # below it: unbiased


@pytest.mark.parametrize("share", [True, False])
def test_only_shared_scalers_can_be_added(share):
    compressor = from_spec(f"terngrad:packing=int8,share={'yes' if share else 'no'}")
    assert compressor.summable == ("int8" if share else None)
    assert compressor.shared_bytes(vector(3)) == (4 if share else 0)


def test_five_trits_a_byte(monkeypatch):
    monkeypatch.setattr(kernels, "of", lambda array: reference)
    monkeypatch.setattr(philox, "uniform", lambda key, start, count: floats(
        .3, .4, .1, .5, .99, .8)[start:start + count])
    g = floats(.5, -.25, .125, 0, -1, .75)  # codes 1 0 1 0 -1 0
    payload = pack(from_spec("terngrad:clip=0,packing=5trit"), g, vector(6))
    first = 2 * 1 + 1 * 3 + 2 * 9 + 1 * 27 + 0 * 81
    assert payload.tobytes() == floats(1).tobytes() + bytes([first, 1])
    np.testing.assert_array_equal(decode(from_spec("terngrad:clip=0,packing=5trit"), payload,
                                         vector(6)), floats(1, 0, 1, 0, -1, 0))


# ---- 1-bit SGD --------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["means", "cntk"])
def test_onebit_about_the_mean(wire):
    """Levels mean -+ dev, the same distance on both sides."""
    compressor = Residual(from_spec(f"onebit:threshold=mean,min_rows=1,wire={wire}"))
    layout = Layout.of([("w", (4, 2))])
    x = floats([1, 8], [2, 8], [3, 8], [6, 8]).reshape(-1)
    state = compressor.init(layout, x)
    room = np.zeros(compressor.capacity(layout), np.uint8)
    compressor.encode(x, room, layout, Key(), state)
    compressor.commit(state)
    # column 0: mean 3, dev (2 + 1 + 0 + 3) / 4 = 1.5; 3 is not below the mean. column 1: constant
    np.testing.assert_array_equal(decode(compressor, room, layout).reshape(4, 2),
                                  [[1.5, 8], [1.5, 8], [4.5, 8], [4.5, 8]])
    np.testing.assert_array_equal(state.owed.reshape(4, 2)[:, 0], [-.5, .5, -1.5, 1.5])
    bounds = floats(1.5, 8, 4.5, 8) if wire == "means" else floats(0, 6)
    assert room[:bounds.nbytes].tobytes() == bounds.tobytes()


@pytest.mark.parametrize("wire", ["means", "cntk"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_more_bits(wire, bits):
    """2**bits - 1 steps between -+ 4 sigma, the middle one stands for 0."""
    compressor = from_spec(f"onebit:bits={bits},wire={wire},min_rows=1")
    rng = np.random.default_rng(0)
    layout = Layout.of([("w", (70, 3))])
    x = rng.normal(size=210).astype(np.float32)
    x[:3] = 0
    payload = pack(compressor, x, layout)
    assert payload.size == 3 * (8 + 4 * -(-70 * bits // 32))
    said = decode(compressor, payload, layout).reshape(70, 3)
    x = x.reshape(70, 3)
    sigma = np.sqrt((x.astype(float)**2).mean(axis=0))
    step = 8 * sigma / (2**bits - 1)
    assert np.abs(said[0]).max() <= 1e-5, "a zero is said as the middle of its step"
    assert (np.abs(said - x) <= step / 2 * 1.0001).all()
    levels = (said / step)
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)


def test_where_the_codes_of_more_bits_lie():
    """Rows -2, 0, 0, 2 and so on: codes 0, 1, 1, 2 of 2 bits, where 4 sigma are 8 / sqrt(2)."""
    x = np.tile(floats(-5, 0, 0, 5), 5)[:18]
    codes = np.tile([0, 1, 1, 2], 5)[:18]
    layout = Layout.of([("w", (18, 1))])
    near = pack(from_spec("onebit:bits=2,min_rows=1"), x, layout)[8:].view(np.uint32)
    far = pack(from_spec("onebit:bits=2,min_rows=1,wire=cntk"), x, layout)[8:].view(np.uint32)
    assert near.tolist() == [sum(int(c) << 2 * i for i, c in enumerate(codes[:16])),
                             sum(int(c) << 2 * i for i, c in enumerate(codes[16:]))]
    assert far.tolist() == [sum(int(c) << 2 * i for i, c in enumerate(codes[word::2]))
                            for word in (0, 1)]


def test_options_that_exclude_each_other():
    for spec in ("onebit:bits=3", "onebit:bits=2,threshold=mean"):
        with pytest.raises(SpecError, match="bits"):
            from_spec(spec)


# ---- Strom ------------------------------------------------------------------------------------


def test_golomb_rice_of_lbann():
    values = np.array([7, 74, 11, 311])  # (3,+), (40,-), (45,+), (200,+)
    words = reference.rice_pack(values, 4)
    assert words.tolist() == [0xfffda9ee, 0xfffffbbf]
    assert reference.rice_unpack(words, 4).tolist() == values.tolist()


def test_rice_says_what_words_say():
    rng = np.random.default_rng(3)
    for n in (1, 2, 3, 31, 32, 33, 1000):
        for density in (0.01, 0.2, 1):
            x = np.where(rng.random(n) < density, rng.choice([-2, 2], n), 0).astype(np.float32)
            rice, plain = from_spec("strom:tau=1.0,coding=rice"), from_spec("strom:tau=1.0")
            payload = pack(rice, x, vector(n))
            np.testing.assert_array_equal(decode(rice, payload, vector(n)),
                                          decode(plain, pack(plain, x, vector(n)), vector(n)))
            assert payload.size == 0 or payload.size % 4 == 0 and x.any()


@pytest.mark.parametrize("density", [0.1, 0.03, 0.01, 0.001])
def test_rice_is_near_the_entropy(density):
    """Bits are counted, the parameter and the padding of the last word included."""
    rng, n = np.random.default_rng(4), 1_000_000
    x = np.where(rng.random(n) < density, rng.choice([-1, 1], n), 0).astype(np.float32)
    count = np.count_nonzero(x)
    bits = 8 * pack(from_spec("strom:tau=0.5,coding=rice"), x, vector(n)).size / count
    p = count / n
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) / p + 1  # a position and a sign
    assert entropy - 0.3 < bits < entropy + 0.3
    assert bits < 32 / 2.5


def test_rice_of_everything_fits():
    """The capacity of 4 bits an element holds for every subset of a few elements."""
    for n in range(1, 9):
        compressor = from_spec("strom:tau=1.0,coding=rice")
        for subset in range(1, 2**n):
            x = floats(*[(subset >> i & 1) * 2 for i in range(n)])
            assert pack(compressor, x, vector(n)).size <= compressor.capacity(vector(n))


# ---- Strom, tau from a density ----------------------------------------------------------------


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("strict", ["yes", "no"])
def test_density_is_met(density, strict):
    """Of n different magnitudes n - int(n (1 - d)) are sent, one at least."""
    x = np.random.default_rng(6).normal(size=5000).astype(np.float32)
    spec = f"strom:density={density},strict={strict}"
    for n in (1, 2, 7, 50, 5000):
        payload = pack(from_spec(spec), x[:n], vector(n))
        most = n - min(n - 1, int(n * (1 - density)))
        assert payload.size == 4 + 4 * most
        tau, words = payload[:4].view(np.float32)[0], payload[4:].view(np.uint32)
        sent = np.sort(np.argsort(np.abs(x[:n]), kind="stable")[n - most:])
        assert (words >> 1).tolist() == sent.tolist()
        assert tau < np.abs(x[sent]).min() and tau >= np.abs(np.delete(x[:n], sent)).max(initial=0)


def test_density_of_sparse_constant_and_absent_gradients():
    compressor = from_spec("strom:density=0.1")
    constant = np.full(100, -0.25, np.float32)
    said = decode(compressor, pack(compressor, constant, vector(100)), vector(100))
    np.testing.assert_allclose(said, constant, rtol=1e-6)
    sparse = np.zeros(100, np.float32)
    sparse[[3, 50, 70]] = 1, -2, 6  # the mean is 3
    said = decode(compressor, pack(compressor, sparse, vector(100)), vector(100))
    assert np.flatnonzero(said).tolist() == [70] and said[70] == pytest.approx(3)
    nothing = pack(compressor, np.zeros(100, np.float32), vector(100))
    assert nothing.tobytes() == bytes(4)


def test_density_takes_the_largest_tau_of_all_ranks():
    compressor, layout = from_spec("strom:density=0.5"), vector(4)
    x = floats(1, -2, 3, -4)
    state = compressor.init(layout, x)
    assert compressor.measure(x, layout, state)[0] == np.nextafter(np.float32(3), np.float32(0))
    state.tau[:] = 3.5  # another rank's
    room = np.zeros(compressor.capacity(layout), np.uint8)
    used = compressor.encode(x, room, layout, Key(), state)
    assert room[:used].tobytes() == floats(3.5).tobytes() + np.uint32([6]).tobytes()


@pytest.mark.parametrize("coding", ["words", "rice", "2bit"])
def test_the_senders_tau_is_what_decodes(coding):
    """A receiver with another opinion, or none, decodes what was meant; damage is refused."""
    compressor, layout = from_spec(f"strom:density=0.3,coding={coding}"), vector(40)
    payloads = [pack(compressor, (size * np.random.default_rng(7).normal(size=40)).astype("f4"),
                     layout) for size in (1, 1000)]
    each = [decode(compressor, payload, layout) for payload in payloads]
    for payload, said in zip(payloads, each):
        assert set(np.abs(said).tolist()) == {0.0, float(payload[:4].view(np.float32)[0])}
    both = np.zeros(40, np.float32)
    compressor.decode_sum(payloads, both, layout, [Key(), Key()])
    np.testing.assert_array_equal(both, each[0] + each[1])
    bad = payloads[0].copy()
    bad[:4] = floats(np.inf).view(np.uint8)
    for wrong in (bad, payloads[0][:3]):
        with pytest.raises(PacketError, match="tau"):
            decode(compressor, wrong, layout)


def test_tau_follows_the_gradient_under_error_feedback():
    """Ten times the gradient, ten times tau, the same number of elements."""
    compressor, layout = Residual(from_spec("strom:density=0.05")), vector(2000)
    state, rng, sizes, taus = compressor.init(layout, np.zeros(2000, np.float32)), \
        np.random.default_rng(8), [], []
    for step in range(60):
        x = (rng.normal(size=2000) * (1 if step < 30 else 10)).astype(np.float32)
        payload = pack_in(compressor, x, layout, state)
        sizes.append(payload.size)
        taus.append(float(payload[:4].view(np.float32)[0]))
    assert set(sizes) == {4 + 4 * 100}
    assert 5 < np.mean(taus[40:]) / np.mean(taus[10:30]) < 15


def pack_in(compressor, x, layout, state):
    """The payload of one step that is applied."""
    compressor.measure(x, layout, state)
    room = np.zeros(compressor.capacity(layout), np.uint8)
    payload = room[:compressor.encode(x, room, layout, Key(), state)]
    compressor.commit(state)
    return payload


def test_remainder_is_auto_or_a_number():
    for spec in ("strom:remainder=32", "strom:remainder=-1", "strom:remainder=some"):
        with pytest.raises(SpecError, match="remainder"):
            from_spec(spec)


def test_two_bits_refuse_a_code_without_meaning():
    compressor = from_spec("strom:coding=2bit")
    for damaged in ([0x40, 0, 0, 0], [0, 3, 0, 0]):  # the code 01; a code behind the last element
        with pytest.raises(PacketError, match="codes"):
            decode(compressor, np.array(damaged, np.uint8), vector(6))
