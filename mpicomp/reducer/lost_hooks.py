"""DDP whose hooks torch has dropped: every rank would step on gradients of its own, silently.

DDP's hooks sit on the node of the graph that accumulates a parameter's gradient. Where a parameter
changes its dtype, be it there and back (model.double(); model.float()), torch makes a new node.
"""

import weakref

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mpicomp.errors import SpecError

_watched = weakref.WeakSet()  # all Nodes whose HookState is still there
_hook = []  # of all optimizers, once it is there


class Nodes:
    """The nodes that accumulate the gradients of a Reducer's parameters, as they are now."""

    def __init__(self, reducer):
        self._reducer, self._step = reducer, reducer.step
        self._nodes = {id(p): (name, p, _node(p)) for name, p in reducer.named}
        for other in list(_watched):
            if not self._nodes.keys().isdisjoint(other._nodes):
                _watched.discard(other)  # of a DDP that was made anew
        _watched.add(self)
        if not _hook:
            _hook.append(register_optimizer_step_pre_hook(_before_step))

    def check(self, optimizer):
        """SpecError where DDP has exchanged nothing since the last step, and why is known."""
        if self._reducer.step != self._step:
            self._step = self._reducer.step
            return
        for p in [p for group in optimizer.param_groups for p in group["params"]]:
            name, _, node = self._nodes.get(id(p), (None, None, None))
            if name is not None and p.grad is not None and _node(p) is not node:
                raise SpecError(
                    f"{name!r} has changed its dtype since DistributedDataParallel was made "
                    "(model.double(), .half(), even there and back), by which torch drops DDP's "
                    "hooks: nothing was exchanged. Convert the model first, then make "
                    "DistributedDataParallel and HookState anew")


@torch.compiler.disable
def _before_step(optimizer, args, kwargs):
    for nodes in list(_watched):
        nodes.check(optimizer)


def _node(parameter):
    with torch.enable_grad():
        return parameter.expand_as(parameter).grad_fn.next_functions[0][0]
