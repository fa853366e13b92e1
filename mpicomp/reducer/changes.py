"""What users do to gradients between backward() and step(): change them, take them away, freeze.

A gradient may be changed by hooks of the user's that run after the Reducer's, and counts as they
leave it. After backward() it is Pending (pending.py): who uses it waits for the mean. But p.grad
itself may be set to None, by zero_grad(), or to another tensor, and nobody hears of it before the
next hook or the end of the step. What was sent becomes the past only when an optimizer steps on
it, so a step that is given up, before or after the exchange, leaves no trace in any residual.
"""

import torch

from mpicomp.reducer.pending import Pending
from mpicomp.reducer.slot import owner_of


class Changes:
    """Watches the gradients of one step, from the first hook to the end of the exchange.

    gradients   the averager that they belong to
    finish      called without arguments: the exchange is to be finished now
    """

    def __init__(self, gradients, finish):
        self.gradients, self._finish, self._task = gradients, finish, None
        self.begin()

    def begin(self):
        """A new step."""
        self._came, self._last = [], None

    # ---- before the exchange is finished ----

    def came(self, slot):
        """The hook of this slot's parameter brings its gradient."""
        self.gradients.mark_step()
        self._came.append(slot)
        self._last = slot

    def settle(self, late=False):
        """All hooks of the parameter that came last are through; `late` after backward()."""
        slot, self._last = self._last, None
        if slot is not None and not slot.settle(self.touch) and not late:
            self.gradients.problem(
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
        elif self.gradients.current.applied and self._on_top(parameter):
            self.gradients.commit()
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
        others = [p.grad for _, p in self.gradients.parameters if p is not parameter]
        return any(g is not None and bool((g._values() if g.is_sparse else g).any())
                   for g in others)

    @torch.compiler.disable
    def _end(self):
        """backward() is over."""
        with self.gradients.lock:
            if not self.gradients.closed and not self.gradients.current.finished:
                self.settle()
                with self.gradients.memory.here():
                    self.gradients.launch_ready()

    @torch.compiler.disable
    def touch(self):
        """Somebody reads or changes a gradient whose exchange is under way."""
        if not self.gradients.current.finished and not self.gradients.closed:
            self.gradients.refuse_owned("using p.grad after backward()")
            self._finish()

    def judge(self):
        """After backward(): is what came still there, and are parameters what they were?"""
        g, changed = self.gradients, [slot for slot in self._came if not slot.untouched]
        for slot in g.buckets.slots:
            g.refuse_changed(slot, slot.became if slot.ready else slot.changed)
        for table in g.rows.tables:
            g.refuse_changed(table, table.changed)
        if g.refuse_frozen():
            return
        if changed and all(slot.parameter.grad is None for slot in self._came):
            self.give_up()
        elif changed and self._of_another(changed[0].parameter.grad):
            g.problem(
                f"another open Reducer has taken the gradient of {changed[0].name!r}: close() one "
                "of them, or give each its own parameters")
        elif changed:
            odd = changed[0]
            what = "set to None" if odd.parameter.grad is None else "changed"
            g.problem(
                f"p.grad of {odd.name!r} was {what} between backward() and optimizer.step(), while "
                "its exchange was under way: call  reducer.finish()  after the last backward(), "
                "and p.grad is the mean, which you may change. (zero_grad() of all parameters "
                "gives the step up)")

    def bring_absent(self, slot) -> bool:
        """Fill the slot of a parameter whose hook has not come; has this rank a gradient of it?

        An accumulated gradient from no_sync() counts, an absent one is zero. One that is frozen
        has none, and the mean that another open Reducer has put there is no gradient of this
        rank's.
        """
        gradient = slot.parameter.grad
        absent = (gradient is None or slot.frozen
                  or type(gradient) is not Pending and self._of_another(gradient))
        slot.fill(absent=absent)
        return not absent

    def _of_another(self, gradient) -> bool:
        """Has another Reducer made this p.grad what it is?"""
        return owner_of(gradient) not in (None, self.gradients.owner)

    def forget(self):
        """What came is gone, or came twice."""
        self._came.clear()
        self._last = None

    def give_up(self):
        """This rank's step is not to be applied."""
        self.forget()
        self.gradients.give_up()

    def discard(self):
        """Reducer.discard: take part in the step that is not over, which no rank then applies."""
        g = self.gradients
        g.clear_outputs()
        if not g.current.finished and not g.closed:
            self.give_up()
            self._finish()
        g.begin()
