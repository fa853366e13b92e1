"""Ranks whose environment or version differs: the same error on all ranks, which names both."""

import numpy as np
import pytest
from training import give, parameters, same_error

import mpicomp
from mpicomp import MismatchError, SpecError, kernels
from mpicomp.transport.agree import agree, first_difference

two = pytest.mark.mpi(min_size=2)


def reduce_with(comm, method="dense", **keywords):
    return mpicomp.Reducer(parameters(a=(2, 3), b=4), method, comm, **keywords)


@pytest.fixture
def settings(monkeypatch):
    """Sets a variable of this rank; the kernels are chosen anew."""
    monkeypatch.setattr(kernels, "_chosen", None)
    for name in ("MPICOMP_RING", "MPICOMP_STAGING", "MPICOMP_PROGRESS", "MPICOMP_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch.setenv


@two
@pytest.mark.parametrize("method", ["dense", "onebit:exchange=hierarchical", "strom:tau=0.1",
                                    "terngrad:exchange=sharded"])
@pytest.mark.parametrize("name, value, on_rank_0", [
    ("MPICOMP_RING", "never", "not set"), ("MPICOMP_STAGING", "host", "not host")])
def test_a_variable_that_changes_the_calls_is_set_on_one_rank(name, value, on_rank_0, method, comm,
                                                             settings):
    odd = comm.size - 1
    if comm.rank == odd:
        settings(name, value)
    text = same_error(comm, MismatchError, lambda: reduce_with(comm, method))
    assert f"rank {odd} and rank 0 differ in {name}: {value} there, {on_rank_0} on rank 0" in text
    assert "mpirun -x" in text


@two
def test_the_same_through_ddp(comm, settings):
    if comm.rank == 0:
        settings("MPICOMP_RING", "never")
    text = same_error(comm, MismatchError, lambda: mpicomp.ddp.HookState(
        "onebit", comm, named_parameters=parameters(w=3)))
    assert "MPICOMP_RING: not set there, never on rank 0" in text


@pytest.mark.mpi
@pytest.mark.parametrize("name, value", [
    ("MPICOMP_RING", "often"), ("MPICOMP_STAGING", "somewhere"), ("MPICOMP_PROGRESS", "twice"),
    ("MPICOMP_KERNELS", "fast"), ("MPICOMP_STALL_TIMEOUT", "long")])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_variable_that_means_nothing(name, value, everywhere, comm, settings):
    """Found before ranks part: not by one rank in the middle of what the others do."""
    odd = comm.size - 1
    everywhere |= comm.size == 1
    if everywhere or comm.rank == odd:
        settings(name, value)
    text = same_error(comm, SpecError if everywhere else MismatchError, lambda: reduce_with(comm))
    assert value in text and (everywhere or f"rank {odd}: " in text)


@two
def test_variables_that_change_nothing_may_differ(comm, settings):
    if comm.rank:
        settings("MPICOMP_KERNELS", "reference")
        settings("MPICOMP_PROGRESS", "thread")
    named = parameters(w=(5, 7))
    reducer = mpicomp.Reducer(named, "onebit", comm)
    for step in range(3):
        named[0][1].grad = None
        give(named, [np.linspace(-1, 1, 35) * (comm.rank + step)])
        reducer.finish()
    assert len(set(comm.allgather(named[0][1].grad.numpy().tobytes()))) == 1


# ---- other versions -------------------------------------------------------------------------


@two
def test_another_version_is_named(comm, monkeypatch):
    here = mpicomp.__version__
    if comm.rank == 1:
        monkeypatch.setattr(mpicomp, "__version__", "0.0.9")
    text = same_error(comm, MismatchError, lambda: reduce_with(comm))
    assert f"rank 1 and rank 0 differ in mpicomp: 0.0.9 there, {here} on rank 0" in text


@two
@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("theirs, words", [
    ({"mpicomp": "0.0.9"}, ["mpicomp"]), ({}, ["mpicomp", "nothing"]),
    ({"mpicomp": "1"}, ["parameter", "a list of 2", "nothing"]),
    ({"mpicomp": "1", "parameter": None}, ["parameter", "a list of 2", "None"]),
    ({"mpicomp": "1", "parameter": ["a", "b"], "new": 1}, ["new", "1", "nothing"]),
    ({"mpicomp": "1", "parameter": ["a", "b"], "new": ["c"]}, ["new", "a list of 1", "nothing"])])
def test_a_version_that_has_other_facts(theirs, words, odd, comm):
    ours = {"mpicomp": "1", "parameter": ["a", "b"]}
    text = same_error(comm, MismatchError,
                      lambda: agree(comm, theirs if comm.rank == odd else ours))
    assert "rank 1 and rank 0 differ in" in text and all(word in text for word in words)


@pytest.mark.parametrize("zero, other", [
    ({"a": 1}, {"a": 1}), ({"a": [1, 2]}, {"a": (1, 2)}), ({}, {}), ({"a": []}, {"a": []})])
def test_what_does_not_differ(zero, other):
    assert first_difference(zero, other) is None
