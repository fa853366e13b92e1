"""The sum around a ring: exact, the same bits on all ranks, several buckets at once."""

import numpy as np
import pytest
from training import give, parameters, whole_numbers

import mpicomp
from mpicomp.exchange import ring

pytestmark = pytest.mark.mpi


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(ring, "LEAST", 0)
    monkeypatch.setattr(ring, "RANKS", range(2, 100))


@pytest.fixture(autouse=True, params=[1, 1 << 20], ids=["lanes", "lane"])
def lane(monkeypatch, request):
    """As many lanes as there may be, and one."""
    monkeypatch.setattr(ring, "LANE", request.param)


@pytest.mark.parametrize("spec", ["dense", "dense:feedback=yes,exchange=allreduce"])
@pytest.mark.parametrize("progress", ["poll", "thread"])
def test_sums_of_whole_numbers(spec, progress, comm):
    """Sizes that ranks do not divide, fewer elements than ranks, and buckets that overtake."""
    sizes = dict(a=(3, 5), b=1, c=(17,), d=(2, 3, 2), e=1001)
    named = parameters(**sizes)
    reducer = mpicomp.Reducer(named, spec, comm, average=False, bucket_bytes=64, progress=progress)
    for step in range(4):
        give(named, [whole_numbers(comm.rank, step, p.numel()) for _, p in named])
        reducer.finish()
        for _, p in named:
            total = sum(whole_numbers(rank, step, p.numel()) for rank in range(comm.size))
            assert p.grad.reshape(-1).tolist() == total.tolist()
            p.grad = None


def test_all_ranks_hold_the_same_bits(comm):
    named = parameters(w=10_007)
    reducer = mpicomp.Reducer(named, "dense", comm)
    mine = np.random.default_rng(comm.rank).standard_normal(10_007, np.float32)
    give(named, [mine])
    reducer.finish()
    found = named[0][1].grad.numpy()
    assert len(set(comm.allgather(found.tobytes()))) == 1
    np.testing.assert_allclose(found, sum(comm.allgather(mine)) / comm.size, atol=1e-6)


@pytest.mark.mpi(min_size=2)
def test_bytes_are_those_that_travel(comm):
    named = parameters(w=600 * comm.size)
    reducer = mpicomp.Reducer(named, "dense", comm)
    give(named, [np.ones(600 * comm.size)])
    reducer.finish()
    travel = 2 * (comm.size - 1) * 600 * 4
    assert reducer.stats.calls == {"Iallgather": 32, "Isend": travel}
    assert reducer.stats.received == 32 * (comm.size - 1) + travel


def test_a_gradient_that_is_not_finite_is_named_not_warned_of(comm):
    named = parameters(w=100)
    reducer = mpicomp.Reducer(named, "dense", comm)
    give(named, [np.full(100, np.inf if comm.rank % 2 else -np.inf)])
    with pytest.raises(mpicomp.NonFiniteError):
        reducer.finish()


def test_small_sums_are_left_to_mpi(comm, monkeypatch):
    monkeypatch.setattr(ring, "LEAST", 1 << 20)
    named = parameters(w=600)
    reducer = mpicomp.Reducer(named, "dense", comm)
    give(named, [np.ones(600)])
    reducer.finish()
    assert "Isend" not in reducer.stats.calls
