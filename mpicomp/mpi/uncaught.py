"""An exception that nobody catches on one rank ends all ranks, with a status that says why."""

import os
import sys
import traceback
from time import sleep

from mpicomp.errors import DeadRankError, StallError
from mpicomp.mpi import watchdog


def dead_rank(error) -> bool:
    """Does this exception say that a rank has died? True for ULFM's error classes and our own."""
    if isinstance(error, DeadRankError):
        return True
    from mpi4py import MPI

    return isinstance(error, MPI.Exception) and error.Get_error_class() in (
        MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED) and (
        MPI.ERR_PROC_FAILED != MPI.ERR_UNKNOWN)


def status(error) -> int:
    """The exit status of a program that this exception ends (docs/exit-codes.md)."""
    return DeadRankError.status if dead_rank(error) else getattr(error, "status", 1)


def end_all_on_exception(comm):
    """From now on an exception that nobody catches on this rank ends all ranks of the job.

    `python -m mpi4py` and launch/run do the same; this is for a plain `mpirun python script.py`.
    After a StallError every rank first prints where it is, and the exit status is watchdog.STALLED.
    """
    if comm.size > 1 and not isinstance(sys.excepthook, _EndAll):
        sys.excepthook = _EndAll(comm)


class _EndAll:
    """A sys.excepthook that prints the exception by the hook before it, then ends all ranks."""

    def __init__(self, comm):
        self._previous, self._process = sys.excepthook, os.getpid()
        self._prefix = f"[rank {comm.rank} of {comm.size}] "

    def __call__(self, kind, value, trace):
        from mpi4py import MPI

        if os.getpid() != self._process:  # a forked child, which is no rank
            return self._previous(kind, value, trace)
        self._print(kind, value, trace)
        if issubclass(kind, StallError):
            watchdog.ask_all()
            MPI.COMM_WORLD.Abort(watchdog.STALLED)
        if issubclass(kind, (Exception, KeyboardInterrupt)):
            sleep(0.5)  # let other ranks print theirs
            MPI.COMM_WORLD.Abort(status(value))

    def _print(self, kind, value, trace):
        if self._previous is sys.__excepthook__:
            lines = "".join(traceback.format_exception(kind, value, trace)).splitlines()
            sys.stderr.write("".join(f"{self._prefix}{line}\n" for line in lines))
        else:
            self._previous(kind, value, trace)
        sys.stderr.flush()
        if hasattr(sys.stderr, "getvalue"):  # torch's hook collects it, to print it later
            sys.__stderr__.write(sys.stderr.getvalue())
            sys.__stderr__.flush()
