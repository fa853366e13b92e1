"""The door to mpi4py: starting MPI, communicators, and waits with a time limit."""

from mpicomp.mpi.communicators import (
    communicator,
    crowded,
    largest,
    node,
    part,
    ranks_here,
    release,
    split,
)
from mpicomp.mpi.shelf import family
from mpicomp.mpi.start import at_end, intracommunicator, load, not_at_end
from mpicomp.mpi.uncaught import dead_rank, end_all_on_exception, status
from mpicomp.mpi.waiting import (
    abandoned,
    allgather,
    bcast,
    bcast_array,
    bcast_bytes,
    keep,
    limit,
    pieces,
    ranks_text,
    stall_limit,
    stall_seconds,
    until,
    wait,
)

__all__ = ["abandoned", "allgather", "at_end", "bcast", "bcast_array", "bcast_bytes",
           "communicator", "crowded", "dead_rank", "end_all_on_exception", "family",
           "intracommunicator", "keep", "largest", "limit", "load", "node", "not_at_end", "part",
           "pieces", "ranks_here", "ranks_text", "release", "split", "stall_limit",
           "stall_seconds", "status", "until", "wait"]
