"""What users' own step hooks do to the gradient, and steps whose gradients move: for every method.

The right value is that of the same loop with reducer.finish() first, to the bit; for dense it is
also that of one process on all examples.
"""

import pytest
import torch
from test_changes import METHODS, cast, clip, data, loop, one_process
from training import digest, examples, network, replicas_are_identical

import mpicomp

pytestmark = pytest.mark.mpi


def noise(model, optimizer):
    """As in differentially private training; the same numbers on all ranks."""
    generator = torch.Generator().manual_seed(5)
    for p in model.parameters():
        p.grad.add_(torch.randn(p.shape, generator=generator), alpha=0.01)


def with_hook(comm, spec, when, change, steps=4):
    """(parameters, residuals) of a loop in which a step_pre_hook of the user's calls `change`."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)

    def hook(*_):
        change(model, optimizer)

    if when == "before":
        optimizer.register_step_pre_hook(hook)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), spec, comm,
                                 bucket_bytes=1000, seed=3, stall_timeout=30)
    if when == "after":
        optimizer.register_step_pre_hook(hook)
    for step in range(steps):
        optimizer.zero_grad()
        x, y = examples(comm, step)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        if when == "by hand":
            optimizer.reducer.finish()
            hook()
        optimizer.step()
    replicas_are_identical(comm, model)
    state = optimizer.reducer.state_dict()
    return digest(model.parameters()), digest(v for k, v in sorted(state.items()) if "/" in k)


@pytest.mark.parametrize("when, change", [("before", clip), ("before", noise), ("after", clip)])
@pytest.mark.parametrize("spec", METHODS[:4])
def test_a_step_hook_of_ones_own_changes_the_mean(spec, when, change, comm):
    """Registered before the Reducer's it runs earlier, and saw this rank's gradient, or none."""
    assert with_hook(comm, spec, when, change) == with_hook(comm, spec, "by hand", change)


def test_and_is_what_one_process_does(comm):
    expected = one_process(comm, noise)
    model, _ = loop(comm, "dense", noise)
    for p, q in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", METHODS[1:])
@pytest.mark.parametrize("between", [cast, data])
def test_gradients_that_move_are_exchanged_as_those_that_stay(between, spec, comm):
    """Where they lie between two steps is no part of what is said, or owed."""
    results = []
    for what in between, None:
        model, optimizer = loop(comm, spec, between=what, steps=4)
        replicas_are_identical(comm, model)
        state = optimizer.reducer.state_dict()
        results.append((digest(model.parameters()),
                        digest(v for k, v in sorted(state.items()) if "/" in k)))
    assert results[0] == results[1]
