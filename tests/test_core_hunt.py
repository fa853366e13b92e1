"""Gradients that are frozen, given up, read or added to at odd moments: nothing is lost, and no
replica drifts."""

import gc

import numpy as np
import pytest
import torch
from training import (
    digest,
    examples,
    give,
    network,
    parameters,
    replicas_are_identical,
    whole_numbers,
)

import mpicomp

pytestmark = pytest.mark.mpi
SYNCHRONOUS = ["dense", "onebit", "strom:tau=0.5", "onebit:exchange=sharded",
               "onebit:exchange=hierarchical", "strom:tau=0.5,exchange=sharded"]
SHAPES = dict(a=(4, 6), b=40, c=(3, 5))


def made(comm, spec="dense", lr=1.0, **keywords):
    named = parameters(**SHAPES)
    optimizer = torch.optim.SGD([p for _, p in named], lr=lr)
    keywords = {"bucket_bytes": 100, "seed": 3, "stall_timeout": 20, **keywords}
    mpicomp.DistributedOptimizer(optimizer, named, spec, comm, **keywords)
    return named, optimizer, optimizer.reducer


def gradients(rank, step):
    return [whole_numbers(rank, step, int(np.prod(s)), most=3 + i).reshape(s)
            for i, s in enumerate(SHAPES.values())]


def backward(comm, named, step):
    """Frozen parameters are left out, as autograd leaves them out."""
    pairs = [(pair, g) for pair, g in zip(named, gradients(comm.rank, step))
             if pair[1].requires_grad]
    give([pair for pair, _ in pairs], [g for _, g in pairs])


def conserved(comm, named, reducer, given):
    """What has moved the parameters and what is owed is what was given, in sum over ranks."""
    reducer.deliver()
    state = reducer.state_dict()
    for name, p in named:
        mine = sum((v.double() for k, v in state.items()
                    if k.startswith("error") and k.endswith(f"/{name}")), torch.zeros(p.shape))
        owed = torch.from_numpy(comm.allreduce(mine.numpy()))
        torch.testing.assert_close(owed / comm.size - p.detach().double(), given[name] / comm.size,
                                   rtol=0, atol=1e-4, msg=lambda m: f"{name}: {m}")


def total(comm, steps_by_name):
    """The sum over ranks and these steps of every gradient: {name: tensor}."""
    return {name: sum((torch.from_numpy(gradients(rank, step)[i]).double()
                       for rank in range(comm.size) for step in steps), torch.zeros(shape))
            for i, ((name, shape), steps) in enumerate(zip(SHAPES.items(), steps_by_name))}


@pytest.mark.parametrize("spec", SYNCHRONOUS[:-1])  # strom sharded may say nothing in a step
def test_backward_again_on_top_of_a_mean_that_was_read(spec, comm):
    """Without zero_grad() p.grad is the sum of both, as in one process, and nothing is lost."""
    named, optimizer, reducer = made(comm, spec)
    for step in range(0, 6, 2):
        optimizer.zero_grad()
        backward(comm, named, step)
        float(named[0][1].grad.norm())  # logged
        backward(comm, named, step + 1)
        optimizer.step()
    conserved(comm, named, reducer, total(comm, [range(6)] * 3))
    replicas_are_identical(comm, torch.nn.ParameterList([p for _, p in named]))


@pytest.mark.parametrize("spec", ["dense", "onebit:exchange=sharded"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_what_was_read_and_given_up_is_taken_back(set_to_none, spec, comm):
    named, optimizer, reducer = made(comm, spec)
    for step in range(6):
        backward(comm, named, step)
        float(named[0][1].grad.norm())
        if step != 2:
            optimizer.step()
        optimizer.zero_grad(set_to_none)
    conserved(comm, named, reducer, total(comm, [[0, 1, 3, 4, 5]] * 3))


@pytest.mark.parametrize("bucket_bytes", [100, 1 << 20])
@pytest.mark.parametrize("spec", [*SYNCHRONOUS, "onebit:delay=1", "onebit:warmup=2",
                                  "onebit:exchange=sharded,warmup=1", "strom:tau=0.5,delay=1"])
@pytest.mark.parametrize("when", ["between", "after backward", "after reading"])
def test_freezing_loses_nothing(when, spec, bucket_bytes, comm):
    """Wherever in the loop it happens, and however many buckets there are."""
    named, optimizer, reducer = made(comm, spec, bucket_bytes=bucket_bytes)
    layer = named[0][1]
    steps = [list(range(8)), list(range(8)), list(range(8))]
    for step in range(8):
        optimizer.zero_grad()
        if when == "between" and step in (3, 6):
            layer.requires_grad_(step == 6)
        backward(comm, named, step)
        if not layer.requires_grad:
            steps[0].remove(step)
        if when == "after reading":
            named[1][1].grad is not None and float(named[1][1].grad.sum())
        if when != "between" and step in (3, 6):
            layer.requires_grad_(step == 6)
        optimizer.step()
    if when == "between":
        layer.requires_grad_()
    conserved(comm, named, reducer, total(comm, steps))
    replicas_are_identical(comm, torch.nn.ParameterList([p for _, p in named]))


@pytest.mark.parametrize("how", ["zero_grad", "discard"])
@pytest.mark.parametrize("bucket_bytes", [100, 1 << 20])
@pytest.mark.parametrize("spec", ["dense", "onebit:exchange=hierarchical",
                                  "strom:tau=0.5,exchange=sharded"])
def test_a_rank_gives_up_the_step_that_its_nan_spoils(spec, bucket_bytes, how, comm):
    """nonfinite="raise" is about steps that would be applied."""
    named, optimizer, reducer = made(comm, spec, bucket_bytes=bucket_bytes)
    for step in range(5):
        optimizer.zero_grad()
        spike = step == 2 and comm.rank == 0
        if spike:
            give(named, [np.full(s, np.nan) for s in SHAPES.values()])
            if how == "discard":
                reducer.discard()
            else:
                optimizer.zero_grad()
                optimizer.step()
            continue
        backward(comm, named, step)
        optimizer.step()
    assert reducer.stats.skipped == 1 and reducer.step == 5
    conserved(comm, named, reducer, total(comm, [[0, 1, 3, 4]] * 3))


@pytest.mark.parametrize("read", ["clip", "one"])
def test_dense_gradients_of_a_table_wait_for_the_mean_too(read, comm):
    """Clipping reads all gradients, then scales them: the norm must be that of the mean."""
    named = parameters(t=(6, 2), b=4)
    optimizer = torch.optim.SGD([p for _, p in named], lr=1.0)
    mpicomp.DistributedOptimizer(optimizer, named, "dense", comm, sparse=["t"])
    for step in range(2):
        optimizer.zero_grad()
        give(named, [np.full((6, 2), comm.rank + 1.0), np.full(4, comm.rank + 1.0)])
        mean = (comm.size + 1) / 2
        if read == "clip":
            norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
            torch.testing.assert_close(float(norm), 4.0 * mean)
        else:
            assert (named[0][1].grad == mean).all()
        optimizer.step()
    replicas_are_identical(comm, torch.nn.ParameterList([p for _, p in named]))


def test_thousands_of_steps_leave_nothing_behind(comm):
    named, optimizer, reducer = made(comm, "onebit")

    def steps(n):
        for step in range(n):
            optimizer.zero_grad()
            backward(comm, named, step % 5)
            if step % 3 == 0:
                named[0][1].grad.mul_(0.5)
            if step % 7 == 0:
                optimizer.zero_grad()
            optimizer.step()
        gc.collect()
        return len(gc.get_objects())

    steps(20)
    before = steps(50)
    assert steps(150) - before < 50


@pytest.mark.parametrize("spec", ["dense", "onebit:exchange=sharded"])
def test_an_error_in_backward_on_all_ranks_is_caught_and_training_goes_on(spec, comm):
    named, optimizer, reducer = made(comm, spec)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("out of memory")

    for step in range(6):
        optimizer.zero_grad()
        if step in (0, 3):
            with pytest.raises(RuntimeError, match="out of memory"):
                (Fails.apply(named[0][1]).sum() + named[2][1].sum()
                 + (named[2][1] * named[1][1][:5]).sum()).backward()
            continue
        backward(comm, named, step)
        optimizer.step()
    conserved(comm, named, reducer, total(comm, [[1, 2, 4, 5]] * 3))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_with_clipping(reentrant, comm):
    from torch.utils.checkpoint import checkpoint

    def run(spec, use):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), spec, comm,
                                     bucket_bytes=1000)
        for step in range(4):
            optimizer.zero_grad()
            x, y = examples(comm, step)
            x.requires_grad_()
            h = checkpoint(model[:4], x, use_reentrant=reentrant) if use else model[:4](x)
            out = checkpoint(model[4:], h, use_reentrant=reentrant) if use else model[4:](h)
            torch.nn.functional.cross_entropy(out, y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
        return digest(model.parameters())

    for spec in ("dense", "onebit"):
        assert run(spec, True) == run(spec, False)


@pytest.mark.parametrize("spec", SYNCHRONOUS)
def test_a_step_given_up_under_a_scaler_by_one_rank(spec, comm):
    named = parameters(**SHAPES)
    optimizer = torch.optim.SGD([p for _, p in named], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 10, growth_interval=2)
    reducer = mpicomp.Reducer(named, spec, comm, nonfinite="skip", bucket_bytes=100)
    reducer.attach(optimizer, scaler)
    for step in range(8):
        optimizer.zero_grad()
        loss = sum((p * torch.as_tensor(g)).sum() for (_, p), g in
                   zip(named, gradients(comm.rank, step)))
        scaler.scale(loss).backward()
        if step == 4 and comm.rank == 0:
            optimizer.zero_grad()
        if step % 2:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_([p for _, p in named], 1e9)
        scaler.step(optimizer)
        scaler.update()
    conserved(comm, named, reducer, total(comm, [[0, 1, 2, 3, 5, 6, 7]] * 3))


@pytest.mark.parametrize("spec", ["onebit", "onebit:exchange=sharded", "strom:tau=0.5"])
def test_what_a_frozen_layer_is_owed_waits_through_a_flush(spec, comm):
    named, optimizer, reducer = made(comm, spec)
    for step in range(6):
        optimizer.zero_grad()
        if step == 3:
            named[0][1].requires_grad_(False)
        backward(comm, named, step)
        optimizer.step()
        if step == 4:
            still = named[0][1].clone()
            reducer.flush()
            optimizer.step()
            assert torch.equal(still, named[0][1])
    named[0][1].requires_grad_()
    conserved(comm, named, reducer, total(comm, [range(3), range(6), range(6)]))


@pytest.mark.parametrize("how", ["discard", "zero_grad and step", "zero_grad"])
@pytest.mark.parametrize("spec", ["dense", "onebit:exchange=sharded"])
def test_a_backward_that_fails_on_one_rank(spec, how, comm):
    """Out of memory in the middle of it, say: what had come already is given up, too."""
    named, optimizer, reducer = made(comm, spec)
    for step in range(6):
        optimizer.zero_grad()
        if step in (0, 3) and comm.rank == 0:
            first = (named[2][1] * 1.0).sum()
            first.backward(inputs=[named[2][1]])
            # as where no end was reached
            reducer._changes._last = reducer.averager.buckets.names["c"][1]
            if how == "discard":
                reducer.discard()
            elif how == "zero_grad and step":
                optimizer.zero_grad()
                optimizer.step()
            continue
        backward(comm, named, step)
        optimizer.step()
    conserved(comm, named, reducer, total(comm, [[1, 2, 4, 5]] * 3))


def test_an_optimizer_of_ones_own_with_hooks_of_its_own(comm):
    """No torch.optim.Optimizer, as in tests/chaos: two methods for hooks are all that is asked."""
    class Plain:
        def __init__(self, parameters):
            self.parameters, self.before, self.after = parameters, [], []

        def register_step_pre_hook(self, hook):
            self.before.append(hook)

        def register_step_post_hook(self, hook):
            self.after.append(hook)

        def step(self):
            for hook in self.before:
                hook(self, (), {})
            with torch.no_grad():
                for p in self.parameters:
                    p -= p.grad
            for hook in self.after:
                hook(self, (), {})

    named = parameters(**SHAPES)
    optimizer = Plain([p for _, p in named])
    mpicomp.Reducer(named, "dense", comm).attach(optimizer)
    for step in range(3):
        for _, p in named:
            p.grad = None
        backward(comm, named, step)
        optimizer.step()
    replicas_are_identical(comm, torch.nn.ParameterList(optimizer.parameters))
