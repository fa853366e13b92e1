"""Ranks that disagree: the same error on every rank, naming who and what, within seconds."""

import numpy as np
import pytest
import torch
from mpi4py import MPI
from training import give, impatient, outcome, parameters, same_error

import mpicomp
from mpicomp import MismatchError, NonFiniteError, SpecError, StallError

two = pytest.mark.mpi(min_size=2)
SHAPES = dict(a=(2, 3), b=(4,))


def reduce_with(comm, named=None, method="dense", **keywords):
    return mpicomp.Reducer(named or parameters(**SHAPES), method, comm, **keywords)


def dtype_of_b(dtype):
    (a, p), (b, q) = parameters(**SHAPES)
    return [(a, p), (b, torch.nn.Parameter(q.detach().to(dtype)))]


# What the last rank does differently, and words that all ranks must read.
ODD = {
    "method": (dict(method="onebit"), ["method", "onebit", "dense"]),
    "option": (dict(method="dense:exchange=allgather"), ["method", "exchange=allgather"]),
    "seed": (dict(seed=1), ["seed: 1 there, 0 on rank 0"]),
    "average": (dict(average=False), ["average: False there, True on rank 0"]),
    "nonfinite": (dict(nonfinite="skip"), ["nonfinite: skip there, raise on rank 0"]),
    "bucket_bytes": (dict(bucket_bytes=64), ["bucket_bytes: 64 there"]),
    "name": (dict(named=parameters(a=(2, 3), c=4)), ["parameter 1", "c [4]", "b [4]"]),
    "shape": (dict(named=parameters(a=(3, 2), b=4)), ["parameter 0", "a [3, 2]", "a [2, 3]"]),
    "order": (dict(named=parameters(b=4, a=(2, 3))), ["parameter 0", "b [4]", "a [2, 3]"]),
    "dtype": (dict(named=dtype_of_b(torch.float16)), ["parameter 1", "torch.float16", "float32"]),
    "fewer": (dict(named=parameters(a=(2, 3))), ["parameter 1", "nothing more there", "b [4]"]),
    "more": (dict(named=parameters(**SHAPES, c=1)), ["parameter 2", "c [1]", "nothing more"]),
    "unknown method": (dict(method="onebits"), ["'onebits'", "onebit", "dense"]),
    "unknown option": (dict(method="strom:foo=1"), ["'foo'", "tau"]),
    "type of option": (dict(bucket_bytes="64"), ["bucket_bytes='64'", "whole number"]),
    "range of option": (dict(seed=-1), ["seed=-1", "whole number"]),
    "double": (dict(named=dtype_of_b(torch.float64)), ["'b'", "torch.float64", "model.float()"]),
    "not pairs": (dict(named=[p for _, p in parameters(**SHAPES)]), ["model.named_parameters()"]),
}


@two
@pytest.mark.parametrize("what", ODD)
def test_one_rank_is_different(what, comm):
    keywords, words = ODD[what]
    odd = comm.size - 1
    text = same_error(comm, MismatchError,
                      lambda: reduce_with(comm, **(keywords if comm.rank == odd else {})))
    assert f"rank {odd}" in text and all(word in text for word in words), text
    reducer = reduce_with(comm)  # the communicator is as good as before
    assert reducer.comm.size == comm.size


@two
@pytest.mark.parametrize("what", ["seed", "name", "unknown method"])
def test_rank_0_is_different(what, comm):
    """Then rank 1 differs from it; where rank 0 itself has a problem, rank 0 is named."""
    keywords, _ = ODD[what]
    text = same_error(comm, MismatchError,
                      lambda: reduce_with(comm, **(keywords if comm.rank == 0 else {})))
    assert "rank 0: " in text if "unknown" in what else "rank 1 and rank 0 differ" in text


@pytest.mark.mpi
@pytest.mark.parametrize("keywords, words", [
    (dict(method="onebits"), ["'onebits'", "onebit", "dense"]),
    (dict(method=None), ["None", "strom:tau=0.01"]),
    (dict(seed=-1), ["seed=-1"]), (dict(seed=2**64), ["seed=", "2**64"]),
    (dict(seed=True), ["seed=True"]), (dict(seed=0.5), ["seed=0.5"]),
    (dict(nonfinite="ignore"), ["nonfinite='ignore'", "'raise'", "'skip'"]),
    (dict(bucket_bytes=0), ["bucket_bytes=0"]), (dict(bucket_bytes=None), ["bucket_bytes=None"]),
    (dict(bucket_bytes="1"), ["bucket_bytes='1'"]),
    (dict(stall_timeout=0), ["stall_timeout=0", "seconds"]),
    (dict(stall_timeout="a"), ["stall_timeout='a'"]),
    (dict(named=parameters(w=1) + parameters(w=2)), ["two parameters", "'w'"]),
    (dict(named=torch.nn.Linear(1, 1)), ["model.named_parameters()"]),
    (dict(named=[("w", torch.nn.Parameter(torch.zeros(1), False))]), ["no parameter"]),
    (dict(named=dtype_of_b(torch.complex64)), ["'b'", "complex64", "float32"]),
])
def test_all_ranks_are_wrong_in_the_same_way(keywords, words, comm):
    text = same_error(comm, SpecError, lambda: reduce_with(comm, **keywords))
    assert all(word in text for word in words), text


@pytest.mark.mpi
def test_one_parameter_under_two_names(comm):
    p = torch.nn.Parameter(torch.zeros(3))
    text = same_error(comm, SpecError, lambda: reduce_with(comm, [("a", p), ("b", p)]))
    assert "two names" in text


@two
def test_other_initial_values(comm):
    """Noticed at the first exchange, which is early enough: nothing has been averaged."""
    torch.manual_seed(comm.rank == comm.size - 1)
    model = torch.nn.Linear(3, 2)
    reducer = reduce_with(comm, list(model.named_parameters()))

    def first_step():
        model(torch.ones(1, 3)).sum().backward()
        reducer.finish()

    text = same_error(comm, MismatchError, first_step)
    assert f"rank {comm.size - 1}" in text and "weight" in text
    assert "mpicomp.broadcast_parameters(model)" in text


@two
def test_other_values_of_one_bit(comm):
    named = parameters(**SHAPES)
    if comm.rank == 1:
        named[1][1].data[2] = -0.0
    reducer = reduce_with(comm, named)

    def first_step():
        give(named, [np.ones((2, 3)), np.ones(4)])
        reducer.finish()

    text = same_error(comm, MismatchError, first_step)
    assert "rank 1" in text and "'b'" in text


# ---- ranks that do not come -----------------------------------------------------------------


@two
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("method", ["dense", "strom:tau=0.5", "terngrad",
                                    "onebit:exchange=sharded"])
def test_stall(method, steps, comm):
    """One rank steps less often: the others hear of it. Should it come after all, all go on.

    (Not so in the first step, in which the ranks compare their parameters.)
    """
    named = parameters(**SHAPES)
    reducer = reduce_with(comm, named, method)

    def step():
        for _, p in named:
            p.grad = None
        give(named, [np.ones((2, 3)), np.ones(4)])
        reducer.finish()

    for _ in range(steps):
        step()
    late = comm.size - 1
    if comm.rank != late:
        with impatient(reducer), pytest.raises(StallError,
                                               match=rf"rank {comm.rank} waited 0.4 s"):
            step()
    comm.Barrier()
    if not steps:
        return
    step() if comm.rank == late else reducer.finish()
    assert len(set(comm.allgather(named[1][1].grad.sum().item()))) == 1


@two
def test_a_reducer_that_one_rank_does_not_make():
    comm, text = MPI.COMM_WORLD.Dup(), None  # not freed: the others' calls stay open on it
    if comm.rank:
        with pytest.raises(StallError) as caught:
            reduce_with(comm, stall_timeout=0.4)
        text = str(caught.value)
    comm.Barrier()
    if comm.rank:
        assert "0.4 s" in text


# ---- gradients that are not finite ----------------------------------------------------------

METHODS = ["dense", "dense:exchange=allgather", "fp16", "bf16:exchange=allreduce", "terngrad",
           "terngrad:exchange=allreduce", "onebit", "strom:tau=0.1", "onebit:exchange=sharded",
           "strom:tau=0.1,exchange=sharded", "onebit:exchange=hierarchical", "onebit:warmup=1"]


def gradients(bad, rank, names=("b",)):
    values = {"a": np.linspace(-1, 1, 6) + rank, "b": np.linspace(-2, 1, 4) - rank}
    for name in names:
        values[name][-1] = bad
    return values["a"], values["b"]


@pytest.mark.mpi
@pytest.mark.parametrize("method, bad", [*((method, np.nan) for method in METHODS),
                                         ("dense", np.inf), ("onebit", -np.inf)])
def test_nonfinite_raises_on_all_ranks(method, bad, comm):
    """Naming rank and parameter; residuals are as before; what follows is as if it had not been."""
    sick = comm.size - 1
    runs = []
    for disturbed in (False, True):
        named = parameters(**SHAPES)
        reducer = reduce_with(comm, named, method, bucket_bytes=1)
        for step in range(4):
            for _, p in named:
                p.grad = None
            if disturbed and step == 2:
                give(named, gradients(bad, comm.rank) if comm.rank == sick else
                     gradients(0, comm.rank))
                before = reducer.state_dict()
                text = same_error(comm, NonFiniteError, reducer.finish)
                assert f"rank {sick}: b" in text and "NaN or Inf" in text and "step 2" in text
                assert not [r for r in range(sick) if f"rank {r}" in text] and ": a" not in text
                after = reducer.state_dict()
                assert all(np.array_equal(before[key], after[key]) for key in before)
                for _, p in named:
                    p.grad = None
            give(named, gradients(step, comm.rank))
            reducer.finish()
        runs.append([p.grad.tolist() for _, p in named])
        runs.append([v.tolist() for key, v in reducer.state_dict().items() if key != "step"])
    assert runs[0] == runs[2] and runs[1] == runs[3]


@pytest.mark.mpi
@pytest.mark.parametrize("method", METHODS)
def test_nonfinite_skips_on_all_ranks(method, comm):
    """All leave p.grad = None, so the optimizer passes over it; residuals are untouched."""
    named = parameters(**SHAPES)
    optimizer = torch.optim.SGD([p for _, p in named], lr=0.1, momentum=0.9, weight_decay=0.1)
    reducer = reduce_with(comm, named, method, nonfinite="skip").attach(optimizer)
    for step in range(4):
        optimizer.zero_grad()
        sick = step == 2 and comm.rank == 0
        give(named, gradients(np.nan if sick else 0, comm.rank))
        values, before = [p.tolist() for _, p in named], reducer.state_dict()
        optimizer.step()
        after = reducer.state_dict()
        if step == 2:
            assert all(p.grad is None for _, p in named)
            assert [p.tolist() for _, p in named] == values
            assert all(np.array_equal(before[k], after[k]) for k in before if k != "step")
        assert after["step"] == step + 1
    assert all(p.any() for _, p in named)
    assert (reducer.stats.steps, reducer.stats.skipped) == (4, 1)
    assert len(set(map(str, comm.allgather([p.tolist() for _, p in named])))) == 1


@two
def test_nonfinite_names_all_who_have_it(comm):
    named = parameters(**SHAPES)
    reducer = reduce_with(comm, named, bucket_bytes=1)
    names = {0: ("a", "b"), 1: ("b",)}.get(comm.rank, ())
    give(named, gradients(np.nan, 0, names))
    text = same_error(comm, NonFiniteError, reducer.finish)
    assert "rank 1: b" in text and ("rank 0: b, a" in text or "rank 0: a, b" in text)


@pytest.mark.mpi
def test_finite_gradients_whose_sum_is_not(comm):
    """Of 3e38 on each of two ranks float32 holds no sum: an error or Inf on all ranks alike."""
    named = parameters(w=3)
    reducer = reduce_with(comm, named, average=False)
    give(named, [np.full(3, 3e38)])
    errors = outcome(comm, reducer.finish)
    assert len(set(errors)) == 1
    assert (errors[0] is None) == (comm.size == 1)
