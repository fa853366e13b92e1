"""mpicomp.LocalUpdates: steps alone, then the mean of how far ranks have come."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from mpi4py import MPI
from training import digest, examples, network, parameters, same_error

import mpicomp
from mpicomp import checkpoint
from mpicomp.errors import MismatchError, NonFiniteError, SpecError, StallError
from mpicomp.local.fragment import divided, layer
from mpicomp.reducer.replicas import fingerprint, leaves

pytestmark = pytest.mark.mpi


def made(comm, spec="dense", inner=None, model=None, **options):
    """(a small model, LocalUpdates of it)."""
    model = model or network()
    inner = (inner or (lambda p: torch.optim.AdamW(p, lr=0.01)))(model.parameters())
    return model, mpicomp.LocalUpdates(model, inner, options.pop("every", 4), spec,
                                       options.pop("outer", "average"), comm, **options)


def step(model, local, comm, number):
    x, y = examples(comm, number)
    local.inner.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    local.step()


def steps(model, local, comm, count):
    """Steps from where `local` is; a digest of parameters after each."""
    found = []
    for number in range(local.steps, local.steps + count):
        step(model, local, comm, number)
        found.append(digest(model.parameters()))
    return found


def equal(comm, value):
    return len(set(comm.allgather(value))) == 1


def moved(local, named, values):
    """One round of one step in which each parameter becomes these values."""
    with torch.no_grad():
        for (_, p), value in zip(named, values, strict=True):
            p.copy_(torch.as_tensor(value))
    local.step()


def still(named):
    """An inner optimizer that moves nothing: tests move parameters themselves."""
    return torch.optim.SGD([p for _, p in named], lr=0.0)


# ---- the worked numbers


@pytest.mark.parametrize("outer, expected", [
    ("nesterov", [1.33, 1.897, 2.4073, 2.86657]),
    ("nesterov:lr=0.7,momentum=0.9", [1.33, 1.897, 2.4073, 2.86657]),
    ("heavy-ball", [0.7, 1.33, 1.897, 2.4073]),
    ("average", [1.0] * 4), ("average:lr=0.65", [0.65] * 4)])
def test_outer_steps_for_a_constant_difference_of_1(outer, expected, comm):
    """modern.md 3.2: "Nesterov" is torch's, whose first step is already beyond the average."""
    named = parameters(w=3)
    local = mpicomp.LocalUpdates(named, still(named), 1, "dense", outer, comm)
    for wanted in expected:
        before = named[0][1].detach().clone()
        moved(local, named, [before - 1])
        assert torch.allclose(before - named[0][1], torch.full((3,), wanted), atol=1e-5)


def test_one_local_step_and_the_average_are_data_parallel_sgd(comm):
    model, local = made(comm, inner=lambda p: torch.optim.SGD(p, lr=0.1), every=1)
    other = network()
    optimizer = mpicomp.DistributedOptimizer(torch.optim.SGD(other.parameters(), lr=0.1),
                                             other.named_parameters(), "dense", comm)
    for number in range(8):
        step(model, local, comm, number)
        x, y = examples(comm, number)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(other(x), y).backward()
        optimizer.step()
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.allclose(p, q, atol=1e-6)


@pytest.mark.parametrize("exchange", ["allreduce", "sharded"])
def test_the_average_is_the_mean_of_parameters_to_the_bit(exchange, comm):
    """On values for which float32 does not round: whole numbers that P divides."""
    named = parameters(w=(4, 5), b=3)
    local = mpicomp.LocalUpdates(named, still(named), 1, f"dense:exchange={exchange}",
                                 "average", comm)
    draw = np.random.default_rng(1)
    for _ in range(3):
        everyone = [[draw.integers(-50, 50, p.shape).astype(np.float32) * comm.size
                     for _, p in named] for _ in range(comm.size)]
        moved(local, named, everyone[comm.rank])
        for (_, p), column in zip(named, zip(*everyone, strict=True), strict=True):
            assert np.array_equal(p.detach().numpy(), sum(column) / comm.size)


# ---- rounds


@pytest.mark.parametrize("spec", ["dense", "onebit", "dropping:rate=0.9", "onebit:exchange=sharded",
                                  "terngrad"])
def test_replicas_are_equal_after_each_round_and_not_before(spec, comm):
    model, local = made(comm, spec, outer="nesterov")
    for number, found in enumerate(steps(model, local, comm, 12), 1):
        assert equal(comm, found) == (number % 4 == 0 or comm.size == 1)
    assert (local.steps, local.rounds) == (12, 3)
    assert local.averagers[0].step == 3


def test_rounds_may_grow(comm):
    """Post-local SGD: every step at first, later every few."""
    model, local = made(comm, every=lambda number: 1 if number < 3 else 4)
    ended = []
    for number in range(11):
        assert local.exchanges_next == (number in (0, 1, 2, 6, 10))
        step(model, local, comm, number)
        ended.append(local.rounds)
    assert ended == [1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5]
    assert equal(comm, digest(model.parameters()))


@pytest.mark.parametrize("spec", ["onebit", "strom:tau=0.05", "dropping:rate=0.9",
                                  "onebit:exchange=sharded"])
@pytest.mark.parametrize("weighted", [False, True])
def test_applied_and_owed_is_how_far_ranks_have_come(spec, weighted, comm):
    named = parameters(w=(9, 7), b=5)
    share = {"now": 1.0}
    local = mpicomp.LocalUpdates(named, still(named), 1, spec, "average", comm,
                                 weight=(lambda: share["now"]) if weighted else None)
    given = {name: np.zeros(p.shape) for name, p in named}
    for number in range(6):
        weights = [(rank + number) % 3 + 0.5 if weighted else 1.0 for rank in range(comm.size)]
        share["now"] = weights[comm.rank]
        draws = [np.random.default_rng([rank, number]) for rank in range(comm.size)]
        far = [[draw.standard_normal(p.shape).astype(np.float32) for _, p in named]
               for draw in draws]
        for (name, _), column in zip(named, zip(*far, strict=True), strict=True):
            given[name] += sum(w * d.astype(np.float64) for w, d in zip(weights, column)
                               ) / sum(weights)
        moved(local, named, [p.detach() - torch.from_numpy(d)
                             for (_, p), d in zip(named, far[comm.rank])])
    state = local.state_dict()
    for name, p in named:
        owed = sum(value.numpy().astype(np.float64) for key, value in state.items()
                   if key.startswith("error") and key.endswith(f"/{name}"))
        owed = sum(comm.allgather(owed)) / comm.size
        assert np.allclose(owed - p.detach().numpy(), given[name], atol=1e-4)


def walk(local, named, count):
    """Steps of SGD that move each parameter by -lr * (rank + 1)."""
    for _ in range(count):
        for _, p in named:
            p.grad = torch.full_like(p, local.comm.rank + 1.0)
        local.step()


def walking(comm, spec="dense", outer="average", inner=None, names=("0.w", "1.w"), **options):
    """(parameters of zeros, LocalUpdates of them): see `walk`."""
    named = parameters(**dict.fromkeys(names, 2))
    inner = (inner or (lambda p: torch.optim.SGD(p, lr=1.0)))([p for _, p in named])
    return named, mpicomp.LocalUpdates(named, inner, options.pop("every", 4), spec, outer, comm,
                                       **options)


def pace(comm):
    """By how much the mean of all ranks' parameters falls in a step of `walk`."""
    return (comm.size + 1) / 2


def values(named):
    """The first element of each parameter."""
    return [float(p.detach()[0]) for _, p in named]


def test_where_all_weights_are_0_it_is_counted(comm):
    named, local = walking(comm, every=2, weight=lambda: float(local.steps > 2))
    walk(local, named, 2)
    assert values(named) == [0, 0] and (local.stats.skipped, local.stats.steps) == (1, 0)
    walk(local, named, 2)
    assert np.allclose(values(named), -2 * pace(comm)) and local.stats.skipped == 1


def test_a_rank_may_have_more_examples(comm):
    named = parameters(w=2)
    local = mpicomp.LocalUpdates(named, still(named), 1, "dense", "average", comm,
                                 weight=2.0 * comm.rank + 1)
    moved(local, named, [torch.full((2,), float(comm.rank))])
    weights = [2.0 * rank + 1 for rank in range(comm.size)]
    mean = sum(rank * w for rank, w in enumerate(weights)) / sum(weights)
    assert torch.allclose(named[0][1], torch.tensor(mean))
    local.weight = 0.0  # nobody gives anything
    moved(local, named, [torch.full((2,), 7.0)])
    assert torch.allclose(named[0][1], torch.tensor(mean))
    local.weight = -1.0 if comm.rank == comm.size - 1 else 1.0
    text = same_error(comm, SpecError, lambda: moved(local, named, [torch.full((2,), 5.0)]))
    assert f"rank {comm.size - 1}: weight=-1.0 found" in text
    local.weight = 1.0
    local.step()  # goes on with the exchange
    assert torch.allclose(named[0][1], torch.tensor(5.0)) and local.steps == 3


def test_every_round_may_begin_with_a_fresh_inner_state(comm):
    for keep, kept in ((True, 9.0), (False, 1.0)):
        model, local = made(comm, every=4, keep_inner=keep)
        steps(model, local, comm, 9)
        assert all(state["step"] == kept for state in local.inner.state.values())
    model, local = made(comm, every=2, keep_inner=False,
                        inner=lambda p: torch.optim.Adagrad(p, lr=0.1))
    steps(model, local, comm, 4)  # its state is there from the start, and is zero again
    assert all(not state["sum"].any() for state in local.inner.state.values())


def test_at_the_end_a_round_may_be_shorter(comm):
    model, local = made(comm, "onebit", outer="nesterov", fragments=2, lag=1)
    steps(model, local, comm, 7)
    local.sync()
    after = digest(model.parameters())
    assert equal(comm, after) and local.rounds == 2
    local.sync()  # nothing is left to be exchanged, and no momentum moves anything
    assert digest(model.parameters()) == after and local.rounds == 2
    steps(model, local, comm, 4)
    local.sync()
    assert local.rounds == 3 and equal(comm, digest(model.parameters()))


def test_the_last_round_has_all_that_was_not_dropped(comm):
    """With mix=0 the steps between sending and applying are dropped; sync() drops none."""
    named, local = walking(comm, fragments=2, lag=1)
    walk(local, named, 7)  # dropped: steps 3 and 7 of the first fragment, 5 of the second
    local.sync()
    assert np.allclose(values(named), [-5 * pace(comm), -6 * pace(comm)])


@pytest.mark.parametrize("saved", ["not", "before", "and loaded"])
@pytest.mark.parametrize("outer, expected", [
    ("average", 6.0), ("nesterov", 0.7 * (4 + 0.9 * 4) + 0.7 * (2 + 0.9 * (0.9 * 4 + 2)))])
def test_sync_loses_nothing_that_moved_since_it_was_sent(outer, expected, saved, comm):
    """Two differences, of 4 steps and of 2."""
    named, local = walking(comm, outer=outer, lag=3)
    walk(local, named, 6)
    if saved != "not":
        state = local.state_dict()  # waits for what is under way
    if saved == "and loaded":
        named, local = walking(comm, outer=outer, lag=3)
        local.load_state_dict(state)
    local.sync()
    assert np.allclose(values(named), -expected * pace(comm))


def test_sync_exchanges_no_zeros(comm):
    """Right after parameters have become the anchor a momentum must not move it once more."""
    named, local = walking(comm, outer="nesterov", lag=3)
    walk(local, named, 7)
    local.sync()
    assert np.allclose(values(named), -5.32 * pace(comm)) and local.averagers[0].step == 1


@pytest.mark.parametrize("count, lag", [(4, 0), (3, 0), (6, 2)])
def test_after_an_error_in_an_exchange_sync_has_the_round(count, lag, comm, monkeypatch):
    named, local = walking(comm, lag=lag)
    averager = local.averagers[0]
    finish, failed = averager.finish, []

    def once():
        if failed:
            return finish()
        failed.append(finish())  # the packets have gone, so that the next exchange is another
        for difference in local.fragments[0].differences.values():
            difference.zero_()
        raise StallError("an exchange failed")

    monkeypatch.setattr(averager, "finish", once)
    with pytest.raises(StallError):
        walk(local, named, count)
        local.sync()
    assert local.fragments[0].due is None
    if lag:
        local.step()  # makes no step of its own, and with a lag no exchange
        assert averager.step == 1
    local.sync()
    assert np.allclose(values(named), -count * pace(comm)) and local.steps == count


# ---- parameters of all kinds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_anchors_of_16_bit_parameters_are_float32(dtype, comm):
    named = [("w", torch.nn.Parameter(torch.ones(4, dtype=dtype)))]
    local = mpicomp.LocalUpdates(named, still(named), 1, "dense", "average:lr=0.01", comm)
    tiny = torch.finfo(dtype).eps
    for _ in range(50):  # each is too small to change a parameter, and together they do
        before = named[0][1].detach().clone()
        moved(local, named, [before - tiny])
    assert local.state_dict()["anchor/w"].dtype == torch.float32
    assert torch.allclose(local.state_dict()["anchor/w"], torch.tensor(1 - 0.5 * tiny), atol=tiny/9)
    local.step()  # who stands still gives zero, whatever the anchor was rounded to
    assert torch.allclose(local.state_dict()["anchor/w"], torch.tensor(1 - 0.5 * tiny), atol=tiny/9)


class Tied(torch.nn.Module):
    """One weight under two names, a frozen layer, one without gradient, and statistics."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.frozen, self.unused = torch.nn.Linear(16, 16), torch.nn.Linear(2, 2)
        self.frozen.requires_grad_(False)
        self.norm, self.last = torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.norm(self.frozen(self.second(self.first(x)))))


def test_tied_frozen_and_unused_parameters(comm):
    model = Tied()
    model, local = made(comm, "onebit", model=model, inner=lambda p: torch.optim.SGD(p, lr=0.1))
    frozen, unused = model.frozen.weight.clone(), model.unused.weight.clone()
    steps(model, local, comm, 4)
    assert model.second.weight is model.first.weight
    assert equal(comm, digest(model.parameters()))
    assert torch.equal(frozen, model.frozen.weight) and torch.equal(unused, model.unused.weight)
    assert model.norm.num_batches_tracked == 4 and (
        comm.size == 1 or not equal(comm, digest(model.buffers())))
    model.last.requires_grad_(False)  # stands still from now on, residuals and momentum or not
    last = model.last.weight.clone()
    steps(model, local, comm, 4)
    assert torch.equal(last, model.last.weight) and equal(comm, digest(model.parameters()))
    if comm.rank == 0:
        model.frozen.requires_grad_(True)
    for number in range(3):
        step(model, local, comm, number)
    text = same_error(comm, SpecError, lambda: step(model, local, comm, 3))
    assert "rank 0: the inner optimizer has a parameter" in text


def test_unfrozen_while_under_way_it_is_owed_once(comm):
    """What was frozen as differences were sent has not moved, and so all of it is owed."""
    named, local = walking(comm, "onebit", lag=2, names=("w", "late"))
    late = named[1][1]
    late.requires_grad_(False)
    late.data -= 3
    walk(local, named[:1], 5)
    late.requires_grad_(True)
    walk(local, named[:1], 1)
    state = local.state_dict()
    assert torch.equal(state["anchor/late"], torch.zeros(2))
    assert torch.allclose(state["error/late"], torch.tensor(3.0))


def test_frozen_at_different_steps_while_under_way(comm):
    """It was moving on all ranks as differences were sent, so its anchor moves on all."""
    named, local = walking(comm, lag=2)
    walk(local, named, 5)
    if comm.rank == 0:
        named[1][1].requires_grad_(False)
    state = local.state_dict()
    walk(local, named, 1)
    named[1][1].requires_grad_(False)
    walk(local, named[:1], 4)
    assert np.allclose(local.state_dict()["anchor/1.w"], -4 * pace(comm))
    named, local = walking(comm, lag=2)
    named[1][1].requires_grad_(False)  # loaded, too: what was sent counts
    local.load_state_dict(state)
    walk(local, named[:1], 1)
    assert np.allclose(local.state_dict()["anchor/1.w"], -4 * pace(comm))


# ---- what goes wrong


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("spec", ["dense", "onebit"])
def test_nan_on_one_rank_leaves_anchor_and_residuals(spec, nonfinite, comm):
    model, local = made(comm, spec, outer="nesterov", nonfinite=nonfinite)
    steps(model, local, comm, 7)
    before = local.state_dict()
    if comm.rank == comm.size - 1:
        next(model.parameters()).data[0] = torch.nan
        for state in local.inner.state.values():
            state["exp_avg"].fill_(torch.nan)
    if nonfinite == "raise":
        text = same_error(comm, NonFiniteError, lambda: step(model, local, comm, 7))
        assert f"rank {comm.size - 1}: " in text
    else:
        step(model, local, comm, 7)
        assert local.stats.skipped == 1
    after = local.state_dict()
    assert local.rounds == 2
    for key, value in before.items():
        if key.startswith(("anchor/", "error")):
            assert torch.equal(value, after[key]), key
    assert all(torch.equal(after[f"parameter/{name}"], after[f"anchor/{name}"])
               for name, _ in model.named_parameters())
    steps(model, local, comm, 4)
    assert equal(comm, digest(model.parameters())) and local.rounds == 3
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("fragments, lag", [(2, 0), (2, 1), (2, 2), (1, 2)])
def test_one_nan_costs_one_exchange(fragments, lag, comm):
    """The next forward pass reads all fragments, so all of the rank go back to their anchors."""
    model, local = made(comm, fragments=fragments, lag=lag, nonfinite="skip")
    for number in range(16):
        if number == 5 and comm.rank == comm.size - 1:
            for p in model.parameters():
                p.data.fill_(torch.nan)
        step(model, local, comm, number)
    local.sync()
    assert local.stats.skipped == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert equal(comm, digest(model.parameters()))


def test_a_closure_and_a_scaler_are_refused(comm):
    named, local = walking(comm)
    with pytest.raises(SpecError, match="a closure and a scaler"):
        local.step(lambda: 1.0, scaler=torch.amp.GradScaler("cpu"))
    assert local.steps == 0 and values(named) == [0, 0]


def test_what_cannot_be_is_refused(comm):
    for words, options in (
            ("every=0", dict(every=0)), ("every=True", dict(every=True)),
            ("multiple of fragments=3", dict(every=4, fragments=3)),
            ("at most 3, the number of layers", dict(every=10, fragments=5)),
            ("a lag of at most a round", dict(lag=5)), ("lag=-1", dict(lag=-1)),
            ("mix=1", dict(mix=1)), ("fragments=0", dict(fragments=0)),
            ("one of average, nesterov, heavy-ball", dict(outer="adam")),
            ("average has the options lr, found 'momentum'", dict(outer="average:momentum=1")),
            ("lr=x found", dict(outer="average:lr=x")), ("momentum", dict(
                outer="nesterov:momentum=0")),
            ("outer: NoneType found", dict(outer=lambda anchors: None)),
            ("outer: int found", dict(outer=3)),
            ("SGD found without some", dict(
                outer=lambda anchors: torch.optim.SGD(anchors[:1], lr=1.0))),
            ("delay=1 found", dict(spec="onebit:delay=1")),
            ("exchange=peers found", dict(spec="strom:exchange=peers")),
            ("no method", dict(spec="twobit")),
            ("nonfinite", dict(nonfinite="ignore")), ("seed=-1", dict(seed=-1, fragments=2)),
            ("round 0: every=None", dict(every=lambda _: None)),
            ("ZeroDivisionError", dict(outer=lambda _: 1 / 0))):
        text = same_error(comm, SpecError, lambda options=options: made(comm, **options))
        assert words in text, text
    model = network()
    some = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SpecError, match="does not know"):
        mpicomp.LocalUpdates(list(model.named_parameters())[:2], some, comm=comm)
    with pytest.raises(SpecError, match="inner: list found"):
        mpicomp.LocalUpdates(model, [], comm=comm)
    with pytest.raises(SpecError, match="pass model.named_parameters"):
        mpicomp.LocalUpdates(model.parameters(), some, comm=comm)
    _, local = made(comm, every=lambda number: 2 - number)
    local.step(), local.step(), local.step()
    with pytest.raises(SpecError, match="round 2: every=0"):
        local.step()
    assert local.steps == 3
    with pytest.raises(SpecError, match="cannot be copied"):
        copy.deepcopy(local)


@pytest.mark.mpi(min_size=2)
def test_ranks_that_differ(comm):
    last = comm.rank == comm.size - 1
    for words, options in (("every", dict(every=8 if last else 4)), ("lag", dict(lag=int(last))),
                           ("outer", dict(outer="nesterov:lr=0.5" if last else "nesterov")),
                           ("weight", dict(weight=1.0 if last else None)),
                           (f"rank {comm.size - 1}: mix=2", dict(mix=2 if last else 0)),
                           ("twobit" if last else "", dict(spec="twobit" if last else "dense")),
                           ("onebit", dict(spec="onebit" if last else "dense"))):
        text = same_error(comm, MismatchError, lambda options=options: made(comm, **options))
        assert words in text, text
    model = network(seed=comm.rank)
    text = same_error(comm, MismatchError, lambda: made(comm, model=model))
    assert "replicas differ in parameter" in text and "broadcast_parameters" in text
    model = torch.nn.Sequential(network(), torch.nn.BatchNorm1d(3))
    model[1].running_mean += comm.rank
    assert "statistic" in same_error(comm, MismatchError, lambda: made(comm, model=model))
    model, local = made(comm, every=lambda number: 3 if last else 4)
    for number in range(2):
        step(model, local, comm, number)

    def meet():
        for number in range(2, 3 if last else 4):
            step(model, local, comm, number)

    assert "plan digest" in same_error(comm, MismatchError, meet)
    text = same_error(comm, MismatchError, lambda: made(comm, outer=lambda anchors: torch.optim.SGD(
        [{"params": anchors, "lr": 0.5 + last}], lr=0.1)))
    assert "lr of group 0=" in text
    named, local = walking(comm, every=1)
    walk(local, named, 1)
    local.outer.param_groups[0]["lr"] = 1.0 - 0.5 * last
    same_error(comm, MismatchError, lambda: walk(local, named, 1))


# ---- fragments, lag, mix


def test_layers_are_dealt_out_in_turn():
    assert layer("blocks.3.attention.weight") == "blocks.3" and layer("0.bias") == "0"
    assert layer("fc.weight") == "fc" and layer("scale") == "scale"
    named = [(f"blocks.{i}.{kind}", (i, kind)) for i in range(5) for kind in ("w", "b")]
    parts = divided([("head.weight", None), *named], 2)
    assert [sorted({layer(name) for name in part}) for part in parts] == [
        ["blocks.1", "blocks.3", "head"], ["blocks.0", "blocks.2", "blocks.4"]]


@pytest.mark.parametrize("lag, mix", [(0, 0.0), (1, 0.0), (2, 0.5), (4, 0.25)])
def test_what_was_sent_is_applied_so_many_steps_later(lag, mix, comm):
    """Two fragments, a round of four steps; rank r moves by r + 1 in each step."""
    named = parameters(**{"0.w": 2, "1.w": 3})
    local = mpicomp.LocalUpdates(named, still(named), 4, "dense", "average", comm,
                                 fragments=2, lag=lag, mix=mix)
    rates = np.arange(1.0, comm.size + 1)
    values, anchor = np.zeros((2, comm.size)), np.zeros(2)  # of both fragments, on every rank
    due = {}  # (fragment, step): the mean difference that is applied then
    for now in range(1, 17):
        values -= rates
        for _, p in named:
            p.data -= comm.rank + 1.0
        local.step()
        sent = {2: 0, 0: 1}.get(now % 4)  # which fragment is sent after this step
        for when in ("before", "after"):
            for f in (0, 1):
                if (f, now) in due:
                    anchor[f] -= due.pop((f, now))
                    values[f] = mix * values[f] + (1 - mix) * anchor[f]
            if when == "before" and sent is not None:
                due[sent, now + lag] = (anchor[sent] - values[sent]).mean()
        for (_, p), expected in zip(named, values[:, comm.rank]):
            assert np.allclose(p.detach(), expected, atol=1e-4), now
    assert local.rounds == 4


def test_what_is_under_way_has_left_before_it_is_waited_for(comm):
    """send() begins the exchange of all buckets, so that it overlaps with the next steps."""
    model, local = made(comm, "onebit", lag=2)
    steps(model, local, comm, 4)
    averager = local.averagers[0]
    assert averager.current.next == len(averager.buckets) and not averager.current.finished
    steps(model, local, comm, 2)
    assert averager.current.finished


def test_an_averager_sends_and_finishes_apart(comm):
    for weight in (None, comm.rank + 1.0):
        x = np.full(5, comm.rank, np.float32)
        y = x.copy()
        one, two = (mpicomp.Averager({"x": x}, "dense", comm) for _ in range(2))
        one.average({"x": x}, weight)
        assert two.send({"x": y}, weight) is True
        two.poll()
        assert two.finish() is True and np.array_equal(x, y) and two.finish() is False
    assert two.send({"x": y}, 0.0) is False and two.step == 1


# ---- state


CASES = [("onebit", {}), ("dropping:rate=0.9", dict(fragments=2)), ("onebit:exchange=sharded", {}),
         ("onebit", dict(fragments=2, lag=1, mix=0.5)), ("dense", dict(lag=4)),
         ("terngrad", dict(every=lambda number: 2 + number))]


@pytest.mark.parametrize("at", [5, 7])
@pytest.mark.parametrize("spec, options", CASES)
def test_saved_and_loaded_it_goes_on_to_the_bit(spec, options, at, comm):
    options = dict(options, outer="nesterov")
    model, local = made(comm, spec, **options)
    steps(model, local, comm, at)
    state = local.state_dict()
    expected = steps(model, local, comm, 8)
    model, local = made(comm, spec, **options)
    local.load_state_dict(state)
    assert steps(model, local, comm, 8) == expected
    local.load_state_dict({key.replace("/", "/_orig_mod."): value
                           for key, value in state.items()})  # of a compiled model; once more
    assert steps(model, local, comm, 8) == expected


def test_a_checkpoint_of_every_rank(comm, tmp_path):
    folder = comm.bcast(tmp_path)
    model, local = made(comm, "onebit", fragments=2, lag=1)
    steps(model, local, comm, 6)
    checkpoint.save(folder, comm, 6, {}, {"local": local.state_dict()})
    expected = steps(model, local, comm, 6)
    model, local = made(comm, "onebit", fragments=2, lag=1)
    path, _ = checkpoint.newest(folder)
    _, mine = checkpoint.load(path, comm.rank, comm.size)
    local.load_state_dict(mine["local"])
    assert steps(model, local, comm, 6) == expected


@pytest.mark.parametrize("spec", ["onebit", "onebit:exchange=sharded"])
@pytest.mark.parametrize("former", [2, 5])
def test_on_another_number_of_ranks_nothing_that_is_owed_is_lost(spec, former, comm):
    """The states of `former` ranks, of which each rank here makes those that it needs alike."""
    model, local = made(comm, spec, fragments=2)
    steps(model, local, comm, 6)
    state = local.state_dict()
    states = []
    for rank in range(former):
        generator = torch.Generator().manual_seed(rank)
        states.append({key: torch.randn(value.shape, generator=generator)
                       if key.startswith(("error/", "parameter/")) else value
                       for key, value in comm.bcast(state).items()})
    new = checkpoint.repartition(states, comm.size, keep="mean")
    local.load_state_dict(new[comm.rank])
    now = local.state_dict()
    for key in state:
        if key.startswith("error"):
            owed = sum(value.double() for value in comm.allgather(now[key])) / comm.size
            assert torch.allclose(owed, sum(s[key].double() for s in states) / former, atol=1e-5)
        elif key.startswith("parameter/"):
            assert torch.equal(now[key], states[comm.rank % former][key])
    steps(model, local, comm, 6)
    assert local.rounds == 3 and equal(comm, digest([a for _, a in local._pairs()]))


def facts(local):
    return [(name, fingerprint(leaf)) for name, leaf in leaves(local.state_dict())]


def test_a_state_that_does_not_fit_changes_nothing(comm):
    """On no rank, also where only one rank's state does not fit."""
    model, local = made(comm, "onebit", outer="nesterov")
    steps(model, local, comm, 5)
    state, last = local.state_dict(), comm.rank == comm.size - 1
    steps(model, local, comm, 4)
    before = facts(local)
    name = next(key for key in state if key.startswith("anchor/"))
    twice = {**state["outer"], "param_groups": state["outer"]["param_groups"] * 2}
    kind = SpecError if comm.size == 1 else MismatchError
    for words, odd in (("lacks", {k: v for k, v in state.items() if k != name}),
                       ("does not know", {**state, "anchor/x": torch.zeros(1)}),
                       ("has shape", {**state, name: torch.zeros(1)}),
                       ("saved with fragments=2", {**state, "fragments": [[0, 0, 0]] * 2}),
                       ("lacks 'mean/", {**state, "fragments": [
                           {**state["fragments"][0], "under way": [4, 6, [], True, True]}]}),
                       ("saved with SGD as the inner", {**state, "optimizers": ["SGD", "SGD"]}),
                       ("the outer optimizer has groups of", {**state, "outer": twice})):
        given = odd if last else state
        text = same_error(comm, kind, lambda given=given: local.load_state_dict(given))
        assert words in text
        assert facts(local) == before, words
    if comm.size > 1:
        later = {**state, name: state[name] + 1} if last else state
        text = same_error(comm, MismatchError, lambda: local.load_state_dict(later))
        assert f"replicas differ in anchor '{name}'" in text
        assert facts(local) == before
    other, mine = made(comm, "onebit", outer="nesterov",
                       inner=lambda p: torch.optim.SGD(p, lr=0.1))
    text = same_error(comm, SpecError, lambda: mine.load_state_dict(state))
    assert "saved with AdamW as the inner optimizer, this has SGD" in text
    local.load_state_dict(state)
    assert local.steps == 5


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_nan_that_is_under_way_is_saved(nonfinite, comm):
    """Loaded, the same follows: anchors, restarted moments, and the error."""
    def adam(p):
        return torch.optim.Adam(p, lr=1.0)

    def after(local, named):
        found = []
        for _ in range(5):
            try:
                walk(local, named, 1)
            except NonFiniteError as error:
                found.append(str(error))
            found.append(digest(p for _, p in named))
        return found

    named, local = walking(comm, inner=adam, lag=2, nonfinite=nonfinite)
    walk(local, named, 3)
    if comm.rank == comm.size - 1:
        named[0][1].data.fill_(torch.nan)
    walk(local, named, 2)
    state = local.state_dict()
    expected = after(local, named)
    assert len(expected) == (6 if nonfinite == "raise" else 5)
    assert all(torch.isfinite(p).all() for _, p in named)
    named, local = walking(comm, inner=adam, lag=2, nonfinite=nonfinite)
    local.load_state_dict(state)
    assert after(local, named) == expected


def test_the_inner_state_at_the_start_is_saved(comm):
    def warm(p):
        inner = torch.optim.SGD(p, lr=1.0, momentum=0.9)
        inner.zero_grad()
        for q in p:
            q.grad = torch.ones(2)
        inner.step()
        for q in p:
            q.data.zero_()
        return inner

    def cold(p):
        return torch.optim.SGD(p, lr=1.0, momentum=0.9)

    named, local = walking(comm, inner=warm, every=2, keep_inner=False)
    walk(local, named, 1)
    state = local.state_dict()
    walk(local, named, 5)
    expected = values(named)
    named, local = walking(comm, inner=cold, every=2, keep_inner=False)
    local.load_state_dict(state)
    walk(local, named, 5)
    assert values(named) == expected


def test_what_is_under_way_loads_by_names_with_prefixes(comm):
    named, local = walking(comm, lag=2)
    walk(local, named, 5)
    state = {key.replace("/", "/_orig_mod."): value for key, value in local.state_dict().items()}
    walk(local, named, 3)
    expected = values(named)
    named, local = walking(comm, lag=2)  # fresh: nothing is under way here
    local.load_state_dict(state)
    walk(local, named, 3)
    assert values(named) == expected != [0, 0]


def test_the_anchor_may_be_looked_at(comm):
    model, local = made(comm, outer="nesterov")
    steps(model, local, comm, 4)
    agreed = digest(model.parameters())
    steps(model, local, comm, 2)
    own = digest(model.parameters())
    with local.anchored():
        assert digest(model.parameters()) == agreed != own
    assert digest(model.parameters()) == own


# ---- more than one, fewer ranks, presets


def test_two_on_two_communicators(comm):
    other = comm.Dup()
    (a, first), (b, second) = made(comm, "onebit"), made(other, "dropping:rate=0.9", every=3)
    for number in range(12):
        step(a, first, comm, number)
        step(b, second, comm, number)
    assert equal(comm, digest(a.parameters())) and equal(comm, digest(b.parameters()))
    first.close()
    second.close()
    other.Free()


@pytest.mark.parametrize("spec", ["onebit", "onebit:exchange=sharded"])
def test_regrouped_in_the_middle_of_a_round(spec, comm):
    """Survivors keep their own progress, and the round ends with them alone."""
    model, local = made(comm, spec, fragments=2, outer="nesterov")
    steps(model, local, comm, 5)
    before = local.state_dict()
    few = comm.Split(0 if comm.rank < max(1, comm.size - 1) else 1, comm.rank)
    local.regroup(few)
    after = local.state_dict()
    for key, value in before.items():
        if key.startswith(("anchor/", "parameter/", "error/")) and "sharded" not in spec:
            assert torch.equal(value, after[key]), key
    found = steps(model, local, few, 7)
    assert local.comm.size == few.size and local.rounds == 3
    local.sync()
    assert equal(few, digest(model.parameters())) and found
    _, local = made(comm, lag=1)
    assert "lag" in same_error(comm, SpecError, lambda: local.regroup(comm))


def test_with_recovery_where_nothing_dies(comm):
    """Pieces change no bit; without --with-ft, Recovery runs them as they are."""
    model, local = made(comm, "onebit")
    expected = steps(model, local, comm, 8)
    model, local = made(comm, "onebit")
    recovery = mpicomp.Recovery(local, model, comm)
    found = []
    for number in range(8):
        if local.exchanges_next:
            recovery.run(step, model, local, comm, number)
        else:
            step(model, local, comm, number)
        found.append(digest(model.parameters()))
    assert found == expected


SETTINGS = ("MPICOMP_", "OMPI_", "PMIX_", "PRTE_", "OMP_", "PMI")  # of this process's own MPI
DIES = """
import os, signal, sys, torch, mpicomp
sys.path.insert(0, sys.argv[1])
from training import digest, examples, network
spec, when, fragments = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = network()
inner = torch.optim.AdamW(model.parameters(), lr=0.01)
local = mpicomp.LocalUpdates(model, inner, 4, spec, "nesterov", fragments=fragments)
rank, recovery = local.comm.rank, mpicomp.Recovery(local, model)
def train(step):
    x, y = examples(recovery, step)
    inner.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    if rank == 1 and step == when:
        os.kill(os.getpid(), signal.SIGKILL)
    local.step()
for step in range(16):
    if local.exchanges_next:
        recovery.run(train, step)
    else:
        train(step)
with local.anchored():
    anchors = recovery.comm.allgather(digest(model.parameters()))
moments = {int(state["step"]) for state in inner.state.values()}
assert len(set(anchors)) == 1 and recovery.size == 2, (anchors, recovery.lost)
assert (local.steps, local.rounds, moments) == (16, 4, {16}), (local.steps, moments)
print("two went on", flush=True)
recovery.leave()
"""


@pytest.mark.slow
@pytest.mark.mpi(sizes=(1,))
@pytest.mark.skipif(MPI.ERR_PROC_FAILED == MPI.ERR_UNKNOWN
                    or "Open MPI" not in MPI.Get_library_version(), reason="this MPI has no ULFM")
@pytest.mark.parametrize("spec, when, fragments", [
    ("onebit", 6, 1), ("onebit", 7, 1), ("dense:exchange=sharded", 5, 2), ("onebit", 6, 2)])
def test_a_rank_that_dies_costs_its_own_progress_only(spec, when, fragments):
    """Survivors make 16 steps each, none of them twice, and end at one anchor."""
    launch = Path(__file__).resolve().parent.parent / "launch" / "run"
    done = subprocess.run(
        [sys.executable, launch, "--with-ft", "--python", sys.executable, "-n", "3", "--timeout",
         str(ranks.JOB), "-c", DIES, launch.parent.parent / "tests", spec, str(when),
         str(fragments)], capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={k: v for k, v in os.environ.items() if not k.startswith(SETTINGS)})
    assert done.returncode == 0 and done.stdout.count("two went on") == 2, done.stderr


def test_the_loss_scale_stays_the_ranks_own(comm):
    """A step that a GradScaler skips on one rank counts, so ranks meet all the same."""
    model, local = made(comm, every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in range(4):
        x, y = examples(comm, number)
        local.inner.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss * (torch.inf if comm.rank == number == 0 else 1)).backward()
        local.step(scaler=scaler)
        scaler.update()
    assert local.rounds == 2 and equal(comm, digest(model.parameters()))
    assert (scaler.get_scale() == 2.0) == (comm.rank == 0)


def test_fedopt_and_muon(comm):
    model, local = made(comm, outer=lambda anchors: torch.optim.Adam(anchors, lr=0.01, eps=1e-3))
    steps(model, local, comm, 8)
    assert equal(comm, digest(model.parameters()))
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    named = [(name, p) for name, p in network().named_parameters() if p.ndim == 2]
    local = mpicomp.LocalUpdates(named, torch.optim.Muon([p for _, p in named], lr=0.01), 1,
                                 "onebit", "nesterov", comm)
    for _, p in named:
        p.grad = torch.randn(p.shape)
    local.step()
    assert equal(comm, digest(p for _, p in named))


def test_sparseloco_is_a_preset(comm):
    model = network()
    local = mpicomp.SparseLoCo(model, torch.optim.AdamW(model.parameters(), lr=0.01), 2, comm=comm)
    assert local.averagers[0].method == mpicomp.method(
        "chunks:k=64,block=4096,bits=2,decay=0.95")
    assert type(local.outer) is torch.optim.SGD and local.outer.defaults["lr"] == 1.0
    steps(model, local, comm, 4)
    assert equal(comm, digest(model.parameters())) and local.rounds == 2


def test_bytes_are_told_against_an_exchange_in_every_step(comm):
    model, local = made(comm, every=5)
    steps(model, local, comm, 10)
    size = sum(p.numel() for p in model.parameters())
    assert local.stats.dense == 4 * size * 10 and local.stats.steps == 2
    sent = sum(averager.stats.sent for averager in local.averagers)
    assert local.stats.sent == sent and local.stats.reasons["dense"] == sent
