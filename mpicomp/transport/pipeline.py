"""Drives the exchanges of several buckets at once, posting MPI calls in one order on all ranks."""

import os
from contextlib import nullcontext
from time import perf_counter, sleep

from mpicomp import mpi
from mpicomp.errors import SpecError, StallError
from mpicomp.transport.progress import Progress
from mpicomp.transport.ring import SameCall
from mpicomp.transport.staging import DeferredCall

WAYS = ("auto", "poll", "thread")
SPIN = 5  # polls without a sleep between them
QUIET = 0.5  # seconds without progress between two calls of `on_quiet`
AUTO = "poll"  # docs/results.md says what was measured


class Pipeline:
    """The buckets in flight: each is a generator that yields lists of MPI requests.

    A generator is resumed when its requests are complete. One rule keeps all ranks posting in the
    same order: a bucket makes its n-th posting only after the bucket before it has made its own
    n-th. Point-to-point requests inside one collective (`SameCall`) are not counted as postings.
    A packet on a GPU is posted when it has been copied to the host (see staging.py); while one
    bucket waits for that, the next may encode.

    Nonblocking collectives advance only while somebody calls Test. progress="poll": the gradient
    hooks call `poll`. "thread": a thread polls every millisecond, and encodes, too, in a
    `with within()` block. "auto": what the environment variable MPICOMP_PROGRESS says, else poll.
    `drain` runs in the caller either way, and sleeps between polls if ranks share cores.
    `timeout` is in seconds.
    """

    def __init__(self, comm, timeout, progress="auto", within=nullcontext):
        self.comm, self.timeout, self.within = comm, timeout, within
        self._flights, self._over = [], 0  # the first `_over` of them are complete
        self.under_way, self._since = 0.0, None  # seconds with a call open, as seen by polling
        self._crowded = mpi.crowded(comm)
        self.progress, self.note = _way(progress)
        self._thread = Progress(self) if self.progress == "thread" else None
        self.on_quiet = lambda: None  # called during a long wait; may raise

    def launch(self, label, generator):
        """Start a bucket's exchange, behind all that were launched before it."""
        self._flights.append(_Flight(label, generator))
        if self._thread:
            self._thread.wake()
        else:
            self.move()

    def poll(self):
        """`move`, unless a thread does."""
        if not self._thread:
            self.move()

    def only_poll(self):
        """Use no thread: for exchanges that call MPI themselves between two gradients."""
        self.progress, self._thread = "poll", None

    @property
    def busy(self) -> bool:
        """Is any exchange incomplete?"""
        return not all(flight.done for flight in self._open)

    @property
    def _open(self):
        """A new list of the flights, from the first incomplete one on."""
        return self._flights[self._over:]

    def move(self) -> bool:
        """Post and resume whatever is ready; returns whether anything was."""
        moved = False
        ahead, flights = None, self._open
        for flight in flights:
            moved |= flight.post(ahead)
            while flight.ready(ahead):
                flight.resume()
                flight.post(ahead)
                moved = True
            ahead = flight
        self._over += next((i for i, f in enumerate(flights) if not f.done), len(flights))
        self._clock(any(flight.requests for flight in self._open))
        return moved

    def _clock(self, open_calls):
        """Add up the seconds during which MPI calls are open."""
        now = perf_counter()
        if self._since is not None:
            self.under_way += now - self._since
        self._since = now if open_calls else None

    def drain(self):
        """Complete all exchanges; StallError after `timeout` seconds without progress."""
        if self._thread:
            self._thread.hand_over()
        quiet, looks, ask = perf_counter(), 0, perf_counter() + QUIET
        most = 1e-3 if self._crowded else 2e-4
        while self.busy:
            looks += 1
            if self.move():
                quiet, looks = perf_counter(), 0
            elif perf_counter() - quiet > self.timeout:
                self._stalled()
            elif perf_counter() > ask:
                self.on_quiet()
                ask = perf_counter() + QUIET
            else:  # spinning would take the core from whoever sends
                sleep(min(2e-5 * max(0, looks - SPIN), most))
        self.clear()

    def clear(self):
        """Forget all buckets."""
        self._flights.clear()
        self._over = 0

    def abandon(self) -> list:
        """Stop, since a rank has died. Keep the result: MPI may still write to its buffers."""
        if self._thread:
            self._thread.stop()
            self._thread.abandon()
        flights, self._flights, self._over = self._flights, [], 0
        return flights

    def over(self, comm):
        """An idle pipeline like this one over another communicator. Collective."""
        return Pipeline(comm, self.timeout, self.progress, self.within)

    def where(self, step) -> str:
        """Describes what this rank waits for; `step` is the Reducer's."""
        waiting = next((f for f in self._open if not f.done), None)
        if waiting is None:
            return f"in no exchange: {step} steps are done"
        return f"in call {waiting.begun} of {waiting.label}, of {len(self._flights)} buckets begun"

    def _stalled(self):
        waiting = next(f for f in self._flights if not f.done)
        whom = [f" for {r.waits_for()}" for r in waiting.requests if hasattr(r, "waits_for")]
        raise StallError(f"rank {self.comm.rank} waited {self.timeout:g} s in call "
                         f"{waiting.begun} of {waiting.label}{''.join(whom)}: another rank has "
                         "ended, or made fewer steps, or is slower than stall_timeout allows")


class _Flight:
    """One bucket's exchange: how many postings it has made, and the requests it waits for."""

    def __init__(self, label, generator):
        self.label, self.generator = label, generator
        self.requests, self.begun, self.posted, self.done = [], 0, 0, False

    def post(self, ahead) -> bool:
        """Make the deferred calls if their packets are ready and `ahead`, the bucket before, is."""
        if self.done or self.begun == self.posted or not _before(ahead, "posted", self.posted):
            return False
        later = [request for request in self.requests if isinstance(request, DeferredCall)]
        if not all(request.ready for request in later):
            return False
        for request in later:
            request.post()
        self.posted += 1
        return True

    def ready(self, ahead) -> bool:
        """May the generator be resumed?"""
        if self.done or self.posted < self.begun or not _before(ahead, "begun", self.begun):
            return False
        while self.requests and self.requests[-1].Test():
            self.requests.pop()
        return not self.requests

    def resume(self):
        self.requests = next(self.generator, None)
        self.done = self.requests is None
        self.begun += not self.done and not isinstance(self.requests, SameCall)


def _before(ahead, what, count) -> bool:
    """Is the count `what` of the bucket `ahead` larger than `count`, or its exchange complete?"""
    return ahead is None or ahead.done or getattr(ahead, what) > count


def _way(progress):
    """("poll" or "thread", a note if this is not what was asked for)."""
    way = os.environ.get("MPICOMP_PROGRESS", "auto") if progress == "auto" else progress
    if way not in WAYS:
        raise SpecError(f"MPICOMP_PROGRESS={way} found, expected one of {', '.join(WAYS)}")
    way = AUTO if way == "auto" else way
    if way == "thread":
        from mpi4py import MPI

        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            return "poll", ("progress=thread needs MPI_THREAD_MULTIPLE, which this MPI does not "
                            "give: gradient hooks poll instead")
    return way, None
