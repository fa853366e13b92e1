"""A thread that moves exchanges on gives what polling gives, and its errors are the caller's."""

import gc
import threading
import time

import numpy as np
import pytest
import torch
from training import digest, give, parameters, replicas_are_identical, same_error, train

import mpicomp
from mpicomp import MismatchError, SpecError
from mpicomp.transport.pipeline import Pipeline, _Flight

pytestmark = pytest.mark.mpi
SPECS = ["dense", "terngrad", "strom:tau=0.02", "onebit:exchange=sharded", "onebit:warmup=3",
         "strom:tau=0.02,exchange=hierarchical", "onebit:delay=1"]


@pytest.mark.parametrize("spec", SPECS)
def test_thread_and_polling_train_the_same_model(spec, comm):
    models = []
    for progress in ("poll", "thread"):
        model, _ = train(spec, comm, steps=6, progress=progress)
        replicas_are_identical(comm, model)
        models.append(digest(model.parameters()))
    assert models[0] == models[1]


def test_the_thread_moves_on_without_the_caller(comm):
    """A bucket of three postings is through although nobody polls."""
    pipeline = Pipeline(comm, 600.0, "thread")
    send, receive = np.full(3, comm.rank + 1.0), np.zeros((3, 3))
    threads = []

    def bucket():
        for k in range(3):
            threads.append(threading.current_thread())
            yield [comm.Iallreduce(send, receive[k])]

    pipeline.launch("a bucket", bucket())
    while pipeline.busy:  # until the limit of this test
        time.sleep(0.01)
    assert not pipeline.busy and threading.current_thread() not in threads
    pipeline.drain()
    assert (receive == sum(range(1, comm.size + 1))).all()


def test_buckets_that_are_through_are_not_looked_at_again(comm, monkeypatch):
    """A step of n buckets takes about n looks, not n * n."""
    looks, ready = [], _Flight.ready
    monkeypatch.setattr(_Flight, "ready", lambda self, ahead: looks.append(1) or ready(self, ahead))
    pipeline = Pipeline(comm, 600.0, "poll")
    for step in range(2):
        for n in range(100):
            pipeline.launch(f"bucket {n}", iter([[]] * 2))
        assert not pipeline.busy and len(looks) <= 1000 * (step + 1)
        assert pipeline.where(5) == "in no exchange: 5 steps are done"
        pipeline.drain()


def test_an_error_in_the_thread_is_raised_by_drain(comm):
    pipeline = Pipeline(comm, 600.0, "thread")

    def bucket():
        raise MismatchError("these headers differ")
        yield

    pipeline.launch("a bucket", bucket())
    while not pipeline._thread._error:  # until the limit of this test
        time.sleep(0.01)
    with pytest.raises(MismatchError, match="these headers differ"):
        pipeline.drain()
    pipeline.clear()


@pytest.mark.mpi(min_size=2)
def test_ranks_at_different_steps_are_noticed_in_the_thread(comm):
    named = parameters(w=4)
    reducer = mpicomp.Reducer(named, "onebit", comm, progress="thread")

    def step():
        named[0][1].grad = None
        give(named, [np.ones(4)])
        reducer.finish()

    step()
    reducer.averager.step = 5 + (comm.rank == 0)
    assert "is at step 5" in same_error(comm, MismatchError, step)


def test_no_thread_outlives_its_pipeline(comm):
    before = set(threading.enumerate())
    pipeline = Pipeline(comm, 600.0, "thread")
    pipeline.launch("nothing", iter(()))
    thread, = set(threading.enumerate()) - before
    assert thread.name == "mpicomp progress"
    pipeline.drain()
    del pipeline
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_the_environment_chooses_for_auto(comm, monkeypatch):
    monkeypatch.setenv("MPICOMP_PROGRESS", "thread")
    assert Pipeline(comm, 1.0).progress == "thread"
    assert Pipeline(comm, 1.0, "poll").progress == "poll"
    monkeypatch.setenv("MPICOMP_PROGRESS", "twice")
    with pytest.raises(SpecError, match="twice.*poll, thread"):
        Pipeline(comm, 1.0)


def test_a_wrong_value_is_refused(comm):
    text = same_error(comm, SpecError, lambda: mpicomp.Reducer(
        [("w", torch.nn.Parameter(torch.zeros(1)))], "dense", comm, progress="threads"))
    assert "progress='threads'" in text
