"""Communicators of this package's own: private duplicates of the user's, and what is made of them.

All are made with a time limit, so that a rank that does not come is an error of the others, and
are kept on shelves (shelf.py), to be used again.
"""

import os
from hashlib import blake2b

import numpy as np

from mpicomp.errors import MismatchError, SpecError
from mpicomp.mpi import last_word, shelf, watchdog
from mpicomp.mpi.start import intracommunicator, load
from mpicomp.mpi.uncaught import end_all_on_exception
from mpicomp.mpi.waiting import allgather, keep, limit, seconds_or_default, wait


def communicator(comm=None, timeout=None, what="meeting the other ranks"):
    """A private duplicate of `comm`, by default of COMM_WORLD, so that messages never mix.

    Collective. A duplicate that all ranks have released is used again. From the first call on, an
    exception that nobody catches ends all ranks.

    timeout  seconds that each wait on the duplicate, and on any communicator made of it, may take;
             None: see `seconds_or_default`. StallError if a rank does not come here in that time
    what     what the ranks are about to do, in words that must be the same on all ranks, or
             MismatchError names the first rank whose words differ
    """
    try:
        comm = intracommunicator(comm)
    except SpecError:
        end_all_on_exception(load().COMM_WORLD)  # other ranks may wait with a right one
        raise
    end_all_on_exception(comm)
    above, timeout = shelf.of(comm), seconds_or_default(timeout)
    number, again = _agree_on_number(comm, above, timeout, what)
    if again:
        private = above.free.pop(number)
    else:
        above.used.update([] if number is None else [number])  # None: all are in use
        private = _duplicate(comm, shelf.Shelf(above, number), timeout)
    shelf.of(private).timeout = timeout
    last_word.allow(timeout)
    if comm.size > 1 and above.above is None and above.dog is None:
        above.kept["dog"] = _duplicate(comm, shelf.Shelf(above), timeout)
        above.dog = watchdog.Dog(above.kept["dog"])
    return private


def _agree_on_number(comm, above, timeout, what):
    """(number of the duplicate to take or make, whether it is there already), on all ranks alike.

    The number is None if one must be made and all numbers are in use.
    """
    from mpi4py import MPI

    place = np.frombuffer(blake2b(what.encode(), digest_size=8).digest(), np.uint8)
    mine = np.concatenate([shelf.bits(above.free), ~shelf.bits(above.used), place, ~place])
    common = np.zeros_like(mine)
    comm = above.kept.get("dog", comm)  # a call given up must not stay open on the user's
    wait(comm, comm.Iallreduce(mine, common, MPI.BAND), timeout, what)
    if (common[-16:] != mine[-16:]).any():  # on all ranks or none
        everyone = allgather(comm, what, what, timeout)
        other = next(rank for rank, there in enumerate(everyone) if there != everyone[0])
        raise MismatchError(f"rank {other} is {everyone[other]}, rank 0 is {everyone[0]}: every "
                            "rank must make the same calls in the same order")
    free, fresh = map(shelf.numbers, np.split(common[:-16], 2))
    return (free[0], True) if free else (fresh[0] if fresh else None, False)


def _duplicate(comm, own, timeout):
    """A duplicate of `comm`, with `own` as its shelf."""
    private, request = comm.Idup()
    try:
        wait(comm, request, timeout, "duplicating a communicator")
    except Exception:
        keep(private)
        raise
    shelf.put(private, own)
    return private


def release(comm):
    """Give back what `communicator` returned, to be used again once all ranks have given it back.

    Not collective. A communicator on which a call was given up, or on one made of it, is never used
    again: the open call could match one of the next user's.
    """
    own = shelf.of(comm)
    if own.number is not None and not own.open:
        own.above.free[own.number] = comm


def part(comm, name):
    """A duplicate of one of this package's communicators, made once for each name. Collective."""
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
        # `make` blocks without a limit: so first all ranks must have come
        wait(comm, comm.Ibarrier(), limit(comm), "making a communicator")
        own.kept[name] = make()
        shelf.put(own.kept[name], shelf.Shelf(own))
    return own.kept[name]


def largest() -> int:
    """Most elements of one call: 2**31 - 1, or 2**63 - 1 if this MPI has MPI 4's large counts."""
    return 2**31 - 1 if load().Get_version() < (4, 0) else 2**63 - 1


def ranks_here(comm) -> int:
    """How many ranks of `comm` share this node's memory and cores. Collective."""
    return 1 if comm.size == 1 else node(comm).size


def crowded(comm) -> bool:
    """Do more ranks of `comm` share this node than they have cores together? Collective."""
    here = comm if comm.size == 1 else node(comm)
    # the union, since mpirun may have bound each rank to a core of its own
    cores = set().union(*allgather(here, os.sched_getaffinity(0), "counting the node's cores"))
    return here.size > len(cores)
