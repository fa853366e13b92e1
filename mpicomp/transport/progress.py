"""A thread that moves exchanges on while the main thread computes: it looks, and sleeps."""

import threading
import weakref
from time import sleep

from mpicomp import mpi

PAUSE = 1e-3  # seconds between two looks: a thread in a blocking MPI call would spin instead


class Progress:
    """Calls `poll` of a Pipeline again and again between `wake` and `rest`, in a thread of its own.

    `rest` returns when the thread is out of `poll`; from then on the caller may use MPI and the
    pipeline alone. What `poll` raised in the thread is raised by `rest`. The thread starts with the
    first `wake` and ends with the pipeline, or with the program.
    """

    def __init__(self, pipeline):
        self._pipeline = weakref.ref(pipeline, lambda _: self.stop())
        self._awake, self._free = threading.Event(), threading.Lock()
        self._thread, self._error, self._ended = None, None, False

    def wake(self):
        """There is something to move on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mpicomp progress", daemon=True)
            self._thread.start()
            mpi.at_end(self._end)
        self._awake.set()

    def rest(self):
        """Leave everything to the caller."""
        self._awake.clear()
        with self._free:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def abandon(self):
        """Return when the thread is out of `poll`; what it met there does not matter any more."""
        with self._free:
            self._error = None

    def stop(self):
        """End the thread."""
        self._ended = True
        self._awake.set()
        mpi.not_at_end(self._end)

    def _end(self):
        """Before MPI is finalized nobody may be in it."""
        self.stop()
        self._thread.join(60.0)  # it is done after one look, with one encoding at most

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
