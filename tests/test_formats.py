"""How long payloads are, and what they mean: formulas of the papers and of docs/wire-format.md."""

from itertools import groupby

import laws
import numpy as np
import pytest
from laws import decode, pack
from material import LAYOUTS, cases, compressors, gradient, vectors

from mpicomp.compressors.registry import from_spec
from mpicomp.layout import Layout
from mpicomp.philox import uniform


def rows_of(name):
    """All configurations of one compressor."""
    return pytest.mark.parametrize("compressor", [c for c in compressors() if c.name == name],
                                   ids=repr)


def blocks(n, of):
    return (n + of - 1) // of


def per_tensor(size):
    """A format in which tensors follow one another: the bytes of each added up."""
    return lambda c, layout: sum(size(c, s.shape, s.size) for s in layout.segments)


def columns_of(c, shape, n):
    """(rows, columns): few rows, or a vector, are one column."""
    rows, columns = (shape[0], n // max(shape[0], 1)) if len(shape) > 1 else (n, 1)
    return (n, 1) if rows < c.min_rows else (rows, columns)


def onebit_size(c, shape, n):
    """8 bytes a column and 4 for every 32 rows begun; with k bits, for every 32 / k rows."""
    rows, columns = columns_of(c, shape, n)
    return columns * (8 + 4 * blocks(rows * c.bits, 32)) if n else 0


def ternary_size(c, shape, n):
    """A float a layer; 2 bits, 2 bits + a group of padding, 8/5, 8 or 16 bits an element."""
    codes = {"2bit": blocks(n, 4), "planar": (n + 4 - n % 4) // 4 if n else 0, "int8": n,
             "int16": 2 * n, "5trit": blocks(n, 5)}
    return 4 + codes[c.packing]


def dorefa_size(c, shape, n):
    """A float a layer, and k, 8, 16 or 32 bits an element."""
    return 4 + blocks(n * {"bits": c.bits, "int8": 8, "int16": 16, "int32": 32}[c.packing], 8)


def adacomp_size(c, shape, n):
    """A float and a count a layer; 8 bits an element in bins of up to 64, else 16."""
    size = int(c.bin) if c.bin != "auto" else 50 if len(shape) > 2 else 500
    return 8 + n * (1 if size <= 64 else 2)


def dryden_size(c, shape, n):
    """Two floats a column and a word an element, with one count or with one a column."""
    rows, columns = columns_of(c, shape, n)
    if c.version == "2016":
        return 4 + 8 * columns + 4 * n if n else 0
    return 8 * columns + 4 * blocks((2 if rows <= 2**15 else 4) * (columns + n), 4) if n else 0


def block_size(c, shape, n):
    """2 bytes for every block begun, 8 or 4 bits an element; qsgd: what 2 l + 1 codes take."""
    if c.name == "block":
        return 2 * blocks(n, c.size) + blocks(n * c.bits, 8)
    return 2 * blocks(n, c.bucket) + blocks(n * int(np.ceil(np.log2(2 * c.levels + 1))), 8)


def sign_size(c, shape, n):
    """4 bytes and a bit an element, whole bytes, for each tensor, row or block."""
    length = {"tensor": n, "block": c.size, "row": n // (len(shape) > 1 and shape[0] or 1)}[c.scope]
    return sum(4 + blocks(min(length, n - at), 8) for at in range(0, n, max(length, 1)))


def strom_size(c, layout):
    """A word an element; in Rice code a word and 4 bits an element, in whole words.

    With remainders of k bits 1 + k + 3 / 2**k bits an element; 2 bits; a float more if tau adapts.
    """
    n, head = layout.size, 4 if c.density else 0
    if c.coding == "words":
        return head + 4 * n
    if c.coding == "2bit":
        return head + 4 * blocks(n, 16)
    k = 0 if c.remainder == "auto" else int(c.remainder)
    return head + (4 + 4 * blocks(n * (1 + k) + 3 * n // 2**k, 32) if n else 0)


def dropping_size(c, layout):
    """Index and value an element; or two floats a scope and a word an element."""
    if c.survivors == "value":
        return 8 * layout.size
    return 8 * (len(layout.segments) if c.scope == "layer" else 1) + 4 * layout.size


def chunks_size(c, layout):
    """12 bits for each element kept, and 32; or 8 and a float a tensor; or 2 and two floats."""
    sizes = [s.size for s in layout.segments if s.size]
    kept = 0
    for size in sizes:
        while size > 0:
            kept += max(1, round(c.k * min(size, c.block) / c.block))
            size -= c.block
    values = {32: 4 * kept, 8: 4 * len(sizes) + kept, 2: 8 * len(sizes) + blocks(kept, 4)}
    return blocks(12 * kept, 8) + values[c.bits]


def powersgd_size(c, shape, n):
    """r (n + m) floats of a matrix of which that is less than 1 / rate; else n m."""
    rows = shape[0] if len(shape) > 1 else 1
    factors = c.rank * (rows + n // max(rows, 1))
    return 4 * (factors if len(shape) > 1 and factors * c.rate < n else n)


def fraction(c, n):
    """How many of n elements are sent."""
    return max(1, round(c.density * n)) if n else 0


def topk_size(c, layout):
    """Index and value of each element sent, of each tensor or of all."""
    if c.scope == "bucket":
        return 8 * fraction(c, layout.size)
    return 8 * sum(fraction(c, s.size) for s in layout.segments)


def rule_size(c, layout):
    """Neighbours with the same case together, each from a whole word on; a word for each length."""
    (test, vectors), (_, others) = c.inner
    assert test == "ndim<2"
    size = 0
    for flat, group in groupby(layout.segments, lambda s: len(s.shape) < 2):
        case, part = (vectors if flat else others), Layout.of((s.name, s.shape) for s in group)
        size += 4 * blocks(FORMATS[case.name](case, part), 4) + 4 * (not case.fixed)
    return size


# The most bytes of a payload, written out here a second time from docs/wire-format.md.
FORMATS = {
    "adacomp": per_tensor(adacomp_size),
    "bf16": per_tensor(lambda c, shape, n: 2 * n),
    "chunks": chunks_size,
    "block": per_tensor(block_size),
    "dense": per_tensor(lambda c, shape, n: 4 * n),
    "dorefa": per_tensor(dorefa_size),
    "dropping": dropping_size,
    "dryden": per_tensor(dryden_size),
    "fp16": per_tensor(lambda c, shape, n: 2 * n),
    "onebit": per_tensor(onebit_size),
    "powersgd": per_tensor(powersgd_size),
    "randomk": lambda c, layout: 4 * fraction(c, layout.size),
    "qsgd": per_tensor(block_size),
    "residual": lambda c, layout: FORMATS[c.inner.name](c.inner, layout),
    "rule": rule_size,
    "sign": per_tensor(sign_size),
    "strom": strom_size,
    "terngrad": per_tensor(ternary_size),
    "topk": topk_size,
}


@pytest.mark.parametrize("compressor", compressors(), ids=repr)
def test_capacity_is_the_documented_format(compressor):
    if not type(compressor).__module__.startswith("mpicomp."):
        pytest.skip("documented elsewhere")
    assert compressor.name in FORMATS, "write its format here and in docs/wire-format.md"
    for name, layout in LAYOUTS.items():
        assert compressor.capacity(layout) == FORMATS[compressor.name](compressor, layout), name


@pytest.mark.parametrize("spec", ["strom", "strom:tau=2.0", "strom:tau=0.5,strict=no"])
def test_strom_sends_a_word_for_each_element_beyond_tau(spec):
    c = from_spec(spec)
    tau = np.float32(c.tau)
    for what, layout, x in cases():
        beyond = [i for i, v in enumerate(x) if (abs(v) > tau if c.strict else abs(v) >= tau)]
        words = pack(c, x, layout).view(np.uint32)
        assert words.tolist() == [2 * i + (x[i] > 0) for i in beyond], what


def test_strom_refuses_more_elements_than_an_index_can_count():
    assert from_spec("strom").capacity(Layout.of([("w", (2**16, 2**15))])) == 2**33
    with pytest.raises(ValueError, match="2147483649 elements.*bucket_bytes"):
        from_spec("strom").capacity(Layout.of([("w", (2**31 + 1,))]))


# ---- what the payload means -----------------------------------------------------------------


def test_dense_is_the_identity():
    for what, layout, x in cases():
        assert (decode(from_spec("dense"), pack(from_spec("dense"), x, layout), layout) == x).all()


@pytest.mark.parametrize("spec, bits, least, most", [("fp16", 11, 2.0**-24, 65504.0),
                                                     ("bf16", 8, 2.0**-133, 3.3895314e38)])
def test_cast_rounds_to_nearest_and_saturates(spec, bits, least, most):
    """The error is at most half a unit in the last place, or half the least subnormal."""
    c = from_spec(spec)
    for what, layout, x in cases():
        said = decode(c, pack(c, x, layout), layout).astype(float)
        wanted = np.clip(x.astype(float), -most, most)
        error = np.abs(said - wanted)
        assert (error <= np.maximum(2.0**-bits * np.abs(wanted), least / 2)).all(), what
        again = said.astype(np.float32)
        assert (decode(c, pack(c, again, layout), layout) == again).all(), "not a fixed point"


def test_cast_breaks_ties_to_even():
    layout = LAYOUTS["vector of 8"]
    for spec, step in (("fp16", 2.0**-10), ("bf16", 2.0**-7)):
        x = np.array([1 + k * step / 2 for k in range(8)], np.float32)
        expected = [1 + step * k for k in (0, 0, 1, 2, 2, 2, 3, 4)]
        c = from_spec(spec)
        assert decode(c, pack(c, x, layout), layout).tolist() == expected
    c, largest = from_spec("bf16"), np.float32(3.4028235e38)
    said = decode(c, pack(c, np.full(8, largest), layout), layout)
    assert np.isfinite(said).all() and said[0] > 3.38e38


@pytest.mark.parametrize("compressor", [c for c in compressors() if c.name == "onebit" and
                                        (c.bits, c.threshold) == (1, "zero")], ids=repr)
def test_onebit_says_the_best_two_values_of_each_column(compressor):
    """The column means of both signs, to rounding: no other pair of values has a smaller error."""
    for name in ("tall", "short of a word", "convolution", "network", "vector of 4096"):
        layout = LAYOUTS[name]
        x = np.random.default_rng(4).normal(size=layout.size).astype(np.float32)
        said = decode(compressor, pack(compressor, x, layout), layout)
        for s in layout.segments:
            rows, columns = compressor.matrix(s)
            v = x[s.slice].astype(float).reshape(rows, columns)
            for j in range(columns if v.size else 0):
                column = v[:, j]
                for side in (column >= 0, column < 0):
                    if side.any():
                        level = said[s.slice].reshape(rows, columns)[side, j]
                        assert (level == level[0]).all()
                        assert level[0] == pytest.approx(column[side].mean(), rel=1e-5, abs=1e-6)


@rows_of("terngrad")
def test_terngrad_has_the_variance_of_the_paper(compressor):
    """|g| (s - |g|) an element, g the clipped gradient (algorithms of the paper, section 3.1)."""
    values = np.array([0.5, -0.25, 0.125, 0, -1, 0.75, 0.999, -0.01], np.float32)
    draws = 2**16
    layout = vectors(values.size * draws)
    x = np.tile(values, draws)
    g, s = np.abs(values).astype(float), 1.0
    if compressor.clip:
        level = compressor.clip * x.astype(float).std()
        s = level if compressor.scaler == "code" else min(1.0, level)
        g = np.minimum(g, s)
    said = decode(compressor, pack(compressor, x, layout), layout).reshape(draws, -1).astype(float)
    variance = g * (s - g)
    # A Bernoulli variable's empirical variance has a deviation below s^2 / (2 sqrt(draws)).
    assert np.abs(said.var(axis=0) - variance).max() < 6 * s**2 / (2 * np.sqrt(draws))
    assert np.abs(said.mean(axis=0) - np.sign(values) * g).max() < 6 * s / (2 * np.sqrt(draws))
    assert set(np.unique(np.abs(said))) <= {0.0, float(np.float32(s)), np.abs(said).max()}
    assert len(np.unique(np.abs(said))) == 2


def test_terngrad_clips_at_its_own_level_before_the_scaler_is_shared():
    """Another rank's scaler is larger: the spike then hits with P = level / scale, not surely."""
    c, layout = from_spec("terngrad"), vectors(4096)
    x = gradient("normal", layout)
    x[::64] = 100
    state = c.init(layout, x)
    c.measure(x, layout, state)
    level = float(state.scale[0])
    assert 3 < level < 100
    state.scale[:] = 2 * level
    said = decode(c, laws.encode(c, x, layout, laws.KEY, state), layout)
    assert set(np.unique(said[::64])) == {0.0, np.float32(2 * level)}
    assert abs((said[::64] > 0).mean() - 0.5) < 5 * 0.5 / np.sqrt(64)


def test_terngrad_draws_by_element_not_by_tensor():
    """Element i of the bucket uses word i: where a tensor begins does not matter."""
    c, x = from_spec("terngrad:clip=0.0"), np.full(300, 0.5, np.float32)
    x[0] = x[100] = 1
    whole = decode(c, pack(c, x, vectors(300)), vectors(300))
    parts = decode(c, pack(c, x, vectors(100, 200)), vectors(100, 200))
    assert laws.same(whole, parts)
    assert (whole == (uniform(laws.KEY, 0, 300) < x)).all()
