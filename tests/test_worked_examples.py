"""Worked examples of the papers' arithmetic, to the byte: every number was made by hand."""

import numpy as np
import pytest
from laws import KEY, decode, encode, pack
from material import vectors

from mpicomp import kernels, philox
from mpicomp.compressors import Residual
from mpicomp.compressors.registry import from_spec
from mpicomp.kernels import reference
from mpicomp.layout import Layout


def floats(*values):
    """The little-endian bytes of float32 numbers."""
    return np.array(values, "<f4").tobytes()


def words(*values):
    """The little-endian bytes of 32-bit words."""
    return np.array(values, "<u4").tobytes()


# ---- TernGrad: two workers, one layer of six elements ---------------------------------------

G = np.array([[.5, -.25, .125, 0, -1, .75], [.25, -.5, .875, .125, .25, -.75]], np.float32)
U = np.array([[.3, .4, .1, .5, .99, .8], [.6, .1, .9, .05, .2, .7]], np.float32)
T = [[1, 0, 1, 0, -1, 0], [0, -1, 0, 1, 1, -1]]
MEAN = [0.5, -0.5, 0.5, 0.5, 0, -0.5]
PACKED = {  # of both workers
    # planar: code + 1 and the padding 0, 1 cut into quarters of two: 21 21 01 01 -> byte j is
    # q0[j] + 4 q1[j] + 16 q2[j] + 64 q3[j] = 2 + 8, 1 + 4 + 16 + 64; the other's: 10 12 20 01
    "planar": (b"\x0a\x55", b"\x25\x48"),
    # 2bit: digits 2121 01.. lowest first = 2 + 4 + 32 + 64, 0 + 4; and 1012 20.. = 1 + 16 + 128, 2
    "2bit": (b"\x66\x04", b"\x91\x02"),
    "int8": (bytes([1, 0, 1, 0, 255, 0]), bytes([0, 255, 0, 1, 1, 255])),
    "int16": (np.array(T[0], "<i2").tobytes(), np.array(T[1], "<i2").tobytes()),
}


def test_terngrad_codes_of_two_workers():
    scales = [reference.terngrad_scale(g, 2.5)[1] for g in G]
    assert scales == [1.0, 0.875]
    codes = [reference.terngrad_codes(g, np.inf, max(scales), u) for g, u in zip(G, U)]
    assert [c.tolist() for c in codes] == T
    assert (sum(codes) / 2).tolist() == MEAN


@pytest.mark.parametrize("packing", PACKED)
def test_terngrad_packets_of_two_workers(packing, monkeypatch):
    """Through the public compressor: shared scaler, the given draws, the bytes, and the mean."""
    monkeypatch.setattr(kernels, "of", lambda array: reference)  # draws from philox.uniform
    c, layout = from_spec(f"terngrad:packing={packing}"), vectors(6)
    states = [c.init(layout, g) for g in G]
    shared = max(c.measure(g, layout, s)[0] for g, s in zip(G, states))
    mean = np.zeros(6, np.float32)
    for g, u, state, expected in zip(G, U, states, PACKED[packing]):
        state.scale[:] = shared
        monkeypatch.setattr(philox, "uniform", lambda key, start, count, u=u: u[start:][:count])
        payload = encode(c, g, layout, KEY, state)
        assert payload.tobytes() == floats(1.0) + expected
        c.decode_add(payload, mean, layout, KEY, 0.5)
    assert mean.tolist() == MEAN


def test_terngrad_planar_pads_a_whole_group():
    data = np.zeros(3, np.uint8)
    reference.terngrad_pack(np.zeros(8, np.int8), "planar", data)
    # 111 111 110 123 -> 1 + 4 + 16 + 64, the same, 1 + 4 + 16 * 0 + 64 * 3: twelve digits, cut in
    # quarters of three, the last four of which are the padding 0 1 2 3
    assert data.tolist() == [1 + 4 + 16 + 64 * 1, 1 + 4 + 16 + 64 * 2, 1 + 4 + 0 + 64 * 3]


def test_terngrad_variance_of_worker_a():
    """|g| (s - |g|) an element, from 2e5 draws."""
    c, draws = from_spec("terngrad:clip=0"), 200_000
    layout = vectors(6 * draws)
    said = decode(c, pack(c, np.tile(G[0], draws), layout), layout).reshape(draws, 6).astype(float)
    np.testing.assert_allclose(said.var(axis=0), [.25, .1875, .109375, 0, 0, .1875], atol=2e-3)
    np.testing.assert_allclose(said.mean(axis=0), G[0], atol=5e-3)


def test_terngrad_says_the_clipped_element_for_sure():
    g1, c = np.array([.5, -.25, .125, 0, -.5, .25, .375, -4, .5, -.25]), from_spec("terngrad")
    assert (g1.mean(), g1.std()) == pytest.approx((-.325, 1.266393), abs=1e-6)
    said = decode(c, pack(c, g1.astype(np.float32), vectors(10)), vectors(10))
    assert said[7] == pytest.approx(-3.165981, abs=1e-6)


def test_terngrad_clips_at_two_and_a_half_sigma():
    g1 = np.array([.5, -.25, .125, 0, -.5, .25, .375, -4, .5, -.25], np.float32)
    g2 = np.array([1, -.5, .25, .5, -1, 0, .75, -.25, .5, .25], np.float32)
    assert reference.terngrad_scale(g1, 2.5) == pytest.approx((3.165981, 3.165981), abs=1e-6)
    assert reference.terngrad_scale(g2, 2.5) == pytest.approx((1.430690, 1.0), abs=1e-6)
    level, scale = reference.terngrad_scale(g1, 2.5)
    always = reference.terngrad_codes(g1, level, scale, np.full(10, 1 - 2**-24, np.float32))
    assert always.tolist() == [0, 0, 0, 0, 0, 0, 0, -1, 0, 0]  # what is clipped is always sent


@pytest.mark.parametrize("x", [[0.7], [0.3] * 100, [1e-40] * 9, [0.0] * 9, [], [-5.0] * 8])
def test_terngrad_does_not_crush_what_is_constant(x):
    """sigma = 0 must not clip everything to nothing: a single bias would never train."""
    x = np.array(x, np.float32)
    level, scale = reference.terngrad_scale(x, 2.5)
    assert level == np.inf and scale == np.abs(x).max(initial=0)


# ---- 1-bit SGD: two ranks, a 4 x 2 matrix ---------------------------------------------------

GA = np.array([[1, -2], [-3, 4], [2, -1], [0, 1]], np.float32)
GB = np.array([[2, 1], [1, -3], [-1, -1], [-4, 2]], np.float32)
OWED_A = [[0, -.5], [0, 1.5], [1, .5], [-1, -1.5]]
OWED_B = [[.5, -.5], [-.5, -1], [1.5, 1], [-1.5, .5]]
MATRIX = Layout.of([("w", (4, 2))])
# bits of a column, row 0 lowest: A 1011 -> 13, 0101 -> 10; B 1100 -> 3, 1001 -> 9
ONEBIT = {
    "means": (floats(-3, -1.5, 1, 2.5) + words(13, 10), floats(-2.5, -2, 1.5, 1.5) + words(3, 9)),
    "cntk": (floats(-5, 3) + words(13) + floats(-3.5, 4.5) + words(10),
             floats(-4.5, 3.5) + words(3) + floats(-3.75, 3.25) + words(9)),
}


@pytest.mark.parametrize("wire", ONEBIT)
def test_onebit_packets_and_residuals_of_two_ranks(wire):
    c = Residual(from_spec(f"onebit:wire={wire},min_rows=1"))
    for g, expected, owed in zip((GA, GB), ONEBIT[wire], (OWED_A, OWED_B)):
        x = g.reshape(-1)
        state = c.init(MATRIX, x)
        payload = pack(c, x, MATRIX, state=state)
        c.commit(state)
        assert payload.tobytes() == expected
        assert state.owed.reshape(4, 2).tolist() == owed
        assert (decode(c, payload, MATRIX).reshape(4, 2) + owed).tolist() == g.tolist()


@pytest.mark.parametrize("wire", ONEBIT)
def test_onebit_says_the_residual_when_there_is_no_gradient(wire):
    """A's next step with G = 0: means -1 and 1/3, -1 and 1; bits 1110 -> 7, 0110 -> 6."""
    c = Residual(from_spec(f"onebit:wire={wire},min_rows=1"))
    state = c.init(MATRIX, GA.reshape(-1))
    pack(c, GA.reshape(-1), MATRIX, state=state)
    c.commit(state)
    payload = pack(c, np.zeros(8, np.float32), MATRIX, state=state)
    c.commit(state)
    third = 1 / 3
    if wire == "means":
        assert payload.tobytes() == floats(-1, -1, third, 1) + words(7, 6)
    expected = [[-third, .5], [-third, .5], [2 * third, -.5], [0, -.5]]
    np.testing.assert_allclose(state.owed.reshape(4, 2), expected, atol=2**-23)


def test_onebit_bits_of_seventy_rows():
    """Ones at rows 0, 1, 2, 3 and 69. Ours: row i in word i // 32. CNTK's: in word i % 3."""
    x = np.full(70, -1, np.float32)
    x[[0, 1, 2, 3, 69]] = 1
    for wire, expected in (("means", (0xF, 0x0, 0x20)), ("cntk", (0x800003, 0x1, 0x1))):
        payload = pack(from_spec(f"onebit:wire={wire}"), x, vectors(70))
        bounds = (-1, 1) if wire == "means" else (-2, 2)
        assert payload.tobytes() == floats(*bounds) + words(*expected)


def test_onebit_short_columns_are_taken_together():
    """4 x 2 with min_rows = 32 is one column of 8: row-major bits, one pair of means."""
    payload = pack(from_spec("onebit"), GA.reshape(-1), MATRIX)
    # 1 -2 -3 4 2 -1 0 1: bits 1 0 0 1 1 0 1 1 -> 217; means -2 and 8/5
    assert payload.tobytes() == floats(-2, 1.6) + words(217)


def test_onebit_zero_counts_as_positive():
    payload = pack(from_spec("onebit"), np.array([0.0, -0.0, -1.0], np.float32), vectors(3))
    assert payload.tobytes() == floats(-1, 0) + words(0b011)


# ---- Strom: tau = 1, two workers ------------------------------------------------------------

STEPS = [  # gradient, words, residual
    ([.4, 2.6, -1.2, 0, -.9, 1.0], [3, 4], [.4, 1.6, -.2, 0, -.9, 1.0]),
    ([.7, .1, -.3, .2, -.3, .1], [1, 3, 8, 11], [.1, .7, -.5, .2, -.2, .1]),
    ([0, 0, 0, 0, 0, 0], [], [.1, .7, -.5, .2, -.2, .1]),
]


def test_strom_words_and_residuals_of_three_steps():
    c, layout = Residual(from_spec("strom:tau=1")), vectors(6)
    state = c.init(layout, np.zeros(6, np.float32))
    for g, expected, owed in STEPS:
        payload = pack(c, np.array(g, np.float32), layout, state=state)
        c.commit(state)
        assert payload.tobytes() == words(*expected)
        np.testing.assert_allclose(state.owed, owed, atol=1e-6)


def test_strom_sends_tau_itself_only_if_not_strict():
    x = np.array(STEPS[0][0], np.float32)
    assert pack(from_spec("strom:tau=1,strict=no"), x, vectors(6)).tobytes() == words(3, 4, 11)


def test_strom_two_workers():
    c, total = from_spec("strom:tau=1"), np.zeros(6, np.float32)
    for g, expected in ((STEPS[0][0], (3, 4)), ([1.5, 1.5, 0, -2, 0, 0], (1, 3, 6))):
        payload = pack(c, np.array(g, np.float32), vectors(6))
        assert payload.tobytes() == words(*expected)
        c.decode_add(payload, total, vectors(6), KEY)
    assert total.tolist() == [1, 2, -1, -1, 0, 0]


def test_strom_golomb_rice():
    """(3,+), (40,-), (45,+), (200,+) with remainders of 4 bits: 43 bits in two words."""
    x, layout = np.zeros(300, np.float32), vectors(300)
    x[[3, 40, 45, 200]] = 2, -2, 2, 2
    c = from_spec("strom:tau=1,coding=rice,remainder=4")
    payload = pack(c, x, layout)
    assert payload.tobytes() == words(4, 0xfffda9ee, 0xfffffbbf)
    assert (decode(c, payload, layout) == np.sign(x)).all()


def test_strom_in_the_two_bits_of_mxnet():
    """The first step of worker A: 00 11 10 00, then nothing; a multiple of 16 elements."""
    payload = pack(from_spec("strom:tau=1,coding=2bit"), np.array(STEPS[0][0], np.float32),
                   vectors(6))
    assert payload.tobytes() == bytes([0x38, 0, 0, 0])
