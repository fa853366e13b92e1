"""powersgd: the worked example to the digit, what each rank owes, and what must be alike on all."""

import numpy as np
import pytest
import torch
from laws import decode, encode, same
from material import LAYOUTS, gradient
from training import give, network, parameters, replicas_are_identical, same_error, train
from training import one_step as train_step

import mpicomp
from mpicomp import SpecError, catalogue, checkpoint, kernels
from mpicomp.compressors import PowerSGD, Residual
from mpicomp.compressors.registry import from_spec
from mpicomp.exchange.allreduce import ring
from mpicomp.layout import Layout
from mpicomp.philox import Key

WORKED = Layout.of([("w", (2, 3))])
A = np.float32([1, 2, 2, 2, 0, 1])
B = np.float32([3, 0, 0, 0, 4, 1])
MEAN = (A + B).astype(float) / 2
SPEC = "powersgd:rank=2,rate=1"
SHAPES = {"w": (40, 5), "b": (40,), "k": (5, 2, 3), "v": (30, 20)}


class Group:
    """Ranks in one process: what exchange=allreduce does with this compressor."""

    def __init__(self, compressor, layout, ranks):
        self.compressor, self.layout, self.step = compressor, layout, 0
        self.states = [compressor.init(layout, np.zeros(layout.size, np.float32))
                       for _ in range(ranks)]

    def average(self, gradients, apply=True):
        """(the mean that all ranks get, the payload of each rank)."""
        c, layout, size = self.compressor, self.layout, len(self.states)
        keys = [Key(5, rank, self.step, 1) for rank in range(size)]
        asked = [c.measure(x, layout, s) for x, s in zip(gradients, self.states)]
        if asked[0] is not None:
            total = sum(a.copy() for a in asked)
            for array in asked:
                array[...] = total
        payloads = [encode(c, x, layout, key, s)
                    for x, key, s in zip(gradients, keys, self.states)]
        shared = c.shared_bytes(layout)
        assert len({payload[:shared].tobytes() for payload in payloads}) == 1
        total = payloads[0].copy()
        total[shared:] = sum(p[shared:].view(np.float32) for p in payloads).view(np.uint8)
        for key, state in zip(keys, self.states):
            c.learn(total, layout, key, state)
            if apply:
                c.commit(state)
        self.step += 1
        return decode(c, total, layout, 1 / size), payloads


def worked(compressor):
    """Two ranks whose Q is [1 0 0] in the first step."""
    group = Group(compressor, WORKED, 2)
    for state in group.states:
        compressor.persistent(state)["basis"][...] = [1, 0, 0, 0, 0, 0]
    return group


# ---- the worked example -------------------------------------------------------------------------


def test_one_step_of_two_ranks():
    """P, both Q, the mean that is applied, and what each rank owes."""
    feedback = Residual(PowerSGD(rank=1, rate=1))
    group = worked(feedback)
    mean, payloads = group.average([A, B])
    left, q_a = np.split(payloads[0].view(np.float32), [2])
    q_b = payloads[1].view(np.float32)[2:]
    close = dict(rtol=0, atol=6e-7)
    np.testing.assert_allclose(left, [.894427, .447214], **close)
    np.testing.assert_allclose(q_a, [1.788854, 1.788854, 2.236068], **close)
    np.testing.assert_allclose(q_b, [2.683282, 1.788854, .447214], **close)
    np.testing.assert_allclose(mean, [2, 1.6, 1.2, 1, .8, .6], **close)
    owed = [state.owed for state in group.states]
    np.testing.assert_allclose(owed[0], [-.6, .4, 0, 1.2, -.8, 0], **close)
    np.testing.assert_allclose(owed[1], [.6, -1.6, -.4, -1.2, 3.2, .8], **close)
    np.testing.assert_allclose(sum(owed) / 2, [0, -.6, -.2, 0, 1.2, .4], **close)
    np.testing.assert_allclose(mean + sum(owed) / 2, MEAN, **close)


def test_the_next_step_begins_with_the_last_ones_q():
    """The same matrices again, without feedback: the relative error falls from 1/6 to .084098."""
    group = worked(PowerSGD(rank=1, rate=1))
    errors = []
    for _ in range(2):
        mean, _ = group.average([A, B])
        errors.append(np.square(MEAN - mean).sum() / np.square(MEAN).sum())
    np.testing.assert_allclose(errors, [1 / 6, .084098], atol=5e-7)


def test_a_step_that_is_given_up_has_never_been():
    group, other = worked(PowerSGD(rank=1, rate=1)), worked(PowerSGD(rank=1, rate=1))
    group.average([B, B], apply=False)
    assert same(group.average([A, B])[0], other.average([A, B])[0])
    assert same(group.average([A, B])[0], other.average([A, B])[0])


# ---- what it promises ---------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2])
def test_what_each_rank_owes_is_bounded(rank):
    """4 ranks, 16 x 16, 2,000 steps of a signal and noise: rms at the end at most 1.5 times that
    at step 50. (With the mean Q in place of its own, it would grow as the root of the steps.)"""
    layout, rng = Layout.of([("w", (16, 16))]), np.random.default_rng(1)
    group = Group(Residual(PowerSGD(rank=rank, rate=1)), layout, 4)
    signal, sizes = rng.standard_normal(256), {}
    for step in range(1, 2001):
        group.average([(.2 * signal + rng.standard_normal(256)).astype(np.float32)
                       for _ in range(4)])
        sizes[step] = np.mean([np.square(state.owed).mean() for state in group.states])**.5
    late = max(size for step, size in sizes.items() if step > 1000)
    assert late <= 1.5 * max(sizes[step] for step in range(41, 51))


def test_a_mean_of_that_rank_is_found_in_two_steps():
    """Without a residual, and though the ranks' own matrices have full rank."""
    rng, layout = np.random.default_rng(3), Layout.of([("w", (30, 4, 10))])
    mean = (rng.standard_normal((30, 3)) @ rng.standard_normal((3, 40))).ravel()
    noise = rng.standard_normal(mean.size)
    group = Group(PowerSGD(rank=3), layout, 2)
    for _ in range(2):
        said, _ = group.average([(mean + noise).astype(np.float32),
                                 (mean - noise).astype(np.float32)])
    assert np.abs(said - mean).max() < 2e-5


def test_zeros_stay_zeros_and_are_no_end():
    """A matrix of zeros says zeros, and Q is drawn anew: what comes later is said."""
    layout = Layout.of([("w", (20, 20))])
    group = Group(PowerSGD(rank=2), layout, 2)
    zeros, x = np.zeros(400, np.float32), np.outer(np.arange(20), np.ones(20)).ravel()
    drawn = []
    for _ in range(2):
        assert not group.average([zeros, zeros])[0].any()
        first, other = (c.basis[:40].reshape(2, 20).copy() for c in group.states)
        assert same(first, other) and first.any(axis=1).all() and np.abs(first).max() <= 1
        drawn.append(first)
    assert not same(*drawn)
    mean, _ = group.average([x.astype(np.float32)] * 2)  # of rank 1: one column is left over
    np.testing.assert_allclose(mean, x, rtol=1e-5, atol=1e-5)
    assert np.isfinite(group.states[0].basis).all()


@pytest.mark.parametrize("name", ["normal", "subnormal", "huge", "heavy tail"])
def test_the_scale_of_gradients_does_not_matter(name):
    """Three steps of the same matrix: what is left shrinks, and all is finite."""
    layout = LAYOUTS["tall"]
    x, group = gradient(name, layout), Group(PowerSGD(rank=2, rate=1), layout, 1)
    for _ in range(3):
        said, _ = group.average([x])
        assert np.isfinite(said).all()
        wide = x.astype(float)
        assert np.linalg.norm(said - wide) <= np.linalg.norm(wide)


@pytest.mark.parametrize("backend", kernels.backends())
def test_columns_become_orthonormal_or_zero(backend):
    """Also nearly dependent ones; what depends on those before it is zero, as zeros are."""
    rng = np.random.default_rng(0)
    columns = rng.standard_normal((6, 50)).astype(np.float32)
    columns[2] = 2 * columns[0]
    columns[3] = 0
    columns[5] = columns[4] + np.float32(1e-5) * columns[5]
    parts, k = ((0, 50, 40, 6),), kernels.backends()[backend]
    data = np.zeros(4 * 6 * 90, np.uint8)
    k.powersgd_encode(np.zeros(2000, np.float32), parts, columns.ravel(), data)
    made = data[:1200].view(np.float32).reshape(6, 50).astype(float)
    np.testing.assert_allclose(made @ made.T, np.diag([1, 1, 0, 0, 1, 1]), atol=3e-7)
    assert not made[2:4].any()


def test_which_tensors_are_projected():
    """(n + m) r rate < n m; a convolution is [out, everything else]."""
    layout = Layout.of([("w", (16, 16)), ("w17", (17, 16)), ("bias", (1000,)), ("scalar", ()),
                        ("conv", (40, 3, 3, 3)), ("none", (0, 9))])
    compressor = PowerSGD(rank=4)
    dense, narrow, conv = 256, 17 * 16, 40 * 27  # (32 or 33) * 8 >= 256; 33 * 8 < 272
    assert compressor.capacity(layout) == 4 * (dense + 4 * 33 + 1000 + 1 + 4 * 67)
    assert narrow > 8 * 33 and conv > 8 * 67
    assert compressor.shared_bytes(layout) == 4 * 4 * (17 + 40)
    x = np.random.default_rng(0).standard_normal(layout.size).astype(np.float32)
    said, _ = Group(compressor, layout, 1).average([x])
    left = {s.name: (said != x)[s.slice].any() for s in layout.segments}
    assert left == {"w": False, "w17": True, "bias": False, "scalar": False, "conv": True,
                    "none": False}


# ---- by MPI -------------------------------------------------------------------------------------


def draws(rank, step):
    rng = np.random.default_rng([rank, step])
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def owed_by_all(averager, comm):
    """{name: the sum of what ranks owe}."""
    mine = {key[6:]: value.astype(float) for key, value in averager.state_dict().items()
            if key.startswith("error/")}
    return {name: sum(comm.allgather(array)) for name, array in mine.items()}


@pytest.mark.mpi
@pytest.mark.parametrize("bucket_bytes", [600, 25 << 20])
def test_what_was_applied_and_what_is_owed_is_what_was_given(bucket_bytes, comm):
    """And every rank has the same bits, and the same Q for the next step."""
    averager = mpicomp.Averager(draws(0, 0), SPEC, comm, bucket_bytes=bucket_bytes)
    given, applied = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    for step in range(12):
        arrays = draws(comm.rank, step)
        for name in SHAPES:
            given[name] += sum(draws(rank, step)[name].astype(float) for rank in range(comm.size))
        averager.average(arrays)
        for name, array in arrays.items():
            applied[name] += comm.size * array.astype(float)
            assert len(set(comm.allgather(array.tobytes()))) == 1
    state, owed = averager.state_dict(), owed_by_all(averager, comm)
    for name, array in given.items():
        np.testing.assert_allclose(applied[name] + owed[name], array, atol=1e-3)
        assert len(set(comm.allgather(state[f"basis/{name}"].tobytes()))) == 1
    assert np.abs(owed["w"]).max() > .1 and np.abs(owed["b"]).max() < 1e-5
    averager.close()


@pytest.mark.mpi(min_size=2)
def test_the_ring_adds_what_is_not_common(comm, monkeypatch):
    """Sums of float32 from a length on travel in rings (transport/ring.py): the same numbers."""
    means = []
    for least in (1 << 20, 4):
        monkeypatch.setattr(ring, "LEAST", least)
        averager = mpicomp.Averager(draws(0, 0), SPEC, comm)
        for step in range(2):
            arrays = draws(comm.rank, step)
            averager.average(arrays)
        means.append(arrays)
        assert ("ring Iallreduce" in averager.stats.calls) == (least == 4)
        averager.close()
    for name in SHAPES:
        np.testing.assert_allclose(means[0][name], means[1][name], atol=2e-5)


@pytest.mark.mpi
def test_bytes_are_r_floats_for_each_row_and_column(comm):
    """Over both calls: nothing is counted twice."""
    averager = mpicomp.Averager(draws(0, 0), SPEC, comm)
    averager.average(draws(comm.rank, 0))
    floats = 2 * (40 + 5) + 40 + 2 * (5 + 6) + 2 * (30 + 20)
    assert averager.stats.calls == {"Iallreduce": 4 * floats, "Iallgather": 32}
    averager.close()


@pytest.mark.mpi
def test_nan_on_one_rank_leaves_everything_as_it_was(comm):
    averager = mpicomp.Averager(draws(0, 0), SPEC, comm, nonfinite="skip")
    averager.average(draws(comm.rank, 0))
    before = averager.state_dict()
    arrays = draws(comm.rank, 1)
    arrays["v"][3, 4] = np.nan if comm.rank == comm.size - 1 else 0
    assert averager.average(arrays) is False
    after = averager.state_dict()
    assert after.pop("step") == before.pop("step") + 1
    assert all(same(after[key], before[key]) for key in before)
    assert averager.average(draws(comm.rank, 2))
    averager.close()


@pytest.mark.mpi
def test_loading_a_state_goes_on_to_the_bit(comm):
    one, other = (mpicomp.Averager(draws(0, 0), SPEC, comm) for _ in range(2))
    for step in range(2):
        one.average(draws(comm.rank, step))
    other.load_state_dict(one.state_dict())
    for step in range(2, 4):
        here, there = draws(comm.rank, step), draws(comm.rank, step)
        one.average(here), other.average(there)
        assert all(same(here[name], there[name]) for name in SHAPES)
    states = one.state_dict(), other.state_dict()
    assert all(same(states[0][key], states[1][key]) for key in states[0] if "/" in key)
    one.close(), other.close()


@pytest.mark.mpi
def test_flushing_says_what_is_owed_and_keeps_q(comm):
    named = parameters(**SHAPES)
    reducer = mpicomp.Reducer(named, SPEC, comm)
    give(named, draws(comm.rank, 0).values())
    reducer.finish()
    before = reducer.state_dict()
    owed = {name: sum(comm.allgather(before[f"error/{name}"].double().numpy())) for name in SHAPES}
    reducer.flush()
    after = reducer.state_dict()
    for name, p in named:
        np.testing.assert_allclose(p.grad, owed[name] / comm.size, atol=1e-5)
        assert not after[f"error/{name}"].any()
        assert torch.equal(after[f"basis/{name}"], before[f"basis/{name}"])
    reducer.close()


def test_other_numbers_of_ranks_share_what_is_owed_and_have_the_same_q():
    averager = mpicomp.Averager(draws(0, 0), SPEC)
    averager.average(draws(0, 0))
    state = {key: torch.as_tensor(value) if "/" in key else value
             for key, value in averager.state_dict().items()}
    averager.close()
    for count in (1, 3):
        new = checkpoint.repartition([state, state], count)
        assert all(torch.equal(each["basis/w"], state["basis/w"]) for each in new)
        total = sum(each["error/w"].double() for each in new)
        np.testing.assert_allclose(total, 2 * state["error/w"].double(), atol=1e-6)


# ---- what it goes with --------------------------------------------------------------------------


@pytest.mark.mpi
@pytest.mark.parametrize("options", [",delay=1", ",warmup=3", ",feedback=no", ",decay=0.9"])
def test_a_network_learns_and_replicas_are_identical(options, comm):
    model, losses = train(SPEC + options, comm, steps=16)
    replicas_are_identical(comm, model)
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


@pytest.mark.mpi
def test_a_frozen_parameter_gets_back_what_was_sent(comm):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=.1)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), SPEC, comm)
    for step in range(3):
        train_step(model, optimizer, comm, step)
    model[4].weight.requires_grad_(False)
    before = model[4].weight.detach().clone()
    train_step(model, optimizer, comm, 3)
    assert torch.equal(model[4].weight, before)
    model[4].weight.requires_grad_(True)
    train_step(model, optimizer, comm, 4)
    replicas_are_identical(comm, model)
    optimizer.reducer.close()


@pytest.mark.mpi
def test_momentum_and_differences_of_parameters_travel_so_too(comm):
    model = network()
    optimizer = mpicomp.optim.OneBitAdam(model.parameters(), lr=1e-3, freeze=2)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), SPEC, comm)
    for step in range(5):
        train_step(model, optimizer, comm, step)
    replicas_are_identical(comm, model)
    optimizer.reducer.close()
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    local = mpicomp.LocalUpdates(model.named_parameters(), inner, every=2, method=SPEC, comm=comm)
    for step in range(4):
        train_step(model, inner, comm, step)
        local.step()
    replicas_are_identical(comm, model)
    assert any(key.startswith("basis/") for key in local.state_dict())


@pytest.mark.mpi
def test_what_it_cannot_be(comm):
    for exchange in ("allgather", "sharded", "hierarchical", "peers", "server", "silent"):
        text = same_error(comm, SpecError, lambda e=exchange: mpicomp.method(
            f"powersgd:exchange={e}"))
        assert f"exchange={exchange} found" in text and "type exchange=allreduce" in text
    for spec in ("rule(*.bias:dense; powersgd)", "rule(*.bias:dense; powersgd:feedback=no)"):
        assert "powersgd found as a case" in same_error(comm, SpecError,
                                                        lambda s=spec: mpicomp.method(s))
    for spec, words in (("powersgd:rank=33", "at most 32"), ("powersgd:rank=0", "at least 1"),
                        ("powersgd:rate=0.5", "at least 1")):
        with pytest.raises(SpecError, match=words):
            from_spec(spec)
    made = catalogue.method("powersgd:rank=8")
    assert made == catalogue.Method("powersgd", Residual(PowerSGD(rank=8)), "allreduce")
    assert not made.coarse


def test_a_sum_beyond_float32_is_refused():
    layout = Layout.of([("w", (20, 20))])
    x = np.full(400, 3e38, np.float32)
    with np.errstate(all="ignore"), pytest.raises(mpicomp.PacketError, match="beyond float32"):
        Group(PowerSGD(rank=2), layout, 2).average([x, x])
