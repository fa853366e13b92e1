"""Waits for other ranks: each has a time limit, sleeps between looks, and names what it waited for.

Calls on large arrays are made in pieces here, too: MPI 3 counts to 2**31 - 1.
"""

import os
import pickle
from numbers import Real
from time import perf_counter, sleep

import numpy as np

from mpicomp.errors import SpecError, StallError
from mpicomp.mpi import shelf

LIMIT = 600.0  # seconds a wait may take by default
QUIET = 0.5  # seconds of waiting after which, and then as often, a wait looks for ended ranks
PIECE = 1 << 30  # most bytes of one call

_abandoned = []


# ---- time limits


def stall_seconds(given=None):
    """Seconds that a wait may take: those given, else MPICOMP_STALL_TIMEOUT's, else 600.

    Unchecked: any object that was given, or the variable's text if it holds no number.
    """
    if given is not None:
        return given
    text = os.environ.get("MPICOMP_STALL_TIMEOUT", LIMIT)
    try:
        return float(text)
    except ValueError:
        return text


def stall_limit(given=None) -> float:
    """`stall_seconds`, or SpecError if that is no number of seconds."""
    seconds = stall_seconds(given)
    if isinstance(seconds, bool) or not isinstance(seconds, Real) or not seconds > 0:
        raise SpecError(f"stall_timeout={seconds!r} found, expected seconds, more than 0 "
                        "(MPICOMP_STALL_TIMEOUT)")
    return seconds


def seconds_or_default(given=None) -> float:
    """`stall_limit`, or 600 instead of its SpecError.

    For waits before the ranks compare their arguments, after which all raise that error alike.
    """
    try:
        return stall_limit(given)
    except SpecError:
        return LIMIT


def limit(comm) -> float:
    """Seconds that a wait on this communicator may take, fixed when it or its parent was made."""
    return next((one.timeout for one in shelf.of(comm).line if one.timeout is not None),
                seconds_or_default())


# ---- waiting


def until(done, timeout, on_quiet=None) -> bool:
    """Call `done()` until it is true, for `timeout` seconds at most. Returns whether it was.

    Sleeps in between, at first 10 us, later 1 ms; calls `on_quiet()` every QUIET seconds.
    """
    start, pause, next_quiet = perf_counter(), 0.0, QUIET
    while not done():
        waited = perf_counter() - start
        if waited > timeout:
            return False
        if on_quiet and waited > next_quiet:
            next_quiet = waited + QUIET
            on_quiet()
        sleep(pause)
        pause = min(pause + 1e-5, 1e-3)
    return True


def wait(comm, request, timeout, what):
    """Wait for `request`, an MPI request or any object with Test(), made on `comm`.

    `what` is for the errors: StallError after `timeout` seconds; MismatchError before that if a
    rank is known to have ended.
    """
    if not until(request.Test, timeout, lambda: _check_ended(comm, request, what)):
        _leave_open(comm, request)
        raise StallError(f"rank {comm.rank} waited {timeout:g} s while {what}: another rank "
                         "has ended or never came here, or is slower than stall_timeout allows")


def _check_ended(comm, request, what):
    """Raise MismatchError if a rank that this one waits for has ended."""
    dog = next((one.dog for one in shelf.of(comm).line if one.dog is not None), None)
    try:
        if dog is not None:
            dog.check_ended(what)
    except Exception:
        _leave_open(comm, request)
        raise


def _leave_open(comm, request):
    """Keep the request, and never hand out `comm` again, nor those that it was made of."""
    keep(request)
    for one in shelf.of(comm).line:
        one.open = True


def keep(*objects):
    """Never free these: MPI may still write to their memory."""
    _abandoned.append(objects)


def abandoned() -> list:
    """All that `keep` was given, as tuples."""
    return _abandoned


def ranks_text(ranks) -> str:
    """Ranks in the words of an error: "rank 1, 2"; "rank unknown" for none."""
    return "rank " + (", ".join(map(str, sorted(ranks))) or "unknown")


# ---- collectives with a limit: `timeout` in seconds, by default the communicator's


def pieces(size, item=1) -> list:
    """Slices of at most PIECE bytes that together are `size` elements of `item` bytes each."""
    step = max(1, PIECE // item)
    return [slice(at, min(at + step, size)) for at in range(0, size, step)]


def bcast_array(comm, array, what, root=0, timeout=None):
    """Overwrite a flat array, of the same size and dtype on all ranks, with rank root's."""
    timeout = limit(comm) if timeout is None else timeout
    for piece in pieces(array.size, array.itemsize):
        wait(comm, comm.Ibcast(array[piece], root), timeout, what)


def bcast_bytes(comm, blob, what, root=0, timeout=None) -> bytes:
    """Rank root's `blob`, on every rank; what the others give is not used."""
    size = np.array([len(blob)], np.int64)
    bcast_array(comm, size, what, root, timeout)
    array = np.frombuffer(blob, np.uint8) if comm.rank == root else np.empty(size[0], np.uint8)
    bcast_array(comm, array, what, root, timeout)
    return blob if comm.rank == root else array.tobytes()


def bcast(comm, value, what, root=0, timeout=None):
    """Rank root's `value`, any object that can be pickled, on every rank."""
    blob = pickle.dumps(value) if comm.rank == root else b""
    blob = bcast_bytes(comm, blob, what, root, timeout)
    return value if comm.rank == root else pickle.loads(blob)


def allgather(comm, value, what, timeout=None) -> list:
    """The `value` of every rank, any object that can be pickled, in rank order."""
    timeout = limit(comm) if timeout is None else timeout
    mine = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = np.zeros(comm.size, np.int64)
    wait(comm, comm.Iallgather(np.array([mine.size], np.int64), sizes), timeout, what)
    sizes = sizes.tolist()
    everything = np.zeros(sum(sizes), np.uint8)
    wait(comm, comm.Iallgatherv(mine, [everything, sizes]), timeout, what)
    ends = np.cumsum(sizes).tolist()
    return [pickle.loads(everything[end - size:end]) for end, size in zip(ends, sizes)]
