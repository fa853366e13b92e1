"""A torch.distributed process group over MPI, for a torch that was built without MPI.

The usual wheels of torch have no MPI, and gloo needs an address and open ports. This group needs
neither. DistributedDataParallel, Lightning and Accelerate compare and broadcast the model's
parameters and buffers with it, and use its barriers; gradients go through mpicomp.ddp.comm_hook.
It has every collective that gloo has, in all of torch's forms. Collectives are over when the call
returns, even with async_op=True; isend and irecv return at once.
"""

from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from mpicomp import mpi
from mpicomp.ddp.process_group.group import BACKEND, MpiGroup
from mpicomp.ddp.process_group.store import SharedStore
from mpicomp.errors import LaunchError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["BACKEND", "MpiGroup", "init_process_group"]

_lent = []  # the default MpiGroup, for `_create`


def init_process_group(comm: "MPI.Comm | None" = None, timeout: float = 600.0) -> None:
    """Make torch's default process group from an MPI communicator (None: COMM_WORLD).

    Call it instead of torch.distributed.init_process_group(...), before DistributedDataParallel.
    Rank and world size are those of `comm`, of which a duplicate is used. A collective that waits
    longer than `timeout` seconds raises StallError. LaunchError if there is a default group
    already. Collective over `comm`.
    """
    if dist.is_initialized():
        raise LaunchError("init_process_group: torch's default process group exists already "
                          f"(backend {dist.get_backend()}); call this one first, or use that one")
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _create, extended_api=True,
                                      devices=["cpu", "cuda"])
    comm = mpi.communicator(comm, timeout, "making torch's process group")
    group, limit = MpiGroup(comm, timeout), timedelta(seconds=min(timeout, 1e9))
    group.dog.store = SharedStore(comm, group.dog, limit)
    _lent[:] = [group]
    dist.init_process_group(BACKEND, rank=comm.rank, world_size=comm.size,
                            store=group.dog.store, timeout=limit)


def _create(options, _):
    """Torch calls this for the default group, and on the members of dist.new_group(ranks)."""
    world = _lent[0]
    if not options.global_ranks_in_group:
        return world
    return world.part(options.global_ranks_in_group, options.timeout)
