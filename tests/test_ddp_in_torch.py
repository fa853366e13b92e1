"""What torch's DDP does around the hook: join() for uneven inputs, and waits in C++."""

import pytest
import torch
import torch.distributed as dist
from test_ddp import SMALL, Given, group  # noqa: F401 (a fixture)
from torch.nn.parallel import DistributedDataParallel
from training import outcome, same_error

from mpicomp import SpecError, ddp

pytestmark = pytest.mark.mpi


def joined(comm, module, spec, bad=(), divide=True, hook=True, **keywords):
    """Train while rank r has r + 2 examples; returns what p.grad was in each step of this rank."""
    model = DistributedDataParallel(module, bucket_cap_mb=SMALL, **keywords)
    state = None
    if hook:
        state = ddp.HookState(spec, comm, named_parameters=module.named_parameters(),
                              nonfinite="skip", stall_timeout=600)
        model.register_comm_hook(state, ddp.comm_hook)
    seen = []
    with model.join(divide_by_initial_world_size=divide):
        for step in range(comm.rank + 2):
            model.zero_grad()
            gradients = [torch.full(p.shape, float(comm.rank + 1)) for p in module.parameters()]
            if (comm.rank, step) in bad:
                gradients[1].fill_(float("nan"))
            model(gradients).backward()
            seen.append([None if p.grad is None else p.grad.clone() for p in module.parameters()])
    return seen, state


def means(comm, step, divide):
    """What p.grad is to be: ranks whose examples are at an end give nothing."""
    active = [r for r in range(comm.size) if step < r + 2]
    return sum(r + 1 for r in active) / (comm.size if divide else len(active))


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("divide", [True, False])
def test_join_without_a_hook_ends(divide, unused, group, comm):
    """torch keeps the handle of a collective where Python does not see it, and waits for it."""
    seen, _ = joined(comm, Given(), None, divide=divide, hook=False,
                     find_unused_parameters=unused)
    for step, gradients in enumerate(seen):
        torch.testing.assert_close(gradients[0][0, 0].item(), means(comm, step, divide))


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("spec", ["dense", "terngrad", "onebit:exchange=sharded", "strom:tau=1"])
def test_join_divides_by_whom_it_is_told_to(spec, divide, group, comm):
    seen, state = joined(comm, Given(), spec, divide=divide)
    assert state.state_dict()["step"] == comm.size + 1
    if spec == "dense":
        for step, gradients in enumerate(seen):
            for g in gradients:
                torch.testing.assert_close(g, torch.full_like(g, means(comm, step, divide)))
    else:
        both = joined(comm, Given(), spec, divide=not divide)[0]
        for step, (these, those) in enumerate(zip(seen, both)):  # compressed, but alike
            for a, b in zip(these, those):
                torch.testing.assert_close(a * means(comm, step, not divide),
                                           b * means(comm, step, divide))


@pytest.mark.mpi(min_size=2)
def test_join_that_cannot_divide_so_says_so(group, comm):
    text = same_error(comm, SpecError,
                      lambda: joined(comm, Given(), "onebit:exchange=hierarchical", divide=False))
    assert "divide_by_initial_world_size=False" in text
    joined(comm, Given(), "onebit:exchange=hierarchical")


def test_a_step_is_skipped_within_join(group, comm):
    """In a step of all ranks, and in one that only the last rank makes."""
    last = comm.size - 1
    seen, state = joined(comm, Given(), "onebit", bad={(last, 0), (last, last + 1)})
    assert state.stats.skipped == 2 and state.state_dict()["step"] == last + 2
    for step, gradients in enumerate(seen):
        assert all((g is None) == (step in (0, last + 1)) for g in gradients), step


# ---- waits inside of torch ------------------------------------------------------------------


def test_a_bucket_that_never_comes_ends_torchs_wait(group, comm, capfd):
    """skip_all_reduce_unused_params leaves out the last bucket, by which the hook knows the end."""
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.used = (torch.nn.Linear(40, 40) for _ in range(2))

        def forward(self, x):
            return self.used(x).sum()

    module = Half()
    model = DistributedDataParallel(module, find_unused_parameters=True, bucket_cap_mb=SMALL,
                                    skip_all_reduce_unused_params=True)
    model.register_comm_hook(ddp.HookState("dense", comm, stall_timeout=0.5,
                                           named_parameters=module.named_parameters()),
                             ddp.comm_hook)

    def train():
        for _ in range(2):  # the first step has one bucket
            model(torch.ones(2, 40)).backward()

    for error in outcome(comm, train):
        assert "0.5 s in backward() for DDP's last bucket" in error, error
    assert "skip_all_reduce_unused_params=True" in capfd.readouterr().err


@pytest.mark.mpi(min_size=2)
def test_a_rank_in_a_collective_of_torch_says_so(group, comm, capfd):
    """As it does in an exchange, when another rank's StallError asks all for where they are."""
    dist.barrier()
    calls = group.dog.step
    comm.Barrier()
    if comm.rank == 0:
        assert group.dog.ask() == []
    dist.barrier()
    said = capfd.readouterr().err
    assert bool(comm.rank) == (f"in collective {calls + 1} of a group of torch.distributed, "
                               "barrier" in said), said
