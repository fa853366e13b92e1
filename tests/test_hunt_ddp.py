"""Situations from public trackers of DistributedDataParallel, through our group and hook."""

import copy

import pytest
import torch
import torch.distributed as dist
from hunting import batch, close, mse, net, plain, sgd, spread, whole
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from training import replicas_are_identical, same_error

import mpicomp
from mpicomp.errors import SpecError

pytestmark = pytest.mark.mpi


@pytest.fixture
def group(comm):
    mpicomp.ddp.init_process_group(comm, timeout=600.0)
    yield
    dist.destroy_process_group()


def parallel(model, comm, method="dense", **options):
    """(DDP with our hook and several small buckets, the hook's state)."""
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.0003, **options)
    state = mpicomp.ddp.HookState(method, comm, named_parameters=model.named_parameters(),
                                  bucket_bytes=150)
    ddp.register_comm_hook(state, mpicomp.ddp.comm_hook)
    return ddp, state


def clipped(model, optimizer, x, y):
    """Lightning-AI/pytorch-lightning#9237: changes to p.grad between backward and step."""
    optimizer.zero_grad()
    mse(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def zeroed_in_place(model, optimizer, x, y):
    """pytorch/pytorch#92882: zero_grad(set_to_none=False)."""
    optimizer.zero_grad(set_to_none=False)
    mse(model(x), y).backward()
    optimizer.step()


def penalised(model, optimizer, x, y):
    """pytorch/pytorch#47562, #48531: a gradient within the loss."""
    x = x.clone().requires_grad_(True)
    optimizer.zero_grad()
    out = model(x)
    slope, = torch.autograd.grad(out.sum(), x, create_graph=True)
    (mse(out, y) + slope.pow(2).mean()).backward()
    optimizer.step()


def two_forwards(model, optimizer, x, y):
    """pytorch/pytorch#59359: two forward passes before one backward."""
    optimizer.zero_grad()
    (mse(model(x), y) + model(2 * x).pow(2).mean()).backward()
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}])
@pytest.mark.parametrize("step", [plain, clipped, zeroed_in_place, penalised, two_forwards])
@pytest.mark.parametrize("method", ["dense", "onebit"])
def test_ways_to_write_a_step(step, options, method, comm, group):
    """facebookresearch/d2go#526 for the option; each function's docstring names its source."""
    model, alone = net(), net()
    ddp, _ = parallel(model, comm, method, **options)
    optimizer, expected = sgd(model.parameters()), sgd(alone.parameters())
    for number in range(3):
        step(ddp, optimizer, *batch(comm.rank, number))
        step(alone, expected, *whole(comm, number))
    replicas_are_identical(comm, model)
    if method == "dense":
        close(model, alone)


class Checkpointed(nn.Module):
    """pytorch/pytorch#109191, huggingface/transformers#30113."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return checkpoint(self.net[1:], checkpoint(self.net[:1], x, use_reentrant=False),
                          use_reentrant=False)


def test_activation_checkpoints(comm, group):
    """pytorch/pytorch#109191, huggingface/transformers#30113."""
    model, alone = Checkpointed(), Checkpointed()
    ddp, _ = parallel(model, comm)
    optimizer, expected = sgd(model.parameters()), sgd(alone.parameters())
    for number in range(3):
        plain(ddp, optimizer, *batch(comm.rank, number))
        plain(alone, expected, *whole(comm, number))
    replicas_are_identical(comm, model)
    close(model, alone)


def test_one_state_for_two_models(comm, group):
    """horovod/horovod#784: two models, and by mistake one hook state."""
    first, second = net(), net()
    _, state = parallel(first, comm)
    ddp = DistributedDataParallel(second)
    ddp.register_comm_hook(state, mpicomp.ddp.comm_hook)
    x, y = batch(comm.rank, 0)
    assert "named_parameters() of the module" in same_error(
        comm, SpecError, lambda: mse(ddp(x), y).backward())


def test_parameters_that_ddp_ignores(comm, group):
    """kohya-ss/sd-scripts#989: a part of the model is left out of DDP."""
    model = net()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.weight"])
    ddp, _ = parallel(model, comm, "onebit")
    optimizer = sgd(p for name, p in model.named_parameters() if name != "0.weight")
    for number in range(3):
        plain(ddp, optimizer, *batch(comm.rank, number))
    replicas_are_identical(comm, model)


def test_uneven_inputs(comm, group):
    """lifeiteng/vall-e#95, microsoft/PyMarlin#80: DDP.join()."""
    model = net()
    ddp, _ = parallel(model, comm, "onebit")
    optimizer = sgd(model.parameters())
    with ddp.join():
        for number in range(1 + comm.rank):
            plain(ddp, optimizer, *batch(comm.rank, number))
    replicas_are_identical(comm, model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("through", ["hook", "Reducer"])
def test_an_optimizer_whose_state_is_divided(through, comm, group):
    """pytorch/pytorch#63213, determined-ai/determined#4531: ZeroRedundancyOptimizer."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, alone = net(), net()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)
    expected = torch.optim.Adam(alone.parameters(), lr=0.01)
    if through == "hook":
        trained, _ = parallel(model, comm)
    else:
        trained, optimizer = model, spread(model, optimizer, comm)
    for number in range(3):
        plain(trained, optimizer, *batch(comm.rank, number))
        plain(alone, expected, *whole(comm, number))
    replicas_are_identical(comm, model)
    close(model, alone, 1e-4)
    optimizer.consolidate_state_dict(0)


def test_models_averaged_now_and_then(comm, group):
    """horovod/horovod#1624: local steps, and parameters averaged every second one."""
    model = net()
    optimizer = sgd(model.parameters())
    averager = PeriodicModelAverager(period=2, warmup_steps=0)
    for number in range(3):
        plain(model, optimizer, *batch(comm.rank, number))
        averager.average_parameters(model.parameters())
    replicas_are_identical(comm, model)


def test_a_group_made_again(comm):
    """pytorch/pytorch#55967, #74666: init, destroy and init."""
    for _ in range(3):
        mpicomp.ddp.init_process_group(comm, timeout=600.0)
        tensor = torch.ones(2)
        dist.all_reduce(tensor)
        dist.barrier()
        dist.destroy_process_group()
        assert tensor.tolist() == [comm.size] * 2


KINDS = [torch.ones(3, dtype=dtype) for dtype in (
    torch.complex64, torch.complex128, torch.float64, torch.bfloat16, torch.int8, torch.uint8,
    torch.int16)] + [torch.ones(2, 3).t(), torch.ones(()), torch.ones(0), torch.ones(4)[::2]]


def test_sums_of_all_kinds_of_tensors(comm, group):
    """pytorch/pytorch#166863, #74039: dtypes, strides, no elements; with async_op as well."""
    for kind in KINDS:
        tensor = copy.deepcopy(kind)
        work = dist.all_reduce(tensor, async_op=True)
        work.wait()
        assert work.is_completed() and torch.equal(tensor, kind * comm.size)
