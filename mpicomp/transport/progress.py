"""A thread that polls exchanges while the main thread computes."""

import threading
import weakref
from time import sleep

from mpicomp import mpi

PAUSE = 1e-3  # seconds between two polls: a thread in a blocking MPI call would spin instead


class Progress:
    """Calls a Pipeline's `move` repeatedly, in a thread, between `wake` and `hand_over`.

    `hand_over` returns when the thread is out of `move`; from then on only the caller uses MPI and
    the pipeline. It raises what `move` raised in the thread. The thread starts with the first
    `wake` and ends with the pipeline or the program.
    """

    def __init__(self, pipeline):
        self._pipeline = weakref.ref(pipeline, lambda _: self.stop())
        self._awake, self._free = threading.Event(), threading.Lock()
        self._thread, self._error, self._ended = None, None, False

    def wake(self):
        """Start polling: an exchange has begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mpicomp progress", daemon=True)
            self._thread.start()
            mpi.at_end(self._end)
        self._awake.set()

    def hand_over(self):
        """Stop polling and leave the pipeline to the caller."""
        self._awake.clear()
        with self._free:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def abandon(self):
        """Return when the thread is out of `move`; errors that it raised are dropped."""
        with self._free:
            self._error = None

    def stop(self):
        """End the thread."""
        self._ended = True
        self._awake.set()
        mpi.not_at_end(self._end)

    def _end(self):
        """End the thread before MPI is finalized."""
        self.stop()
        self._thread.join(60.0)  # it ends after one poll, with at most one encoding

    def _run(self):
        while self._awake.wait() and not self._ended:
            with self._free:
                if self._awake.is_set() and not self._ended:
                    self._look()
            sleep(PAUSE)

    def _look(self):
        pipeline = self._pipeline()
        if pipeline is None:
            return
        try:
            with pipeline.within():
                pipeline.move()
        except Exception as error:
            self._error = error
            self._awake.clear()
        if not pipeline.busy:
            self._awake.clear()
