"""An averager of the gradients of parameters: what Reducer and mpicomp.ddp are made of."""

import numpy as np
import torch

from mpicomp import mpi
from mpicomp.averager.engine import Engine, resolved
from mpicomp.averager.settings import Settings
from mpicomp.errors import MismatchError, SpecError
from mpicomp.reducer.parameters import trainable
from mpicomp.reducer.replicas import bad_every, check_replicas, check_start
from mpicomp.reducer.server import Server
from mpicomp.reducer.slot import GradientSlot
from mpicomp.reducer.sparse import Sparse, divide


class Gradients(Engine):
    """Averages p.grad of (name, parameter) pairs. The arguments are those of Reducer.

    optimizers  that step on the mean: a step is applied when one has done so
    rows        gradients that travel beside the buckets, see sparse.py
    listeners   objects whose begin() is called when a new step begins
    check_every replicas are compared after every so many steps, or None
    slot        the class of a parameter's place in a bucket
    sends       what travels in place of gradients, see sends.py
    """

    slot = GradientSlot

    def __init__(self, named_parameters, method, comm=None, *, average=True,
                 bucket_bytes=25 << 20, seed=0, nonfinite="raise", stall_timeout=None,
                 require_ratio=None, ratio_window=100, progress="auto", sparse=(),
                 check_replicas_every=None, sends=None):
        comm = mpi.communicator(comm, stall_timeout, "starting a Reducer")
        settings = Settings(bool(average), bucket_bytes, seed, nonfinite,
                            mpi.stall_seconds(stall_timeout), require_ratio, ratio_window, progress)
        named, problem = trainable(named_parameters)
        method, unknown = resolved(method)
        problem = problem or unknown or settings.problem(check_replicas_every=check_replicas_every)
        problem = problem or bad_every(check_replicas_every, method)
        named, in_rows, wrong = divide(named, sparse, method)
        if sends is not None and method is not None:
            refusal = sends.refusal(method, settings, in_rows)
            wrong = wrong or refusal and SpecError(refusal)
        self.sends = sends
        if sends is not None:
            sends.settle()
        self.optimizers, self.listeners, self.owner = [], [], Owner()
        self.rows, self.check_every = Sparse(self, in_rows), check_replicas_every
        super().__init__(comm, named, method, settings, problem or wrong, self._slot, in_rows,
                         sparse=list(sparse), sends="gradients" if sends is None else sends.facts,
                         **settings.facts,
                         check_replicas_every=check_replicas_every)
        self.checked = False

    def _slot(self, *arguments):
        return self.slot(*arguments, self.owner)

    def _mode(self):
        return Server(self) if self.link.exchange.owns else super()._mode()

    @property
    def parameters(self) -> list:
        """(name, parameter) of everything whose gradient is exchanged."""
        return self.named + self.rows.named

    @property
    def elements(self):
        return super().elements + self.rows.elements

    @property
    def commits_at_once(self) -> bool:
        """Is a step applied as soon as it is handed out, rather than by an optimizer's step()?"""
        return not self.optimizers or self.exchange.asynchronous

    def problem(self, text):
        """What all ranks raise when the step is finished; the first counts."""
        self.current.bad.setdefault("problem", text)

    def begin(self):
        if self.current.finished:
            super().begin()
            for listener in self.listeners:
                listener.begin()

    def regroup(self, comm):
        super().regroup(comm)
        for listener in self.listeners:
            listener.begin()

    def frozen(self):
        return tuple(name for name, p in self.named if not p.requires_grad)

    def place(self):
        return self.sends.place if self.sends else ""

    def prepare(self):
        super().prepare()
        if self.sends and (text := self.sends.problem()):
            self.problem(text)

    def check_start(self):
        check_start(self)
        if self.sends:
            self.sends.settle()

    def refuse_changed(self, slot, became):
        """A parameter is no longer what ranks agreed on: `became` says what, or is None."""
        if became:
            self.problem(
                f"{slot.name!r} {became}: convert the model first (model.half(), model.to("
                "device)), then make its optimizer and Reducer; close() the Reducer that it had")

    def refuse_frozen(self) -> bool:
        """A problem where a frozen parameter would move on all the same; is there one?"""
        frozen = self.buckets.frozen
        if found := bool(frozen) and (self.method.adagrad or self.link.exchange.owns):
            self.problem(
                f"{frozen[0]!r} needs no gradient any more, but with {self.method!r} it "
                "would move on: after freezing a layer close() the Reducer and make a new one")
        return found

    def refuse_second(self, slot):
        """MismatchError, and the step is given up: what stands in the bucket is neither gradient.
        """
        self.give_up()
        raise MismatchError(
            f"rank {self.comm.rank}: a second gradient of {slot.name!r} arrived before the "
            "step: wrap every backward() but the last one, and only those, in  with "
            "reducer.no_sync():  (checkpoint() of a module that is used twice does this in one "
            "backward(); there use_reentrant=False helps). A step that is not to be made is "
            "given up by optimizer.zero_grad(), or by reducer.discard()")

    def give_up(self):
        """This rank's step is not to be applied, and so no rank's."""
        self.current.bad["given up"] = True
        if self.mode.late and (self.current.next or not self.mode.asynchronous):
            self.problem(
                f"{self.method!r} cannot give up a step that backward() has begun, since a part of "
                "it is applied already: call optimizer.step()")

    def after_step(self):
        super().after_step()
        if self.check_every and self.step % self.check_every == 0:
            check_replicas(self, None, {})

    def finish_rows(self):
        return self.rows.exchange(self.exchange, self.buckets.marked_plan, self.weight)

    def apply_rows(self):
        self.rows.give_back()

    def clear_outputs(self):
        self.rows.clear()
        super().clear_outputs()

    def flush_gradients(self):
        """Make every p.grad the mean (or sum) of what all ranks owe."""
        if self.sends and not self.dense:
            raise SpecError("flush: what is owed is no gradient, since the attached optimizer has "
                            "something else sent (mpicomp.optim): it cannot be applied by a step of"
                            " its own. Later steps send it; a checkpoint for torch.optim.AdamW has "
                            "it: optimizer.adamw_state_dict()")
        if self.flush_into_buckets():
            for slot in self.buckets.slots:
                slot.give_back(scaled=False)
            self.rows.clear()

    def refuse_owned(self, what):
        """SpecError where the owners of parameters have the gradients."""
        if self.link.exchange.owns:
            raise SpecError(
                f"rank {self.comm.rank}: {what} has no meaning with exchange=server: the owners "
                "apply gradients, and none is left here. To change a gradient before it is sent "
                "call backward() in  with reducer.no_sync():  and then step()")


def in_torch(state) -> dict:
    """An averager's state with torch tensors in place of NumPy arrays, in the same memory."""
    return {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for key, value in state.items()}


class Owner:
    """Tells the gradients of one Reducer from those of another."""
