"""Hooks of optimizers: the exchange ends before step(), and a new step begins after it."""

import weakref

import numpy as np
import torch

from mpicomp.errors import SpecError
from mpicomp.reducer import amp, copies, suits
from mpicomp.reducer.every_step import before_every_step, checkers

_attached = weakref.WeakKeyDictionary()  # optimizer: the OptimizerHooks that it has


def reducers_of(optimizer) -> list:
    """The Reducers that are attached to an optimizer."""
    return [hooks.reducer for hooks in _attached.get(optimizer, [])]


class OptimizerHooks(copies.Uncopied):
    """Has the Reducer finish before an optimizer steps, and begin anew when all have stepped.

    known  the ids of all parameters that the Reducer exchanges, which it keeps alive
    """

    def __init__(self, reducer, gradients):
        self._reducer, self.gradients = weakref.ref(reducer), gradients
        self.known = {id(p) for _, p in gradients.parameters}
        self._handles, self._stepped = [], set()
        gradients.listeners.append(self)
        before_every_step(self)

    @property
    def reducer(self):
        """The Reducer whose hooks these are."""
        return self._reducer()

    def begin(self):
        """A new step."""
        self._stepped.clear()

    def attach(self, optimizer, scaler):
        """See Reducer.attach."""
        g = self.gradients
        if getattr(optimizer, "sends", None) is not None and g.sends is None:
            raise SpecError(
                f"attach: {type(optimizer).__name__} has something else sent than gradients, which "
                "the Reducer must know: type  mpicomp.DistributedOptimizer(optimizer, "
                "model.named_parameters(), method=...)")
        if scaler is not None:
            amp.refuse_raise(g.settings.nonfinite)
            if g.mode.asynchronous:
                raise SpecError(f"a GradScaler needs a synchronous exchange, found {g.method!r}")
            amp.follow_scale(g.buckets.slots, scaler)
            amp.finish_before_unscale(self.reducer, scaler)
        try:
            handles = [optimizer.register_step_pre_hook(self._before_step),
                       optimizer.register_step_post_hook(self._after_step)]
        except AttributeError as error:
            raise SpecError(f"attach: {type(optimizer).__name__} found, expected a torch.optim."
                            "Optimizer that has called super().__init__(): where it wraps another "
                            f"optimizer, attach that one ({error})") from error
        copies.mark(optimizer)
        self._handles += filter(None, handles)  # somebody's own optimizer may give none
        g.optimizers.append(optimizer)
        note = suits.note(optimizer, g.method)
        if note and g.sends is None:  # beside another one it has its own cases of a rule
            g.say(note)
        _attached.setdefault(optimizer, []).append(self)

    def remove(self):
        """No optimizer is attached any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for optimizer in self.gradients.optimizers:
            _attached[optimizer].remove(self)
            if not _attached[optimizer]:
                copies.release(optimizer)
        checkers.discard(self)

    def before_step_of(self, optimizer):
        """SpecError where an optimizer that is not attached would use this rank's gradients."""
        g = self.gradients
        if (_attached.get(optimizer) or not g.optimizers or g.current.finished
                or not any(slot.ready for slot in g.buckets.slots)):
            return
        if any(id(p) in self.known and p.grad is not None
               for group in getattr(optimizer, "param_groups", ()) for p in group["params"]):
            raise SpecError(
                f"rank {g.comm.rank}: step() of another {type(optimizer).__name__} than "
                "the one that the Reducer is attached to: it would use this rank's gradients. "
                "Type  reducer.attach(optimizer)  for it, too")

    @torch.compiler.disable
    def _before_step(self, optimizer, args, kwargs):
        """Finish; where step is given a closure that runs backward itself, finish after that."""
        g, closure = self.gradients, kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._finish_for_step(optimizer)
            return None

        if g.mode.late:
            raise SpecError(
                f"step(closure) with {g.method!r}, which gives the closure the gradient of "
                "another call: use a synchronous exchange without delay, or step() without a "
                "closure")
        g.compare()  # the closure may change parameters by what is this rank's alone (SAM)

        @torch.compiler.disable
        def averaged():
            loss = closure()
            self._finish_for_step(optimizer)
            return self._mean_loss(loss)

        if "closure" in kwargs:
            return args, {**kwargs, "closure": averaged}
        return (args[0], averaged, *args[2:]), kwargs

    @torch.compiler.disable
    def _after_step(self, optimizer, args, kwargs):
        """When every attached optimizer has stepped, the next step begins."""
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self.gradients.optimizers):
            self._stepped.clear()
            self.gradients.begin()

    def _mean_loss(self, loss):
        """The closure's loss over all ranks: what an optimizer decides by must be the same."""
        g = self.gradients
        if loss is None or g.mode.asynchronous or g.comm.size == 1:
            return loss
        loss = loss.detach() if isinstance(loss, torch.Tensor) else loss
        (total,) = g.link.sum(np.array([float(loss)]), "loss", "adding up the closure's loss")
        mean = float(total * g.weight)
        return torch.full_like(loss, mean) if isinstance(loss, torch.Tensor) else mean

    # ---- parameters that nobody exchanges ----

    def _finish_for_step(self, optimizer):
        """Finish, and what was said is the past. SpecError, on all ranks, for strangers."""
        if problem := self._strangers(optimizer):
            self.gradients.problem(problem)
        self.reducer.finish()
        if problem:  # where the exchange was over before
            raise SpecError(f"rank {self.gradients.comm.rank}: {problem}")
        self.gradients.commit()

    def _strangers(self, optimizer) -> str | None:
        """Would the optimizer step on a gradient that is this rank's alone?"""
        groups = getattr(optimizer, "param_groups", ())  # somebody's own may have none
        known = set().union(*(hooks.known for hooks in _attached[optimizer]))
        strangers = [p for group in groups for p in group["params"] if id(p) not in known]
        odd = [p for p in strangers if p.grad is not None]
        if odd:
            return (
                f"{type(optimizer).__name__} has {len(odd)} parameters with a gradient that the "
                f"Reducer does not know, the first of shape {list(odd[0].shape)}: it would be "
                "another one on each rank. Give all of model.named_parameters() to the Reducer; "
                "after add_param_group, or after unfreezing a layer, close() it and make a new one")


class Given:
    """What `finish` has left in p.grad, where no optimizer is attached: has a new step begun?"""

    def __init__(self):
        self._marks = {}

    def remember(self, named):
        """Keep in mind p.grad of these (name, parameter) pairs."""
        self._marks = {name: _mark(p.grad) for name, p in named}

    def is_gone(self, named) -> bool:
        """Has p.grad been taken away, replaced or zeroed since?"""
        if not self._marks:
            return False
        now = {name: p.grad for name, p in named}
        had = {name: (ref and ref(), version) for name, (ref, version) in self._marks.items()}
        if any(now[name] is not gradient for name, (gradient, _) in had.items()):
            return True
        gradients = [(now[name], version) for name, (_, version) in had.items()
                     if now[name] is not None]
        return bool(gradients) and not any(g._version == version or g.is_sparse or g.any()
                                           for g, version in gradients)


def _mark(gradient):
    return (None, 0) if gradient is None else (weakref.ref(gradient), gradient._version)
