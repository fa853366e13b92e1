"""Sums and gathers around a ring: exact, the same bits on all ranks, several buckets at once."""

import numpy as np
import pytest
from training import give, parameters, whole_numbers

import mpicomp
from mpicomp import mpi
from mpicomp.exchange import hierarchical
from mpicomp.transport import ring

pytestmark = pytest.mark.mpi


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(ring, "LEAST", 0)
    monkeypatch.setattr(ring, "RANKS", range(2, 100))


@pytest.fixture(autouse=True, params=[1, 90, 1 << 20], ids=["most", "some", "one"])
def lane(monkeypatch, request):
    """As many lanes as there may be, other numbers for other buckets, and one."""
    monkeypatch.setattr(ring, "SUM_LANE", request.param)
    monkeypatch.setattr(ring, "GATHER_LANE", request.param)


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
def test_bytes_are_those_of_the_call(comm):
    named = parameters(w=600 * comm.size)
    reducer = mpicomp.Reducer(named, "dense", comm)
    give(named, [np.ones(600 * comm.size)])
    reducer.finish()
    size = 4 * 600 * comm.size  # a ring counts as the call that it stands for
    assert reducer.stats.calls == {"Iallgather": 32, "ring Iallreduce": size}
    assert reducer.stats.received == 32 * (comm.size - 1) + size


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
    assert set(reducer.stats.calls) == {"Iallgather", "Iallreduce"}


@pytest.fixture
def nodes(monkeypatch):
    """Every rank believes to be alone on its node; hierarchical believes in nodes of two."""
    monkeypatch.setattr(mpi, "ranks_here", lambda comm: 1)
    monkeypatch.setattr(hierarchical, "node_of", lambda comm: comm.Split(comm.rank // 2))
    monkeypatch.setattr(ring, "GATHER", 0)


def gathered(spec, comm, progress="poll"):
    """(bytes of every mean of five steps, calls) with seven buckets of different sizes."""
    named = parameters(a=(64, 5), b=1, c=(17,), d=(40, 30), e=1001, f=(32, 8), g=700)
    reducer = mpicomp.Reducer(named, spec, comm, bucket_bytes=2000, progress=progress)
    rng, means = np.random.default_rng(comm.rank), []
    for _ in range(5):
        give(named, [rng.standard_normal(p.numel(), np.float32) for _, p in named])
        reducer.finish()
        means.append(b"".join(p.grad.numpy().tobytes() for _, p in named))
        for _, p in named:
            p.grad = None
    return means, dict(reducer.stats.calls)


@pytest.mark.parametrize("exchange", ["allgather", "sharded", "hierarchical"])
@pytest.mark.parametrize("spec", ["onebit", "strom:tau=1"])
def test_gathers_are_those_of_mpi(spec, exchange, comm, nodes, monkeypatch):
    """Packets of fixed length, and lengths first; large after small."""
    spec += f"{',' if ':' in spec else ':'}exchange={exchange}"
    found, calls = gathered(spec, comm)
    monkeypatch.setenv("MPICOMP_RING", "never")
    expected, plain = gathered(spec, comm)
    assert found == expected and len(set(comm.allgather(b"".join(found)))) == 1
    assert sum(calls.values()) == sum(plain.values())
    alone = comm.size == 1 or exchange == "hierarchical" and (comm.size == 2 or comm.rank % 2)
    assert ("ring Iallgather" in calls) != alone


@pytest.mark.mpi(min_size=2)
def test_a_thread_may_move_rings_on(comm, nodes):
    assert gathered("onebit", comm, "thread")[0] == gathered("onebit", comm)[0]
