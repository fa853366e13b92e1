"""The momentum in place of the gradient: what OneBitAdam sends once v is frozen."""

import sys

import torch

from mpicomp.reducer.optimizer_hooks import reducers_of
from mpicomp.reducer.sends import Sends


class Momentum(Sends):
    """Each rank sends b1 * (mean momentum of the last step) + (1 - b1) * its gradient.

    Elements whose v is 0 are left out: they are sent as 0, and what comes back for them is 0.

    ignored  how many gradients of such elements, not 0, this rank has left out
    """

    def __init__(self, optimizer):
        self._optimizer, self.ignored = optimizer, 0

    @property
    def dense(self):
        return not self._optimizer.frozen

    @property
    def facts(self):
        return f"{type(self._optimizer).__name__}({self._optimizer.rule})"

    def refusal(self, method, settings, rows):
        name = type(self._optimizer).__name__
        if method.asynchronous:
            return (f"{name} needs momenta that are equal on all ranks, found exchange="
                    f"{method.exchange}: use exchange=allgather or sharded")
        if method.delay:
            return (f"{name} found with delay=1: the momentum of the last step must have arrived "
                    "before the next is sent: leave delay out")
        if method.warmup:
            return (f"{name} found with warmup={method.warmup}: it exchanges its own first steps "
                    "dense, until v is frozen: leave warmup out, and give it freeze=")
        if method.adagrad:
            return f"{name} found with adagrad=yes, which is an optimizer, too: leave one out"
        if not settings.average:
            return f"{name} found with average=False, but its momentum is a mean: leave it out"
        if rows:
            return (f"{name} found with sparse={rows[0][0]!r}: as torch's AdamW it takes dense "
                    "gradients only: leave sparse= out, or give that table an optimizer of its own")

    @torch.no_grad()
    def load(self, bucket):
        known = self._optimizer.beta1_of
        for slot in bucket.slots:
            if slot.parameter not in known or slot.frozen:
                continue  # another optimizer's; or it stands still, and zeros are sent
            mean = self._optimizer.state[slot.parameter]["exp_avg"].to(slot.view)
            dead = self._optimizer.dead_of(slot.parameter)
            if dead is not None:
                dead = dead.to(slot.view.device)
                self._count(slot, dead)
            torch.lerp(mean, slot.view, 1 - known[slot.parameter], out=slot.view)
            if dead is not None:
                slot.view.masked_fill_(dead, 0.0)

    def _count(self, slot, dead):
        """Note the gradients of dead elements, which nobody applies; the first time, say so."""
        found = int(torch.count_nonzero(slot.view[dead]))
        if found and not self.ignored:
            rank = reducers_of(self._optimizer)[0].comm.rank
            print(f"mpicomp: rank {rank}: {found} elements of {slot.name!r} have a gradient, which "
                  "no rank had before v was frozen: "
                  f"{type(self._optimizer).__name__} leaves these and all others like them alone, "
                  "but for weight decay (optimizer.sends.ignored counts them). Freeze later, or "
                  "give the parameter an optimizer of its own", file=sys.stderr)
        self.ignored += found

    @torch.no_grad()
    def unload(self, bucket):
        for slot in bucket.slots:
            dead = self._optimizer.dead_of(slot.parameter)
            if dead is not None:
                slot.view.masked_fill_(dead.to(slot.view.device), 0.0)
