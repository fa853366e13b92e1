"""Hooks of parameters: gradients come into their buckets while backward() runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch


class GradientHooks:
    """Hands each gradient to the averager when autograd says that it is complete.

    Autograd calls a hook from any of its threads. The gradient goes into its slot; a bucket whose
    slots are all ready is sent while backward() goes on. A gradient that comes after a finished
    step begins the next one.

    synchronising  False within no_sync(): gradients accumulate, and nothing is sent
    """

    def __init__(self, gradients, changes):
        self.gradients, self.changes, self.synchronising = gradients, changes, True
        self._handles = [p.register_post_accumulate_grad_hook(partial(self._on_gradient, name))
                         for name, p in gradients.named]
        self._handles += [table.parameter.register_post_accumulate_grad_hook(
            partial(self._on_rows, table)) for table in gradients.rows.tables]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """In this context backward only accumulates; the next backward outside exchanges all."""
        before, self.synchronising = self.synchronising, False
        try:
            yield
        finally:
            self.synchronising = before

    @torch.compiler.disable
    def _on_gradient(self, name, parameter):
        g = self.gradients
        with g.memory.here(), g.lock:
            self.changes.arrive(parameter)
            g.begin()
            if self.synchronising:
                g.buckets.note(name)
            self._take(*g.buckets.names[name])

    @torch.compiler.disable
    def _on_rows(self, table, parameter):
        """A gradient that travels as rows is complete."""
        with self.gradients.lock:
            self.changes.arrive(parameter)
            self.gradients.begin()
            if self.synchronising:
                self.changes.came(table)
                table.fill(self.changes.touch)

    def _take(self, bucket, slot):
        """The gradient of one parameter goes into its bucket, which is sent at the next hook: hooks
        of the user's may yet change it."""
        g = self.gradients
        if slot.ready:
            self.changes.forget()
            g.refuse_second(slot)
        if not self.synchronising:
            return
        g.launch_ready()
        self.changes.came(slot)
        slot.fill(self.changes.touch)
        bucket.arrived(slot)
        g.poll()

    def remove(self):
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
