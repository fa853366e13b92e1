"""What Horovod's DistributedOptimizer does beside exchanging: several backward passes in a step."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps

import torch

from mpicomp.errors import MismatchError, NonFiniteError, SpecError
from mpicomp.reducer import Reducer, copies


class Passes(copies.Uncopied):
    """Counts the backward passes of each parameter in a step; all but the last only accumulate.

    Its hooks must be called before those of the Reducer, so it is made first.

    optimizer  the optimizer, which gets the methods of Horovod's
    named      (name, parameter) pairs of all that is exchanged
    passes     backward passes in a step
    """

    def __init__(self, optimizer, named, passes):
        self.passes, self.optimizer, self.reducer = passes, optimizer, None
        self._counts, self._accumulating = Counter(), ExitStack()
        self._parameters = [p for _, p in named if p.requires_grad]
        self._names = {id(p): name for name, p in named}
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._came)

    def attach(self, reducer: Reducer):
        """Have the optimizer exchange by this Reducer (nonfinite="skip"), and behave as Horovod's.
        """
        self.reducer = self.optimizer.reducer = reducer.attach(self.optimizer)
        self.optimizer.register_step_pre_hook(self._before_step)  # after the Reducer's own
        self.optimizer.register_step_post_hook(self._after_step)
        self.optimizer.synchronize = self.synchronize
        self.optimizer.skip_synchronize = self.skip_synchronize
        self.optimizer.set_backward_passes_per_step = self.set_backward_passes_per_step
        self.optimizer.zero_grad = self._guarded(self.optimizer.zero_grad)

    @property
    def _under_way(self) -> bool:
        """Has a backward pass brought gradients that are not exchanged yet?"""
        averager = self.reducer.averager
        return bool(self._counts) and not averager.current.finished and not averager.closed

    @property
    def _skipped(self) -> bool:
        """Was the last exchange given up because of a NaN or Inf?"""
        return self.reducer.averager.current.outcome == "skipped"

    # ---- hooks ----

    @torch.compiler.disable
    def _came(self, parameter):
        """The gradient of a parameter is complete, in one of the passes."""
        if self.reducer is None or self.reducer.averager.closed:
            return
        if self.reducer.averager.current.finished:  # the first gradient of a new step
            self._forget()
        self._counts[id(parameter)] += 1
        count = self._counts[id(parameter)]
        if count > self.passes > 1:
            self.reducer.averager.give_up()
            raise MismatchError(
                f"rank {self.reducer.comm.rank}: backward() brought gradient {count} of "
                f"{self._names[id(parameter)]!r} in one step, expected at most {self.passes}: call "
                f"optimizer.step() in between, or type  backward_passes_per_step={count}")
        self._accumulate(count < self.passes)

    def _accumulate(self, wanted):
        """From now on gradients only accumulate, or are exchanged."""
        self._accumulating.close()
        if wanted:
            self._accumulating.enter_context(self.reducer.no_sync())

    def _before_step(self, optimizer, args, kwargs):
        """No step where the exchange has found NaN, unless a scaler that knows (fused=True) asks.

        A closure is not called yet, so there is nothing to be said.
        """
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None and self._skipped and not hasattr(optimizer, "found_inf"):
            raise NonFiniteError(
                f"step {self.reducer.step - 1}: the gradient holds NaN or Inf on some rank, and no "
                "rank makes this step. Under a GradScaler call optimizer.synchronize() after "
                "backward(): then all ranks skip such a step")

    def _after_step(self, optimizer, args, kwargs):
        self._forget()

    def _forget(self):
        """No pass of this step has been made."""
        self._counts.clear()
        self._accumulate(False)

    # ---- what the optimizer gets ----

    def synchronize(self) -> None:
        """Finish the exchange: every p.grad is the mean (op=Sum: the sum) from now on.

        Where it is not finite on some rank, every p.grad is NaN on all ranks, for a GradScaler to
        see; step() then raises NonFiniteError.
        """
        self.reducer.finish()
        self._forget()
        if self._skipped:
            for parameter in self._parameters:
                parameter.grad = torch.full_like(parameter, float("nan"))

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """For step() after synchronize(). An exchange is never made twice, so nothing is to do."""
        yield

    def set_backward_passes_per_step(self, passes: int) -> None:
        """From the next step on."""
        refuse_passes(passes)
        self.passes = passes

    def _guarded(self, inner):
        """The optimizer's zero_grad, refused while gradients are under way."""
        @wraps(inner)
        def zero_grad(*args, **kwargs):
            if self._under_way:
                raise SpecError(
                    f"rank {self.reducer.comm.rank}: optimizer.zero_grad() between backward() and "
                    "step(), expected it after optimizer.step() or optimizer.synchronize(): to "
                    "give up this step on all ranks type  optimizer.reducer.discard()")
            return inner(*args, **kwargs)

        return zero_grad


def refuse_passes(passes):
    """SpecError for what is no number of backward passes."""
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise SpecError(f"backward_passes_per_step={passes!r} found, expected a whole number, at "
                        "least 1")
