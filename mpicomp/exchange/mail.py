"""What every exchange has in common: a bucket's buffers, its header, and the check of all headers."""

from abc import ABC, abstractmethod

import numpy as np

from mpicomp import kernels, packet
from mpicomp.errors import MismatchError
from mpicomp.packet import Header
from mpicomp.philox import Key


class Mail:
    """One bucket's way through an exchange: compressor state, outbox, inbox, headers of all ranks.

    grad     float32[layout.size], the gradient going in and the mean coming out
    plan     digest of everything that ranks must agree on
    shared   the array of what ranks agree on before they encode (it lives in `state`), or None
    headers  of all ranks, once they are here
    """

    def __init__(self, compressor, layout, index, grad, plan, seed, wire):
        self.compressor, self.layout, self.index = compressor, layout, index
        self.grad, self.plan, self.seed = grad, plan, seed
        self.state = compressor.init(layout, grad)
        zeros = kernels.of(grad).zeros
        self.outbox = zeros(packet.SIZE + compressor.capacity(layout), np.uint8)
        self.shared = compressor.measure(grad, layout, self.state)
        self.agreed = None if self.shared is None else zeros(self.shared.size, self.shared.dtype)
        self.inbox = None
        self.header_box = zeros(packet.SIZE * wire.size, np.uint8)
        self.headers = []

    @property
    def payload(self):
        """The outbox after its header."""
        return self.outbox[packet.SIZE:]

    def key(self, step, rank):
        return Key(self.seed, rank, step, self.index)

    def flagged(self, flag) -> list[int]:
        """The ranks whose header carries the flag."""
        return [rank for rank, header in enumerate(self.headers) if header.flags & flag]


class Exchange(ABC):
    """Carries one bucket's gradient to the mean over ranks. Replicas stay bit-identical."""

    stages = 3  # the most calls that a bucket makes one after the other

    def __init__(self, wire):
        self.wire = wire
        wire.open(self.stages)

    def check(self, compressor) -> str | None:
        """Why this compressor cannot take this exchange over so many ranks, or None."""

    def prepare(self, mail) -> None:
        """Take the memory that the bucket needs here."""

    @abstractmethod
    def run(self, mail, step, flags):
        """A generator that carries the bucket and yields lists of MPI requests to wait for."""

    @abstractmethod
    def decode(self, mail, step, weight) -> None:
        """Turn mail.grad into weight * the sum over ranks of what was said."""

    def agree(self, mail, flags):
        """Replace the compressor's measure, if it has one, by its maximum over ranks."""
        from mpi4py import MPI

        if mail.shared is None:
            return
        with self.wire.meter.stage("encode"):
            if flags & packet.NONFINITE:
                mail.shared[...] = 0
            else:
                mail.compressor.measure(mail.grad, mail.layout, mail.state)
        yield [self.wire.allreduce(0, mail.shared, mail.agreed, MPI.MAX)]
        mail.shared[...] = mail.agreed

    def encode(self, mail, step, flags) -> int:
        """Fill the outbox, header included; returns the bytes of the payload.

        A gradient that is not finite is not encoded: the residual stays clean, and the flag in
        the header tells all ranks.
        """
        with self.wire.meter.stage("encode"):
            if flags & packet.NONFINITE:
                used = mail.payload.size if mail.compressor.fixed else 0
                mail.payload[:used] = 0
            else:
                used = mail.compressor.encode(mail.grad, mail.payload, mail.layout,
                                              mail.key(step, self.wire.rank), mail.state)
            Header(step, mail.index, mail.plan, used, flags).write(mail.outbox)
        return used

    def read_headers(self, mail, buffer, stride):
        """Read every rank's header and raise the same MismatchError on all ranks if they differ."""
        mail.headers = [Header.read(buffer[rank * stride:][:packet.SIZE])
                        for rank in range(self.wire.size)]
        first = mail.headers[0]
        for rank, header in enumerate(mail.headers):
            for field, what in (("step", "step"), ("bucket", "bucket"), ("plan", "plan digest")):
                here, there = getattr(first, field), getattr(header, field)
                if here != there:
                    raise MismatchError(
                        f"rank {rank} is at {what} {there}, rank 0 at {here} (step {first.step}, "
                        f"bucket {first.bucket} there): every rank must make the same steps with "
                        "the same model and method")
