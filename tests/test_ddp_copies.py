"""What others make of a DDP model with our hook: copies, torch.compile; and a job's last words."""

import copy
import io
import sys

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from test_ddp import Run, group  # noqa: F401 (a fixture)
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from training import digest, examples, network, same_error

from mpicomp import SpecError, ddp, mpi


def copied(run):
    return copy.deepcopy((run.wrapped, run.optimizer))


def saved(run):
    file = io.BytesIO()
    torch.save((run.wrapped, run.optimizer), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def unwatched(run):
    """The test's own hook is a method, whose object a copy would take along."""
    run.wrapped._comm_hooks = [(ddp.comm_hook, run.state)]


@pytest.mark.mpi
@pytest.mark.parametrize("how, spec, names", [
    (copied, "onebit", True), (saved, "onebit", False), (saved, "onebit:exchange=sharded", True),
    (copied, "rule(*.bias:dense; onebit)", True), (copied, "dense", False)])
def test_a_copy_goes_on_as_the_model_would(how, spec, names, group, comm):
    """The copy has the hook's state with its residuals; as with torch's hooks, one registers it."""
    run = Run(comm, spec, names=names).steps(0, 1, 2)
    unwatched(run)
    twin = Run.__new__(Run)
    twin.comm, twin.seen = comm, []
    twin.wrapped, twin.optimizer = how(run)
    twin.model = twin.wrapped.module
    (hook, twin.state), = twin.wrapped._comm_hooks
    twin.wrapped.register_comm_hook(twin.state, hook)
    assert twin.state is not run.state
    twin.steps(3, 4)
    straight = Run(comm, spec, names=names).steps(*range(5))
    assert twin.everything == straight.everything
    assert run.state.state_dict()["step"] == 3
    again = copy.deepcopy(twin.state)
    assert again.state_dict()["step"] == 5


@pytest.mark.mpi
def test_an_averaged_model_of_a_ddp_model(group, comm):
    run = Run(comm, "onebit").steps(0)
    unwatched(run)
    average = AveragedModel(run.wrapped)
    run.steps(1)
    average.update_parameters(run.wrapped)
    for mean, p in zip(average.parameters(), run.model.parameters(), strict=True):
        assert mean.shape == p.shape and torch.isfinite(mean).all()


@pytest.mark.mpi
def test_a_copy_that_does_not_fit_says_so(group, comm):
    run = Run(comm, "onebit", nonfinite="skip").steps(0)
    twin = copy.deepcopy(run.state)
    twin._copied["names"].pop()
    other = Run(comm, "onebit", nonfinite="skip")
    other.state._take, other.state = twin._take, twin  # in place of registering it
    assert "a copy of one of 5 parameters" in same_error(comm, SpecError, lambda: other.steps(0))
    scaled = Run(comm, "onebit", nonfinite="skip")
    scaled.state.follow(torch.amp.GradScaler("cpu"))
    twin = copy.deepcopy(copy.deepcopy(scaled.state))
    other = Run(comm, "onebit", nonfinite="skip")
    other.state._take, other.state = twin._take, twin
    assert "state.follow(scaler)" in same_error(comm, SpecError, lambda: other.steps(0))


@pytest.mark.parametrize("first", ["torch", "ours", "both"])
def test_an_exception_that_ends_the_job_is_printed(first, monkeypatch, capfd):
    """torch's hook collects what the hook before it prints; ours ends the job, and must print."""
    class Comm:
        rank, size = 0, 2

        def Abort(self, status):
            raise SystemExit(status)

    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(mpi.uncaught, "sleep", lambda _: None)
    monkeypatch.setattr(MPI, "COMM_WORLD", Comm())
    if first != "torch":
        mpi.end_all_on_exception(Comm())
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    dist.destroy_process_group()
    if first != "ours":
        mpi.end_all_on_exception(Comm())
    before = sys.stderr
    try:
        with pytest.raises(SystemExit):
            sys.excepthook(ValueError, ValueError("a word to the wise"), None)
    finally:
        sys.stderr = before
    assert "ValueError: a word to the wise" in capfd.readouterr().err


def test_a_compiled_ddp_model_is_the_model(group, comm):
    """Dynamo takes our calls as they are, and those within a graph come back through C++."""
    results = []
    for compiled in True, False:
        net = network()
        model = DistributedDataParallel(net)
        state = ddp.HookState("onebit", comm, named_parameters=net.named_parameters())
        model.register_comm_hook(state, ddp.comm_hook)
        run = torch.compile(model, backend="eager") if compiled else model
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(3):
            x, y = examples(comm, step)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(run(x), y).backward()
            optimizer.step()
        results.append((digest(net.parameters()), digest(state.state_dict()[f"error/{name}"]
                                                         for name, _ in net.named_parameters())))
    assert results[0] == results[1]

    @torch.compile(backend="eager")
    def total(x):
        x = x * 2
        dist.all_reduce(x)
        return x + 1

    assert total(torch.ones(2)).tolist() == [2 * comm.size + 1] * 2
