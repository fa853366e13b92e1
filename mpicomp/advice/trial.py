"""Trials: links and codecs, timed as training uses them, for advice.py to predict from."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from time import perf_counter

import numpy as np

from mpicomp import catalogue, kernels, mpi
from mpicomp.errors import SpecError
from mpicomp.layout import Layout
from mpicomp.philox import Key
from mpicomp.transport import ring
from mpicomp.transport.calls import Wire
from mpicomp.transport.meter import Meter
from mpicomp.transport.pipeline import Pipeline

SAMPLE = 1 << 21  # elements of the gradient that is made up
LAYERS, WIDTH = 8, 512  # its layers, and the columns of each
SMALL, LARGE = 1 << 10, 1 << 20  # bytes of the packets between which a line is drawn
MOST = 1 << 23  # and of a sum, which is timed at the gradient's size if it is not more than this


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


def together(comm, value) -> list:
    """What each rank gives."""
    return mpi.allgather(comm, value, "measuring links and codecs")


def meet(comm) -> None:
    """All ranks begin now."""
    mpi.wait(comm, comm.Ibarrier(), mpi.limit(comm), "measuring links and codecs")


# ---- gradients ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A gradient to try codecs on: `x` float32[layout.size], and in words where it comes from."""

    x: np.ndarray
    layout: Layout
    told: str
    real: bool = False


def made_up(rank) -> Sample:
    """Numbers as unlike normal noise as gradients are; other ones on each rank.

    Student's t with 3 degrees of freedom (few elements are far larger than the rest), in layers
    whose scales go from 0.1 to 0.0001. What a method sends of it is a guess all the same.
    """
    size = SAMPLE // LAYERS
    x = np.random.default_rng(rank).standard_t(3, (LAYERS, size)).astype(np.float32)
    x *= np.logspace(-1, -4, LAYERS, dtype=np.float32)[:, None]
    layout = Layout.of((f"layer{i}", (size // WIDTH, WIDTH)) for i in range(LAYERS))
    return Sample(x.reshape(-1), layout, f"{LAYERS} made-up layers with heavy tails and scales "
                                         "from 0.1 to 0.0001")


def given(gradient) -> Sample:
    """The Sample of an array, of {parameter name: array}, or of a file of numpy.save or savez.

    SpecError for what is none.

    A vector is taken as a matrix of 1,024 rows and what is left over, since a codec's time and
    bytes depend on shapes: better give each parameter by itself.
    """
    if isinstance(gradient, (str, PathLike)):
        gradient = _read(gradient)
    arrays = dict(gradient) if isinstance(gradient, Mapping) else {"gradient": gradient}
    arrays = {str(name): np.asarray(a) for name, a in arrays.items()}
    if wrong := [f"{name!r} of {a.dtype}" for name, a in arrays.items() if a.dtype.kind != "f"]:
        raise SpecError(f"gradient: {wrong[0]} found, arrays of floats expected")
    if not isinstance(gradient, Mapping) and arrays["gradient"].ndim < 2:
        flat = arrays.pop("gradient").reshape(-1)
        whole = flat.size - flat.size % 1024
        arrays = {"matrix": flat[:whole].reshape(1024, -1), "rest": flat[whole:]}
    with np.errstate(over="ignore"):  # it is told below
        flat = [a.astype(np.float32).reshape(-1) for a in arrays.values()]
    x = np.concatenate(flat) if flat else np.zeros(0, np.float32)
    if not x.size or not np.isfinite(x).all():
        raise SpecError("gradient: an element or more expected, all finite as float32; found "
                        f"{x.size} elements, {int((~np.isfinite(x)).sum())} of them not finite")
    layout = Layout.of((name, a.shape) for name, a in arrays.items() if a.size)
    return Sample(x, layout, f"the gradient given, of {x.size:,} elements", real=True)


def _read(path):
    """The array or arrays of a file."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SpecError(f"{path}: a gradient written by numpy.save or numpy.savez expected: "
                        f"{error}") from None
    return found if isinstance(found, np.ndarray) else dict(found)


# ---- codecs -------------------------------------------------------------------------------------


def measure_codec(method, comm, sample) -> Codec:
    """Encode and decode the sample on all ranks at once, as in four steps; the slowest counts.

    With error feedback the later steps find what the earlier ones left, as training does.
    """
    c, x, layout = method.compressor, sample.x.copy(), sample.layout
    out, packet = np.zeros_like(x), np.zeros(c.capacity(layout), np.uint8)
    state, key = c.init(layout, x), Key()
    whole = method.exchange == "allreduce" and c.alias(x) is not None
    encode, decode = [], []
    for _ in range(4):
        meet(comm)
        start = perf_counter()
        c.measure(x, layout, state)
        used = c.encode(x, packet, layout, key, state)
        middle = perf_counter()
        if whole:  # as exchange/allreduce.py decodes a sum that lies in place
            kernels.of(x).dense_scale(packet[:used], 1.0, out)
        else:
            c.decode_add(packet[:used], out, layout, key, 1.0)
        encode.append(middle - start)
        decode.append(perf_counter() - middle)
        c.commit(state)
    found = together(comm, (np.median(encode[1:]), np.median(decode[1:]), used))
    worst = np.max(found, axis=0)
    return Codec(*(float(value) / layout.size for value in worst))


# ---- links --------------------------------------------------------------------------------------


def reduction(method) -> str:
    """The name in `links` of what this method has MPI (or our ring) add: "reduce", of float32."""
    kind = method.compressor.summable
    return "reduce" if kind in (None, "float32") else f"reduce {kind}"


def measure_links(comm, n, methods=(), codecs=None) -> dict:
    """{"gather": Link, "reduce": Link, ...} between the ranks of `comm`; a second or a few.

    The calls are those that the exchanges make, rings of our own included: "reduce" is the whole
    exchange of `dense`, and each of `methods` that adds other numbers than float32 is timed with
    its own (`reduction`), less what its codec takes. n: elements of the gradient; a sum is timed at
    its size. One rank receives nothing: its links tell what a call takes and nothing about bytes.
    """
    wire, pipeline = Wire(comm, Meter()), Pipeline(comm, mpi.limit(comm))
    sums = {reduction(m): m for m in (catalogue.method("dense"), *methods)
            if m.exchange == "allreduce"}
    large = min(MOST, max(1 << 16, 4 * n))
    links = {"gather": _line(comm, pipeline, [_Gather(wire, size) for size in (SMALL, LARGE)])}
    for name, method in sums.items():
        trials = [_Sum(wire, method, size // 4) for size in (SMALL, large)]
        if name != "reduce" and codecs:
            for trial in trials:
                trial.less = codecs[repr(method)].encode * trial.elements
        links[name] = _line(comm, pipeline, trials)
    return links


class _Gather:
    """Packets of `size` bytes from everybody to everybody, as exchange/allgather.py sends them."""

    less = 0.0

    def __init__(self, wire, size):
        wire.open(1)
        self.wire, self.size = wire, size
        self.received = (wire.size - 1) * size
        self.send = np.ones(size, np.uint8)
        self.receive = np.zeros(size * wire.size, np.uint8)

    def run(self):
        return ring.gather(self.wire, 0, 0, self.send, self.receive, [self.size] * self.wire.size)


class _Sum:
    """The exchange of a method whose payloads are added up, for so many elements."""

    less = 0.0

    def __init__(self, wire, method, elements):
        layout = Layout.of([("sum", (elements,))])
        self.elements, self.step = elements, -1
        self.exchange = method.open(wire)
        self.mail = self.exchange.open(method.compressor, layout, 0,
                                       np.ones(elements, np.float32), 0, 0)
        size = method.compressor.capacity(layout) - method.compressor.shared_bytes(layout)
        self.received = 2 * (wire.size - 1) / wire.size * size

    def run(self):
        self.step += 1
        return self.exchange.run(self.mail, self.step, 0)


def _line(comm, pipeline, trials):
    """The Link through the seconds of a small and of a large trial."""
    times = [max(0.0, _time(comm, pipeline, trial) - trial.less) for trial in trials]
    small, large = (trial.received for trial in trials)
    slope = max(0.0, times[1] - times[0]) / (large - small) if large > small else 0.0
    return Link(max(0.0, times[0] - slope * small), slope)


def _time(comm, pipeline, trial, repeats=5):
    """Median seconds of a trial, of the slowest rank; the first is not counted."""
    times = []
    for _ in range(repeats + 1):
        meet(comm)
        start = perf_counter()
        pipeline.launch("the measurement of links", trial.run())
        pipeline.drain()
        times.append(max(together(comm, perf_counter() - start)))
    return float(np.median(times[1:]))
