"""Says where every rank is when one has waited too long, and which rank has ended too early.

A rank whose StallError nobody catches asks all others, over a communicator of its own. On each of
them a thread looks for such a question a few times a second, and prints step, bucket, call and the
Python stack of the main thread, even if that is in a loop, in a sleep or in an MPI call of the
user's. Then the job ends with exit status STALLED. A rank that comes to MPI_Finalize tells the
others how many steps its Reducers have made, so that no rank waits for another step of it.

The thread needs MPI_THREAD_MULTIPLE, which mpi4py asks for; without it a rank looks only while it
waits itself. A rank that holds Python's lock cannot answer: see last_word.py.
"""

import os
import sys
import threading
import traceback
import weakref
from time import perf_counter, sleep

from mpicomp.errors import MismatchError
from mpicomp.mpi import last_word
from mpicomp.mpi.start import at_end
from mpicomp.mpi.waiting import ranks_text, until

STALLED = 110  # exit status of a job in which a rank waited too long: ETIMEDOUT
LOOK = 0.2  # seconds between two looks of the thread
ANSWER = 3.0  # seconds in which the others must answer
GRACE = 5.0  # seconds after which all that a rank sent before it ended has arrived
TAG = 9110

_dogs = weakref.WeakSet()
_lookers = weakref.WeakSet()  # other objects whose look() the thread calls
_looking = threading.RLock()  # held by who looks for messages, and by who frees a communicator
_stop = threading.Event()
_thread = None
_process = None  # the id of the process that started the thread; a forked child has another


class Dog:
    """Answers on one communicator where this rank is, and knows which of its ranks have ended.

    knows  of several Dogs over as many ranks, the one that knows most does the asking
    left   {rank that has ended: (its `steps` then, this rank's clock when it told so)}
    """

    knows = 0

    def __init__(self, comm, tag=TAG):
        """Messages on `comm` with this tag are this Dog's alone."""
        self.comm, self.tag = comm, tag
        self.left, self._answers, self._sent, self._told = {}, set(), [], False
        if comm.size > 1:
            forget(comm)
            _start()
            _dogs.add(self)

    @property
    def awake(self) -> bool:
        """Does the thread receive this Dog's messages, whatever the main thread is doing?"""
        return _thread is not None and self in _dogs

    def look(self):
        """Receive all messages that have arrived, and answer them."""
        from mpi4py import MPI

        with _looking:
            if self not in _dogs:
                return
            while message := self.comm.improbe(MPI.ANY_SOURCE, self.tag, status := MPI.Status()):
                self.receive(*message.recv(), status.source)

    def look_alone(self):
        """Look, unless a thread does."""
        if _thread is None:
            self.look()

    def receive(self, kind, content, source):
        """Act on one message, of this kind and content, of rank `source`."""
        if kind == "ask":
            self._tell()
            self._send("answer", source)
        elif kind == "answer":
            self._answers.add(source)
        elif kind == "left":
            self.left[source] = content, perf_counter()

    def ask(self) -> list:
        """Make every other rank print where it is. Returns the ranks that did not answer."""
        self._told = True  # the traceback of the StallError is there already
        others = set(range(self.comm.size)) - {self.comm.rank}
        for rank in others:
            self._send("ask", rank)
        until(lambda: self.look_alone() or others <= self._answers, ANSWER)
        return sorted(others - self._answers)

    def check_ended(self, what):
        """MismatchError if a rank has ended, and all that it sent before must have arrived."""
        self.look_alone()
        for rank, (_, since) in sorted(self.left.items()):
            if perf_counter() - since > GRACE:
                raise MismatchError(f"rank {rank} has ended, while rank {self.comm.rank} waits, "
                                    f"{what}: every rank must make the same calls")

    def leave(self):
        """Tell all others that this rank makes no more calls on the communicator."""
        for rank in range(self.comm.size):
            if rank != self.comm.rank:
                self._send("left", rank, self.steps())

    def end(self):
        """`leave`, and receive nothing more."""
        with _looking:  # the communicator may be freed after this
            if self in _dogs:
                self.leave()
                _dogs.discard(self)

    def steps(self):
        """How many steps this rank has made on this communicator; None if it makes none."""

    def where(self) -> str:
        """Where this rank is, in words."""
        return "in no step of a Reducer"

    def _send(self, kind, rank, content=None):
        self._sent.append(self.comm.isend((kind, content), rank, self.tag))

    def _tell(self):
        """Print where this rank is, once."""
        if self._told:
            return
        self._told = True
        frame = sys._current_frames().get(threading.main_thread().ident)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        say(self.comm, f"another rank waits for too long; this one is {self.where()}\n{stack}")


class Watchdog(Dog):
    """The Dog of one averager, on its communicator."""

    knows = 1

    def __init__(self, averager):
        self._averager = weakref.ref(averager)
        super().__init__(averager.comm)
        if not averager.mode.asynchronous:  # else ranks may make unequal numbers of steps
            averager.link.pipeline.on_quiet = self.check_left

    def check_left(self):
        """Raise MismatchError if a rank has ended whose packets this rank waits for."""
        self.look_alone()
        averager = self._averager()
        for rank, (steps, _) in sorted(self.left.items()):
            if steps is not None and steps <= averager.step:
                raise MismatchError(
                    f"rank {rank} has ended after {steps} steps, while others are in step "
                    f"{averager.step}, counted from 0: every rank must make the same number of "
                    "steps, also one that has fewer examples")

    def steps(self):
        averager = self._averager()
        return None if averager is None else averager.step

    def where(self):
        averager = self._averager()
        return averager.link.pipeline.where(averager.step) if averager else super().where()


def say(comm, text):
    """Write text to stderr in one piece, with the rank in front of each line."""
    sleep(min(0.02 * comm.rank, 0.5))  # mpirun passes on 4 kB at a time: take turns
    os.write(2, "".join(f"[rank {comm.rank} of {comm.size}] {line}\n"
                        for line in text.splitlines()).encode())


def ask_all():
    """Make every rank print where it is, after a StallError that ends this rank."""
    dog = max(list(_dogs), key=lambda dog: (dog.comm.size, dog.knows), default=None)
    silent = dog.ask() if dog else []
    if silent:
        say(dog.comm, f"{ranks_text(silent)} did not answer within {ANSWER:g} s: "
                      "ended, stopped, or inside of code that holds Python's lock (then its "
                      "stack, without a rank in front, may be among these lines)")
    sleep(0.5)  # what they wrote is still on its way


def forget(comm):
    """Stop receiving on this communicator, which gets another owner or is freed."""
    with _looking:
        for dog in [dog for dog in _dogs if dog.comm == comm]:
            _dogs.discard(dog)


def look_at(looker):
    """Have the thread, if there is one, call looker.look() a few times a second."""
    _start()
    _lookers.add(looker)


def _start():
    """Start the thread, if MPI allows one, and have the others told when this rank ends."""
    global _thread, _process
    if _process is not None:
        return
    from mpi4py import MPI

    _process = os.getpid()
    if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
        _thread = threading.Thread(target=_run, name="mpicomp watchdog", daemon=True)
        _thread.start()
    at_end(_end)


def _run():
    while not _stop.wait(LOOK):
        last_word.put_off()
        for known in _dogs, _lookers:
            for one in list(known):
                try:
                    one.look()
                except Exception:  # its communicator was freed or revoked: nobody asks there now
                    known.discard(one)


def _end():
    """Before MPI ends: stop the thread, and tell the others."""
    if _stop.is_set() or os.getpid() != _process:
        return
    _stop.set()
    last_word.cancel()
    if _thread is not None:
        _thread.join(5.0)
    for dog in list(_dogs):
        try:
            dog.leave()
        except Exception:  # another rank is dead
            pass
