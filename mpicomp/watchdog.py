"""Where every rank is when one has waited too long, and which rank has left before the others.

A rank whose StallError nobody catches asks all others over its Reducer's communicator. On each of
them a thread looks for such a question a few times a second, and prints step, bucket, call and the
Python stack of the main thread, also where that is in a loop, in a sleep or in an MPI call of the
user's own. Then the job ends with exit status STALLED. A rank that comes to MPI_Finalize says how
many steps it has made, so that nobody waits for another one.

The thread needs MPI_THREAD_MULTIPLE, which mpi4py asks for; without it a rank speaks for itself.
"""

import atexit
import os
import sys
import threading
import traceback
import weakref
from time import perf_counter, sleep

from mpicomp.errors import MismatchError

STALLED = 110  # exit status of a job that waited too long: ETIMEDOUT
LOOK = 0.2  # seconds between two looks of the thread
ANSWER = 3.0  # seconds in which the others must answer
TAG = 9110

_dogs = weakref.WeakSet()
_stop = threading.Event()
_thread = None


class Watchdog:
    """Of one Reducer: answers for this rank, and knows which ranks have left after which step."""

    def __init__(self, reducer):
        self._reducer, self.comm = weakref.ref(reducer), reducer.comm
        self.left, self._answers, self._sent, self._said = {}, set(), [], False
        if self.comm.size > 1 and _start():
            _dogs.add(self)
            if not reducer._exchange.asynchronous:  # there ranks may make other numbers of steps
                reducer._pipeline.on_quiet = self.check_left

    def look(self):
        """Answer what others ask, and take in what they say (from the thread)."""
        from mpi4py import MPI

        while message := self.comm.improbe(MPI.ANY_SOURCE, TAG, status := MPI.Status()):
            kind, steps = message.recv()
            if kind == "ask":
                self._tell()
                self._send("answer", status.source)
            elif kind == "answer":
                self._answers.add(status.source)
            else:
                self.left[status.source] = steps

    def ask(self):
        """Have every rank print where it is. Returns those that did not answer in time."""
        self._said = True  # the traceback of the StallError is there already
        others = set(range(self.comm.size)) - {self.comm.rank}
        for rank in others:
            self._send("ask", rank)
        start = perf_counter()
        while others - self._answers and perf_counter() - start < ANSWER:
            sleep(0.01)
        return sorted(others - self._answers)

    def check_left(self):
        """Raise MismatchError if a rank has ended whose packets this rank waits for."""
        reducer = self._reducer()
        for rank, steps in sorted(self.left.items()):
            if steps <= reducer.step:
                raise MismatchError(
                    f"rank {rank} has ended after {steps} steps, while others are in step "
                    f"{reducer.step}, counted from 0: every rank must make the same number of "
                    "steps, also one that has fewer examples")

    def leave(self):
        """Before MPI ends: say how many steps there were."""
        reducer = self._reducer()
        for rank in range(self.comm.size) if reducer is not None else ():
            if rank != self.comm.rank:
                self._send("left", rank, reducer.step)

    def _send(self, kind, rank, steps=None):
        self._sent.append(self.comm.isend((kind, steps), rank, TAG))

    def _tell(self):
        """Print where this rank is, once."""
        reducer = self._reducer()
        if self._said or reducer is None:
            return
        self._said = True
        frame = sys._current_frames().get(threading.main_thread().ident)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        say(self.comm, f"another rank waits for too long; this one is "
                       f"{reducer._pipeline.where(reducer.step)}\n{stack}")


def say(comm, text):
    """Write lines to stderr in one piece, with the rank in front of each."""
    sleep(min(0.02 * comm.rank, 0.5))  # mpirun passes on 4 kB at a time: take turns
    os.write(2, "".join(f"[rank {comm.rank} of {comm.size}] {line}\n"
                        for line in text.splitlines()).encode())


def ask_all():
    """After a StallError that ends this rank: every rank of every Reducer says where it is."""
    for dog in list(_dogs):
        silent = dog.ask()
        if silent:
            say(dog.comm, f"rank {', '.join(map(str, silent))} did not answer within {ANSWER:g} s: "
                          "ended, stopped, or inside of code that holds Python's lock")
            break
    sleep(0.5)  # what they wrote is still on its way


def _start() -> bool:
    """Have the thread run, if MPI allows one."""
    global _thread
    from mpi4py import MPI

    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        return False
    if _thread is None:
        _thread = threading.Thread(target=_run, name="mpicomp watchdog", daemon=True)
        _thread.start()
        atexit.register(_end)
        # MPI_Finalize deletes the attributes of COMM_SELF before anything else
        MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=_end), None)
    return True


def _run():
    while not _stop.wait(LOOK):
        for dog in list(_dogs):
            try:
                dog.look()
            except Exception:  # the communicator was freed or revoked: nobody asks there any more
                _dogs.discard(dog)


def _end(*_):
    """MPI ends: nobody may be in it, and the others must know."""
    if _stop.is_set():
        return
    _stop.set()
    _thread.join(5.0)
    for dog in list(_dogs):
        try:
            dog.leave()
        except Exception:  # another rank is dead
            pass
