"""The mode of exchange=server: the owners of parameters apply gradients by optimizers of theirs."""

import torch

from mpicomp.averager.modes import Peers
from mpicomp.errors import MismatchError
from mpicomp.reducer.shard_optimizer import ShardOptimizer


class Server(Peers):
    """What is handed out is how far each parameter is to be moved; it is moved, and no gradient is
    left. This rank's shard of the parameters has an optimizer, of the kind of the attached one.
    """

    def __init__(self, averager):
        super().__init__(averager)
        self._saved = None  # a shard's state, until its optimizer is made

    @property
    def _exchange(self):
        return self.averager.link.exchange

    def begin(self):
        """Begin to serve, from the parameters as they are now."""
        exchange = self._exchange
        if not exchange.settled:
            return
        if exchange.shard.optimizer is None:
            exchange.shard.optimizer = self._make_shard()
        if self._saved is not None:
            exchange.shard.optimizer.load_state_dict(self._saved)
            self._saved = None
        exchange.shard.optimizer.read()
        exchange.resume(self.averager.share)

    def _make_shard(self):
        shard = self._exchange.shard
        return ShardOptimizer(self.averager.buckets[0], shard.place.start, shard.place.stop,
                              self.averager.optimizers, shard.latest, shard.grad)

    def hand_out(self, buckets):
        for bucket in buckets:
            for slot in bucket.slots:
                slot.move()

    def deliver(self):
        self._settle("deliver")
        self._take_over()

    def flush(self):
        self._settle("flush")

    def owed_is_gone(self, owed):
        bucket = self.averager.buckets[0]
        if bucket.codec.persistent():
            self._exchange.apply_sum(owed(bucket))
        self._take_over()
        return True

    def _take_over(self):
        """Every parameter becomes what its owner has, to the bit."""
        bucket = self.averager.buckets[0]
        self._exchange.shares(bucket.grad)
        with torch.no_grad():
            for slot in bucket.slots:
                slot.parameter.copy_(slot.view)
        self.averager.buckets.clear()

    # ---- state ----

    def state(self):
        if self._saved is not None:
            return {"shard": self._saved}
        return {"shard": (self._exchange.shard.optimizer or self._make_shard()).state_dict()}

    def restore(self, state):
        """Keep the state of a shard for the next step, when its optimizer is made."""
        saved, own = state["shard"], self._make_shard().pieces
        if saved["pieces"] != own:
            raise MismatchError(
                f"rank {self.averager.comm.rank}: the saved shard holds {saved['pieces']}, "
                f"expected {own}: load on as many ranks as it was saved on")
        self._saved = saved
