"""Which method would be fastest here? Links and codecs are measured, the rest is arithmetic.

For a gradient of n elements over P ranks, in packets of L bytes:

    encode      n * codec.encode * cost.encodes, and copies before
    wire        cost.calls * a + b * cost.packets * L
    decode      n * codec.decode * cost.decodes, and copies after
    step        compute + encode + decode + max(0, wire - what backward hides)

`cost` is what the exchange declares for P ranks (exchange/base.py; the table is in
docs/planning.md). a (seconds a call) and b (seconds a received byte) are measured for each kind of
call between the ranks that are present, while all of them work at once (trial.py). Predictions for
other P assume that each rank's link, not the network behind it, is the limit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpicomp import catalogue
from mpicomp.advice.trial import (
    Codec,
    Link,
    given,
    made_up,
    measure_codec,
    measure_links,
    reduction,
    together,
)
from mpicomp.catalogue import Method
from mpicomp.compressors import Rule, Strom
from mpicomp.errors import SpecError
from mpicomp.transport.meter import Meter

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Advice", "Prediction", "advise", "predict", "report"]

CANDIDATES = ("dense", "bf16", "terngrad", "onebit", "onebit:exchange=sharded")
Gradient = str | PathLike[str] | NDArray[Any] | Mapping[str, NDArray[Any]]
WORTH = 1.25  # a compressed method is advised only if it is predicted to be so much faster


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step's exchange, by parts. `hidden`: of the wire, behind backward."""

    method: str
    encode: float
    wire: float
    decode: float
    hidden: float

    @property
    def total(self) -> float:
        return self.encode + self.decode + max(0.0, self.wire - self.hidden)


def predict(method: Method, codec: Codec, links: Mapping[str, Link], n: int, ranks: int,
            hidden: float = 0.0, copy: float = 0.0) -> Prediction:
    """Seconds of one step's exchange of n elements, by the model above.

    `hidden`: seconds that the backward pass hides. `copy`: seconds to copy an element.
    """
    cost = method.carrier.cost(ranks)
    link = links[reduction(method) if method.carrier.adds else "gather"]
    wire = link.seconds(cost.packets * codec.bytes * n, cost.calls)
    encode = codec.encode * n * cost.encodes + copy * n * cost.copies_before
    if method.carrier.adds and method.compressor.alias(np.zeros(1, np.float32)) is not None:
        encode = 0.0  # MPI adds up the gradient where it lies
    decode = codec.decode * n * cost.decodes + copy * n * cost.copies_after
    return Prediction(repr(method), encode, wire, decode, hidden)


@dataclass(frozen=True)
class Advice:
    """What was measured, what is predicted (fastest first), what to use and why."""

    elements: int
    links: dict[str, Link]
    codecs: dict[str, Codec]
    predictions: tuple[Prediction, ...]
    choice: str
    reason: str
    sample: str  # what the codecs were tried on
    notes: tuple[str, ...] = ()  # which predictions mean nothing, and what to type

    @property
    def copy(self) -> float:
        """Seconds to copy an element, on all ranks at once: what dense takes to encode it."""
        return next(iter(self.codecs.values())).encode


def report(method: Method, stats: Meter, advice: "Advice | None" = None) -> str:
    """Text: milliseconds a step by stage; after method="auto" with the prediction beside them."""
    now = {stage: 1e3 * seconds / max(1, stats.steps) for stage, seconds in stats.seconds.items()}
    text = f"{method.name}: {stats.ratio:.1f} times less than dense, ms a step: " \
        + ", ".join(f"{stage} {value:.1f}" for stage, value in now.items())
    if advice:
        told = next(p for p in advice.predictions if p.method == advice.choice)
        text += (f"; predicted encode {1e3 * told.encode:.1f}, wire {1e3 * told.wire:.1f}, "
                 f"decode {1e3 * told.decode:.1f}, together {1e3 * told.total:.1f}, found "
                 f"{sum(now.values()):.1f}")
    return text


def unit_free(methods) -> tuple:
    """A note for each method with a fixed threshold, which made-up gradients say nothing about."""
    notes = []
    for method in methods:
        rule = method.compressor
        parts = [c for _, c in rule.inner] if isinstance(rule, Rule) else [rule]
        fixed = [c.core for c in parts if isinstance(c.core, Strom) and not c.core.density]
        if fixed:
            notes.append(f"{method.name}: what this sends depends on how large your gradients are "
                         f"beside tau={fixed[0].tau:g}, so the figures found with made-up ones "
                         "say nothing of it. Give a gradient of yours (--gradient FILE.npz), or "
                         "let tau follow the data: strom:density=0.001")
    return tuple(notes)


def _sample(comm, gradient):
    """The gradient to time codecs on; SpecError on all ranks if one cannot read its own."""
    sample = problem = None
    try:
        sample = made_up(comm.rank) if gradient is None else given(gradient)
    except SpecError as error:
        problem = f"rank {comm.rank}: {error}"
    found = together(comm, (problem, sample and sample.x.size))
    if problems := [told for told, _ in found if told]:
        raise SpecError(problems[0])
    sizes = [size for _, size in found]
    if len(set(sizes)) > 1:
        raise SpecError(f"gradient: {sizes} elements found on the ranks, the same number expected")
    return sample


def advise(comm: "MPI.Comm", n: int | None = None, candidates: Iterable[str] = CANDIDATES,
           hidden: float = 0.0, ranks: int | None = None,
           gradient: Gradient | None = None) -> Advice:
    """Measure, predict for a gradient of n elements, and choose. The same on every rank.

    hidden    seconds of the exchange that the backward pass can hide
    ranks     how many to predict for; SpecError if other than 1 where one rank is present
    gradient  one of yours to time the codecs on, on every rank: an array, {parameter name: array},
              or the path of a file of numpy.save or numpy.savez. n is its size if not given. What
              sparse methods send depends on it. None: numbers with heavy tails (`trial.made_up`)
    """
    if n is None and gradient is None:
        raise SpecError("advise: n, the elements of the gradient, or a gradient expected")
    if comm.size == 1 and ranks not in (None, 1):
        raise SpecError(f"ranks={ranks} found, but this job has one rank and so no link to "
                        "measure: start it with  launch/run -n 2  or more")
    methods = [catalogue.method(spec) for spec in dict.fromkeys(["dense", *candidates])]
    sample = _sample(comm, gradient)
    n = n or sample.x.size
    codecs = {repr(m): measure_codec(m, comm, sample) for m in methods}
    links = measure_links(comm, n, methods, codecs)
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
    notes = () if sample.real else unit_free(methods)
    advice = Advice(n, links, codecs, order, choice.method, reason, sample.told, notes)
    return together(comm, advice)[0]  # the same on every rank, where clocks differed
