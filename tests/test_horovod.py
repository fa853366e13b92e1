"""Horovod's interface: its calls in its order, on 1 to 4 ranks, with the results that it gives."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from training import digest, examples, network, replicas_are_identical, same_error

import mpicomp
import mpicomp.compat.horovod as horovod
from mpicomp import mpi
from mpicomp.errors import MismatchError, NonFiniteError, SpecError

pytestmark = pytest.mark.mpi


@pytest.fixture
def hvd(comm):
    horovod.shutdown()
    horovod.init(comm)
    yield horovod
    horovod.shutdown()


def made(hvd, kind=torch.optim.SGD, **keywords):
    """A model, and its optimizer as Horovod's."""
    model = network()
    optimizer = hvd.DistributedOptimizer(kind(model.parameters(), lr=0.1, momentum=0.9),
                                         named_parameters=model.named_parameters(), **keywords)
    return model, optimizer


def backward(model, comm, step, part=slice(None), factor=1.0):
    x, y = examples(comm, step)
    (factor * cross_entropy(model(x[part]), y[part])).backward()


def by_reducer(comm, spec, steps, **keywords):
    """The same training by mpicomp's own names."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), spec, comm, **keywords)
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, comm, step)
        optimizer.step()
    return model


# ---- a whole script ----


def test_a_script_with_the_calls_of_horovods_example(hvd):
    """Those of its MNIST example, in their order; the data are sixteen numbers and their class."""
    torch.manual_seed(hvd.rank())  # every rank begins with weights of its own
    x = torch.randn(96, 16, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x.view(96, 4, 4)[:, :, :3].sum(1).argmax(1))
    sampler = DistributedSampler(data, num_replicas=hvd.size(), rank=hvd.rank())
    loader = DataLoader(data, batch_size=4, sampler=sampler)
    model = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * hvd.size(), momentum=0.5)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=hvd.Compression.fp16,
        op=hvd.Average, gradient_predivide_factor=1.0)

    def tested():
        loss = cross_entropy(model(x), data.tensors[1]) + hvd.rank()  # other values on each rank
        return hvd.allreduce(loss.detach(), name="avg_loss").item() - (hvd.size() - 1) / 2

    losses = [tested()]
    for epoch in range(1, 4):
        model.train()
        sampler.set_epoch(epoch)
        for x_part, y_part in loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(x_part), y_part)
            loss.backward()
            optimizer.step()
        losses.append(tested())
    assert losses[-1] < 0.75 * losses[0]
    assert hvd.allgather_object(losses) == hvd.size() * [losses]
    assert len(set(hvd.allgather_object(digest(model.parameters())))) == 1


# ---- the optimizer ----


@pytest.mark.parametrize("spec", ["dense", "fp16", "onebit", "terngrad"])
def test_it_exchanges_as_a_reducer_does_to_the_bit(hvd, comm, spec):
    model, optimizer = made(hvd, compression=hvd.Compression.of(spec))
    for step in range(4):
        optimizer.zero_grad()
        backward(model, comm, step)
        optimizer.step()
    assert digest(model.parameters()) == digest(by_reducer(comm, spec, 4).parameters())
    assert optimizer.reducer.step == 4 and type(optimizer) is torch.optim.SGD


def test_the_compressions_that_horovod_has(hvd):
    assert hvd.Compression.none == hvd.Compression.of("dense")
    assert hvd.Compression.fp16 == hvd.Compression.of("fp16") != hvd.Compression.none


@pytest.mark.parametrize("spec", ["dense", "onebit"])
def test_backward_passes_add_up(hvd, comm, spec):
    """Two passes over halves give the gradient of twice their mean; one packet a step."""
    model, optimizer = made(hvd, compression=hvd.Compression.of(spec), backward_passes_per_step=2)
    other = network()
    own = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    reducer = mpicomp.Reducer(other.named_parameters(), spec, comm).attach(own)
    for step in range(3):
        optimizer.zero_grad()
        own.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):
            backward(model, comm, step, part)
        with reducer.no_sync():
            backward(other, comm, step, slice(0, 4))
        backward(other, comm, step, slice(4, 8))
        optimizer.step()
        own.step()
    assert digest(model.parameters()) == digest(other.parameters())
    assert optimizer.reducer.stats.steps == 3


def test_fewer_passes_are_exchanged_by_the_step_and_more_are_refused(hvd, comm):
    model, optimizer = made(hvd, backward_passes_per_step=3)
    backward(model, comm, 0)
    optimizer.step()
    assert digest(model.parameters()) == digest(by_reducer(comm, "dense", 1).parameters())
    optimizer.zero_grad()
    for step in range(3):
        backward(model, comm, step)
    text = same_error(comm, MismatchError, lambda: mute(backward, model, comm, 3))
    assert "gradient 4 of" in text and "backward_passes_per_step=4" in text
    optimizer.reducer.discard()
    optimizer.set_backward_passes_per_step(1)
    backward(model, comm, 1)
    optimizer.step()
    replicas_are_identical(comm, model)


def mute(function, *arguments):
    """Call it; an error of one rank names that rank, which here is left out."""
    try:
        function(*arguments)
    except mpicomp.MpicompError as error:
        raise type(error)(str(error).partition(": ")[2]) from None


@pytest.mark.parametrize("name", ["p", None])
def test_parameters_without_names_and_those_of_other_optimizers(hvd, comm, name):
    """Two optimizers, each given all names: each exchanges its own parameters."""
    model = network()
    first, second = list(model.parameters())[:3], list(model.parameters())[3:]
    named = (lambda: model.named_parameters()) if name else (lambda: None)
    optimizers = [hvd.DistributedOptimizer(torch.optim.SGD(own, lr=0.1, momentum=0.9),
                                           named_parameters=named()) for own in (first, second)]
    for step in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(model, comm, step)
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(model.parameters(), by_reducer(comm, "dense", 2).parameters()):
        torch.testing.assert_close(mine, other)  # in other buckets, so MPI may add otherwise
    assert optimizers[1].reducer.averager.named[0][1] is second[0]


def test_synchronize_then_clip_then_step(hvd, comm):
    model, optimizer = made(hvd)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    other = network()
    own = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    mpicomp.DistributedOptimizer(own, other.named_parameters(), "dense", comm)
    for step in range(2):
        optimizer.zero_grad()
        backward(model, comm, step)
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        with optimizer.skip_synchronize():
            optimizer.step()
        scheduler.step()
        own.zero_grad()
        backward(other, comm, step)
        mpicomp.clip_grad_norm_(own, 0.01)
        own.step()
        own.param_groups[0]["lr"] *= 0.5
    assert digest(model.parameters()) == digest(other.parameters())
    state = optimizer.state_dict()
    assert state["param_groups"][0]["lr"] == optimizer.param_groups[0]["lr"] == 0.025
    optimizer.load_state_dict(state)


def test_a_sum_in_place_of_the_mean(hvd, comm):
    w = torch.nn.Parameter(torch.zeros(3))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([w], lr=1.0), [("w", w)], op=hvd.Sum)
    (w * (hvd.rank() + 1.0)).sum().backward()
    optimizer.step()
    assert w.tolist() == 3 * [-hvd.size() * (hvd.size() + 1) / 2]


def test_zero_grad_between_backward_and_step_is_refused(hvd, comm):
    model, optimizer = made(hvd)
    before = digest(model.parameters())
    backward(model, comm, 0)
    text = same_error(comm, SpecError, lambda: mute(optimizer.zero_grad))
    assert "optimizer.reducer.discard()" in text
    optimizer.synchronize()
    optimizer.zero_grad()
    assert digest(model.parameters()) == before
    backward(model, comm, 0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    replicas_are_identical(comm, model)
    assert digest(model.parameters()) != before


def test_closures_may_call_zero_grad(hvd, comm):
    model = network()
    optimizer = hvd.DistributedOptimizer(torch.optim.LBFGS(model.parameters(), max_iter=3),
                                         model.named_parameters())
    x, y = examples(comm, 0)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    replicas_are_identical(comm, model)


def test_nan_is_an_error_of_step_on_all_ranks(hvd, comm):
    model, optimizer = made(hvd)
    before = digest(model.parameters())
    for way in (optimizer.step, lambda: (optimizer.synchronize(), optimizer.step())):
        backward(model, comm, 0, factor=float("nan") if hvd.rank() == 0 else 1.0)
        assert "(rank 0: " in same_error(comm, NonFiniteError, way)
        optimizer.zero_grad()
        assert digest(model.parameters()) == before
    backward(model, comm, 0)
    optimizer.step()
    replicas_are_identical(comm, model)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_skips_alike_on_all_ranks(hvd, comm, fused):
    model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused),
        named_parameters=model.named_parameters())
    seen = []
    for step in range(3):
        optimizer.zero_grad()
        x, y = examples(comm, 0)
        loss = cross_entropy(model(x), y)
        if step == 1 and hvd.rank() == hvd.size() - 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        seen.append((scaler.get_scale(), digest(model.parameters())))
    assert [scale for scale, _ in seen] == [4.0, 2.0, 2.0]
    assert seen[0][1] == seen[1][1] != seen[2][1]
    replicas_are_identical(comm, model)


@pytest.mark.mpi(min_size=2)
def test_a_scaler_without_synchronize_does_not_part_the_ranks(hvd, comm):
    """Only the rank with the Inf would skip."""
    model, optimizer = made(hvd)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x, y = examples(comm, 0)
    loss = cross_entropy(model(x), y) * (float("inf") if hvd.rank() == 0 else 1.0)
    scaler.scale(loss).backward()
    assert "rank 0: " in same_error(comm, NonFiniteError, lambda: scaler.step(optimizer))


def test_a_copy_refuses_to_step(hvd, comm):
    model, optimizer = made(hvd)
    other = copy.deepcopy(optimizer)
    assert "is a copy of an optimizer" in same_error(comm, SpecError, other.step)
    backward(model, comm, 0)
    optimizer.step()
    replicas_are_identical(comm, model)


def test_closed_it_is_the_optimizer_that_it_was(hvd, comm):
    model, optimizer = made(hvd, backward_passes_per_step=2)
    backward(model, comm, 0)
    optimizer.step()
    optimizer.reducer.close()
    for _ in range(3):
        backward(model, comm, 0)
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.reducer.step == 1


def test_what_is_refused(hvd, comm):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def refused(names=None, **keywords):
        names = list(model.named_parameters()) if names is None else names
        return same_error(comm, SpecError,
                          lambda: hvd.DistributedOptimizer(optimizer, names, **keywords))

    assert "no Adasum" in refused(op=hvd.Adasum)
    assert "hvd.Average or hvd.Sum for gradients" in refused(op=hvd.Min)
    assert "gradient_predivide_factor=2.0" in refused(gradient_predivide_factor=2.0)
    assert "buckets" in refused(num_groups=2) and "buckets" in refused(groups=2)
    assert 'hvd.Compression.of("onebit")' in refused(compression="onebit")
    assert "backward_passes_per_step=0" in refused(backward_passes_per_step=0)
    assert "pass model.named_parameters(), not" in refused(list(model.parameters()))
    text = refused(list(model.named_parameters())[1:])
    assert "1 parameters of the optimizer have no name, the first of shape [6, 1, 3, 3]" in text
    assert not hasattr(optimizer, "synchronize")


# ---- tensors ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16,
                                   torch.int32, torch.int64, torch.uint8])
def test_allreduce(hvd, dtype):
    """Ranks 0 ... P-1 give r, r + 1, r + 2 times 2: sums are known."""
    p = hvd.size()
    mine = (2 * (torch.arange(3) + hvd.rank())).to(dtype)
    total = p * (p - 1) + 2 * p * torch.arange(3)
    expected = {hvd.Sum: total, hvd.Average: total // p,  # of even numbers: whole
                hvd.Min: 2 * torch.arange(3), hvd.Max: 2 * (torch.arange(3) + p - 1)}
    for op, values in expected.items():
        found = hvd.allreduce(mine, op=op)
        assert found.dtype == dtype and torch.equal(found, values.to(dtype)), op
    assert torch.equal(mine, (2 * (torch.arange(3) + hvd.rank())).to(dtype))
    assert torch.equal(hvd.allreduce(mine, average=False), total.to(dtype))
    assert torch.equal(hvd.allreduce_(mine, op=hvd.Sum), total.to(dtype))
    assert torch.equal(mine, total.to(dtype))


def test_allreduce_of_odd_shapes_and_with_factors(hvd):
    rank, p = hvd.rank(), hvd.size()
    assert hvd.allreduce(torch.tensor(float(rank))).item() == (p - 1) / 2
    assert hvd.allreduce(torch.empty(0, 3)).shape == (0, 3)
    turned = torch.arange(6.0).view(2, 3).t()
    assert torch.equal(hvd.allreduce(turned, op=hvd.Sum), p * turned)
    assert torch.equal(hvd.allreduce(turned, op=hvd.Sum, prescale_factor=0.5,
                                     postscale_factor=4.0), 2 * p * turned)
    assert hvd.allreduce(torch.tensor([2.0]), op=hvd.Product).item() == 2.0**p
    assert hvd.allreduce(torch.tensor([-1 - rank])).item() == -1 - (p - 1) // 2  # cut towards 0


def test_allreduce_compressed(hvd, comm):
    x = torch.tensor([1.0, 1.0 + 2**-12])  # half precision has 10 bits behind the point
    assert hvd.allreduce(x, compression=hvd.Compression.fp16).tolist() == [1.0, 1.0]
    assert hvd.allreduce(x, op=hvd.Sum, compression=hvd.Compression.of("bf16")
                         ).tolist() == 2 * [hvd.size()]
    assert hvd.allreduce(torch.tensor([3]), compression=hvd.Compression.fp16).tolist() == [3]
    text = same_error(comm, SpecError,
                      lambda: hvd.allreduce(x, compression=hvd.Compression.of("onebit")))
    assert "keeps a residual" in text and "Compression.fp16" in text


@pytest.mark.parametrize("spec", ["terngrad", "randomk:scale=yes,density=0.2"])
def test_methods_that_draw_draw_anew_in_each_call(hvd, spec):
    """So every element has its turn, and all ranks get the same."""
    x = torch.linspace(0.2, 1.0, 20)
    compression = hvd.Compression.of(spec)
    found = torch.stack([hvd.allreduce(x, compression=compression) for _ in range(30)])
    assert len({tuple(row) for row in found.tolist()}) > 3
    assert (found != 0).any(dim=0).all()
    assert hvd.allgather_object(digest([found])) == hvd.size() * [digest([found])]


def test_the_factors_of_a_compressed_tensor_are_applied_in_float32(hvd):
    """60000 + 60000 and 60000 * 8 are no numbers of 16 bits, what becomes of them is."""
    x, p = torch.tensor([60000.0], dtype=torch.float16), hvd.size()
    for compression in (hvd.Compression.none, hvd.Compression.fp16):
        how = dict(op=hvd.Sum, compression=compression)
        assert hvd.allreduce(x, postscale_factor=1 / p, **how).tolist() == [60000]
        assert hvd.allreduce(x, prescale_factor=0.5, postscale_factor=2 / p,
                             **how).tolist() == [60000]
    bf16 = hvd.Compression.of("bf16")
    assert hvd.allreduce(x, compression=bf16, prescale_factor=8.0, postscale_factor=0.125
                         ).tolist() == [59904]  # rounded to 8 bits
    needed = torch.ones(2, requires_grad=True)
    hvd.allreduce(needed, compression=bf16, prescale_factor=2.0, postscale_factor=3.0
                  ).sum().backward()
    assert needed.grad.tolist() == [6.0, 6.0]


def test_integers_do_not_overflow_on_the_way(hvd):
    p = hvd.size()
    assert hvd.allreduce(torch.tensor([200], dtype=torch.uint8)).tolist() == [200]
    assert hvd.allreduce(torch.tensor([2**31 - 1], dtype=torch.int32)).tolist() == [2**31 - 1]
    odd = torch.tensor([2**30 + 1])  # float32 has it not
    for keyword in ("prescale_factor", "postscale_factor"):
        assert hvd.allreduce(odd, op=hvd.Sum, **{keyword: 2.0}).tolist() == [2 * p * odd.item()]
    assert hvd.allreduce(torch.tensor([2**53 + 1]), op=hvd.Max).tolist() == [2**53 + 1]
    parts = torch.tensor([3 * hvd.rank()])  # cut once: (p - 1) * 3 / 2 * 2
    assert hvd.allreduce(parts, postscale_factor=2.0).tolist() == [3 * (p - 1)]
    small = torch.tensor([100], dtype=torch.uint8)
    assert hvd.allreduce(small, op=hvd.Sum, prescale_factor=2.5, postscale_factor=1 / p
                         ).tolist() == [250]


@pytest.mark.parametrize("spec, why", [
    ("fp16:delay=1", "unlike the later ones"), ("terngrad:warmup=5", "unlike the later ones"),
    ("dense:exchange=silent", "no rank gets the mean"),
    ("fp16:exchange=server", "no rank gets the mean"),
    ("strom:feedback=no,exchange=peers", "no rank gets the mean"),
    ("rule(*.bias:dense; onebit)", "keeps a residual"), ("auto", "for many steps")])
def test_what_cannot_exchange_one_tensor_is_refused(hvd, comm, spec, why):
    text = same_error(comm, SpecError, lambda: hvd.allreduce(
        torch.ones(3), compression=hvd.Compression.of(spec)))
    assert why in text and "Compression.fp16" in text


def test_nan_in_a_compressed_tensor_is_an_error_on_all_ranks(hvd, comm):
    bad = torch.tensor([float("nan") if hvd.rank() == 0 else 1.0])
    assert "rank 0" in same_error(comm, NonFiniteError, lambda: hvd.allreduce(
        bad, compression=hvd.Compression.fp16))
    assert hvd.allreduce(bad).isnan().all()


def test_of_a_view_only_its_own_elements_are_gathered(hvd, monkeypatch):
    sent, inner = [], mpi.allgather
    monkeypatch.setattr(mpi, "allgather", lambda comm, value, *rest: (
        sent.append(len(pickle.dumps(value))), inner(comm, value, *rest))[1])
    assert hvd.allgather(torch.zeros(100_000)[:2]).shape == (2 * hvd.size(),)
    assert max(sent) < 4000


def test_allgather_with_other_numbers_of_rows(hvd):
    mine = torch.full((hvd.rank() + 1, 2), hvd.rank())
    expected = torch.cat([torch.full((r + 1, 2), r) for r in range(hvd.size())])
    assert torch.equal(hvd.allgather(mine), expected)
    brain = torch.ones(hvd.rank(), dtype=torch.bfloat16)  # none on rank 0
    assert hvd.allgather(brain).shape == (hvd.size() * (hvd.size() - 1) // 2,)


def test_broadcast_and_objects(hvd):
    root = hvd.size() - 1
    mine = torch.tensor([hvd.rank(), 7])
    assert hvd.broadcast(mine, root).tolist() == [root, 7] and mine[0] == hvd.rank()
    assert hvd.broadcast_(mine, root_rank=root) is mine and mine[0] == root
    assert hvd.broadcast_object(["from", hvd.rank()], root) == ["from", root]
    assert hvd.allgather_object({hvd.rank()}) == [{r} for r in range(hvd.size())]
    parameters = [("w", torch.full((2,), float(hvd.rank())))]
    hvd.broadcast_parameters(parameters, root_rank=root)
    assert parameters[0][1].tolist() == [root, root]


def test_handles(hvd):
    mine, p = torch.tensor([float(hvd.rank())]), hvd.size()
    handles = [hvd.allreduce_async(mine, op=hvd.Sum), hvd.allgather_async(mine),
               hvd.broadcast_async(mine, 0), hvd.allreduce_async_(mine),
               hvd.broadcast_async_(mine, 0)]
    assert all(hvd.poll(handle) for handle in handles)
    found = [hvd.synchronize(handle).tolist() for handle in handles]
    mean = [(p - 1) / 2]
    assert found == [[p * mean[0]], list(map(float, range(p))), [0.0], mean, mean]
    assert hvd.synchronize(handles[-1]) is mine


def test_gradients_pass_through(hvd):
    """Of sum(weight * result), each rank with another weight: as the docstrings say."""
    p, rank = hvd.size(), hvd.rank()

    def gradient(of, weight):
        x = torch.full((2,), 1.0 + rank, requires_grad=True)
        (of(x) * weight).sum().backward()
        return x.grad.tolist()

    weight, mean = float(rank), (p - 1) / 2
    assert gradient(hvd.allreduce, weight) == [mean, mean]
    assert gradient(lambda x: hvd.allreduce(x, op=hvd.Sum), weight) == [p * mean, p * mean]
    assert gradient(hvd.allgather, torch.arange(2 * p) * weight) == [
        2 * rank * mean, (2 * rank + 1) * mean]
    assert gradient(lambda x: hvd.broadcast(x, 0), weight) == 2 * [0.0 if rank else p * mean]
    scaled = gradient(lambda x: hvd.allreduce(x, compression=hvd.Compression.fp16), weight)
    assert np.allclose(scaled, mean)


# ---- what is wrong ----


@pytest.mark.mpi(min_size=2)
def test_ranks_that_differ_get_the_same_error(hvd, comm):
    def call(first, others):
        return same_error(comm, MismatchError, first if hvd.rank() == 0 else others)

    x = torch.ones(2)
    assert "shape: [3] there, [2] on rank 0" in call(
        lambda: hvd.allreduce(x), lambda: hvd.allreduce(torch.ones(3)))
    assert "dtype" in call(lambda: hvd.allgather(x), lambda: hvd.allgather(x.int()))
    assert "call: allgather there, allreduce on rank 0" in call(
        lambda: hvd.allreduce(x), lambda: hvd.allgather(x))
    assert "op: sum there, average" in call(
        lambda: hvd.allreduce(x), lambda: hvd.allreduce(x, op=hvd.Sum))
    assert "call: allreduce there, broadcast_parameters on rank 0" in call(
        lambda: hvd.broadcast_(x, 0), lambda: hvd.allreduce(x))
    assert "root" in call(lambda: hvd.broadcast_object(1, 0), lambda: hvd.broadcast_object(1, 1))
    assert "rank 0: a function that cannot be pickled" in call(
        lambda: hvd.allgather_object(lambda: 0), lambda: hvd.allgather_object(0))
    for factor in ("prescale_factor", "postscale_factor"):
        assert "factors" in call(
            lambda: hvd.allreduce(x, compression=hvd.Compression.fp16, **{factor: 2.0}),
            lambda: hvd.allreduce(x, compression=hvd.Compression.fp16))
    assert hvd.allreduce(x, op=hvd.Sum).tolist() == [hvd.size(), hvd.size()]


@pytest.mark.mpi(min_size=2)
def test_bad_input_of_one_rank_is_an_error_on_all(hvd, comm):
    """The others come with a right call, and do not wait."""
    x = torch.ones(2)
    model, optimizer = made(hvd)
    for text, bad, good in (
            ("op=3", lambda: hvd.allreduce(x, op=3), lambda: hvd.allreduce(x)),
            ("op=3", lambda: hvd.allreduce_(x, op=3), lambda: hvd.allreduce_(x)),
            ("leave out average", lambda: hvd.allreduce(x, average=True, op=hvd.Sum),
             lambda: hvd.allreduce(x, op=hvd.Sum)),
            ("tensor.detach()", lambda: hvd.allreduce(x.clone().requires_grad_(), op=hvd.Max),
             lambda: hvd.allreduce(x, op=hvd.Max)),
            ("compression='fp16'", lambda: hvd.allreduce(x, compression="fp16"),
             lambda: hvd.allreduce(x)),
            ("float found", lambda: hvd.broadcast(1.0, 0), lambda: hvd.broadcast(x, 0)),
            ("float found", lambda: hvd.broadcast_(1.0, 0), lambda: hvd.broadcast_(x, 0)),
            ("root_rank=99", lambda: hvd.broadcast_object(1, 99),
             lambda: hvd.broadcast_object(1, 0)),
            ("AttributeError", lambda: hvd.DistributedOptimizer(None),
             lambda: hvd.DistributedOptimizer(torch.optim.SGD(network().parameters()))),
            ("passes: 2 there, 3 on rank 0", lambda: optimizer.set_backward_passes_per_step(3),
             lambda: optimizer.set_backward_passes_per_step(2)),
            ("backward_passes_per_step=0", lambda: optimizer.set_backward_passes_per_step(0),
             lambda: optimizer.set_backward_passes_per_step(2))):
        assert text in same_error(comm, MismatchError, bad if hvd.rank() == 0 else good)
    assert hvd.allreduce(x, op=hvd.Sum).tolist() == [hvd.size(), hvd.size()]


def test_another_number_of_passes_begins_with_the_next_step(hvd, comm):
    model, optimizer = made(hvd, backward_passes_per_step=3)
    backward(model, comm, 0)
    optimizer.set_backward_passes_per_step(2)
    for _ in range(2):  # the second and third of this step
        backward(model, comm, 0)
    optimizer.step()
    optimizer.zero_grad()
    for _ in range(2):
        backward(model, comm, 0)
    assert "expected at most 2" in same_error(
        comm, MismatchError, lambda: mute(backward, model, comm, 0))
    optimizer.reducer.discard()
    assert "at least 1" in same_error(
        comm, SpecError, lambda: optimizer.set_backward_passes_per_step(0))


def test_bad_input(hvd, comm):
    def text(function):
        return same_error(comm, SpecError, function)

    assert "float found, expected a torch tensor" in text(lambda: hvd.allreduce(0.5))
    assert "torch.uint8" in text(lambda: hvd.allreduce(torch.ones(2) > 0))
    assert "Adasum" in text(lambda: hvd.allreduce(torch.ones(2), op=hvd.Adasum))
    assert "leave out average" in text(
        lambda: hvd.allreduce(torch.ones(2), average=True, op=hvd.Sum))
    assert "op=3" in text(lambda: hvd.allreduce(torch.ones(2), op=3))
    assert "tensor.reshape(1)" in text(lambda: hvd.allgather(torch.tensor(1)))
    assert "to_dense" in text(lambda: hvd.allreduce(torch.ones(2).to_sparse()))
    assert f"expected a rank from 0 to {hvd.size() - 1}" in text(
        lambda: hvd.broadcast_object(1, hvd.size()))
    needed = torch.ones(2, requires_grad=True)
    assert "tensor.detach()" in text(lambda: hvd.allreduce(needed, op=hvd.Max))
    if hvd.size() > 1:
        assert "equally often" in text(lambda: mute(hvd.join))
    else:
        assert hvd.join() == 0


def test_init_and_shutdown(hvd, comm):
    assert (hvd.rank(), hvd.size()) == (comm.rank, comm.size)
    assert 0 <= hvd.local_rank() < hvd.local_size() <= hvd.size()
    every = hvd.allgather_object((hvd.cross_rank(), hvd.local_rank()))
    assert len(set(every)) == hvd.size() and max(every)[0] < hvd.cross_size() <= hvd.size()
    assert hvd.is_homogeneous() or hvd.cross_size() > 1
    hvd.init()  # once more is nothing
    assert hvd.size() == comm.size and hvd.is_initialized()
    hvd.barrier()
    hvd.shutdown()
    hvd.shutdown()
    assert not hvd.is_initialized()
    assert "call it first" in same_error(comm, SpecError, hvd.rank)
    hvd.init(comm)
    hvd.barrier()
