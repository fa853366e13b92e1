"""Attachment: what ties a Reducer to the user's optimizers, and what these may not step on."""

import weakref
from functools import cached_property

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mpicomp import mpi
from mpicomp.errors import SpecError
from mpicomp.reducer import amp, copies

_reducers = weakref.WeakKeyDictionary()  # optimizer: those that are attached to it
_open = weakref.WeakSet()  # all Reducers with hooks on parameters
_watched = []  # the hook of all optimizers, once it is there


def reducers_of(optimizer) -> list:
    """The Reducers that are attached to an optimizer."""
    return _reducers.get(optimizer, [])


def now_open(reducer):
    """A new Reducer has its hooks on."""
    _open.add(reducer)


@torch.compiler.disable
def _refuse_unattached(optimizer, args, kwargs):
    """Before every step of any optimizer: SpecError where it would use this rank's gradients."""
    if _reducers.get(optimizer):
        return
    mine = None
    for reducer in _open:
        if reducer._optimizers and reducer._hooks and any(
                slot.ready for slot in reducer._order.slots) and not reducer._finished:
            mine = mine or {id(p) for group in getattr(optimizer, "param_groups", ())
                            for p in group["params"] if p.grad is not None}
            if not mine.isdisjoint(reducer._ids):
                raise SpecError(
                    f"rank {reducer.comm.rank}: step() of another {type(optimizer).__name__} than "
                    "the one that the Reducer is attached to: it would use this rank's gradients. "
                    "Type  reducer.attach(optimizer)  for it, too")


class Attachment(copies.Uncopied):
    """The part of the Reducer that finishes before an optimizer steps, and begins anew after it."""

    def attach(self, optimizer, scaler=None):
        """Call `finish` before every optimizer.step(), or at the end of its closure. Returns self.

        The optimizer stays the user's own object. From now on every rank must call step()
        equally often, also where it had no examples. Give a torch.amp.GradScaler here: gradients
        then travel unscaled, and what overflows on one rank all ranks skip.

        A closure's loss becomes the mean over ranks (average=False: the sum), since optimizers
        such as LBFGS decide by it. step() raises SpecError where the optimizer has a parameter with
        a gradient that no attached Reducer knows: it would differ from rank to rank.
        """
        if scaler is not None:
            amp.refuse_raise(self.nonfinite)
            if self._exchange.asynchronous:
                raise SpecError(f"a GradScaler needs a synchronous exchange, found {self.method!r}")
            amp.follow_scale(self._order.slots, scaler)
            amp.finish_before_unscale(self, scaler)
        try:
            handles = [optimizer.register_step_pre_hook(self._before_step),
                       optimizer.register_step_post_hook(self._after_step)]
        except AttributeError as error:
            raise SpecError(f"attach: {type(optimizer).__name__} found, expected a torch.optim."
                            "Optimizer that has called super().__init__(): where it wraps another "
                            f"optimizer, attach that one ({error})") from error
        copies.mark(optimizer)
        self._hooks += filter(None, handles)  # somebody's own optimizer may give none
        if not _watched:
            _watched.append(register_optimizer_step_pre_hook(_refuse_unattached))
        self._optimizers.append(optimizer)
        _reducers.setdefault(optimizer, []).append(self)
        return self

    def finish_for(self, what):
        """`finish`, to read or change p.grad. SpecError where no gradient is left after it."""
        if self._exchange.owns:
            raise SpecError(
                f"rank {self.comm.rank}: {what} has no meaning with exchange=server: the owners "
                "apply gradients, and none is left here. To change a gradient before it is sent "
                "call backward() in  with reducer.no_sync():  and then step()")
        self.finish()

    def _detach(self):
        """No optimizer is attached any more."""
        for optimizer in self._optimizers:
            _reducers[optimizer].remove(self)
            if not _reducers[optimizer]:
                copies.release(optimizer)

    @torch.compiler.disable
    def _before_step(self, optimizer, args, kwargs):
        """Finish; where step is given a closure that runs backward itself, finish after that."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._finish_for_step(optimizer)
            return None

        if self._delay or self._exchange.asynchronous:
            raise SpecError(
                f"step(closure) with {self.method!r}, which gives the closure the gradient of "
                "another call: use a synchronous exchange without delay, or step() without a "
                "closure")
        self.compare()  # the closure may change parameters by what is this rank's alone (SAM)

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
        if len(self._stepped) == len(self._optimizers):
            self._reopen()

    def _mean_loss(self, loss):
        """The closure's loss over all ranks: what an optimizer decides by must be the same."""
        if loss is None or self._exchange.asynchronous or self.comm.size == 1:
            return loss
        loss = loss.detach() if isinstance(loss, torch.Tensor) else loss
        mine, total = np.array([float(loss)]), np.zeros(1)
        self.stats.reason = "loss"
        self.stats.count("Allreduce", mine.nbytes, mine.nbytes)
        mpi.wait(self.comm, self.comm.Iallreduce(mine, total), self._pipeline.timeout,
                 "adding up the closure's loss")
        mean = float(total[0] * self._weight)
        return torch.full_like(loss, mean) if isinstance(loss, torch.Tensor) else mean

    # ---- parameters that nobody exchanges ----

    def _finish_for_step(self, optimizer):
        """Finish, and what was said is the past. SpecError, on all ranks, for strangers."""
        if problem := self._strangers(optimizer):
            self._changes.problem(problem)
        self.finish()
        if problem:  # where the exchange was over before
            raise SpecError(f"rank {self.comm.rank}: {problem}")
        self._changes.commit()

    def _strangers(self, optimizer) -> str | None:
        """Would the optimizer step on a gradient that is this rank's alone?"""
        groups = getattr(optimizer, "param_groups", ())  # somebody's own may have none
        known = set().union(*(reducer._ids for reducer in _reducers[optimizer]))
        strangers = [p for group in groups for p in group["params"] if id(p) not in known]
        odd = [p for p in strangers if p.grad is not None]
        if odd:
            return (
                f"{type(optimizer).__name__} has {len(odd)} parameters with a gradient that the "
                f"Reducer does not know, the first of shape {list(odd[0].shape)}: it would be "
                "another one on each rank. Give all of model.named_parameters() to the Reducer; "
                "after add_param_group, or after unfreezing a layer, close() it and make a new one")

    @cached_property
    def _ids(self):
        """Of all parameters that this Reducer exchanges, which it keeps alive."""
        return {id(p) for _, p in self._all_parameters}

    @property
    def _all_parameters(self):
        """(name, parameter) of all that this Reducer exchanges."""
        return self._named + self._rows.named

    # ---- without an optimizer ----

    def _remember_given(self):
        """Keep in mind what `finish` has left in p.grad, to know later that a new step began."""
        self._given = {name: _mark(p.grad) for name, p in self._all_parameters}

    def _begun_anew(self) -> bool:
        """Has p.grad been taken away, replaced or zeroed since `finish` left it there?"""
        if not self._given:
            return False
        now = {name: p.grad for name, p in self._all_parameters}
        had = {name: (ref and ref(), version) for name, (ref, version) in self._given.items()}
        if any(now[name] is not gradient for name, (gradient, _) in had.items()):
            return True
        gradients = [(now[name], version) for name, (_, version) in had.items()
                     if now[name] is not None]
        return bool(gradients) and not any(g._version == version or g.is_sparse or g.any()
                                           for g, version in gradients)


def _mark(gradient):
    return (None, 0) if gradient is None else (weakref.ref(gradient), gradient._version)
