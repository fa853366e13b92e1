"""Where every rank is when one waits too long: all reports come out, and the job ends with 110."""

import re

import pytest
from test_launch import RUN, finish

from mpicomp.mpi.watchdog import STALLED

slow = pytest.mark.slow
PROGRAM = """
import ctypes, os, sys, time
import torch
import mpicomp, mpicomp.mpi
stall = float(os.environ.pop("MPICOMP_STALL_TIMEOUT"))  # not to start, which may take longer

MPI = mpicomp.mpi.load()
rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
model = torch.nn.Linear(4, 3)
mpicomp.broadcast_parameters(model)
optimizer = mpicomp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                         model.named_parameters(), sys.argv[2])
def lost_in_thought():
    if sys.argv[1] == "sleep":
        time.sleep(100)
    elif sys.argv[1] == "loop":
        while True:
            pass
    elif sys.argv[1] == "barrier":
        MPI.COMM_WORLD.Barrier()
    else:
        ctypes.PyDLL(None).sleep(100)  # nobody else gets Python's lock

for step in range(4):
    if step == 2:
        MPI.COMM_WORLD.Barrier()
        optimizer.reducer.averager.link.pipeline.timeout = stall
    if step == 2 and rank == size - 1:
        if sys.argv[1] == "leave":
            break
        lost_in_thought()
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
"""


@pytest.fixture
def run(tmp_path):
    """Runs the program on some ranks, the last of which gets lost: exit status and output."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)

    def job(ranks, how, method="onebit", stall=2):
        return finish(*RUN, "--stall-timeout", stall, "-n", ranks, path, how, method)

    return job


@pytest.mark.parametrize("ranks, how, method", [
    (3, "sleep", "onebit"), pytest.param(2, "loop", "dense", marks=slow),
    pytest.param(2, "barrier", "strom:tau=0.1", marks=slow)])
def test_every_rank_says_where_it_is(ranks, how, method, run):
    status, output = run(ranks, how, method)
    assert status == STALLED, output
    for rank in range(ranks - 1):
        assert f"StallError: rank {rank} waited 2 s in call 1 of bucket 0 in step 2" in output \
            or f"[rank {rank} of {ranks}] another rank waits for too long; this one is in call 1 " \
               "of bucket 0 in step 2, of 1 buckets begun" in output, output
    lost = [line for line in output.splitlines() if line.startswith(f"[rank {ranks - 1} of")]
    assert "this one is in no exchange: 2 steps are done" in lost[0]
    assert any("in lost_in_thought" in line for line in lost), output


def test_a_rank_that_cannot_answer_is_named(run):
    status, output = run(2, "lock")
    assert status == STALLED
    assert re.search("rank 1 did not answer within 3 s", output), output
    assert "Python's lock" in output


@pytest.mark.parametrize("method", ["dense", pytest.param("onebit:exchange=sharded", marks=slow),
                                    pytest.param("onebit:delay=1", marks=slow)])
def test_a_rank_that_has_ended_is_named_by_all_in_seconds(method, run):
    """Not after stall_timeout: it says how many steps it made when it comes to MPI_Finalize."""
    status, output = run(3, "leave", method, stall=600)
    # -11: Open MPI's prterun itself, once, while two ranks ended a job that the third had left
    assert status in (1, -11)
    for rank in range(2):
        mine = [line for line in output.splitlines() if line.startswith(f"[rank {rank} of 3")]
        assert any("MismatchError: rank 2 has ended after 2 steps, while others are in step" in line
                   for line in mine), output


def test_the_environment_variable_is_read_and_checked(monkeypatch):
    from training import parameters

    import mpicomp

    monkeypatch.setenv("MPICOMP_STALL_TIMEOUT", "7.5")
    assert mpicomp.Reducer(parameters(w=3), "dense").averager.link.timeout == 7.5
    assert mpicomp.Reducer(parameters(w=3), "dense", stall_timeout=3).averager.link.timeout == 3
    monkeypatch.setenv("MPICOMP_STALL_TIMEOUT", "soon")
    with pytest.raises(mpicomp.SpecError, match="stall_timeout='soon' found, expected seconds"):
        mpicomp.Reducer(parameters(w=3), "dense")
