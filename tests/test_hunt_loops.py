"""More situations from public trackers: loops and their optimizers; each names its source."""

import copy

import pytest
import torch
from hunting import batch, close, mse, net, no_sync, plain, sgd, spread, whole
from torch import nn
from training import outcome, replicas_are_identical, same_error

import mpicomp
from mpicomp.errors import MismatchError, NonFiniteError

pytestmark = pytest.mark.mpi
methods = pytest.mark.parametrize("method", ["dense", "onebit"])


# ---- several backward passes, models and optimizers


@methods
def test_sharpness_aware_steps(method, comm):
    """davda54/sam#18, #78: each rank moves by its own gradient, and back before the step."""
    def slopes(model, x, y):
        return torch.autograd.grad(mse(model(x), y), list(model.parameters()))

    model, alone = net(), net()
    optimizer = spread(model, sgd(model.parameters()), comm, method)
    expected = sgd(alone.parameters())
    for step in range(3):
        x, y = batch(comm.rank, step)
        kept = [p.detach().clone() for p in model.parameters()]
        with optimizer.reducer.no_sync():
            mse(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p += 0.05 * p.grad
        optimizer.zero_grad()
        mse(model(x), y).backward()
        with torch.no_grad():
            for p, old in zip(model.parameters(), kept):
                p.copy_(old)
        optimizer.step()
        optimizer.zero_grad()
        found = []
        for rank in range(comm.size):
            moved = copy.deepcopy(alone)
            first = slopes(alone, *batch(rank, step))
            with torch.no_grad():
                for p, slope in zip(moved.parameters(), first):
                    p += 0.05 * slope
            found.append(slopes(moved, *batch(rank, step)))
        for p, parts in zip(alone.parameters(), zip(*found)):
            p.grad = sum(parts) / comm.size
        expected.step()
    replicas_are_identical(comm, model)
    if method == "dense":
        close(model, alone)


@methods
@pytest.mark.parametrize("how", ["no_sync", "frozen"])
def test_a_gan_of_two_models_with_equal_names(how, method, comm):
    """horovod/horovod#2559, #796, #784: the generator's loss reaches the discriminator, too."""
    def make():
        torch.manual_seed(1)
        models = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, out)) for out in (6, 1)]
        return models, [torch.optim.Adam(m.parameters(), lr=0.01) for m in models]

    def train(models, optimizers, examples):
        (fake, real), (first, second) = models, optimizers
        for step in range(3):
            x, _ = examples(step)
            real.requires_grad_(how != "frozen")
            first.zero_grad()
            with no_sync(second if how == "no_sync" else None):
                nn.functional.softplus(-real(fake(x))).mean().backward()
            first.step()
            real.requires_grad_(True)
            second.zero_grad()
            scores = real(torch.cat([x, fake(x).detach()])).chunk(2)
            (nn.functional.softplus(-scores[0]) + nn.functional.softplus(scores[1])).mean() \
                .backward()
            second.step()

    models, optimizers = make()
    for pair in zip(models, optimizers):
        spread(*pair, comm, method)
    train(models, optimizers, lambda step: batch(comm.rank, step))
    alone, theirs = make()
    train(alone, theirs, lambda step: whole(comm, step))
    for model, expected in zip(models, alone):
        replicas_are_identical(comm, model)
        if method == "dense":
            close(model, expected, 1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_two_optimizers_of_which_one_steps_every_other_time(shared, comm):
    """Lightning-AI/pytorch-lightning#15045, #29: optimizers of other frequency, no zero_grad."""
    def train(model, examples, reducer=None):
        first = sgd(model.parameters() if shared else model[:2].parameters())
        second = torch.optim.Adam(model[2:].parameters(), lr=0.01)
        if reducer:
            reducer.attach(first).attach(second)
        for step in range(4):
            x, y = examples(step)
            mse(model(x), y).backward()
            first.step()
            if step % 2:
                second.step()

    model, alone = net(), net()
    train(model, lambda step: batch(comm.rank, step),
          mpicomp.Reducer(model.named_parameters(), "dense", comm, bucket_bytes=150))
    train(alone, lambda step: whole(comm, step))
    replicas_are_identical(comm, model)
    close(model, alone, 1e-4)


@pytest.mark.parametrize("how", ["no_sync", "wrong"])
def test_a_trunk_that_two_reducers_share(how, comm):
    """huggingface/lerobot#2470: actor and critic with one encoder, an optimizer for each."""
    def make():
        torch.manual_seed(0)
        return nn.ModuleDict({"trunk": nn.Linear(6, 8), "a": nn.Linear(8, 3), "c": nn.Linear(8, 3)})

    def part(model, head):
        return [(n, p) for n, p in model.named_parameters() if n.startswith(("trunk", head))]

    def train(model, optimizers, examples):
        for step in range(3):
            x, y = examples(step)
            for head, own, other in (("a", *optimizers), ("c", *optimizers[::-1])):
                model.zero_grad()
                with no_sync(other if how == "no_sync" else None):
                    mse(model[head](model["trunk"](x).tanh()), y).backward()
                own.step()

    model, alone = make(), make()
    ours, theirs = ([sgd(p for _, p in part(m, head)) for head in "ac"] for m in (model, alone))
    for head, optimizer in zip("ac", ours):
        mpicomp.DistributedOptimizer(optimizer, part(model, head), "dense", comm)
    if how == "wrong":
        same = [text.split("rank")[0] for text in outcome(
            comm, lambda: train(model, ours, lambda step: batch(comm.rank, step)))]
        assert set(same) <= {"MismatchError: ", "SpecError: "}
        return
    train(model, ours, lambda step: batch(comm.rank, step))
    train(alone, theirs, lambda step: whole(comm, step))
    replicas_are_identical(comm, model)
    close(model, alone)


@methods
def test_another_number_of_micro_batches_on_each_rank(method, comm):
    """huggingface/transformers#34191, #34242, Lightning-AI/pytorch-lightning#19987: a sum."""
    model, alone = net(), net()
    optimizer = spread(model, sgd(model.parameters()), comm, method, average=False)
    expected = sgd(alone.parameters())
    total = 12 * sum(rank + 1 for rank in range(comm.size))

    def loss(of, rank, step, i):
        x, y = batch(rank, 10 * step + i)
        return mse(of(x), y, reduction="sum") / total

    for step in range(3):
        optimizer.zero_grad()
        expected.zero_grad()
        with optimizer.reducer.no_sync():
            for i in range(comm.rank):
                loss(model, comm.rank, step, i).backward()
        loss(model, comm.rank, step, comm.rank).backward()
        optimizer.step()
        for rank in range(comm.size):
            for i in range(rank + 1):
                loss(alone, rank, step, i).backward()
        expected.step()
    replicas_are_identical(comm, model)
    if method == "dense":
        close(model, alone)


@methods
def test_layers_that_some_ranks_leave_out_and_in_another_order(method, comm):
    """huggingface/accelerate#1191, pytorch/vision#7722, horovod/horovod#763."""
    def make():
        torch.manual_seed(0)
        return nn.ModuleList(nn.Linear(6, 3) for _ in range(5))

    def order(rank, step):
        return [(i * (1 + rank % 4) + step) % 5 for i in range(4)]

    model, alone = make(), make()
    optimizer, expected = sgd(model.parameters()), sgd(alone.parameters())
    spread(model, optimizer, comm, method)
    for step in range(4):
        optimizer.zero_grad()
        expected.zero_grad()
        for i in order(comm.rank, step):
            x, y = batch(comm.rank, step)
            mse(model[i](x), y).backward()
        optimizer.step()
        for rank in range(comm.size):
            for i in order(rank, step):
                x, y = batch(rank, step)
                (mse(alone[i](x), y) / comm.size).backward()
        for p in alone.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        expected.step()
    replicas_are_identical(comm, model)
    if method == "dense":
        close(model, alone)


def test_a_layer_frozen_on_one_rank_only(comm):
    """Lightning-AI/pytorch-lightning#20340: an error on all ranks, as docs/sharp-bits.md says."""
    model = net()
    optimizer = spread(model, sgd(model.parameters()), comm)

    def run():
        for step in range(4):
            model[0].requires_grad_(comm.rank > 0 or step < 2)
            plain(model, optimizer, *batch(comm.rank, step))

    assert comm.size == 1 or "freeze the same" in same_error(comm, MismatchError, run)


@pytest.mark.parametrize("sparse", [[], ["0.weight"]])
def test_sparse_gradients_that_accumulate(sparse, comm):
    """pytorch/pytorch#22037, #80496: no_sync, a default dtype of float64, no rows on a rank."""
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Flatten(),
                             nn.Linear(8, 2)).float()

    model, alone = make(), make()
    optimizer = spread(model, torch.optim.SGD(model.parameters(), 0.1), comm, sparse=sparse)
    expected = torch.optim.SGD(alone.parameters(), 0.1)
    torch.set_default_dtype(torch.float64)
    try:
        for step in range(3):
            optimizer.zero_grad()
            expected.zero_grad()
            if comm.rank < comm.size - 1 or step:
                with optimizer.reducer.no_sync():
                    model(torch.tensor([[comm.rank, step]])).sum().backward()
                model(torch.tensor([[3, comm.rank + 4]])).pow(2).sum().backward()
            optimizer.step()
            for rank in range(comm.size if step else comm.size - 1):
                (alone(torch.tensor([[rank, step]])).sum() / comm.size).backward()
                (alone(torch.tensor([[3, rank + 4]])).pow(2).sum() / comm.size).backward()
            expected.step()
    finally:
        torch.set_default_dtype(torch.float32)
    replicas_are_identical(comm, model)
    close(model, alone)


# ---- what is not finite


@pytest.mark.parametrize("last_inside", [True, False])
def test_a_nan_in_an_earlier_micro_batch(last_inside, comm):
    """ecmwf/WeatherGenerator#2718: one rank's loss is NaN in the first of two backward passes."""
    model = net()
    optimizer = spread(model, sgd(model.parameters()), comm, "onebit")

    def step():
        x, y = batch(comm.rank, 0)
        with optimizer.reducer.no_sync():
            (mse(model(x), y) * (float("nan") if comm.rank == comm.size - 1 else 1)).backward()
        with no_sync(optimizer if last_inside else None):
            mse(model(x), y).backward()
        optimizer.step()

    assert f"rank {comm.size - 1}: " in same_error(comm, NonFiniteError, step)


@methods
def test_an_error_that_is_caught_leaves_nothing_behind(method, comm):
    """pytorch/pytorch#114194: a step that raised, zero_grad, and on: as if it had not been."""
    models = [net(), net()]
    optimizers = [spread(m, sgd(m.parameters()), comm, method) for m in models]
    for step in range(4):
        for i, (model, optimizer) in enumerate(zip(models, optimizers)):
            x, y = batch(comm.rank, step)
            if step == 2 and i:
                same_error(comm, NonFiniteError,
                           lambda: plain(model, optimizer, x / (comm.rank > 0), y)
                           if comm.size > 1 else plain(model, optimizer, x / 0, y))
                optimizer.zero_grad()
            elif step != 2:
                plain(model, optimizer, x, y)
    replicas_are_identical(comm, models[1])
    if method == "dense":
        close(*models)


def test_a_rank_whose_batch_is_empty(comm):
    """lyuwenyu/RT-DETR#672, LBANN/lbann#97: its gradient counts as zero."""
    model, alone = net(), net()
    optimizer, expected = spread(model, sgd(model.parameters()), comm), sgd(alone.parameters())
    x, y = batch(comm.rank, 0)
    some = 4 if comm.rank < comm.size - 1 or comm.size == 1 else 0
    plain(model, optimizer, x[:some], y[:some])
    for rank in range(max(1, comm.size - 1)):
        x, y = batch(rank, 0)
        (mse(alone(x), y) / comm.size).backward()
    expected.step()
    replicas_are_identical(comm, model)
    close(model, alone)
