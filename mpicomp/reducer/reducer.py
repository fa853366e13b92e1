"""The Reducer: hooks on parameters and optimizers, and an averager between them."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch

from mpicomp.advice import Advice
from mpicomp.catalogue import Method
from mpicomp.reducer import copies
from mpicomp.reducer.backward import GradientHooks
from mpicomp.reducer.changes import Changes
from mpicomp.reducer.gradients import Gradients, in_torch
from mpicomp.reducer.optimizer_hooks import Given, OptimizerHooks
from mpicomp.reducer.replicas import check_replicas
from mpicomp.reducer.sends import Sends
from mpicomp.transport.meter import Meter

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)

if TYPE_CHECKING:
    from mpi4py import MPI


class Reducer(copies.Uncopied):
    """Replaces every gradient by its mean over ranks, exchanged as `method` says.

    named_parameters  (name, parameter) pairs, as model.named_parameters() gives them; those that
                      need no gradient are left out
    method            a Method or its specification, such as "onebit" or "strom:tau=0.01"
    comm              an MPI communicator; None means COMM_WORLD. A duplicate is used
    average           True: the mean over ranks. False: the sum
    bucket_bytes      gradients travel in pieces of about so many bytes of float32
    seed              of the stochastic methods; ranks and steps draw different numbers from it
    nonfinite         "raise": a NaN or Inf on any rank raises NonFiniteError on all of them.
                      "skip": all ranks leave p.grad = None in that step, residuals unchanged
    stall_timeout     seconds without progress after which a wait raises StallError; None means
                      the environment variable MPICOMP_STALL_TIMEOUT, or 600
    require_ratio     RatioError on all ranks where dense / sent stays below this number:
    ratio_window      judged after every so many steps, and by check_ratio()
    sparse            names of parameters whose gradients are sparse and stay so, see sparse.py
    progress          who moves exchanges on during backward: "poll", "thread" or "auto"
    check_replicas_every  call check_replicas() after every so many steps; None: only on demand
    sends             what travels in place of gradients: optimizer.sends of a mpicomp.optim
                      optimizer, which DistributedOptimizer passes on. None: gradients

    Every rank must make one with the same arguments and the same model; MismatchError names the
    first difference on all ranks otherwise. The order of a step is in docs/design.md.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
                 method: Method | str, comm: "MPI.Comm | None" = None, *, average: bool = True,
                 bucket_bytes: int = 25 << 20, seed: int = 0, nonfinite: str = "raise",
                 stall_timeout: float | None = None, require_ratio: float | None = None,
                 ratio_window: int = 100, progress: str = "auto",
                 sparse: Iterable[str] = (), check_replicas_every: int | None = None,
                 sends: Sends | None = None) -> None:
        self.averager = Gradients(
            named_parameters, method, comm, average=average, bucket_bytes=bucket_bytes, seed=seed,
            nonfinite=nonfinite, stall_timeout=stall_timeout, require_ratio=require_ratio,
            ratio_window=ratio_window, progress=progress, sparse=sparse,
            check_replicas_every=check_replicas_every, sends=sends)
        self._finishing = False
        self._changes, self._given = Changes(self.averager, self.finish), Given()
        self.averager.listeners.append(self._changes)
        self._gradient_hooks = GradientHooks(self.averager, self._changes)
        self._optimizer_hooks = OptimizerHooks(self, self.averager)

    @property
    def comm(self) -> "MPI.Intracomm":
        """The communicator: a private duplicate."""
        return self.averager.comm

    @property
    def method(self) -> Method:
        """The Method; auto: the one chosen."""
        return self.averager.method

    @property
    def stats(self) -> Meter:
        """Bytes, seconds and notes: a Meter."""
        return self.averager.stats

    @property
    def step(self) -> int:
        """How many steps were exchanged."""
        return self.averager.step

    @property
    def advice(self) -> Advice | None:
        """What auto has predicted, or None."""
        return self.averager.advice

    average = property(lambda self: self.averager.settings.average)
    seed = property(lambda self: self.averager.settings.seed)
    nonfinite = property(lambda self: self.averager.settings.nonfinite)

    # ---- one step ----

    def attach(self, optimizer: torch.optim.Optimizer,
               scaler: "torch.amp.GradScaler | None" = None) -> Self:
        """Call `finish` before every optimizer.step(), or at the end of its closure. Returns self.

        The optimizer stays the user's own object. From now on every rank must call step()
        equally often, also where it had no examples. Give a torch.amp.GradScaler here: gradients
        then travel unscaled, and what overflows on one rank all ranks skip.

        A closure's loss becomes the mean over ranks (average=False: the sum), since optimizers
        such as LBFGS decide by it. step() raises SpecError where the optimizer has a parameter with
        a gradient that no attached Reducer knows: it would differ from rank to rank.
        """
        self._optimizer_hooks.attach(optimizer, scaler)
        return self

    def no_sync(self) -> AbstractContextManager[None]:
        """In this context backward only accumulates; the next backward outside exchanges all."""
        return self._gradient_hooks.no_sync()

    @torch.compiler.disable
    def finish(self) -> None:
        """Wait until every p.grad is the mean over ranks (average=False: the sum). Idempotent.

        Parameters without a gradient count as zero; a bucket that had none on any rank is left
        alone. Raises NonFiniteError, MismatchError or StallError, on all ranks alike. Where no
        optimizer is attached, a call after p.grad was zeroed, set to None or replaced is the next
        step's.
        """
        g = self.averager
        with g.memory.here(), g.lock:
            if g.closed or self._finishing:
                return
            if g.current.finished:
                if g.optimizers or not self._given.is_gone(g.parameters):
                    return
                g.begin()
            self._finishing = True
            try:
                self._finish()
            finally:
                self._finishing = False

    def _finish(self):
        g = self.averager
        self._changes.settle(late=True)
        g.prepare()
        self._changes.judge()
        try:
            g.complete(self._changes.bring_absent)
        finally:
            if g.current.finished and not g.optimizers:
                self._given.remember(g.parameters)

    def finish_for(self, what: str) -> None:
        """`finish`, to read or change p.grad. SpecError where no gradient is left after it."""
        self.averager.refuse_owned(what)
        self.finish()

    def compare(self) -> None:
        """Before anything is sent: are all ranks at one step, with the same parameters?"""
        self.averager.compare()

    @torch.compiler.disable
    def discard(self) -> None:
        """Give up the step that has begun, as zero_grad() before optimizer.step() does.

        No rank then applies it, and every p.grad is None; residuals are as before it. Where one
        rank gives a step up, all do: a rank that was in step() skips it. So a rank may call this
        without the others, as long as it has not read p.grad or called `finish`, also where
        backward() or the forward pass has failed on it alone. Later, when p.grad is the mean,
        either all ranks give up or none: the next exchange raises MismatchError otherwise.
        """
        self._changes.discard()

    # ---- between two steps ----

    @torch.compiler.disable
    def deliver(self) -> None:
        """Receive and apply everything that any rank has sent. Collective, between two steps.

        For exchange=peers, exchange=server and delay=1: call it on all ranks before replicas are
        compared, evaluated or saved, and before a rank ends; otherwise nothing is under way, and
        it does nothing. A rank in deliver() holds nobody back, and all ranks go on from the largest
        of their steps.

        peers: what had not been applied is applied by one more step() of the attached optimizers;
        without one the sum is left in p.grad. Replicas then agree up to rounding, with plain SGD.
        server: all parameters are taken over from their owners. Replicas are the same bits.

        Raises StallError, naming the ranks, if they do not come within `stall_timeout`.
        """
        if self.averager.deliver_into_buckets() is not None and self.averager.optimizers:
            for optimizer in self.averager.optimizers:
                optimizer.step()
            if self.averager.mode.asynchronous:
                self.averager.buckets.clear()

    @torch.compiler.disable
    def flush(self) -> None:
        """Make every p.grad the mean (or sum) of what all ranks still owe; residuals become zero.

        Call it on all ranks between two steps, then optimizer.step(): afterwards all that was given
        has been said (Dryden 2016 does so at the end of each epoch). float32, uncompressed; no loss
        scale is in it, so under a GradScaler it is optimizer.step() as well, not scaler.step. Rows
        (sparse=) owe nothing: their p.grad becomes None. With an asynchronous exchange what is
        under way is delivered first. peers: it is added to p.grad. server: the owners apply what is
        owed as one more push; nothing is left for step().

        Raises MismatchError between backward and the step that it belongs to.
        """
        self.averager.flush_gradients()

    def check_replicas(self, model: torch.nn.Module | None = None, **objects: Any) -> None:
        """Raise MismatchError on all ranks unless replicas are equal to the bit. Collective.

        Compared are step, learning rates and all other options of attached optimizers, parameters
        and optimizer state; of `model` also buffers, extra state and parameters that need no
        gradient; and other optimizers and what else has a state_dict():
        reducer.check_replicas(model, scheduler=scheduler, scaler=scaler). The error names what
        differs first, the ranks, and what to type; causes (learning rates) come before effects.

        One pass over memory, and 16 bytes a rank where all is equal. With an asynchronous exchange
        only after `deliver`, and without optimizer state, which is each rank's own there; `peers`
        agree up to rounding at most, so broadcast_parameters(model) comes before.
        """
        check_replicas(self.averager, model, objects)

    def check_ratio(self) -> None:
        """At the end of a run: hold the steps since the last judgement to require_ratio, too."""
        self.averager.check_ratio()

    def report(self) -> str:
        """What the exchange took a step, by stage; with method="auto" beside what was predicted."""
        from mpicomp.advice import report

        return report(self.method, self.stats, self.advice)

    def sent_by_parameter(self) -> dict[str, int]:
        """{parameter name: how many of its elements this rank's last packet made non-zero}.

        What a sparse method sends, by layer. Costs a decode; only for exchange=allgather.
        """
        return self.averager.sent_by_array()

    named = sent_by_parameter  # its older name

    # ---- state, dead ranks, the end ----

    def state_dict(self) -> dict[str, Any]:
        """{"step": int, "error/<name>": tensor}: this rank's residuals, in units of what is sent.

        "order" is there, too, where buckets were made anew after the first step: a tensor of the
        parameters' numbers; with powersgd "basis/<name>", the same on all ranks.

        Raises MismatchError where packets are under way: call `deliver` first.
        """
        return in_torch(self.averager.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave on this rank: the same packets follow, to the bit.

        To be called on all ranks: the next exchange first compares step, buckets and parameters.
        Raises MismatchError, with nothing changed, if names or shapes do not fit this model, or
        between backward() and step().
        """
        self.averager.load_state_dict(state)

    @property
    def averagers(self) -> list[Gradients]:
        """What exchanges, for Recovery."""
        return [self.averager]

    @property
    def communicators(self) -> list:
        """All that this Reducer calls MPI on, to revoke them where a rank has died."""
        return self.averager.link.communicators

    @property
    def irreplaceable(self) -> str | None:
        """Why this Reducer cannot go on where a rank has died, or None."""
        return self.averager.irreplaceable

    def regroup(self, comm: "MPI.Intracomm") -> None:
        """Go on over `comm`, whose ranks are some of the present ones, where the last step ended.

        Collective over `comm`. A step that was begun has never happened: packets under way are
        forgotten, every p.grad is None, this rank's residuals are those of the last step that was
        applied. What the ranks that are gone still owed is lost. As after load_state_dict on so
        many ranks, the second residuals of elements that others own now join the first.
        With delay=1 or an asynchronous exchange it is refused: packets under way are the past.
        """
        self.averager.regroup(comm)

    def close(self) -> None:
        """Take the hooks off parameters and optimizers: this Reducer does nothing from now on.

        With an asynchronous exchange call `deliver` first: others may need this rank's answers.
        """
        if not self.averager.closed:
            self._gradient_hooks.remove()
            self._optimizer_hooks.remove()
            self.averager.close()


def DistributedOptimizer(optimizer: Optimizer,
                         named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
                         method: Method | str = "dense", comm: "MPI.Comm | None" = None,
                         **keywords: Any) -> Optimizer:
    """The optimizer itself, with a Reducer attached as `optimizer.reducer`.

    `keywords` are those of Reducer. optimizer.step() then waits for the exchange and steps on the
    mean gradient; a mpicomp.optim optimizer may have something else sent, see docs/optimizers.md.
    """
    keywords = {"sends": getattr(optimizer, "sends", None), **keywords}
    optimizer.reducer = Reducer(named_parameters, method, comm, **keywords).attach(optimizer)
    return optimizer
