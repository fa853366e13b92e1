"""Samples stand for the whole array, to the bit on every backend; parts draw numbers of their own.

A ramp is the hardest case: its first half has none of its large elements.
"""

import numpy as np
import pytest
from shim.device import COMPILER, Shim

from mpicomp import SpecError, kernels, philox
from mpicomp.compressors.registry import from_spec
from mpicomp.compressors.rule import runs
from mpicomp.exchange import server, sharded
from mpicomp.kernels import gpu, reference
from mpicomp.kernels.gpu import device
from mpicomp.layout import Layout
from mpicomp.philox import Key
from mpicomp.transport.calls import Calls
from mpicomp.transport.meter import Meter

SIZES = (100_000, 100_001, 150_000, 199_999, 250_001, 1_000_003)
BACKENDS = [*kernels.backends(), pytest.param("shim", marks=pytest.mark.skipif(
    COMPILER is None, reason="no C++ compiler: the CUDA source cannot be run on the CPU"))]


@pytest.fixture(params=BACKENDS)
def k(request, monkeypatch):
    """The kernels of each backend in turn, the CUDA source among them (run on the CPU)."""
    if request.param == "shim":
        monkeypatch.setattr(device, "current", lambda shim=Shim(): shim)
        yield gpu
        return
    before = kernels.for_numpy()
    yield kernels.use(request.param)
    kernels.use(next(name for name, module in kernels.backends().items() if module is before))


def put(k, x):
    """x where these kernels want it."""
    if k is gpu:
        from shim.arrays import DeviceArray
        return DeviceArray.of(x)
    return x


def ramp(n):
    """0 ... 1 with signs, ascending in magnitude."""
    x = np.linspace(0, 1, n, dtype=np.float32)
    x[1::2] *= -1
    return x


@pytest.mark.parametrize("n", SIZES)
def test_a_sample_stands_for_the_whole_array(n, k):
    """Of a ramp 1 % are sent, within a hundredth of that, whatever the number of elements."""
    x = ramp(n)
    cut = float(k.dropping_cut(put(k, x), 0.99, 100_000))
    tau = float(k.strom_tau(put(k, x), 0.01))
    for limit in (cut, tau):
        assert (np.abs(x) > limit).mean() == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("draws", [0, 7, 1000, 100_000, reference.MARIAN])
@pytest.mark.parametrize("n", [2, 6, 999, 1001, 1999, 100_001, 150_001])
def test_every_backend_takes_the_same_sample(n, draws, k):
    x = np.random.default_rng(n).standard_normal(n, np.float32)
    for rate in (0.0, 0.5, 0.99, 0.999):
        for first in (False, True):
            found = k.dropping_cut(put(k, x), rate, draws, first)
            assert np.float32(float(found)) == reference.dropping_cut(x, rate, draws, first)
    assert np.float32(float(k.strom_tau(put(k, x), 0.02))) == reference.strom_tau(x, 0.02)


@pytest.mark.parametrize("n", [2, 1000, 99_999, 199_999, 200_000, 2**31])
def test_samples_ascend_and_are_spread(n):
    for size in {1, 2, min(n, 1000), min(n, 100_000)}:
        index = reference.sample(n, size)
        assert index[0] == 0 and (np.diff(index) > 0).all() and index[-1] == n - -(-n // size)
        gaps = np.diff(np.append(index, n))
        assert gaps.max() - gaps.min() <= 1, "as far apart as each other"
    stride = reference.sample(n, 2, 2 * (n // 2))
    assert stride.tolist() == [0, n // 2]


def test_marian_takes_the_first_hundred_thousand_of_fewer_than_twice_as_many():
    """sample=marian is that code's sample: stride n // 100,000 from the first element on."""
    x = ramp(199_999)
    c = from_spec("dropping:sample=marian")
    packet = np.zeros(c.capacity(Layout.of([("w", (x.size,))])), np.uint8)
    used = c.encode(x, packet, Layout.of([("w", (x.size,))]), Key(), None)
    place = max(0, int(np.float32(100_000) * np.float32(0.99)) - 1)
    assert used == 8 * (np.abs(x) > np.sort(np.abs(x[:100_000]))[place]).sum() > 0.5 * 8 * x.size


def test_the_rate_is_a_float32():
    """As in Marian: int(S * R) of float32 numbers is another than of float64 for some S."""
    other = [n for n in range(2, 100_001) if int(n * 0.999)
             != int(np.float32(n) * np.float32(0.999))]
    assert other
    for n in other[:5]:
        number = reference.dropping_sample(n, 0.999, 0)[2]
        assert number == int(np.float32(n) * np.float32(0.999)) - 1 != int(n * 0.999) - 1
    with pytest.raises(SpecError, match="less than 1"):
        from_spec("dropping:rate=0.99999999")  # 1 as float32: nothing would ever be sent


# ---- random numbers of parts --------------------------------------------------------------------


def draws(key):
    return philox.words(key, 0, 16).tobytes()


def test_no_rank_draws_what_another_runs_draws():
    """Rank and run shared 32 bits once: run 1 of rank 0 was run 0 of rank 65,536."""
    layout = Layout.of([(f"{'ab'[i % 2]}{i}", (1,)) for i in range(4)])
    rule = from_spec("rule(a*:terngrad; terngrad:clip=0)")
    keys = [run.key(Key(7, rank, 1, 2)) for run in runs(rule, layout)
            for rank in (0, 1, 2, 2**16, 2**16 + 1, 2**17, 3 * 2**16, 2**32 - 1)]
    assert len(keys) == 4 * 8
    assert len({draws(key) for key in keys}) == len(keys)
    assert runs(rule, layout)[0].key(Key(7, 2**16)) == Key(7, 2**16)


def test_parts_are_as_many_as_may_come():
    """Shards, pulls and runs have seeds of their own, however many ranks and buckets there are."""
    numbers = [*range(1000), 2**16 - 1, 2**16, 2**16 + 1, 2**31, 2**32 - 1, sharded.SECOND,
               sharded.SECOND + 2**16, server.BACK + 2**31]
    seeds = [philox.part(seed, number) for seed in (0, 1, 2**64 - 1) for number in numbers]
    assert len(set(seeds)) >= len(seeds) - 3  # SECOND is BACK: never in one exchange
    assert all(0 <= seed < 2**64 for seed in seeds)
    bits = np.unpackbits(np.array(seeds, np.uint64).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 0.01


def test_a_bucket_draws_for_a_shard_what_no_other_does(comm):
    """Owner and bucket shared 32 bits once: shard 0 of bucket 65,536 was shard 0 of bucket 0."""
    layout = Layout.of([("w", (64,))])
    seen = set()
    for index in (0, 1, 2**16, 2**16 + 1, 2**17):
        exchange = sharded.Sharded(Calls(comm, Meter()))
        grad = np.zeros(64, np.float32)
        bucket = exchange.open(from_spec("terngrad"), layout, index, grad, 5, 6)
        keys = [m.key(3, 0) for m in (*bucket.first, bucket.second)]
        seen.update(map(draws, keys))
        assert len(keys) == comm.size + 1
    assert len(seen) == 5 * (comm.size + 1)
