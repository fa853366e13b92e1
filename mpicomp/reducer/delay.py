"""One step of delay: a gradient is exchanged while the next step computes, and used after that.

The double buffering of 1-bit SGD (Seide 2014, section 3.1; CNTK's useBufferedAsyncGradient-
Aggregation): what is exchanged in step t is applied in step t + 1, so the model is one step stale
and the exchange has the time of a forward and most of a backward pass. In the first step nothing
is applied (p.grad is None), and what is under way at the end is applied by `Reducer.deliver`.
Replicas stay bit-identical: the delay is the same on all ranks.
"""

from mpicomp import kernels
from mpicomp.errors import MismatchError, NonFiniteError
from mpicomp.reducer import amp
from mpicomp.transport import packet


class Delay:
    """What a Reducer has under way, and what has landed and waits to be used.

    Every bucket has a second array, `bucket.flight`, which the exchange works on, and a third in
    `late`, so that backward can fill the first meanwhile: two copies a step.

    step     the step whose exchange is under way, or None
    landed   buckets whose array in `late` is this step's gradient
    skipped  a gradient of the step that landed was not finite: it is applied nowhere
    error    what `finish` is to raise because of that, or None
    """

    def __init__(self, reducer):
        self.reducer, self.step, self.landed = reducer, None, set()
        self.skipped, self.error = False, None
        for bucket in reducer._buckets:
            bucket.flight = self._like(bucket)
        self.late = [self._like(bucket) for bucket in reducer._buckets]

    @staticmethod
    def _like(bucket):
        """Zeros in the kind of memory that the bucket has."""
        return kernels.of(bucket.grad).zeros(bucket.layout.size)

    def launch(self, bucket):
        """Before a bucket is sent: what is under way must be here, and the gradient is copied."""
        self.land()
        bucket.flight[...] = bucket.grad

    def land(self):
        """Wait for the exchange that is under way, if one is, and decode it."""
        if self.step is None:
            return
        r = self.reducer
        r.step, now, self.step = self.step, r.step, None  # its own keys, lane and messages
        try:
            with r.stats.stage("wait"):
                r._pipeline.drain()
            exchange, mails = r._lane
            self.landed.clear()
            self.skipped = any(mail.flagged(packet.NONFINITE) for mail in mails)
            if self.skipped:
                self._note_error()
                return
            weight = 1.0 / r.comm.size if r.average else 1.0
            with r.stats.stage("decode"):
                for bucket, mail in zip(r._buckets, mails):
                    if len(mail.flagged(packet.EMPTY)) < len(mail.headers):
                        exchange.decode(mail, r.step, weight)
                        mail.commit()
                        r._changes.put_back(bucket, mail)
                        self.late[bucket.index][...] = bucket.flight
                        self.landed.add(bucket.index)
        finally:
            r.step = now

    def _note_error(self):
        """Landing happens inside of backward; the error belongs to `finish`."""
        try:
            self.reducer._changes.tell()
        except NonFiniteError as error:
            self.error = error

    def finish(self):
        """All buckets of this step are on their way; p.grad becomes what has landed, or None."""
        self._hand_out()
        self.step = self.reducer.step
        self.reducer._outcome = "skipped" if self.skipped else None
        self.reducer._end_step(self.skipped)
        self._raise_error()

    def _raise_error(self):
        error, self.error, self.skipped = self.error, None, False
        if error:
            raise error

    def _hand_out(self):
        """Let p.grad be what has landed, None where nothing has."""
        self.reducer._finished = True  # p.grad is what step() is to use
        for bucket in self.reducer._buckets:
            bucket.grad[...] = self.late[bucket.index]
            for slot in bucket.slots:
                if bucket.index in self.landed:
                    slot.give_back()
                else:
                    slot.clear()
        self.landed.clear()

    def deliver(self, optimizers):
        """Land what is under way and step on it; without an optimizer it is left in p.grad.

        It is handed out without a loss scale, since no scaler takes part.
        """
        if self.step is None:
            return
        self.reducer._changes.replan()
        self.land()
        with amp.true_units(self.reducer._order.slots):
            self._hand_out()
        self._raise_error()
        for optimizer in optimizers:
            optimizer.step()

    def require_settled(self, what):
        """Raise unless nothing is under way."""
        if self.step is not None:
            raise MismatchError(
                f"rank {self.reducer.comm.rank}: {what} while the gradient of step {self.step} is "
                "under way (delay=1): call reducer.deliver() on all ranks first, which applies it")
