"""A gradient whose exchange is under way: whoever reads or changes it waits for the mean first."""

import torch


class Pending(torch.Tensor):
    """What p.grad is from its hook in backward() until the exchange is finished.

    It shares the memory of `tensor`, an ordinary one. Every operation on it, reading included,
    first calls `finish` and then works on `tensor`, which holds the mean by then: so
    torch.nn.utils.clip_grad_norm_, p.grad.mul_(0.5) or print(p.grad) after loss.backward() see
    what optimizer.step() will use. In backward() itself nothing can be finished: hooks of the
    user's own see this rank's gradient, and what they change is exchanged.
    """

    @staticmethod
    def of(tensor, finish):
        """A Pending in the memory of `tensor`, which calls finish() when it is used."""
        pending = tensor.detach().as_subclass(Pending)
        pending.tensor, pending.finish = tensor, finish
        return pending

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if torch._C._current_graph_task_id() < 0:  # not inside of backward()
            for pending in _found((args, kwargs)):
                pending.finish()
        kwargs = {name: _plain(value) for name, value in (kwargs or {}).items()}
        return function(*_plain(tuple(args)), **kwargs)


def plain(tensor):
    """The ordinary tensor that a Pending stands for; anything else as it is."""
    return tensor.tensor if type(tensor) is Pending else tensor


def _plain(value):
    """The same for arguments, in lists and tuples too."""
    if isinstance(value, (list, tuple)):
        parts = [_plain(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return plain(value)


def _found(value):
    """All that are Pending in nested arguments."""
    if type(value) is Pending:
        yield value
    elif isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _found(part)
