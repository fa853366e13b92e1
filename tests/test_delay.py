"""delay=1: what is exchanged in a step is applied in the next; nothing is lost; replicas agree."""

import io

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
    same_error,
    whole_numbers,
)

import mpicomp
from mpicomp import MismatchError, NonFiniteError, SpecError, method

pytestmark = pytest.mark.mpi
SPECS = ["dense", "dense:exchange=allgather", "terngrad", "onebit", "onebit:exchange=sharded",
         "onebit:exchange=sharded,own=raw,adagrad=yes", "strom:tau=0.02", "dryden", "dropping",
         "dorefa:exchange=allreduce", "adacomp:exchange=hierarchical", "onebit:warmup=2",
         "strom:density=0.1,exchange=sharded"]


def delayed(spec):
    return spec + ("," if ":" in spec else ":") + "delay=1"


def gradients_of(spec, named, comm, steps, **keywords):
    """p.grad after each finish, None or an array a parameter, and the Reducer."""
    reducer = mpicomp.Reducer(named, spec, comm, bucket_bytes=256, **keywords)
    found = []
    for step in range(steps):
        give(named, [0.25 * whole_numbers(comm.rank, step + k, p.numel())
                     for k, (_, p) in enumerate(named)])
        reducer.finish()
        found.append([None if p.grad is None else p.grad.numpy().copy() for _, p in named])
        for _, p in named:
            p.grad = None
    return found, reducer


@pytest.mark.parametrize("spec", SPECS)
def test_every_gradient_is_that_of_the_step_before(spec, comm):
    """To the bit what the same method gives without delay, whose packets are the same."""
    at_once, plain = gradients_of(spec, parameters(w=(40, 5), b=40, s=()), comm, 5)
    named = parameters(w=(40, 5), b=40, s=())
    late, reducer = gradients_of(delayed(spec), named, comm, 5)
    assert late[0] == [None] * 3
    for before, now in zip(at_once, late[1:]):
        assert all((a == b).all() for a, b in zip(before, now))
    reducer.deliver()  # no optimizer is attached: it is left in p.grad
    assert all((a == p.grad.numpy()).all() for a, (_, p) in zip(at_once[-1], named))
    assert reducer.stats.sent == plain.stats.sent and reducer.stats.calls == plain.stats.calls
    owed, expected = reducer.state_dict(), plain.state_dict()
    assert owed.keys() == expected.keys() and owed.pop("step") == expected.pop("step") == 5
    assert all(torch.equal(owed[key], expected[key]) for key in owed)


@pytest.mark.parametrize("spec", ["onebit", "onebit:exchange=sharded", "strom:tau=0.5", "dropping"])
def test_said_and_owed_and_under_way_is_given(spec, comm):
    named = parameters(w=(40, 5), b=40)
    found, reducer = gradients_of(delayed(spec), named, comm, 20, average=False)
    reducer.deliver()
    state = reducer.state_dict()
    for k, (name, p) in enumerate(named):
        applied = sum((step[k] for step in found[1:]), p.grad.double().numpy())
        owed = sum(v.double().numpy() for kind, v in state.items() if kind.endswith(f"/{name}"))
        given = sum(0.25 * whole_numbers(rank, step + k, p.numel()).astype(float)
                    for step in range(20) for rank in range(comm.size)).reshape(p.shape)
        np.testing.assert_allclose(applied + sum(comm.allgather(owed)), given, atol=1e-3)


class Run:
    """A training with delay."""

    def __init__(self, comm, spec="onebit:exchange=sharded,delay=1", **keywords):
        self.model, self.comm = network(), comm
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.5)
        self.reducer = mpicomp.Reducer(self.model.named_parameters(), spec, comm, seed=7,
                                       bucket_bytes=2000, **keywords).attach(self.optimizer)
        self.losses = []

    def steps(self, *numbers):
        for step in numbers:
            self.optimizer.zero_grad()
            x, y = examples(self.comm, step)
            loss = torch.nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())

    @property
    def parts(self):
        return self.model, self.optimizer, self.reducer


@pytest.mark.parametrize("spec", ["onebit:delay=1", "onebit:exchange=sharded,delay=1",
                                  "terngrad:delay=1", "dense:delay=1"])
def test_training_goes_on_and_replicas_are_identical(spec, comm):
    run = Run(comm, spec)
    start = digest(run.model.parameters())
    run.steps(0)
    assert digest(run.model.parameters()) == start, "nothing is applied in the first step"
    run.steps(*range(1, 40))
    replicas_are_identical(comm, run.model)
    before = digest(run.model.parameters())
    run.reducer.deliver()
    assert digest(run.model.parameters()) != before
    replicas_are_identical(comm, run.model)
    after = digest(run.model.parameters())
    run.reducer.deliver()  # again: nothing is under way
    assert digest(run.model.parameters()) == after
    first, last = (sum(comm.allgather(sum(part))) for part in (run.losses[:4], run.losses[-4:]))
    assert last < 0.7 * first


def test_a_checkpoint_asks_for_delivery_and_then_goes_on_to_the_bit(comm):
    straight, before = Run(comm), Run(comm)
    for run in (straight, before):
        run.steps(0, 1, 2)
        with pytest.raises(MismatchError, match=r"state_dict\(\) while .* step 2 .*deliver"):
            run.reducer.state_dict()
        with pytest.raises(MismatchError, match="deliver"):
            run.reducer.flush()
        run.reducer.deliver()
    file = io.BytesIO()
    torch.save([part.state_dict() for part in before.parts], file)
    straight.steps(3, 4, 5)
    after = Run(comm)
    file.seek(0)
    for part, state in zip(after.parts, torch.load(file)):
        part.load_state_dict(state)
    after.steps(3, 4, 5)
    assert digest(after.model.parameters()) == digest(straight.model.parameters())
    for run in (straight, after):
        run.reducer.deliver()
        run.reducer.flush()
        run.optimizer.step()
    assert digest(after.model.parameters()) == digest(straight.model.parameters())


def test_a_gradient_that_is_not_finite_is_noticed_when_it_would_be_applied(comm):
    """On all ranks, in the next finish(), with the step and the place named; or skipped there."""
    last = comm.size - 1

    def bad_step(reducer, named, bad):
        gradient = np.ones(40)
        gradient[3] = np.nan if bad and comm.rank == last else 1
        give(named, [gradient])
        reducer.finish()

    named = parameters(w=40)
    reducer = mpicomp.Reducer(named, "onebit:delay=1", comm)
    bad_step(reducer, named, False)
    named[0][1].grad = None
    bad_step(reducer, named, True)
    named[0][1].grad = None
    text = same_error(comm, NonFiniteError, lambda: bad_step(reducer, named, False))
    assert "step 1:" in text and f"rank {last}: w" in text

    named = parameters(w=40)
    reducer = mpicomp.Reducer(named, "onebit:delay=1", comm, average=False, nonfinite="skip")
    found = []
    for bad in (False, True, False, False):
        bad_step(reducer, named, bad)
        found.append(None if named[0][1].grad is None else named[0][1].grad[0].item())
        named[0][1].grad = None
    assert found == [None, comm.size, None, comm.size] and reducer.stats.skipped == 1


def test_accumulated_gradients_and_unused_parameters(comm):
    """no_sync() before, and a bucket that no rank has a gradient for: its p.grad is None."""
    named = parameters(a=100, b=100)
    reducer = mpicomp.Reducer(named, "dense:delay=1", comm, average=False, bucket_bytes=400)
    for step in range(2):
        for _ in range(2):
            with reducer.no_sync():
                named[0][1].sum().backward()
        named[0][1].sum().backward()
        reducer.finish()
        assert named[1][1].grad is None
        if step:
            assert named[0][1].grad.tolist() == [3.0 * comm.size] * 100
        named[0][1].grad = None


def test_delay_is_one_step_or_none_and_synchronous():
    assert method("onebit:delay=1").delay == 1 and method("rule(onebit):delay=1").delay == 1
    assert "delay" not in repr(method("onebit"))
    assert method(repr(method("strom:delay=1,warmup=3"))) == method("strom:delay=1,warmup=3")
    with pytest.raises(SpecError, match="delay=2"):
        method("onebit:delay=2")
    with pytest.raises(SpecError, match="behind the bracket"):
        method("rule(a:onebit:delay=1; dense)")
