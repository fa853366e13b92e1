"""Worked examples of the seven systems, by hand, through the public compressors, to the byte."""

import numpy as np
import pytest

from mpicomp import kernels, philox
from mpicomp.compressors import Residual
from mpicomp.compressors.registry import from_spec
from mpicomp.layout import Layout
from mpicomp.philox import Key


def floats(*values):
    return np.array(values, np.float32)


def raw(*parts):
    """The bytes of arrays, one after the other."""
    return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


def words(*values):
    return np.array(values, np.uint32)


def vectors(*sizes):
    """A layout of vectors."""
    return Layout.of((f"v{i}", (size,)) for i, size in enumerate(sizes))


def encode(compressor, x, layout, key, state):
    """The payload."""
    room = np.full(compressor.capacity(layout), 0xA5, np.uint8)
    return room[:compressor.encode(x, room, layout, key, state)]


def decode(compressor, payload, layout, weight=1.0, onto=None):
    """weight * what the payload says, added to `onto` or to zeros."""
    out = np.zeros(layout.size, np.float32) if onto is None else onto.copy()
    compressor.decode_add(payload, out, layout, Key(), weight)
    return out


def step(compressor, gradient, state, layout):
    """One step of error feedback: the payload; the residual is then state.owed."""
    payload = encode(compressor, gradient, layout, Key(), state)
    compressor.commit(state)
    return payload


# ---- DoReFa: the formula of the paper in numbers ----------------------------------------------


@pytest.fixture
def draws(monkeypatch):
    """Lets a test say which numbers N(k) * n are drawn, for ranks 0, 1 ..."""
    monkeypatch.setattr(kernels, "of", lambda array: kernels.reference)

    def choose(*by_rank):
        monkeypatch.setattr(philox, "uniform", lambda key, start, count: (
            floats(*by_rank[key.rank]) + np.float32(0.5))[start:start + count])

    return choose


G_A, U_A = (0.3, -0.6, 0.0, 0.15), (0.2, -0.1, 0.1, -0.4)
G_B, U_B = (-0.2, 0.4, 0.1, -0.3), (-0.3, 0.3, 0.2, -0.2)


@pytest.mark.parametrize("bits, codes, payload, means", [
    (1, (1, 0, 1, 0), [0b0101], (0.6, -0.6, 0.6, -0.6)),
    (2, (2, 0, 2, 1), [0x62], (0.2, -0.6, 0.2, -0.2)),
    (4, (11, 0, 8, 9), [0x0B, 0x98], (0.28, -0.6, 0.04, 0.12))])
@pytest.mark.parametrize("scale", ["shared", "own"])
def test_dorefa_codes(draws, bits, codes, payload, means, scale):
    draws(U_A)
    layout, x = vectors(4), floats(*G_A)
    for packing in ("bits", "int8", "int32"):
        compressor = from_spec(f"dorefa:bits={bits},packing={packing},scale={scale}")
        state = compressor.init(layout, x)
        compressor.measure(x, layout, state)
        found = encode(compressor, x, layout, Key(), state)
        said = np.array(payload, np.uint8) if packing == "bits" else \
            (2 * np.array(codes) - (2**bits - 1)).astype(packing)
        assert found.tobytes() == raw(floats(0.6), said)
        np.testing.assert_allclose(decode(compressor, found, layout), means, atol=1e-7)


@pytest.mark.parametrize("packing", ["bits", "int8", "int16", "int32"])
def test_dorefa_with_a_shared_scale_on_two_ranks(draws, packing):
    draws(U_A, U_B)
    compressor = from_spec(f"dorefa:bits=2,packing={packing}")
    layout, payloads = vectors(4), []
    gradients = [floats(*G_A), floats(*G_B)]
    states = [compressor.init(layout, x) for x in gradients]
    shared = [compressor.measure(x, layout, s) for x, s in zip(gradients, states)]
    for array in shared:
        array[:] = 0.6  # the maximum, as the exchange puts it
    for rank, (x, state) in enumerate(zip(gradients, states)):
        payloads.append(encode(compressor, x, layout, Key(rank=rank), state))
    mean = sum(decode(compressor, p, layout, 0.5) for p in payloads)
    np.testing.assert_allclose(mean, [0, 0, 0.2, -0.2], atol=1e-7)
    if packing == "bits":
        assert payloads[0].tobytes() == raw(floats(0.6), np.uint8([0x62]))
        assert payloads[1].tobytes() == raw(floats(0.6), np.uint8([1 | 3 << 2 | 2 << 4 | 1 << 6]))
        return
    total = payloads[0][4:].view(packing) + payloads[1][4:].view(packing)  # as MPI does
    np.testing.assert_array_equal(total, 2 * np.array([3, 3, 4, 2]) - 2 * 3)
    summed = np.concatenate([payloads[0][:4], total.view(np.uint8)])
    np.testing.assert_allclose(decode(compressor, summed, layout, 0.5), mean, atol=1e-7)


def test_dorefa_variance():
    """(2m/n)^2 f (1 - f), f the fraction of n (g / 2m + 1/2), from 4e5 draws."""
    compressor, draws = from_spec("dorefa:bits=2"), 400_000
    layout, x = vectors(4 * draws), np.tile(floats(*G_A), 400_000)
    state = compressor.init(layout, x)
    compressor.measure(x, layout, state)
    said = decode(compressor, encode(compressor, x, layout, Key(), state), layout)
    said = said.reshape(draws, 4).astype(float)
    np.testing.assert_allclose(said.var(axis=0), [.03, 0, .04, .0175], atol=3e-4)
    np.testing.assert_allclose(said.mean(axis=0), G_A, atol=2e-3)


def test_dorefa_zeros_stay_zero():
    compressor, layout, x = from_spec("dorefa:bits=3"), vectors(5, 2), floats(0, 0, 0, 0, 0, 1, 1)
    state = compressor.init(layout, x)
    compressor.measure(x, layout, state)
    said = decode(compressor, encode(compressor, x, layout, Key(), state), layout)
    np.testing.assert_array_equal(said, x)


# ---- Dryden, one stage ------------------------------------------------------------------------

COLUMN = floats(.9, -.1, .3, -.8, .05, .7, -.4, .2, -.6, .1, .6, -.2, .8, .4, -.3, 0)


def test_dryden_2016():
    compressor = Residual(from_spec("dryden:proportion=4"))
    layout = vectors(16)
    state = compressor.init(layout, COLUMN)
    payload = step(compressor, COLUMN, state, layout)
    assert payload.tobytes() == raw(words(3), floats(-0.8, 0.85), words(1, 6, 25))
    rest = COLUMN.copy()
    rest[[0, 3, 12]] = 0.05, 0, -0.05
    np.testing.assert_allclose(state.owed, rest, atol=1e-7)


def test_dryden_2017():
    compressor = Residual(from_spec("dryden:proportion=4,version=2017"))
    layout = vectors(16)
    state = compressor.init(layout, COLUMN)
    payload = step(compressor, COLUMN, state, layout)
    mean = (COLUMN[0] + COLUMN[5] + COLUMN[12]) / np.float32(3)
    sent = np.uint16([4, 0 << 1 | 1, 3 << 1, 5 << 1 | 1, 12 << 1 | 1])
    assert payload.tobytes() == raw(floats(-0.8, mean), sent, np.uint8([0, 0]))
    assert mean == pytest.approx(0.8)


@pytest.mark.parametrize("matrix, said, owed, payload", [
    # what rank 1 tells the owner of column 0, and what that owner tells all of its sum
    ([1, 2, -3, -5], [0, 2, 0, -5], [1, 0, -3, 0], raw(words(2), floats(-5, 2), words(3, 6))),
    ([4, 0, 1, -6], [4, 0, 0, -6], [0, 0, 1, 0], raw(words(2), floats(-6, 4), words(1, 6))),
    # the same for column 1, of rank 0
    ([1, -3, 2, -1], [0, -3, 2, 0], [1, 0, 0, -1], raw(words(2), floats(-3, 2), words(2, 5))),
    ([2, -4, 7, 1], [0, -4, 7, 0], [2, 0, 0, 1], raw(words(2), floats(-4, 7), words(2, 5)))])
def test_dryden_columns_of_two_ranks(matrix, said, owed, payload):
    compressor, x = Residual(from_spec("dryden:proportion=2,min_rows=1")), floats(*matrix)
    layout = Layout.of([("w", (4, 1))])
    state = compressor.init(layout, x)
    found = step(compressor, x, state, layout)
    assert found.tobytes() == payload
    np.testing.assert_array_equal(decode(compressor, found, layout), said)
    np.testing.assert_array_equal(state.owed, owed)


def test_dryden_columns_lie_side_by_side():
    layout = Layout.of([("w", (4, 2))])
    x = floats([1, 1], [2, -3], [-3, 2], [-5, -1]).reshape(-1)
    compressor = from_spec("dryden:proportion=2,min_rows=1")
    found = encode(compressor, x, layout, Key(), compressor.init(layout, x))
    # element (row, column) has the index 2 row + column
    assert found.tobytes() == raw(words(4), floats(-5, -3), floats(2, 2),
                                  words(2 << 1 | 1, 3 << 1, 5 << 1 | 1, 6 << 1))
    newer = from_spec("dryden:proportion=2,min_rows=1,version=2017")
    found = encode(newer, x, layout, Key(), newer.init(layout, x))
    # of 8 magnitudes the 4 largest: 5, 3, 3, and 2 twice
    assert found.tobytes() == raw(floats(-4, -3), floats(2, 2), np.uint16([3, 2]),
                                  np.uint16([3, 4, 6, 2, 5]), np.uint8([0, 0]))


@pytest.mark.parametrize("version", ["2016", "2017"])
def test_dryden_guards(version):
    """An absent sign, zeros: nothing is said about them."""
    compressor, layout = from_spec(f"dryden:proportion=4,version={version}"), vectors(6)
    for x, said in [((0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0)),
                    ((0, 0, 3, 0, 0, 0), (0, 0, 3, 0, 0, 0)),
                    ((-1, -2, -3, -4, -5, -6), (0, 0, 0, 0, 0, -6))]:
        payload = encode(compressor, floats(*x), layout, Key(), compressor.init(layout, floats(*x)))
        np.testing.assert_array_equal(decode(compressor, payload, layout), floats(*said))


# ---- gradient dropping ------------------------------------------------------------------------

DROP_A = floats(.1, -.8, .3, .05, -.2, .6, -.05, .4)
DROP_B = floats(0, -.5, 0, .7, .1, 0, .2, -.1)


@pytest.mark.parametrize("sample", ["exact", "100000", "8"])
def test_dropping(sample):
    compressor = Residual(from_spec(f"dropping:rate=0.75,sample={sample}"))
    layout = vectors(8)
    state = compressor.init(layout, DROP_A)
    payload = step(compressor, DROP_A, state, layout)
    assert payload.tobytes() == raw(np.int32([1, 5]), floats(-.8, .6))
    np.testing.assert_array_equal(state.owed, floats(.1, 0, .3, .05, -.2, 0, -.05, .4))
    # The next step ties at the cut, three times 0.5: nothing is sent. In binary, .3 + .2, -.2 + -.3
    # and .4 + .1 are all the float32 0.5.
    payload = step(compressor, floats(.1, 0, .2, 0, -.3, .1, 0, .1), state, layout)
    assert payload.size == 0
    np.testing.assert_allclose(state.owed, [.2, 0, .5, .05, -.5, .1, -.05, .5], atol=1e-7)

    other = compressor.init(layout, DROP_B)
    second = step(compressor, DROP_B, other, layout)
    assert second.tobytes() == raw(np.int32([1, 3]), floats(-.5, .7))
    first = raw(np.int32([1, 5]), floats(-.8, .6))
    total = decode(compressor, second, layout,
                   onto=decode(compressor, np.frombuffer(first, np.uint8), layout))
    np.testing.assert_array_equal(total, floats(0, floats(-.8)[0] - np.float32(.5), 0, .7, 0, .6,
                                                0, 0))


def test_dropping_in_marians_first_version():
    """The cut is the next magnitude, .6."""
    compressor, layout = from_spec("dropping:rate=0.75,cut=marian-feb2017"), vectors(8)
    payload = encode(compressor, DROP_A, layout, Key(), compressor.init(layout, DROP_A))
    assert payload.tobytes() == raw(np.int32([1]), floats(-.8))


def test_dropping_with_local_thresholds():
    compressor, layout = from_spec("dropping:rate=0.75,scope=layer"), vectors(4, 4)
    payload = encode(compressor, DROP_A, layout, Key(), compressor.init(layout, DROP_A))
    # the cuts are .3 and .4
    assert payload.tobytes() == raw(np.int32([1, 5]), floats(-.8, .6))


def test_dropping_what_is_pulled():
    compressor, layout = Residual(from_spec("dropping:rate=0.75")), vectors(8)
    delta = np.float32(-0.1) * floats(0, -1.3, 0, .7, 0, .6, 0, 0)
    state = compressor.init(layout, delta)
    payload = step(compressor, delta, state, layout)
    assert payload.tobytes() == raw(np.int32([1, 3]), delta[[1, 3]])
    np.testing.assert_array_equal(state.owed, np.where(np.arange(8) == 5, delta[5], 0))


def test_dropping_sends_nothing_of_equal_magnitudes():
    compressor, layout = from_spec("dropping:rate=0.5"), vectors(4)
    x = floats(1, -1, 1, 1)
    assert encode(compressor, x, layout, Key(), compressor.init(layout, x)).size == 0


def test_dropping_signs_of_survivors():
    compressor, layout = from_spec("dropping:rate=0.5,survivors=onebit"), vectors(8)
    payload = encode(compressor, DROP_A, layout, Key(), compressor.init(layout, DROP_A))
    # the cut is .2; .3, .6 and .4 are positive
    mean = (DROP_A[2] + DROP_A[5] + DROP_A[7]) / np.float32(3)
    assert payload.tobytes() == raw(floats(-.8, mean), words(1 << 1, 2 << 1 | 1, 5 << 1 | 1,
                                                             7 << 1 | 1))


# ---- AdaComp ----------------------------------------------------------------------------------

OWED = floats(.6, -.1, 0, .2, -.3, 0, .5, -.2, 0, 0)
NEWEST = floats(.1, -.4, .05, .3, .1, -.2, -.1, -.35, 0, 0)


def test_adacomp():
    compressor, layout = Residual(from_spec("adacomp:bin=4")), vectors(10)
    state = compressor.init(layout, NEWEST)
    state.owed[:] = OWED
    payload = step(compressor, NEWEST, state, layout)
    given = OWED + NEWEST
    scale = (given[0] + np.abs(given[7]) + 0) / np.float32(3)
    # bin 0: 0+, 1-, and 3+ as its last; bin 1: 3- as its last; the bin of zeros is not mentioned
    entries = np.uint8([0 << 2 | 1, 1 << 2, 3 << 2 | 2 | 1, 3 << 2 | 2])
    assert payload.tobytes() == raw(floats(scale), words(4), entries)
    assert scale == pytest.approx(0.416667, abs=1e-6)
    np.testing.assert_allclose(
        state.owed, [.283333, -.083333, .05, .083333, -.2, -.2, .4, -.133333, 0, 0], atol=1e-6)
    np.testing.assert_allclose(decode(compressor, payload, layout) + state.owed, given, atol=1e-7)


def test_adacomp_maxima_of_the_bins():
    """gmax = .7, .55 and 0; elements 1 and 3 pass though |G| = .5: the soft threshold."""
    g, dw = OWED + NEWEST, NEWEST
    np.testing.assert_allclose(g, [.7, -.5, .05, .5, -.2, -.2, .4, -.55, 0, 0], atol=1e-7)
    sent, scale = kernels.reference.adacomp_select(g, dw, 2.0, 4)
    assert sent.tolist() == [0, 1, 3, 7] and scale == pytest.approx((.7 + .55 + 0) / 3)
    hard, _ = kernels.reference.adacomp_select(g, dw, 1.0, 4)
    assert hard.tolist() == [0, 7]


def test_adacomp_passes_over_quiet_bins():
    """Runs of bins without an entry, in 8 and in 16 bits, 16-bit layers first."""
    layout = Layout.of([("conv", (10, 10, 10)), ("fc", (60, 500))])
    x = np.zeros(layout.size, np.float32)
    x[[3, 951]] = 2, -2  # bins 0 and 19 of 50: a run of 18, of which an entry holds 64 - 49 = 15
    x[1000 + 20 * 500 + 7] = 5  # bin 20 of 500
    compressor = from_spec("adacomp")
    payload = encode(compressor, x, layout, Key(), compressor.init(layout, x))
    wide = np.uint16([(498 + 20) << 2, 7 << 2 | 2 | 1])
    narrow = np.uint8([3 << 2 | 2 | 1, (48 + 15) << 2, (48 + 3) << 2, 1 << 2 | 2])
    scales = floats(4, 5) / floats(20, 60)
    assert payload.tobytes() == raw(scales, words(4, 2), wide, narrow)
    np.testing.assert_array_equal(
        decode(compressor, payload, layout),
        np.sign(x) * np.repeat(scales, [1000, 30000]))


def test_adacomp_looks_ahead_with_the_newest_gradient():
    """What is given as x to `encode` counts as new: H = factor * x. G = 0 is never sent."""
    compressor, layout, x = from_spec("adacomp:bin=4"), vectors(4), floats(1, .5, .49, -.5)
    payload = encode(compressor, x, layout, Key(), compressor.init(layout, x))
    assert payload.tobytes() == raw(floats(1), words(3), np.uint8([1, 1 << 2 | 1, 3 << 2 | 2]))
    feedback = Residual(compressor)
    state = feedback.init(layout, x)
    state.owed[:] = -x
    assert step(feedback, x, state, layout).tobytes() == raw(floats(0), words(0))
