"""Drives the exchanges of many buckets at once, MPI calls in the order that all ranks share."""

import os
from contextlib import nullcontext
from time import perf_counter, sleep

from mpicomp import mpi
from mpicomp.errors import SpecError, StallError
from mpicomp.transport.progress import Progress
from mpicomp.transport.ring import Onward
from mpicomp.transport.staging import Later

WAYS = ("auto", "poll", "thread")
SPIN = 5  # looks without a sleep between them
QUIET = 0.5  # seconds of waiting between two questions whether it is in vain
AUTO = "poll"  # docs/results.md says what was measured


class Pipeline:
    """Buckets in flight: each is a generator that yields lists of MPI requests.

    A generator is resumed when its requests are done. The one rule that keeps ranks from posting
    in different orders: a bucket makes its n-th posting only after the bucket before it has made
    its own n-th; what two ranks send each other between postings (`Onward`) is not counted.
    (Packets of a GPU are posted when they have left it, see staging.py; a bucket that waits for
    that lets the next one encode.) Nonblocking collectives move only while somebody calls Test.
    progress="poll": `poll` is called from the gradient hooks; "thread": a thread looks every
    millisecond, and encodes, too, in a block `within()`; "auto", or the environment variable
    MPICOMP_PROGRESS, chooses. `drain` is done by the caller either way, and sleeps between two
    looks where ranks share cores.
    """

    def __init__(self, comm, timeout, progress="auto", within=nullcontext):
        self.comm, self.timeout, self.within = comm, timeout, within
        self._flights, self._over = [], 0  # the first so many are through
        self.under_way, self._since = 0.0, None  # seconds with a call open, as seen by looking
        self._crowded = mpi.crowded(comm)
        self.progress, self.note = _way(progress)
        self._thread = Progress(self) if self.progress == "thread" else None
        self.on_quiet = lambda: None  # called in a long wait; may raise

    def launch(self, label, generator):
        """Add a bucket, after all that were launched before it."""
        self._flights.append(_Flight(label, generator))
        if self._thread:
            self._thread.wake()
        else:
            self.move()

    def poll(self):
        """Move on whatever can move on, unless a thread does."""
        if not self._thread:
            self.move()

    def only_poll(self):
        """Have no thread: for exchanges that use MPI between two gradients themselves."""
        self.progress, self._thread = "poll", None

    @property
    def busy(self) -> bool:
        """Is any bucket under way?"""
        return not all(flight.done for flight in self._open)

    @property
    def _open(self):
        """The flights from the first on that is not through, in a list of their own."""
        return self._flights[self._over:]

    def move(self) -> bool:
        """Move on whatever can move on; True if anything did."""
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
        """Count the seconds during which calls are under way."""
        now = perf_counter()
        if self._since is not None:
            self.under_way += now - self._since
        self._since = now if open_calls else None

    def drain(self):
        """Return when all buckets are through; StallError after `timeout` seconds of nothing."""
        if self._thread:
            self._thread.rest()
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
            else:  # who spins takes the core from those who send: emulated hosts, other programs
                sleep(min(2e-5 * max(0, looks - SPIN), most))
        self.clear()

    def clear(self):
        """Forget all buckets."""
        self._flights.clear()
        self._over = 0

    def abandon(self) -> list:
        """Stop, since a rank has died. What MPI may still write to lives as long as the result."""
        if self._thread:
            self._thread.stop()
            self._thread.abandon()
        flights, self._flights, self._over = self._flights, [], 0
        return flights

    def over(self, comm):
        """An idle pipeline like this one over another communicator. Collective."""
        return Pipeline(comm, self.timeout, self.progress, self.within)

    def where(self, step) -> str:
        """What this rank waits for, in words; `step` is the Reducer's."""
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
    """One bucket on its way: how often it has posted, and what it waits for."""

    def __init__(self, label, generator):
        self.label, self.generator = label, generator
        self.requests, self.begun, self.posted, self.done = [], 0, 0, False

    def post(self, ahead) -> bool:
        """Make calls that waited for a packet, in turn with `ahead`, the bucket before this one."""
        if self.done or self.begun == self.posted or not _before(ahead, "posted", self.posted):
            return False
        later = [request for request in self.requests if isinstance(request, Later)]
        if not all(request.ready for request in later):
            return False
        for request in later:
            request.post()
        self.posted += 1
        return True

    def ready(self, ahead) -> bool:
        """May it go on?"""
        if self.done or self.posted < self.begun or not _before(ahead, "begun", self.begun):
            return False
        while self.requests and self.requests[-1].Test():
            self.requests.pop()
        return not self.requests

    def resume(self):
        self.requests = next(self.generator, None)
        self.done = self.requests is None
        self.begun += not self.done and not isinstance(self.requests, Onward)


def _before(ahead, what, count) -> bool:
    """Has the bucket `ahead` done more of this than `count`, or all?"""
    return ahead is None or ahead.done or getattr(ahead, what) > count


def _way(progress):
    """("poll" or "thread", a note if it is not what was asked for)."""
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
