"""Packets of unknown length in one call: the same sums, honest bytes, and one slot on all ranks."""

import numpy as np
import pytest
from training import give, parameters, replicas_are_identical, train

import mpicomp
from mpicomp.transport import packet, slots

pytestmark = pytest.mark.mpi
HEADER, N = 32, 4096


def go(comm, lengths, exchange="allgather", limit=slots.LIMIT, monkeypatch=None):
    """(Reducer, its sums): in step s rank r sends lengths[s](r) words, each a one."""
    monkeypatch.setattr(slots, "LIMIT", limit)
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
def test_sums_do_not_depend_on_slots(exchange, comm, monkeypatch):
    """Lengths that grow, shrink, vanish and overflow: as with lengths first, to the bit."""
    _, expected, _ = go(comm, 2 * LENGTHS, exchange, 0, monkeypatch)
    for limit in (256, 2048, 1 << 20):
        _, sums, _ = go(comm, 2 * LENGTHS, exchange, limit, monkeypatch)
        assert all((a == b).all() for a, b in zip(sums, expected))
    for length, sums in zip(2 * LENGTHS, expected):
        if exchange == "allgather":
            assert sums.sum() == sum(0.5 * length(rank) for rank in range(comm.size))


def test_steady_lengths_take_one_call(comm, monkeypatch):
    """The first step sends lengths first; from the second on a slot, padding counted as sent."""
    reducer, _, calls = go(comm, [lambda rank: 100 - rank] * 4, monkeypatch=monkeypatch)
    used = 4 * (100 - comm.rank)
    slot = 512  # 32 + 400 + 400 / 8, up to the next multiple of 64
    assert calls == [{"Iallgather": HEADER, "Iallgatherv": used}] + [{"Iallgather": slot}] * 3
    assert reducer.stats.last["sent"] == slot
    assert reducer.stats.reasons["padding"] == 3 * (slot - HEADER - used)
    assert sum(reducer.stats.reasons.values()) == reducer.stats.sent


def test_overflow_takes_a_second_call(comm, monkeypatch):
    """What does not fit into 512 - 32 bytes follows, of those ranks that have it."""
    _, _, calls = go(comm, [lambda rank: 100, lambda rank: 125 if rank == 0 else 50],
                     monkeypatch=monkeypatch)
    rest = {"Iallgatherv": 500 - 480} if comm.rank == 0 else {}
    assert calls[1] == {"Iallgather": 512, **rest}


def test_large_packets_send_their_lengths_first(comm, monkeypatch):
    _, _, calls = go(comm, [lambda rank: 1000] * 3, limit=1024, monkeypatch=monkeypatch)
    assert calls == [{"Iallgather": HEADER, "Iallgatherv": 4000}] * 3


@pytest.mark.mpi(min_size=2)
def test_sharded_takes_one_call_each_way(comm, monkeypatch):
    """From the third step on: the owners' packets of the second said how large slots must be."""
    reducer, _, calls = go(comm, [lambda rank: N] * 4, "sharded", monkeypatch=monkeypatch)
    assert set(calls[0]) == {"Ialltoallv", "Isend", "Iallgather", "Iallgatherv"}
    assert set(calls[3]) == {"Ialltoallv", "Iallgather"}
    assert calls[3]["Ialltoallv"] >= (comm.size - 1) * (HEADER + 4 * (N // comm.size - 32))
    assert sum(reducer.stats.reasons.values()) == reducer.stats.sent


def test_slots_shrink_slowly_and_grow_at_once():
    slot = slots.SlotSize(10_000)
    slot.learn(slot.wanted(400))
    assert slot.size == 512
    slot.learn(slot.wanted(0))
    assert slot.size == 448
    slot.learn(slot.wanted(2000))
    assert slot.size == 2304
    sizes = []
    while slot.size > 64:
        slot.learn(slot.wanted(0))
        sizes.append(slot.size)
    assert sizes[0] == 2176 and len(sizes) > 20
    slot.learn(slot.wanted(10**6))
    assert slot.size == packet.SIZE and slot.room == 0


@pytest.mark.parametrize("size", [32, 64, 65, 128, 1000, slots.LIMIT])
def test_size_classes_hold_what_was_asked_for(size):
    k = slots.hint(size)
    assert k < 256 and size <= slots.sized(k) <= max(64, 1.2 * size + 64)


@pytest.mark.parametrize("spec", ["strom:tau=0.02", "adacomp", "dropping:rate=0.9",
                                  "dryden:proportion=8,min_rows=8", "strom:tau=0.02,coding=rice"])
@pytest.mark.parametrize("exchange", ["allgather", "sharded"])
def test_training_does_not_depend_on_slots(spec, exchange, comm, monkeypatch):
    models = []
    for limit in (0, slots.LIMIT):
        monkeypatch.setattr(slots, "LIMIT", limit)
        spec_there = f"{spec}{',' if ':' in spec else ':'}exchange={exchange}"
        model, _ = train(spec_there, comm, steps=6)
        replicas_are_identical(comm, model)
        models.append(np.concatenate([p.detach().numpy().reshape(-1) for p in model.parameters()]))
    assert models[0].tobytes() == models[1].tobytes()
