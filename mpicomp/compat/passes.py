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
    compare    called with another number of them; raises where it cannot be taken on all ranks
    """

    def __init__(self, optimizer, named, passes, compare):
        self.passes, self.optimizer, self.reducer = passes, optimizer, None
        self._wanted, self._compare = passes, compare
        self._counts, self._accumulating, self._not_finite = Counter(), ExitStack(), None
        self._parameters = [p for _, p in named if p.requires_grad]
        self._names = {id(p): name for name, p in named}
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._came)
        optimizer.register_step_pre_hook(self._before_step)

    def attach(self, reducer: Reducer):
        """Have the optimizer exchange by this Reducer, and behave as Horovod's."""
        self.reducer = self.optimizer.reducer = reducer.attach(self.optimizer)
        reducer.averager.listeners.append(self)
        self.optimizer.synchronize = self.synchronize
        self.optimizer.skip_synchronize = self.skip_synchronize
        self.optimizer.set_backward_passes_per_step = self.set_backward_passes_per_step
        self.optimizer.zero_grad = self._guarded(self.optimizer.zero_grad)

    def begin(self):
        """A new step: no pass of it has been made. The Reducer's averager says so."""
        self._counts.clear()
        self.passes = self._wanted
        self._accumulate(False)

    # ---- hooks ----

    @torch.compiler.disable
    def _came(self, parameter):
        """The gradient of a parameter is complete, in one of the passes."""
        if self.reducer is None or self.reducer.averager.closed:
            return
        averager = self.reducer.averager
        with averager.memory.here(), averager.lock:
            averager.begin()  # where the last step is over
        self._not_finite = None
        self._counts[id(parameter)] += 1
        count = self._counts[id(parameter)]
        if count > self.passes > 1:
            averager.give_up()
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
        """No step on the NaN that `synchronize` has left: it is for a GradScaler to see.

        With fused=True the scaler has seen it, and has the optimizer make a step of no effect.
        """
        error, self._not_finite = self._not_finite, None
        if error is not None:
            for parameter in self._parameters:
                parameter.grad = None
            if not hasattr(optimizer, "found_inf"):
                raise error

    # ---- what the optimizer gets ----

    def synchronize(self) -> None:
        """Finish the exchange: every p.grad is the mean (op=Sum: the sum) from now on.

        Where it is not finite on some rank, every p.grad is NaN on all ranks, for a GradScaler to
        see; step() then raises NonFiniteError.
        """
        try:
            self.reducer.finish()
        except NonFiniteError as error:
            self._not_finite = error
            for parameter in self._parameters:
                parameter.grad = torch.full_like(parameter, float("nan"))

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """For step() after synchronize(). An exchange is never made twice, so nothing is to do."""
        yield

    def set_backward_passes_per_step(self, passes: int) -> None:
        """From the next step on; a step that has begun goes on as it is.

        Collective: raises SpecError or MismatchError on all ranks for what is no number of passes,
        or not the same on all of them.
        """
        self._compare(passes)
        self._wanted = passes

    def _guarded(self, inner):
        """The optimizer's zero_grad, refused while gradients are under way."""
        @wraps(inner)
        def zero_grad(*args, **kwargs):
            averager = self.reducer.averager
            if self._counts and not averager.current.finished and not averager.closed:
                raise SpecError(
                    f"rank {self.reducer.comm.rank}: optimizer.zero_grad() between backward() and "
                    "step(), expected it after optimizer.step() or optimizer.synchronize(): to "
                    "give up this step on all ranks type  optimizer.reducer.discard()")
            self._not_finite = None
            return inner(*args, **kwargs)

        return zero_grad


def refuse_passes(passes):
    """SpecError for what is no number of backward passes."""
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise SpecError(f"backward_passes_per_step={passes!r} found, expected a whole number, at "
                        "least 1")
