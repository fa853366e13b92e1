"""The one door to mpi4py: a duplicate of COMM_WORLD, and clear words where MPI is not right."""

import sys
import traceback
from time import perf_counter, sleep

from mpicomp import watchdog
from mpicomp.errors import DeadRankError, StallError
from mpicomp.start import at_end, intracommunicator, load, not_at_end  # for those who know mpi

_abandoned = []


def communicator(comm=None):
    """A private duplicate of `comm`, by default of COMM_WORLD, so that messages never mix."""
    return intracommunicator(comm).Dup()


def largest() -> int:
    """How many elements one call may have: 2**31 - 1, unless this MPI has MPI 4's large counts."""
    return 2**31 - 1 if load().Get_version() < (4, 0) else 2**63 - 1


def ranks_here(comm) -> int:
    """How many ranks of `comm` share this node's memory and cores. Collective."""
    if comm.size == 1:
        return 1
    node = comm.Split_type(load().COMM_TYPE_SHARED)
    count = node.size
    node.Free()
    return count


def wait(comm, request, timeout, what):
    """Wait for a request without spinning. Raises StallError after `timeout` seconds."""
    start, pause = perf_counter(), 0.0
    while not request.Test():
        if perf_counter() - start > timeout:
            keep(request)
            raise StallError(f"rank {comm.rank} waited {timeout:g} s while {what}: another rank "
                             "has ended or never came here, or is slower than stall_timeout allows")
        sleep(pause)
        pause = min(pause + 1e-5, 1e-3)


def keep(*what):
    """Never free these: calls are open that MPI may yet answer by writing there."""
    _abandoned.append(what)


def dead_rank(error) -> bool:
    """Does this exception say that a rank has died? ULFM's error classes, and our own."""
    if isinstance(error, DeadRankError):
        return True
    from mpi4py import MPI

    return isinstance(error, MPI.Exception) and error.Get_error_class() in (
        MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED) and (
        MPI.ERR_PROC_FAILED != MPI.ERR_UNKNOWN)


def status(error) -> int:
    """What a program ends with where nobody catches this exception (docs/exit-codes.md)."""
    return DeadRankError.status if dead_rank(error) else getattr(error, "status", 1)


def end_all_on_exception(comm):
    """From now on an exception that nobody catches ends every rank, and none is left hanging.

    `python -m mpi4py` and launch/run do the same; this is for a plain `mpirun python script.py`.
    After a StallError every rank first says where it is, and the exit status is watchdog.STALLED.
    """
    if comm.size == 1 or getattr(sys.excepthook, "ends_all", False):
        return
    previous = sys.excepthook

    def hook(kind, value, trace):
        if previous is sys.__excepthook__:
            where = f"[rank {comm.rank} of {comm.size}] "
            lines = "".join(traceback.format_exception(kind, value, trace)).splitlines()
            sys.stderr.write("".join(f"{where}{line}\n" for line in lines))
        else:
            previous(kind, value, trace)
        sys.stderr.flush()
        if issubclass(kind, StallError):
            watchdog.ask_all()
            comm.Abort(watchdog.STALLED)
        if issubclass(kind, (Exception, KeyboardInterrupt)):
            sleep(0.5)  # let the others say theirs
            comm.Abort(status(value))

    hook.ends_all = True
    sys.excepthook = hook
