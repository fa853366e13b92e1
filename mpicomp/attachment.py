"""Attachment: what ties a Reducer to the user's optimizers, and what these may not step on."""

import weakref

import numpy as np
import torch

from mpicomp import amp, copies, mpi
from mpicomp.errors import SpecError

_reducers = weakref.WeakKeyDictionary()  # optimizer: those that are attached to it


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
        copies.mark(optimizer)
        handles = [optimizer.register_step_pre_hook(self._before_step),
                   optimizer.register_step_post_hook(self._after_step)]
        self._hooks += filter(None, handles)  # somebody's own optimizer may give none
        self._optimizers.append(optimizer)
        _reducers.setdefault(optimizer, []).append(self)
        return self

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
            self._refuse_strangers(optimizer)
            return self.finish()

        @torch.compiler.disable
        def averaged():
            loss = closure()
            self._refuse_strangers(optimizer)
            self.finish()
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

    def _refuse_strangers(self, optimizer):
        """Raise where the optimizer would step on a gradient that is this rank's alone."""
        groups = getattr(optimizer, "param_groups", ())  # somebody's own may have none
        count = sum(len(group["params"]) for group in groups)
        attached = _reducers[optimizer]
        seen, strangers = self._strangers.get(optimizer, (None, ()))
        if seen != (count, len(attached)):
            known = {id(p) for reducer in attached for _, p in reducer._all_parameters}
            strangers = [p for group in groups for p in group["params"] if id(p) not in known]
            self._strangers[optimizer] = (count, len(attached)), strangers
        odd = [p for p in strangers if p.grad is not None]
        if odd:
            raise SpecError(
                f"{type(optimizer).__name__} has {len(odd)} parameters with a gradient that the "
                f"Reducer does not know, the first of shape {list(odd[0].shape)}: it would be "
                "another one on each rank. Give all of model.named_parameters() to the Reducer; "
                "after add_param_group, or after unfreezing a layer, close() it and make a new one")

    @property
    def _all_parameters(self):
        """(name, parameter) of all that this Reducer exchanges."""
        return self._named + self._rows.named

    # ---- without an optimizer ----

    def _remember_given(self):
        """Keep in mind what `finish` has left in p.grad, to know later that a new step began."""
        self._given = {slot.name: _mark(slot.parameter.grad) for slot in self._order.slots}

    def _begun_anew(self) -> bool:
        """Has p.grad been taken away, replaced or zeroed since `finish` left it there?"""
        if not self._given:
            return False
        now = {slot.name: slot.parameter.grad for slot in self._order.slots}
        had = {name: (ref and ref(), version) for name, (ref, version) in self._given.items()}
        if any(now[name] is not gradient for name, (gradient, _) in had.items()):
            return True
        gradients = [(now[name], version) for name, (_, version) in had.items()
                     if now[name] is not None]
        return bool(gradients) and not any(g._version == version or g.any()
                                           for g, version in gradients)


def _mark(gradient):
    return (None, 0) if gradient is None else (weakref.ref(gradient), gradient._version)
