"""What the watchdog's thread does for torch: it answers for a process group, and ends a wait."""

import weakref
from contextlib import contextmanager
from time import perf_counter

from mpicomp import mpi
from mpicomp.errors import MismatchError, StallError
from mpicomp.mpi import watchdog


class GroupDog(watchdog.Dog):
    """The Dog of a process group; on rank 0 of the default group it also tells where the store is.

    step   how many collectives this rank has begun. A rank that ended after fewer is missing in one
    store  the SharedStore of the default group, or None
    """

    knows = 1

    def __init__(self, comm, tag):
        self.store, self.step = None, 0
        self._what, self._address = None, None
        super().__init__(comm, tag)
        if not self.awake:  # nobody would look while this rank is in torch
            watchdog.forget(comm)

    @contextmanager
    def collective(self, what):
        """In this block the rank is in torch.distributed's collective of this name."""
        self.step, self._what = self.step + 1, what
        try:
            yield
        finally:
            self._what = None

    def receive(self, kind, content, source):
        if kind == "store?":
            try:
                self._send("store", source, self.store.address(content))
            except Exception as error:
                self._send("store", source, error)
        elif kind == "store":
            self._address = content
        else:
            super().receive(kind, content, source)

    def check_left(self):
        """Raise MismatchError if a rank has ended that this rank's collective needs."""
        for rank, (calls, _) in sorted(self.left.items()):
            if calls < self.step:
                raise MismatchError(
                    f"rank {rank} of the group has ended after {calls} collectives of torch."
                    f"distributed, while rank {self.comm.rank} waits in number {self.step}, "
                    f"{self._what}: every rank of a group must make the same calls")

    def steps(self):
        return self.step

    def where(self):
        if self._what:
            return f"in collective {self.step} of a group of torch.distributed, {self._what}"
        return ("in no collective of a group of torch.distributed that the other is in: "
                f"{self.step} are done")

    def ask_for_store(self, seconds):
        """(host, port) of the store, which rank 0 makes if there is none yet."""
        from mpi4py import MPI

        self._send("store?", 0, MPI.Get_processor_name())
        if not mpi.until(lambda: self._address is not None, seconds):
            raise StallError(f"rank {self.comm.rank} waited {seconds:g} s for rank 0 to tell "
                             "the address of a store")
        if isinstance(self._address, Exception):
            raise self._address
        return self._address


class Vigil:
    """Ends torch's wait for a step of one HookState of which DDP never gives the last bucket.

    That wait has no time limit and runs no Python. Other ranks have time limits of their own.
    """

    def __init__(self, state, comm, timeout):
        self._state, self.comm, self._timeout = weakref.ref(state), comm, timeout
        watchdog.look_at(self)

    def look(self):
        """From the thread: have torch raise StallError if the last bucket is overdue."""
        state = self._state()
        since = state and state.since
        if since is None or perf_counter() - since < self._timeout:
            return
        state.since = None
        error = StallError(
            f"rank {self.comm.rank} waited {self._timeout:g} s in backward() for DDP's last "
            f"bucket, after {len(state.futures)} others: it never comes with skip_all_reduce_"
            "unused_params=True, which the hook cannot work with; leave it out")
        watchdog.say(self.comm, f"StallError: {error}")
        for future, *_ in state.futures:
            future.set_exception(error)  # torch's wait ends
