"""torch.compile: whatever is compiled, ranks exchange as they do without it, to the bit.

With backend="eager" a graph runs the same operations in the same order, so the parameters must be
those of a run that compiles nothing. Compiling an optimizer's step takes seconds: only once.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from training import digest, examples, replicas_are_identical

import mpicomp

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch",  # about itself
                                        "ignore::UserWarning:torch")
FEW = 3  # steps: in the second gradients arrive in buckets that were made anew


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3))


def cross_entropy(model, x, y):
    return torch.nn.functional.cross_entropy(model(x), y)


def backward(model, optimizer, x, y):
    optimizer.zero_grad()
    cross_entropy(model, x, y).backward()


def whole_step(model, optimizer, x, y):
    backward(model, optimizer, x, y)
    optimizer.step()


def busy_backward(model, optimizer, x, y):
    """Two backwards, the second recomputes what it needs; then clipping by hand."""
    reducer = optimizer.reducer
    with reducer.no_sync():
        backward(model, optimizer, x[:4], y[:4])
    hidden = checkpoint(model[:2], x[4:], use_reentrant=False)
    torch.nn.functional.cross_entropy(model[2](hidden), y[4:]).backward()
    reducer.finish()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def of_closure(model, optimizer, x, y):
    def closure():
        backward(model, optimizer, x, y)
        return cross_entropy(model, x, y)

    optimizer.step(closure)


def run(comm, spec, compiled=(), eager=(), backend="eager"):
    """The parameters' digest after some steps of these functions; the first are compiled."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), spec, comm,
                                 bucket_bytes=800, seed=3)
    stages = [*(torch.compile(stage, backend=backend) for stage in compiled), *eager]
    for number in range(FEW):
        x, y = examples(comm, number)
        for stage in stages:
            stage(model, optimizer, x, y)
    torch._dynamo.reset()
    replicas_are_identical(comm, model)
    assert optimizer.reducer.stats.steps == FEW
    return digest(model.parameters())


def step(model, optimizer, x, y):
    optimizer.step()


@pytest.mark.mpi
@pytest.mark.parametrize("spec", ["dense", "onebit", "strom:tau=0.01", "terngrad",
                                  "onebit:exchange=sharded", "dense:delay=1"])
def test_a_compiled_backward_exchanges(comm, spec):
    assert run(comm, spec, [backward], [step]) == run(comm, spec, (), [whole_step])


@pytest.mark.mpi
def test_a_compiled_training_step_is_the_step(comm):
    assert run(comm, "terngrad", [whole_step]) == run(comm, "terngrad", (), [whole_step])


@pytest.mark.mpi
def test_compiled_code_may_call_the_reducer(comm):
    assert (run(comm, "terngrad", [busy_backward], [step])
            == run(comm, "terngrad", (), [busy_backward, step]))


def test_a_compiled_closure_gives_the_mean_loss(comm):
    assert run(comm, "onebit", [of_closure]) == run(comm, "onebit", (), [of_closure])


@pytest.mark.parametrize("option", ["compiled_autograd", "trace_autograd_ops"])
def test_a_backward_that_is_compiled_itself_exchanges(comm, option):
    if not hasattr(torch._dynamo.config, option):
        pytest.skip(f"this torch knows no {option}")
    with torch._dynamo.config.patch(option, True):
        found = run(comm, "onebit", [backward], [step])
    assert found == run(comm, "onebit", (), [whole_step])
