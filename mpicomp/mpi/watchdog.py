"""Where every rank is when one has waited too long, and which rank has left before the others.

A rank whose StallError nobody catches asks all others, over a communicator that was made with the
first call of this package. On each of them a thread looks for such a question a few times a second,
and prints step, bucket, call and the Python stack of the main thread, also where that is in a loop,
in a sleep or in an MPI call of the user's own. Then the job ends with exit status STALLED. A rank
that comes to MPI_Finalize says so, and how many steps its Reducers have made, so that nobody waits
for another one.

The thread needs MPI_THREAD_MULTIPLE, which mpi4py asks for; without it a rank looks while it waits
itself. A rank that holds Python's lock cannot answer: see last_word.py.
"""

import atexit
import os
import sys
import threading
import traceback
import weakref
from time import perf_counter, sleep

from mpicomp.errors import MismatchError
from mpicomp.mpi import last_word

STALLED = 110  # exit status of a job that waited too long: ETIMEDOUT
LOOK = 0.2  # seconds between two looks of the thread
ANSWER = 3.0  # seconds in which the others must answer
GRACE = 5.0  # seconds in which what a rank sent before it ended must be here
TAG = 9110

_dogs = weakref.WeakSet()
_looking = threading.RLock()  # who frees a communicator waits until the thread is out of it
_stop = threading.Event()
_thread = None
_process = None  # the one that started all this, not a child that was forked from it


class Dog:
    """Of a communicator that nobody else uses: answers for this rank, and knows who has ended."""

    def __init__(self, comm):
        self.comm = comm
        self.left, self._answers, self._sent, self._said = {}, set(), [], False
        if comm.size > 1:
            forget(comm)
            _start()
            _dogs.add(self)

    def look(self):
        """Answer what others ask, and take in what they say (from the thread, if there is one)."""
        from mpi4py import MPI

        with _looking:
            if self not in _dogs:
                return
            while message := self.comm.improbe(MPI.ANY_SOURCE, TAG, status := MPI.Status()):
                kind, steps = message.recv()
                if kind == "ask":
                    self._tell()
                    self._send("answer", status.source)
                elif kind == "answer":
                    self._answers.add(status.source)
                else:
                    self.left[status.source] = steps, perf_counter()

    def look_alone(self):
        """Look, unless a thread does."""
        if _thread is None:
            self.look()

    def ask(self):
        """Have every rank print where it is. Returns those that did not answer in time."""
        self._said = True  # the traceback of the StallError is there already
        others = set(range(self.comm.size)) - {self.comm.rank}
        for rank in others:
            self._send("ask", rank)
        start = perf_counter()
        while others - self._answers and perf_counter() - start < ANSWER:
            self.look_alone()
            sleep(0.01)
        return sorted(others - self._answers)

    def check_ended(self, what):
        """Raise MismatchError if a rank has ended, and what it said before would be here by now."""
        self.look_alone()
        for rank, (_, since) in sorted(self.left.items()):
            if perf_counter() - since > GRACE:
                raise MismatchError(f"rank {rank} has ended, while rank {self.comm.rank} waits, "
                                    f"{what}: every rank must make the same calls")

    def leave(self):
        """Before MPI ends: say so."""
        for rank in range(self.comm.size):
            if rank != self.comm.rank:
                self._send("left", rank, self.steps())

    def steps(self):
        """How many there were, as far as this communicator is about steps."""

    def where(self) -> str:
        """Where this rank is, in words."""
        return "in no step of a Reducer"

    def _send(self, kind, rank, steps=None):
        self._sent.append(self.comm.isend((kind, steps), rank, TAG))

    def _tell(self):
        """Print where this rank is, once."""
        if self._said:
            return
        self._said = True
        frame = sys._current_frames().get(threading.main_thread().ident)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        say(self.comm, f"another rank waits for too long; this one is {self.where()}\n{stack}")


class Watchdog(Dog):
    """Of one averager, on its communicator: knows which ranks have left after which step."""

    def __init__(self, averager):
        self._averager = weakref.ref(averager)
        super().__init__(averager.comm)
        if not averager.mode.asynchronous:  # there ranks may make other numbers of steps
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
    """Write lines to stderr in one piece, with the rank in front of each."""
    sleep(min(0.02 * comm.rank, 0.5))  # mpirun passes on 4 kB at a time: take turns
    os.write(2, "".join(f"[rank {comm.rank} of {comm.size}] {line}\n"
                        for line in text.splitlines()).encode())


def ask_all():
    """After a StallError that ends this rank: every rank says where it is."""
    # over as many ranks as there are, and as a Reducer's, which knows more
    dogs = sorted(_dogs, key=lambda dog: (-dog.comm.size, not isinstance(dog, Watchdog)))
    for dog in dogs[:1]:
        silent = dog.ask()
        if silent:
            say(dog.comm, f"rank {', '.join(map(str, silent))} did not answer within {ANSWER:g} s: "
                          "ended, stopped, or inside of code that holds Python's lock (then its "
                          "stack, without a rank in front, may be among these lines)")
    sleep(0.5)  # what they wrote is still on its way


def forget(comm):
    """Nobody looks at this communicator any more: it gets another owner, or is freed."""
    with _looking:
        for dog in [dog for dog in _dogs if dog.comm == comm]:
            _dogs.discard(dog)


def _start():
    """Have the thread run, if MPI allows one, and others hear of it when this rank ends."""
    global _thread, _process
    if _process is not None:
        return
    from mpi4py import MPI

    _process = os.getpid()
    if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
        _thread = threading.Thread(target=_run, name="mpicomp watchdog", daemon=True)
        _thread.start()
    atexit.register(_end)
    # MPI_Finalize deletes the attributes of COMM_SELF before anything else
    MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=_end), None)


def _run():
    while not _stop.wait(LOOK):
        last_word.put_off()
        for dog in list(_dogs):
            try:
                dog.look()
            except Exception:  # the communicator was freed or revoked: nobody asks there any more
                _dogs.discard(dog)


def _end(*_):
    """MPI ends: nobody may be in it, and the others must know."""
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
