"""The methods by the names of their papers: a compressor, with or without error feedback, and the
exchange that carries its packets."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from mpicomp.compressors import (
    QSGD,
    AdaComp,
    BFloat16,
    Block,
    Chunks,
    Dense,
    DoReFa,
    Dropping,
    Dryden,
    Float16,
    OneBit,
    PowerSGD,
    RandomK,
    Residual,
    Rule,
    Sign,
    Strom,
    TernGrad,
    TopK,
)
from mpicomp.compressors.base import Compressor
from mpicomp.compressors.options import option, parse_options
from mpicomp.compressors.registry import find, from_spec, registry
from mpicomp.compressors.rule import Cases
from mpicomp.compressors.spec import show, spec_text, split_spec
from mpicomp.errors import SpecError
from mpicomp.exchange import exchange, exchanges
from mpicomp.exchange.base import Exchange
from mpicomp.transport.calls import Calls


@dataclass(frozen=True, repr=False)
class Method:
    """A compressor and the exchange that carries its packets; `repr` is its specification.

    exchange  its name, such as "allgather"
    options   the exchange's own: a dict, kept as pairs (name, value) of all that it has
    warmup    steps at the start that are exchanged dense
    delay     1: a gradient is exchanged while the next step computes

    Raises SpecError for what cannot be combined, and says what to type.
    """

    name: str
    compressor: Compressor
    exchange: str
    options: tuple = ()
    warmup: int = 0
    delay: int = 0

    def __post_init__(self):
        _check_exchange(self.name, self.exchange)
        object.__setattr__(self, "options", _exchange_options(self, dict(self.options)))
        if self.compressor.agreed_by == "sum" and not self.carrier.adds:
            raise SpecError(f"{self.name}: exchange={self.exchange} found, the next step needs "
                            "the sum over ranks, which MPI makes: type exchange=allreduce")
        if refusal := self.carrier.refusal(self.compressor):
            raise SpecError(f"{self.name}: {refusal}")
        for option_name, value in (("delay", self.delay), ("warmup", self.warmup)):
            if value and option_name in self.carrier.lacks:
                raise SpecError(f"{self.name}: {option_name}={value} found, exchange="
                                f"{self.exchange} has no {option_name}: "
                                f"{self.carrier.lacks[option_name]}")

    def open(self, wire: Calls) -> Exchange:
        """The exchange object that carries this method's packets over `wire`."""
        return self.carrier(wire, **dict(self.options))

    @property
    def carrier(self) -> Exchange:
        """The class of the exchange, which says what it is able to do: see exchange/base.py."""
        return exchange(self.exchange)

    @property
    def asynchronous(self) -> bool:
        """Do ranks not meet in a step, so that replicas are equal only after `deliver`?"""
        return self.carrier.asynchronous

    @property
    def owns(self) -> bool:
        """Does each rank update a part of the parameters, with an optimizer of its own?"""
        return self.carrier.owns

    @property
    def unattended(self) -> bool:
        """Do others wait for this rank while it makes no call of its Reducer?"""
        return self.carrier.unattended(**dict(self.options))

    @property
    def adagrad(self) -> bool:
        """Do owners keep sums of squares that no other rank has?"""
        return self.carrier.keeps_history(**dict(self.options))

    def of(self, names: Sequence[str]) -> "Method":
        """This method for a model whose parameters have these names, in order of registration."""
        if not isinstance(self.compressor, Rule):
            return self
        return replace(self, compressor=Rule(self.compressor.inner.of(names)))

    @property
    def coarse(self) -> bool:
        """Is any gradient sent as one of two values, or rarely, and then what was added up since?
        """
        rule = isinstance(self.compressor, Rule)
        cores = [c.core for _, c in self.compressor.inner] if rule else [self.compressor.core]
        return any(core.coarse for core in cores)

    @property
    def feedback(self) -> bool:
        """Does error feedback keep a residual?"""
        return isinstance(self.compressor, Residual)

    def __repr__(self):
        if self.name == "auto":
            return "auto"
        if isinstance(self.compressor, Rule):
            head, options = f"{self.name}({self.compressor.inner.text(_show_case)})", {}
        else:
            head, options = self.name, _options(self.compressor)
        options |= {"exchange": self.exchange, **dict(self.options)}
        if self.warmup:
            options["warmup"] = self.warmup
        if self.delay:
            options["delay"] = self.delay
        return spec_text(head, options)


def _check_exchange(name, found):
    """SpecError if no exchange has this name."""
    if found not in exchanges():
        raise SpecError(f"{name}: exchange={found} found, there are: " + ", ".join(exchanges()))


def _exchange_options(method, given) -> tuple:
    """((name, value), ...) of all options of the method's exchange, in their order.

    SpecError for one that it does not have, also at the default value of the exchange that has it.
    """
    known = fields(method.carrier)
    names = [f.name for f in known]
    for key, value in given.items():
        homes = [name for name, cls in exchanges().items() if key in [f.name for f in fields(cls)]]
        if key not in names and homes:
            raise SpecError(f"{method.name}: {key} belongs to exchange={' or '.join(homes)}, found "
                            f"exchange={method.exchange}: leave {key} out, or type "
                            f"exchange={homes[0]},{key}={show(value)}")
    taken = {f.name for f in (*fields(method.compressor.core), *fields(_Common))}
    if twice := [name for name in names if name in taken]:
        raise SpecError(f"{method.name}: {twice[0]} is an option of the method and of "
                        f"exchange={method.exchange}: one of them needs another name")
    values = {f.name: f.default for f in known} | parse_options(method.name, known, given)
    return tuple((name, values[name]) for name in names)


def _options(compressor) -> dict:
    """{name: value} of the compressor, as they stand in the specification of a method."""
    feedback = isinstance(compressor, Residual)
    core = compressor.inner if feedback else compressor
    found = {f.name: getattr(core, f.name) for f in fields(core)} | {"feedback": feedback}
    if feedback and compressor.decay != 1:
        found["decay"] = compressor.decay
    return found


def _owing(compressor, feedback):
    return Residual(compressor) if feedback else compressor


def _forgetting(name, compressor, decay):
    """The compressor, its residual with this decay; SpecError where it has none."""
    if decay == 1:
        return compressor
    if isinstance(compressor, Rule):
        raise SpecError(f"rule: decay={decay} found, decay belongs to the cases, as in "
                        f"rule(*.bias:dense; onebit:decay={decay})")
    if not isinstance(compressor, Residual):
        raise SpecError(f"{name}: decay={decay} found, without error feedback there is nothing to "
                        "forget: type feedback=yes, or leave decay out")
    return replace(compressor, decay=decay)


def _adds(name) -> bool:
    """Does MPI add up payloads in the exchange of this name?"""
    return exchange(name).adds


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
    if _adds(exchange):
        options.setdefault("packing", "int8")
    return Method("terngrad", _owing(TernGrad(**options), feedback), exchange)


def onebit(exchange="allgather", feedback=True, **options):
    """1-bit SGD (Seide et al. 2014): signs and two means a column, with error feedback"""
    return Method("onebit", _owing(OneBit(**options), feedback), exchange)


def dorefa(exchange="allgather", feedback=False, **options):
    """DoReFa (Zhou et al. 2016): random k-bit codes between -m and m, one shared m a tensor"""
    if _adds(exchange):
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


def chunks(exchange="allgather", feedback=True, **options):
    """the largest 64 of every 4096 neighbours, in 2 bits each, as SparseLoCo; error feedback"""
    return Method("chunks", _owing(Chunks(**options), feedback), exchange)


def topk(exchange="allgather", feedback=True, **options):
    """the largest 1 % of every tensor in full, exactly so many, with error feedback"""
    return Method("topk", _owing(TopK(**options), feedback), exchange)


def randomk(exchange="allreduce", feedback=None, **options):
    """1 % of the elements, drawn alike on all ranks: no indices, and MPI adds the values"""
    compressor = RandomK(**options)
    if feedback and compressor.scale:
        raise SpecError("randomk: scale=yes with feedback=yes found: the residual would grow by "
                        "n/K - 1 in each step; type scale=no, or feedback=no")
    return Method("randomk", _owing(compressor, not compressor.scale if feedback is None
                                    else feedback), exchange)


def powersgd(exchange="allreduce", feedback=True, **options):
    """PowerSGD (Vogels et al. 2019): matrices of rank 4, added by MPI, with error feedback"""
    return Method("powersgd", _owing(PowerSGD(**options), feedback), exchange)


def block(exchange="allgather", feedback=None, **options):
    """int8, int4 or fp8 codes, a scale for each block; error feedback where they are not random"""
    compressor = Block(**options)
    feedback = not compressor.unbiased if feedback is None else feedback
    return Method("block", _owing(compressor, feedback), exchange)


def sign(exchange="allgather", feedback=True, **options):
    """EF-signSGD (Karimireddy et al. 2019): signs and one mean magnitude a tensor, row or block"""
    return Method("sign", _owing(Sign(**options), feedback), exchange)


def qsgd(exchange="allgather", feedback=False, **options):
    """QSGD (Alistarh et al. 2017): random levels and a sign, one norm for each bucket of 512"""
    return Method("qsgd", _owing(QSGD(**options), feedback), exchange)


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
    for key in ("exchange", *_of_method(name)):
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
                                   dropping, adacomp, chunks, topk, randomk, powersgd, block,
                                   sign, qsgd, rule, auto)}


@dataclass
class _Common:
    """What every method may be told besides the options of its compressor and its exchange."""

    exchange: str = option("the method's own", "who gets which packet, such as allgather")
    feedback: bool = option("the method's own", "error feedback: what a packet leaves out is sent "
                                                "later")
    decay: float = option(1.0, "error feedback multiplies what it owes by this in each step, and "
                               "forgets the rest; 1 forgets nothing", least=0, most=1)
    warmup: int = option(0, "steps at the start that are exchanged dense", least=0)
    delay: int = option(0, "1: a gradient is exchanged while the next step computes, and applied "
                           "one step late", least=0, most=1)


def common_options():
    """The dataclass fields of what every method may be told, whatever its exchange."""
    return fields(_Common)


def exchange_options() -> list:
    """The dataclass fields of all options that exchanges have."""
    return [f for cls in exchanges().values() for f in fields(cls)]


def _of_method(name) -> list[str]:
    """The options of a method's name that are not its compressor's: of exchanges, warmup, delay."""
    own = {f.name for f in fields(find(name))} if name in registry() else ()
    return [f.name for f in (*exchange_options(), *common_options())
            if f.name not in own and f.name not in ("exchange", "feedback", "decay")]


def methods() -> dict[str, str]:
    """{name: what it is in one line} of all methods; registered compressors are methods, too."""
    own = {name: function.__doc__ for name, function in METHODS.items()}
    for name, cls in registry().items():
        if name != "residual" and name not in own:
            own[name] = (cls.__doc__ or "").strip().split("\n")[0]
    return own


def method(spec: Method | str) -> Method:
    """The method that a specification names: `name` or `name:option=value,option=value`.

    Options are those of the compressor, those of the exchange, and of every method exchange=NAME,
    feedback=yes|no, decay=FACTOR, warmup=STEPS and delay=0|1. Raises SpecError that lists what
    exists for an unknown name, option or value, and for an option that the chosen exchange does not
    have.
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
    if "exchange" in options:
        _check_exchange(name, options["exchange"])
    known = (*fields(cls), *fields(_Common))
    named = {f.name for f in known}
    carried = {f.name: options.pop(f.name) for f in exchange_options()
               if f.name in options and f.name not in named}
    options = parse_options(name, (*known, *exchange_options()), options)
    own = {key: options.pop(key) for key in ("warmup", "delay") if key in options}
    decay = options.pop("decay", 1.0)
    if name in METHODS:
        made = METHODS[name](**options)
        own["options"] = carried or made.options
    else:
        feedback = options.pop("feedback", cls.feedback)
        carried_by = options.pop("exchange", "allgather")
        made = Method(name, _owing(cls(**options), feedback), carried_by, carried)
    return replace(made, compressor=_forgetting(name, made.compressor, decay), **own)
