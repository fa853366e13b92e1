"""Whatever call of this package comes first: an uncaught exception on one rank ends all of them."""

import sys

import pytest
from mpi4py import MPI
from test_absent_rank import FIRST


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", FIRST)
def test_it_installs_the_exception_hook(name, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.chdir(MPI.COMM_WORLD.bcast(tmp_path))
    comm = MPI.COMM_WORLD.Dup()
    kept = FIRST[name](comm)
    assert getattr(sys.excepthook, "ends_all", False), f"not by {name}"
    if hasattr(kept, "close"):
        kept.close()
    if name == "init_process_group":
        import torch.distributed as dist
        dist.destroy_process_group()
    comm.Barrier()
