"""The methods by the names of their papers: which compressor, with or without error feedback,
over which exchange."""

from dataclasses import dataclass, fields, replace

from mpicomp.compressors import (
    AdaComp,
    BFloat16,
    Cases,
    Dense,
    DoReFa,
    Dropping,
    Dryden,
    Float16,
    OneBit,
    Residual,
    Rule,
    Strom,
    TernGrad,
)
from mpicomp.compressors.base import Compressor
from mpicomp.compressors.options import option, parse_options
from mpicomp.compressors.registry import find, from_spec, registry
from mpicomp.compressors.spec import spec_text, split_spec
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
    staleness: int = 4
    delay: int = 0
    thread: bool = True

    def __post_init__(self):
        if self.exchange not in EXCHANGES:
            raise SpecError(f"{self.name}: exchange={self.exchange} found, there are: "
                            + ", ".join(EXCHANGES))
        if self.exchange == "allreduce" and self.compressor.summable is None:
            raise SpecError(f"{self.name}: MPI cannot add the payloads of {self.compressor!r}: "
                            "use exchange=allgather")
        if self.exchange == "allreduce" and self.feedback and "float16" in self.compressor.summable:
            raise SpecError(f"{self.name}: MPI's sum of 16-bit floats rounds, and with "
                            "feedback=yes nobody would owe that: use exchange=allgather")
        if self.delay and self.exchange in ("server", "peers"):
            raise SpecError(f"{self.name}: delay=1 belongs to synchronous exchanges, found "
                            f"exchange={self.exchange}, in which gradients are late anyhow")
        if self.exchange != "sharded" and (self.own != "quantised" or self.adagrad):
            raise SpecError(f"{self.name}: own and adagrad belong to exchange=sharded, found "
                            f"exchange={self.exchange}")
        if self.exchange != "peers" and self.staleness != 4:
            raise SpecError(f"{self.name}: staleness belongs to exchange=peers, found "
                            f"exchange={self.exchange}")
        self._check_server()

    def _check_server(self):
        if self.exchange != "server":
            if not self.thread:
                raise SpecError(f"{self.name}: thread belongs to exchange=server, found "
                                f"exchange={self.exchange}")
            return
        if not self.compressor.core.feedback:
            raise SpecError(f"{self.name}: exchange=server keeps what a worker was not told, and "
                            f"{self.compressor.core.name} does not declare that this stays "
                            "bounded: use exchange=peers")
        if self.warmup:
            raise SpecError(f"{self.name}: warmup={self.warmup} found, exchange=server has no "
                            "warm-up: its optimizers would start anew after it")

    def open(self, wire):
        """The exchange object that carries this method's packets over `wire`."""
        return exchange(self.exchange)(wire, **self._carriage())

    def _carriage(self) -> dict:
        """The options that belong to the exchange."""
        names = {"sharded": ("own", "adagrad"), "peers": ("staleness",),
                 "server": ("thread",)}
        return {name: getattr(self, name) for name in names.get(self.exchange, ())}

    def of(self, names):
        """This method for a model whose parameters have these names, in order of registration."""
        if not isinstance(self.compressor, Rule):
            return self
        return replace(self, compressor=Rule(self.compressor.inner.of(names)))

    @property
    def feedback(self) -> bool:
        """Is there a residual?"""
        return isinstance(self.compressor, Residual)

    def __repr__(self):
        if self.name == "auto":
            return "auto"
        if isinstance(self.compressor, Rule):
            head, options = f"{self.name}({self.compressor.inner.text(_show_case)})", {}
        else:
            head, options = self.name, _options(self.compressor)
        options |= {"exchange": self.exchange, **self._carriage()}
        if self.warmup:
            options["warmup"] = self.warmup
        if self.delay:
            options["delay"] = self.delay
        return spec_text(head, options)


def _options(compressor) -> dict:
    """The options that name this compressor as part of a method."""
    feedback = isinstance(compressor, Residual)
    core = compressor.inner if feedback else compressor
    return {f.name: getattr(core, f.name) for f in fields(core)} | {"feedback": feedback}


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


def dorefa(exchange="allgather", feedback=False, **options):
    """DoReFa (Zhou et al. 2016): random k-bit codes between -m and m, one shared m a tensor"""
    if exchange == "allreduce":
        # sums of int8 codes are exact up to 127 // (2**bits - 1) ranks: 8 with 4 bits, 1 with 7
        options.setdefault("packing", "int8" if options.get("bits", 4) <= 4 else "int16")
    return Method("dorefa", _owing(DoReFa(**options), feedback), exchange)


def strom(exchange="allgather", feedback=True, **options):
    """Strom 2015: +-tau for what passed the threshold, 32 bits each, with error feedback"""
    return Method("strom", _owing(Strom(**options), feedback), exchange)


def dryden(exchange="allgather", feedback=True, **options):
    """Dryden et al. 2016: signs and a mean for one in p elements of each column, error feedback"""
    return Method("dryden", _owing(Dryden(**options), feedback), exchange)


def dropping(exchange="allgather", feedback=True, **options):
    """Gradient dropping (Aji & Heafield 2017): the largest 1 % in full, with error feedback"""
    return Method("dropping", _owing(Dropping(**options), feedback), exchange)


def adacomp(exchange="allgather", feedback=True, **options):
    """AdaComp (Chen et al. 2018): what grew to the maximum of its bin, with error feedback"""
    return Method("adacomp", _owing(AdaComp(**options), feedback), exchange)


def rule(exchange="allgather", **options):
    """another method for each parameter: rule(*.bias:dense; ndim>2:terngrad; onebit)"""
    if "feedback" in options:
        raise SpecError("rule: feedback belongs to the cases, as in "
                        "rule(*.bias:fp16:feedback=no; onebit:feedback=yes)")
    return Method("rule", Rule(**options), exchange)


def _read_case(text):
    """The compressor of one case of a rule: a method's, with that method's own error feedback."""
    name, _, options = split_spec(text)
    if name == "residual":
        return from_spec(text)
    if name == "auto":
        raise SpecError(f"rule: {text!r} found as a case, auto chooses a method for the whole "
                        "model: name one, or make the model's method auto")
    for key in ("exchange", *_OF_METHOD):
        if key in options:
            raise SpecError(f"rule: {key}={options[key]} found in the case {text!r}, it belongs "
                            f"behind the bracket: rule(...):{key}={options[key]}")
    return method(text).compressor


def _show_case(compressor):
    core = compressor.inner if isinstance(compressor, Residual) else compressor
    return spec_text(core.name, _options(compressor))


def auto():
    """whichever of dense, bf16, terngrad and onebit is predicted to be the fastest here"""
    return Method("auto", Dense(), "allreduce")


METHODS = {f.__name__: f for f in (dense, fp16, bf16, terngrad, onebit, dorefa, strom, dryden,
                                   dropping, adacomp, rule, auto)}


@dataclass
class _Common:
    """What every method may be told besides its compressor's own options."""

    exchange: str = option("the method's own", "who gets which packet: " + ", ".join(EXCHANGES))
    feedback: bool = option("the method's own", "error feedback: what was not said is said later")
    own: str = option("quantised", "sharded: how a rank's gradient reaches its own shard",
                      choices=("quantised", "raw"))
    warmup: int = option(0, "steps at the start that are exchanged dense", least=0)
    adagrad: bool = option(False, "sharded: AdaGrad on the sum, between the two quantisations")
    delay: int = option(0, "1: a gradient is exchanged while the next step computes, and applied "
                           "one step late", least=0, most=1)
    staleness: int = option(4, "peers: how many steps a rank may be ahead of what it has heard of "
                               "another; 0 is lock step", least=0)
    thread: bool = option(True, "server: a thread serves this rank's shard while it computes")


def common_options():
    """The dataclass fields of what every method may be told."""
    return fields(_Common)


_OF_METHOD = ("own", "adagrad", "warmup", "staleness", "delay", "thread")


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
    if name not in known or inner is not None and name != "rule":
        raise SpecError(f"no method is called {spec if inner else name!r}; there are: "
                        + ", ".join(known))
    if name == "auto":
        if options:
            found = ", ".join(f"{key}={value}" for key, value in options.items())
            raise SpecError(f"auto: {found} found, auto has no options: it chooses method and "
                            "exchange itself. Type auto, or name a method")
        return auto()
    cls = find(name)
    if inner is not None:
        options["inner"] = Cases.read(inner, _read_case)
    options = parse_options(name, (*fields(cls), *fields(_Common)), options)
    own = {key: options.pop(key) for key in _OF_METHOD if key in options}
    if name in METHODS:
        return replace(METHODS[name](**options), **own)
    feedback = options.pop("feedback", cls.feedback)
    carried_by = options.pop("exchange", "allgather")
    return Method(name, _owing(cls(**options), feedback), carried_by, **own)
