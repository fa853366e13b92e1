"""Layers that are frozen and unfrozen under DistributedDataParallel with our hook."""

import pytest
import torch
from test_ddp import group  # noqa: F401 (a fixture)
from torch.nn.parallel import DistributedDataParallel
from training import digest, examples, network, replicas_are_identical, same_error

from mpicomp import SpecError, ddp

pytestmark = pytest.mark.mpi


def wrapped(comm, spec, frozen):
    net = network()
    net[1].requires_grad_(not frozen)
    model = DistributedDataParallel(net)
    state = ddp.HookState(spec, comm, named_parameters=net.named_parameters())
    model.register_comm_hook(state, ddp.comm_hook)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def step(number):
        optimizer.zero_grad()
        x, y = examples(comm, number)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return net, step


@pytest.mark.parametrize("spec", ["dense", "onebit", "strom:tau=0.01", "terngrad"])
def test_a_layer_that_is_unfrozen_later(spec, group, comm):
    """DDP itself says nothing: its gradient stays a rank's own, and replicas drift apart."""
    net, step = wrapped(comm, spec, frozen=True)
    before = digest(net[1].parameters())
    step(0), step(1)
    assert digest(net[1].parameters()) == before
    replicas_are_identical(comm, net)
    net[1].requires_grad_()
    text = same_error(comm, SpecError, lambda: step(2))
    assert "'1.weight' was frozen" in text and "make DistributedDataParallel and HookState" in text
