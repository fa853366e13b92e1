"""What the test_hunt files share: a loop of training on ranks, beside the same in one process."""

import contextlib

import torch
from torch import nn
from training import replicas_are_identical

import mpicomp

mse = nn.functional.mse_loss


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def batch(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 6, generator=generator), torch.randn(4, 3, generator=generator)


def whole(comm, step):
    """The examples of all ranks."""
    return map(torch.cat, zip(*(batch(rank, step) for rank in range(comm.size))))


def spread(model, optimizer, comm, method="dense", **keywords):
    """The optimizer with a Reducer of several small buckets."""
    keywords = {"bucket_bytes": 150, **keywords}
    return mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), method, comm,
                                        **keywords)


def no_sync(optimizer):
    """That of the optimizer's Reducer, if it has one."""
    reducer = getattr(optimizer, "reducer", None)
    return reducer.no_sync() if reducer else contextlib.nullcontext()


def close(model, expected, tolerance=1e-5):
    for (name, p), (other, q) in zip(sorted(model.named_parameters()),
                                     sorted(expected.named_parameters()), strict=True):
        assert name == other
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def compare(comm, step, method="dense", make=net, optimizer=sgd, steps=4, tolerance=1e-5,
            **keywords):
    """step(model, optimizer, x, y, number) on ranks, and with `dense` in one process as well."""
    model = make()
    ours = spread(model, optimizer(model.parameters()), comm, method, **keywords)
    for number in range(steps):
        step(model, ours, *batch(comm.rank, number), number)
    replicas_are_identical(comm, model)
    ours.reducer.close()
    if method == "dense":
        alone = make()
        theirs = optimizer(alone.parameters())
        for number in range(steps):
            step(alone, theirs, *whole(comm, number), number)
        close(model, alone, tolerance)


def plain(model, optimizer, x, y, number=0):
    optimizer.zero_grad()
    mse(model(x), y).backward()
    optimizer.step()
