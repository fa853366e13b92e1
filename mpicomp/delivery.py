"""Delivery: what a Reducer does where a stretch of steps ends, so that nothing is under way."""

import numpy as np

from mpicomp.errors import MismatchError, SpecError


class Delivery:
    """The part of the Reducer that says and applies what is left: `deliver` and `flush`."""

    def deliver(self):
        """Receive and apply everything that any rank has sent. Collective, between two steps.

        For exchange=peers, exchange=server and delay=1: call it on all ranks before replicas are
        compared, evaluated or saved, and before a rank ends; otherwise nothing is under way, and
        it does nothing. A rank in deliver() holds nobody back, and all ranks go on from the largest
        of their steps.

        peers: what had not been applied is applied by one more step() of the attached optimizers;
        without one the sum is left in p.grad. Replicas then agree up to rounding, with plain SGD.

        Raises StallError, naming the ranks, if they do not come within `stall_timeout`.
        """
        if self._delay:
            self._delay.deliver(self._optimizers)
        if not self._exchange.asynchronous:
            return
        self._settle()
        if not self._decode_rest():
            return
        self._finished = True  # p.grad is what step() is to use
        for optimizer in self._optimizers:
            optimizer.step()
        if self._optimizers:
            self._forget_gradients()

    def flush(self):
        """Make every p.grad the mean (or sum) of what all ranks still owe; residuals become zero.

        Call it on all ranks between two steps, then optimizer.step(): afterwards all that was given
        has been said (Dryden 2016 does so at the end of each epoch). float32, uncompressed. With an
        asynchronous exchange what is under way is delivered first, and added.
        """
        if self.method.adagrad:
            raise SpecError("flush: with adagrad=yes the second residual is no gradient, and "
                            "cannot be added to the first")
        if self._delay:
            self._delay.require_settled("flush()")
        if self._exchange.asynchronous:
            self._settle()
            self._decode_rest()
        from mpi4py import MPI

        weight = np.float32(1.0 / self.comm.size if self.average else 1.0)
        for bucket, mail in zip(self._buckets, self._mail):
            owed = mail.persistent()
            mine, total = sum(owed.values(), np.zeros_like(bucket.grad)), np.zeros_like(bucket.grad)
            self.stats.reason = "flush"
            self.stats.count("Allreduce", mine.nbytes, mine.nbytes)
            self.comm.Allreduce(mine, total, MPI.SUM)
            total *= weight
            if self._exchange.asynchronous:
                bucket.grad += total
            else:
                bucket.grad[...] = total
            mail.restore({kind: np.zeros_like(array) for kind, array in owed.items()})
            for slot in bucket.slots:
                slot.give_back()
        self._finished = True

    def _settle(self):
        """Everything sent is received, and all ranks are at the same step."""
        if not self._finished and any(s.ready for b in self._buckets for s in b.slots):
            raise MismatchError(f"rank {self.comm.rank}: deliver() or flush() in the middle of "
                                "a step: call it after optimizer.step()")
        self.stats.reason = "deliver"
        with self.stats.stage("wait"):
            self.step = self._exchange.settle(self.step, self._pipeline.timeout)

    def _decode_rest(self) -> bool:
        """What was received and not applied becomes p.grad; False if there is nothing on any."""
        weight = 1.0 / self.comm.size if self.average else 1.0
        self._forget_gradients()
        found = False
        for bucket, mail in zip(self._buckets, self._mail):
            if self._exchange.rest_of(mail, weight):
                found = True
                for slot in bucket.slots:
                    slot.give_back()
        return found

    def _forget_gradients(self):
        for bucket in self._buckets:
            for slot in bucket.slots:
                slot.parameter.grad = None

    def _require_settled(self, what):
        """Raise unless nothing is under way."""
        if self._delay:
            self._delay.require_settled(what)
        if not self._exchange.settled:
            raise MismatchError(
                f"rank {self.comm.rank}: {what} while packets are under way, which nobody would "
                "have after a restart: call reducer.deliver() on all ranks first")
