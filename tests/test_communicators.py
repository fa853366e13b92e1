"""Duplicates of communicators: private, made once, taken over by the next who needs one."""

import os

import numpy as np
import pytest
import torch
from mpi4py import MPI
from training import give, parameters, same_error, train

import mpicomp
from mpicomp import mpi
from mpicomp.errors import MismatchError, SpecError
from mpicomp.exchange import allreduce
from mpicomp.mpi import shelf
from mpicomp.transport.pipeline import Pipeline

METHODS = ["dense", "bf16", "onebit:exchange=sharded", "strom:tau=0.1",
           "terngrad:exchange=allreduce", "onebit:exchange=hierarchical",
           "strom:tau=0.1,exchange=peers", "onebit:delay=1", "onebit:warmup=1"]
two = pytest.mark.mpi(min_size=2)


def step(reducer, named, comm):
    give(named, [np.full(p.shape, 1.0 + comm.rank) for _, p in named])
    reducer.finish()


@pytest.mark.mpi
@pytest.mark.parametrize("method", METHODS)
def test_a_closed_reducer_leaves_its_communicators_to_the_next(method, comm):
    """More Reducers than MPI has communicators (MPICH: 2,048) may be made and closed."""
    families = []
    for _ in range(6):
        named = parameters(a=(3, 4), b=5)
        reducer = mpicomp.Reducer(named, method, comm)
        step(reducer, named, comm)
        reducer.deliver()
        families.append({MPI._handleof(one) for one in mpi.family(reducer.comm)})
        reducer.close()
        reducer.close()  # does nothing
    assert all(family == families[0] for family in families)


@pytest.mark.mpi
def test_two_at_a_time_share_nothing(comm):
    first, second = (mpicomp.Reducer(parameters(w=3), "onebit", comm) for _ in range(2))
    kept = [{MPI._handleof(one) for one in mpi.family(r.comm)} for r in (first, second)]
    assert not kept[0] & kept[1]
    second.close()
    third = mpicomp.Reducer(parameters(w=3), "onebit", comm)
    assert third.comm == second.comm != first.comm


@two
def test_ranks_that_close_in_another_order_agree(comm):
    """Rank 0 has closed the first and the second, the others the second and the third."""
    three = [mpicomp.Reducer(parameters(w=3), "onebit", comm) for _ in range(3)]
    for reducer in (three[:2] if comm.rank == 0 else three[:0:-1]):
        reducer.close()
    named = parameters(w=3)
    fourth = mpicomp.Reducer(named, "dense", comm)
    assert fourth.comm == three[1].comm
    step(fourth, named, comm)
    assert named[0][1].grad.tolist() == [1 + (comm.size - 1) / 2] * 3
    fifth = mpicomp.Reducer(parameters(w=3), "dense", comm)
    assert all(fifth.comm != reducer.comm for reducer in (*three, fourth))


@two
def test_what_was_closed_in_mid_step_is_not_used_again(comm):
    """An open call of the one would meet the first call of the other."""
    named = parameters(a=300, b=300)
    reducer = mpicomp.Reducer(named, "dense", comm, bucket_bytes=1200)
    step(reducer, named, comm)
    if comm.rank == 0:
        give(named, [np.ones(300)] * 2)  # its buckets are under way, and nobody answers
    reducer.close()
    named = parameters(w=3)
    again = mpicomp.Reducer(named, "dense", comm)
    step(again, named, comm)
    assert again.comm != reducer.comm
    assert named[0][1].grad.tolist() == [1 + (comm.size - 1) / 2] * 3


@pytest.mark.mpi
def test_a_reducer_that_is_refused_gives_back_what_it_had(comm):
    taken = []
    for _ in range(4):
        with pytest.raises(SpecError):
            mpicomp.Reducer(parameters(w=3), "onebit:exchange=allreduce", comm)
        taken.append(len(shelf.of(comm).used))
    assert taken[-1] == taken[0] <= 1


@pytest.mark.mpi
def test_broadcasts_make_one_duplicate(comm):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        mpicomp.broadcast_parameters(model, comm)
        mpicomp.broadcast_optimizer_state(optimizer, comm)
    assert len(shelf.of(comm).used) == 1


@pytest.mark.mpi
def test_a_freed_communicator_takes_its_own_with_it(comm):
    mine = comm.Dup()
    reducer = mpicomp.Reducer(parameters(w=3), "onebit", mine)
    reducer.close()
    family = mpi.family(reducer.comm)
    mine.Free()
    assert all(one == MPI.COMM_NULL for one in family)


@pytest.mark.mpi
def test_sixteen_bit_sums_need_one_operation_of_mpi(comm):
    """Every Reducer made one, which nobody freed."""
    before = set(allreduce._ops)
    for _ in range(5):
        named = parameters(w=3)
        reducer = mpicomp.Reducer(named, "bf16:exchange=allreduce", comm)
        step(reducer, named, comm)
        reducer.close()
    assert set(allreduce._ops) == before | {"bfloat16"}


@two
def test_ranks_that_make_different_calls_are_told(comm):
    model = torch.nn.Linear(3, 2)

    def call():
        if comm.rank == comm.size - 1:
            mpicomp.broadcast_parameters(model, comm)
        else:
            mpicomp.Reducer(model.named_parameters(), "dense", comm)

    text = same_error(comm, MismatchError, call)
    assert (f"rank {comm.size - 1} is broadcasting parameters, rank 0 is starting a Reducer"
            in text)
    train("onebit", comm, steps=2)  # nothing was left open


# ---- cores


@two
@pytest.mark.parametrize("cores, crowded", [
    (lambda rank: {rank}, False),  # bound to a core each, as mpirun does with two ranks
    (lambda rank: {0}, True), (lambda rank: set(range(64)), False)])
def test_the_cores_of_all_ranks_of_a_node_count(cores, crowded, comm, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores(comm.rank))
    assert Pipeline(comm, 10.0)._crowded is crowded
