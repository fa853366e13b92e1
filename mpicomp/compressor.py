"""The contract of a compressor, the registry of all of them, and specifications as text.

A compressor turns the gradients of one bucket (a flat float32 array) into bytes and back. It is
frozen data: everything it may be told stands in its fields, `repr` is its specification, and
`from_spec(repr(c)) == c`. Two compressors with the same specification decode what the other wrote.
Arrays and state belong to the caller, so the same object serves every bucket and every thread.

Three decisions carry the rest of the package:

  * capacity is known from the layout alone, and encode writes into the caller's buffer;
  * decode *accumulates* with a weight: averaging P packets is decode_add(packet, mean, 1/P) in
    rank order, and error feedback is the same call with weight -1;
  * what MPI may add (`summable`), what error feedback may wrap (`feedback`) and what is unbiased
    are declared here and held by the conformance tests.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from types import SimpleNamespace
from typing import ClassVar

from mpicomp import kernels
from mpicomp.errors import PacketError, SpecError

LARGEST = 2.0**128 - 2.0**104  # the largest float32


class State(SimpleNamespace):
    """The arrays that a compressor keeps for one bucket; which ones is its own business."""


@dataclass(frozen=True, repr=False)
class Compressor(ABC):
    """Which bytes stand for these floats. Subclass, write four methods, `register` the class."""

    name: ClassVar[str]
    source: ClassVar[str] = ""  # the paper
    fixed: ClassVar[bool] = True  # every payload fills its capacity
    feedback: ClassVar[bool] = False  # may Residual wrap it? Its residual must stay bounded
    unbiased: ClassVar[bool] = False  # E[decode(encode(x))] = x

    @abstractmethod
    def capacity(self, layout) -> int:
        """The most bytes that a payload of this layout can take; depends on the layout only."""

    def init(self, layout, like) -> State:
        """State and scratch for one bucket, in the kind of array that `like` is.

        All the memory that this compressor will ever need for the bucket is taken here.
        """
        return State()

    def measure(self, x, layout, state):
        """What the ranks must agree on before `encode`, or None.

        Returns an array that lives in `state`; the exchange replaces its content by the maximum
        over all ranks, and `encode` then reads it there.
        """
        return None

    @abstractmethod
    def encode(self, x, packet, layout, key, state) -> int:
        """Write the payload for `x` (float32, layout.size elements) to `packet` (uint8).

        Returns the bytes used; what lies behind them, up to the capacity, may serve as scratch.
        A pure function of (self, x, layout, key, state): `x` and `state` stay as they are, and
        random numbers come from `key` and the element alone.
        """

    @abstractmethod
    def decode_add(self, packet, out, layout, key, weight=1.0) -> None:
        """Add weight * (what the payload `packet` says) to `out` (float32, layout.size elements).

        `packet` holds exactly the bytes used, `key` is the sender's. Raises PacketError for
        bytes that `encode` cannot have written; `out` is then not to be used.
        """

    def decode_sum(self, payloads, out, layout, keys, weight=1.0) -> None:
        """out = weight * the sum of what the payloads say, added in their order to zero.

        keys[i] is that of the sender of payloads[i]; none at all make zeros, for an asynchronous
        rank may have heard of nobody. What `out` held before is lost. A kernel may do this in one
        pass over `out`; a test proves it equal.
        """
        out[...] = 0
        for packet, key in zip(payloads, keys):
            self.decode_add(packet, out, layout, key, weight)

    def encode_owed(self, grad, owed, packet, layout, key, state, out=None) -> int:
        """Encode owed + grad and keep what remains unsaid: all there is to error feedback.

        `owed` is what the world was not told so far; what it has still not been told is written
        to `out`, by default `owed` itself. With another array for `out` the step can be taken
        back. A fused kernel may replace these lines; a test proves it equal.
        """
        out = owed if out is None else out
        _add(owed, grad, out)
        used = self.encode(out, packet, layout, key, state)
        self.decode_add(packet[:used], out, layout, key, -1.0)
        return used

    @property
    def summable(self):
        """The dtype ("float32", "int8", "float16" ...) in which MPI may add payloads, or None."""
        return None

    @property
    def most_ranks(self):
        """The largest number of ranks over which the sum of payloads is exact, or None."""
        return None

    def alias(self, x):
        """The payload for `x` where it is the memory of `x` itself, as uint8, or None."""
        return None

    def shared_bytes(self, layout) -> int:
        """Bytes at the front of a payload that all ranks agreed on; MPI adds what follows them."""
        return 0

    def by_case(self, payload, layout) -> dict:
        """{case: bytes} of a payload whose parts have other reasons than the method itself."""
        return {}

    @property
    def core(self):
        """The compressor that writes the payloads: what Residual wraps, or this one."""
        return self

    @property
    def can_split(self) -> bool:
        """Does `split` know how to cut a payload of this configuration?"""
        return False

    def split(self, packet, layout, borders) -> list:
        """The payload cut at these elements: one for every pair of neighbours in `borders`.

        Each part is a payload by itself, of the elements from its border on, which count from 0.
        Only where `can_split`.
        """
        raise NotImplementedError(f"{self.name} has no split")

    def persistent(self, state) -> dict:
        """The arrays (one element a gradient) that a checkpoint must hold: {"error": owed} ..."""
        return {}

    def commit(self, state) -> None:
        """The step with the last encoded packet was applied on all ranks: it is now the past."""

    @classmethod
    def from_inner(cls, text):
        """The value of the field `inner` from what stands in the bracket of a specification."""
        return from_spec(text)

    def expect(self, packet, size) -> None:
        """Raise PacketError unless the payload has `size` bytes."""
        if len(packet) != size:
            raise PacketError(f"{self.name}: a payload of {len(packet)} bytes found, "
                              f"{size} expected for this layout")

    def expect_finite(self, values) -> None:
        """Raise PacketError unless all of these floats from a payload are finite."""
        def complain(values):
            raise PacketError(f"{self.name}: a number in the payload is not finite")

        kernels.of(values).within(values, -LARGEST, LARGEST, complain)

    def __repr__(self):
        return spec_text(self.name, {f.name: getattr(self, f.name) for f in fields(self)})


def _add(a, b, out):
    """out = a + b in the arrays' own library."""
    if out is not a:
        out[...] = a
    out += b


# ---- options ----------------------------------------------------------------------------------


def option(default, doc, *, choices=None, above=None, least=None, most=None):
    """A dataclass field that says what it means and which values it takes."""
    limits = dict(doc=doc, choices=choices, above=above, least=least, most=most)
    return field(default=default, metadata=limits)


def check_options(compressor) -> None:
    """Raise SpecError for a field whose value is outside of what `option` declared.

    A whole number for a float or a text, and NumPy's numbers, are turned into what it is.
    """
    for f in fields(compressor):
        value = getattr(compressor, f.name)
        number = {float: Real, int: Integral, str: Integral}.get(f.type)
        if number and isinstance(value, number) and not isinstance(value, bool):
            object.__setattr__(compressor, f.name, f.type(value))
        _check(compressor.name, f, getattr(compressor, f.name))


def _check(owner, f, value):
    wrong = None
    limits = f.metadata
    if f.type in (int, float) and isinstance(value, bool) or not isinstance(value, f.type):
        wrong = f"of type {f.type.__name__}"
    elif limits.get("choices") and value not in limits["choices"]:
        wrong = "one of " + ", ".join(map(str, limits["choices"]))
    elif isinstance(value, float) and not abs(value) < float("inf"):
        wrong = "a finite number"
    elif limits.get("above") is not None and not value > limits["above"]:
        wrong = f"more than {limits['above']}"
    elif limits.get("least") is not None and not value >= limits["least"]:
        wrong = f"at least {limits['least']}"
    elif limits.get("most") is not None and not value <= limits["most"]:
        wrong = f"at most {limits['most']}"
    if wrong:
        raise SpecError(f"{owner}: {f.name}={_show(value)} found, {f.name} must be {wrong} "
                        f"({f.metadata.get('doc', '')})")


_BOOL = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


def parse_value(owner, f, text):
    """The value of field `f` from its text in a specification."""
    if not isinstance(text, str):
        return float(text) if f.type is float and type(text) is int else text
    try:
        return _BOOL[text.lower()] if f.type is bool else f.type(text)
    except (KeyError, ValueError):
        kind = {bool: "yes or no", int: "a whole number", float: "a number"}.get(f.type, "text")
        raise SpecError(f"{owner}: {f.name}={text} found, {f.name} must be {kind} "
                        f"({f.metadata.get('doc', '')})") from None


def parse_options(name, known, options: dict) -> dict:
    """Typed keyword arguments for `name`, whose options are the dataclass fields `known`."""
    known = {f.name: f for f in known}
    for option_name in options:
        if option_name not in known:
            listed = [f"{f.name}={_show(f.default)} ({f.metadata.get('doc', '')})"
                      for f in known.values()]
            raise SpecError(f"{name} has no option {option_name!r}; it has "
                            + (", ".join(listed) or "none"))
    values = {key: parse_value(name, known[key], text) for key, text in options.items()}
    for key, value in values.items():
        _check(name, known[key], value)
    return values


# ---- specifications as text -------------------------------------------------------------------


def _show(value):
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def spec_text(name, options: dict) -> str:
    """`name:option=value,option=value`, the inverse of `split_spec`."""
    inner = options.get("inner")
    head = f"{name}({inner!r})" if inner is not None else name
    rest = ",".join(f"{k}={_show(v)}" for k, v in options.items() if k != "inner")
    return f"{head}:{rest}" if rest else head


def split_spec(spec: str) -> tuple[str, str | None, dict]:
    """(name, inner specification or None, options as text) of `name(inner):option=value,...`."""
    if not isinstance(spec, str):
        raise SpecError(f"a specification is text such as 'strom:tau=0.01', found {spec!r}")
    head, rest, inner = spec.strip(), "", None
    if "(" in head.split(":")[0]:
        close = head.rfind(")")
        if close < 0:
            raise SpecError(f"{spec!r}: the bracket is not closed")
        opened = head.index("(")
        head, inner, rest = head[:opened], head[opened + 1:close], head[close + 1:].strip()
        if rest and not rest.startswith(":"):
            raise SpecError(f"{spec!r}: ':' expected after ')', found {rest!r}")
        rest = rest[1:]
    elif ":" in head:
        head, rest = head.split(":", 1)
    options = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise SpecError(f"{spec!r}: option=value expected, found {part!r}")
        if name.strip() in options:
            raise SpecError(f"{spec!r}: the option {name.strip()!r} is given twice")
        options[name.strip()] = value.strip()
    return head.strip(), inner, options


# ---- the registry -----------------------------------------------------------------------------

_REGISTRY: dict[str, type[Compressor]] = {}


def register(cls):
    """Make a Compressor class known under `cls.name`; usable as a decorator.

    Packages may also name their classes in the entry-point group `mpicomp.compressors`.
    """
    known = _REGISTRY.get(cls.name)
    if known is not None and known is not cls:
        raise SpecError(f"two compressors are called {cls.name!r}: {known.__module__}."
                        f"{known.__qualname__} and {cls.__module__}.{cls.__qualname__}")
    _REGISTRY[cls.name] = cls
    return cls


def registry() -> dict[str, type[Compressor]]:
    """All registered compressor classes by name: our own, and those of installed packages."""
    from importlib.metadata import entry_points

    import mpicomp.compressors  # noqa: F401 (registers ours)

    if not getattr(registry, "complete", False):
        registry.complete = True
        for point in entry_points(group="mpicomp.compressors"):
            register(point.load())
    return dict(_REGISTRY)


def find(name: str) -> type[Compressor]:
    """The compressor class called `name`; SpecError lists what exists."""
    classes = registry()
    if name not in classes:
        raise SpecError(f"no compressor is called {name!r}; there are: "
                        + ", ".join(sorted(classes)))
    return classes[name]


def from_spec(spec) -> Compressor:
    """The compressor that a specification describes, such as "onebit" or "residual(strom:tau=1)".

    Raises SpecError that lists what exists for an unknown name, option or value.
    """
    if isinstance(spec, Compressor):
        return spec
    name, inner, options = split_spec(spec)
    cls = find(name)
    bracket = next((f for f in fields(cls) if f.name == "inner"), None)
    needed = bracket is not None and bracket.default is None
    if inner is not None and bracket is None or inner is None and needed:
        raise SpecError(f"{spec!r}: {name} is written "
                        + (f"{name}(another compressor)" if bracket else f"{name}, no bracket"))
    if inner is not None:
        options["inner"] = cls.from_inner(inner)
    return cls(**parse_options(name, fields(cls), options))
