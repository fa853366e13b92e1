"""Buckets in the order in which gradients arrive, as seen in the first step.

Parameters are registered in one order and used in another; a bucket that waits for a gradient that
comes late holds up all behind it. So the first step notes in which order gradients arrive, as
torch's DistributedDataParallel does; rank 0's order is taken by all, and where it cuts other
buckets than the reverse order of registration, buckets are made anew before the second step.
Residuals are kept by parameter, so nothing that is owed is lost.
"""

import numpy as np
import torch

from mpicomp import mpi
from mpicomp.reducer.bucket import groups, make_buckets
from mpicomp.transport import staging
from mpicomp.transport.agree import digest


class Order:
    """Which parameter is where, and how buckets come to be cut otherwise.

    place    {parameter name: (bucket, slot)}
    slots    all of them, in one list that stays the same object
    now      numbers of parameters, as registered, in the order of the buckets
    """

    def __init__(self, reducer, bucket_bytes):
        self.reducer, self.bytes, self.plan = reducer, bucket_bytes, reducer._plan
        self.named = list(reducer._named)
        self.number = {name: i for i, (name, _) in enumerate(self.named)}
        self.registered = list(reversed(range(len(self.named))))
        self.now, self.next = self.registered, None
        self._seen, self._noting, self._shared = [], True, {}
        self.place, self.slots = {}, []
        self._find_places()

    def _find_places(self):
        old, self.place = self.place, {slot.name: (bucket, slot) for bucket in
                                       self.reducer._buckets for slot in bucket.slots}
        self.slots[:] = [slot for _, slot in self.place.values()]
        for name, (_, slot) in old.items():
            self.place[name][1].scale = slot.scale

    def note(self, name):
        """A gradient has arrived."""
        if self._noting:
            self._seen.append(self.number[name])

    def agree(self):
        """After the first step: take rank 0's order. Collective, once, if there are buckets."""
        if not self._noting:
            return
        self._noting, r = False, self.reducer
        if len(r._buckets) == 1 or r._delay or r._exchange.asynchronous:
            return
        seen = dict.fromkeys(self._seen)  # what never arrived comes last
        order = np.array([*seen, *(i for i in self.now if i not in seen)], np.int32)
        mpi.wait(r.comm, r.comm.Ibcast(order, 0), r._pipeline.timeout, "agreeing on buckets")
        if self._cut(order) != self._cut(self.now):
            self.next = order.tolist()
            if r.method.adagrad:  # its owners change, so all must take part: at once
                self._share()
                self.apply()

    def _share(self):
        """What only owners have, second residual and AdaGrad's history, on all ranks.

        Without AdaGrad a second residual stays with its rank and joins the first (sharded.py).
        """
        from mpi4py import MPI

        r = self.reducer
        r.stats.reason = "rebuild"
        for mail in r._mail:
            arrays = mail.persistent()
            for kind in sorted(arrays.keys() - {"error"}):
                mine = staging.fetched(arrays[kind])
                total = np.zeros_like(mine)
                r.stats.count("Allreduce", mine.nbytes, mine.nbytes)
                mpi.wait(r.comm, r.comm.Iallreduce(mine, total, MPI.SUM), r._pipeline.timeout,
                         "sharing what owners have")
                total = staging.fitting(total, arrays[kind])
                self._shared |= {(kind, s.name): total[s.slice]
                                 for s in mail.layout.segments}

    def _cut(self, order):
        """The names in each bucket, were they cut in this order."""
        return [{name for name, _ in group} for group in groups(self._pairs(order), self.bytes)]

    def _pairs(self, order):
        return [self.named[i] for i in order]

    def apply(self):
        """Between two steps: make the buckets that were agreed on."""
        if self.next is not None:
            self._rebuild(self.next)

    def _rebuild(self, order):
        r, self.now, self.next = self.reducer, list(order), None
        kept = {(kind, s.name): array[s.slice] for bucket, mail in zip(r._buckets, r._mail)
                for kind, array in mail.persistent().items() for s in bucket.layout.segments}
        kept |= self._shared
        r._plan = self.plan
        if self.now != self.registered:
            r._plan ^= digest(str(self.now))
        r._buckets = make_buckets(self._pairs(self.now), self.bytes, r._place)
        r._mail = r._open_mail(r._exchange, r.method)
        if r._warm:
            r._warm = r._warm[0], r._open_mail(r._warm[0], r._warm_method)
        r._changes.new_mail()
        for bucket, mail in zip(r._buckets, r._mail):
            arrays = mail.persistent()
            for kind, array in arrays.items():
                for s in bucket.layout.segments:
                    if (kind, s.name) in kept:  # not where this rank becomes its node's leader
                        array[s.slice] = kept[kind, s.name]
            mail.restore(arrays)
        self._shared = {}
        self._find_places()

    def regroup(self, order):
        """Make all buckets anew for other ranks; nothing of a step that was begun remains."""
        self._noting, self._seen = self.reducer.step == 0, []
        self._rebuild(order)

    def state(self) -> dict:
        """{"order": numbers}, or nothing where buckets are as they were made."""
        order = self.next or self.now
        return {} if order == self.registered else {"order": torch.tensor(order)}

    def restore(self, state):
        """Take over the order of a saved state; a state of the first step or later has one."""
        order = state["order"].tolist() if "order" in state else self.registered
        self._noting, self._seen, self.next = not int(state["step"]), [], None
        if order != self.now:
            self._rebuild(order)

    def objection(self, state):
        """Why a saved state's order does not fit this model, or None."""
        if "order" in state and sorted(state["order"].tolist()) != sorted(self.registered):
            return (f"saved 'order' has {len(state['order'])} parameters, expected each of "
                    f"{len(self.registered)} once")
