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
    "terngrad:packing=5trit": 16 + 128 + 13 + 6 + 1,
    # four scales; 640, 64, 30 and 1 elements of k bits
    "dorefa": 16 + 320 + 32 + 15 + 1,
    "dorefa:bits=1": 16 + 80 + 8 + 4 + 1,
    "dorefa:bits=3": 16 + 240 + 24 + 12 + 1,
    "dorefa:bits=3,packing=int16": 16 + 2 * N,
    "strom:coding=2bit": 4 * 46,  # 46 times 16 elements
    "strom:coding=2bit,density=0.1": 4 + 4 * 46,
    "onebit:bits=4": 10 * (8 + 4 * 8) + (8 + 4 * 8) + (8 + 4 * 4) + (8 + 4),
    # of K = 10 + 1 + 1 + 1 elements 12 bits each; two scales a tensor and 2 bits, one and 8, or 32
    "chunks": 32 + 20 + 4,
    "chunks:bits=8": 16 + 20 + 13,
    "chunks:bits=32": 52 + 20,
    "topk": 8 * (6 + 1 + 1 + 1),  # 6.4, 0.64, 0.3 and 0.01 rounded, at least 1
    # 5, 1, 1 and 1 blocks of 128, 2 bytes each; 8 or 4 bits an element
    "block": 16 + N,
    "block:form=fp8": 16 + N,
    "block:bits=4": 16 + 320 + 32 + 15 + 1,
    # a scale a tensor; 64 and 5 rows, a vector is one; 40, 2 and 1 and 1 blocks of 16
    "sign": 16 + 80 + 8 + 4 + 1,
    "sign:scope=row": 64 * (4 + 2) + (4 + 8) + 5 * (4 + 1) + (4 + 1),
    "sign:scope=block,size=32": 20 * 8 + 2 * 8 + 8 + 5,
    # 2, 1, 1 and 1 buckets of 512; 4 bits for -7 ... 7
    "qsgd": 10 + 320 + 32 + 15 + 1,
    # ten columns of 64 rows: 16 bytes each; then 64, 30 and 1 elements as single columns
    "onebit": 10 * (8 + 8) + (8 + 8) + (8 + 4) + (8 + 4),
    # columns of 64, 64, 5 and 1 rows
    "onebit:min_rows=1": 10 * (8 + 8) + (8 + 8) + 6 * (8 + 4) + (8 + 4),
}
ALLREDUCE = {"dense": 4 * N, "fp16": 2 * N, "bf16": 2 * N, "terngrad": N,
             "terngrad:packing=int16": 2 * N, "dorefa": N, "dorefa:bits=6": 2 * N,
             "dorefa:packing=int32": 4 * N, "randomk": 4 * 7,  # 7.35 elements
             "powersgd": 4 * (4 * 10 + 64 + 30 + 1)}  # 4 columns of 10, and what is small


def agreed(spec):
    """The bytes of what ranks agree on first: a scale a tensor, or one tau; a factor."""
    if spec.startswith(("terngrad", "dorefa")):
        return 16
    if spec == "powersgd":  # 4 columns of 64
        return 4 * 4 * 64
    return 4 if "density" in spec else 0


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
    """One call: header and payload. What ranks agree on first is MAX-reduced."""
    others, packet = any_comm.size - 1, HEADER + PAYLOAD[spec]
    shared = agreed(spec)
    full = spec + ("," if ":" in spec else ":") + "exchange=allgather"
    reducer, _ = one_step(full, any_comm)
    check(reducer.stats, packet + shared, others * packet + shared,
          {"Iallgather": packet, "Iallreduce": shared})


@pytest.mark.parametrize("spec", ALLREDUCE)
def test_allreduce(spec, any_comm):
    """Headers are gathered beside the sum; scales do not travel with it again."""
    shared = agreed(spec)
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


# ---- lengths that the data tell, counted a second time ------------------------------------------


def matrices(gradient):
    """The tensors of the bucket as matrices in which 1-bit SGD and Dryden see them."""
    start = 0
    for name in reversed(SHAPES):
        shape = SHAPES[name]
        size = int(np.prod(shape))
        rows = shape[0] if len(shape) > 1 else size
        yield gradient[start:start + size].reshape(rows, -1)
        start += size


def dropping_bytes(gradient, each, head):
    """`each` bytes for all beyond number int(n R) - 1 of n ascending magnitudes, R = 0.9."""
    magnitudes = np.sort(np.abs(gradient))
    return head + each * int((magnitudes > magnitudes[int(N * 0.9) - 1]).sum())


def dryden_bytes(gradient, p=8):
    """A column sends max(1, n // p) of its n negative elements, and of the others, if any."""
    size = 0
    for matrix in matrices(gradient):
        size += 4 + 8 * matrix.shape[1]
        for column in matrix.T:
            size += 4 * sum(max(1, n // p) for n in ((column < 0).sum(), (column >= 0).sum()) if n)
    return size


def dryden_bytes_2017(gradient, p=8):
    """Bounds and a count for each column, a word of 16 bits for each one sent; whole words."""
    size = 0
    for matrix in matrices(gradient):
        flat = matrix.reshape(-1)
        kept = flat[np.argsort(-np.abs(flat))[:max(1, flat.size // p)]]
        low, high = kept[kept < 0], kept[kept > 0]
        last = kept[-1]  # sets the threshold of its own sign; the other's is its nearest to 0
        up = last if last > 0 else high.min() if high.size else -last
        down = last if last < 0 else low.max() if low.size else -last
        words = int((flat >= up).sum() + (flat <= down).sum()) + matrix.shape[1]
        size += 8 * matrix.shape[1] + 2 * (words + words % 2)
    return size


def adacomp_bytes(gradient, size, width):
    """A scale and a count a tensor; a byte or two for each |2 dW| >= the bin's largest |dW|.

    With bins of this size no two neighbouring bins are silent, so that no run is told.
    """
    total = 0
    for matrix in matrices(gradient):
        flat = np.abs(matrix.reshape(-1))
        total += 8 + width * sum(int((2 * part >= part.max()).sum())
                                 for part in np.split(flat, range(size, flat.size, size)))
    return total


VARIABLE = {
    "dropping:rate=0.9": lambda g: dropping_bytes(g, 8, 0),
    "dropping:rate=0.9,survivors=onebit": lambda g: dropping_bytes(g, 4, 8),
    "strom:density=0.1": lambda g: 4 + 4 * (N - int(N * 0.9)),
    "dryden:proportion=8,min_rows=1": dryden_bytes,
    "dryden:proportion=8,min_rows=1,version=2017": dryden_bytes_2017,
    "adacomp:bin=20": lambda g: adacomp_bytes(g, 20, 1),
    "adacomp:bin=100": lambda g: adacomp_bytes(g, 100, 2),
}


@pytest.mark.parametrize("spec", VARIABLE)
def test_allgather_of_sparse_messages(spec, any_comm):
    """Headers, then what the formulas of the papers say. All ranks have rank 0's gradient."""
    named = parameters(**SHAPES)
    reducer = mpicomp.Reducer(named, spec, any_comm)
    rng, size = np.random.default_rng(0), any_comm.size
    gradients = [rng.normal(size=p.shape).astype(np.float32) for _, p in named]
    give(named, gradients)
    reducer.finish()
    used = VARIABLE[spec](np.concatenate([g.reshape(-1) for g in reversed(gradients)]))
    shared = agreed(spec)
    check(reducer.stats, HEADER + used + shared, (HEADER + used) * (size - 1) + shared,
          {"Iallgather": HEADER, "Iallgatherv": used, "Iallreduce": shared})


# ---- the formulas of the papers -----------------------------------------------------------------


@pytest.mark.parametrize("spec, bits", [("onebit", 1 + 64 / 128), ("onebit:wire=cntk", 1.5),
                                        ("dense", 32), ("fp16", 16)])
def test_two_phases_receive_twice_a_share_of_all_but_one(spec, bits, any_comm):
    """2 p M (P - 1) / P bits for p bits an element in both phases, and 2 (P - 1) headers."""
    size = any_comm.size
    elements, joint = 128 * 12 * size, "," if ":" in spec else ":"
    named = parameters(w=(128, 12 * size))
    reducer = mpicomp.Reducer(named, f"{spec}{joint}exchange=sharded", any_comm)
    give(named, [np.random.default_rng(1).normal(size=(128, 12 * size))])
    reducer.finish()
    payload = 2 * bits * elements * (size - 1) / size / 8
    assert reducer.stats.received == payload + 2 * HEADER * (size - 1)
    assert reducer.stats.sent == bits * elements / 8 + HEADER * size


@pytest.mark.parametrize("spec, bits, scales", [
    ("terngrad", 2, 4), ("terngrad:packing=5trit", 1.6, 4), ("dorefa:bits=6", 6, 4),
    ("onebit", 1.5, 0)])
def test_an_allgather_receives_a_packet_of_each_other_rank(spec, bits, scales, any_comm):
    """(P - 1) p M bits, as many headers and scales, and the scales that were agreed on."""
    named, others = parameters(w=(128, 40)), any_comm.size - 1
    reducer = mpicomp.Reducer(named, spec, any_comm)
    give(named, [np.random.default_rng(1).normal(size=(128, 40))])
    reducer.finish()
    assert reducer.stats.received == others * (bits * 5120 / 8 + HEADER + scales) + scales


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
    assert stats.calls["Ialltoallv"] == HEADER * others
    assert stats.calls["Iallgather"] == HEADER
    used = 4 * int((np.abs(gradient) > 0.5).sum())
    sent = any_comm.allgather(stats.calls["Isend"])
    assert 0 <= stats.calls["Isend"] <= used and (any_comm.size == 1) == (sum(sent) == 0)
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
