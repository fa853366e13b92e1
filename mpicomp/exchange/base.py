"""What every exchange has in common: a compressor at work, its header, the check of headers."""

from abc import ABC, abstractmethod

import numpy as np

from mpicomp import kernels
from mpicomp.errors import MismatchError, PacketError
from mpicomp.philox import Key
from mpicomp.transport import packet, staging
from mpicomp.transport.packet import Header


class Mail:
    """One compressor at work on one flat gradient: its state, its packets, headers of all ranks.

    grad     float32[layout.size], the gradient going in and the mean coming out
    index    the bucket
    plan     digest of everything that ranks must agree on
    seed     of its random numbers, with the bucket, step and rank
    shared   the array of what ranks agree on before they encode (it lives in `state`), or None
    headers  of all ranks, once they are here
    """

    def __init__(self, compressor, layout, index, grad, plan, seed, wire):
        self.compressor, self.layout, self.index = compressor, layout, index
        self.grad, self.plan, self.seed = grad, plan, seed
        self.state = compressor.init(layout, grad)
        zeros = staging.buffers_for(grad)
        self.outbox = zeros(packet.SIZE + compressor.capacity(layout), np.uint8)
        self.shared = compressor.measure(grad, layout, self.state)
        self.asked, self.agreed = to_agree(grad, self.shared)
        self.inbox = None
        self.header_box = zeros(packet.SIZE * wire.size, np.uint8)
        self.headers = []

    @property
    def payload(self):
        """The outbox after its header."""
        return self.outbox[packet.SIZE:]

    def key(self, step, rank):
        return Key(self.seed, rank, step, self.index)

    def measure(self, flags):
        """Have the compressor fill `shared`, with zeros if the gradient is not finite."""
        if flags & packet.NONFINITE:
            self.shared[...] = 0
        else:
            self.compressor.measure(self.grad, self.layout, self.state)

    def encode(self, step, rank, flags) -> int:
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

    def stamp(self, header):
        """Write the header in front of the payload."""
        header.write(staging.host(self.outbox))

    def own(self, step, rank):
        """float32[layout.size]: what the packet in the outbox, of that step and rank, says."""
        said = kernels.of(self.grad).zeros(self.layout.size)
        used = Header.read(staging.host(self.outbox)).length
        self.compressor.decode_add(staging.device(self.payload)[:used], said, self.layout,
                                   self.key(step, rank))
        return said

    def flagged(self, flag) -> list[int]:
        """The ranks whose header carries the flag."""
        return [rank for rank, header in enumerate(self.headers) if header.flags & flag]

    def replan(self, plan):
        """From now on headers carry this plan digest."""
        self.plan = plan

    def commit(self):
        """The step was applied on all ranks."""
        self.compressor.commit(self.state)

    def persistent(self) -> dict:
        """{kind: flat array} of everything that outlives a step, as views or copies."""
        return self.compressor.persistent(self.state)

    def restore(self, arrays):
        """Take over what `persistent` gave."""
        for kind, array in self.persistent().items():
            array[...] = staging.fitting(arrays[kind], array)


def to_agree(grad, shared):
    """MPI's buffers of what ranks agree on: this rank's `shared`, and the maximum over ranks."""
    if shared is None:
        return None, None
    zeros = staging.buffers_for(grad, reduced=True)
    return staging.mirror(shared), zeros(shared.size, shared.dtype)


class Exchange(ABC):
    """Carries one bucket's gradient to the mean over ranks. Replicas stay bit-identical."""

    stages = 3  # the most calls that a bucket makes one after the other
    asynchronous = False  # see asynchronous.py
    settled = True  # nothing is under way between two steps
    owns = False  # parameters are moved by their owners: see server.py

    def __init__(self, wire):
        self.wire = wire
        wire.open(self.stages)

    def check(self, compressor) -> str | None:
        """Why this compressor cannot take this exchange over so many ranks, or None."""

    def open(self, compressor, layout, index, grad, plan, seed):
        """A Mail, or something like it, for one bucket, with all the memory it will need."""
        mail = Mail(compressor, layout, index, grad, plan, seed, self.wire)
        self.prepare(mail)
        return mail

    def prepare(self, mail) -> None:
        """Take the memory that the bucket needs in this exchange."""

    @property
    def holders(self) -> int:
        """How many ranks have residuals."""
        return self.wire.size

    @property
    def communicators(self) -> list:
        """All that this exchange calls MPI on, to revoke them where a rank has died."""
        return self.wire.communicators

    def restart(self, step) -> None:
        """Steps are counted from here."""

    def poll(self) -> None:
        """Take in what has arrived; called from gradient hooks."""

    def rest(self) -> None:
        """Take nothing in from now on, until the next step."""

    @abstractmethod
    def run(self, mail, step, flags):
        """A generator that carries the bucket and yields lists of MPI requests to wait for."""

    @abstractmethod
    def decode(self, mail, step, weight) -> None:
        """Turn mail.grad into weight * the sum over ranks of what was said."""

    def agree(self, mail, flags):
        """Replace what the compressor measured, if it does, by the maximum over ranks."""
        from mpi4py import MPI

        if mail.shared is not None:
            with self.wire.meter.stage("encode"):
                mail.measure(flags)
                staging.leave(mail.asked)
            yield [self.wire.allreduce(0, mail.asked, mail.agreed, MPI.MAX)]
            mail.shared[...] = staging.arrive(mail.agreed, now=True)

    def encode(self, mail, step, flags) -> int:
        """`mail.encode` with the seconds booked."""
        with self.wire.meter.stage("encode"):
            used = mail.encode(step, self.wire.rank, flags)
        self.book(mail, used)
        return used

    def book(self, mail, used):
        """Book the bytes of a payload that is about to be sent by the cases of its rule."""
        if used:
            payload = staging.device(mail.payload)[:used]
            parts = mail.compressor.by_case(payload, mail.layout)
            for case, size in parts.items():
                self.wire.meter.move(case, size)

    def read_headers(self, buffer, starts) -> list[Header]:
        """The headers at these offsets, one of each rank.

        Raises the same MismatchError on all ranks if they differ in step, bucket or plan.
        """
        headers = [Header.read(staging.read(buffer[at:at + packet.SIZE])) for at in starts]
        first = headers[0]
        for rank, header in enumerate(headers):
            for field, what in (("step", "step"), ("bucket", "bucket"), ("plan", "plan digest")):
                here, there = getattr(first, field), getattr(header, field)
                if here != there:
                    raise MismatchError(
                        f"rank {rank} is at {what} {there}, rank 0 at {here} (step {first.step}, "
                        f"bucket {first.bucket} there): every rank must make the same steps with "
                        "the same model and method, freeze the same parameters, and give up the "
                        "same steps")
        return headers

    def lengths(self, headers, most) -> list[int]:
        """The bytes of payload that each rank announces; PacketError beyond `most` (one a rank)."""
        for rank, (header, limit) in enumerate(zip(headers, most)):
            if header.length > limit:
                raise PacketError(f"rank {rank} announces {header.length} bytes for bucket "
                                  f"{header.bucket}, which takes at most {limit}")
        return [header.length for header in headers]
