"""Ranks that come to disagree on the way: the same error on all of them, within seconds.

Before the first step test_mismatch.py has the matrix; here training is under way, and one rank
skips a step, runs ahead, loads another state, or has its buckets or its model otherwise.
"""

import numpy as np
import pytest
import torch
from training import digest, give, outcome, parameters, same_error

import mpicomp
from mpicomp import MismatchError
from mpicomp.exchange import hierarchical

pytestmark = pytest.mark.mpi(min_size=2)
METHODS = ["dense", "dense:exchange=allgather", "bf16:exchange=allreduce", "terngrad",
           "terngrad:exchange=allreduce", "onebit", "strom:tau=0.1", "onebit:exchange=sharded",
           "strom:tau=0.1,exchange=sharded", "onebit:exchange=hierarchical",
           "strom:tau=0.1,exchange=hierarchical", "onebit:warmup=9"]


@pytest.fixture(autouse=True)
def nodes_of_two(monkeypatch):
    """Ranks 0 and 1 on one node, 2 and 3 on the next: for exchange=hierarchical."""
    monkeypatch.setattr(hierarchical, "node_of", lambda comm: comm.Split(comm.rank // 2))


class Job:
    """A training of two buckets whose second one is used first, so that buckets are made anew."""

    def __init__(self, comm, method, **keywords):
        self.comm, self.named = comm, parameters(a=(40, 3), b=(40,), c=(7, 5))
        self.reducer = mpicomp.Reducer(self.named, method, comm, bucket_bytes=300, **keywords)

    def step(self):
        for _, p in self.named:
            p.grad = None
        give(self.named, [np.ones(p.shape) * self.comm.rank for _, p in self.named])
        self.reducer.finish()

    def fails(self):
        """The text of the MismatchError, not a StallError, of the next step on all ranks."""
        return same_error(self.comm, MismatchError, self.step)


@pytest.mark.parametrize("who", [0, -1])
@pytest.mark.parametrize("steps", [-1, 1], ids=["skipped a step", "ran ahead"])
@pytest.mark.parametrize("method", METHODS)
def test_a_header_of_another_step(method, steps, who, comm):
    """Found before anything is decoded: gradients and residuals stay as they were."""
    job = Job(comm, method)
    job.step(), job.step()
    odd = who % comm.size
    before = {key: value for key, value in job.reducer.state_dict().items() if key != "step"}
    job.reducer.averager.step += steps * (comm.rank == odd)
    text = job.fails()
    named = odd or 1  # where rank 0 is the odd one, the first that differs from it
    mine, others = 2 + steps, 2
    told = (others, mine) if odd == 0 else (mine, others)
    assert f"rank {named} is at step {told[0]}, rank 0 at {told[1]}" in text
    after = job.reducer.state_dict()
    assert all(np.array_equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("method", METHODS)
def test_a_header_of_another_plan(method, comm):
    """As of a rank that built another model after the start."""
    job, odd = Job(comm, method), comm.size - 1
    job.step()
    job.step()
    for mail in job.reducer.averager.buckets.codecs if comm.rank == odd else ():
        mail.replan(7)
    if "warmup" in method and comm.rank == odd:
        for mail in [b.warm for b in job.reducer.averager.buckets]:
            mail.replan(7)
    assert f"rank {odd} is at plan digest 7" in job.fails()


@pytest.mark.parametrize("method", METHODS + ["onebit:delay=1", "strom:tau=0.1,exchange=peers",
                                              "strom:tau=0.1,exchange=server"])
def test_states_of_different_steps(method, comm):
    """Each rank loads a state, one of them an older one: the first exchange names it."""
    job, odd = Job(comm, method), comm.size - 1
    if "server" in method:
        job.reducer.attach(torch.optim.SGD([p for _, p in job.named], lr=0.0))
    states = []
    for _ in range(3):
        job.step()
        job.reducer.deliver()
        states.append(job.reducer.state_dict())
    job.reducer.load_state_dict(states[1 if comm.rank == odd else 2])
    assert "replicas differ in step: 3 on rank" in job.fails()


@pytest.mark.parametrize("method", METHODS)
def test_another_order_of_buckets(method, comm):
    """One rank's state is of the first order of buckets: other buckets, and other sizes of them."""
    job, odd = Job(comm, method), comm.size - 1
    state = job.reducer.state_dict()
    with job.reducer.no_sync():
        give(job.named[2:], [np.ones((7, 5))])  # arrives first: whatever the order of autograd
    state["order"] = torch.tensor([1, 2, 0])
    state["step"] = 1
    other = dict(state, order=torch.tensor([0, 2, 1]))
    job.reducer.load_state_dict(other if comm.rank == odd else state)
    text = job.fails()
    assert "replicas differ in plan of buckets: " in text


def test_parameters_that_drifted_apart_are_noticed_when_a_state_is_loaded(comm):
    job, odd = Job(comm, "onebit"), comm.size - 1
    job.step()
    if comm.rank == odd:
        job.named[1][1].data[3] = 1
    job.reducer.load_state_dict(job.reducer.state_dict())
    text = job.fails()
    assert "replicas differ in parameter 'b'" in text


def test_after_an_error_the_right_state_goes_on(comm):
    """The communicators are as good as before: load the same state on all ranks, and train."""
    job = Job(comm, "onebit")
    for _ in range(2):
        job.step()
    good = job.reducer.state_dict()
    job.reducer.load_state_dict(dict(good, step=7 if comm.rank else 2))
    job.fails()
    again = Job(comm, "onebit")
    again.reducer.load_state_dict(good)
    assert outcome(comm, again.step) == [None] * comm.size
    assert len(set(comm.allgather(digest(p.grad for _, p in again.named)))) == 1
