"""The methods by the names of their papers: which compressor, with or without error feedback,
over which exchange."""

from dataclasses import dataclass, fields, replace

from mpicomp.compressor import (Compressor, find, option, parse_options, registry, spec_text,
                                split_spec)
from mpicomp.compressors import BFloat16, Dense, Float16, OneBit, Residual, Strom, TernGrad
from mpicomp.errors import SpecError
from mpicomp.exchange import EXCHANGES, exchange


@dataclass(frozen=True, repr=False)
class Method:
    """A compressor and the exchange that carries its packets; `repr` is its specification."""

    name: str
    compressor: Compressor
    exchange: str
    own: str = "quantised"
    adagrad: bool = False
    warmup: int = 0

    def __post_init__(self):
        if self.exchange not in EXCHANGES:
            raise SpecError(f"{self.name}: exchange={self.exchange} found, there are: "
                            + ", ".join(EXCHANGES))
        if self.exchange == "allreduce" and self.compressor.summable is None:
            raise SpecError(f"{self.name}: MPI cannot add the payloads of {self.compressor!r}: "
                            "use exchange=allgather")
        if self.exchange != "sharded" and (self.own != "quantised" or self.adagrad):
            raise SpecError(f"{self.name}: own and adagrad belong to exchange=sharded, found "
                            f"exchange={self.exchange}")

    def open(self, wire):
        """The exchange object that carries this method's packets over `wire`."""
        cls = exchange(self.exchange)
        return cls(wire, self.own, self.adagrad) if self.exchange == "sharded" else cls(wire)

    @property
    def feedback(self) -> bool:
        """Is there a residual?"""
        return isinstance(self.compressor, Residual)

    def __repr__(self):
        core = self.compressor.inner if self.feedback else self.compressor
        options = {f.name: getattr(core, f.name) for f in fields(core)}
        options |= {"feedback": self.feedback, "exchange": self.exchange}
        if self.exchange == "sharded":
            options |= {"own": self.own, "adagrad": self.adagrad}
        if self.warmup:
            options["warmup"] = self.warmup
        return spec_text(self.name, options)


def _owing(compressor, feedback):
    return Residual(compressor) if feedback else compressor


def dense(exchange="allreduce", feedback=False):
    """float32 gradients, added by MPI: the baseline"""
    return Method("dense", _owing(Dense(), feedback), exchange)


def fp16(exchange="allgather", feedback=False):
    """every element rounded to half precision"""
    return Method("fp16", _owing(Float16(), feedback), exchange)


def bf16(exchange="allgather", feedback=False):
    """every element rounded to bfloat16"""
    return Method("bf16", _owing(BFloat16(), feedback), exchange)


def terngrad(exchange="allgather", feedback=False, **options):
    """TernGrad (Wen et al. 2017): random ternary codes, clipped, one shared scaler a layer"""
    if exchange == "allreduce":
        options.setdefault("packing", "int8")
    return Method("terngrad", _owing(TernGrad(**options), feedback), exchange)


def onebit(exchange="allgather", feedback=True, **options):
    """1-bit SGD (Seide et al. 2014): signs and two means a column, with error feedback"""
    return Method("onebit", _owing(OneBit(**options), feedback), exchange)


def strom(exchange="allgather", feedback=True, **options):
    """Strom 2015: +-tau for what passed the threshold, 32 bits each, with error feedback"""
    return Method("strom", _owing(Strom(**options), feedback), exchange)


METHODS = {f.__name__: f for f in (dense, fp16, bf16, terngrad, onebit, strom)}


@dataclass
class _Common:
    """What every method may be told besides its compressor's own options."""

    exchange: str = option("the method's own", "who gets which packet: " + ", ".join(EXCHANGES))
    feedback: bool = option("the method's own", "error feedback: what was not said is said later")
    own: str = option("quantised", "sharded: how a rank's gradient reaches its own shard",
                      choices=("quantised", "raw"))
    warmup: int = option(0, "steps at the start that are exchanged dense", least=0)
    adagrad: bool = option(False, "sharded: AdaGrad on the sum, between the two quantisations")


def methods() -> dict[str, str]:
    """Every method's name and what it is in one line; registered compressors are methods too."""
    own = {name: function.__doc__ for name, function in METHODS.items()}
    for name, cls in registry().items():
        if name != "residual" and name not in own:
            own[name] = (cls.__doc__ or "").strip().split("\n")[0]
    return own


def method(spec) -> Method:
    """The method that a specification names: `name` or `name:option=value,option=value`.

    Options are the compressor's own and, for all, exchange=NAME and feedback=yes|no.
    Raises SpecError that lists what exists for an unknown name, option or value.
    """
    if isinstance(spec, Method):
        return spec
    name, inner, options = split_spec(spec)
    known = methods()
    if inner is not None or name not in known:
        raise SpecError(f"no method is called {spec if inner else name!r}; there are: "
                        + ", ".join(known))
    cls = find(name)
    options = parse_options(name, (*fields(cls), *fields(_Common)), options)
    own = {key: options.pop(key) for key in ("own", "adagrad", "warmup") if key in options}
    if name in METHODS:
        return replace(METHODS[name](**options), **own)
    feedback = options.pop("feedback", cls.feedback)
    carried_by = options.pop("exchange", "allgather")
    return Method(name, _owing(cls(**options), feedback), carried_by, **own)
