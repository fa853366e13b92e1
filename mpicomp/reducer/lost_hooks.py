"""Notices that torch has dropped DDP's hooks, without which each rank steps on its own gradients.

DDP's hooks belong to the node of the graph that accumulates a parameter's gradient. When a
parameter changes its dtype, even there and back (model.double(); model.float()), torch makes a new
node.
"""

import torch

from mpicomp.errors import SpecError
from mpicomp.reducer.every_step import before_every_step, checkers


class Nodes:
    """The nodes that accumulate the gradients of an averager's parameters when this is made."""

    def __init__(self, gradients):
        self._gradients, self._step = gradients, gradients.step
        self._nodes = {id(p): (name, p, _node(p)) for name, p in gradients.named}
        for other in list(checkers):
            if isinstance(other, Nodes) and not self._nodes.keys().isdisjoint(other._nodes):
                checkers.discard(other)  # of an earlier DDP of the same parameters
        before_every_step(self)

    def before_step_of(self, optimizer):
        """SpecError if nothing was exchanged since the last step because hooks were dropped."""
        if self._gradients.step != self._step:
            self._step = self._gradients.step
            return
        for p in [p for group in optimizer.param_groups for p in group["params"]]:
            name, _, node = self._nodes.get(id(p), (None, None, None))
            if name is not None and p.grad is not None and _node(p) is not node:
                raise SpecError(
                    f"{name!r} has changed its dtype since DistributedDataParallel was made "
                    "(model.double(), .half(), even there and back), by which torch drops DDP's "
                    "hooks: nothing was exchanged. Convert the model first, then make "
                    "DistributedDataParallel and HookState anew")


def _node(parameter):
    """The node of the graph that accumulates the parameter's gradient, now."""
    with torch.enable_grad():
        return parameter.expand_as(parameter).grad_fn.next_functions[0][0]
