"""DistributedDataParallel with mpicomp's hook: the same bits as Reducer, whatever DDP's buckets."""

import io

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from training import (
    digest,
    examples,
    network,
    outcome,
    parameters,
    replicas_are_identical,
    same_error,
    whole_numbers,
)

import mpicomp
from mpicomp import MismatchError, NonFiniteError, SpecError, StallError, ddp

pytestmark = pytest.mark.mpi
SPECS = ["dense", "dense:exchange=allgather", "fp16", "bf16:exchange=allreduce", "terngrad",
         "terngrad:exchange=allreduce", "onebit", "onebit:warmup=2", "dorefa", "strom:tau=0.02",
         "dryden:proportion=8", "dropping:rate=0.9", "adacomp", "onebit:exchange=sharded",
         "dryden:proportion=8,exchange=sharded", "onebit:exchange=hierarchical",
         "rule(*.bias:dense; onebit)"]
SMALL = 0.001  # MiB in a bucket of DDP


@pytest.fixture
def group():
    """torch's default process group, of MPI's ranks."""
    ddp.init_process_group(MPI.COMM_WORLD)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Run:
    """A training with the hook, or with Reducer; both with several buckets."""

    def __init__(self, comm, spec, hook=True, names=True, cap=SMALL, model=None, **keywords):
        self.comm, self.model = comm, model or network()
        self.wrapped, self.seen = self.model, []
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        keywords = dict(bucket_bytes=2000, seed=3) | keywords
        if hook:
            if names:
                keywords["named_parameters"] = self.model.named_parameters()
            self.state = ddp.HookState(spec, comm, **keywords)
            self.wrapped = DistributedDataParallel(self.model, bucket_cap_mb=cap)
            self.wrapped.register_comm_hook(self.state, self._watched)
        else:
            self.state = mpicomp.Reducer(self.model.named_parameters(), spec, comm, **keywords
                                         ).attach(self.optimizer)

    def _watched(self, state, bucket):
        """The hook, and a look at what DDP's buckets are."""
        self.seen.append((bucket.index(), len(bucket.parameters())))
        return ddp.comm_hook(state, bucket)

    def backward(self, step, factor=1.0):
        x, y = examples(self.comm, step)
        (cross_entropy(self.wrapped(x), y) * factor).backward()

    def steps(self, *numbers):
        for step in numbers:
            self.optimizer.zero_grad()
            self.backward(step)
            self.optimizer.step()
        return self

    @property
    def everything(self):
        state = self.state.state_dict()
        return state.pop("step"), digest(self.model.parameters()), {
            key: value.numpy().tobytes() for key, value in state.items()}


@pytest.mark.parametrize("spec", SPECS)
def test_the_hook_is_reducer_to_the_bit(spec, group, comm):
    """Parameters and residuals, while DDP goes from one bucket to several after the first step."""
    hooked, plain = (Run(comm, spec, hook=h).steps(*range(5)) for h in (True, False))
    assert hooked.everything == plain.everything
    assert hooked.state.stats.calls == plain.state.stats.calls and hooked.state.stats.steps == 5
    replicas_are_identical(comm, hooked.model)
    first = hooked.seen[:1] == [(0, 6)]
    later = sorted({index for index, _ in hooked.seen[1:]})
    assert first and len(later) > 1, "DDP did not rebuild its buckets: this test shows nothing"


def test_without_names_parameters_are_numbered_as_the_model_has_them(group, comm):
    named, numbered = (Run(comm, "onebit", names=n).steps(*range(5)) for n in (True, False))
    step, bits, owed = named.everything
    names = [f"error/{name}" for name, _ in named.model.named_parameters()]
    assert numbered.everything == (step, bits, {
        f"error/{i}": owed[name] for i, name in enumerate(names)})


class Given(torch.nn.Module):
    """A module whose parameters get these gradients."""

    def __init__(self):
        super().__init__()
        for name, p in parameters(w=(40, 5), b=(40,), s=()):
            self.register_parameter(name, p)

    def forward(self, gradients):
        return sum((p * g).sum() for p, g in zip(self.parameters(), gradients, strict=True))


@pytest.mark.parametrize("spec", ["dense", "onebit", "strom:tau=2", "dropping:rate=0.9", "adacomp",
                                  "onebit:exchange=sharded", "dryden:exchange=sharded"])
def test_said_and_owed_is_given(spec, group, comm):
    """P times the means of all steps, and what all ranks owe, make up all gradients."""
    module = Given()
    state = ddp.HookState(spec, comm, named_parameters=module.named_parameters())
    model = DistributedDataParallel(module, bucket_cap_mb=SMALL)
    model.register_comm_hook(state, ddp.comm_hook)
    given = {name: np.zeros(p.shape) for name, p in module.named_parameters()}
    said = {name: np.zeros(p.shape) for name, p in module.named_parameters()}
    for step in range(6):
        model.zero_grad()
        gradients = {name: torch.from_numpy(whole_numbers(comm.rank, step + i, p.numel())
                                            ).view(p.shape)
                     for i, (name, p) in enumerate(module.named_parameters())}
        model(list(gradients.values())).backward()
        for name, p in module.named_parameters():
            given[name] += gradients[name].numpy()
            said[name] += comm.size * p.grad.double().numpy()
    owed = state.state_dict()
    for name, total in given.items():
        mine = sum(v.double().numpy() for key, v in owed.items()
                   if key.partition("/")[2] == name) + np.zeros(total.shape)
        expected, still = comm.allreduce(total), comm.allreduce(mine)
        assert np.allclose(said[name] + still, expected, atol=1e-4 * comm.size * 6), name


@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize("spec", ["onebit", "terngrad", "onebit:exchange=sharded"])
def test_saved_and_loaded_is_not_having_stopped(spec, names, group, comm):
    straight = Run(comm, spec, names=names).steps(*range(6))
    before = Run(comm, spec, names=names).steps(0, 1, 2)
    file = io.BytesIO()
    parts = before.model, before.optimizer, before.state
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    after = Run(comm, spec, names=names)
    for part, state in zip((after.model, after.optimizer, after.state),
                           torch.load(file, weights_only=True)):
        part.load_state_dict(state)
    assert after.state.state_dict()["step"] == 3
    assert after.steps(3, 4, 5).everything == straight.everything


@pytest.mark.parametrize("names", [True, False])
def test_a_state_from_before_the_first_step_loads_everywhere(names, group, comm):
    early = ddp.HookState("onebit", comm).state_dict()
    assert early == {"step": 0}
    run, plain = Run(comm, "onebit", names=names), Run(comm, "onebit", names=names)
    run.state.load_state_dict(early)
    assert run.steps(0, 1).everything == plain.steps(0, 1).everything
    with pytest.raises(MismatchError, match="the saved state lacks"):
        run.state.load_state_dict(early)  # two steps cannot be taken back


def test_no_sync_accumulates(group, comm):
    hooked, plain = Run(comm, "onebit"), Run(comm, "onebit", hook=False)
    for run, inside in ((hooked, hooked.wrapped), (plain, plain.state)):
        for step in range(3):
            run.optimizer.zero_grad()
            calls = len(run.seen)
            with inside.no_sync():
                run.backward(2 * step, 0.5)
            assert len(run.seen) == calls
            run.backward(2 * step + 1, 0.5)
            run.optimizer.step()
    assert hooked.everything == plain.everything and hooked.state.stats.steps == 3


# ---- gradients that are not finite ----------------------------------------------------------


@pytest.mark.parametrize("names", [True, False])
def test_nonfinite_raises_on_all_ranks(names, group, comm):
    run = Run(comm, "onebit", names=names).steps(0, 1)
    before = run.everything
    sick = comm.rank == comm.size - 1
    text = same_error(comm, NonFiniteError,
                      lambda: run.backward(2, float("nan") if sick else 1.0))
    assert f"rank {comm.size - 1}: " in text and "step 2" in text
    assert run.everything == before


def test_nonfinite_skips_on_all_ranks(group, comm):
    """p.grad is None everywhere, after DDP has had its say; then it goes on."""
    run = Run(comm, "onebit", nonfinite="skip").steps(0, 1)
    step, *before = run.everything
    run.optimizer.zero_grad()
    run.backward(2, float("inf") if comm.rank == 0 else 1.0)
    assert all(p.grad is None for p in run.model.parameters())
    run.optimizer.step()
    assert run.everything == (step + 1, *before) and run.state.stats.skipped == 1
    run.steps(3)
    assert run.everything[1] != before[0]
    replicas_are_identical(comm, run.model)


def test_a_scaler_lowers_its_scale_on_all_ranks(group, comm):
    """Residuals in true units: with a loss scale all is as without, to the bit."""
    plain = Run(comm, "onebit", nonfinite="skip").steps(0, 1, 3, 4)
    run = Run(comm, "onebit", nonfinite="skip")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    run.state.follow(scaler)
    scales = []
    for step in range(5):
        run.optimizer.zero_grad()
        sick = step == 2 and comm.rank == comm.size - 1
        x, y = examples(comm, step)
        scaler.scale(cross_entropy(run.wrapped(x), y) * (np.inf if sick else 1.0)).backward()
        scaler.step(run.optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [2.0**10, 2.0**11, 2.0**10, 2.0**10, 2.0**11]
    assert run.everything[1:] == plain.everything[1:] and run.state.stats.skipped == 1


# ---- ranks, groups and models that do not fit -----------------------------------------------


@pytest.mark.mpi(min_size=2)
def test_another_method_on_one_rank_is_named_on_all(group, comm):
    spec = "onebit" if comm.rank == comm.size - 1 else "terngrad"
    text = same_error(comm, MismatchError, lambda: Run(comm, spec))
    assert f"rank {comm.size - 1}" in text and "method" in text
    unnamed = Run(comm, spec, names=False)  # found in the first step
    assert "method" in same_error(comm, MismatchError, lambda: unnamed.steps(0))


@pytest.mark.mpi(min_size=2)
def test_a_dummy_process_group_of_one(comm):
    """DDP believes to be alone, and MPI averages: what is not equal at first is noticed."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        hooked = Run(comm, "onebit").steps(*range(5))
        replicas_are_identical(comm, hooked.model)
        assert hooked.everything == Run(comm, "onebit", hook=False).steps(*range(5)).everything
        other = Run(comm, "dense", model=network(seed=comm.rank))
        text = same_error(comm, MismatchError, lambda: other.steps(0))
        assert "mpicomp.broadcast_parameters(model)" in text
    finally:
        dist.destroy_process_group()


def test_errors_that_name_what_to_type(group, comm):
    with pytest.raises(SpecError, match="named_parameters=net.named_parameters"):
        ddp.HookState("rule(*.bias:dense; onebit)", comm)
    for spec in "onebit:delay=1", "strom:exchange=peers":
        with pytest.raises(SpecError, match="use mpicomp.Reducer"):
            ddp.HookState(spec, comm)
    with pytest.raises(SpecError, match=r"sparse=\['weight'\] found"):
        ddp.HookState("onebit", comm, sparse=["weight"])
    with pytest.raises(SpecError, match="nonfinite='skip'"):
        ddp.HookState("onebit", comm).follow(torch.amp.GradScaler("cpu"))
    model = DistributedDataParallel(Given())
    model.register_comm_hook("onebit", ddp.comm_hook)
    text = same_error(comm, SpecError, lambda: model(
        [torch.ones(p.shape) for p in model.parameters()]).backward())
    assert "found a state of type str, expected a HookState" in text
    with pytest.raises(mpicomp.LaunchError, match="exists already"):
        ddp.init_process_group(comm)
    other = Run(comm, "dense")
    other.state._averager._names.popitem()
    assert all("does not know" in text for text in outcome(comm, lambda: other.steps(0)))


class Fork(torch.nn.Module):
    """Rank 0 takes another way than the others."""

    def __init__(self, comm):
        super().__init__()
        self.rank, self.trunk = comm.rank, torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.ways = torch.nn.ModuleList(torch.nn.Linear(4, 1) for _ in range(3))

    def forward(self, x):
        return self.ways[min(self.rank, 1)](self.norm(self.trunk(x))).sum()


def test_unused_parameters_differ_between_ranks(group, comm):
    """DDP asks its group which parameters nobody used: MPI's answer keeps replicas equal."""
    torch.manual_seed(5 + comm.rank)
    module = Fork(comm)
    state = ddp.HookState("onebit", comm, named_parameters=module.named_parameters())
    model = DistributedDataParallel(module, find_unused_parameters=True)  # broadcasts rank 0's
    model.register_comm_hook(state, ddp.comm_hook)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    replicas_are_identical(comm, module)
    start = digest(module.ways[1].parameters())
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).backward()
        optimizer.step()
    assert module.ways[2].weight.grad is None
    assert (digest(module.ways[1].parameters()) == start) == (comm.size == 1)
    replicas_are_identical(comm, module)


def test_static_graph(group, comm):
    """Then DDP hands over the first step's buckets only when backward is over."""
    runs = [Run(comm, "onebit", names=n, nonfinite="skip") for n in (True, False)]
    for run in runs:
        run.wrapped._set_static_graph()
        run.steps(*range(4))
    plain = Run(comm, "onebit", hook=False, nonfinite="skip").steps(*range(4))
    assert runs[0].everything == plain.everything and runs[1].everything[1] == plain.everything[1]


@pytest.mark.parametrize("spec", ["dense", "onebit", "strom:tau=0.05"])
def test_sparse_gradients_of_an_embedding(spec, group, comm):
    """DDP gives them a bucket of their own and takes a sparse mean back."""
    results = []
    for hook in True, False:
        torch.manual_seed(1)
        table = torch.nn.Embedding(30, 4, sparse=True)
        optimizer = torch.optim.SGD(table.parameters(), lr=0.125)  # exact
        model = DistributedDataParallel(table) if hook else table
        state = ddp.HookState(spec, comm, named_parameters=table.named_parameters(),
                              nonfinite="skip") if hook else \
            mpicomp.Reducer(table.named_parameters(), spec, comm, nonfinite="skip"
                            ).attach(optimizer)
        if hook:
            model.register_comm_hook(state, ddp.comm_hook)
        for step in range(4):
            optimizer.zero_grad()
            rows = torch.tensor([[1, 1, step], [2 + comm.rank, 7, 7]])
            loss = (model(rows) * (torch.arange(24.0).view(2, 3, 4) - 9)).sum()
            (loss * (np.nan if step == 2 and comm.rank == 0 else 1.0)).backward()
            optimizer.step()
        assert hook == bool(table.weight.grad.is_sparse)
        replicas_are_identical(comm, table)
        results.append((digest(table.parameters()), state.stats.skipped,
                        digest(v for k, v in state.state_dict().items() if k != "step")))
    assert results[0] == results[1] and results[0][1] == 1


# ---- the process group ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16,
                                   torch.int64, torch.int32, torch.uint8])
def test_collectives_of_torch_over_mpi(dtype, group, comm):
    mine = torch.arange(6).view(2, 3).add(comm.rank).to(dtype)
    everyone = [torch.arange(6).view(2, 3).add(r).to(dtype) for r in range(comm.size)]
    root = comm.size - 1
    for tensor in (mine.clone(), mine.t().clone().t()):  # the second is not contiguous
        dist.broadcast(tensor, root)
        assert torch.equal(tensor, everyone[root])
    for op, expected in ((dist.ReduceOp.SUM, sum(everyone)), (dist.ReduceOp.MAX, everyone[-1])):
        tensor = mine.clone()
        dist.all_reduce(tensor, op)
        assert torch.equal(tensor, expected)
    gathered = [torch.empty_like(mine) for _ in range(comm.size)]
    dist.all_gather(gathered, mine)
    assert all(map(torch.equal, gathered, everyone))
    flat = torch.empty(2 * comm.size, 3, dtype=dtype)
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(flat, mine)
    assert torch.equal(flat, torch.cat(everyone))


def test_objects_barrier_and_average(group, comm):
    objects = [None] * comm.size
    dist.all_gather_object(objects, {"rank": comm.rank})
    assert objects == [{"rank": r} for r in range(comm.size)]
    told = [f"from {comm.rank}"]
    dist.broadcast_object_list(told, src=comm.size - 1)
    assert told == [f"from {comm.size - 1}"]
    mean = torch.full((2,), float(comm.rank))
    work = dist.all_reduce(mean, dist.ReduceOp.AVG, async_op=True)
    work.wait()
    assert mean.tolist() == [(comm.size - 1) / 2] * 2 and work.is_completed()
    odd = dist.new_group(range(1 - comm.size % 2, comm.size, 2))
    if dist.get_rank(odd) >= 0:
        number = torch.ones(1)
        dist.all_reduce(number, group=odd)
        assert number == dist.get_world_size(odd) == (comm.size + 1) // 2
    dist.barrier()
    assert dist.get_rank() == comm.rank and dist.get_world_size() == comm.size


@pytest.mark.mpi(min_size=2)
def test_a_collective_that_one_rank_leaves_out(comm):
    group = ddp.MpiGroup(comm.Dup(), 0.3)
    if comm.rank:
        with pytest.raises(StallError, match=f"rank {comm.rank} waited 0.3 s while in torch"):
            group.barrier()
        comm.Barrier()
    else:
        comm.Barrier()
        group.barrier()
