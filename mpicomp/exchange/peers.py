"""Peers: every rank sends its packets to every other, and applies what has arrived by then.

The exchange of Strom 2015: no server, no barrier, no collective in a step. A packet is applied
exactly once on every rank, at whatever step of that rank it arrives, so the sum of all packets is
the same everywhere in the end, but added in another order: replicas agree up to rounding, and only
after `Reducer.deliver`, and only where the optimizer is linear (plain SGD).

`staleness` bounds how far ranks drift apart: a rank waits in step s until of every other rank the
packets of step s - staleness are here. With 0 that is lock step, the same bits as allgather.
"""

from mpicomp.exchange.asynchronous import Asynchronous, Promise
from mpicomp.exchange.base import Mail
from mpicomp.transport import packet


class Peers(Asynchronous):
    """See the module. Of shared scales every rank uses its own, which its packets carry."""

    def __init__(self, wire, staleness=4):
        super().__init__(wire)
        self.staleness, self.mails = staleness, {}

    def open(self, compressor, layout, index, grad, plan, seed):
        self.plan = plan
        self.mails[index] = _Letters(compressor, layout, index, grad, plan, seed, self.wire)
        return self.mails[index]

    def run(self, mail, step, flags):
        self.settled = False
        with self.wire.meter.stage("encode"):
            used = mail.say(step, flags)
        with self.lock:
            parcel = self.post.new_message(packet.SIZE + used)
            parcel.data[:] = mail.outbox[:parcel.size]
            for rank in self.post.others:
                self.post.send(parcel, rank, mail.index)
                self.book(mail, used)
            mail.put(step, self.wire.rank, parcel)
        yield [Promise(self.poll, lambda: self._behind(mail.index, step))]
        mail.headers = mail.due(self._horizon(step))

    def _behind(self, index, step):
        """The ranks whose packets of step - staleness are not here."""
        return [rank for rank in self.post.others if rank not in self.gone
                and self.awaited(rank, index) <= step - self.staleness]

    def _horizon(self, step):
        """The last step whose packets are applied in this rank's `step`."""
        return step if self.staleness == 0 else float("inf")

    def bucket_of(self, tag):
        return tag if tag in self.mails else "of this model"

    def take(self, rank, tag, header, parcel):
        self.mails[tag].put(header.step, rank, parcel)

    def decode(self, mail, step, weight):
        """mail.grad becomes weight * the sum of all packets since the last time, each once."""
        letters = mail.due(self._horizon(step))
        if not letters:
            mail.grad[...] = 0
            return
        mail.compressor.decode_sum(
            [parcel.data[packet.SIZE:] for _, _, parcel in letters], mail.grad, mail.layout,
            [mail.key(step, rank) for step, rank, _ in letters], weight)
        for letter in letters:
            mail.waiting.remove(letter)
            letter[2].release()

    def rest_of(self, mail, weight) -> bool:
        """Decode what is left after `settle`; False, and zeros in mail.grad, if nothing is."""
        left = bool(mail.waiting)
        self.decode(mail, float("inf"), weight)
        return left


class _Letters(Mail):
    """One bucket: its packets are said, and its residual is the past, as soon as they are sent.

    waiting  (step, rank, parcel) of the packets that are not applied yet, one's own included
    """

    def __init__(self, compressor, layout, index, grad, plan, seed, wire):
        super().__init__(compressor, layout, index, grad, plan, seed, wire)
        self.rank, self.flags, self.waiting = wire.rank, 0, []

    def say(self, step, flags) -> int:
        """Fill the outbox; returns the bytes of the payload.

        Without a gradient, or with one that is not finite, the packet is a header only, and the
        residual stays as it is.
        """
        self.flags = flags
        if flags:
            packet.Header(step, self.index, self.plan, 0, flags).write(self.outbox)
            return 0
        if self.shared is not None:
            self.measure(flags)
        used = self.encode(step, self.rank, flags)
        super().commit()
        return used

    def put(self, step, rank, parcel):
        """A packet to be applied; one that says nothing is let go."""
        if packet.Header.read(parcel.data).flags:
            parcel.release()
        else:
            self.waiting.append((step, rank, parcel))

    def due(self, horizon):
        """The packets of steps up to `horizon`, by step and rank."""
        return sorted((letter for letter in self.waiting if letter[0] <= horizon),
                      key=lambda letter: letter[:2])

    def flagged(self, flag):
        """Only of this rank: the others' packets that say nothing are not kept."""
        return [self.rank] if flag & self.flags & packet.NONFINITE else []

    def commit(self):
        """Done when the packet was sent."""
