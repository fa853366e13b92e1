"""Buckets: arrays side by side in flat float32 memory, each bucket with what exchanges it."""

import numpy as np

from mpicomp import kernels
from mpicomp.averager.order import Order
from mpicomp.errors import MismatchError
from mpicomp.layout import Layout
from mpicomp.transport import staging
from mpicomp.transport.agree import digest


class Bucket:
    """A flat float32 array, the slots of the arrays that lie in it, and its codecs.

    grad    float32[layout.size]: what this rank gives, and afterwards the mean
    tensor  the same memory as a torch tensor, on a GPU; None in host memory
    flight  the array that the exchange works on: `grad`, or one of the delayed mode's
    codec   what the exchange has opened for this bucket; `warm`: that of the dense warm-up, or None
    """

    def __init__(self, index, named, memory, slot):
        self.index = index
        self.layout = Layout.of((name, tuple(array.shape)) for name, array in named)
        self.grad, self.tensor = memory.bucket(self.layout.size)
        self.flight = self.grad
        self.codec = self.warm = None
        self._held = None
        self.slots = [slot(name, array, self, segment)
                      for (name, array), segment in zip(named, self.layout.segments)]
        self.reset()

    def view(self, segment):
        """The torch tensor that lies in a segment of `grad`, with the segment's shape."""
        import torch

        flat = torch.from_numpy(self.grad) if self.tensor is None else self.tensor
        return flat[segment.slice].view(segment.shape)

    def reset(self):
        """Before the first array of a step."""
        self.missing = len(self.slots)
        for slot in self.slots:
            slot.ready = False

    @property
    def touched(self) -> bool:
        """Is any array of this step complete?"""
        return self.missing < len(self.slots)

    def arrived(self, slot):
        """What this rank gives stands in the slot."""
        slot.ready = True
        self.missing -= 1

    def hold(self):
        """Keep what this rank owes out of the packet of this step."""
        self.release()  # what an error has left here
        owed = self.codec.persistent()
        if "error" in owed:
            self._held = owed["error"].copy()
            owed["error"] = kernels.of(self.grad).zeros(self.layout.size)
            self.codec.restore(owed)

    def owed(self) -> dict:
        """What this rank owes, with what `hold` has kept, by kind; nothing changes."""
        owed = self.codec.persistent()
        if self._held is not None:
            owed["error"] = owed["error"] + self._held
        return owed

    def release(self):
        """What `hold` has kept is owed again."""
        if self._held is not None:
            self.codec.restore(self.owed())
            self._held = None

    def first_bad(self) -> str | None:
        """The name of the first array that holds NaN or Inf, or None."""
        finite = kernels.of(self.grad).finite
        if any(slot.fine is None for slot in self.slots) and not finite(self.grad):
            return next(slot.name for slot in self.slots if not finite(slot.flat))
        return next((slot.name for slot in self.slots if slot.fine is False), None)


def groups(named, bucket_bytes) -> list[list]:
    """(name, array) pairs in groups of at most `bucket_bytes` of float32, or of one array."""
    found, room = [], 0
    for name, array in named:
        size = 4 * int(np.prod(array.shape))
        if not found or size > room:
            found.append([])
            room = bucket_bytes
        found[-1].append((name, array))
        room -= size
    return found


class Buckets:
    """All buckets of an averager: their order, their codecs, and what ranks agreed on about them.

    plan    64-bit digest of everything that all ranks must agree on
    names   {name: (bucket, slot)}
    slots   of all buckets, in one list that stays the same object
    order   of the arrays in the buckets: see order.py
    frozen  names of the arrays that stand still in this step: nothing is handed out for them
    """

    def __init__(self, named, bucket_bytes, memory, slot, plan):
        self.plan, self._first_plan = plan, plan
        self._bytes, self._memory, self._slot, self._link = bucket_bytes, memory, slot, None
        self.order, self._shared = Order(named), {}
        self.names, self.slots = {}, []
        self._make()

    def __iter__(self):
        return iter(self._all)

    def __len__(self):
        return len(self._all)

    def __getitem__(self, index):
        return self._all[index]

    def _make(self):
        self._all = [Bucket(i, group, self._memory, self._slot)
                     for i, group in enumerate(self._groups(self.order.now))]
        old, self.names = self.names, {slot.name: (bucket, slot) for bucket in self._all
                                       for slot in bucket.slots}
        self.slots[:] = [slot for _, slot in self.names.values()]
        for name, (_, slot) in old.items():
            self.names[name][1].follow(slot)
        self._marked, self.frozen = 0, ()

    def open(self, link):
        """Let the exchanges of `link` make their codecs, with all the memory that they will need.
        """
        self._link = link
        with self._memory.here():
            for bucket in self._all:
                bucket.codec = link.open(bucket, self.plan)
                bucket.warm = link.open_warm(bucket, self.plan)

    @property
    def codecs(self) -> list:
        """The codec of each bucket."""
        return [bucket.codec for bucket in self._all]

    # ---- what headers say ----

    @property
    def marked_plan(self) -> int:
        """The plan digest that headers carry in this step."""
        return self.plan ^ self._marked

    def mark(self, frozen, note, compare=True):
        """Have the headers of this step carry a digest of `frozen`, a tuple of names, and `note`.

        Ranks that differ in them then raise MismatchError, unless `compare` is false.
        """
        if frozen != self.frozen:
            self.frozen = frozen
            for slot in self.slots:
                slot.frozen = slot.name in frozen
        mark = digest(f"frozen {frozen}, {note}") if frozen or note else 0
        if compare and mark != self._marked:
            self._marked = mark
            for codec in [*self.codecs, *(b.warm for b in self._all if b.warm is not None)]:
                codec.replan(self.marked_plan)

    def release(self):
        """What buckets have kept out of a step is owed again."""
        for bucket in self._all:
            bucket.release()

    # ---- the order ----

    def note(self, name):
        """An array is complete."""
        self.order.note(name)

    def agree(self, stays) -> bool:
        """After the first step: take rank 0's order, unless it `stays`; does it cut other buckets?

        Collective, once, if there are several buckets. `apply` makes them when the next step
        begins.
        """
        self.order.noting = False
        if len(self._all) == 1 or stays:
            return False
        order = np.array(self.order.seen, np.int32)
        self._link.broadcast(order, "agreeing on buckets")
        if self._cut(order) == self._cut(self.order.now):
            return False
        self.order.next = order.tolist()
        return True

    def share(self):
        """What only owners have, second residual and AdaGrad's history, on all ranks.

        Without AdaGrad a second residual stays with its rank and joins the first (sharded.py).
        """
        for bucket in self._all:
            arrays = bucket.codec.persistent()
            for kind in sorted(arrays.keys() - {"error"}):
                total = self._link.sum(staging.fetched(arrays[kind]), "rebuild",
                                       "sharing what owners have")
                total = staging.fitting(total, arrays[kind])
                self._shared |= {(kind, s.name): total[s.slice] for s in bucket.layout.segments}

    def _groups(self, order):
        return groups(self.order.arranged(order), self._bytes)

    def _cut(self, order):
        """The names in each bucket, were they cut in this order."""
        return [{name for name, _ in group} for group in self._groups(order)]

    def apply(self):
        """Between two steps: make the buckets that were agreed on."""
        if self.order.next is not None:
            self._rebuild(self.order.next)

    def _rebuild(self, order):
        self.order.now, self.order.next = list(order), None
        self.release()
        kept = {(kind, s.name): array[s.slice] for bucket in self._all
                for kind, array in bucket.codec.persistent().items()
                for s in bucket.layout.segments} | self._shared
        self.plan = self._first_plan
        if self.order.now != self.order.registered:
            self.plan ^= digest(str(self.order.now))
        self._make()
        self.open(self._link)
        for bucket in self._all:
            arrays = bucket.codec.persistent()
            for kind, array in arrays.items():
                for s in bucket.layout.segments:
                    if (kind, s.name) in kept:  # not where this rank becomes its node's leader
                        array[s.slice] = kept[kind, s.name]
            bucket.codec.restore(arrays)
        self._shared = {}

    def regroup(self, link, order, first):
        """Make all buckets anew over other ranks; nothing of a step that was begun remains.

        first  is the first step still to be made?
        """
        self._link = link
        self.order.restart(noting=first)
        self._rebuild(order)

    # ---- state ----

    def restore(self, state):
        """Take over the order of a saved state, and what this rank owed."""
        order = self.order.saved(state)
        self.order.restart(noting=not int(state["step"]))
        if order != self.order.now:
            self._rebuild(order)
        self.release()
        for bucket in self._all:
            bucket.codec.restore({
                kind: np.concatenate([_flat(state[f"{kind}/{s.name}"])
                                      for s in bucket.layout.segments])
                for kind in bucket.codec.persistent()})

    def residuals(self) -> dict:
        """{"error/<name>": float32 array with the shape of that array, a copy on the host} ..."""
        return {f"{kind}/{s.name}": array[s.slice].copy().reshape(s.shape)
                for bucket in self._all
                for kind, array in ((kind, staging.fetched(array))
                                    for kind, array in bucket.owed().items())
                for s in bucket.layout.segments}

    def require_no_step(self, rank, what):
        """MismatchError where arrays have come that no step has used."""
        if any(slot.ready for slot in self.slots):
            raise MismatchError(f"rank {rank}: {what}() in the middle of a step: call "
                                "it after optimizer.step()")

    def clear(self):
        """Nothing is handed out: no slot has anything of this step."""
        for slot in self.slots:
            slot.clear()


def _flat(array):
    """A saved array as float32[n] on the host."""
    if hasattr(array, "detach"):
        array = array.detach().float().cpu().numpy()
    return np.asarray(array, np.float32).reshape(-1)
