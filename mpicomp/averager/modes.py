"""Modes: when what was exchanged is applied. An averager has one, and asks it in every step.

    Synchronous  the mean of this step's arrays, in this step: the same bits on all ranks
    Delayed      the mean of the last step's arrays (delay=1): the same bits on all ranks
    Peers        what has arrived by now (exchange=peers): each packet once, at any step

The fourth, of exchange=server, has the optimizers of parameters: reducer/server.py.
"""

from mpicomp import kernels
from mpicomp.errors import MismatchError, NonFiniteError
from mpicomp.transport import packet


class Synchronous:
    """What an averager asks of its mode; nothing is under way between two steps."""

    asynchronous = False  # are ranks in other steps, so that a step has no collective call?
    late = False          # is what `finish` hands out of another step than what was given?
    irreplaceable = None  # why a dead rank cannot be done without, in words

    def __init__(self, averager):
        self.averager = averager

    def begin(self):
        """A bucket is about to be sent, or everything to be delivered."""

    def launch(self, bucket):
        """A bucket is about to be sent."""

    def land(self):
        """This step's buckets are about to be finished."""

    def finish(self) -> bool:
        """All buckets of this step are on their way: wait, and hand the mean out, if there is one.
        """
        try:
            return self._finish()
        finally:
            self.averager.release()

    def _finish(self):
        a = self.averager
        with a.stats.stage("wait"):
            a.link.pipeline.drain()
            skipped = a.finish_rows()
        skipped |= any(a.codec(b).flagged(packet.NONFINITE) for b in a.buckets)
        a.current.finished, full, overflow = True, [], None
        with a.guard.commit():  # until its end nothing has changed that lasts
            try:
                full = [] if skipped else self.decode()
            except NonFiniteError as error:  # the sum is not finite, on all ranks alike
                skipped, overflow = True, error
        a.current.outcome = None
        if skipped:
            a.skip(overflow)
            full = self.decode_others()
        self.hand_out(full)
        a.apply_rows()
        a.current.applied = [(bucket, a.step) for bucket in full]
        if a.commits_at_once:
            a.commit()
        a.end_step(skipped)
        return bool(full)

    def decode(self) -> list:
        """The buckets of which any rank had something, the mean in their `flight`."""
        a = self.averager
        full = a.full()
        with a.stats.stage("decode"):
            for bucket in full:
                a.exchange.decode(a.codec(bucket), a.step, a.weight)
                if a.sends and not a.dense:
                    a.sends.unload(bucket)
            if not a.settings.average and not a.exchange.asynchronous:
                for bucket in full:
                    for slot in bucket.slots:
                        slot.refuse_overflow(a.step)
        return full

    def decode_others(self) -> list:
        """What is to be applied though this rank skips the step."""
        return []

    def hand_out(self, buckets):
        """The mean stands in these buckets: it goes to who gave arrays."""
        for bucket in buckets:
            for slot in bucket.slots:
                slot.give_back()

    # ---- between two steps ----

    def deliver(self) -> list | None:
        """Receive all that any rank has sent, and hand it out; the buckets that have some of it,
        None if nothing was under way."""

    def flush(self):
        """Before what is owed is added up."""

    def require_settled(self, what):
        """MismatchError where something is under way."""

    def owed_is_gone(self, owed) -> bool:
        """Has the mode applied what all ranks owe itself?"""
        return False

    def state(self) -> dict:
        """What of a checkpoint is this mode's."""
        return {}

    def restore(self, state):
        """Take over what `state` gave."""


class Delayed(Synchronous):
    """One step of delay: what is exchanged in step t is handed out in step t + 1.

    The double buffering of 1-bit SGD (Seide et al. 2014, section 3.1; CNTK's useBufferedAsync-
    GradientAggregation): the exchange has the time of a forward and most of a backward pass, and
    the model is one step stale. In the first step nothing is handed out, and what is under way at
    the end is handed out by `deliver`. The delay is the same on all ranks, so replicas agree to
    the bit.

    Every bucket has a second array, `bucket.flight`, which the exchange works on, and a third in
    `_late`, so that the first can be filled meanwhile: two copies a step.
    """

    late = True
    irreplaceable = "delay=1 has a gradient under way that nobody can take back"

    def __init__(self, averager):
        super().__init__(averager)
        self._under_way, self._landed = None, set()  # a step; numbers of buckets in `_late`
        self._skipped, self._error = False, None
        for bucket in averager.buckets:
            bucket.flight = _like(bucket)
        self._late = [_like(bucket) for bucket in averager.buckets]

    def launch(self, bucket):
        self.land()
        bucket.flight[...] = bucket.grad

    def land(self):
        """Wait for the exchange that is under way, if one is, and decode it."""
        if self._under_way is None:
            return
        step, self._under_way = self._under_way, None
        try:
            self._land(step)
        finally:
            self.averager.release()

    def _land(self, step):
        a = self.averager
        with a.stats.stage("wait"):
            a.link.pipeline.drain()
        exchange = a.exchange_of(step)
        self._landed.clear()
        self._skipped = any(a.codec(b, step).flagged(packet.NONFINITE) for b in a.buckets)
        if self._skipped:
            try:
                a.tell(step)
            except NonFiniteError as error:  # here is inside of backward: `finish` raises it
                self._error = error
            return
        with a.stats.stage("decode"):
            for bucket in a.full(step):
                exchange.decode(a.codec(bucket, step), step, a.weight)
                a.commit_bucket(bucket, step)
                self._late[bucket.index][...] = bucket.flight
                self._landed.add(bucket.index)

    def finish(self):
        a, found = self.averager, bool(self._landed)
        self._hand_out_landed()
        self._under_way, a.current.outcome = a.step, "skipped" if self._skipped else None
        a.end_step(self._skipped)
        self._raise_error()
        return found

    def _raise_error(self):
        error, self._error, self._skipped = self._error, None, False
        if error:
            raise error

    def _hand_out_landed(self, scaled=True):
        self.averager.current.finished = True
        for bucket in self.averager.buckets:
            bucket.grad[...] = self._late[bucket.index]
            for slot in bucket.slots:
                if bucket.index in self._landed:
                    slot.give_back(scaled)
                else:
                    slot.clear()
        self._landed.clear()

    def deliver(self):
        if self._under_way is None:
            return None
        self.averager.mark_step()
        self.land()
        found = [bucket for bucket in self.averager.buckets if bucket.index in self._landed]
        self._hand_out_landed(scaled=False)  # no scaler takes part
        self._raise_error()
        return found

    def flush(self):
        self.require_settled("flush()")

    def require_settled(self, what):
        if self._under_way is not None:
            raise MismatchError(
                f"rank {self.averager.comm.rank}: {what} while the gradient of step "
                f"{self._under_way} is under way (delay=1): call reducer.deliver() on all ranks "
                "first, which applies it")


class Peers(Synchronous):
    """Nothing is waited for: what has arrived by the end of a step is handed out in it."""

    asynchronous = late = True

    def __init__(self, averager):
        super().__init__(averager)
        self.irreplaceable = (
            f"exchange={averager.method.exchange} applies packets as they come, and nobody "
            "knows which of a dead rank's have come where")

    def decode_others(self):
        # what the others have sent counts all the same; not in a dense warm-up
        return self.decode() if self.averager.exchange.asynchronous else []

    def _settle(self, reason):
        """Everything sent is received, and all ranks are at the same step."""
        a = self.averager
        self.begin()
        a.stats.reason = a.method.name  # also of answers to those who are still on the way
        with a.stats.stage("wait"):
            a.step = a.link.exchange.settle(a.step, a.link.timeout)
        a.stats.reason = reason

    def _decode_rest(self) -> list:
        """Hand out what was received and not applied; the buckets that have some of it."""
        a, found = self.averager, []
        a.buckets.clear()
        for bucket in a.buckets:
            if a.link.exchange.rest_of(bucket.codec, a.share):
                found.append(bucket)
                for slot in bucket.slots:
                    slot.give_back()
        return found

    def deliver(self):
        self._settle("deliver")
        found = self._decode_rest()
        self.averager.current.finished |= bool(found)
        return found or None

    def flush(self):
        self._settle("flush")
        self._decode_rest()

    def require_settled(self, what):
        if not self.averager.link.exchange.settled:
            raise MismatchError(
                f"rank {self.averager.comm.rank}: {what} while packets are under way, which nobody "
                "would have after a restart: call reducer.deliver() on all ranks first")


def _like(bucket):
    """Zeros in the kind of memory that the bucket has."""
    return kernels.of(bucket.grad).zeros(bucket.layout.size)
