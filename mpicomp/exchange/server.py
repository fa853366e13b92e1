"""Server: every rank owns a part of the parameters, and its optimizer; asynchronous.

The exchange of Aji & Heafield 2017, after the first author's code (Marian). A worker pushes its
packet, cut at the borders of the shards; the owner applies each push at once, by itself, with the
shard's own optimizer. Then it answers with the difference between its shard and what this worker
has been given, through the same compressor: what is not said now remains in the difference, so that
this is error feedback, one residual for every worker and shard. Nobody waits for another worker.

Shards are contiguous, ceil(n / P) elements of the one bucket that holds all parameters. A rank
takes its own shard as it is: nothing travels, nothing is compressed.
"""

import threading

import numpy as np

from mpicomp import kernels, mpi, philox
from mpicomp.errors import PacketError, SpecError
from mpicomp.exchange.asynchronous import Asynchronous, Promise
from mpicomp.exchange.base import Mail
from mpicomp.exchange.shards import equal_borders, part
from mpicomp.philox import Key
from mpicomp.transport import packet
from mpicomp.transport.packet import Header

PUSH, PULL = 0, 1  # tags
BACK = 1 << 32  # the first of the parts whose random numbers are the pulls'; pushes: the owner
PAUSE = 1e-3  # seconds between two looks of the thread


class Server(Asynchronous):
    """See the module. A rank is at rest until its next step once `settle` has returned.

    latest  float32[own part], the parameters that this rank owns
    grad    float32[own part], what `optimizer.step()` finds as their gradient
    given   {rank: float32[own part]}, what each worker has been told so far
    """

    owns = True

    def __init__(self, wire, thread=True):
        super().__init__(wire)
        self.optimizer, self._stop = None, None
        self.threaded = thread and wire.size > 1 and _threads_may_call_mpi()
        if thread and wire.size > 1 and not self.threaded:
            wire.meter.notes.append("this MPI allows one thread only: a rank serves its shard from "
                                    "gradient hooks and while it waits, not while it computes")

    def open(self, compressor, layout, index, grad, plan, seed):
        me, zeros = self.wire.rank, kernels.of(grad).zeros
        self.plan, self.seed, self.core = plan, seed, compressor.core
        self.borders = equal_borders(layout, self.wire.size)
        self.layouts = [part(layout, *pair) for pair in zip(self.borders, self.borders[1:])]
        self.own = slice(self.borders[me], self.borders[me + 1])
        self.mail = _Pushes(self, compressor, layout, index, grad)
        size = self.layouts[me].size
        self.latest, self.grad, self._delta = zeros(size), zeros(size), zeros(size)
        self.given = {rank: zeros(size) for rank in range(self.wire.size)}
        self._box = zeros(self.core.capacity(self.layouts[me]), np.uint8)
        self._state = self.core.init(self.layouts[me], grad)
        if self.core.persistent(self._state):
            raise SpecError(f"{self.core.name} remembers earlier packets, which exchange=server "
                            "would have to keep for every worker: use exchange=peers")
        return self.mail

    def bucket_of(self, tag):
        return 0 if tag in (PUSH, PULL) else "of this model"

    # ---- a stretch of steps ----

    def resume(self, weight):
        """Begin to serve: `latest` holds the parameters that all ranks have now.

        Pushes are multiplied by `weight` before they are applied.
        """
        for given in self.given.values():
            given[...] = self.latest
        self.weight, self.settled = weight, False
        if self.threaded:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._serve, args=(self._stop,), daemon=True,
                                            name="mpicomp server")
            mpi.at_end(self.rest)  # nobody may call MPI after it has ended
            self._thread.start()

    def _serve(self, stop):
        """What the thread does: a rank that computes, or sleeps, holds nobody back."""
        while not stop.wait(PAUSE):
            try:
                self.poll()
            except Exception:
                return  # kept; raised where this rank looks next

    def rest(self):
        if self._stop is not None:
            self._stop.set()
            self._thread.join()
            self._stop = None
            mpi.not_at_end(self.rest)

    def poll(self):
        if not self.settled:
            super().poll()

    def shares(self, flat):
        """Bring all shards together in `flat`, the same bits on all ranks. After `settle`."""
        lengths = np.diff(self.borders)
        self.wire.meter.count("Allgatherv", self.latest.nbytes, flat.nbytes - self.latest.nbytes)
        self._wait_for(self.post.comm.Iallgatherv(self.latest, [flat, lengths]))

    def apply_sum(self, flat):
        """Apply the sum over ranks of `flat`, every owner its part, as one push. After `settle`."""
        self.wire.meter.count("Reduce_scatter", flat.nbytes - self.latest.nbytes,
                              self.latest.nbytes)
        self._wait_for(self.post.comm.Ireduce_scatter(flat, self.grad, np.diff(self.borders)))
        self.grad *= np.float32(self.weight)
        self.optimizer.step()

    def _wait_for(self, request):
        mpi.wait(self.post.comm, request, mpi.limit(self.post.comm), "bringing shards together")

    # ---- one step of a worker ----

    def run(self, mail, step, flags):
        me = self.wire.rank
        if self.settled:
            raise SpecError("exchange=server needs parameters and their optimizer: it works in a "
                            "Reducer with an attached optimizer only")
        with self.wire.meter.stage("encode"):
            payloads = mail.say(step, flags)
        with self.lock:
            for owner in self.post.others:
                self._send(owner, PUSH, step, payloads[owner], flags)
            self._apply(me, step, payloads[me], flags)
        yield [Promise(self.poll,
                       lambda: [r for r in self.post.others if self.awaited(r, PULL) <= step])]

    def _send(self, rank, tag, step, payload, flags=0):
        parcel = self.post.new_message(packet.SIZE + len(payload))
        Header(step, 0, self.plan, len(payload), flags).write(parcel.data)
        parcel.data[packet.SIZE:] = payload
        self.post.send(parcel, rank, tag)
        parcel.release()

    def decode(self, mail, step, weight):
        """mail.grad becomes what the owners said: how far each parameter is to be moved."""
        mail.grad[...] = 0
        with self.lock:
            for owner, told, parcel in mail.pulls:
                place = slice(self.borders[owner], self.borders[owner + 1])
                self.core.decode_add(parcel.data[packet.SIZE:], mail.grad[place],
                                     self.layouts[owner], self._key(owner, self.wire.rank, told))
                parcel.release()
            mail.pulls.clear()
            mine, own = self.given[self.wire.rank], mail.grad[self.own]
            np.subtract(self.latest, mine, out=own)
            mine += own  # as the parameter itself will be moved

    # ---- the owner ----

    def take(self, rank, tag, header, parcel):
        if tag == PULL:
            self.mail.pulls.append((rank, header.step, parcel))
            return
        try:
            self._apply(rank, header.step, parcel.data[packet.SIZE:], header.flags)
        except PacketError as problem:
            raise PacketError(f"rank {rank}: {problem}") from None
        parcel.release()
        self._answer(rank, header.step)

    def _apply(self, worker, step, payload, flags):
        """One push: a step of the shard's optimizer, unless there is no gradient in it."""
        if not flags:
            key = self.mail.key(step, worker, self.wire.rank)
            self.core.decode_sum([payload], self.grad, self.layouts[self.wire.rank], [key],
                                 self.weight)
            self.optimizer.step()

    def _answer(self, worker, step):
        """Say to a worker what it does not know, as far as the compressor says it."""
        given, layout = self.given[worker], self.layouts[self.wire.rank]
        key = self._key(self.wire.rank, worker, step)
        np.subtract(self.latest, given, out=self._delta)
        self.core.measure(self._delta, layout, self._state)
        used = self.core.encode(self._delta, self._box, layout, key, self._state)
        self.core.decode_add(self._box[:used], given, layout, key)
        self._send(worker, PULL, step, self._box[:used])

    def _key(self, owner, worker, step):
        return Key(philox.part(self.seed, BACK + worker), owner, step)


class _Pushes:
    """This rank as a worker: one packet that is cut at the borders, or one for each shard.

    A payload that can be cut is encoded for all parameters together, with one threshold. Otherwise
    each shard is encoded by itself. Residuals are the past as soon as the packet is sent.
    """

    def __init__(self, exchange, compressor, layout, index, grad):
        self.borders, self.compressor, self.grad = exchange.borders, compressor, grad
        self.layout, self.index, self.rank = layout, index, exchange.wire.rank
        self.whole, plan, seed = compressor.can_split, exchange.plan, exchange.seed
        if self.whole:
            self.mails = [Mail(compressor, layout, index, grad, plan, seed, exchange.wire)]
        else:
            self.mails = [Mail(compressor, sub, index, grad[a:b], plan, philox.part(seed, owner),
                               exchange.wire)
                          for owner, (sub, a, b) in enumerate(self._parts(exchange.layouts))]
        self.flags, self.pulls, self.headers = 0, [], ["own"]

    def _parts(self, things):
        """(thing, first, last) of each shard."""
        return zip(things, self.borders, self.borders[1:])

    def key(self, step, worker, owner):
        """That of a push."""
        return self.mails[0 if self.whole else owner].key(step, worker)

    def say(self, step, flags):
        """The payload for each owner; empty ones where there is no finite gradient."""
        self.flags = flags
        if flags:
            return [self.mails[0].payload[:0]] * (len(self.borders) - 1)
        payloads = []
        for m in self.mails:
            if m.shared is not None:
                m.measure(flags)
            payloads.append(m.payload[:m.encode(step, self.rank, flags)])
            m.commit()
        if self.whole:
            return self.compressor.split(payloads[0], self.layout, self.borders)
        return payloads

    def flagged(self, flag):
        return [self.rank] if flag & self.flags & packet.NONFINITE else []

    def commit(self):
        """Done when the packet was sent."""

    def persistent(self) -> dict:
        """{"error": what this rank has not told the owners}."""
        if self.whole:
            return self.mails[0].persistent()
        parts = [m.persistent() for m in self.mails]
        return {kind: np.concatenate([p[kind] for p in parts]) for kind in parts[0]}

    def restore(self, arrays):
        if self.whole:
            self.mails[0].restore(arrays)
            return
        for m, a, b in self._parts(self.mails):
            m.restore({kind: array[a:b] for kind, array in arrays.items()})


def _threads_may_call_mpi():
    from mpi4py import MPI

    return MPI.Query_thread() == MPI.THREAD_MULTIPLE
