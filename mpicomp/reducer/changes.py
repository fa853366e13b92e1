"""What users do to gradients between backward() and step(): change them, take them away, freeze.

A gradient may be changed by hooks of the user's that run after the Reducer's, and counts as they
leave it. After backward() it is Pending (pending.py): who uses it waits for the mean. But p.grad
itself may be set to None, by zero_grad(), or to another tensor, and nobody hears of it before the
next hook or the end of the step. What was said becomes the past only when an optimizer steps on
it, so a step that is given up, before or after the exchange, leaves no trace in any residual.
"""

import torch

from mpicomp import mpi
from mpicomp.errors import NonFiniteError, SpecError
from mpicomp.reducer.bucket import owner_of
from mpicomp.reducer.pending import Pending
from mpicomp.transport.agree import digest


class Changes:
    """Of one Reducer, in one step.

    bad      what is wrong with this rank's gradients: {bucket: name of a parameter with NaN or Inf,
             "problem": a sentence, "given up": True}
    applied  (bucket, mail) of an exchange that is finished and that no optimizer has stepped on
    frozen   names of the parameters that need no gradient any more
    """

    def __init__(self, reducer):
        self.reducer, self._task = reducer, None
        self.reset()

    def reset(self):
        """Nothing has ever happened."""
        self.bad, self.applied, self.took_back = {}, [], False
        self.new_mail()
        self.begin()

    def begin(self):
        """A new step."""
        self.took_back |= bool(self.applied)
        self._came, self._last, self.applied, self._planned = [], None, [], False

    # ---- before the exchange is finished ----

    def came(self, slot):
        """The hook of this slot's parameter brings its gradient."""
        if not self._planned:
            self.replan()
        self._came.append(slot)
        self._last = slot

    def problem(self, text):
        """What all ranks raise when the exchange is finished; the first counts."""
        self.bad.setdefault("problem", text)

    def _refuse_changed(self, slot, became):
        if became:
            self.problem(
                f"{slot.name!r} {became}: convert the model first (model.half(), model.to("
                "device)), then make its optimizer and Reducer; close() the Reducer that it had")

    def settle(self, late=False):
        """All hooks of the parameter that came last are through; `late` after backward()."""
        slot, self._last = self._last, None
        if slot is not None and not slot.settle(self.touch) and not late:
            self.problem(
                f"p.grad of {slot.name!r} was set to None in backward(), by another hook of the "
                "parameter: nothing is left to exchange. Take that hook off, or do what it does "
                "after optimizer.step()")

    def arrive(self, parameter):
        """The hook of this parameter is called: is it of this step, or of one after zero_grad()?"""
        task = torch._C._current_graph_task_id()
        if task == self._task and task >= 0:
            self.settle()
            return  # the same backward()
        self._task = task
        if self._came and not any(self._stands(slot, parameter) for slot in self._came):
            fresh, parameter.grad = parameter.grad, None
            self.discard()
            parameter.grad = fresh
        elif self.applied and self._on_top(parameter):
            self.commit()
        self.settle()
        if task >= 0:
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _stands(self, slot, parameter) -> bool:
        """Is the gradient that came still there, now that the hook of this parameter is called?"""
        if slot.untouched or slot.shows:
            return True
        # a hook may have replaced it, in a backward() that this one is in the middle of
        return (slot is self._last and slot.parameter is not parameter
                and slot.parameter.grad is not None)

    def _on_top(self, parameter) -> bool:
        """Is the mean still in p.grad, so that the new gradient is added to it?"""
        others = [p.grad for _, p in self.reducer._all_parameters if p is not parameter]
        return any(g is not None and bool((g._values() if g.is_sparse else g).any())
                   for g in others)

    @torch.compiler.disable
    def _end(self):
        """backward() is over."""
        r = self.reducer
        with r._lock:
            if not r._closed and not r._finished:
                self.settle()
                with r._place.here():
                    r._launch_ready()

    @torch.compiler.disable
    def touch(self):
        """Somebody reads or changes a gradient whose exchange is under way."""
        if not self.reducer._finished and not self.reducer._closed:
            self.reducer.finish_for("using p.grad after backward()")

    def judge(self):
        """After backward(): is what came still there, and are parameters what they were?"""
        r, changed = self.reducer, [slot for slot in self._came if not slot.untouched]
        for slot in r._order.slots:
            self._refuse_changed(slot, slot.became if slot.ready else slot.changed)
        for table in r._rows.tables:
            self._refuse_changed(table, table.changed)
        if self.frozen and (r.method.adagrad or r._exchange.owns):
            self.problem(
                f"{self.frozen[0]!r} needs no gradient any more, but with {r.method!r} it would "
                "move on: after freezing a layer close() the Reducer and make a new one")
        elif changed and all(slot.parameter.grad is None for slot in self._came):
            self._give_up()
        elif changed and self._of_another(changed[0].parameter.grad):
            self.problem(
                f"another open Reducer has taken the gradient of {changed[0].name!r}: close() one "
                "of them, or give each its own parameters")
        elif changed:
            odd = changed[0]
            what = "set to None" if odd.parameter.grad is None else "changed"
            self.problem(
                f"p.grad of {odd.name!r} was {what} between backward() and optimizer.step(), while "
                "its exchange was under way: call  reducer.finish()  after the last backward(), "
                "and p.grad is the mean, which you may change. (zero_grad() of all parameters "
                "gives the step up)")

    def absent(self, slot) -> bool:
        """Has this rank no gradient of a parameter whose hook has not come?

        One that is frozen has none, and the mean that another open Reducer has put there is no
        gradient of this rank's.
        """
        gradient = slot.parameter.grad
        return (gradient is None or slot.frozen
                or type(gradient) is not Pending and self._of_another(gradient))

    def _of_another(self, gradient) -> bool:
        """Has another Reducer made this p.grad what it is?"""
        return owner_of(gradient) not in (None, self.reducer._place)

    def _give_up(self):
        self._came.clear()
        self._last = None
        self.bad["given up"] = True
        r = self.reducer
        if r._delay or r._exchange.asynchronous and r._next:
            self.problem(
                f"{r.method!r} cannot give up a step that backward() has begun, since a part of it "
                "is applied already: call optimizer.step()")

    def spoil(self):
        """A gradient has come twice: what stands in the bucket is neither of them."""
        self._give_up()

    def discard(self):
        """Reducer.discard: take part in the step that is not over, which no rank then applies."""
        r = self.reducer
        r._rows.clear()
        r._forget_gradients()
        if not r._finished and not r._closed:
            self._give_up()
            r.finish()
        r._reopen()

    # ---- what all ranks must do alike ----

    def new_mail(self):
        """The mail of all buckets was made anew, and their slots."""
        self._digest, self.frozen = 0, ()

    def replan(self):
        """As a step begins: have headers say what is frozen and taken back.

        A parameter that is frozen later in the step is moved by it once more, as in one process.
        In an asynchronous exchange ranks are in other steps, and do not compare it.
        """
        if self._planned:
            return
        self._planned, r, now = True, self.reducer, 0
        frozen = tuple(name for name, p in r._named if not p.requires_grad)
        if frozen != self.frozen:
            self.frozen = frozen
            for slot in r._order.slots:
                slot.frozen = slot.name in frozen
        if self.frozen or self.took_back:
            now = digest(f"frozen {self.frozen}, last step taken back: {self.took_back}")
        self.took_back = False
        if now != self._digest and not r._exchange.asynchronous:
            self._digest = now
            for mail in [*r._mail, *(r._warm[1] if r._warm else ())]:
                mail.replan(self.plan)

    @property
    def plan(self) -> int:
        """The plan digest of this step."""
        return self.reducer._plan ^ self._digest

    def tell(self):
        """Raise on all ranks what any of them found, or return: such a step is skipped.

        With an asynchronous exchange only this rank is concerned: it says nothing in this step.
        """
        r, bad = self.reducer, self.bad
        self.bad, alone, found = {}, r._lane[0].asynchronous, [{}] * r.comm.rank + [bad]
        if not alone:
            with r._guard.tail():
                found = mpi.allgather(r.comm, bad, "telling what is wrong with gradients")
        for rank, theirs in enumerate(found):
            if "problem" in theirs:
                raise SpecError(f"rank {rank}: {theirs['problem']}")
        names = [[] if "given up" in theirs else list(theirs.values()) for theirs in found]
        where = "; ".join(f"rank {k}: {', '.join(n)}" for k, n in enumerate(names) if n)
        if where and r.nonfinite == "raise":
            step, r.step = r.step, r.step + alone  # the others have heard of this step
            raise NonFiniteError(f"step {step}: the gradient holds NaN or Inf ({where}). The "
                                 "residuals are as before this step; nonfinite='skip' goes on")
        return "skipped" if where else "given up"

    # ---- after the exchange ----

    def commit(self):
        """The step is applied: what was said is the past."""
        applied, self.applied = self.applied, []
        for bucket, mail in applied:
            mail.commit()
            self.put_back(bucket, mail)

    def put_back(self, bucket, mail):
        """What was said about parameters that are frozen now is owed again: nothing moves them."""
        frozen = [s for s in bucket.layout.segments if s.name in self.frozen]
        owed = mail.persistent() if frozen else {}
        if "error" in owed:
            r = self.reducer
            share = 1.0 / (r._weight * r._lane[0].holders)
            for s in frozen:
                owed["error"][s.slice] += bucket.flight[s.slice] * share
            mail.restore(owed)
