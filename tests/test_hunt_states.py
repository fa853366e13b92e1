"""More situations from public trackers: copies, states, names and modes; each names its source."""

import copy
import io
import pickle
import random

import numpy as np
import pytest
import torch
from hunting import batch, close, mse, net, plain, sgd, spread
from torch import nn
from torch.optim.swa_utils import AveragedModel
from training import digest, replicas_are_identical, same_error

import mpicomp
from mpicomp.errors import SpecError

pytestmark = pytest.mark.mpi


def test_averaged_and_saved_models(comm):
    """pytorch/pytorch#59363, timgaripov/swa#22: AveragedModel, whole objects in torch.save."""
    model = net()
    optimizer = spread(model, sgd(model.parameters()), comm, "onebit")
    plain(model, optimizer, *batch(comm.rank, 0))
    average = AveragedModel(model)
    for step in range(1, 4):
        plain(model, optimizer, *batch(comm.rank, step))
        average.update_parameters(model)
    replicas_are_identical(comm, average)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        close(model, other, 0)
        other(batch(comm.rank, 5)[0]).sum().backward()  # is nothing to the Reducer
    assert pickle.loads(pickle.dumps(optimizer)).state_dict().keys() == {"state", "param_groups"}
    plain(model, optimizer, *batch(comm.rank, 6))
    replicas_are_identical(comm, model)


def test_random_numbers_are_left_to_the_user(comm):
    """neuralmagic/sparseml#429: nothing draws from torch's, Python's or NumPy's generators."""
    def draws():
        return torch.rand(1).item(), random.random(), np.random.rand()

    def seed():
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)

    for method in ("terngrad", "dorefa", "dropping", "adacomp", "dryden"):
        model = net()
        seed()
        mpicomp.broadcast_parameters(model, comm)
        optimizer = spread(model, sgd(model.parameters()), comm, method)
        plain(model, optimizer, *batch(comm.rank, 0))
        found = draws()
        seed()
        assert found == draws(), method


@pytest.mark.parametrize("names", [range(6), ["", "größe", "a b/c", "x\ny", "step", "error/a"]])
def test_names_of_all_kinds(names, comm):
    """horovod/horovod#1696, #2559: names match gradients: numbers (enumerate), odd ones."""
    model = net()
    optimizer = sgd(model.parameters())
    mpicomp.DistributedOptimizer(optimizer, list(zip(names, model.parameters())), "onebit", comm,
                                 bucket_bytes=100)
    for step in range(2):
        plain(model, optimizer, *batch(comm.rank, step))
    file = io.BytesIO()
    torch.save(optimizer.reducer.state_dict(), file)
    file.seek(0)
    optimizer.reducer.load_state_dict(torch.load(file, weights_only=True))
    plain(model, optimizer, *batch(comm.rank, 2))
    replicas_are_identical(comm, model)


def test_a_state_goes_on_in_buckets_of_another_size(comm):
    """pytorch/pytorch#75666, #48670: residuals belong to parameters, not to buckets."""
    model = net()
    optimizer = spread(model, torch.optim.SGD(model.parameters(), 0.1), comm, "onebit")
    for step in range(3):
        plain(model, optimizer, *batch(comm.rank, step))
    state, other = optimizer.reducer.state_dict(), copy.deepcopy(model)
    plain(model, optimizer, *batch(comm.rank, 3))
    optimizer = spread(other, torch.optim.SGD(other.parameters(), 0.1), comm, "onebit",
                       bucket_bytes=1 << 20)
    optimizer.reducer.load_state_dict(state)
    plain(other, optimizer, *batch(comm.rank, 3))
    assert digest(other.parameters()) == digest(model.parameters())


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.LBFGS, torch.optim.Rprop])
def test_only_the_root_has_an_optimizer_state(kind, comm):
    """horovod/horovod#526, #392, #2624: tensors, numbers, lists and None; the learning rate."""
    model = net()
    optimizer = kind(model.parameters(), lr=0.1)
    x, y = batch(0, 0)

    def closure():
        optimizer.zero_grad()
        loss = mse(model(x), y)
        loss.backward()
        return loss.detach()

    if comm.rank == 0:
        optimizer.step(closure)
        optimizer.param_groups[0]["lr"] = 0.05
    mpicomp.broadcast_optimizer_state(optimizer, comm)
    states = comm.allgather(str(optimizer.state_dict()))
    assert len(set(states)) == 1 and "0.05" in states[0]


def test_modes_of_torch(comm):
    """learning-at-home/hivemind#521: made, loaded and finished in inference mode."""
    model = net()
    with torch.inference_mode():
        optimizer = spread(model, sgd(model.parameters()), comm, "onebit")
    torch.use_deterministic_algorithms(True)
    try:
        for step in range(3):
            optimizer.zero_grad()
            x, y = batch(comm.rank, step)
            mse(model(x), y).backward()
            with torch.inference_mode():
                optimizer.reducer.finish()
            optimizer.step()
            with torch.inference_mode():
                optimizer.reducer.load_state_dict(optimizer.reducer.state_dict())
    finally:
        torch.use_deterministic_algorithms(False)
    replicas_are_identical(comm, model)


# ---- master weights, replaced parameters


@pytest.mark.parametrize("set_to_none", [True, False])
def test_master_weights_of_a_half_precision_model(set_to_none, comm):
    """NVIDIA/apex#307: the optimizer has float32 copies; finish() without attach."""
    model = net().bfloat16()
    masters = [p.detach().float().requires_grad_(True) for p in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=0.1)
    reducer = mpicomp.Reducer(model.named_parameters(), "dense", comm, bucket_bytes=150)
    for step in range(3):
        x, y = batch(comm.rank, step)
        mse(model(x.bfloat16()).float(), y).backward()
        reducer.finish()
        for master, p in zip(masters, model.parameters()):
            master.grad = p.grad.float()
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, model.parameters()):
                p.copy_(master)
        model.zero_grad(set_to_none)
    replicas_are_identical(comm, model)


def test_parameters_that_are_replaced(comm):
    """pytorch/pytorch#102212, NVIDIA/Megatron-LM#6087: load_state_dict(assign=True)."""
    model = net()
    optimizer = spread(model, sgd(model.parameters()), comm)
    plain(model, optimizer, *batch(comm.rank, 0))
    state = {name: nn.Parameter(p.detach().clone()) for name, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    other = sgd(model.parameters())
    optimizer.reducer.attach(other)
    assert "does not know" in same_error(
        comm, SpecError, lambda: plain(model, other, *batch(comm.rank, 1)))


def test_tensors_of_all_kinds_are_broadcast(comm):
    """pytorch/pytorch#74039: complex, float8, bool, strided, conjugate, empty and scalar ones."""
    torch.manual_seed(comm.rank)
    z = torch.randn(3, dtype=torch.complex64)
    tensors = {"complex": z.clone(), "conjugate": z.conj(), "bool": torch.rand(5) > 0.5,
               "float8": torch.randn(4).to(torch.float8_e4m3fn), "empty": torch.zeros(0, 3),
               "scalar": torch.tensor(float(comm.rank)), "strided": torch.randn(3, 8)[:, ::2].t(),
               "uint16": torch.full((3,), comm.rank).to(torch.uint16),
               "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)}
    mpicomp.broadcast_parameters(tensors, comm)
    found = comm.allgather({name: str(t.resolve_conj().tolist()) for name, t in tensors.items()})
    assert all(each == found[0] for each in found)


def test_gradients_that_share_memory(comm):
    """pytorch/pytorch#34904: two parameters are given one tensor, a third an expanded number."""
    params = [nn.Parameter(torch.zeros(shape)) for shape in (3, 3, (2, 3))]
    optimizer = torch.optim.SGD(params, lr=1.0)
    mpicomp.DistributedOptimizer(optimizer, list(zip("abc", params)), "dense", comm)
    for step in range(2):
        given = torch.full((3,), float(comm.rank + step))
        params[0].grad = params[1].grad = given
        params[2].grad = given[0].expand(2, 3)
        optimizer.step()
    expected = -(2 * (comm.size - 1) / 2 + 1)
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full_like(p, expected))
