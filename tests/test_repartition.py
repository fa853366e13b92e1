"""Residuals for any number of ranks: what all of them owe stays what it was."""

import numpy as np
import pytest
import torch
from mpi4py import MPI
from training import give, parameters, replicas_are_identical, whole_numbers

import mpicomp
from mpicomp import MismatchError, checkpoint

SHAPES = dict(w=(12, 5), b=(12,), k=(3, 2, 2), s=())


def total(states, kinds=("error", "error2")):
    """{name: sum of what all states owe, in float64}."""
    sums = {}
    for state in states:
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind in kinds:
                sums[name] = sums.get(name, 0) + value.double()
    return sums


def states_of(ranks, kinds=("error", "error2"), step=5):
    """States of random numbers, as Reducer gives them, in two buckets."""
    generator = torch.Generator().manual_seed(ranks)
    return [{"step": step} | {f"{kind}/{name}": torch.randn(SHAPES[name], generator=generator)
                              for bucket in (("s", "k"), ("b", "w"))
                              for kind in kinds for name in bucket} for _ in range(ranks)]


@pytest.mark.parametrize("before", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("kinds", [("error",), ("error", "error2")])
def test_what_all_ranks_owe_is_what_they_owed(before, after, kinds):
    """Less than one unit in the last place of a share for "error"; one rounding for "error2"."""
    old = states_of(before, kinds)
    copy = [{key: torch.as_tensor(v).clone() for key, v in state.items()} for state in old]
    new = checkpoint.repartition(old, after)
    assert all(torch.equal(torch.as_tensor(v), copy[r][k])
               for r, state in enumerate(old) for k, v in state.items()), "states were changed"
    assert len(new) == after and all(list(state) == list(old[0]) for state in new)
    for name, expected in total(old).items():
        most = torch.stack([state["error/" + name].abs() for state in new]).max() + expected.abs()
        error = (total(new)[name] - expected).abs()
        assert (error <= 2.0**-23 * most * len(kinds)).all(), (name, error.max())
    if "error2" in kinds:  # each element has one owner
        for name in SHAPES:
            held = sum((state[f"error2/{name}"] != 0).int() for state in new)
            assert (held <= 1).all() and (held == 1).any()
    mean = checkpoint.repartition(old, after, keep="mean")
    for name, expected in total(old).items():
        assert torch.allclose(total(mean)[name] / after, expected / before, atol=1e-6)


def test_only_leaders_hold_residuals():
    leader, other = states_of(1, ("error",))[0], {"step": 5}
    new = checkpoint.repartition([leader, other, leader, other], 3, holders=[0, 2])
    assert new[1] == {"step": 5} and set(new[0]) == set(new[2]) == set(leader)
    for name, expected in total([leader, leader]).items():
        assert torch.allclose(total(new)[name], expected)


def test_states_that_do_not_belong_together_are_refused():
    a, b = states_of(2)
    with pytest.raises(ValueError, match="keep='average': expected 'sum' or 'mean'"):
        checkpoint.repartition([a, b], 3, keep="average")
    with pytest.raises(MismatchError, match="rank 1 is of step 6.*rank 0 of step 5"):
        checkpoint.repartition([a, b | {"step": 6}], 3)
    with pytest.raises(MismatchError, match=r"rank 1 has 'error/w' of shape \[5, 12\]"):
        checkpoint.repartition([a, b | {"error/w": torch.zeros(5, 12)}], 3)
    with pytest.raises(MismatchError, match="exchange=server .* go on with 2 ranks"):
        checkpoint.repartition([a, b | {"shard": {}}], 3)


SPECS = ["onebit", "strom:tau=2", "dryden:proportion=8", "adacomp", "onebit:exchange=sharded",
         "dryden:proportion=8,exchange=sharded", "onebit:exchange=sharded,own=raw",
         "onebit:exchange=hierarchical"]


def steps(reducer, named, numbers):
    """{name: P times the mean} and {name: given} of this rank, summed over the steps."""
    size, rank = reducer.comm.size, reducer.comm.rank
    said, given = ({name: np.zeros(p.shape) for name, p in named} for _ in range(2))
    for step in numbers:
        for _, p in named:
            p.grad = None
        gradients = [whole_numbers(rank, step + i, p.numel()).reshape(p.shape)
                     for i, (_, p) in enumerate(named)]
        give(named, gradients)
        reducer.finish()
        for (name, p), gradient in zip(named, gradients):
            said[name] += size * p.grad.double().numpy()
            given[name] += gradient
    return said, given


@pytest.mark.mpi
@pytest.mark.parametrize("bucket_bytes", [200, 100])
@pytest.mark.parametrize("spec", SPECS)
def test_said_and_owed_is_given_from_some_ranks_to_others(spec, bucket_bytes, comm):
    """P ranks, then 1 rank, then P; and the last with other buckets. Nothing owed is lost."""
    named = parameters(**SHAPES)

    def reducer(comm, bucket_bytes, states=None):
        made = mpicomp.Reducer(named, spec, comm, bucket_bytes=bucket_bytes)
        if states is not None:
            held = [r for r, keys in enumerate(made.comm.allgather(len(made.state_dict())))
                    if keys > 1]
            made.load_state_dict(checkpoint.repartition(
                states, comm.size, holders=held)[comm.rank])
        return made

    def go(reducer, *numbers):
        said, given = steps(reducer, named, numbers)
        reducer.close()
        spoken.append(said)
        for name in given:
            received[name] = received.get(name, 0) + given[name]

    spoken, received = [], {}
    first = reducer(comm, 200)
    go(first, 0, 1, 2)
    states = comm.gather(first.state_dict())
    if comm.rank == 0:
        second = reducer(MPI.COMM_SELF, 200, states)
        go(second, 3, 4, 5)
        states = [second.state_dict()]
    states = comm.bcast(states)
    third = reducer(comm, bucket_bytes, states)
    before = total(comm.allgather(third.state_dict()))
    for name, expected in total(states).items():
        assert torch.allclose(before[name], expected, atol=1e-4), name
    go(third, 6, 7, 8)
    owed = total(comm.allgather(third.state_dict()))
    for name, _ in named:
        everything = comm.allreduce(received[name])
        said = comm.bcast(sum(part[name] for part in spoken))  # rank 0 was there all the time
        assert np.allclose(said + owed[name].numpy(), everything, atol=1e-3), name
    replicas_are_identical(comm, torch.nn.ParameterList(p for _, p in named))


def test_states_of_an_averager_have_numpy_arrays(comm):
    averager = mpicomp.Averager({"x": np.zeros(6, np.float32)}, "onebit", comm)
    averager.average({"x": np.arange(6, dtype=np.float32)})
    states = comm.allgather(averager.state_dict())
    new = checkpoint.repartition(states, comm.size + 1)
    owed = [sum(np.asarray(state["error/x"]) for state in some) for some in (states, new)]
    assert owed[0].any() and np.allclose(*owed, atol=1e-6)
    averager.load_state_dict(new[comm.rank])
    assert np.array_equal(averager.state_dict()["error/x"], new[comm.rank]["error/x"])
