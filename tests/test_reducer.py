"""The Reducer in a training loop: what users do with parameters, optimizers and backward."""

from contextlib import nullcontext

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
    train,
    whole_numbers,
)

import mpicomp
from mpicomp import MismatchError

pytestmark = pytest.mark.mpi
HEADER = 32


def total(ranks, *gradient):
    """The sum over ranks of `whole_numbers`, as a list."""
    return sum(whole_numbers(rank, *gradient) for rank in range(ranks)).tolist()


def make(comm, spec="dense", **keywords):
    """(named parameters, their Reducer): a of 6 elements, b of 4; the sum over ranks."""
    named = parameters(a=(2, 3), b=4)
    return named, mpicomp.Reducer(named, spec, comm, average=False, **keywords)


# ---- which gradients there are --------------------------------------------------------------


@pytest.mark.parametrize("bucket_bytes", [1, 10**6])
def test_parameter_unused_on_all_ranks_but_one(comm, bucket_bytes):
    """It counts as zero where it was not used, whatever the step before left there."""
    named, reducer = make(comm, bucket_bytes=bucket_bytes)
    for used in (range(comm.size), [comm.size - 1], []):
        for _, p in named:
            p.grad = None
        if comm.rank in used:
            give(named, [np.ones(6), np.full(4, 8.0)])
        else:
            give(named[:1], [np.ones(6)])
        reducer.finish()
        assert named[0][1].grad.reshape(-1).tolist() == [comm.size] * 6
        if used or bucket_bytes > 1:
            assert named[1][1].grad.tolist() == [8 * len(used)] * 4
        else:
            assert named[1][1].grad is None


def test_parameter_unused_everywhere(comm):
    """A bucket that had no gradient on any rank is left alone; beside others it gets zeros."""
    for bucket_bytes, expected in ((1, None), (10**6, [0] * 4)):
        named, reducer = make(comm, bucket_bytes=bucket_bytes)
        give(named[:1], [np.ones(6)])
        reducer.finish()
        assert (named[1][1].grad.tolist() if named[1][1].grad is not None else None) == expected
        assert named[0][1].grad.reshape(-1).tolist() == [comm.size] * 6


def test_a_rank_without_examples_only_steps(comm):
    """Rank 0 has an empty batch: step() all the same; what is owed flows on."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), "onebit", comm)
    for step in range(4):
        optimizer.zero_grad()
        if comm.rank > 0 or step % 2:
            x, y = examples(comm, step)
            torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    replicas_are_identical(comm, model)
    assert optimizer.reducer.step == 4 == optimizer.reducer.stats.steps


def test_frozen_parameters_stay_at_home(comm):
    model = network()
    model[1].requires_grad_(False)
    before = digest(model[1].parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reducer = mpicomp.Reducer(model.named_parameters(), "dense", comm).attach(optimizer)
    x, y = examples(comm, 0)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert reducer.stats.sent == HEADER + 4 * trainable
    assert digest(model[1].parameters()) == before and model[1].weight.grad is None


def test_tied_weights_travel_once(comm):
    """One parameter in two places: its gradient is the sum of both uses."""
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(2)))
    model[1].weight = model[0].weight
    torch.nn.init.eye_(model[0].weight)
    reducer = mpicomp.Reducer(model.named_parameters(), "dense", comm, average=False)
    model(torch.eye(3) * (comm.rank + 1)).sum().backward()
    reducer.finish()
    assert reducer.stats.sent == HEADER + 4 * 9
    ranks = sum(range(1, comm.size + 1))
    assert model[0].weight.grad.tolist() == [[2 * ranks] * 3] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", ["dense", "onebit:feedback=no", "fp16"])
def test_half_precision_parameters(spec, dtype, comm):
    """Gradients keep their dtype; whole numbers come through exactly (one value an element)."""
    model = torch.nn.Linear(4, 1, bias=False).to(dtype)
    reducer = mpicomp.Reducer(model.named_parameters(), spec, comm, average=False)
    for _ in range(2):
        model.zero_grad(set_to_none=False)
        (model.weight * 3.0).sum().backward()
        reducer.finish()
        assert model.weight.grad.dtype == dtype
        assert model.weight.grad.tolist() == [[3.0 * comm.size] * 4]


def test_shapes_and_strides_of_all_kinds(comm):
    """Scalars, nothing at all, transposed memory, channels last, sparse gradients."""
    conv = torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    table = torch.nn.Embedding(5, 2, sparse=True)
    odd = parameters(scalar=(), none=0) + [
        ("turned", torch.nn.Parameter(torch.zeros(3, 4).t())), ("conv", conv.weight),
        ("table", table.weight)]
    reducer = mpicomp.Reducer(odd, "dense", comm, average=False, bucket_bytes=100)
    for step in range(2):
        for _, p in odd:
            p.grad = None
        ramp = torch.arange(12.0).view(4, 3)
        loss = odd[0][1] * 2 + odd[1][1].sum() + (odd[2][1] * ramp).sum()
        loss = loss + (conv.weight * torch.arange(48.0).view(4, 3, 2, 2)).sum()
        (loss + table(torch.tensor([1, 1, comm.rank % 5])).sum()).backward()
        reducer.finish()
        assert odd[0][1].grad.item() == 2 * comm.size
        assert odd[1][1].grad is None or odd[1][1].grad.numel() == 0
        assert odd[2][1].grad.tolist() == (comm.size * ramp).tolist()
        assert conv.weight.grad.flatten().tolist() == [comm.size * k for k in range(48)]
        rows = np.bincount([1, 1] * comm.size + list(range(comm.size)), minlength=5)
        assert table.weight.grad.to_dense().tolist() == [[n, n] for n in rows]


# ---- backward more than once ----------------------------------------------------------------


@pytest.mark.parametrize("last_inside", [False, True])
def test_no_sync_accumulates(comm, last_inside):
    """Gradients of several backwards are exchanged once, by the one outside or by finish()."""
    named, reducer = make(comm)
    for step in range(2):
        for part in range(3):
            gradients = [whole_numbers(comm.rank, part, n) for n in (6, 4)]
            with reducer.no_sync() if part < 2 or last_inside else nullcontext():
                give(named, gradients)
            if part < 2:
                assert reducer.stats.sent == step * (HEADER + 40)
        reducer.finish()
        for (_, p), n in zip(named, (6, 4)):
            expected = sum(np.array(total(comm.size, part, n)) for part in range(3))
            assert p.grad.reshape(-1).tolist() == expected.tolist()
            p.grad = None
    assert reducer.stats.sent == 2 * (HEADER + 40)


def test_no_sync_ends_with_its_block(comm):
    """Nested and left by an exception, it restores what was."""
    named, reducer = make(comm)
    with pytest.raises(KeyError), reducer.no_sync():
        with reducer.no_sync():
            pass
        give(named, [np.ones(6), np.ones(4)])
        raise KeyError
    assert named[0][1].grad.tolist() == [[1] * 3] * 2
    give(named, [np.ones(6), np.ones(4)])
    reducer.finish()
    assert named[1][1].grad.tolist() == [2 * comm.size] * 4


def test_second_backward_is_named(comm):
    named, reducer = make(comm)
    give(named, [np.ones(6), np.ones(4)])
    with pytest.raises(MismatchError, match=r"second gradient of '[ab]'.*no_sync"):
        give(named, [np.ones(6), np.ones(4)])
    reducer.finish()


def test_gradients_that_are_zeroed_in_place(comm):
    """zero_grad(set_to_none=False): backward then adds into the bucket's own memory."""
    named, reducer = make(comm, "strom:tau=0.25")
    twin, other = make(comm, "strom:tau=0.25")
    for step in range(4):
        for (_, p), (_, q) in zip(named, twin):
            if p.grad is not None:
                p.grad.zero_()
            q.grad = None
        for group, r in ((named, reducer), (twin, other)):
            give(group, [whole_numbers(comm.rank, step, n) / 16 for n in (6, 4)])
            r.finish()
        assert digest(p.grad for _, p in named) == digest(q.grad for _, q in twin)


# ---- finish, attach, optimizers -------------------------------------------------------------


def test_finish_is_idempotent(comm):
    named, reducer = make(comm, "onebit")
    give(named, [whole_numbers(comm.rank, 0, 6), whole_numbers(comm.rank, 0, 4)])
    reducer.finish()
    first, sent = digest(p.grad for _, p in named), reducer.stats.sent
    for _ in range(3):
        reducer.finish()
    assert digest(p.grad for _, p in named) == first
    assert reducer.stats.sent == sent and reducer.stats.steps == 1 == reducer.step


def test_clipping_between_finish_and_step(comm):
    """What the user does to p.grad after finish() is what the optimizer takes."""
    named, reducer = make(comm)
    optimizer = torch.optim.SGD([p for _, p in named], lr=1.0)
    assert reducer.attach(optimizer) is reducer
    give(named, [np.full(6, 3.0), np.full(4, 3.0)])
    reducer.finish()
    torch.nn.utils.clip_grad_value_([p for _, p in named], 0.5)
    optimizer.step()
    assert named[0][1].tolist() == [[-0.5] * 3] * 2


def test_the_optimizer_stays_the_users_own(comm):
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    assert mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), comm=comm) is optimizer
    assert isinstance(optimizer.reducer, mpicomp.Reducer) and type(optimizer) is torch.optim.Adam
    assert optimizer.reducer.method == mpicomp.method("dense")


def test_adam_with_a_learning_rate_schedule(comm):
    """Averaged gradients: the same parameters as one process with the whole batch, to rounding."""
    def run(train_on, wrap):
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        wrap(optimizer, model)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        for step in range(6):
            optimizer.zero_grad()
            x, y = (torch.cat(part) for part in zip(*(train_on(step))))
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    everyone = comm.allgather([examples(comm, step) for step in range(6)])
    alone = run(lambda step: [batches[step] for batches in everyone], lambda *_: None)
    together = run(lambda step: [everyone[comm.rank][step]], lambda optimizer, model:
                   mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), comm=comm))
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_is_averaged(comm, keyword):
    """optimizer.step(closure): the gradients that the closure leaves are exchanged, then used."""
    named, reducer = make(comm)
    optimizer = torch.optim.SGD([p for _, p in named], lr=1.0)
    reducer.attach(optimizer)

    def closure():
        optimizer.zero_grad()
        give(named, [np.full(6, comm.rank + 1.0), np.ones(4)])
        return torch.tensor(7.0)

    for _ in range(2):
        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert loss == 7 * comm.size  # the sum, as of the gradients
    ranks = sum(range(1, comm.size + 1))
    assert named[0][1].tolist() == [[-2 * ranks] * 3] * 2 and reducer.stats.steps == 2


def test_lbfgs_calls_its_closure_often(comm):
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), comm=comm)
    x, y = examples(comm, 0)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    replicas_are_identical(comm, model)
    assert optimizer.reducer.stats.steps > 1


def test_two_optimizers_share_one_exchange(comm):
    named, reducer = make(comm, "strom:tau=1")
    a, b = (torch.optim.SGD([p], lr=1.0) for _, p in named)
    reducer.attach(a).attach(b)
    for step in range(1, 4):
        a.zero_grad(), b.zero_grad()
        give(named, [np.full(6, 1.25), np.full(4, -1.25)])
        a.step(), b.step()
        assert reducer.stats.steps == step
    assert named[0][1].tolist() == [[-3 * comm.size] * 3] * 2
    assert named[1][1].tolist() == [3 * comm.size] * 4
    assert reducer.state_dict()["error/a"].tolist() == [[0.75] * 3] * 2


def test_two_reducers_in_one_program(comm):
    """Their backwards may interleave; each has its own buckets, statistics and residuals."""
    (ones, first), (twos, second) = make(comm, "onebit"), make(comm)
    for step in range(3):
        for named in (ones, twos):
            for _, p in named:
                p.grad = None
        give([*ones, *twos], [np.ones(6), np.ones(4), np.full(6, 2.0), np.full(4, 2.0)])
        second.finish()
        first.finish()
        assert ones[0][1].grad.tolist() == [[comm.size] * 3] * 2
        assert twos[1][1].grad.tolist() == [2 * comm.size] * 4
    assert first.stats.sent != second.stats.sent and first.step == second.step == 3


def test_close_takes_the_hooks_off(comm):
    named, reducer = make(comm)
    reducer.close()
    give(named, [np.ones(6), np.ones(4)])
    assert reducer.stats.sent == 0 and named[0][1].grad.tolist() == [[1] * 3] * 2


def test_own_communicators(any_comm):
    """The mean is over the communicator that was given, whose own messages are left alone."""
    named = parameters(w=5)
    reducer = mpicomp.Reducer(named, "dense", any_comm)
    assert reducer.comm.size == any_comm.size and reducer.comm != any_comm
    give(named, [np.full(5, any_comm.rank + 1.0)])
    reducer.finish()
    assert named[0][1].grad.tolist() == pytest.approx([(any_comm.size + 1) / 2] * 5)


def test_auto_chooses_the_same_method_everywhere(comm):
    """And trains with it; what was chosen says its own name."""
    model, losses = train("auto", comm, steps=8)
    replicas_are_identical(comm, model)
    reducer = mpicomp.Reducer(network().named_parameters(), "auto", comm)
    chosen = comm.allgather(repr(reducer.method))
    assert len(set(chosen)) == 1 and "auto" not in chosen[0]


@pytest.mark.mpi(min_size=3)
def test_part_of_the_world(comm):
    """Two groups train two models at the same time."""
    group = comm.Split(comm.rank % 2)
    named = parameters(w=5)
    reducer = mpicomp.Reducer(named, "onebit", group, average=False)
    give(named, [np.full(5, comm.rank % 2 + 1.0)])
    reducer.finish()
    assert named[0][1].grad.tolist() == [group.size * (comm.rank % 2 + 1.0)] * 5
