"""The momentum in place of the gradient: what OneBitAdam sends once v is frozen."""

import sys

import torch

from mpicomp.reducer.optimizer_hooks import reducers_of
from mpicomp.reducer.sends import Sends

_WHAT = {True: "v is frozen", False: "v is not frozen"}


class Momentum(Sends):
    """Each rank sends b1 * (mean momentum of the last step) + (1 - b1) * its gradient.

    Elements whose v is 0 stand still: 0 is given for them, and what comes back is taken for 0. The
    method encodes them with all others: its scale counts them, and what it sends of them is owed.

    ignored  how many gradients of such elements, not 0, this rank has left out in steps that
             were exchanged
    """

    def __init__(self, optimizer):
        self._optimizer, self.ignored, self._found = optimizer, 0, {}
        self.dense = True  # a Reducer settles it

    def settle(self):
        self.dense = not self._optimizer.frozen

    def problem(self):
        if self.dense == self._optimizer.frozen:
            return (f"{type(self._optimizer).__name__} has loaded a state in which "
                    f"{_WHAT[self.dense]}, while the Reducer goes on as before: type, on all ranks,"
                    "  reducer.load_state_dict(state)  too, that of the same step; "
                    "reducer.state_dict() is the present one")
        return None

    @property
    def place(self):
        return _WHAT[True] if self._optimizer.frozen else ""

    @property
    def note(self):
        return f"{self.facts}: steps are exchanged dense until v is frozen"

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
        if not self._optimizer.frozen:
            return  # `problem` has this step refused
        known, states = self._optimizer.beta1_of, self._optimizer.state
        for slot in bucket.slots:
            if slot.parameter not in known or slot.frozen:
                continue  # another optimizer's; or it stands still, and zeros are sent
            state = states[slot.parameter] if slot.parameter in states else None
            mean = state["exp_avg"].to(slot.view) if state else torch.zeros_like(slot.view)
            dead = self._optimizer.dead_of(slot.parameter)
            if dead is not None:
                dead = dead.to(slot.view.device)
                self._found[slot.name] = int(torch.count_nonzero(slot.view[dead]))
            torch.lerp(mean, slot.view, 1 - known[slot.parameter], out=slot.view)
            if dead is not None:
                slot.view.masked_fill_(dead, 0.0)

    def _count(self, slot):
        """Note the gradients of dead elements, which nobody applies; the first time, say so."""
        found = self._found.pop(slot.name, 0)
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
        known = self._optimizer.beta1_of
        for slot in bucket.slots:
            dead = self._optimizer.dead_of(slot.parameter) if slot.parameter in known else None
            if dead is not None:
                self._count(slot)
                slot.view.masked_fill_(dead.to(slot.view.device), 0.0)
