"""Packets whose length depends on the data: their lengths travel first, and no byte too many."""

import numpy as np
import pytest
from training import give, parameters

import mpicomp

pytestmark = pytest.mark.mpi
HEADER, N = 32, 4096


def go(comm, lengths, exchange):
    """(Reducer, its sums, its calls): in step s rank r sends lengths[s](r) words, each a half."""
    named = parameters(w=(32, N // 32))
    reducer = mpicomp.Reducer(named, f"strom:tau=0.5,feedback=no,exchange={exchange}", comm,
                              average=False)
    sums, calls = [], []
    for length in lengths:
        gradient = np.zeros(N)
        gradient[:length(comm.rank)] = 1
        named[0][1].grad = None
        before = dict(reducer.stats.calls)
        give(named, [gradient])
        reducer.finish()
        sums.append(named[0][1].grad.numpy().reshape(-1).copy())
        calls.append({k: v - before.get(k, 0) for k, v in reducer.stats.calls.items()
                      if v - before.get(k, 0)})
    return reducer, sums, calls


LENGTHS = [lambda rank: 100 + rank, lambda rank: 100 - rank, lambda rank: 700 * rank,
           lambda rank: 0, lambda rank: 3, lambda rank: 3000, lambda rank: 40, lambda rank: N]


@pytest.mark.parametrize("exchange", ["allgather", "sharded"])
def test_sums_of_lengths_that_grow_shrink_and_vanish(exchange, comm):
    _, sums, _ = go(comm, 2 * LENGTHS, exchange)
    for length, found in zip(2 * LENGTHS, sums, strict=True):
        expected = np.zeros(N, np.float32)
        for rank in range(comm.size):
            expected[:length(rank)] += 0.5
        if exchange == "sharded":  # owners encode the sum, and say tau of what is larger than it
            expected = np.where(expected > 0.5, np.float32(0.5), np.float32(0))
        assert (found == expected).all()


def test_what_is_used_is_what_is_sent(comm):
    reducer, _, calls = go(comm, LENGTHS, "allgather")
    for length, found in zip(LENGTHS, calls, strict=True):
        used = {"Iallgatherv": 4 * length(comm.rank)} if length(comm.rank) else {}
        assert found == {"Iallgather": HEADER, **used}
    assert sum(reducer.stats.reasons.values()) == reducer.stats.sent


@pytest.mark.mpi(min_size=2)
def test_sharded_sends_each_owner_its_part(comm):
    """A header to each other owner and the words of its elements; then the same of the sums."""
    reducer, _, calls = go(comm, [lambda rank: N] * 2, "sharded")
    others, words = comm.size - 1, [N * (k + 1) // comm.size - N * k // comm.size
                                    for k in range(comm.size)]
    for found in calls:
        assert set(found) == {"Ialltoallv", "Isend", "Iallgather", "Iallgatherv"}
        assert found["Ialltoallv"] == others * HEADER and found["Iallgather"] == HEADER
        assert abs(found["Isend"] - 4 * (N - words[comm.rank])) <= 4 * 32 * comm.size
    assert sum(reducer.stats.reasons.values()) == reducer.stats.sent
