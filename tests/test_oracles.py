"""What the authors' own code makes of a gradient: fidelity to it is a test.

A file of tests/oracles/ names a source, its commit and functions, and how these were run; beside it
lie the gradients, which are ours, and what came out. No code of theirs is here. A packet of the
same format must be the same to the bit, where their sums and ours are exact; else values agree as
far as float32 sums in another order do, and the choice of what is sent agrees exactly.

Of Strom and AdaComp there is no authors' code: Strom's words are compared with LBANN's port and
MXNet's, AdaComp with the worked example of its paper (test_worked_seven.py). Where this package
departs from a source on purpose, a test here says so, and docs/methods.md why.
"""

import json
import zlib
from math import prod
from pathlib import Path

import numpy as np
import pytest
from laws import decode, pack

from mpicomp import kernels
from mpicomp.compressors.registry import from_spec
from mpicomp.kernels import reference
from mpicomp.layout import Layout
from mpicomp.philox import Key

HERE = Path(__file__).parent / "oracles"


def load(name):
    """[(case, {kind: array})] of one source."""
    cases = json.loads((HERE / f"{name}.json").read_text())["cases"]
    flat, at = dict(np.load(HERE / f"{name}.npz")), {}
    found = []
    for case in cases:
        arrays = {}
        for kind, shape in case["arrays"].items():
            begin = at.get(kind, 0)
            at[kind] = begin + prod(shape)
            arrays[kind] = flat[kind][begin:at[kind]].reshape(shape)
        found.append((case, arrays))
    return found


def cases(name, choose=lambda case: True):
    """The parameters of a test: every case of a source that is chosen."""
    return pytest.mark.parametrize("case, a", [pytest.param(case, a, id=case["name"])
                                               for case, a in load(name) if choose(case)])


@pytest.fixture(params=kernels.backends(), autouse=True)
def k(request):
    """Every backend in turn."""
    before = kernels.for_numpy()
    yield kernels.use(request.param)
    kernels.use(next(name for name, module in kernels.backends().items() if module is before))


def layout(x):
    return Layout.of([("w", x.shape)])


def said(spec, x):
    """(payload, what it says) of x alone."""
    c = from_spec(spec)
    payload = pack(c, x.reshape(-1), layout(x), Key())
    return payload, decode(c, payload, layout(x), key=Key()).reshape(x.shape)


def steps(spec, gradients):
    """(payload, what is then owed) of one gradient after the other, with error feedback."""
    c = from_spec(f"residual({spec})")
    state = c.init(layout(gradients[0]), gradients[0].reshape(-1))
    packet = np.zeros(c.capacity(layout(gradients[0])), np.uint8)
    for x in gradients:
        used = c.encode(np.ascontiguousarray(x).reshape(-1), packet, layout(x), Key(), state)
        c.commit(state)
        yield packet[:used].copy(), state.owed.reshape(x.shape).copy()


def near(found, expected, of=None):
    """Equal up to some float32 roundings of the largest value of a column, or of `of`'s."""
    most = np.abs(expected if of is None else of).max(axis=0)
    return bool((np.abs(found - expected) <= 3e-6 * most).all())


def test_every_oracle_names_its_source():
    names = sorted(path.stem for path in HERE.glob("*.json"))
    assert names == ["cntk", "dorefa", "lbann", "marian", "mxnet", "terngrad"]
    for name in names:
        told = json.loads((HERE / f"{name}.json").read_text())
        assert told["source"].count("/") == 1 and told["run"] and told["date"] and told["cases"]
        assert {"commit", "commits", "versions"} & set(told)
    assert sum(path.stat().st_size for path in HERE.iterdir()) < 130_000


# ---- CNTK: 1-bit SGD ----------------------------------------------------------------------------


def of_cntk(case):
    return (f"onebit:wire=cntk,min_rows=1,bits={case['bits']},"
            f"threshold={case['threshold'] if case['bits'] == 1 else 'zero'}")


@cases("cntk", lambda case: not case["name"].startswith("tiny"))
def test_cntk(case, a):
    payload, value = said(of_cntk(case), a["x"])
    if case["exact"] and case["threshold"] == "zero":
        assert payload.tobytes() == a["packet"].tobytes()
        assert (value == a["decoded"]).all()
    columns = a["x"].shape[1]
    ours, theirs = (p.view(np.uint32).reshape(columns, -1) for p in (payload, a["packet"]))
    assert (ours[:, 2:] == theirs[:, 2:]).all(), "the same codes"
    assert near(value, a["decoded"])
    if "residual2" in a:
        second = (a["x"][::-1] * np.float32(0.5)).copy()
        *_, (_, owed) = steps(of_cntk(case), [a["x"], second])
        assert near(owed, a["residual2"], a["x"])


@cases("cntk", lambda case: case["name"].startswith("tiny"))
def test_cntk_says_nothing_where_squares_underflow(case, a):
    """Its float32 sum of v * v is 0 there, so the range is 0; ours are sums of float64."""
    _, value = said(of_cntk(case), a["x"])
    x = a["x"].astype(np.float64)  # codes are steps of 8 deviations, cut at 4
    step = 8 * np.sqrt((x * x).mean(axis=0)) / (2**case["bits"] - 1)
    assert not a["decoded"][:, :2].any(), "columns of 1e-24 and 1e-30"
    assert (np.abs(value - x) <= step).all() and value[:, 0].any() and value[:, 1].any()
    assert near(value[:, 2], a["decoded"][:, 2]), "1e-17: the same"


# ---- TernGrad -----------------------------------------------------------------------------------

TERNGRAD_KEY = Key(2**40 + 7, 3, 11, 2)
CONSTANT = ("flat-clip2.5", "single-clip2.5")


@cases("terngrad")
def test_terngrad_clips_and_scales(case, a, k):
    """To sigma's last bits: they sum float32. A constant layer is crushed there, and not here."""
    level, scale = k.terngrad_scale(a["x"], case["clip"])
    _, code = k.terngrad_scale_code(a["x"], case["clip"])
    if case["name"] in CONSTANT:
        assert np.abs(a["clipped"]).max() < 1e-6
        assert level == np.inf and scale == code == np.abs(a["x"]).max()
        return
    assert near(np.clip(a["x"], -level, level), a["clipped"])
    assert scale == pytest.approx(np.abs(a["clipped"]).max(), rel=3e-6)
    assert code == pytest.approx(float(a["scaler"]), rel=3e-6)
    if case["clip"] == 0:
        assert scale == code == a["scaler"]


def test_terngrad_clips_two_elements():
    """[1.0, 1.2] at 2.5 sigma = 0.25, as the authors' code does; there is no least size."""
    (case, a), *_ = load("terngrad")
    assert case["name"] == "two-clip2.5" and a["scaler"] == pytest.approx(0.25, rel=1e-5)
    c = from_spec("terngrad")
    state = c.init(layout(a["x"]), a["x"])
    assert c.measure(a["x"], layout(a["x"]), state)[0] == pytest.approx(0.25, rel=1e-6)


@cases("terngrad")
def test_terngrad_draws_and_packs(case, a, k):
    """With the shared scaler and the random numbers given: every byte and every value."""
    x, scale = a["x"], np.float32(a["shared"])
    data = np.zeros(x.size // 4 + 1, np.uint8)
    k.terngrad_encode(x, np.float32(np.inf), scale, TERNGRAD_KEY, case["start"], "planar", data)
    if scale > 0:  # else they draw 0 * sign, and here it says 0 * 1
        assert data.tobytes() == a["bytes"].tobytes()
    out = np.zeros(x.size, np.float32)
    k.terngrad_decode_add(data, scale, "planar", 1.0, out)
    assert (out == a["decoded"]).all() and (out == a["ternary"]).all()


# ---- DoReFa -------------------------------------------------------------------------------------


@cases("dorefa")
def test_dorefa(case, a, k):
    bits, x = case["bits"], a["x"]
    scale = k.dorefa_scale(x)
    data = np.zeros(reference.dorefa_size(x.size, bits, "bits"), np.uint8)
    k.dorefa_encode(x, scale, bits, "bits", Key(5, 1, bits, 2), 0, data)
    out = np.zeros(x.size, np.float32)
    k.dorefa_decode_add(data, scale, bits, "bits", 1.0, out)
    assert near(out, a["decoded"])


# ---- LBANN: Dryden, its port of 1-bit SGD and of Strom's threshold ------------------------------


def lbann(what):
    return cases("lbann", lambda case: case["what"] == what)


@lbann("onebit")
def test_lbann_one_bit(case, a):
    payload, value = said(case["spec"], a["x"])
    rows, columns = a["x"].shape
    theirs = a["words"].reshape(columns, -1)
    means = theirs[:, :2].copy().view(np.float32)
    lower, upper = payload[:8 * columns].view(np.float32).reshape(2, columns)
    assert (payload[8 * columns:].view(np.uint32).reshape(-1, columns).T == theirs[:, 2:]).all()
    if not case.get("noise"):
        assert (upper == means[:, 0]).all() and (lower == means[:, 1]).all()
        assert (a["x"] - value == a["residual"]).all()
    assert near(upper, means[:, 0]) and near(lower, means[:, 1])


@lbann("threshold")
def test_lbann_threshold(case, a):
    (payload, owed), = steps(case["spec"], [a["x"]])
    assert payload.tobytes() == a["words"].tobytes()
    assert (owed == a["residual"]).all()


@lbann("rice")
def test_lbann_golomb_rice(case, a):
    payload, _ = said(case["spec"], a["x"])
    assert payload[:4].view(np.uint32)[0] == 4 and payload[4:].tobytes() == a["words"].tobytes()


@lbann("adaptive")
def test_lbann_adaptive_2016(case, a):
    payload, value = said(case["spec"], a["x"])
    rows, columns = a["x"].shape
    expected, words = np.zeros_like(a["x"]), a["words"].tolist()
    for column in range(columns):
        means = np.array(words[:2], np.uint32).view(np.float32)
        end = words.index(2**32 - 1)
        for word in words[2:end]:
            assert (word >> 1) // rows == column
            expected[(word >> 1) % rows, column] = means[1 - (word & 1)]
        words = words[end + 1:]
    assert ((value != 0) == (expected != 0)).all() and near(value, expected)
    assert near(a["x"] - value, a["residual"], a["x"])


@lbann("x")
def test_lbann_adaptive_2017(case, a):
    payload, value = said(case["spec"], a["x"])
    if case["name"].endswith("few"):
        assert not a["decoded"].any(), "fewer are not zero than are kept: its threshold is infinite"
        assert (value == a["x"]).all(), "here what is not zero is sent"
        return
    assert ((value != 0) == (a["decoded"] != 0)).all() and near(value, a["decoded"])
    assert near(a["x"] - value, a["residual"], a["x"])


# ---- MXNet: Strom's threshold in two bits -------------------------------------------------------


@cases("mxnet")
def test_mxnet_two_bits(case, a):
    for (payload, owed), theirs, residual in zip(steps(case["spec"], a["x"]), a["bytes"],
                                                 a["residual"]):
        assert payload.tobytes() == theirs.tobytes()
        assert (owed == residual).all()


# ---- Marian: gradient dropping ------------------------------------------------------------------


def gradient(n, step):
    """The formula that marian.json tells."""
    k = (np.arange(n, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(step * 40503)) \
        % np.uint64(2**32)
    u = (k >> np.uint64(8)).astype(np.float32) * np.float32(2**-24) - np.float32(0.5)
    return u * u * u * np.linspace(1, 2, n, dtype=np.float32)


@pytest.mark.parametrize("case", json.loads((HERE / "marian.json").read_text())["cases"],
                         ids=lambda case: f"{case['version']}-{case['n']}")
def test_marian(case):
    """Three steps of its three samples and cuts: the same indices and values, to the bit."""
    gradients = [gradient(case["n"], step) for step in range(3)]
    for (payload, _), told in zip(steps(case["spec"], gradients), case["steps"]):
        assert payload.size == 8 * told["sent"]
        assert payload[:4 * told["sent"]].view(np.int32).tolist() == \
            told.get("indices", payload[:4 * told["sent"]].view(np.int32).tolist())
        assert zlib.crc32(payload.tobytes()) == told["crc"]


def test_marian_sends_nothing_of_a_single_element():
    """Its cut is that element itself; here its cut is 0 (docs/methods.md)."""
    payload, _ = said("dropping:sample=marian", np.ones(1, np.float32))
    assert payload.size == 8
