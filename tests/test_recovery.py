"""A Reducer moves to fewer ranks as if it had been loaded there; a killed rank is survived."""

import importlib.machinery
import importlib.util
import re
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mpi4py import MPI
from training import examples, network, one_step, same_error, train

import mpicomp

TESTS = Path(__file__).resolve().parent
METHODS = ["dense", "onebit", "terngrad:exchange=allreduce", "dropping:rate=0.9",
           "onebit:exchange=sharded", "dryden:proportion=16,exchange=sharded",
           "onebit:exchange=hierarchical", "onebit:warmup=3"]


def fresh(spec, comm):
    """(model, its reducer)."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    reducer = mpicomp.Reducer(model.named_parameters(), spec, comm, bucket_bytes=2000, seed=3)
    return model, optimizer, reducer.attach(optimizer)


def go_on(model, optimizer, reducer, comm, steps):
    for step in range(reducer.step, reducer.step + steps):
        one_step(model, optimizer, comm, step)
    return [p.detach().clone() for p in model.parameters()]


def copied(state):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


@pytest.mark.mpi
@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize("spec", METHODS)
def test_a_regrouped_reducer_is_one_that_was_loaded_on_so_many_ranks(comm, spec, before):
    """To the bit; and a step that was begun before, on all ranks, has never happened."""
    model, optimizer, reducer = fresh(spec, comm)
    go_on(model, optimizer, reducer, comm, before)
    weights, momenta = copied(model.state_dict()), deepcopy(optimizer.state_dict())
    owed = copied(reducer.state_dict())
    few = comm.Split(0 if comm.rank < max(1, comm.size - 1) else 1, comm.rank)
    x, y = examples(comm, before)
    torch.nn.functional.cross_entropy(model(x), y).backward()   # the step is begun
    if comm.size > 1:
        while reducer.averager.link.pipeline.busy:  # MPI's calls must come to an end
            reducer.averager.link.pipeline.move()
    reducer.regroup(few)
    assert all(p.grad is None for p in model.parameters()) and reducer.step == before
    moved = go_on(model, optimizer, reducer, few, 4)

    model, optimizer, reducer = fresh(spec, few)
    model.load_state_dict(weights)
    optimizer.load_state_dict(momenta)
    if set(reducer.state_dict()) - {"order"} == set(owed) - {"order"}:
        reducer.load_state_dict(owed)
        loaded = go_on(model, optimizer, reducer, few, 4)
        assert all(torch.equal(a, b) for a, b in zip(moved, loaded, strict=True))
    else:
        assert "hierarchical" in spec  # another rank speaks for the node now


@pytest.mark.mpi
@pytest.mark.parametrize("spec, reason", [
    ("strom:exchange=peers", "packets as they come"), ("onebit:delay=1", "under way"),
    ("onebit:exchange=sharded,adagrad=yes", "sums of squares")])
def test_what_cannot_lose_a_rank_says_so(comm, spec, reason):
    _, _, reducer = fresh(spec, comm)
    assert reason in same_error(comm, mpicomp.SpecError, lambda: reducer.regroup(comm))


@pytest.mark.mpi
def test_without_ulfm_pieces_are_run_once_and_bits_stay(comm):
    _, losses = train("onebit", comm, steps=5)
    model, optimizer, reducer = fresh("onebit", comm)
    recovery = mpicomp.Recovery(reducer, model, comm)
    assert not recovery.active and recovery.why and (recovery.rank, recovery.size) == (
        comm.rank, comm.size)
    calls, mine = [], []

    def step(number):
        calls.append(number)
        return one_step(model, optimizer, comm, number)

    mine = [recovery.run(step, number) for number in range(5)]
    assert mine == losses and calls == list(range(5)) and recovery.lost == []
    recovery.leave()  # returns


def test_a_dead_rank_is_told_by_its_class():
    from mpicomp import mpi

    assert mpi.dead_rank(mpicomp.DeadRankError()) and mpi.status(mpicomp.DeadRankError()) == 69
    assert mpi.dead_rank(MPI.Exception(MPI.ERR_REVOKED)) == (
        MPI.ERR_REVOKED != MPI.ERR_UNKNOWN)
    assert not mpi.dead_rank(MPI.Exception(MPI.ERR_TRUNCATE)) and mpi.status(ValueError()) == 1


@pytest.fixture(scope="module")
def chaos():
    """tests/chaos as a module."""
    loader = importlib.machinery.SourceFileLoader("chaos", str(TESTS / "chaos"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("chaos", loader))
    loader.exec_module(module)
    return module


no_ulfm = pytest.mark.skipif(
    MPI.ERR_PROC_FAILED == MPI.ERR_UNKNOWN or "Open MPI" not in MPI.Get_library_version(),
    reason="this MPI has no ULFM")


@no_ulfm
@pytest.mark.parametrize("method, phase, step, outcome", [
    ("onebit", "exchange", 5, "recovered"),
    pytest.param("onebit:exchange=sharded", "checkpoint", 8, "recovered", marks=pytest.mark.slow),
    ("strom:tau=0.01,exchange=peers", "backward", 7, "named error")])
def test_a_killed_rank(chaos, tmp_path, method, phase, step, outcome):
    """Three of tests/chaos: the others go on to the right bits, or end by the documented status."""
    options = SimpleNamespace(ranks=3, limit=200, python=sys.executable)
    what = dict(method=method, victim=1, phase=phase, step=step, moment=0.3)
    status, text, (undisturbed, logs) = chaos.job(
        options, tmp_path / "job", [dict(method=method), what], go_on=False)
    row = chaos.judge(options, status, text, logs, what, undisturbed)
    assert row["outcome"] == outcome, (row, text)
    assert status == (69 if outcome == "named error" else 0)
    if outcome == "named error":
        assert re.search("rank 1 died in step .*Restart from the newest", row["why"]), row
