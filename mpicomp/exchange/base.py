"""The contract of exchanges: what one declares, and how a bucket of gradients travels.

docs/adding-an-exchange.md explains it with an example that runs.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar

from mpicomp import kernels
from mpicomp.compressors.base import Array, Compressor
from mpicomp.compressors.options import check_options
from mpicomp.errors import MismatchError, PacketError, SpecError
from mpicomp.layout import Layout
from mpicomp.philox import Key
from mpicomp.transport import packet, staging
from mpicomp.transport.calls import Calls
from mpicomp.transport.packet import Header

Requests = Iterator[list[Any]]  # lists of MPI requests, each of which is waited for


class Codec:
    """One compressor at work on one flat array: its state, and the packet it encodes into.

    grad    float32[layout.size], what is encoded
    index   the bucket that it belongs to
    plan    digest of everything that ranks must agree on; every header carries it
    seed    of its random numbers, together with bucket, step and rank
    outbox  uint8, the packet: a header, then the payload; memory for the largest one
    shared  what ranks agree on before they encode (a part of the state), or None
    """

    def __init__(self, compressor: Compressor, layout: Layout, index: int, grad: Array, plan: int,
                 seed: int, outbox: Any = None) -> None:
        self.compressor, self.layout, self.index = compressor, layout, index
        self.grad, self.plan, self.seed = grad, plan, seed
        self.state = compressor.init(layout, grad)
        if outbox is None:
            outbox = staging.buffers_for(grad)(packet_size(compressor, layout), "uint8")
        self.outbox = outbox
        self.shared = compressor.measure(grad, layout, self.state)
        self.asked, self.agreed = to_agree(grad, self.shared)

    @property
    def payload(self) -> Any:
        """The outbox after its header."""
        return self.outbox[packet.SIZE:]

    def key(self, step: int, rank: int) -> Key:
        """That of the random numbers in the packet of this rank and step."""
        return Key(self.seed, rank, step, self.index)

    def measure(self, flags: int) -> None:
        """Have the compressor fill `shared`, with zeros if the gradient is not finite."""
        if flags & packet.NONFINITE:
            self.shared[...] = 0
        else:
            self.compressor.measure(self.grad, self.layout, self.state)

    def encode(self, step: int, rank: int, flags: int) -> int:
        """Fill the outbox, header included; returns the bytes of the payload.

        A gradient that is not finite is not encoded: the flag in the header tells all ranks.
        """
        if flags & packet.NONFINITE:
            used, fresh = self.payload.size if self.compressor.fixed else 0, 0
            self.payload[:used] = 0
        else:
            with staging.encoding(self.grad):
                used = fresh = self.compressor.encode(self.grad, staging.device(self.payload),
                                                      self.layout, self.key(step, rank), self.state)
        self.stamp(Header(step, self.index, self.plan, used, flags))
        staging.leave(self.outbox, packet.SIZE, fresh)
        return used

    def stamp(self, header: Header) -> None:
        """Write the header in front of the payload."""
        header.write(staging.host(self.outbox))

    def decoded(self, step: int, rank: int) -> Array:
        """float32[layout.size]: what the packet in the outbox says, encoded in `step` on `rank`."""
        values = kernels.of(self.grad).zeros(self.layout.size)
        used = Header.read(staging.host(self.outbox)).length
        self.compressor.decode_add(staging.device(self.payload)[:used], values, self.layout,
                                   self.key(step, rank))
        return values

    def replan(self, plan: int) -> None:
        """Headers carry this plan digest from now on."""
        self.plan = plan

    def learn(self, total: Array, step: int, rank: int) -> None:
        """The sum of the payloads of all ranks, which MPI has made."""
        self.compressor.learn(total, self.layout, self.key(step, rank), self.state)

    def commit(self) -> None:
        """The step was applied on all ranks: what was sent is no longer owed."""
        self.compressor.commit(self.state)

    def persistent(self) -> dict[str, Array]:
        """{kind: flat array} of all state that outlives a step, as views or copies."""
        return self.compressor.persistent(self.state)

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Take over what `persistent` gave."""
        for kind, array in self.persistent().items():
            array[...] = staging.fitting(arrays[kind], array)


def packet_size(compressor, layout) -> int:
    """Bytes of the largest packet, header included."""
    return packet.SIZE + compressor.capacity(layout)


def to_agree(grad, shared):
    """MPI's buffers of what ranks agree on: this rank's `shared`, and the maximum or sum."""
    if shared is None:
        return None, None
    zeros = staging.buffers_for(grad, reduced=True)
    return staging.mirror(shared), zeros(shared.size, shared.dtype)


class BucketExchange:
    """One bucket under exchange: its memory, and what the Reducer may ask of it.

    layout   of the bucket
    index    its number, the same on all ranks
    grad     float32[layout.size]: this rank's gradient goes in, `Exchange.decode` leaves the sum
    headers  list of Header, one of each rank that took part, once `Exchange.run` is through
    codecs   list of Codec: those whose residuals this rank has for the bucket

    A subclass takes its memory in `__init__`, for MPI by `staging.buffers_for(grad)`: later steps
    allocate nothing, but where lengths depend on the data (lengths.py). `persistent` is by default
    the state of the first codec.
    """

    def __init__(self, layout: Layout, index: int, grad: Array,
                 codecs: Iterable[Codec] = ()) -> None:
        self.layout, self.index, self.grad = layout, index, grad
        self.codecs = list(codecs)
        self.headers: list[Header] = []

    def flagged(self, flag: int) -> list[int]:
        """The ranks whose header carries the flag."""
        return [rank for rank, header in enumerate(self.headers) if header.flags & flag]

    @property
    def given(self) -> bool:
        """Had any rank a gradient? Where none had, there is nothing to decode."""
        return any(not header.flags & packet.EMPTY for header in self.headers)

    def replan(self, plan: int) -> None:
        """Headers carry this plan digest from now on."""
        for codec in self.codecs:
            codec.replan(plan)

    def commit(self) -> None:
        """The step was applied on all ranks: what was sent is no longer owed."""
        for codec in self.codecs:
            codec.commit()

    def persistent(self) -> dict[str, Array]:
        """{kind: float32[layout.size]} of all state that outlives a step.

        "error" is what this rank still owes of its gradients, "error2" what it owes as an owner.
        """
        return self.codecs[0].persistent() if self.codecs else {}

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Take over what `persistent` gave."""
        if self.codecs:
            self.codecs[0].restore(arrays)

    def own(self, step: int, rank: int) -> Array:
        """float32[layout.size]: what this rank's packet of that step says. SpecError if there is
        no such packet, or several."""
        raise SpecError("what a rank has sent is known with exchange=allgather only: elsewhere it "
                        "is not one packet of the whole bucket")


class WholeBucket(BucketExchange):
    """A bucket that one codec encodes as a whole, as most exchanges do."""

    def __init__(self, exchange: "Exchange", compressor: Compressor, layout: Layout, index: int,
                 grad: Array, plan: int, seed: int, outbox: Any = None) -> None:
        self.codec = Codec(compressor, layout, index, grad, plan, seed, outbox)
        super().__init__(layout, index, grad, [self.codec])

    def own(self, step: int, rank: int) -> Array:
        return self.codec.decoded(step, rank)


@dataclass(frozen=True)
class Cost:
    """What one step of an exchange costs a rank, for `mpicomp plan` and method="auto".

    packets  received, of the whole gradient each
    calls    that follow each other, each with the latency of the network
    encodes, decodes  of the whole gradient
    copies_before, copies_after  of the whole gradient, before encoding and after decoding
    """

    packets: float
    calls: float = 1
    encodes: float = 1
    decodes: float = 1
    copies_before: float = 0
    copies_after: float = 0


class Wired(ABC):
    """Tells type checkers that the InitVar of Exchange is an attribute, too."""

    wire: Calls


@dataclass(eq=False, repr=False)
class Exchange(Wired):
    """Carries buckets of gradients: each becomes `weight` times the sum over the ranks.

    One object serves all buckets of a Reducer over one `wire`. Options are dataclass fields, made
    with `mpicomp.compressor.option` as those of compressors are. What it is able to do stands in
    the attributes and class methods that follow; nobody asks for its name.
    """

    wire: InitVar[Calls]

    name: ClassVar[str]  # in specifications: exchange=NAME
    stages: ClassVar[int] = 3  # the most MPI calls that a bucket makes one after the other
    bucket: ClassVar[type[BucketExchange]] = WholeBucket  # the class of its buckets
    asynchronous: ClassVar[bool] = False  # ranks do not meet in a step: see asynchronous.py
    # each rank updates a part of the parameters; one bucket holds all: see server.py
    owns: ClassVar[bool] = False
    # MPI adds up payloads: the compressor must say what they are (`summable`)
    adds: ClassVar[bool] = False
    # takes arrays on a GPU; otherwise gradients are copied to host memory
    on_device: ClassVar[bool] = False
    # {"delay", "warmup" or "sparse": why it cannot be combined with that}
    lacks: ClassVar[Mapping[str, str]] = {}
    settled = True  # nothing is under way between two steps

    def __post_init__(self, wire: Calls) -> None:
        check_options(self)
        self.wire = wire
        wire.open(self.stages)

    # ---- what it is able to do ----

    @classmethod
    def refusal(cls, compressor: Compressor) -> str | None:
        """Why no rank can carry packets of this compressor so, and what to type, or None."""

    @classmethod
    def cost(cls, ranks: int) -> Cost:
        """Of a step on so many ranks; by default that of everybody's packet to everybody."""
        return Cost(ranks - 1, decodes=ranks)

    @classmethod
    def keeps_history(cls, **options: Any) -> bool:
        """With these options: do owners keep state of past steps that no other rank has?"""
        return False

    @classmethod
    def unattended(cls, **options: Any) -> bool:
        """With these options: do others wait while this rank makes no call of its Reducer?"""
        return False

    def check(self, compressor: Compressor) -> str | None:
        """Why this compressor cannot take this exchange over so many ranks, or None."""
        return self.refusal(compressor)

    @property
    def holders(self) -> int:
        """How many ranks have residuals."""
        return self.wire.size

    @property
    def communicators(self) -> list[Any]:
        """All that this exchange calls MPI on, to revoke them where a rank has died."""
        return self.wire.communicators

    # ---- a bucket ----

    def open(self, compressor: Compressor, layout: Layout, index: int, grad: Array, plan: int,
             seed: int) -> BucketExchange:
        """One bucket, with all the memory that it will need."""
        return self.bucket(self, compressor, layout, index, grad, plan, seed)

    @abstractmethod
    def run(self, bucket: Any, step: int, flags: int) -> Requests:
        """A generator that carries the bucket and leaves `bucket.headers`.

        It yields a list of MPI requests wherever it must wait for them, the same number of lists on
        all ranks, and goes on when all are done. flags: of this rank's header, see packet.py.
        """

    @abstractmethod
    def decode(self, bucket: Any, step: int, weight: float) -> None:
        """Turn bucket.grad into weight * the sum over ranks of what their packets say.

        Called after `run`, unless a rank's gradient is not finite. Same bits on all ranks.
        """

    # ---- a run of steps; for asynchronous exchanges ----

    def restart(self, step: int) -> None:
        """Steps are counted from here."""

    def poll(self) -> None:
        """Take in what has arrived; called from gradient hooks."""

    def rest(self) -> None:
        """Take nothing in from now on, until the next step."""

    # ---- what subclasses use ----

    def agree(self, codec: Codec, flags: int) -> Requests:
        """Replace what the compressor measured by the maximum, or sum, over ranks. Stage 0.

        Nothing happens where it measures nothing.
        """
        from mpi4py import MPI

        if codec.shared is not None:
            with self.wire.meter.stage("encode"):
                codec.measure(flags)
                staging.leave(codec.asked)
            op = {"max": MPI.MAX, "sum": MPI.SUM}[codec.compressor.agreed_by]
            yield [self.wire.allreduce(0, codec.asked, codec.agreed, op)]
            codec.shared[...] = staging.arrive(codec.agreed, now=True)

    def encode(self, codec: Codec, step: int, flags: int) -> int:
        """`codec.encode` with its seconds and the bytes of its payload booked."""
        with self.wire.meter.stage("encode"):
            used = codec.encode(step, self.wire.rank, flags)
        self.book(codec, used)
        return used

    def book(self, codec: Codec, used: int) -> None:
        """Book the bytes of a payload that is about to be sent by the cases of its rule."""
        if used:
            payload = staging.device(codec.payload)[:used]
            parts = codec.compressor.by_case(payload, codec.layout)
            for case, size in parts.items():
                self.wire.meter.move(case, size)

    def read_headers(self, buffer: Any, starts: Iterable[int]) -> list[Header]:
        """The headers at these offsets, one of each rank.

        Raises the same MismatchError on all ranks if they differ in step, bucket or plan.
        """
        headers = [Header.read(staging.read(buffer[at:at + packet.SIZE])) for at in starts]
        first = headers[0]
        for rank, header in enumerate(headers):
            for what, there, here in (("step", header.step, first.step),
                                      ("bucket", header.bucket, first.bucket),
                                      ("plan digest", header.plan, first.plan)):
                if here != there:
                    raise MismatchError(
                        f"rank {rank} is at {what} {there}, rank 0 at {here} (step {first.step}, "
                        f"bucket {first.bucket} there): every rank must make the same steps with "
                        "the same model and method, freeze the same parameters, and give up the "
                        "same steps")
        return headers

    def lengths(self, headers: Sequence[Header], most: Iterable[int]) -> list[int]:
        """The bytes of payload that each rank announces; PacketError beyond `most` (one a rank)."""
        for rank, (header, limit) in enumerate(zip(headers, most)):
            if header.length > limit:
                raise PacketError(f"rank {rank} announces {header.length} bytes for bucket "
                                  f"{header.bucket}, which takes at most {limit}")
        return [header.length for header in headers]
