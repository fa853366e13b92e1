"""What users do to gradients between backward() and step(), and to parameters between two steps.

Whatever the loop does, dense on P ranks is one process on all examples; what is given up leaves
no trace; and what cannot be right is the same error on every rank.
"""

import numpy as np
import pytest
import torch
from training import (
    digest,
    examples,
    give,
    network,
    outcome,
    parameters,
    replicas_are_identical,
    same_error,
)

import mpicomp
from mpicomp import MismatchError, SpecError

pytestmark = pytest.mark.mpi
METHODS = ["dense", "onebit", "strom:tau=0.01", "terngrad", "onebit:exchange=sharded",
           "strom:tau=0.01,exchange=hierarchical"]
CLIP = 0.05


def loop(comm, spec, change=lambda model, optimizer: None, steps=6, between=None, **keywords):
    """(model, optimizer) after steps of momentum SGD, with change(...) before each step()."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    keywords = {"bucket_bytes": 1000, "seed": 3, "stall_timeout": 30, **keywords}
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), spec, comm, **keywords)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=step % 3 > 0)
        x, y = examples(comm, step)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        change(model, optimizer)
        optimizer.step()
        if between:
            between(model, step)
    return model, optimizer


def one_process(comm, change=lambda model, optimizer: None, steps=6, between=None):
    """The same with the examples of all ranks and torch alone."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        parts = [examples(type("r", (), {"rank": r}), step) for r in range(comm.size)]
        x, y = (torch.cat(part) for part in zip(*parts))
        torch.nn.functional.cross_entropy(model(x), y).backward()
        change(model, optimizer)
        optimizer.step()
        if between:
            between(model, step)
    return model


def clip(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)


def clip_data(model, optimizer):
    """As written before torch had clip_grad_norm_."""
    norm = sum(p.grad.data.norm() ** 2 for p in model.parameters()) ** 0.5
    for p in model.parameters():
        p.grad.data.mul_(CLIP / (norm + 1e-6))


def scale(model, optimizer):
    for p in model.parameters():
        p.grad *= 0.5


def replace(model, optimizer):
    for p in model.parameters():
        p.grad = 0.5 * p.grad


def decay(model, optimizer):
    with torch.no_grad():
        torch._foreach_add_([p.grad for p in model.parameters()], list(model.parameters()),
                            alpha=0.1)


def values(model, optimizer):
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.003)


def move(model, optimizer):
    """The gradients move to other memory and back (Module._apply)."""
    model.double().float()


CHANGES = [clip, clip_data, scale, replace, decay, values, move]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_before_the_step_is_a_change_of_the_mean(change, comm):
    """Seen to fail before: clipping had an effect in the first step only."""
    expected = one_process(comm, change)
    model, _ = loop(comm, "dense", change)
    for p, q in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    replicas_are_identical(comm, model)


@pytest.mark.parametrize("spec", METHODS)
@pytest.mark.parametrize("change", [clip, replace])
def test_a_change_is_the_same_as_after_finish(change, spec, comm):
    def after_finish(model, optimizer):
        optimizer.reducer.finish()
        change(model, optimizer)

    a, optimizer = loop(comm, spec, change)
    b, other = loop(comm, spec, after_finish)
    assert digest(a.parameters()) == digest(b.parameters())
    replicas_are_identical(comm, a)
    states = [digest(v for k, v in sorted(o.reducer.state_dict().items()) if "/" in k)
              for o in (optimizer, other)]
    assert states[0] == states[1]


@pytest.mark.parametrize("spec", METHODS)
def test_clip_grad_norm_in_one_line(spec, comm):
    a, _ = loop(comm, spec, clip)
    b, _ = loop(comm, spec, lambda model, optimizer: mpicomp.clip_grad_norm_(optimizer, CLIP))
    assert digest(a.parameters()) == digest(b.parameters())


def test_clip_grad_norm_says_what_to_pass():
    with pytest.raises(SpecError, match="no Reducer is attached to this SGD"):
        mpicomp.clip_grad_norm_(torch.optim.SGD(network().parameters()), 1.0)


@pytest.mark.parametrize("delay", ["", "onebit:delay=1", "onebit:exchange=peers,staleness=0"])
def test_reading_a_gradient_is_reading_what_step_will_use(delay, comm):
    def read(model, optimizer):
        first = next(model.parameters())
        seen = first.grad.clone()
        optimizer.reducer.finish()
        if first.grad is None:  # nothing has landed yet
            assert delay == "onebit:delay=1" and not seen.any()
        else:
            assert torch.equal(seen, first.grad)

    _, optimizer = loop(comm, delay or "dense", read)
    optimizer.reducer.deliver()


def test_a_server_leaves_no_gradient_to_change(comm):
    with pytest.raises(SpecError, match="no meaning with exchange=server.*no_sync"):
        loop(comm, "onebit:exchange=server", clip, steps=1)
    comm.Barrier()


# ---- p.grad itself is set ----


@pytest.mark.parametrize("spec", ["dense", "onebit", "onebit:exchange=sharded"])
@pytest.mark.parametrize("what", ["None", "another tensor"])
def test_a_gradient_that_is_taken_from_under_the_exchange(what, spec, comm):
    def take(model, optimizer):
        if comm.rank == comm.size - 1:
            p = list(model.parameters())[1]
            p.grad = None if what == "None" else torch.ones_like(p)

    text = same_error(comm, SpecError, lambda: loop(comm, spec, take))
    assert f"rank {comm.size - 1}: p.grad of '1.bias' was" in text and "reducer.finish()" in text


@pytest.mark.parametrize("spec", METHODS)
@pytest.mark.parametrize("who", ["all", "one"])
def test_a_step_that_is_given_up_by_zero_grad_leaves_no_trace(who, spec, comm):
    """Spikes in a loss: zero_grad() and step(), or zero_grad() and on to the next examples."""
    def run(steps, give_up):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), spec, comm,
                                     bucket_bytes=1000, seed=3, stall_timeout=600)
        for step in steps:
            x, y = examples(comm, step)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            if step in give_up and (who == "all" or comm.rank == 0):
                optimizer.zero_grad()
                if give_up[step] == "continue":
                    continue
            optimizer.step()
            optimizer.zero_grad()
        optimizer.reducer.discard()  # nobody waits for a rank that has gone on
        return model, optimizer.reducer

    model, reducer = run(range(5), {1: "step", 2: "continue"})
    replicas_are_identical(comm, model)
    if "terngrad" in spec:  # its random numbers differ with the number of the step
        return
    expected, other = run([0, 3, 4], {})
    assert digest(model.parameters()) == digest(expected.parameters())
    a, b = reducer.state_dict(), other.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a if key.startswith("error"))


@pytest.mark.parametrize("spec", ["onebit", "strom:tau=0.01,exchange=sharded"])
def test_a_step_that_is_given_up_after_its_norm_was_read(spec, comm):
    """The usual guard against spikes: the exchange is over, but no residual has changed."""
    def run(spikes):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), spec, comm)
        for step in range(5):
            if step == 2 and not spikes:
                continue
            x, y = examples(comm, step)
            (torch.nn.functional.cross_entropy(model(x), y) * (1e4 if step == 2 else 1)).backward()
            mpicomp.clip_grad_norm_(optimizer, 1e9)
            if step != 2:  # decided by the norm, which is the same on all ranks
                optimizer.step()
            optimizer.zero_grad()
        return model, optimizer.reducer

    (model, reducer), (expected, other) = run(True), run(False)
    assert digest(model.parameters()) == digest(expected.parameters())
    a, b = reducer.state_dict(), other.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a if key.startswith("error"))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("spec", ["dense", "onebit", "onebit:exchange=sharded",
                                  "onebit:exchange=hierarchical"])
def test_one_rank_gives_up_what_the_others_apply(spec, comm):
    def run():
        named = parameters(a=(2, 3), b=4)
        optimizer = torch.optim.SGD([p for _, p in named], lr=1.0)
        reducer = mpicomp.Reducer(named, spec, comm).attach(optimizer)
        give(named, [np.ones((2, 3)), np.ones(4)])
        reducer.finish()
        if comm.rank == 1:
            optimizer.zero_grad()
        else:
            optimizer.step()
        for _ in range(2):
            optimizer.zero_grad()
            give(named, [np.ones((2, 3)), np.ones(4)])
            optimizer.step()

    assert "give up the same steps" in same_error(comm, MismatchError, run)


@pytest.mark.parametrize("spec", ["dense", "onebit"])
def test_a_rank_whose_forward_pass_fails_gives_the_step_up_for_all(spec, comm):
    named = parameters(a=(2, 3), b=4)
    optimizer = torch.optim.SGD([p for _, p in named], lr=1.0)
    reducer = mpicomp.Reducer(named, spec, comm, bucket_bytes=16).attach(optimizer)
    for step in range(4):
        optimizer.zero_grad()
        if step == 1 and comm.rank == 0:  # out of memory, say
            reducer.discard()
            continue
        give(named, [np.ones((2, 3)), np.ones(4)])
        optimizer.step()
    assert (reducer.step, reducer.stats.skipped) == (4, 1)
    assert named[0][1].tolist() == [[-3.0] * 3] * 2
    replicas_are_identical(comm, torch.nn.ParameterList([p for _, p in named]))


# ---- hooks of the user's own ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_hooks_of_ones_own_do_to_a_gradient_counts(when, dtype, comm):
    """Seen to fail before: after the Reducer's, the last parameter of each bucket was missed."""
    named = [(name, torch.nn.Parameter(p.detach().to(dtype)))
             for name, p in parameters(a=(2, 3), b=4, c=5)]

    def register():
        def in_place(p):
            p.grad.mul_(2)

        def data(p):
            p.grad.data.mul_(2)

        def replaced(p):
            p.grad = 2 * p.grad

        for (_, p), hook in zip(named, (in_place, data, replaced)):
            p.register_post_accumulate_grad_hook(hook)

    if when == "before":
        register()
    optimizer = torch.optim.SGD([p for _, p in named], lr=1.0)
    mpicomp.Reducer(named, "dense", comm, bucket_bytes=8).attach(optimizer)
    if when == "after":
        register()
    for step in range(3):
        optimizer.zero_grad()
        give(named, [np.full(p.shape, comm.rank + 1.0) for _, p in named])
        optimizer.step()
    mean = sum(range(1, comm.size + 1)) / comm.size
    for name, p in named:
        torch.testing.assert_close(p.detach().float(), torch.full(p.shape, -6 * mean), rtol=1e-2,
                                   atol=0, msg=name)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_that_takes_the_gradient_away(when, comm):
    named = parameters(a=(2, 3), b=4)
    hook = [lambda: named[0][1].register_post_accumulate_grad_hook(
        lambda p: setattr(p, "grad", None))]
    if when == "before":
        hook[0]()
    reducer = mpicomp.Reducer(named, "dense", comm, bucket_bytes=8)
    if when == "after" and comm.rank == 0:
        hook[0]()
    give(named, [np.ones((2, 3)), np.ones(4)])
    text = same_error(comm, SpecError, reducer.finish)
    assert "rank 0: p.grad of 'a' was set to None in backward()" in text


# ---- where p.grad lies, and what parameters become ----


def cast(model, step):
    model.double().float()


def share(model, step):
    model.share_memory()


def last(model, step):
    model.to(memory_format=torch.channels_last)


def data(model, step):
    for p in model.parameters():
        p.grad.data = p.grad.data.clone()


@pytest.mark.parametrize("between", [cast, share, last, data])
def test_gradients_that_move_between_two_steps(between, comm):
    """Seen to fail before: p.grad had left its bucket, and was never the mean again."""
    expected = one_process(comm, between=between)
    model, optimizer = loop(comm, "dense", between=between)
    for p, q in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    replicas_are_identical(comm, model)


def test_a_model_that_becomes_half_is_named(comm):
    def half(model, step):
        if step == 2:
            model.half().to(torch.half)

    def run():
        model, _ = loop(comm, "onebit", between=lambda m, s: m.half() if s == 2 else None, steps=3)
        for p in model.parameters():
            p.grad = None
        return model

    named = [(n, torch.nn.Parameter(p.detach())) for n, p in parameters(w=(3, 2))]
    reducer = mpicomp.Reducer(named, "onebit", comm)
    named[0][1].data = named[0][1].data.half()
    named[0][1].grad = torch.ones_like(named[0][1])
    text = same_error(comm, SpecError, reducer.finish)
    assert "'w' was torch.float32" in text and "is torch.float16" in text
    run()


def test_a_new_head_with_the_same_number_of_parameters(comm):
    """Seen to fail before: parameters were counted, and the head's gradient stayed a rank's own."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), "dense", comm)

    def step(k):
        optimizer.zero_grad()
        x, y = examples(comm, k)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step(0)
    model[-1] = torch.nn.Linear(40, 3)
    optimizer.param_groups[0]["params"][-2:] = list(model[-1].parameters())
    assert "does not know" in same_error(comm, SpecError, lambda: step(1))


# ---- frozen in mid-training ----


@pytest.mark.parametrize("spec", [*METHODS, "dense:exchange=sharded", "onebit:delay=1",
                                  "onebit:exchange=peers,staleness=0"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_what_is_frozen_stands_still_and_what_it_is_owed_waits(optimizer, spec, comm):
    """Seen to fail before: with Adam it moved by 0.028, with momentum by 0.12."""
    model = network()
    keywords = {} if optimizer is torch.optim.Adam else {"momentum": 0.9}
    optimizer = optimizer(model.parameters(), lr=0.01, **keywords)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), spec, comm, average=False)
    reducer, layer = optimizer.reducer, model[4]

    def steps(some):
        for step in some:
            optimizer.zero_grad(set_to_none=step % 2 > 0)
            x, y = examples(comm, step)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    def owed():
        reducer.deliver()
        state = reducer.state_dict()
        mine = sum(v.double() for k, v in state.items()
                   if k.startswith("error") and k.endswith("4.weight"))
        return comm.allreduce(mine if isinstance(mine, torch.Tensor) else torch.zeros(()))

    steps(range(3))
    before = owed()
    layer.requires_grad_(False)
    frozen = digest(layer.parameters())
    rest = digest(model[1].parameters())
    steps(range(3, 7))
    assert digest(layer.parameters()) == frozen and digest(model[1].parameters()) != rest
    torch.testing.assert_close(owed(), before, rtol=0, atol=1e-5)
    layer.requires_grad_()
    steps(range(7, 9))
    reducer.deliver()
    assert digest(layer.parameters()) != frozen
    replicas_are_identical(comm, model)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("spec", ["dense", "onebit", "onebit:exchange=sharded",
                                  "onebit:exchange=hierarchical"])
def test_frozen_on_one_rank_only(spec, comm):
    def freeze(model, step):
        if comm.rank == 1 and step == 2:
            model[4].requires_grad_(False)

    text = same_error(comm, MismatchError, lambda: loop(comm, spec, between=freeze))
    assert "freeze the same parameters" in text


@pytest.mark.parametrize("spec", ["onebit:exchange=server", "onebit:exchange=sharded,adagrad=yes"])
def test_where_nothing_can_be_frozen(spec, comm):
    def freeze(model, step):
        model[4].requires_grad_(False)

    assert all("after freezing a layer close() the Reducer" in str(error)
               for error in outcome(comm, lambda: loop(comm, spec, between=freeze)))
