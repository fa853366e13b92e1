"""Rule: another compressor for each parameter, chosen by its name, place, size or shape."""

import operator
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from glob import escape

import numpy as np

from mpicomp import kernels, philox
from mpicomp.compressors.base import Compressor, State
from mpicomp.compressors.dense import Dense
from mpicomp.compressors.onebit import OneBit
from mpicomp.compressors.options import check_options, option
from mpicomp.compressors.registry import register
from mpicomp.compressors.residual import Residual
from mpicomp.errors import SpecError
from mpicomp.layout import Layout
from mpicomp.names import bare

_TEST = re.compile(r"(size|ndim|last) *(<=|>=|=|<|>) *(\d+)")
_SHAPE = re.compile(r"shape *= *([\dx*?]+)")
_COMPARE = {"<": operator.lt, "<=": operator.le, "=": operator.eq, ">=": operator.ge,
            ">": operator.gt}
MOST_BYTES = 2**32  # a length word has 32 bits


class Cases(tuple):
    """Pairs (test, compressor), tried in order; the last has the test "" and takes the rest.

    A test is a pattern on the parameter's name, as in a shell (`*.bias`, `embed.*`), or on its
    shape (`shape=*x3x3`), or a comparison: `size<1000` (elements), `ndim>2` (dimensions), `last<=2`
    (the place in the model, counted from its last parameter; a Reducer turns it into names).
    """

    @classmethod
    def read(cls, text, make):
        """The cases in `test:compressor; test:compressor; compressor`; `make` reads the latter."""
        *entries, rest = _split(text)
        pairs = []
        for entry in entries:
            test, _, spec = (part.strip() for part in entry.partition(":"))
            if not test or not spec:
                raise SpecError(f"rule: pattern:compressor expected, found {entry.strip()!r}")
            if set(test) & set("<=>") and not (_TEST.fullmatch(test) or _SHAPE.fullmatch(test)):
                raise SpecError("rule: a test such as size<1000, ndim=2, last<=2 or shape=*x3x3 "
                                f"expected, found {test!r}")
            pairs.append((test, make(spec)))
        try:
            return cls((*pairs, ("", make(rest.strip()))))
        except SpecError as error:
            raise SpecError("rule: the last entry has no pattern, it is the compressor of all the "
                            f"rest, as in rule(*.bias:dense; onebit). {error}") from None

    def of(self, names):
        """The cases for a model whose parameters have these names: none counts places any more."""
        pairs = []
        for test, compressor in self:
            counts = _TEST.fullmatch(test)
            if not counts or counts[1] != "last":
                pairs.append((_for_plain(test, names), compressor))
                continue
            pairs += [(escape(name), compressor) for place, name in enumerate(reversed(names), 1)
                      if _COMPARE[counts[2]](place, int(counts[3]))]
        return type(self)(pairs)

    def text(self, show=repr):
        """The inverse of `read`, each compressor as `show` writes it."""
        return "; ".join(f"{test}:{show(c)}" if test else show(c) for test, c in self)

    def __repr__(self):
        return self.text()


def _for_plain(test, names):
    """The test; a pattern that fits no name because of `_orig_mod.` or `module.` without these."""
    if any(fnmatchcase(name, test) for name in names):
        return test
    return bare(test)


def _split(text):
    """The parts of `text` between semicolons that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == ";" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def holds(test, segment) -> bool:
    """Does this test hold for the parameter?"""
    shape, comparison = _SHAPE.fullmatch(test), _TEST.fullmatch(test)
    if shape:
        return fnmatchcase("x".join(map(str, segment.shape)), shape[1])
    if not comparison:
        return not test or fnmatchcase(segment.name, test)
    what, sign, number = comparison.groups()
    if what == "last":
        raise SpecError(f"rule: {test} counts the parameters of a model, which only a Reducer "
                        "knows: write their names")
    found = segment.size if what == "size" else len(segment.shape)
    return _COMPARE[sign](found, int(number))


@dataclass(frozen=True)
class Run:
    """Neighbouring parameters of one bucket under the same test: a layout of their own."""

    number: int
    test: str
    compressor: Compressor
    slice: slice
    layout: Layout

    def key(self, key):
        """Random numbers of its own; the first run's are those it would draw without a rule."""
        if not self.number:
            return key
        return replace(key, seed=philox.part(key.seed, self.number))


@lru_cache(maxsize=1024)
def runs(rule, layout) -> tuple[Run, ...]:
    """The maximal runs of a layout under a rule."""
    groups = []  # [case, segments]
    for segment in layout.segments:
        case = next(i for i, (test, _) in enumerate(rule.inner) if holds(test, segment))
        if not groups or groups[-1][0] != case:
            groups.append([case, []])
        groups[-1][1].append(segment)
    return tuple(Run(number, *rule.inner[case], slice(own[0].start, own[-1].stop),
                     Layout.of((s.name, s.shape) for s in own))
                 for number, (case, own) in enumerate(groups))


@register
@dataclass(frozen=True, repr=False)
class Rule(Compressor):
    """The first case whose test holds for a parameter says how it is compressed.

    rule(*.bias:dense; embed.*:residual(dropping:rate=0.999); residual(onebit)), or size<1000,
    ndim<2, shape=*x3x3 as tests. rule(last<=2:dense; terngrad) leaves a model's last two parameters
    alone, as the authors' code of TernGrad does (quantize_logits=False). Error feedback belongs to
    the cases: where one is residual(...) its parameters have a residual, the others have none.
    Neighbouring parameters of the same case are compressed together, as a bucket of their own;
    `size` and `shape` are those of the tensor in the layout, which exchange=sharded cuts.
    """

    name = "rule"

    inner: Cases = option(Cases((("ndim<2", Dense()), ("", Residual(OneBit())))),
                          "pattern:compressor; pattern:compressor; compressor of the rest")

    def __post_init__(self):
        check_options(self)
        for _, compressor in self.inner:
            if isinstance(compressor, Rule):
                raise SpecError("rule: a rule inside of a rule found: write its cases into the "
                                "outer one")
            if compressor.agreed_by != "max":
                raise SpecError(f"rule: {compressor.core.name} found as a case, it needs "
                                "exchange=allreduce, which a rule cannot have: use it for the "
                                "whole model")

    @classmethod
    def from_inner(cls, text, read):
        return Cases.read(text, read)

    fixed = property(lambda self: all(c.fixed for _, c in self.inner))
    unbiased = property(lambda self: all(c.unbiased for _, c in self.inner))

    def capacity(self, layout):
        """uint32 length[v], then the payload of each run, filled up with 0 to a multiple of 4.

        The v lengths are those of the runs whose compressor is not fixed, without the filling.
        """
        parts = [run.compressor.capacity(run.layout) for run in runs(self, layout)]
        if max(parts, default=0) >= MOST_BYTES:
            raise ValueError(f"rule: neighbouring parameters may take {max(parts)} bytes, a length "
                             "has 32 bits: make bucket_bytes smaller")
        return self._head(layout) + sum(_whole(part) for part in parts)

    def _head(self, layout):
        return 4 * sum(not run.compressor.fixed for run in runs(self, layout))

    def init(self, layout, like):
        """A state for each run, their residuals side by side so that they are one array."""
        zeros = kernels.of(like).zeros
        state = State(runs=[], shared=None, owed=None, ahead=None)
        if any(isinstance(c, Residual) for _, c in self.inner):
            state.owed, state.ahead = zeros(layout.size), zeros(layout.size)
        for run in runs(self, layout):
            inner = run.compressor.init(run.layout, like)
            if isinstance(run.compressor, Residual):
                inner.owed, inner.ahead = state.owed[run.slice], state.ahead[run.slice]
            if set(run.compressor.persistent(inner)) - {"error"}:
                raise SpecError(f"rule: {run.compressor!r} keeps more than a residual: it cannot "
                                "be part of a rule")
            measured = run.compressor.measure(zeros(run.layout.size), run.layout, inner)
            state.runs.append((run, inner, measured))
        if any(_measures(c, like) for _, c in self.inner):
            state.shared = zeros(sum(m.size for *_, m in state.runs if m is not None))
        return state

    def _measured(self, state):
        """(run, its state, what it measured, its slice of state.shared) of those that measure."""
        at = 0
        for run, inner, measured in state.runs:
            if measured is not None:
                yield run, inner, measured, slice(at, at + measured.size)
                at += measured.size

    def measure(self, x, layout, state):
        """The shared numbers of all runs, side by side."""
        if state.shared is None:
            return None
        for run, inner, _, part in self._measured(state):
            state.shared[part] = run.compressor.measure(x[run.slice], run.layout, inner)
        return state.shared

    def encode(self, x, packet, layout, key, state):
        if state.shared is not None:
            for *_, measured, part in self._measured(state):
                measured[...] = state.shared[part]
        lengths = packet[:self._head(layout)].view(np.uint32)
        used, variable = self._head(layout), 0
        for run, inner, _ in state.runs:
            room = packet[used:used + run.compressor.capacity(run.layout)]
            size = run.compressor.encode(x[run.slice], room, run.layout, run.key(key), inner)
            if not run.compressor.fixed:
                lengths[variable] = size
                variable += 1
            packet[used + size:used + _whole(size)] = 0
            used += _whole(size)
        return used

    def decode_add(self, packet, out, layout, key, weight=1.0):
        head = self._head(layout)
        if len(packet) < head:
            self.expect(packet, head)
        lengths = iter(packet[:head].view(np.uint32))
        parts = [run.compressor.capacity(run.layout) if run.compressor.fixed else
                 int(next(lengths)) for run in runs(self, layout)]
        self.expect(packet, head + sum(map(_whole, parts)))
        for run, size in zip(runs(self, layout), parts):
            run.compressor.decode_add(packet[head:head + size], out[run.slice], run.layout,
                                      run.key(key), weight)
            head += _whole(size)

    def by_case(self, payload, layout):
        """{"rule *.bias:dense": bytes with their filling, ...}, and "rule lengths"."""
        found = {"rule lengths": self._head(layout)} if self._head(layout) else {}
        lengths = iter(payload[:self._head(layout)].view(np.uint32))
        for run in runs(self, layout):
            size = run.compressor.capacity(run.layout) if run.compressor.fixed else \
                int(next(lengths))
            core = run.compressor.inner if isinstance(run.compressor, Residual) else run.compressor
            case = f"rule {run.test or 'rest'}:{core.name}"
            found[case] = found.get(case, 0) + _whole(size)
        return found

    def persistent(self, state):
        return {} if state.owed is None else {"error": state.owed}

    def commit(self, state):
        for run, inner, _ in state.runs:
            run.compressor.commit(inner)
        state.owed, state.ahead = state.ahead, state.owed


def _measures(compressor, like) -> bool:
    """Do ranks agree on something before this compressor encodes?"""
    nothing = Layout(())
    state = compressor.init(nothing, like[:0])
    return compressor.measure(like[:0], nothing, state) is not None


def _whole(size):
    """The next multiple of 4 bytes."""
    return size + -size % 4
