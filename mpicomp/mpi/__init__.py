"""The one door to mpi4py: a duplicate of COMM_WORLD, and clear words where MPI is not right."""

import os
import sys
import traceback
from hashlib import blake2b
from time import sleep

import numpy as np

from mpicomp.errors import DeadRankError, MismatchError, SpecError, StallError
from mpicomp.mpi import last_word, shelf, watchdog
from mpicomp.mpi.start import at_end, intracommunicator, load, not_at_end
from mpicomp.mpi.waiting import abandoned, allgather, bcast, give_up, keep, limit, seconds, wait

__all__ = ["abandoned", "allgather", "at_end", "bcast", "communicator", "crowded", "dead_rank",
           "end_all_on_exception", "family", "give_up", "intracommunicator", "keep", "largest",
           "limit", "load", "node", "not_at_end", "part", "ranks_here", "release", "seconds",
           "split", "status", "subgroup", "wait"]

GATHERING = 9111  # tag

family = shelf.family


def communicator(comm=None, timeout=None, what="meeting the other ranks"):
    """A private duplicate of `comm`, by default of COMM_WORLD, so that messages never mix.

    Collective: all ranks must come with the same words `what`, or MismatchError names the first
    that did not. StallError where one does not come within `timeout` seconds (None: see `seconds`),
    which is from then on the limit of every wait on the duplicate and on what is made of it. One
    that was released on all ranks is taken again. The first call has an exception that nobody
    catches end all ranks.
    """
    try:
        comm = intracommunicator(comm)
    except SpecError:
        end_all_on_exception(load().COMM_WORLD)  # the others may have a right one, and wait
        raise
    end_all_on_exception(comm)
    above, timeout = shelf.of(comm), seconds(timeout)
    number, again = _agree_on_number(comm, above, timeout, what)
    if again:
        private = above.free.pop(number)
    else:
        above.used.update([] if number is None else [number])  # None: more than are counted
        private = _duplicate(comm, shelf.Shelf(above, number), timeout)
    shelf.of(private).timeout = timeout
    last_word.allow(timeout)
    if comm.size > 1 and above.above is None and above.dog is None:
        above.kept["dog"] = _duplicate(comm, shelf.Shelf(above), timeout)
        above.dog = watchdog.Dog(above.kept["dog"])
    return private


def _agree_on_number(comm, above, timeout, what):
    """(number, whether it is a duplicate that nobody uses any more), the same on all ranks."""
    from mpi4py import MPI

    place = np.frombuffer(blake2b(what.encode(), digest_size=8).digest(), np.uint8)
    mine = np.concatenate([shelf.bits(above.free), ~shelf.bits(above.used), place, ~place])
    common = np.zeros_like(mine)
    comm = above.kept.get("dog", comm)  # so that what is given up is not open on the user's
    wait(comm, comm.Iallreduce(mine, common, MPI.BAND), timeout, what)
    if (common[-16:] != mine[-16:]).any():  # found by all alike
        everyone = allgather(comm, what, what, timeout)
        other = next(rank for rank, there in enumerate(everyone) if there != everyone[0])
        raise MismatchError(f"rank {other} is {everyone[other]}, rank 0 is {everyone[0]}: every "
                            "rank must make the same calls in the same order")
    free, fresh = map(shelf.numbers, np.split(common[:-16], 2))
    return (free[0], True) if free else (fresh[0] if fresh else None, False)


def _duplicate(comm, own, timeout):
    """A duplicate of `comm` with this shelf."""
    private, request = comm.Idup()
    try:
        wait(comm, request, timeout, "duplicating a communicator")
    except Exception:
        keep(private)
        raise
    shelf.put(private, own)
    return private


def release(comm):
    """What `communicator` gave is not needed any more: the next that asks for one may have it.

    Not collective: it is taken again when all ranks have released it. Where a call was given up on
    it, or on what was made of it, it is not, for the call could meet one of the next user's.
    """
    own = shelf.of(comm)
    if own.number is not None and not own.open:
        own.above.free[own.number] = comm


def part(comm, name):
    """A duplicate of a communicator of this package's, made once for each name. Collective."""
    kept = shelf.of(comm).kept
    if name not in kept:
        kept[name] = _duplicate(comm, shelf.Shelf(shelf.of(comm)), limit(comm))
    return kept[name]


def node(comm):
    """The ranks of `comm` that share memory and cores with this one. Collective, made once."""
    from mpi4py import MPI

    return _once(comm, "node", lambda: comm.Split_type(MPI.COMM_TYPE_SHARED))


def split(comm, name, color):
    """The ranks of `comm` with the same color. Collective, made once for each name."""
    return _once(comm, name, lambda: comm.Split(color))


def _once(comm, name, make):
    own = shelf.of(comm)
    if name not in own.kept:
        # MPI can make these only while everybody waits: so all must have come before
        wait(comm, comm.Ibarrier(), limit(comm), "making a communicator")
        own.kept[name] = make()
        shelf.put(own.kept[name], shelf.Shelf(own))
    return own.kept[name]


def subgroup(comm, ranks, timeout):
    """A communicator of these ranks of `comm`, which all must call this, and no others."""
    here, token = ranks.index(comm.rank), bytearray(1)
    away = 1
    while away < len(ranks):  # as a barrier of these ranks: MPI's own waits without a limit
        to, source = (ranks[(here + sign * away) % len(ranks)] for sign in (1, -1))
        for request in (comm.Irecv(token, source, GATHERING), comm.Isend(bytes(1), to, GATHERING)):
            wait(comm, request, timeout, f"making a communicator of ranks {ranks}")
        away *= 2
    made = comm.Create_group(comm.group.Incl(ranks))
    shelf.put(made, shelf.Shelf(shelf.of(comm)))
    return made


def largest() -> int:
    """How many elements one call may have: 2**31 - 1, unless this MPI has MPI 4's large counts."""
    return 2**31 - 1 if load().Get_version() < (4, 0) else 2**63 - 1


def ranks_here(comm) -> int:
    """How many ranks of `comm` share this node's memory and cores. Collective."""
    return 1 if comm.size == 1 else node(comm).size


def crowded(comm) -> bool:
    """Do more ranks of `comm` share this node than there are cores for all of them? Collective.

    mpirun may have bound each of them to a core of its own.
    """
    here = comm if comm.size == 1 else node(comm)
    cores = set().union(*allgather(here, os.sched_getaffinity(0), "counting the node's cores"))
    return here.size > len(cores)


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
    from mpi4py import MPI

    previous, process, who = sys.excepthook, os.getpid(), f"[rank {comm.rank} of {comm.size}] "

    def hook(kind, value, trace):
        if os.getpid() != process:  # a child that was forked: its end is no end of a rank
            return previous(kind, value, trace)
        if previous is sys.__excepthook__:
            lines = "".join(traceback.format_exception(kind, value, trace)).splitlines()
            sys.stderr.write("".join(f"{who}{line}\n" for line in lines))
        else:
            previous(kind, value, trace)
        sys.stderr.flush()
        if hasattr(sys.stderr, "getvalue"):  # torch's hook collects it, to print it later
            sys.__stderr__.write(sys.stderr.getvalue())
            sys.__stderr__.flush()
        if issubclass(kind, StallError):
            watchdog.ask_all()
            MPI.COMM_WORLD.Abort(watchdog.STALLED)
        if issubclass(kind, (Exception, KeyboardInterrupt)):
            sleep(0.5)  # let the others say theirs
            MPI.COMM_WORLD.Abort(status(value))

    hook.ends_all = True
    sys.excepthook = hook
