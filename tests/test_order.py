"""Buckets made anew in the order in which gradients arrived: nothing owed is lost, all agree."""

import io

import numpy as np
import pytest
import torch
from training import digest, examples, parameters, replicas_are_identical, train

import mpicomp

pytestmark = pytest.mark.mpi


class Backwards(torch.nn.Module):
    """Layers registered in the reverse of the order in which they are used, and an unused one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.last = torch.nn.Linear(20, 3)
        self.idle = torch.nn.Linear(5, 5)
        self.middle = torch.nn.Linear(30, 20)
        self.first = torch.nn.Linear(16, 30)

    def forward(self, x):
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


def named(reducer):
    """The parameters of each bucket."""
    return [[slot.name for slot in bucket.slots] for bucket in reducer.averager.buckets]


def begin(spec, comm, **keywords):
    model = Backwards()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    keywords = {"bucket_bytes": 1300, **keywords}
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), spec, comm, **keywords)
    return model, optimizer


def steps(model, optimizer, comm, *numbers):
    for step in numbers:
        optimizer.zero_grad()
        x, y = examples(comm, step)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_the_second_step_has_buckets_in_the_order_of_arrival(comm):
    model, optimizer = begin("onebit", comm)
    reducer = optimizer.reducer
    before = named(reducer)
    assert before[0][0].startswith("first") and before[-1][-1].startswith("last")
    steps(model, optimizer, comm, 0, 1)
    after = sum(named(reducer), [])
    assert after[0].startswith("last") and sorted(after) == sorted(sum(before, []))
    assert [n.split(".")[0] for n in after][-2:] == ["idle"] * 2  # what never arrived comes last
    steps(model, optimizer, comm, 2, 3)
    assert sum(named(reducer), []) == after
    replicas_are_identical(comm, model)
    assert len(set(map(str, comm.allgather(named(reducer))))) == 1


@pytest.mark.parametrize("keywords", [dict(bucket_bytes=1 << 20), dict()])
def test_buckets_that_would_be_the_same_stay(keywords, comm):
    """One bucket, or layers in their order: no array moves."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3)) \
        if not keywords else Backwards()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), "onebit", comm,
                                 **{"bucket_bytes": 1300, **keywords})
    buckets = optimizer.reducer.averager.buckets
    steps(model, optimizer, comm, 0, 1)
    assert optimizer.reducer.averager.buckets is buckets
    assert "order" not in optimizer.reducer.state_dict()


def test_ranks_that_saw_another_order_take_rank_0s(comm):
    """A rank without examples in the first step saw nothing arrive."""
    model, optimizer = begin("strom:tau=0.01", comm)
    if comm.rank == comm.size - 1 > 0:
        optimizer.step()
    else:
        steps(model, optimizer, comm, 0)
    steps(model, optimizer, comm, 1, 2)
    orders = comm.allgather(named(optimizer.reducer))
    assert all(order == orders[0] for order in orders)
    replicas_are_identical(comm, model)


@pytest.mark.parametrize("exchange", ["allgather", "sharded", "hierarchical"])
def test_what_is_owed_moves_with_its_parameter(exchange, comm):
    """Also where it is loaded into a Reducer that has not seen a step, before the change."""
    model, optimizer = begin(f"onebit:exchange={exchange}", comm)
    reducer = optimizer.reducer
    cut = named(reducer)
    x, y = examples(comm, 0)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    reducer.finish()
    before = reducer.state_dict()
    reducer.averager.buckets.apply()
    assert named(reducer) != cut
    after = reducer.state_dict()
    other = begin(f"onebit:exchange={exchange}", comm)[1].reducer
    other.load_state_dict(before)
    assert named(other) == named(reducer) and "order" in after
    for state in (after, other.state_dict()):
        assert before.keys() == state.keys()
        assert torch.equal(before["order"], state["order"])
        for key in (key for key in before if key.startswith("error/")):
            second = key.replace("error/", "error2/")  # may join the first where owners change
            torch.testing.assert_close(before[key] + before.get(second, 0),
                                       state[key] + state.get(second, 0), rtol=0, atol=1e-6)
            assert second in before or torch.equal(before[key], state[key])
    owed = any(v.any() for key, v in before.items() if key.startswith("error/"))
    assert owed or exchange == "hierarchical"


@pytest.mark.parametrize("spec", ["dense", "onebit", "strom:tau=0.01", "terngrad",
                                  "onebit:warmup=2", "strom:tau=0.01,exchange=sharded",
                                  "onebit:exchange=sharded,adagrad=yes"])
@pytest.mark.parametrize("saved_after", [1, 3])
def test_saved_and_loaded_is_not_having_stopped(spec, saved_after, comm):
    straight = begin(spec, comm)
    steps(*straight, comm, *range(6))
    before = begin(spec, comm)
    steps(*before, comm, *range(saved_after))
    file = io.BytesIO()
    parts = [*before, before[1].reducer]
    torch.save([part.state_dict() for part in parts], file)
    after = begin(spec, comm)
    file.seek(0)
    for part, state in zip([*after, after[1].reducer], torch.load(file)):
        part.load_state_dict(state)
    steps(*after, comm, *range(saved_after, 6))
    assert digest(after[0].parameters()) == digest(straight[0].parameters())
    assert named(after[1].reducer) == named(straight[1].reducer)


def test_a_state_from_before_buckets_were_made_anew(comm):
    """It has no order: buckets go back to the order of registration."""
    model, optimizer = begin("onebit", comm)
    first, cut = optimizer.reducer.state_dict(), named(optimizer.reducer)
    steps(model, optimizer, comm, 0, 1)
    assert named(optimizer.reducer) != cut
    optimizer.reducer.load_state_dict(first)
    assert named(optimizer.reducer) == cut and optimizer.reducer.step == 0


def test_work_to_agree_on_an_order_grows_as_parameters_do(comm):
    hashed = []

    class Number(int):
        def __hash__(self):
            hashed.append(self)
            return int(self)

    reducer = mpicomp.Reducer(parameters(**{f"p{i}": 2 for i in range(80)}), "dense", comm,
                              bucket_bytes=8)
    reducer.averager.buckets.order._seen = list(map(Number, range(40)))
    reducer.averager.buckets.agree(False)
    assert reducer.averager.buckets.order.next == [*range(40), *range(79, 39, -1)]
    assert len(hashed) <= 2 * 80


def test_a_wrong_order_is_refused(comm):
    model, optimizer = begin("onebit", comm)
    steps(model, optimizer, comm, 0, 1)
    state = optimizer.reducer.state_dict()
    state["order"] = state["order"][1:]
    with pytest.raises(mpicomp.MismatchError, match="'order'"):
        optimizer.reducer.load_state_dict(state)


@pytest.mark.parametrize("spec", ["dense:feedback=yes", "onebit", "strom:tau=0.02,exchange=sharded",
                                  "dryden:exchange=sharded,own=raw"])
def test_applied_and_owed_is_given_across_the_change(spec, comm):
    """average=False: what was applied and what is owed make up all that was given."""
    model = Backwards()
    reducer = mpicomp.Reducer(model.named_parameters(), spec, comm, average=False,
                              bucket_bytes=1300)
    given, applied = 0.0, 0.0

    def flat(get):
        return np.concatenate([get(n, p).double().numpy().reshape(-1)
                               for n, p in model.named_parameters()])

    for step in range(4):
        model.zero_grad()
        x, y = examples(comm, step)
        loss = torch.nn.functional.cross_entropy(model(x), y)
        given = given + flat(lambda _, p, loss=loss: torch.autograd.grad(
            loss, p, retain_graph=True, allow_unused=True)[0] if p.shape != () and
            torch.autograd.grad(loss, p, retain_graph=True, allow_unused=True)[0] is not None
            else torch.zeros_like(p))
        loss.backward()
        reducer.finish()
        applied = applied + flat(lambda _, p: torch.zeros_like(p) if p.grad is None else p.grad)
    state = reducer.state_dict()
    owed = flat(lambda name, _: sum(v for key, v in state.items() if key.endswith(f"/{name}")))
    total = sum(comm.allgather(given))
    np.testing.assert_allclose(applied + sum(comm.allgather(owed)), total, atol=1e-5)


@pytest.mark.parametrize("spec", ["onebit", "dense"])
def test_training_in_small_buckets_goes_on_well(spec, comm):
    model, losses = train(spec, comm, steps=20, model=Backwards(), bucket_bytes=1300)
    replicas_are_identical(comm, model)
    first, last = (sum(comm.allgather(sum(part))) for part in (losses[:4], losses[-4:]))
    assert last < first


@pytest.mark.parametrize("spec", ["terngrad", "onebit"])
def test_a_state_of_the_first_step_begins_anew_in_the_same_process(spec, comm):
    """Its first step has buckets as registered, and notes the order again: the same packets."""
    model, optimizer = begin(spec, comm)
    parameters, state = [p.detach().clone() for p in model.parameters()], None
    ends = []
    for _ in range(2):
        if state is not None:
            optimizer.reducer.load_state_dict(state)
            optimizer.state.clear()
            with torch.no_grad():
                for p, value in zip(model.parameters(), parameters):
                    p.copy_(value)
        state = optimizer.reducer.state_dict()
        steps(model, optimizer, comm, 0, 1, 2)
        ends.append(digest(model.parameters()))
    assert ends[0] == ends[1]
    assert named(optimizer.reducer)[0][0].startswith("last")


@pytest.mark.mpi(min_size=2)
def test_what_adagrad_has_summed_in_the_first_step_survives(comm):
    """Buckets are made anew before the optimizer has stepped: owners change at once."""
    model, optimizer = begin("onebit:exchange=sharded,adagrad=yes", comm)
    before = named(optimizer.reducer)
    steps(model, optimizer, comm, 0)
    assert named(optimizer.reducer) != before
    state = optimizer.reducer.state_dict()
    for kind in "adagrad", "error":
        mine = sum(value.abs().sum() for key, value in state.items()
                   if key.startswith(f"{kind}/") and "idle" not in key)
        assert comm.allreduce(float(mine)) > 0
