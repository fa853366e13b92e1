"""What the watchdog's thread knows of torch's waits, and does for a process group."""

import sys
import threading
import traceback
import weakref
from contextlib import contextmanager
from time import perf_counter, sleep

from mpicomp.errors import MismatchError, StallError
from mpicomp.mpi import watchdog


class GroupDog(watchdog.Watchdog):
    """Answers where this rank is on a group, and on rank 0 of the default group where the store is.

    step  the number of collectives that this rank has begun: who has ended after fewer than
          another rank is in leaves that one in vain
    """

    def __init__(self, comm, tag):
        self.comm, self.tag, self.store = comm, tag, None
        self.step, self._what, self._told = 0, None, None
        self.left, self._answers, self._sent, self._said = {}, set(), [], False
        self._lock = threading.Lock()
        if comm.size > 1:
            watchdog._start()
        self.awake = comm.size > 1 and watchdog._thread is not None
        if self.awake:
            watchdog._dogs.add(self)

    @contextmanager
    def collective(self, what):
        self.step, self._what = self.step + 1, what
        try:
            yield
        finally:
            self._what = None

    def look(self):
        with self._lock:  # the communicator may be freed once the group has ended
            if self.awake:
                self._listen()

    def _listen(self):
        from mpi4py import MPI

        while message := self.comm.improbe(MPI.ANY_SOURCE, self.tag, status := MPI.Status()):
            kind, said = message.recv()
            if kind == "ask":
                self._tell()
                self._send("answer", status.source)
            elif kind == "answer":
                self._answers.add(status.source)
            elif kind == "left":
                self.left[status.source] = said
            elif kind == "store?":
                try:
                    self._send("store", status.source, self.store.address(said))
                except Exception as error:
                    self._send("store", status.source, error)
            else:
                self._told = said

    def check_left(self):
        """Raise MismatchError if a rank has ended that this rank's collective needs."""
        for rank, calls in sorted(self.left.items()):
            if calls < self.step:
                raise MismatchError(
                    f"rank {rank} of the group has ended after {calls} collectives of torch."
                    f"distributed, while rank {self.comm.rank} waits in number {self.step}, "
                    f"{self._what}: every rank of a group must make the same calls")

    def leave(self):
        """This rank makes no more calls."""
        for rank in range(self.comm.size):
            if rank != self.comm.rank:
                self._send("left", rank, self.step)

    def end(self):
        """The group is given up: nothing is heard or said on its communicator any more."""
        with self._lock:
            if self.awake:
                self.leave()
            self.awake = False
        watchdog._dogs.discard(self)

    def ask_for_store(self, seconds):
        """(host, port) of the store, which rank 0 makes if need be."""
        from mpi4py import MPI

        self._send("store?", 0, MPI.Get_processor_name())
        start = perf_counter()
        while self._told is None:
            if perf_counter() - start > seconds:
                raise StallError(f"rank {self.comm.rank} waited {seconds:g} s for rank 0 to tell "
                                 "the address of a store")
            sleep(0.01)
        if isinstance(self._told, Exception):
            raise self._told
        return self._told

    def _send(self, kind, rank, said=None):
        self._sent.append(self.comm.isend((kind, said), rank, self.tag))

    def _tell(self):
        if self._said:
            return
        self._said = True
        frame = sys._current_frames().get(threading.main_thread().ident)
        known = any(dog._said for dog in watchdog._dogs if dog is not self)
        stack = "" if known or frame is None else "".join(traceback.format_stack(frame))
        where = (f"in collective {self.step} of a group of torch.distributed, {self._what}"
                 if self._what else f"in no collective of a group of torch.distributed that the "
                                    f"other is in: {self.step} are done")
        watchdog.say(self.comm, f"another rank waits for too long; this one is {where}\n{stack}")


class Vigil:
    """Of one HookState: does torch wait for a step whose last bucket never came?

    torch's wait has no end, and no Python runs in it. Others that wait, too, have their own limit.
    """

    _said = False  # it is no Watchdog, and never asked

    def __init__(self, state, comm, timeout):
        self._state, self.comm, self._timeout = weakref.ref(state), comm, timeout
        watchdog._start()
        watchdog._dogs.add(self)  # without a thread nobody looks

    def look(self):
        state = self._state()
        since = state and state._since
        if since is None or perf_counter() - since < self._timeout:
            return
        state._since = None
        error = StallError(
            f"rank {self.comm.rank} waited {self._timeout:g} s in backward() for DDP's last "
            f"bucket, after {len(state._futures)} others: it never comes with skip_all_reduce_"
            "unused_params=True, which the hook cannot work with; leave it out")
        watchdog.say(self.comm, f"StallError: {error}")
        for future, *_ in state._futures:
            future.set_exception(error)  # torch's wait ends

    def ask(self):
        return []

    def leave(self):
        pass
