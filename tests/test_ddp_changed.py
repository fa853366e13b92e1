"""Models that change under DistributedDataParallel with our hook: unfrozen layers, other dtypes."""

import gc

import pytest
import torch
from test_ddp import group  # noqa: F401 (a fixture)
from torch.nn.parallel import DistributedDataParallel
from training import (
    digest,
    examples,
    network,
    outcome,
    replicas_are_identical,
    same_error,
)

from mpicomp import MismatchError, NonFiniteError, SpecError, ddp

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


def two_layers(comm, spec="dense", **keywords):
    """(network, DDP, HookState), with a bucket for each parameter."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    state = ddp.HookState(spec, comm, named_parameters=net.named_parameters(), bucket_bytes=64,
                          **keywords)
    return net, around(net, state), state


def around(net, state):
    model = DistributedDataParallel(net, bucket_cap_mb=1e-5)
    model.register_comm_hook(state, ddp.comm_hook)
    return model


def test_a_gradient_that_is_not_finite_is_left_to_nobody(group, comm):
    """Who catches the error and steps, steps on nothing."""
    net, model, _ = two_layers(comm)
    x = torch.full((2, 4), float("nan") if comm.rank == 0 else 1.0)
    same_error(comm, NonFiniteError, lambda: model(x).sum().backward())
    assert all(p.grad is None for p in net.parameters())


def test_a_backward_that_failed_on_the_way_is_not_taken_for_half_of_the_next(group, comm):
    net, model, state = two_layers(comm)
    model(torch.ones(2, 4)).sum().backward()

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("of the user's")

    hook = net[1].register_forward_pre_hook(lambda module, inputs: (Fails.apply(inputs[0]),))
    with pytest.raises(RuntimeError, match="of the user's"):
        model(100 * torch.ones(2, 4)).sum().backward()
    hook.remove()
    net.zero_grad()
    del model
    gc.collect()  # its hooks go
    again = around(net, state)
    texts = outcome(comm, lambda: again(torch.ones(2, 4)).sum().backward())
    assert all("a second gradient of" in str(text) for text in texts), texts


@pytest.mark.mpi(min_size=2)
def test_replicas_are_compared_as_often_as_the_state_was_told(group, comm):
    net, model, _ = two_layers(comm, check_replicas_every=2)
    model(torch.ones(2, 4)).sum().backward()
    if comm.rank == 1:
        with torch.no_grad():
            net[0].weight[0, 0] += 1
    assert "'0.weight'" in same_error(comm, MismatchError,
                                      lambda: model(torch.ones(2, 4)).sum().backward())
