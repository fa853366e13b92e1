"""Counted bytes equal the documented format: by hand, for each MPI call, header included."""

import numpy as np
import pytest
from training import give, parameters

import mpicomp
from mpicomp.exchange import hierarchical
from mpicomp.exchange.shards import cut
from mpicomp.layout import Layout

pytestmark = pytest.mark.mpi
HEADER = 32
SHAPES = {"w": (64, 10), "b": (64,), "k": (5, 3, 2), "s": ()}  # 640 + 64 + 30 + 1 elements
N = 735
PAYLOAD = {  # by hand, from docs/wire-format.md
    "dense": 4 * N,
    "fp16": 2 * N,
    "bf16": 2 * N,
    # four scales; 160 + 16 + 8 + 1, 161 + 17 + 8 + 1, 735 or 1470 bytes of codes
    "terngrad": 16 + 185,
    "terngrad:packing=planar": 16 + 187,
    "terngrad:packing=int8": 16 + N,
    "terngrad:packing=int16": 16 + 2 * N,
    # ten columns of 64 rows: 16 bytes each; then 64, 30 and 1 elements as single columns
    "onebit": 10 * (8 + 8) + (8 + 8) + (8 + 4) + (8 + 4),
    # columns of 64, 64, 5 and 1 rows
    "onebit:min_rows=1": 10 * (8 + 8) + (8 + 8) + 6 * (8 + 4) + (8 + 4),
}
ALLREDUCE = {"dense": 4 * N, "fp16": 2 * N, "bf16": 2 * N, "terngrad": N,
             "terngrad:packing=int16": 2 * N}


def one_step(spec, comm, bucket_bytes=25 << 20, scale=1.0):
    """(the Reducer after one step, this rank's flat gradient in the order of the bucket)."""
    named = parameters(**SHAPES)
    reducer = mpicomp.Reducer(named, spec, comm, bucket_bytes=bucket_bytes)
    rng = np.random.default_rng(comm.rank)
    gradients = [(scale * rng.normal(size=p.shape)).astype(np.float32) for _, p in named]
    give(named, gradients)
    reducer.finish()
    return reducer, np.concatenate([g.reshape(-1) for g in reversed(gradients)])


def check(stats, sent, received, calls):
    """Totals, the last step and the calls."""
    assert (stats.sent, stats.received, stats.dense) == (sent, received, 4 * N)
    assert stats.last == {"sent": sent, "received": received, "dense": 4 * N}
    assert +stats.calls == {name: count for name, count in calls.items() if count}
    assert stats.ratio == (4 * N / sent if sent else stats.ratio) and stats.steps == 1


@pytest.mark.parametrize("spec", PAYLOAD)
def test_allgather_of_fixed_length(spec, any_comm):
    """One call: header and payload. What ranks agree on first is a float a tensor, MAX-reduced."""
    others, packet = any_comm.size - 1, HEADER + PAYLOAD[spec]
    shared = 16 if spec.startswith("terngrad") else 0
    full = spec + ("," if ":" in spec else ":") + "exchange=allgather"
    reducer, _ = one_step(full, any_comm)
    check(reducer.stats, packet + shared, others * packet + shared,
          {"Iallgather": packet, "Iallreduce": shared})


@pytest.mark.parametrize("spec", ALLREDUCE)
def test_allreduce(spec, any_comm):
    """Headers are gathered beside the sum; scales do not travel with it again."""
    shared = 16 if spec.startswith("terngrad") else 0
    payload, others = ALLREDUCE[spec], any_comm.size - 1
    full = spec + ("," if ":" in spec else ":") + "exchange=allreduce"
    reducer, _ = one_step(full, any_comm)
    check(reducer.stats, HEADER + payload + shared, HEADER * others + payload + shared,
          {"Iallgather": HEADER, "Iallreduce": payload + shared})


@pytest.mark.parametrize("tau", [0.5, 2.5, 100.0])
def test_allgather_of_a_length_that_the_data_tell(tau, any_comm):
    """Headers, then the bytes used: four an element beyond tau; no call if nobody has any."""
    reducer, gradient = one_step(f"strom:tau={tau}", any_comm)
    used = 4 * int((np.abs(gradient) > np.float32(tau)).sum())
    total = sum(any_comm.allgather(used))
    check(reducer.stats, HEADER + used, HEADER * (any_comm.size - 1) + total - used,
          {"Iallgather": HEADER, "Iallgatherv": used})
    assert (used > 0) == (tau < 100)


@pytest.mark.parametrize("bucket_bytes, buckets", [(1, 4), (4 * 64, 3), (4 * 95, 2), (4 * N, 1)])
def test_every_bucket_has_a_header(bucket_bytes, buckets, comm):
    """Parameters in reverse: s 1, k 30, b 64, w 640 elements, which may exceed a bucket."""
    reducer, _ = one_step("dense", comm, bucket_bytes)
    assert reducer.stats.calls == {"Iallgather": buckets * HEADER, "Iallreduce": 4 * N}


def test_steps_add_up(comm):
    named = parameters(w=(64, 10))
    reducer = mpicomp.Reducer(named, "onebit", comm)
    for step in range(3):
        give(named, [np.ones((64, 10))])
        reducer.finish()
        assert reducer.stats.last["sent"] == HEADER + 160
    stats = reducer.stats
    assert (stats.steps, stats.sent, stats.dense) == (3, 3 * (HEADER + 160), 3 * 2560)
    assert stats.ratio == 2560 / (HEADER + 160) and stats.skipped == 0
    assert set(stats.seconds) >= {"encode", "wait", "decode"}
    assert all(v >= 0 for v in stats.seconds.values()) and "3 steps" in str(stats)


def test_warmup_is_counted_as_what_it_sends(comm):
    named = parameters(w=(64, 10))
    reducer = mpicomp.Reducer(named, "onebit:warmup=2", comm)
    sent = []
    for step in range(4):
        give(named, [np.ones((64, 10))])
        reducer.finish()
        sent.append(reducer.stats.last["sent"])
    assert sent == [HEADER + 2560] * 2 + [HEADER + 160] * 2


@pytest.mark.parametrize("spec", ["onebit", "dense"])
def test_sharded_of_fixed_length(spec, any_comm):
    """A packet to each other owner, and one's own shard's packet to all; none to oneself."""
    full = Layout.of((name, SHAPES[name]) for name in reversed(SHAPES))
    shards = [shard.layout for shard in cut(full, any_comm.size)]
    assert sum(layout.size for layout in shards) == N
    compressor = mpicomp.method(spec).compressor
    packets = [HEADER + compressor.capacity(layout) for layout in shards]
    own, size = packets[any_comm.rank], any_comm.size
    reducer, _ = one_step(f"{spec}:exchange=sharded", any_comm)
    check(reducer.stats, sum(packets) - own + own, (size - 1) * own + sum(packets) - own,
          {"Ialltoallv": sum(packets) - own, "Iallgatherv": own})


def test_sharded_of_a_length_that_the_data_tell(any_comm):
    """Headers to owners, used bytes, owners' headers, used bytes of the second stage."""
    reducer, gradient = one_step("strom:tau=0.5,exchange=sharded", any_comm)
    stats, others = reducer.stats, any_comm.size - 1
    assert stats.calls["Ialltoall"] == HEADER * others
    assert stats.calls["Iallgather"] == HEADER
    used = 4 * int((np.abs(gradient) > 0.5).sum())
    assert 0 <= stats.calls["Ialltoallv"] <= used
    if any_comm.size == 1:
        assert stats.calls["Ialltoallv"] == 0
    assert stats.calls["Iallgatherv"] % 4 == 0
    assert sum(stats.calls.values()) == stats.sent


def test_hierarchical_counts_what_stays_on_a_node_apart(comm, monkeypatch):
    """Nodes of two: leaders send a packet, members nothing; headers and float32 sums go within."""
    monkeypatch.setattr(hierarchical, "node_of", lambda comm: comm.Split(comm.rank // 2))
    reducer, _ = one_step("onebit:exchange=hierarchical", comm)
    stats, nodes = reducer.stats, (comm.size + 1) // 2
    packet = HEADER + PAYLOAD["onebit"]
    if comm.rank % 2 == 0:
        assert (stats.sent, stats.received) == (packet, (nodes - 1) * packet)
        assert stats.within == HEADER + HEADER * nodes + 4 * N  # headers in and out, the mean out
    else:
        assert stats.sent == stats.received == 0
        assert stats.within == HEADER + 4 * N  # this rank's header and gradient


@pytest.mark.mpi(min_size=2)
def test_sharded_traffic_does_not_grow_with_ranks(comm):
    """What a rank sends is at most two packets' worth and a header for each rank."""
    reducer, _ = one_step("onebit:exchange=sharded", comm)
    assert reducer.stats.sent <= 2 * (PAYLOAD["onebit"] + 8 * comm.size) + HEADER * comm.size
