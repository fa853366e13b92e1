"""Every wait for other ranks: it has a time limit, does not spin, and says what it waited for."""

import os
import pickle
from time import perf_counter, sleep

import numpy as np

from mpicomp.errors import StallError
from mpicomp.mpi import shelf

LIMIT = 600.0  # seconds, where nobody says otherwise
QUIET = 0.5  # seconds of waiting between two questions whether it is in vain

_abandoned = []


def seconds(given=None) -> float:
    """The limit of a wait: that given, else MPICOMP_STALL_TIMEOUT's, else 600 seconds.

    What is no such number is refused where it was given, with the others (plan.bad_option).
    """
    try:
        limit = float(os.environ.get("MPICOMP_STALL_TIMEOUT", LIMIT) if given is None else given)
    except (TypeError, ValueError):
        return LIMIT
    return limit if limit > 0 else LIMIT


def limit(comm) -> float:
    """Seconds that a wait on this communicator may take: what was said when it was made."""
    return next((s.timeout for s in shelf.of(comm).line if s.timeout is not None), seconds())


def wait(comm, request, timeout, what):
    """Wait for a request without spinning. Raises StallError after `timeout` seconds.

    MismatchError before that where a rank is known to have ended.
    """
    start, pause, ask = perf_counter(), 0.0, QUIET
    while not request.Test():
        waited = perf_counter() - start
        if waited > timeout:
            keep(request)
            give_up(comm)
            raise StallError(f"rank {comm.rank} waited {timeout:g} s while {what}: another rank "
                             "has ended or never came here, or is slower than stall_timeout allows")
        if waited > ask:
            ask = waited + QUIET
            check_ended(comm, request, what)
        sleep(pause)
        pause = min(pause + 1e-5, 1e-3)


def check_ended(comm, request, what):
    """Raise MismatchError where a rank has ended that this one waits for."""
    dog = next((s.dog for s in shelf.of(comm).line if s.dog is not None), None)
    try:
        if dog is not None:
            dog.check_ended(what)
    except Exception:
        keep(request)
        give_up(comm)
        raise


def give_up(comm):
    """A call on this communicator stays open: no other may meet it."""
    for one in shelf.of(comm).line:
        one.open = True


def keep(*what):
    """Never free these: calls are open that MPI may yet answer by writing there."""
    _abandoned.append(what)


def abandoned() -> list:
    """What `keep` was told of."""
    return _abandoned


# ---- Python objects


def allgather(comm, value, what, timeout=None) -> list:
    """comm.allgather(value) with a time limit, that of the communicator by default."""
    timeout = limit(comm) if timeout is None else timeout
    mine = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = np.zeros(comm.size, np.int64)
    wait(comm, comm.Iallgather(np.array([mine.size], np.int64), sizes), timeout, what)
    sizes = sizes.tolist()
    everything = np.zeros(sum(sizes), np.uint8)
    wait(comm, comm.Iallgatherv(mine, [everything, sizes]), timeout, what)
    ends = np.cumsum(sizes).tolist()
    return [pickle.loads(everything[end - size:end]) for end, size in zip(ends, sizes)]


def bcast(comm, value, what, root=0, timeout=None):
    """comm.bcast(value, root) with a time limit, that of the communicator by default."""
    timeout = limit(comm) if timeout is None else timeout
    text = pickle.dumps(value) if comm.rank == root else b""
    size = np.array([len(text)], np.int64)
    wait(comm, comm.Ibcast(size, root), timeout, what)
    buffer = np.frombuffer(text, np.uint8).copy() if text else np.zeros(int(size[0]), np.uint8)
    wait(comm, comm.Ibcast(buffer, root), timeout, what)
    return value if comm.rank == root else pickle.loads(buffer)
