"""Sparse gradients that travel as rows: exact against one process that has all examples."""

import numpy as np
import pytest
import torch
from training import digest, give, network, outcome, parameters, same_error

import mpicomp
from mpicomp import MismatchError, NonFiniteError, SpecError

pytestmark = pytest.mark.mpi


class Model(torch.nn.Module):
    """A table of 200 rows and a layer behind it; gradients are whole numbers of 1/4."""

    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(1)
        self.table = torch.nn.Embedding(200, 4, sparse=sparse)
        self.out = torch.nn.Linear(4, 3)
        for p in self.parameters():
            p.data = (p.data * 4).round() / 4

    def forward(self, rows):
        return self.out(self.table(rows))


def rows_of(rank, step, dense=False):
    """What a rank looks up: some rows twice, one that all have; or most of the table."""
    if dense:
        return torch.arange(rank, 200)
    return torch.tensor([[3 * rank + step, 7, 7], [2 + rank, 190, 3 * rank + step]])


def backward(model, rows):
    model(rows).sum().backward()


def trained(comm, spec, kind, dense, sparse=True, **keywords):
    """The model after 4 steps with `kind` of optimizer, and its Reducer."""
    model = Model(sparse)
    optimizer = kind(model.parameters(), lr=0.25)
    reducer = mpicomp.Reducer(model.named_parameters(), spec, comm, average=False,
                              sparse=mpicomp.sparse_parameters(model), **keywords).attach(optimizer)
    for step in range(4):
        optimizer.zero_grad()
        with reducer.no_sync():
            backward(model, rows_of(comm.rank, step, dense))
        backward(model, rows_of(comm.rank, step + 1, dense))
        optimizer.step()
    return model, reducer


def alone(comm, kind, dense, sparse=False):
    """The same training in one process with everybody's examples."""
    model = Model(sparse)
    optimizer = kind(model.parameters(), lr=0.25)
    for step in range(4):
        optimizer.zero_grad()
        for rank in range(comm.size):
            backward(model, rows_of(rank, step, dense))
            backward(model, rows_of(rank, step + 1, dense))
        optimizer.step()
    return model


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("spec", ["dense", "dense:exchange=allgather", "dense:exchange=sharded",
                                  "dense:exchange=hierarchical"])
def test_exact_against_dense_training_in_one_process(spec, dense, comm):
    """Of small whole numbers every sum is exact, so parameters are equal to the bit."""
    model, reducer = trained(comm, spec, torch.optim.SGD, dense)
    expected = alone(comm, torch.optim.SGD, dense)
    for p, q in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-5)
    assert model.table.weight.grad.is_sparse
    assert len(set(comm.allgather(digest(model.parameters())))) == 1
    calls = reducer.stats.calls
    if spec == "dense" and comm.size > 1:  # one rank's rows are always fewer than the whole
        assert ("Iallgatherv" in calls) != dense
    assert reducer.stats.reasons["sparse"] > 0


def test_sparse_adam_sees_the_rows_of_all_ranks(comm):
    """SparseAdam moves the rows that any rank named, as it does in one process, and no others."""
    model = Model(True)
    optimizer = torch.optim.SparseAdam([model.table.weight], lr=0.25)
    reducer = mpicomp.Reducer(model.named_parameters(), "dense", comm, average=False,
                              sparse=["table.weight"]).attach(optimizer)
    one = Model(True)
    other = torch.optim.SparseAdam([one.table.weight], lr=0.25)
    for step in range(3):
        optimizer.zero_grad(), other.zero_grad(), model.out.zero_grad()
        backward(model, rows_of(comm.rank, step))
        optimizer.step()
        for rank in range(comm.size):
            backward(one, rows_of(rank, step))
        other.step()
    torch.testing.assert_close(model.table.weight, one.table.weight, rtol=1e-6, atol=1e-6)
    assert reducer.step == 3


@pytest.mark.mpi(min_size=2)
def test_bytes_are_those_of_the_rows(comm):
    """4 for the index and 4 each for 4 values, besides a header and a count, in each step."""
    _, reducer = trained(comm, "dense", torch.optim.SGD, False)
    sent = sum(32 + 8 + 20 * len(set([*rows_of(comm.rank, step).flatten().tolist(),
                                      *rows_of(comm.rank, step + 1).flatten().tolist()]))
               for step in range(4))
    assert reducer.stats.reasons["sparse"] == sent
    assert reducer.stats.dense == 4 * 4 * (800 + 15)


def test_a_rank_without_rows_and_a_step_without_any(comm):
    model = Model(True)
    reducer = mpicomp.Reducer(model.named_parameters(), "onebit", comm,
                              sparse=mpicomp.sparse_parameters(model))
    if comm.rank == 0:
        backward(model, torch.tensor([5]))
    reducer.finish()
    mean = model.table.weight.grad.to_dense()
    assert mean[5].any() and not mean[:5].any() and not mean[6:].any()
    expected = model.out.weight.sum(0) / comm.size
    torch.testing.assert_close(mean[5], expected.detach())
    model.zero_grad()
    give([("b", model.out.bias)], [np.ones(3)])
    reducer.finish()
    assert model.table.weight.grad is None


@pytest.mark.parametrize("where", ["table", "out"])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_not_finite_skips_or_raises_everywhere(nonfinite, where, comm):
    """Wherever it is: rows and buckets are one transaction."""
    model, odd = Model(True), comm.size - 1
    reducer = mpicomp.Reducer(model.named_parameters(), "onebit", comm, nonfinite=nonfinite,
                              sparse=["table.weight"])
    with reducer.no_sync():
        backward(model, rows_of(comm.rank, 0))
    if comm.rank == odd:
        grad = model.table.weight.grad._values() if where == "table" else model.out.bias.grad
        grad[0] = np.nan
    if nonfinite == "raise":
        text = same_error(comm, NonFiniteError, reducer.finish)
        assert f"rank {odd}: {'table.weight' if where == 'table' else 'out.bias'}" in text
    else:
        reducer.finish()
        assert all(p.grad is None for p in model.parameters())
        assert reducer.stats.skipped == 1


def test_what_it_cannot_do(comm):
    model = Model(True)
    for spec, names, words in [("dense", ["tabel"], "sparse='tabel' found"),
                               ("onebit:delay=1", ["table.weight"], "without delay"),
                               ("strom:exchange=peers", ["table.weight"], "synchronous")]:
        text = same_error(comm, SpecError, lambda: mpicomp.Reducer(
            model.named_parameters(), spec, comm, sparse=names))
        assert words in text
    named = parameters(scalar=(), table=(5, 2))
    text = same_error(comm, SpecError, lambda: mpicomp.Reducer(named, "dense", comm,
                                                               sparse=["table", "scalar"]))
    assert "sparse='scalar' found" in text and "rows" in text
    assert mpicomp.sparse_parameters(network()) == []
    assert mpicomp.sparse_parameters(model.table) == ["weight"]


@pytest.mark.mpi(min_size=2)
def test_ranks_that_name_others_disagree(comm):
    model = Model(True)
    text = same_error(comm, MismatchError, lambda: mpicomp.Reducer(
        model.named_parameters(), "dense", comm, sparse=["table.weight"] * (comm.rank == 0)))
    assert "sparse" in text
    assert outcome(comm, lambda: None) == [None] * comm.size


def test_flush_does_not_apply_the_rows_of_the_last_step_again(comm):
    """They owe nothing; what the buckets owe is said."""
    model = Model(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    reducer = mpicomp.Reducer(model.named_parameters(), "strom:tau=0.5", comm,
                              sparse=mpicomp.sparse_parameters(model)).attach(optimizer)
    backward(model, rows_of(comm.rank, 0))
    optimizer.step()
    table, out = model.table.weight.detach().clone(), model.out.weight.detach().clone()
    reducer.flush()
    optimizer.step()
    assert torch.equal(model.table.weight, table)
    assert not torch.equal(model.out.weight, out)


@pytest.mark.parametrize("who", ["all", "last"])
def test_a_dense_gradient_of_a_named_parameter_stays_dense(who, comm):
    """Seen to fail before: it came back sparse, which ASGD and others refuse."""
    named = parameters(w=(5, 2))
    reducer = mpicomp.Reducer(named, "dense", comm, sparse=["w"])
    for value in 2.0, 0.0:
        named[0][1].grad = None
        if who == "all" or comm.rank == comm.size - 1:
            give(named, [np.full((5, 2), value)])
        reducer.finish()
        grad, ranks = named[0][1].grad, comm.size if who == "all" else 1
        assert not grad.is_sparse and torch.allclose(grad, torch.tensor(value * ranks / comm.size))


def test_rows_that_are_given_up_or_changed_before_they_travel(comm):
    table = torch.nn.Embedding(6, 2, sparse=True)
    torch.nn.init.ones_(table.weight)
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    reducer = mpicomp.Reducer(table.named_parameters(), "dense", comm, sparse=["weight"])
    reducer.attach(optimizer)
    for give_up in True, False:
        table(torch.tensor([1])).sum().backward()
        if give_up and comm.rank == 0:
            optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
    assert table.weight[1].tolist() == [0.0, 0.0] and reducer.stats.skipped == 1
    table(torch.tensor([1])).sum().backward()
    table.weight.grad.mul_(0.5)
    assert "p.grad of 'weight' was changed" in same_error(comm, mpicomp.SpecError, optimizer.step)
