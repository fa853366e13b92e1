"""Server: every rank owns a part of the parameters and runs its optimizer; asynchronous.

The exchange of Aji & Heafield 2017, after the first author's code (Marian). A worker pushes its
packet, cut at the borders of the shards. The owner applies each push at once, by itself, with the
shard's own optimizer. It answers with the difference between its shard and what this worker has
been given, encoded by the same compressor. What an answer leaves out remains in the difference, so
this is error feedback, with one residual for every worker and shard. No worker waits for another.

Shards are contiguous, ceil(n / P) elements of the one bucket that holds all parameters. A rank
reads its own shard directly: nothing is sent, nothing is compressed.
"""

import threading
from dataclasses import dataclass

import numpy as np

from mpicomp import kernels, mpi, philox
from mpicomp.compressors.options import option
from mpicomp.errors import PacketError, SpecError
from mpicomp.exchange.asynchronous import Asynchronous, PendingRanks
from mpicomp.exchange.base import BucketExchange, Codec, Cost
from mpicomp.exchange.shards import equal_borders, part
from mpicomp.philox import Key
from mpicomp.transport import packet
from mpicomp.transport.packet import Header

PUSH, PULL = 0, 1  # tags
BACK = 1 << 32  # philox.part of pulls: this plus the worker; of pushes: the owner
PAUSE = 1e-3  # seconds between two looks of the thread


class Shard:
    """The part of the parameters that this rank owns.

    place      slice of the bucket
    latest     float32[n], these parameters
    grad       float32[n], what `optimizer.step()` finds as their gradient
    given      {rank: float32[n]}, what each worker has been told so far
    optimizer  moves `latest` by `grad`; None until the Reducer has made it
    weight     of a push, before it is applied
    """

    def __init__(self, place, zeros, ranks):
        size = place.stop - place.start
        self.place, self.latest, self.grad = place, zeros(size), zeros(size)
        self.given = {rank: zeros(size) for rank in range(ranks)}
        self.optimizer, self.weight = None, 1.0


@dataclass(eq=False, repr=False)
class Server(Asynchronous):
    """Asynchronous, every rank owns parameters and their optimizer (Aji & Heafield 2017).

    A rank is at rest, and takes nothing in, from the end of `settle` until its next step.
    """

    name = "server"
    owns = True
    lacks = Asynchronous.lacks | {"warmup": "its optimizers would start anew after it"}

    thread: bool = option(True, "a thread serves this rank's shard while it computes")

    def __post_init__(self, wire):
        super().__post_init__(wire)
        self._stop = None
        self.threaded = self.thread and wire.size > 1 and _threads_may_call_mpi()
        if self.thread and wire.size > 1 and not self.threaded:
            wire.meter.notes.append("this MPI allows one thread only: a rank serves its shard from "
                                    "gradient hooks and while it waits, not while it computes")

    @classmethod
    def refusal(cls, compressor):
        if not compressor.core.feedback:
            return ("exchange=server keeps what a worker was not told, and "
                    f"{compressor.core.name} does not declare that this stays bounded: use "
                    "exchange=peers")

    @classmethod
    def cost(cls, ranks):
        """A push to each owner, and as an owner an answer to each push."""
        others = (ranks - 1) / ranks
        return Cost(2 * others, calls=2, encodes=1 + others, decodes=1 + 2 * others)

    @classmethod
    def unattended(cls, **options):
        return not (options["thread"] and _threads_may_call_mpi())

    def open(self, compressor, layout, index, grad, plan, seed):
        me, zeros = self.wire.rank, kernels.of(grad).zeros
        self.plan, self.seed, self.core = plan, seed, compressor.core
        self.borders = equal_borders(layout, self.wire.size)
        self.layouts = [part(layout, *pair) for pair in zip(self.borders, self.borders[1:])]
        self.shard = Shard(slice(self.borders[me], self.borders[me + 1]), zeros, self.wire.size)
        self.worker = ServerBucket(self, compressor, layout, index, grad, plan, seed)
        self._delta = zeros(self.layouts[me].size)
        self._box = zeros(self.core.capacity(self.layouts[me]), np.uint8)
        self._state = self.core.init(self.layouts[me], grad)
        if self.core.persistent(self._state):
            raise SpecError(f"{self.core.name} remembers earlier packets, which exchange=server "
                            "would have to keep for every worker: use exchange=peers")
        return self.worker

    def bucket_of(self, tag):
        return 0 if tag in (PUSH, PULL) else "of this model"

    # ---- a run of steps ----

    def resume(self, weight):
        """Begin to serve, from the parameters in `latest`, which are those of all ranks.

        Pushes are multiplied by `weight` before they are applied.
        """
        for given in self.shard.given.values():
            given[...] = self.shard.latest
        self.shard.weight, self.settled = weight, False
        if self.threaded:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._serve, args=(self._stop,), daemon=True,
                                            name="mpicomp server")
            mpi.at_end(self.rest)  # nobody may call MPI after it has ended
            self._thread.start()

    def _serve(self, stop):
        """The thread's loop: other ranks need not wait for a rank that computes."""
        while not stop.wait(PAUSE):
            try:
                self.poll()
            except Exception:
                return  # `poll` has kept it and raises it in the next call

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
        """Gather all shards in `flat`, the same bits on all ranks. Collective, after `settle`."""
        lengths = np.diff(self.borders)
        mine = self.shard.latest.nbytes
        self.wire.meter.count("Allgatherv", mine, flat.nbytes - mine)
        self._wait_for(self.post.comm.Iallgatherv(self.shard.latest, [flat, lengths]))

    def apply_sum(self, flat):
        """Apply the sum over ranks of `flat`, each owner its part, as one push. After `settle`."""
        self.wire.meter.count("Reduce_scatter", flat.nbytes - self.shard.latest.nbytes,
                              self.shard.latest.nbytes)
        lengths = np.diff(self.borders)
        self._wait_for(self.post.comm.Ireduce_scatter(flat, self.shard.grad, lengths))
        self.shard.grad *= np.float32(self.shard.weight)
        self.shard.optimizer.step()

    def _wait_for(self, request):
        mpi.wait(self.post.comm, request, mpi.limit(self.post.comm), "bringing shards together")

    # ---- one step of a worker ----

    def run(self, bucket, step, flags):
        me = self.wire.rank
        if self.settled:
            raise SpecError("exchange=server needs parameters and their optimizer: it works in a "
                            "Reducer with an attached optimizer only")
        with self.wire.meter.stage("encode"):
            payloads = bucket.encode(step, flags)
        with self.lock:
            for owner in self.post.others:
                self._send(owner, PUSH, step, payloads[owner], flags)
            self._apply(me, step, payloads[me], flags)
        yield [PendingRanks(self.poll, lambda: [r for r in self.post.others
                                                if self.awaited(r, PULL) <= step])]

    def _send(self, rank, tag, step, payload, flags=0):
        parcel = self.post.new_message(packet.SIZE + len(payload))
        Header(step, 0, self.plan, len(payload), flags).write(parcel.data)
        parcel.data[packet.SIZE:] = payload
        self.post.send(parcel, rank, tag)
        parcel.release()

    def decode(self, bucket, step, weight):
        """bucket.grad becomes what the owners answered: how far to move each parameter."""
        bucket.grad[...] = 0
        with self.lock:
            for owner, told, parcel in bucket.pulls:
                theirs = slice(self.borders[owner], self.borders[owner + 1])
                self.core.decode_add(parcel.data[packet.SIZE:], bucket.grad[theirs],
                                     self.layouts[owner], self._key(owner, self.wire.rank, told))
                parcel.release()
            bucket.pulls.clear()
            mine, own = self.shard.given[self.wire.rank], bucket.grad[self.shard.place]
            np.subtract(self.shard.latest, mine, out=own)
            mine += own  # as the parameter itself will be moved

    # ---- the owner ----

    def take(self, rank, tag, header, parcel):
        if tag == PULL:
            self.worker.pulls.append((rank, header.step, parcel))
            return
        try:
            self._apply(rank, header.step, parcel.data[packet.SIZE:], header.flags)
        except PacketError as problem:
            raise PacketError(f"rank {rank}: {problem}") from None
        parcel.release()
        self._answer(rank, header.step)

    def _apply(self, worker, step, payload, flags):
        """Step the shard's optimizer on one push, unless there is no gradient in it."""
        if not flags:
            key = self.worker.key(step, worker, self.wire.rank)
            self.core.decode_sum([payload], self.shard.grad, self.layouts[self.wire.rank], [key],
                                 self.shard.weight)
            self.shard.optimizer.step()

    def _answer(self, worker, step):
        """Send a worker, compressed, how its copy of the shard differs from the shard."""
        given, layout = self.shard.given[worker], self.layouts[self.wire.rank]
        key = self._key(self.wire.rank, worker, step)
        np.subtract(self.shard.latest, given, out=self._delta)
        self.core.measure(self._delta, layout, self._state)
        used = self.core.encode(self._delta, self._box, layout, key, self._state)
        self.core.decode_add(self._box[:used], given, layout, key)
        self._send(worker, PULL, step, self._box[:used])

    def _key(self, owner, worker, step):
        return Key(philox.part(self.seed, BACK + worker), owner, step)


class ServerBucket(BucketExchange):
    """This rank as a worker: one packet that is cut at the borders, or one for each shard.

    A payload that can be cut is encoded for all parameters together, with one threshold. Otherwise
    each shard is encoded by itself. Residuals are the past as soon as the packet is sent.
    """

    def __init__(self, exchange, compressor, layout, index, grad, plan, seed):
        self.borders, self.compressor, self.rank = exchange.borders, compressor, exchange.wire.rank
        self.whole = compressor.can_split
        if self.whole:
            codecs = [Codec(compressor, layout, index, grad, plan, seed)]
        else:
            codecs = [Codec(compressor, sub, index, grad[a:b], plan, philox.part(seed, owner))
                      for owner, (sub, a, b) in enumerate(self._parts(exchange.layouts))]
        self.flags, self.pulls = 0, []
        super().__init__(layout, index, grad, codecs)

    def _parts(self, things):
        """(thing, first, last) of each shard."""
        return zip(things, self.borders, self.borders[1:])

    def key(self, step, worker, owner):
        """That of a push."""
        return self.codecs[0 if self.whole else owner].key(step, worker)

    def encode(self, step, flags):
        """The payload for each owner; empty ones where there is no finite gradient."""
        self.flags, plan = flags, self.codecs[0].plan
        self.headers = [packet.Header(step, self.index, plan, 0, flags)]
        if flags:
            return [self.codecs[0].payload[:0]] * (len(self.borders) - 1)
        payloads = []
        for codec in self.codecs:
            if codec.shared is not None:
                codec.measure(flags)
            payloads.append(codec.payload[:codec.encode(step, self.rank, flags)])
            codec.commit()
        if self.whole:
            return self.compressor.split(payloads[0], self.layout, self.borders)
        return payloads

    def flagged(self, flag):
        return [self.rank] if flag & self.flags & packet.NONFINITE else []

    @property
    def given(self):
        """Always: owners answer with what other workers have pushed, too."""
        return True

    def commit(self):
        """Done when the packet was sent."""

    def persistent(self) -> dict:
        """{"error": what this rank has not told the owners}."""
        if self.whole:
            return super().persistent()
        parts = [codec.persistent() for codec in self.codecs]
        return {kind: np.concatenate([p[kind] for p in parts]) for kind in parts[0]}

    def restore(self, arrays):
        if self.whole:
            super().restore(arrays)
            return
        for codec, a, b in self._parts(self.codecs):
            codec.restore({kind: array[a:b] for kind, array in arrays.items()})


def _threads_may_call_mpi():
    from mpi4py import MPI

    return MPI.Query_thread() == MPI.THREAD_MULTIPLE
