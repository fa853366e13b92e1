"""Backward: how gradients come into their buckets, one by one, and when a bucket is complete."""

from contextlib import contextmanager

import torch

from mpicomp.errors import MismatchError
from mpicomp.reducer.memory import on_place


class Backward:
    """The part of the Reducer that is called from inside of backward().

    Autograd calls a hook when a parameter's gradient is complete, from any of its threads. The
    gradient goes into its slot; a bucket whose slots are all ready is sent while backward() goes
    on. A gradient that comes after a finished step begins the next one.
    """

    @contextmanager
    def no_sync(self):
        """In this context backward only accumulates; the next backward outside exchanges all."""
        before, self._synchronising = self._synchronising, False
        try:
            yield
        finally:
            self._synchronising = before

    @on_place
    def _on_gradient(self, name, parameter):
        """The gradient of one parameter is complete (called by autograd, from any thread)."""
        with self._lock:
            self._changes.arrive(parameter)
            self._reopen()
            if self._synchronising:
                self._order.note(name)
            self._take(*self._order.place[name], self._changes.touch)

    @torch.compiler.disable
    def _on_rows(self, table, parameter):
        """A gradient that travels as rows is complete."""
        with self._lock:
            self._changes.arrive(parameter)
            self._reopen()
            if self._synchronising:
                self._changes.came(table)
                table.fill(self._changes.touch)

    @on_place
    def _arrived(self, bucket, slot):
        """A gradient that somebody else watches for is complete: see ddp.py."""
        self._reopen()
        self._take(bucket, slot)

    def _take(self, bucket, slot, finish=None):
        """The gradient of one parameter goes into its bucket.

        With `finish` hooks of the user's may yet change it: its bucket is sent after those.
        """
        if slot.ready:
            self._changes.spoil()
            raise MismatchError(
                f"rank {self.comm.rank}: a second gradient of {slot.name!r} arrived before the "
                "step: wrap every backward() but the last one, and only those, in  with "
                "reducer.no_sync():  (checkpoint() of a module that is used twice does this in one "
                "backward(); there use_reentrant=False helps). A step that is not to be made is "
                "given up by optimizer.zero_grad(), or by reducer.discard()")
        if not self._synchronising:
            return
        if finish:
            self._launch_ready()
            self._changes.came(slot)
        self._fill(bucket, slot, finish)
        if not finish:
            self._launch_ready()
        if self._next or self._delay or self._exchange.asynchronous:  # is anything under way?
            with self.stats.stage("post"):
                self._pipeline.poll()
                self._exchange.poll()

    def _reopen(self):
        """A new step begins."""
        self._stepped.clear()
        if self._finished:
            self._finished, self._next = False, 0
            self._changes.begin()
            self._order.apply()
            for bucket in self._buckets:
                bucket.reset()

    def _fill(self, bucket, slot, finish=None, absent=False):
        slot.fill(finish, absent)
        slot.ready = True
        bucket.missing -= 1

    def _launch_ready(self):
        """Send what is complete; not before ranks are known to agree, which waits for `finish`.

        A comparison in here would wait for ranks that are in another Reducer's finish. The last
        bucket waits for `finish`, too: its header tells whether the step is given up.
        """
        while (self._checked and self._next < len(self._buckets) - 1
               and not self._buckets[self._next].missing):
            self._launch(self._buckets[self._next], touched=True)
