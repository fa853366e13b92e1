"""DDP.join: ranks that have fewer examples than others, with our hook and without."""

import pytest
import torch
from test_ddp import SMALL, Given, group  # noqa: F401 (a fixture)
from torch.nn.parallel import DistributedDataParallel
from training import same_error

from mpicomp import SpecError, ddp

pytestmark = pytest.mark.mpi


def joined(comm, module, spec, bad=(), divide=True, hook=True, **keywords):
    """Train while rank r has r + 2 examples; returns what p.grad was in each step of this rank."""
    model = DistributedDataParallel(module, bucket_cap_mb=SMALL, **keywords)
    state = None
    if hook:
        state = ddp.HookState(spec, comm, named_parameters=module.named_parameters(),
                              nonfinite="skip", stall_timeout=30)
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
@pytest.mark.parametrize("spec", ["dense", "dense:exchange=allgather", "fp16", "terngrad",
                                  "onebit:exchange=sharded", "strom:tau=1"])
def test_join_divides_by_whom_it_is_told_to(spec, divide, group, comm):
    seen, state = joined(comm, Given(), spec, divide=divide)
    assert state.state_dict()["step"] == comm.size + 1
    if spec[:5] in ("dense", "fp16"):
        for step, gradients in enumerate(seen):
            for g in gradients:
                torch.testing.assert_close(g, torch.full_like(g, means(comm, step, divide)),
                                           rtol=2e-3, atol=0)
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
