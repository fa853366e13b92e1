"""Delivery: what a Reducer does where a stretch of steps ends, so that nothing is under way."""

import numpy as np
import torch

from mpicomp import kernels, mpi
from mpicomp.errors import MismatchError, SpecError
from mpicomp.reducer import amp
from mpicomp.reducer.memory import on_place
from mpicomp.reducer.shard_optimizer import ShardOptimizer
from mpicomp.transport import staging


class Delivery:
    """The part of the Reducer that says and applies what is left: `deliver` and `flush`."""

    _saved_shard = None  # of a checkpoint, until the shard's optimizer is made
    _outcome = None  # how the last finish or flush ended: "skipped", "flushed" or well

    @on_place
    def deliver(self):
        """Receive and apply everything that any rank has sent. Collective, between two steps.

        For exchange=peers, exchange=server and delay=1: call it on all ranks before replicas are
        compared, evaluated or saved, and before a rank ends; otherwise nothing is under way, and
        it does nothing. A rank in deliver() holds nobody back, and all ranks go on from the largest
        of their steps.

        peers: what had not been applied is applied by one more step() of the attached optimizers;
        without one the sum is left in p.grad. Replicas then agree up to rounding, with plain SGD.
        server: all parameters are taken over from their owners. Replicas are the same bits.

        Raises StallError, naming the ranks, if they do not come within `stall_timeout`.
        """
        if self._delay or self._exchange.asynchronous:
            self._require_no_step("deliver")
        if self._delay:
            self._delay.deliver(self._optimizers)
        if not self._exchange.asynchronous:
            return
        self._settle("deliver")
        if self._exchange.owns:
            self._take_over()
            return
        if not self._decode_rest():
            return
        self._finished = True  # p.grad is what step() is to use
        for optimizer in self._optimizers:
            optimizer.step()
        if self._optimizers:
            self._forget_gradients()

    @on_place
    def flush(self):
        """Make every p.grad the mean (or sum) of what all ranks still owe; residuals become zero.

        Call it on all ranks between two steps, then optimizer.step(): afterwards all that was given
        has been said (Dryden 2016 does so at the end of each epoch). float32, uncompressed; no loss
        scale is in it, so under a GradScaler it is optimizer.step() as well, not scaler.step. Rows
        (sparse=) owe nothing: their p.grad becomes None. With an asynchronous exchange what is
        under way is delivered first. peers: it is added to p.grad. server: the owners apply what is
        owed as one more push; nothing is left for step().

        Raises MismatchError between backward and the step that it belongs to.
        """
        self._require_no_step("flush")
        if self.method.adagrad:
            raise SpecError("flush: with adagrad=yes the second residual is no gradient, and "
                            "cannot be added to the first")
        self._changes.replan()
        if self._delay:
            self._delay.require_settled("flush()")
        if self._exchange.asynchronous:
            self._settle("flush")
        if self._exchange.owns:
            self._push_owed()
            self._take_over()
            self._finished = True
            return
        if self._exchange.asynchronous:
            self._decode_rest()
        from mpi4py import MPI

        weight = np.float32(1.0 / self.comm.size if self.average else 1.0)
        self.stats.reason = "flush"
        for bucket, mail in zip(self._buckets, self._mail):
            mine = staging.fetched(self._owed(bucket, mail))
            total = np.zeros_like(mine)
            self.stats.count("Allreduce", mine.nbytes, mine.nbytes)
            mpi.wait(self.comm, self.comm.Iallreduce(mine, total, MPI.SUM),
                     self._pipeline.timeout, "adding up what all ranks owe")
            total *= weight
            if self._exchange.asynchronous:
                total += bucket.grad
            bucket.grad[...] = staging.fitting(total, bucket.grad)
            with amp.true_units(bucket.slots):
                for slot in bucket.slots:
                    slot.give_back()
        self._rows.clear()
        self._finished, self._outcome = True, "flushed"

    def _owed(self, bucket, mail):
        """The sum of this rank's residuals of a bucket, which become zero."""
        owed = mail.persistent()
        zeros = kernels.of(bucket.grad).zeros
        total = zeros(bucket.layout.size)
        for array in owed.values():
            total += array
        left = dict.fromkeys(owed, zeros(bucket.layout.size))
        for slot, s in zip(bucket.slots, bucket.layout.segments):
            if slot.frozen and owed:  # what it is owed waits
                left["error"] = left["error"].copy()
                left["error"][s.slice] = total[s.slice]
                total[s.slice] = 0
        mail.restore(left)
        return total

    def _require_no_step(self, what):
        """Raise where gradients have arrived that no step has used."""
        self._changes.commit()  # what finish() has left in p.grad counts as applied
        if not self._finished and any(s.ready for b in self._buckets for s in b.slots):
            raise MismatchError(f"rank {self.comm.rank}: {what}() in the middle of a step: call "
                                "it after optimizer.step()")

    def _settle(self, reason):
        """Everything sent is received, and all ranks are at the same step."""
        self._resume()
        self.stats.reason = self.method.name  # also of answers to those who are still on the way
        with self.stats.stage("wait"):
            self.step = self._exchange.settle(self.step, self._pipeline.timeout)
        self.stats.reason = reason

    # ---- peers ----

    def _decode_rest(self) -> bool:
        """What was received and not applied becomes p.grad; False if there is nothing."""
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
        """No parameter has a gradient; rows are `Sparse.clear`'s."""
        for bucket in self._buckets:
            for slot in bucket.slots:
                slot.clear()

    # ---- server ----

    def _resume(self):
        """Let exchange=server begin to serve, from the parameters as they are now."""
        exchange = self._exchange
        if not (exchange.owns and exchange.settled):
            return
        if exchange.optimizer is None:
            exchange.optimizer = self._make_shard(exchange.latest, exchange.grad)
        if self._saved_shard is not None:
            exchange.optimizer.load_state_dict(self._saved_shard)
            self._saved_shard = None
        exchange.optimizer.read()
        exchange.resume(1.0 / self.comm.size if self.average else 1.0)

    def _make_shard(self, values, gradient):
        own = self._exchange.own
        return ShardOptimizer(self._buckets[0], own.start, own.stop, self._optimizers, values,
                              gradient)

    def _push_owed(self):
        """The owners apply what all ranks owe, if there are residuals at all."""
        bucket, mail = self._buckets[0], self._mail[0]
        if mail.persistent():
            self._exchange.apply_sum(self._owed(bucket, mail))

    def _take_over(self):
        """Every parameter becomes what its owner has, to the bit."""
        bucket = self._buckets[0]
        self._exchange.shares(bucket.grad)
        with torch.no_grad():
            for slot in bucket.slots:
                slot.parameter.copy_(slot.view)
        self._forget_gradients()

    # ---- state ----

    def _require_settled(self, what):
        """Raise unless nothing is under way."""
        self._changes.commit()
        if self._delay:
            self._delay.require_settled(what)
        if not self._exchange.settled:
            raise MismatchError(
                f"rank {self.comm.rank}: {what} while packets are under way, which nobody would "
                "have after a restart: call reducer.deliver() on all ranks first")

    def _shard_state(self) -> dict:
        """{"shard": the state of this rank's shard}; {} unless parameters have owners."""
        exchange = self._exchange
        if not exchange.owns:
            return {}
        if self._saved_shard is not None:
            return {"shard": self._saved_shard}
        shard = exchange.optimizer or self._make_shard(exchange.latest, exchange.grad)
        return {"shard": shard.state_dict()}

    def _restore_shard(self, state):
        """Keep the state of a shard for the next step, when its optimizer is made."""
        if not self._exchange.owns:
            return
        own = self._make_shard(self._exchange.latest, self._exchange.grad).pieces
        if state["pieces"] != own:
            raise MismatchError(f"rank {self.comm.rank}: the saved shard holds {state['pieces']}, "
                                f"expected {own}: load on as many ranks as it was saved on")
        self._saved_shard = state
