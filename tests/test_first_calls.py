"""Whatever call of this package comes first: an uncaught exception on one rank ends all of them."""

import sys

import pytest
import torch.distributed as dist
from mpi4py import MPI
from test_absent_rank import FIRST

from mpicomp.mpi import uncaught


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", FIRST)
def test_it_installs_the_exception_hook(name, comm, monkeypatch, tmp_path, capfd):
    """Seen to fail before, but for a Reducer; by torch's process group nothing was printed."""
    class World:
        def Abort(self, status):
            raise SystemExit(status)

    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(uncaught, "sleep", lambda _: None)
    monkeypatch.chdir(comm.bcast(tmp_path))
    made = FIRST[name](comm)
    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="1"):
            patch.setattr(MPI, "COMM_WORLD", World())
            sys.excepthook(ValueError, ValueError("a word to the wise"), None)
    finally:
        if hasattr(made, "close"):
            made.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    assert "ValueError: a word to the wise" in capfd.readouterr().err
