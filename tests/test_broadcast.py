"""broadcast_parameters and broadcast_optimizer_state: every rank starts where the root is."""

import numpy as np
import pytest
import torch
from training import digest, examples, network, same_error

import mpicomp
from mpicomp import MismatchError, broadcast
from mpicomp.mpi import waiting

pytestmark = pytest.mark.mpi


def last(comm):
    return comm.size - 1


@pytest.mark.parametrize("root", ["first", "last"])
def test_parameters_and_buffers_of_the_root(any_comm, root):
    """In place, whatever their dtype, shape and strides; buffers of batch normalisation too."""
    root = 0 if root == "first" else last(any_comm)

    def build(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last),
            torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 2).half(), torch.nn.Embedding(0, 4))
        model.register_buffer("count", torch.tensor(seed))
        model.register_buffer("mask", torch.rand(5) > 0.5)
        model.register_buffer("turned", torch.rand(3, 4, dtype=torch.float64).t())
        model[1].running_mean.fill_(seed)
        model[1].num_batches_tracked.fill_(2**40 + seed)
        return model

    model, expected = build(any_comm.rank + 1), build(root + 1).state_dict()
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    mpicomp.broadcast_parameters(model, any_comm, root)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]) and tensor.data_ptr() == places[name], name
        assert tensor.stride() == expected[name].stride()


def test_large_tensors_travel_in_pieces(comm, monkeypatch):
    """MPI 3 counts to 2**31 - 1 bytes in a call."""
    assert waiting.PIECE < 2**31
    monkeypatch.setattr(waiting, "PIECE", 7)
    sizes = []

    class Watched:
        def Ibcast(self, buffer, root):
            sizes.append(buffer.size)
            return comm.Ibcast(buffer, root)

        def __getattr__(self, name):
            return getattr(comm, name)

    tensor = torch.arange(5) + comm.rank
    assert broadcast._broadcast(tensor, Watched(), last(comm), "t") is None
    assert tensor.tolist() == [last(comm) + i for i in range(5)]
    assert sizes == [7, 7, 7, 7, 7, 5]


def test_state_dicts_and_pairs_work_too(comm):
    for as_pairs in (False, True):
        tensors = {"a": torch.full((3,), comm.rank), "b": torch.tensor(float(comm.rank))}
        given = list(tensors.items()) if as_pairs else tensors
        mpicomp.broadcast_parameters(given, comm, last(comm))
        assert tensors["a"].tolist() == [last(comm)] * 3 and tensors["b"] == last(comm)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("odd, words", [
    (torch.nn.Linear(3, 3), ["weight", "[3, 3]", "[2, 3]"]),
    (torch.nn.Linear(3, 2, bias=False), ["bias"]),
    (torch.nn.Linear(3, 2).double(), ["float64", "float32"])], ids=["shape", "name", "dtype"])
def test_other_models_are_refused_on_all_ranks(odd, words, comm):
    model = odd if comm.rank == last(comm) else torch.nn.Linear(3, 2)
    text = same_error(comm, MismatchError, lambda: mpicomp.broadcast_parameters(model, comm))
    assert f"rank {last(comm)}" in text and all(word in text for word in words)


OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr, amsgrad=True),
    "plain": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "groups": lambda p, lr: torch.optim.AdamW([{"params": [q], "lr": lr * k} for k, q in
                                               enumerate(p, 1)]),
}


@pytest.mark.parametrize("trained", ["nowhere", "root", "everywhere"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_of_the_root(name, trained, comm):
    """Momenta, step counts and learning rates; also where only the root has any state yet."""
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters(), 0.01 * (comm.rank + 1))
    if trained == "everywhere" or trained == "root" and comm.rank == 0:
        for step in range(comm.rank + 1):
            x, y = examples(comm, step)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    mpicomp.broadcast_optimizer_state(optimizer, comm)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["lr"] == pytest.approx(0.01)
    seen = [(key, k, np.asarray(v).tobytes()) for key, entry in sorted(state["state"].items())
            for k, v in sorted(entry.items()) if v is not None]
    assert len(set(map(str, comm.allgather(seen)))) == 1
    assert bool(seen) == (trained != "nowhere" and name != "plain")


def test_a_broadcast_model_trains_alike(comm):
    model = network(seed=comm.rank)
    mpicomp.broadcast_parameters(model, comm)
    assert digest(model.parameters()) == comm.bcast(digest(network(seed=0).parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), "onebit", comm)
    x, y = examples(comm, 0)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert len(set(comm.allgather(digest(model.parameters())))) == 1
