"""OneBitAdam: AdamW on dense gradients, then v stands still and the momentum is sent."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from training import (
    digest,
    examples,
    give,
    network,
    one_step,
    parameters,
    replicas_are_identical,
    same_error,
    whole_numbers,
)

import mpicomp
from mpicomp import MismatchError, SpecError
from mpicomp.compressor import Compressor, State, check_options, option
from mpicomp.compressors import Residual
from mpicomp.optim import OneBitAdam

pytestmark = pytest.mark.mpi
HEADER = 32
WHAT_SENDS = ["onebit", "onebit:exchange=sharded", "dropping:rate=0.9", "strom:tau=0.02",
              "onebit:exchange=hierarchical", "rule(b:bf16; onebit)"]


def made(named, method, comm, freeze=1, lr=0.1, betas=(0.9, 0.99), **keywords):
    """OneBitAdam with a Reducer, without weight decay."""
    own = {key: keywords.pop(key) for key in ("eps", "freeze_from", "freeze_by", "weight_decay")
           if key in keywords}
    optimizer = OneBitAdam([p for _, p in named], lr, betas, freeze=freeze,
                           **{"weight_decay": 0.0, **own})
    return mpicomp.DistributedOptimizer(optimizer, named, method, comm, **keywords)


def step(optimizer, named, gradients):
    """One step with these gradients; p.grad as the step found it."""
    optimizer.zero_grad()
    give(named, gradients)
    optimizer.step()
    return [p.grad.clone().numpy() for _, p in named]


def gradients_of(named, rank, number):
    return [0.25 * whole_numbers(rank, number + k, p.numel()) for k, (_, p) in enumerate(named)]


def everything(optimizer, model):
    """All that a training goes on from, on this rank, as bytes."""
    state, residuals = optimizer.state_dict(), optimizer.reducer.state_dict()
    kept = [value for key, value in residuals.items() if key != "step"]
    moments = [one[key] for one in state["state"].values() for key in sorted(one)]
    return digest(model.parameters()), digest(kept), digest(moments), repr(state["param_groups"])


# ---- the dense start --------------------------------------------------------------------------


def test_the_dense_start_is_adamw_to_the_bit(comm):
    """With groups, a schedule, decay and several buckets; both exchange dense."""

    def trained(kind, method, **own):
        model = network()
        optimizer = kind([{"params": model[1].parameters(), "lr": 0.02, "weight_decay": 0.0},
                          {"params": model[4:].parameters(), "betas": (0.8, 0.95)}],
                         lr=0.01, weight_decay=0.1, **own)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), method, comm,
                                     bucket_bytes=2000)
        for number in range(6):
            one_step(model, optimizer, comm, number)
            schedule.step()
        return model, optimizer

    model, theirs = trained(torch.optim.AdamW, "dense", foreach=False)
    same, ours = trained(OneBitAdam, "onebit", freeze=100)
    assert digest(same.parameters()) == digest(model.parameters())
    for p, q in zip(same.parameters(), model.parameters()):
        assert all(torch.equal(ours.state[p][key], theirs.state[q][key])
                   for key in ("step", "exp_avg", "exp_avg_sq"))
    assert ours.reducer.stats.sent == theirs.reducer.stats.sent and not ours.frozen


# ---- once v is frozen -------------------------------------------------------------------------


def test_a_dense_exchange_is_adam_with_a_frozen_v(comm):
    """To the bit on one rank, and up to the order of sums on several."""
    named = parameters(w=(3, 5), b=4)
    optimizer = made(named, "dense", comm, freeze=3, betas=(0.9, 0.95), weight_decay=0.1)
    x, m, v = ([torch.zeros(p.shape) for _, p in named] for _ in range(3))
    for number in range(8):
        given = [np.mean([gradients_of(named, rank, number)[k] for rank in range(comm.size)], 0)
                 for k in range(2)]
        step(optimizer, named, gradients_of(named, comm.rank, number))
        for k, g in enumerate(given):
            g = torch.from_numpy(g).view(x[k].shape)
            x[k] *= 1 - 0.1 * 0.1
            m[k].lerp_(g, 1 - 0.9)
            if number < 3:
                v[k].mul_(0.95).addcmul_(g, g, value=1 - 0.95)
                first, second = 1 - 0.9**(number + 1), 1 - 0.95**(number + 1)
                x[k].addcdiv_(m[k], (v[k].sqrt() / second**0.5).add_(1e-8), value=-0.1 / first)
                if number == 2:
                    m[k] /= first
                    v[k] /= second
            else:
                x[k].addcdiv_(m[k], v[k].sqrt().add_(1e-8), value=-0.1)
    for (_, p), expected in zip(named, x):
        if comm.size == 1:
            assert torch.equal(p.detach(), expected)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5)


@dataclass(frozen=True, repr=False)
class Sign(Compressor):
    """+-s for every element of a bucket; s: the mean of magnitudes (1), or their rms (2)."""

    name = "sign"
    feedback = True
    norm: int = option(2, "1 or 2", choices=(1, 2))

    def __post_init__(self):
        check_options(self)

    def capacity(self, layout):
        return 4 + layout.size

    def init(self, layout, like):
        return State()

    def encode(self, x, packet, layout, key, state):
        scale = np.mean(np.abs(x.astype(float))**self.norm)**(1 / self.norm)
        packet[:4] = np.array([scale], np.float32).view(np.uint8)
        packet[4:] = x >= 0
        return packet.size

    def decode_add(self, packet, out, layout, key, weight=1.0):
        self.expect(packet, self.capacity(layout))
        scale = packet[:4].view(np.float32)[0]
        out += np.where(packet[4:] == 1, scale, -scale) * np.float32(weight)


def frozen_with(momentum, v, betas):
    """A state of OneBitAdam whose v was frozen in step 1."""
    group = dict(lr=0.1, betas=betas, eps=0.0, weight_decay=0.01, frozen_at=1, v_before=None,
                 params=[0])
    return {"param_groups": [group], "state": {0: dict(
        step=torch.tensor(1.0), exp_avg=torch.tensor(momentum), exp_avg_sq=torch.tensor(v))}}


def worked(comm, norm, momentum, v, x, betas, given):
    """(p.grad, this rank's residual, x) after one step from this state."""
    named = [("x", torch.nn.Parameter(torch.tensor(x)))]
    method = mpicomp.Method("sign", Residual(Sign(norm)), "allgather")
    optimizer = made(named, method, comm)
    optimizer.load_state_dict(frozen_with(momentum, v, betas))
    (mean,) = step(optimizer, named, [given[comm.rank]])
    return mean, optimizer.reducer.state_dict()["error/x"].numpy(), named[0][1].detach().numpy()


@pytest.mark.mpi(sizes=(2,))
def test_signs_of_two_ranks_by_hand(comm):
    """Momenta [3 -1 2 -2] and [1 1 -4 0] by root mean square and by mean magnitude."""
    def sent(norm):
        return worked(comm, norm, [0.0] * 4, [1.0] * 4, [0.0] * 4, (0.0, 0.99),
                      [[3, -1, 2, -2], [1, 1, -4, 0]])

    close = dict(atol=5e-7, rtol=0)
    mean, owed, _ = sent(2)
    np.testing.assert_allclose(mean, [2.121320, 0, 0, 0], **close)
    np.testing.assert_allclose(owed, [[0.878680, 1.121320, -0.121320, 0.121320],
                                      [-1.121320, -1.121320, -1.878680, -2.121320]][comm.rank],
                               **close)
    mean, owed, _ = sent(1)
    np.testing.assert_allclose(mean, [1.75, -0.25, 0.25, -0.25], **close)
    np.testing.assert_allclose(mean + sum(comm.allgather(owed)) / 2, [2, 0, -1, -1], **close)


@pytest.mark.mpi(sizes=(2,))
def test_a_step_of_two_ranks_by_hand(comm):
    """m = [1.1 -.1 -.8 1.8] and [.9 .1 -1 2.2], of which 1.129159 and 1.290349 are the scales."""
    mean, owed, x = worked(comm, 2, [1.0, 0, -1, 2], [4.0, 0.25, 1, 0.01], [1.0, -1, 0.5, 2],
                           (0.9, 0.99), [[2, -1, 1, 0], [0, 1, -1, 4]])
    close = dict(atol=2e-6, rtol=0)
    np.testing.assert_allclose(mean, [1.209754, 0.080595, -1.209754, 1.209754], **close)
    m = np.array([[1.1, -0.1, -0.8, 1.8], [0.9, 0.1, -1, 2.2]][comm.rank])
    np.testing.assert_allclose(m - owed, np.where(m >= 0, 1, -1) * [1.129159, 1.290349][comm.rank],
                               **close)
    np.testing.assert_allclose(x, [0.938512, -1.015119, 0.620475, 0.788246], **close)


@pytest.mark.parametrize("method", WHAT_SENDS)
def test_sent_and_owed_is_given_in_every_step(method, comm):
    """m' + owed' = b1 m + (1 - b1) g + owed, each a mean over ranks, first and second residuals."""
    named = parameters(w=(40, 3), b=40)
    optimizer = made(named, method, comm, freeze=2, bucket_bytes=400)
    step(optimizer, named, gradients_of(named, comm.rank, 0))
    step(optimizer, named, gradients_of(named, comm.rank, 1))
    assert optimizer.frozen
    m = [optimizer.state[p]["exp_avg"].clone().numpy() for _, p in named]
    owed = {name: np.zeros(p.numel()) for name, p in named}
    for number in range(2, 32):
        step(optimizer, named, gradients_of(named, comm.rank, number))
        now = {slot.name: a for slot, a in optimizer.reducer.averager.mean_owed().items()}
        for k, (name, p) in enumerate(named):
            given = np.mean([gradients_of(named, rank, number)[k] for rank in range(comm.size)], 0)
            before = 0.9 * m[k].reshape(-1) + 0.1 * given + owed[name]
            m[k] = optimizer.state[p]["exp_avg"].clone().numpy()
            exact = name == "w" or "bf16" not in method  # a case that rounds and owes nothing
            np.testing.assert_allclose(m[k].reshape(-1) + now[name], before,
                                       atol=2e-5 if exact else 0.02)
        owed = now
    if "bf16" not in method:
        assert any(a.any() for a in owed.values())


def test_bytes_are_those_of_the_method(comm):
    """A dense step, then per column of w and for b: two means, and a bit a row in words of 32."""
    named = parameters(w=(64, 10), b=40)
    optimizer = made(named, "onebit", comm, freeze=2, weight_decay=0.1)
    sent = []
    for number in range(4):
        step(optimizer, named, gradients_of(named, comm.rank, number))
        sent.append(optimizer.reducer.stats.last["sent"])
    dense, compressed = HEADER + 4 * 680, HEADER + 10 * (8 + 8) + (8 + 8)
    assert sent == [dense] * 2 + [compressed] * 2
    assert optimizer.reducer.stats.reasons["warm-up"] == 2 * dense
    assert any("frozen after step 2" in note for note in optimizer.reducer.stats.notes)


def test_a_ratio_is_required_of_compressed_steps_and_at_the_end(comm):
    named = parameters(w=(64, 64))
    optimizer = made(named, "onebit", comm, freeze=3, require_ratio=15, ratio_window=2)
    for number in range(3):
        step(optimizer, named, gradients_of(named, comm.rank, number))
    with pytest.raises(mpicomp.RatioError, match="steps 0 to 2"):  # it has sent dense steps only
        optimizer.reducer.check_ratio()
    for number in range(3, 8):
        step(optimizer, named, gradients_of(named, comm.rank, number))
    optimizer.reducer.check_ratio()


def test_rows_without_a_gradient_stay(comm, capsys):
    """v is 0 there: nothing is divided by it, and what comes later is left out, and counted."""
    torch.manual_seed(1)
    named = [("table", torch.nn.Parameter(torch.randn(40, 4))), ("b", parameters(b=3)[0][1])]
    start = named[0][1].detach().clone()

    def given(number, rows):
        table, b = gradients_of(named, comm.rank, number)
        table = table.reshape(40, 4)
        table[:, 0] += 1
        table[rows:] = 0
        return [table, b]

    optimizer = made(named, "onebit", comm, freeze=2)
    for number in range(102):
        step(optimizer, named, given(number, 30))
    table = named[0][1].detach()
    assert table.isfinite().all() and torch.equal(table[30:], start[30:])
    assert not torch.equal(table[:30], start[:30]) and optimizer.sends.ignored == 0
    capsys.readouterr()
    for number in range(2):
        mean, _ = step(optimizer, named, given(number, 31 if comm.rank == 0 else 30))
    assert not mean[30:].any() and torch.equal(named[0][1][30:].detach(), start[30:])
    assert not optimizer.state[named[0][1]]["exp_avg"][30:].any()
    assert (optimizer.sends.ignored > 0) == (comm.rank == 0)
    assert capsys.readouterr().err.count("rank 0: ") == (comm.rank == 0)
    replicas_are_identical(comm, torch.nn.ParameterList(p for _, p in named))


# ---- when v is frozen -------------------------------------------------------------------------


def frozen_at(comm, gradient, steps=60, skip=(), **rule):
    """The step after which v is frozen, if gradient(step) is every element's; D is 10."""
    named = parameters(w=5)
    optimizer = made(named, "onebit", comm, betas=(0.9, 0.9), nonfinite="skip",
                     **{"freeze": "auto", **rule})
    for number in range(steps):
        optimizer.zero_grad()
        sick = number in skip and comm.rank == comm.size - 1
        give(named, [np.full(5, np.nan if sick else gradient(number))])
        optimizer.step()
    return optimizer.param_groups[0]["frozen_at"]


@pytest.mark.parametrize("rule, step", [
    ({}, 20), ({"freeze_from": 25}, 30), ({"freeze_by": 15}, 15), ({"freeze": 7}, 7)])
def test_v_is_frozen_when_it_is_steady(rule, step, comm):
    """Gradients of one size: v, its bias corrected, is the same in the first two looks."""
    assert frozen_at(comm, lambda number: 1.0, 32, **rule) == step


def test_v_is_not_frozen_while_it_falls(comm):
    """0.96 = 0.99592**10: gradients may become smaller by 0.2 % in a step, squares by 0.4 %."""
    assert frozen_at(comm, lambda number: 0.997**number) is None
    assert frozen_at(comm, lambda number: 0.9981**number) == 20


def test_a_step_that_is_skipped_is_no_look_at_v(comm):
    """Step 10 is skipped after the tenth: v has not changed, which is not steadiness."""
    assert frozen_at(comm, lambda number: 0.9**number, 12, skip=[10]) is None


# ---- a step is one transaction ----------------------------------------------------------------


def backward(model, comm, number, factor=1.0):
    x, y = examples(comm, number)
    (cross_entropy(model(x), y) * factor).backward()


@pytest.mark.parametrize("method", ["onebit", "onebit:exchange=sharded"])
def test_a_step_that_is_not_made_leaves_no_trace(method, comm):
    """NaN on one rank, zero_grad() before step(), discard() on one rank: momentum and residuals
    are as before."""
    model = network()
    optimizer = made(list(model.named_parameters()), method, comm, freeze=2, lr=0.01,
                     nonfinite="skip", bucket_bytes=2000)
    for number in range(5):
        one_step(model, optimizer, comm, number)
    before = everything(optimizer, model)
    last = comm.rank == comm.size - 1
    optimizer.zero_grad()
    backward(model, comm, 5, np.nan if last else 1.0)
    optimizer.step()
    assert everything(optimizer, model) == before
    backward(model, comm, 5)
    optimizer.zero_grad()
    backward(model, comm, 6)
    optimizer.reducer.finish()
    optimizer.zero_grad()
    backward(model, comm, 7)
    if last:
        optimizer.reducer.discard()
    else:
        optimizer.step()
    assert everything(optimizer, model) == before
    assert one_step(model, optimizer, comm, 5) < 2 and everything(optimizer, model) != before


def test_a_loss_scale_and_pieces_change_nothing(comm):
    """Powers of two and whole numbers: to the bit."""
    def trained(scale=None, pieces=1):
        named = parameters(w=(40, 3), b=40)
        optimizer = OneBitAdam([p for _, p in named], 0.125, freeze=2)
        scaler = scale and torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        reducer = mpicomp.Reducer(named, "onebit", comm, nonfinite="skip", sends=optimizer.sends)
        reducer.attach(optimizer, scaler)
        for number in range(8):
            optimizer.zero_grad()
            given = gradients_of(named, comm.rank, number)
            for _ in range(pieces - 1):
                with reducer.no_sync():
                    give(named, [g / pieces for g in given])
            give(named, [g / pieces * (scaler.get_scale() if scaler else 1) for g in given])
            if scaler:
                scaler.scale(torch.zeros(()))  # torch's own first look at the device
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        assert optimizer.frozen
        return digest([*(p for _, p in named), *(optimizer.state[p]["exp_avg"] for _, p in named)])

    assert trained() == trained(scale=2.0**10) == trained(pieces=2)


def test_clipping_is_the_same_on_all_ranks_and_lasts(comm):
    """It clips the mean momentum, which is what the next step goes on from."""
    model = network()
    optimizer = made(list(model.named_parameters()), "onebit", comm, freeze=2, lr=0.01)
    for number in range(4):
        optimizer.zero_grad()
        backward(model, comm, number, 10.0)
        norm = mpicomp.clip_grad_norm_(optimizer, 0.5)
        assert len(set(comm.allgather(norm.item()))) == 1
        optimizer.step()
    momentum = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in model.parameters()])
    assert norm > 0.5 and momentum.norm().item() == pytest.approx(0.5, rel=1e-4)
    optimizer.reducer.check_replicas(model)


def test_a_closure_is_called_once_and_its_loss_is_the_mean(comm):
    named = parameters(w=3)
    optimizer, calls = made(named, "dense", comm), []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = (named[0][1] * (comm.rank + 1)).sum() + comm.rank
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == (comm.size - 1) / 2
    optimizer.step(closure)
    assert len(calls) == 2 and optimizer.frozen
    mean = (comm.size + 1) / 2
    np.testing.assert_allclose(optimizer.state[named[0][1]]["exp_avg"], mean, rtol=1e-6)


def test_another_optimizer_beside_it_gets_gradients(comm):
    named = parameters(w=4, b=2)
    ours, sgd = OneBitAdam([named[0][1]], freeze=1), torch.optim.SGD([named[1][1]], lr=0.5)
    reducer = mpicomp.Reducer(named, "dense", comm, sends=ours.sends).attach(ours).attach(sgd)
    for number in range(3):
        ours.zero_grad(), sgd.zero_grad()
        give(named, [np.full(4, 2.0 * number + 2), np.full(2, 4.0)])
        ours.step(), sgd.step()
    assert ours.frozen and reducer.step == 3
    assert named[1][1].tolist() == [-6.0] * 2
    np.testing.assert_allclose(named[0][1].grad, [2.58] * 4, rtol=1e-6)  # .9 (.9 2 + .1 4) + .1 6


def test_a_parameter_that_is_frozen_keeps_its_momentum(comm):
    """Other than v: requires_grad_(False). It stands still, and so do momentum and residual sum."""
    named = parameters(w=40, b=40)
    optimizer = made(named, "onebit", comm, freeze=1)
    for number in range(4):
        step(optimizer, named, gradients_of(named, comm.rank, number))
    b = named[1][1].requires_grad_(False)
    before = b.clone(), optimizer.state[b]["exp_avg"].clone()
    owed = {s.name: a.copy() for s, a in optimizer.reducer.averager.mean_owed().items()}["b"]
    for number in range(4, 7):
        optimizer.zero_grad()
        give(named[:1], gradients_of(named[:1], comm.rank, number))
        optimizer.step()
    assert torch.equal(b, before[0]) and torch.equal(optimizer.state[b]["exp_avg"], before[1])
    now = {s.name: a for s, a in optimizer.reducer.averager.mean_owed().items()}["b"]
    np.testing.assert_allclose(now, owed, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_and_replicas_are_equal(dtype, comm):
    """What is compressed with it ends where dense AdamW does; bfloat16 up to its rounding."""
    def trained(kind, method, **own):
        model = network().to(dtype)
        optimizer = kind(model.parameters(), lr=0.01, betas=(0.9, 0.95), **own)
        mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), method, comm)
        for number in range(40):
            x, y = examples(comm, number)
            optimizer.zero_grad()
            loss = cross_entropy(model(x.to(dtype)).float(), y)
            loss.backward()
            optimizer.step()
        optimizer.reducer.check_replicas(model)
        return np.mean(comm.allgather(loss.item()))

    dense = trained(torch.optim.AdamW, "dense")
    assert trained(OneBitAdam, "onebit", freeze=15) < dense + 0.2 < 0.9


# ---- states -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["onebit", "onebit:exchange=sharded", "dropping:rate=0.9"])
def test_a_run_that_is_resumed_is_the_run(method, comm):
    """To the bit, saved in the dense start, at the freeze and after it."""
    def begin():
        model = network()
        return model, made(list(model.named_parameters()), method, comm, freeze=4, lr=0.01,
                           bucket_bytes=2000)

    model, optimizer = begin()
    saved = {}
    for number in range(8):
        saved[number] = copy.deepcopy((model.state_dict(), optimizer.state_dict(),
                                       optimizer.reducer.state_dict()))
        one_step(model, optimizer, comm, number)
    for start in (2, 4, 6):
        again, other = begin()
        again.load_state_dict(saved[start][0])
        other.load_state_dict(saved[start][1])
        other.reducer.load_state_dict(saved[start][2])
        assert other.frozen == (start >= 4)
        for number in range(start, 8):
            one_step(again, other, comm, number)
        assert everything(other, again) == everything(optimizer, model)
        other.reducer.close()


def test_the_state_of_adamw_comes_in_and_goes_out(comm):
    model = network()
    dense = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), foreach=False)
    mpicomp.DistributedOptimizer(dense, model.named_parameters(), "dense", comm)
    for number in range(5):
        one_step(model, dense, comm, number)
    dense.reducer.close()
    state = dense.state_dict()
    ours = made(list(model.named_parameters()), "onebit", comm, freeze=0)
    ours.load_state_dict(state)
    assert ours.frozen and ours.steps == 5 and ours.param_groups[0]["lr"] == 0.01
    for p in model.parameters():
        assert torch.equal(ours.state[p]["exp_avg"], dense.state[p]["exp_avg"] / (1 - 0.9**5))
        assert torch.equal(ours.state[p]["exp_avg_sq"], dense.state[p]["exp_avg_sq"] / (1 - .95**5))
    for number in range(5, 9):
        one_step(model, ours, comm, number)
    owed = {slot.parameter: a for slot, a in ours.reducer.averager.mean_owed().items()}
    back = torch.optim.AdamW(model.parameters(), foreach=False)
    back.load_state_dict(ours.adamw_state_dict())
    assert back.param_groups[0]["lr"] == 0.01 and back.param_groups[0]["betas"] == (0.9, 0.95)
    for p in model.parameters():
        m = back.state[p]["exp_avg"] / (1 - 0.9**9)
        expected = ours.state[p]["exp_avg"] + torch.from_numpy(owed[p]).view(p.shape)
        torch.testing.assert_close(m, expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(back.state[p]["exp_avg_sq"] / (1 - 0.95**9),
                                   ours.state[p]["exp_avg_sq"], rtol=1e-5, atol=0)
    ours.reducer.close()
    mpicomp.DistributedOptimizer(back, model.named_parameters(), "dense", comm)
    one_step(model, back, comm, 9)


def test_a_dense_state_goes_out_as_it_is(comm):
    """Before the freeze nothing is owed: AdamW goes on to the bit."""
    models = network(), network()
    ours = made(list(models[0].named_parameters()), "onebit", comm, freeze=100, lr=0.01)
    theirs = torch.optim.AdamW(models[1].parameters(), foreach=False)
    mpicomp.DistributedOptimizer(theirs, models[1].named_parameters(), "dense", comm)
    for number in range(3):
        one_step(models[0], ours, comm, number)
    models[1].load_state_dict(models[0].state_dict())
    theirs.load_state_dict(ours.adamw_state_dict())
    for number in range(3, 5):
        one_step(models[0], ours, comm, number)
        one_step(models[1], theirs, comm, number)
    assert digest(models[0].parameters()) == digest(models[1].parameters())


@pytest.mark.mpi(min_size=2)
def test_ranks_with_other_states_are_an_error(comm):
    """Before anything is sent: the exchange of a frozen v is another one."""
    named = parameters(x=4)
    optimizer = made(named, "onebit", comm)
    if comm.rank == 1:
        optimizer.load_state_dict(frozen_with([0.0] * 4, [1.0] * 4, (0.9, 0.99)))
    give(named, [np.ones(4)])
    text = same_error(comm, MismatchError, optimizer.step)
    assert "of group 0 of OneBitAdam" in text


@pytest.mark.mpi(min_size=2)
def test_a_state_that_one_rank_loads_is_the_same_error_everywhere(comm):
    """In a run that goes on, where nobody compares states: headers say whether v is frozen."""
    named = parameters(x=8)
    optimizer = made(named, "onebit", comm, freeze=9)
    for number in range(2):
        step(optimizer, named, gradients_of(named, comm.rank, number))
    if comm.rank == 1:
        optimizer.load_state_dict(frozen_with([0.0] * 8, [1.0] * 8, (0.9, 0.99)))
    optimizer.zero_grad()
    give(named, gradients_of(named, comm.rank, 2))
    same_error(comm, MismatchError, optimizer.step)


def test_a_state_loaded_without_that_of_the_reducer(comm):
    """All ranks go from dense steps to a frozen v: one error, and with both states the run."""
    named = parameters(x=8)
    optimizer = made(named, "onebit", comm, freeze=9)
    step(optimizer, named, gradients_of(named, comm.rank, 0))
    optimizer.load_state_dict(frozen_with([0.0] * 8, [1.0] * 8, (0.9, 0.99)))
    optimizer.zero_grad()
    give(named, gradients_of(named, comm.rank, 1))
    assert "type, on all ranks,  reducer.load_state_dict" in same_error(comm, SpecError,
                                                                        optimizer.step)
    optimizer.zero_grad()
    optimizer.reducer.load_state_dict(optimizer.reducer.state_dict())
    sent = optimizer.reducer.stats.sent
    step(optimizer, named, gradients_of(named, comm.rank, 1))
    assert optimizer.reducer.stats.sent - sent == HEADER + 8 + 4  # two means, and bits in a word


def test_a_parameter_that_was_never_trained(comm):
    """It gets no moments, counts as no element without a gradient, and AdamW's state lacks it."""
    named = parameters(w=4, b=2)
    named[1][1].requires_grad_(False)
    optimizer = made(named, "onebit", comm, freeze=1)
    for _ in range(2):
        optimizer.zero_grad()
        give(named[:1], [np.arange(1.0, 5)])
        optimizer.step()
    assert any("0 of 4 elements" in note for note in optimizer.reducer.stats.notes)
    packed = optimizer.adamw_state_dict()
    assert set(packed["state"]) == {0} and named[1][1] not in optimizer.state
    torch.optim.AdamW([p for _, p in named]).load_state_dict(packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_of_16_bits_are_float32(dtype, comm):
    """The square of 1e-3 is 0 in float16; they stay float32 in a state that is loaded."""
    named = [("w", torch.nn.Parameter(torch.zeros(4, dtype=dtype)))]
    optimizer = made(named, "onebit", comm, freeze=2)
    for _ in range(4):
        optimizer.zero_grad()
        named[0][1].grad = torch.full((4,), 1e-3, dtype=dtype)
        optimizer.step()
    assert optimizer.dead_of(named[0][1]) is None and named[0][1].dtype == dtype
    assert named[0][1].tolist() == pytest.approx([-0.4] * 4, rel=0.02)
    again = [("w", torch.nn.Parameter(torch.zeros(4, dtype=dtype)))]
    other = made(again, "onebit", comm, freeze=2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key in ("exp_avg", "exp_avg_sq"):
        was, now = optimizer.state[named[0][1]][key], other.state[again[0][1]][key]
        assert now.dtype == torch.float32 and torch.equal(was, now)
        assert now is not was


def test_a_step_given_up_counts_nothing_as_left_out(comm):
    """Three elements never had a gradient before v was frozen; in the step given up all have."""
    named = parameters(w=4)
    optimizer = made(named, "onebit", comm)
    step(optimizer, named, [np.array([1.0, 0, 0, 0])])
    give(named, [np.ones(4)])
    optimizer.reducer.discard()
    optimizer.step()
    assert optimizer.sends.ignored == 0
    step(optimizer, named, [np.ones(4)])
    assert optimizer.sends.ignored == 3


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RAdam, torch.optim.NAdam,
                                  torch.optim.RMSprop, torch.optim.Adamax])
@pytest.mark.parametrize("stepped", [False, True])
def test_the_state_of_another_optimizer_changes_nothing(kind, stepped, comm):
    theirs = kind([torch.nn.Parameter(torch.zeros(4))], lr=0.5)
    if stepped:
        theirs.param_groups[0]["params"][0].grad = torch.ones(4)
        theirs.step()
    refused(theirs.state_dict(), comm)


@pytest.mark.parametrize("option", [{"amsgrad": True}, {"betas": (0.9, 1.0)}, {"lr": -1.0}])
def test_a_state_with_options_out_of_range_changes_nothing(option, comm):
    state = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(4))]).state_dict()
    state["param_groups"][0] |= option
    refused(state, comm)


def refused(state, comm):
    """load_state_dict raises SpecError, and all is as before."""
    named = parameters(w=4)
    optimizer = made(named, "dense", comm)
    step(optimizer, named, [np.ones(4)])
    before = repr(optimizer.state_dict())
    with pytest.raises(SpecError, match="found"):
        optimizer.load_state_dict(state)
    assert repr(optimizer.state_dict()) == before


def test_copies_and_broadcast_states(comm):
    named = parameters(w=40)
    optimizer = made(named, "onebit", comm, freeze=2)
    for number in range(4):
        step(optimizer, named, gradients_of(named, comm.rank, number))
    copied = copy.deepcopy(optimizer)
    assert copied.frozen and copied.rule == optimizer.rule and copied.sends is not optimizer.sends
    with pytest.raises(SpecError, match="is a copy"):
        copied.step()
    other = [("w", torch.nn.Parameter(named[0][1].detach().clone()))]
    fresh = made(other, "onebit", comm, freeze=2)
    if comm.rank == 0:
        fresh.load_state_dict(optimizer.state_dict())
    mpicomp.broadcast_optimizer_state(fresh, comm)
    assert fresh.frozen and fresh.steps == 4
    step(fresh, other, gradients_of(other, comm.rank, 4))


# ---- what is refused, and what is said --------------------------------------------------------


@pytest.mark.parametrize("method, keywords, words", [
    ("strom:exchange=peers", {}, "use exchange=allgather or sharded"),
    ("dropping:exchange=server", {}, "use exchange=allgather or sharded"),
    ("onebit:delay=1", {}, "leave delay out"),
    ("onebit:warmup=5", {}, "leave warmup out, and give it freeze="),
    ("onebit:exchange=sharded,adagrad=yes", {}, "leave one out"),
    ("onebit", {"average": False}, "its momentum is a mean"),
    ("onebit", {"sparse": ["w"]}, "leave sparse= out")])
def test_what_does_not_go_with_it_is_said(method, keywords, words, comm):
    text = same_error(comm, SpecError,
                      lambda: made(parameters(w=(4, 2)), method, comm, **keywords))
    assert words in text


@pytest.mark.parametrize("arguments, words", [
    (dict(lr=-1), "lr=-1 found"), (dict(betas=(0.9, 1.0)), "two numbers from 0 to below 1"),
    (dict(freeze="soon"), "freeze='soon' found, expected 'auto' or a step"),
    (dict(freeze=5, freeze_by=9), "leave them out"), (dict(freeze_by=0), "at least 1, or None"),
    (dict(freeze_from=9, freeze_by=5), "expected at least freeze_from=9")])
def test_arguments_out_of_range(arguments, words):
    with pytest.raises(SpecError, match=words):
        OneBitAdam([torch.nn.Parameter(torch.zeros(2))], **arguments)


def test_what_it_cannot_do_is_said(comm):
    named = parameters(w=4)
    alone = OneBitAdam([named[0][1]])
    with pytest.raises(SpecError, match="without a Reducer"):
        alone.step()
    with pytest.raises(SpecError, match=r"type  mpicomp.DistributedOptimizer\(optimizer"):
        mpicomp.Reducer(named, "onebit", comm).attach(alone)
    optimizer = made(named, "onebit", comm, freeze=0)
    give(named, [np.ones(4)])
    assert "load_state_dict(state of AdamW)" in same_error(comm, SpecError, optimizer.step)
    optimizer = made(parameters(w=4), "onebit", comm)
    for state, words in (
            (torch.optim.SGD([torch.zeros(4)], 0.1, momentum=0.9), None),
            (torch.optim.AdamW([torch.zeros(4)], amsgrad=True), "amsgrad=True"),
            (torch.optim.Adam([torch.zeros(4)], weight_decay=0.1), "decay is part of")):
        p = state.param_groups[0]["params"][0]
        p.grad = torch.ones(4)
        state.step()
        with pytest.raises(SpecError, match=words):
            optimizer.load_state_dict(state.state_dict())
    named = parameters(w=4)
    optimizer = made(named, "onebit", comm)
    for number in range(2):
        optimizer.zero_grad()
        give(named, [np.ones(4)])
        if number:
            with pytest.raises(MismatchError, match="in the middle of a step"):
                optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    for call, words in ((optimizer.reducer.flush, "adamw_state_dict"),
                        (lambda: optimizer.add_param_group({"params": [torch.zeros(2)]}),
                         "v is frozen")):
        with pytest.raises(SpecError, match=words):
            call()


@pytest.mark.parametrize("kind, method, said", [
    (torch.optim.AdamW, "dropping", True), (torch.optim.Adam, "onebit", True),
    (torch.optim.RMSprop, "rule(b:dense; strom:tau=0.1)", True), (torch.optim.AdamW, "bf16", False),
    (torch.optim.AdamW, "onebit:bits=8", False), (torch.optim.Adam, "chunks", True),
    (torch.optim.SGD, "dropping", False),
    (OneBitAdam, "dropping", False)])
def test_an_optimizer_that_a_method_does_not_suit_is_named(kind, method, said, comm):
    named = parameters(w=4, b=2)
    optimizer = kind([p for _, p in named], lr=0.1)
    mpicomp.DistributedOptimizer(optimizer, named, method, comm)
    assert any("error feedback does not repair" in note
               for note in optimizer.reducer.stats.notes) == said
