"""Models that change under DistributedDataParallel with our hook: unfrozen layers, other dtypes."""

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


@pytest.mark.parametrize("spec", ["dense", "onebit", "strom:tau=0.01", "terngrad"])
@pytest.mark.parametrize("move", [lambda m: m.double().float(), lambda m: m[1].half().float()])
def test_a_model_that_changes_its_dtype_there_and_back(move, spec, group, comm):
    """torch drops DDP's hooks then, and all ranks stepped on gradients of their own."""
    net, step = wrapped(comm, spec, frozen=False)
    step(0), step(1)
    move(net)
    text = same_error(comm, SpecError, lambda: step(2))
    assert "has changed its dtype since DistributedDataParallel was made" in text


def test_a_model_that_moves_keeps_its_hooks(group, comm):
    """Another place in memory is no other dtype; and a new DDP ends the watch over the old one."""
    net, step = wrapped(comm, "dense", frozen=False)
    step(0)
    net.share_memory().to(memory_format=torch.channels_last)
    step(1)
    net.double().float()
    model = DistributedDataParallel(net)
    model.register_comm_hook(ddp.HookState("dense", comm, named_parameters=net.named_parameters()),
                             ddp.comm_hook)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    model(examples(comm, 2)[0]).sum().backward()
    optimizer.step()
    replicas_are_identical(comm, net)
