"""Numbers by hand, and what is declared of `block`, `sign` and `qsgd`."""

import laws
import numpy as np
import pytest
import torch
from laws import decode, pack
from material import vectors

from mpicomp import SpecError, method
from mpicomp.compressors import Residual
from mpicomp.compressors.registry import from_spec
from mpicomp.kernels import reference
from mpicomp.layout import Layout
from mpicomp.philox import Key

LARGEST = np.finfo(np.float32).max


def floats(*values):
    return np.array(values, np.float32)


def said(spec, x, layout=None, key=laws.KEY):
    """What the packet for x says."""
    compressor, layout = from_spec(spec), layout or vectors(x.size)
    return decode(compressor, pack(compressor, x, layout, key), layout, key=key)


# ---- block --------------------------------------------------------------------------------------


def test_a_block_of_four_bits():
    """s = max / 7 = 0.1, codes 7 -3 1 0; 0.1 rounded up to bfloat16 is 0x3DCD = 0.10009765625."""
    x, c = floats(.7, -.34, .1, .02), from_spec("block:bits=4")
    payload = pack(c, x, vectors(4))
    assert payload.tobytes().hex() == "cd3d" + "d7" + "01"  # 7 | -3 & 15 << 4, 1 | 0
    assert decode(c, payload, vectors(4)).tolist() == [.70068359375, -.30029296875, .10009765625, 0]
    assert said("block:bits=4", floats(7, -3.4, 1, .2)).tolist() == [7, -3, 1, 0]  # s = 1 exactly


def test_a_block_of_eight_bits_and_of_fp8():
    assert said("block", floats(127, -34.5, 35.5, .4)).tolist() == [127, -34, 36, 0]
    assert said("block:form=fp8", floats(448, -17, 18, 2**-9, 2**-10, 3 * 2**-10)).tolist() \
        == [448, -16, 18, 2**-9, 0, 2**-8]  # ties to even, also below 2^-6


def test_a_scale_costs_an_eighth_of_a_bit():
    layout = Layout.of([("w", (2**10, 2**10))])
    bits = {spec: 8 * from_spec(spec).capacity(layout) / layout.size
            for spec in ("block:bits=4", "block", "block:form=fp8", "block:bits=4,size=64", "qsgd")}
    assert list(bits.values()) == [4.125, 8.125, 8.125, 4.25, 4.03125]


@pytest.mark.parametrize("spec", ["block", "block:bits=4", "block:form=fp8"])
@pytest.mark.parametrize("kind", ["normal", "heavy tail", "ties", "huge"])
def test_the_nearest_code_is_no_further_than_zero_and_the_rest_is_exact(spec, kind):
    """Contraction: |x - said| <= |x|, and half a step; x = said + owed without any rounding."""
    layout = vectors(1000, 33)
    x = laws.gradient(kind, layout)
    feedback = Residual(from_spec(spec))
    state = feedback.init(layout, x)
    payload = pack(feedback, x, layout, state=state)
    feedback.commit(state)
    heard, owed = decode(feedback, payload, layout).astype(float), state.owed.astype(float)
    assert (heard + owed == x).all()
    assert (np.abs(owed) <= np.abs(x) * (1 + 2**-22)).all()
    for at in range(0, 1000, 128):
        part = slice(at, min(at + 128, 1000))
        largest = np.abs(x[part]).max()
        step = {"block": 1 / 127, "block:bits=4": 1 / 7, "block:form=fp8": 32 / 448}[spec]
        assert np.abs(owed[part]).max() <= largest * step / 2 * (1 + 2**-7)
        assert np.square(owed[part]).sum() <= (1 - 1 / 129) * np.square(x[part], dtype=float).sum()


@pytest.mark.parametrize("levels", [*range(1, 128), 448])
def test_no_scale_makes_a_value_overflow(levels):
    most = np.uint32(reference.block_most(levels) << 16).view(np.float32)
    beyond = np.uint32(reference.block_most(levels) + 1 << 16).view(np.float32)
    assert np.isfinite(most * np.float32(levels)) and float(beyond) * levels > float(LARGEST)
    scale, = reference.block_scales(floats(LARGEST, 1), 32, levels, "max")
    assert scale == reference.block_most(levels)


@pytest.mark.parametrize("spec", ["block", "block:bits=4", "block:form=fp8", "block:round=random",
                                  "qsgd:levels=1,norm=l2"])
def test_huge_and_subnormal_numbers(spec):
    x = np.full(64, LARGEST)
    x[1::2] *= -1
    heard = said(spec, x)
    if "l2" not in spec:  # there the norm is 8 times as large
        assert (np.abs(heard / x - 1) <= 2**-7).all()
    assert np.isfinite(heard).all()
    x = floats(1e-45, -1e-39)  # less than half of the least scale, 2^-126
    heard = said(spec, x)
    assert (np.abs(heard - x) <= 2.0**-126).all()
    if spec in ("block", "block:bits=4"):
        assert not heard.any()
        assert said(spec, floats(2.0**-120, 0))[0] == pytest.approx(2.0**-120, rel=0.01)


def test_e4m3_is_that_of_torch():
    """Every bfloat16 up to 448, ties included; the sign of zero, too."""
    y = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    y = y[np.abs(y) <= 448]
    theirs = torch.tensor(y).to(torch.float8_e4m3fn)
    assert (reference.block_codes(y, "fp8", 448, None) == theirs.view(torch.uint8).numpy()).all()
    values = np.zeros(256, np.float32)
    every = np.arange(256, dtype=np.uint8)
    every[[127, 255]] = 0  # not a number
    reference.block_decode_add(np.append(np.uint8([0x80, 0x3F] * 8), every), 32, "fp8", 448, 1.0,
                               values)
    assert (values == torch.tensor(every).view(torch.float8_e4m3fn).float().numpy()).all()


def test_blocks_end_with_their_tensor():
    """A small tensor beside a large one has a scale of its own, without padding in it."""
    layout, x = vectors(33, 3), np.ones(36, np.float32)
    x[:33] = 1000
    assert said("block", x, layout)[33:].tolist() == said("block", x[33:]).tolist()


# ---- at random ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["block:bits=4,round=random", "block:form=fp8,round=random",
                                  "qsgd", "qsgd:levels=3,norm=l2"])
def test_a_number_becomes_one_of_its_neighbours(spec):
    """The probability of the upper one is the distance from the lower: variance s^2 f (1 - f)."""
    draws, value = 2**13, np.float32(0.3)
    x = np.zeros(32 * draws, np.float32)
    x[::32], x[1::32] = 1, value
    c = from_spec(spec if "l2" not in spec else spec + ",bucket=32")
    if c.name == "block":
        c = from_spec(f"{spec},size=32")
    heard = said(repr(c), x)[1::32].astype(float)
    low, high = np.unique(heard)
    assert low <= value <= high and (said(repr(c), x).reshape(-1, 32)[:, 2:] == 0).all()
    hit, wanted = (heard == high).mean(), (value - low) / (high - low)
    assert abs(hit - wanted) < 5 * 0.5 / np.sqrt(draws)


def test_the_l2_norm_of_a_bucket():
    """||(3, 4)|| = 5, levels 5: the codes 3 and 4 are exact, whatever is drawn."""
    assert said("qsgd:levels=5,norm=l2", floats(3, -4)).tolist() == [3, -4]
    assert said("qsgd:levels=4", floats(3, -4)).tolist() == [3, -4]


@pytest.mark.parametrize("bucket, feedback", [(256, True), (512, False)])
def test_qsgd_takes_feedback_where_its_error_is_a_contraction(bucket, feedback):
    """The worst gradient: one of 7 steps, all others f steps, where n f^2 + 98 f = 49."""
    c, n = from_spec(f"qsgd:bucket={bucket}"), bucket - 1
    f = (np.sqrt(49**2 + 49 * n) - 49) / n
    x = np.full(bucket, f / 7, np.float32)
    x[0] = 1
    error = np.mean([np.square(said(repr(c), x, key=Key(step=step)) - x).sum()
                     for step in range(100)]) / np.square(x).sum()
    assert (error < 1) == feedback == c.feedback
    expected = n * f * (1 - f) / (49 + n * f * f)  # 0.75 and 1.19
    assert error == pytest.approx(expected, rel=0.05)
    if not feedback:
        with pytest.raises(SpecError, match="qsgd does not declare"):
            method(f"qsgd:bucket={bucket},feedback=yes")


def test_what_is_declared():
    for spec, unbiased, owes in [("block", False, True), ("block:bits=4", False, True),
                                 ("block:round=random", True, False), ("sign", False, True),
                                 ("qsgd", True, False), ("block:form=fp8", False, True)]:
        m = method(spec)
        assert (m.compressor.core.unbiased, m.feedback) == (unbiased, owes), spec
    assert method("block:round=random,feedback=yes").feedback
    assert not from_spec("block:bits=4,size=512,round=random").feedback
    assert from_spec("qsgd:bucket=128,norm=l2").feedback
    assert not from_spec("qsgd:bucket=160,norm=l2").feedback


@pytest.mark.parametrize("spec, words", [
    ("block:bits=5", "bits must be one of 8, 4"), ("block:size=100", "multiple of 32, such as 96"),
    ("block:size=65536", "at most 32768"), ("block:bits=4,form=fp8", "form=fp8 has 8 bits"),
    ("block:form=e5m2", "int, fp8"), ("qsgd:levels=128", "at most 127"),
    ("qsgd:bucket=500", "multiple of 32, such as 480"), ("sign:scope=column", "tensor, row, block"),
    ("sign:size=33", "multiple of 32"), ("block:exchange=allreduce", "MPI cannot add.*allgather")])
def test_bad_options_are_refused(spec, words):
    with pytest.raises(SpecError, match=words):
        method(spec)


# ---- sign ---------------------------------------------------------------------------------------


def test_two_stages_of_scaled_signs():
    """Two ranks, each of which owns two of four elements: mean |x| is the scale of both stages."""
    layout, halves = vectors(4), vectors(2)
    given = [floats(3, -1, 2, -2), floats(1, 1, -4, 0)]
    first, mean, owed = Residual(from_spec("sign")), np.zeros(4, np.float32), []
    for x, scale, bits in zip(given, (2, 1.5), (0b0101, 0b1011)):
        state = first.init(layout, x)
        payload = pack(first, x, layout, state=state)
        first.commit(state)
        assert payload.tobytes() == floats(scale).tobytes() + bytes([bits])
        first.decode_add(payload, mean, layout, Key(), 0.5)
        owed.append(state.owed)
    assert mean.tolist() == [1.75, -.25, .25, -.25]
    heard, rest = [], []
    for part in (mean[:2], mean[2:]):
        state = first.init(halves, part)
        payload = pack(first, part, halves, state=state)
        first.commit(state)
        heard += decode(first, payload, halves).tolist()
        rest += state.owed.tolist()
    assert heard == [1, -1, .25, -.25] and rest == [.75, .75, 0, 0]
    assert (floats(*heard) + floats(*rest) + (owed[0] + owed[1]) / 2).tolist() == [2, 0, -1, -1]


def test_a_mean_of_signs_is_a_vote():
    ranks = [floats(1, -1, 1), floats(1, 1, -1), floats(-1, -1, 1)]
    assert np.sign(sum(said("sign", x) for x in ranks)).tolist() == [1, -1, 1]


def test_the_error_of_a_mean_magnitude():
    """1 - (||x||_1 / (sqrt(d) ||x||_2))^2: 15/16 for one of 16; 1 - 2 / pi for a Gaussian."""
    def error(x):
        return np.square(said("sign", x) - x).sum(dtype=float) / np.square(x).sum(dtype=float)

    one = np.zeros(16, np.float32)
    one[5] = 3
    normal = np.random.default_rng(0).standard_normal(2**20, np.float32)
    assert error(one) == .9375
    assert error(normal) == pytest.approx(1 - 2 / np.pi, abs=2e-3)  # .363
    assert error(normal**3) == pytest.approx(.831, abs=5e-3)


def test_a_row_is_a_token_and_one_without_a_gradient_stays():
    layout = Layout.of([("embedding", (3, 2)), ("bias", (2,)), ("conv", (2, 1, 2, 1))])
    x = floats(1, -3, 0, 0, 8, 8, 1, -3, 1, 5, -2, -2)
    assert said("sign:scope=row", x, layout).tolist() == [2, -2, 0, 0, 8, 8, 2, -2, 3, 3, -2, -2]
    np.testing.assert_allclose(said("sign", x, layout)[:6],
                               [10 / 3 * s for s in (1, -1, 1, 1, 1, 1)], rtol=1e-6)


def test_blocks_of_signs():
    x = np.arange(-40, 40, dtype=np.float32)
    heard = said("sign:scope=block,size=32", x)
    assert heard[:32].tolist() == [-24.5] * 32 and np.abs(heard[64:]).tolist() == [31.5] * 16
    assert (np.sign(heard) == np.where(x >= 0, 1, -1)).all()
