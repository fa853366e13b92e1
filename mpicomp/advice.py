"""Which method would be fastest here? Links and codecs are measured, the rest is arithmetic.

The model, for a gradient of n elements over P ranks, packets of L bytes (see docs/planning.md):

    allgather   encode + a + b (P-1) L                + P decodes
    allreduce   encode + a + b 2 (P-1)/P bytes        + 1 decode
    sharded     encode + 2 a + b 2 (P-1)/P L          + encode / P + 2 decodes + 3 copies
    step        compute + codec + max(0, wire - what backward hides)

a (seconds a call) and b (seconds a received byte) are measured for each kind of call on the ranks
that are present, while all of them work at once. What is predicted for other P assumes that each
rank's link, not the network behind it, is the limit.
"""

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from mpicomp import mpi, systems
from mpicomp.errors import SpecError
from mpicomp.layout import Layout
from mpicomp.philox import Key

CANDIDATES = ("dense", "bf16", "terngrad", "onebit", "onebit:exchange=sharded")
WORTH = 1.25  # a compressed method is advised only if it is predicted to be so much faster
SAMPLE = 1 << 21  # elements on which codecs are measured


@dataclass(frozen=True)
class Link:
    """One kind of call: seconds = latency + bytes received * seconds a byte."""

    latency: float
    per_byte: float

    def seconds(self, received, calls=1):
        return calls * self.latency + received * self.per_byte


@dataclass(frozen=True)
class Codec:
    """What one method costs an element: seconds to encode, to decode, and bytes."""

    encode: float
    decode: float
    bytes: float


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step's exchange by parts; `total` counts what backward cannot hide."""

    method: str
    encode: float
    wire: float
    decode: float
    hidden: float

    @property
    def total(self):
        return self.encode + self.decode + max(0.0, self.wire - self.hidden)


def measure_links(comm) -> dict:
    """{"gather": Link, "reduce": Link} between the ranks of `comm`; about a second.

    One rank receives nothing, so its links tell what a call takes and nothing about bytes.
    """
    small, large = 1 << 10, 1 << 20
    links = {}
    for kind in ("gather", "reduce"):
        times = [_time_call(comm, kind, size) for size in (small, large)]
        received = [_received(kind, size, comm.size) for size in (small, large)]
        slope = max(0.0, times[1] - times[0]) / (received[1] - received[0]) if received[0] else 0.0
        links[kind] = Link(max(0.0, times[0] - slope * received[0]), slope)
    return links


def _received(kind, size, ranks):
    """Bytes that reach a rank: all other packets, or the two passes of a ring."""
    return (ranks - 1) * size if kind == "gather" else 2 * (ranks - 1) / ranks * size


def _time_call(comm, kind, size, repeats=5):
    """Median seconds of one call with `size` bytes a rank, of the slowest rank."""
    send = np.ones(size // 4, np.float32)
    receive = np.empty(size // 4 * (comm.size if kind == "gather" else 1), np.float32)
    call = comm.Iallgather if kind == "gather" else comm.Iallreduce
    times = []
    for _ in range(repeats + 1):
        mpi.wait(comm, comm.Ibarrier(), mpi.limit(comm), "measuring links")
        start = perf_counter()
        mpi.wait(comm, call(send, receive), mpi.limit(comm), "measuring links")
        times.append(max(mpi.allgather(comm, perf_counter() - start, "measuring links")))
    return float(np.median(times[1:]))


def measure_codec(method, comm, rows=1024) -> Codec:
    """Encode and decode a sample of normal numbers on all ranks at once; the slowest counts."""
    c = method.compressor
    layout = Layout.of([("sample", (rows, SAMPLE // rows))])
    x = np.random.default_rng(comm.rank).standard_normal(layout.size, np.float32)
    out, packet = np.zeros_like(x), np.zeros(c.capacity(layout), np.uint8)
    state, key = c.init(layout, x), Key()
    encode, decode = [], []
    for _ in range(4):
        mpi.wait(comm, comm.Ibarrier(), mpi.limit(comm), "measuring codecs")
        start = perf_counter()
        c.measure(x, layout, state)
        used = c.encode(x, packet, layout, key, state)
        middle = perf_counter()
        c.decode_add(packet[:used], out, layout, key, 1.0)
        encode.append(middle - start)
        decode.append(perf_counter() - middle)
        c.commit(state)
    mine = np.median(encode[1:]), np.median(decode[1:])
    worst = np.max(mpi.allgather(comm, mine, "measuring codecs"), axis=0)
    return Codec(worst[0] / layout.size, worst[1] / layout.size, used / layout.size)


def predict(method, codec, links, n, ranks, hidden=0.0, copy=0.0) -> Prediction:
    """The parts of one step's exchange, by the model above; `copy` is seconds an element."""
    size = codec.bytes * n
    encode, decode = codec.encode * n, codec.decode * n
    share = (ranks - 1) / ranks
    if method.exchange == "allreduce":
        wire = links["reduce"].seconds(2 * share * size)
        if method.compressor.alias(np.zeros(1, np.float32)) is not None:
            encode = 0.0
    elif method.exchange == "sharded":
        wire = links["gather"].seconds(2 * share * size, calls=2)
        # into the order of the shards, and back from the sum and from the packets
        encode, decode = encode * (1 + 1 / ranks) + copy * n, decode * 2 + 2 * copy * n
    else:
        wire = links["gather"].seconds((ranks - 1) * size)
        decode *= ranks
    return Prediction(repr(method), encode, wire, decode, hidden)


@dataclass(frozen=True)
class Advice:
    """What was measured, what is predicted (fastest first), what to use and why."""

    links: dict
    codecs: dict
    predictions: tuple
    choice: str
    reason: str

    @property
    def copy(self):
        """Seconds to copy an element on all ranks at once: what dense takes to encode."""
        return next(iter(self.codecs.values())).encode


def report(method, stats, advice=None) -> str:
    """What the exchange took a step, by stage; after method="auto" beside what was predicted."""
    now = {stage: 1e3 * seconds / max(1, stats.steps) for stage, seconds in stats.seconds.items()}
    text = f"{method.name}: {stats.ratio:.1f} times less than dense, ms a step: " \
        + ", ".join(f"{stage} {value:.1f}" for stage, value in now.items())
    if advice:
        told = next(p for p in advice.predictions if p.method == advice.choice)
        text += (f"; predicted encode {1e3 * told.encode:.1f}, wire {1e3 * told.wire:.1f}, "
                 f"decode {1e3 * told.decode:.1f}, together {1e3 * told.total:.1f}, found "
                 f"{sum(now.values()):.1f}")
    return text


def advise(comm, n, candidates=CANDIDATES, hidden=0.0, ranks=None) -> Advice:
    """Measure, predict for a gradient of n elements, and choose. The same on every rank.

    `hidden` is how many seconds of the exchange the backward pass can hide; `ranks` predicts for
    another number of ranks than are present, which one rank alone cannot: SpecError.
    """
    if comm.size == 1 and ranks not in (None, 1):
        raise SpecError(f"ranks={ranks} found, but this job has one rank and so no link to "
                        "measure: start it with  launch/run -n 2  or more")
    methods = [systems.method(spec) for spec in dict.fromkeys(["dense", *candidates])]
    links = measure_links(comm)
    codecs = {repr(m): measure_codec(m, comm) for m in methods}
    ranks = ranks or comm.size
    copy = codecs[repr(methods[0])].encode  # dense
    predictions = [predict(m, codecs[repr(m)], links, n, ranks, hidden, copy) for m in methods]
    dense, best = predictions[0], min(predictions, key=lambda p: p.total)
    if ranks == 1:
        choice, reason = dense, "there is one rank, and nothing to exchange"
    elif dense.total <= WORTH * best.total:
        choice = dense
        reason = (f"the best compressed method is predicted to take {1e3 * best.total:.1f} ms, "
                  f"dense {1e3 * dense.total:.1f} ms: compression would not pay here")
        if best is dense:
            other = min(predictions[1:], key=lambda p: p.total)
            reason = (f"dense is predicted to take {1e3 * dense.total:.1f} ms, the best compressed "
                      f"method ({other.method}) {1e3 * other.total:.1f} ms")
    else:
        choice = best
        reason = (f"predicted {1e3 * best.total:.1f} ms of exchange a step, dense "
                  f"{1e3 * dense.total:.1f} ms")
    order = tuple(sorted(predictions, key=lambda p: p.total))
    return mpi.bcast(comm, Advice(links, codecs, order, choice.method, reason), "choosing a method")
