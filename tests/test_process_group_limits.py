"""How much our process group takes, how long it waits, and what it says where a rank is missing."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from test_process_group import CALLS, LAST, RANK, SIZE, groups  # noqa: F401 (a fixture)
from training import outcome

from mpicomp import MismatchError, StallError, ddp, mpi
from mpicomp.ddp.process_group.transfer import tag_limit
from mpicomp.mpi import waiting

pytestmark = [pytest.mark.mpi, pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")]


def test_pieces_make_up_the_whole(groups, monkeypatch):
    """What MPI cannot count in one call goes in several: here, what has more than 24 bytes."""
    whole = {name: function(groups[0], torch.float64) for name, function in CALLS.items()}
    monkeypatch.setattr(waiting, "PIECE", 24)
    assert len(mpi.pieces(7, 8)) == 3
    for name, function in CALLS.items():
        found = function(groups[0], torch.float64)
        assert all(map(torch.equal, found, whole[name])), name


@pytest.mark.mpi(min_size=2)
def test_tensors_of_sizes_that_do_not_fit_are_an_error(groups):
    """Not garbage in what was not written, and not MPI's own words."""
    comm = MPI.COMM_WORLD

    def gather(mine):
        out = [torch.zeros(4) for _ in range(SIZE)] if RANK == 0 else None
        dist.gather(torch.ones(4 if RANK == 0 else mine), out, 0)

    for size in 3, 5:
        errors = outcome(comm, lambda: gather(size))
        assert errors[0].startswith("MismatchError: gather: ") and "sizes" in errors[0], errors
    with pytest.raises(ValueError, match="expected one for each of"):
        dist.all_gather([torch.ones(1)] * (SIZE + 1), torch.ones(1))


@pytest.mark.mpi(min_size=2)
def test_one_rank_that_never_comes(comm):
    """Each call has its time limit and its name, as has the making of a group."""
    group = ddp.MpiGroup(comm.Dup(), 0.3)
    x, short = torch.ones(2), timedelta(seconds=0.2)
    calls = {"barrier": lambda: group.barrier(short), "all_reduce": lambda: group.allreduce(x),
             "all_gather": lambda: group.allgather([x.clone() for _ in range(SIZE)], x),
             "recv from rank 0": lambda: group.recv([x], 0, 7).wait(),
             "new_group": lambda: group.part(list(range(SIZE)), timedelta(minutes=30))}
    for name, function in calls.items() if RANK else ():
        with pytest.raises(StallError, match=f"rank {RANK} waited .* while in torch.*'s {name}:"):
            function()
    comm.Barrier()
    if RANK:
        return
    other = ddp.MpiGroup(MPI.COMM_SELF.Dup(), 0.3)
    other.monitored_barrier()


@pytest.mark.mpi(min_size=2)
def test_a_monitored_barrier_names_who_did_not_come(comm):
    group = ddp.MpiGroup(comm.Dup(), 20.0)
    group.monitored_barrier()
    if RANK == 0:
        with pytest.raises(StallError, match=f"monitored_barrier for rank {LAST}: ended"):
            group.monitored_barrier(timedelta(seconds=0.3))
    elif RANK < LAST:
        with pytest.raises(StallError, match="monitored_barrier"):
            group.monitored_barrier(timedelta(seconds=0.3))
    comm.Barrier()


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_has_ended_is_named_at_once(comm):
    """It says how many collectives it made; who waits in another one need not wait long."""
    if comm.rank == 0 and MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        pytest.skip("no thread may listen")
    group = ddp.MpiGroup(comm.Dup(), 50.0)
    group.barrier()
    if RANK == LAST:
        group.shutdown()  # as by destroy_process_group()
    else:
        with pytest.raises(MismatchError, match=f"rank {LAST} of the group has ended after 1 coll"):
            group.allreduce(torch.ones(3))
    comm.Barrier()


def test_tags_are_bounded(groups):
    for tag in -1, tag_limit():
        with pytest.raises(ValueError, match=f"found tag {tag}, this MPI has tags from 0 to"):
            groups[0].send([torch.ones(1)], 0, tag)
