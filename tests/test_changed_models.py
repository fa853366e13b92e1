"""Models that change after the Reducer was made, or in their forward pass: an error says so."""

import pytest
import torch
from training import digest, network, replicas_are_identical, same_error

import mpicomp
from mpicomp.errors import MismatchError, SpecError


def backward(comm, model, step=0):
    like = next(model.parameters())
    x = torch.arange(32).remainder(comm.rank + step + 3).view(2, 16).to(like)
    model(x).square().sum().backward()


@pytest.mark.mpi
@pytest.mark.parametrize("spec", ["dense", "onebit", "strom:tau=0.1", "terngrad", "dense:delay=1"])
@pytest.mark.parametrize("change, found", [
    (torch.nn.Module.double, "'6.bias' was torch.float32 on cpu, shape [3], when the Reducer was "
                             "made, and is torch.float64 on cpu, shape [3], now: "),
    (torch.nn.Module.bfloat16, "is torch.bfloat16 on cpu")])
def test_a_parameter_of_another_dtype_is_named(comm, spec, change, found):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), spec, comm)
    backward(comm, model)
    optimizer.step()
    optimizer.zero_grad()
    change(model)
    before = digest(model.parameters())

    late = "delay" in spec  # noticed when it would be applied, a step later

    def run():
        for step in range(1 + late):
            backward(comm, model, 1)
            optimizer.step()
            optimizer.zero_grad()

    assert found in same_error(comm, SpecError, run)
    assert late or digest(model.parameters()) == before


@pytest.mark.mpi
def test_so_is_one_of_another_shape_though_it_could_be_broadcast(comm):
    model = network()
    reducer = mpicomp.Reducer(model.named_parameters(), "dense", comm)
    backward(comm, model)
    reducer.finish()
    model.zero_grad()
    if comm.rank == 0:
        model[6].bias.data = torch.zeros(1)
    backward(comm, model, 1)
    text = same_error(comm, SpecError, reducer.finish)
    assert "'6.bias' was torch.float32 on cpu, shape [3]" in text and "shape [1], now" in text


@pytest.mark.mpi
@pytest.mark.parametrize("back", ["float", "bfloat16"])
def test_a_model_that_changed_before_its_reducer_is_none_of_that(comm, back):
    model = getattr(network().double(), back)()
    reducer = mpicomp.Reducer(model.named_parameters(), "dense", comm)
    backward(comm, model)
    reducer.finish()
    assert all(p.grad.dtype == getattr(torch, back) for p in model.parameters())


# ---- Embedding(max_norm) changes its weights in forward, each rank the rows that it looks up ----


def table(**keywords):
    torch.manual_seed(0)
    return torch.nn.Embedding(12, 4, **keywords)


def look_up(comm, embedding, ranks, step):
    """The mean over `ranks` of a loss that pushes the rows that they look up outwards."""
    rows = torch.tensor([[(2 * rank + step + i) % 12 for i in range(3)] for rank in ranks])
    (-embedding(rows).square().sum() / len(ranks)).backward()


@pytest.mark.mpi(min_size=2)
def test_max_norm_is_named_where_a_forward_pass_made_ranks_differ(comm):
    embedding = table(max_norm=1.0)
    mpicomp.broadcast_parameters(embedding, comm)
    reducer = mpicomp.Reducer(embedding.named_parameters(), "dense", comm)
    look_up(comm, embedding, [comm.rank], 0)
    text = same_error(comm, MismatchError, reducer.finish)
    assert "max_norm" in text and "weight.renorm_(2, 0, M)" in text


@pytest.mark.mpi
@pytest.mark.parametrize("spec", ["dense", "onebit"])
def test_weights_that_are_bounded_after_each_step_are_those_of_one_process(comm, spec):
    def run(ranks, reducer_of):
        embedding = table()
        optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
        reducer_of(embedding, optimizer)
        for step in range(4):
            optimizer.zero_grad()
            look_up(comm, embedding, ranks, step)
            optimizer.step()
            with torch.no_grad():
                embedding.weight.renorm_(2, 0, 1.0)
        assert embedding.weight.norm(dim=1).max() < 1 + 1e-6
        return embedding

    ours = run([comm.rank], lambda embedding, optimizer: mpicomp.Reducer(
        embedding.named_parameters(), spec, comm).attach(optimizer))
    replicas_are_identical(comm, ours)
    if spec == "dense":
        whole = run(range(comm.size), lambda *_: None)
        torch.testing.assert_close(ours.weight, whole.weight)
