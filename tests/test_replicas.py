"""check_replicas: what differs is named on all ranks, what is equal costs little."""

import math
from collections import deque
from functools import partial

import numpy as np
import pytest
import torch
from training import (
    digest,
    examples,
    give,
    network,
    one_step,
    parameters,
    same_error,
    whole_numbers,
)

import mpicomp
from mpicomp import MismatchError, SpecError, StallError
from mpicomp.reducer.replicas import fingerprint, leaves

two = pytest.mark.mpi(min_size=2)
METHODS = ["dense", "onebit", "strom:tau=0.01", "terngrad", "onebit:delay=1",
           "onebit:exchange=sharded", "onebit:exchange=hierarchical"]


class Watched:
    """A communicator that notes how many bytes each collective call is given."""

    def __init__(self, comm):
        self.comm, self.rank, self.size, self.given = comm, comm.rank, comm.size, []

    def Iallgather(self, mine, everyone):
        self.given.append(mine.nbytes)
        return self.comm.Iallgather(mine, everyone)


def with_norm():
    """`network` with a layer that notes what it has seen."""
    model = network()
    return model.append(torch.nn.BatchNorm1d(3))


def training(comm, method="dense", model=None, **keywords):
    """(model, optimizer, a function that makes a step on this rank's examples, returns the loss)"""
    model = model or network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), method, comm, **keywords)
    return model, optimizer, partial(one_step, model, optimizer, comm)


def last_rank(comm):
    return comm.rank == comm.size - 1


@pytest.mark.mpi
@pytest.mark.parametrize("method", METHODS)
def test_replicas_of_every_synchronous_method_are_equal(method, comm):
    model, optimizer, step = training(comm, method, check_replicas_every=1)
    for number in range(3):
        step(number)
    optimizer.reducer.check_replicas(model)


@two
def test_where_all_is_equal_16_bytes_travel(comm):
    model, optimizer, step = training(comm)
    step(0)
    watched = optimizer.reducer.averager.link.comm = Watched(optimizer.reducer.comm)
    optimizer.reducer.check_replicas(model)
    assert watched.given == [16]


@two
def test_statistics_of_batch_normalisation(comm):
    model, optimizer, step = training(comm, model=with_norm())
    step(0)
    optimizer.reducer.check_replicas()  # parameters are equal
    text = same_error(comm, MismatchError, lambda: optimizer.reducer.check_replicas(model))
    for word in ("'7.running_mean'", "broadcast_parameters(model)", "convert_sync_batchnorm",
                 "first of 2 differences"):
        assert word in text, text
    mpicomp.broadcast_parameters(model, comm)
    optimizer.reducer.check_replicas(model)


@two
@pytest.mark.parametrize("method", ["dense", "onebit", "strom:tau=0.01", "terngrad"])
def test_a_scheduler_that_decides_by_a_ranks_own_loss(method, comm):
    """Found before parameters differ, and named as their cause after that."""
    model, optimizer, step = training(comm, method, check_replicas_every=2)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    step(0)
    scheduler.step(1.0)
    step(1)
    scheduler.step(2.0 if last_rank(comm) else 0.5)
    check = optimizer.reducer.check_replicas
    text = same_error(comm, MismatchError, check)
    assert "'lr of group 0 of SGD'" in text and f"0.05 on rank {comm.size - 1}" in text
    assert "comm.allreduce(loss) / comm.size" in text and "0.1 on rank" in text
    text = same_error(comm, MismatchError, lambda: check(scheduler=scheduler))
    step(2)  # parameters are no replicas any more
    text = same_error(comm, MismatchError, lambda: step(3))
    assert "'lr of group 0 of SGD', the first of" in text
    mpicomp.broadcast_parameters(model, comm)
    mpicomp.broadcast_optimizer_state(optimizer, comm)
    check(model)
    text = same_error(comm, MismatchError, lambda: check(scheduler=scheduler))
    assert "replicas differ in scheduler '" in text
    assert "scheduler.load_state_dict(comm.bcast(" in text
    scheduler.load_state_dict(comm.bcast(scheduler.state_dict()))
    check(model, scheduler=scheduler)


@two
def test_every_n_steps(comm):
    """At the end of the exchange of those steps; the step can then be made all the same."""
    model, optimizer, step = training(comm, check_replicas_every=3)
    for number in range(3):
        step(number)
    with torch.no_grad():
        model[1].bias[2] += last_rank(comm)
    step(3), step(4)
    text = same_error(comm, MismatchError, lambda: step(5))
    assert "parameter '1.bias'" in text and f"on rank {comm.size - 1}" in text
    mpicomp.broadcast_parameters(model, comm)
    mpicomp.broadcast_optimizer_state(optimizer, comm)
    optimizer.step()  # the exchange was done, its gradient is the mean
    assert optimizer.reducer.step == 6
    for number in range(6, 9):
        step(number)
    assert len(set(comm.allgather(digest(model.parameters())))) == 1


def flip(tensor):
    tensor.view(-1)[0] = -0.0 if tensor.view(-1)[0] == 0 else -tensor.view(-1)[0]


SPOILT = {
    "optimizer state 'momentum_buffer of 1.weight (SGD)'":
        (lambda model, optimizer: flip(optimizer.state[model[1].weight]["momentum_buffer"]),
         "broadcast_optimizer_state(optimizer)"),
    "optimizer state 'momentum_buffer of 6.bias (SGD)'":
        (lambda model, optimizer: optimizer.state.pop(model[6].bias), "nothing on rank"),
    "option 'weight_decay of group 0 of SGD'":
        (lambda model, optimizer: optimizer.param_groups[0].update(weight_decay=5e-324), "5e-324"),
    "option 'parameters of group 0 of SGD'":
        (lambda model, optimizer: optimizer.param_groups[0]["params"].reverse(), "checksum"),
    "parameter '4.frozen'":
        (lambda model, optimizer: flip(model[4].frozen.data), "broadcast_parameters(model)"),
    "buffer '4.seen'": (lambda model, optimizer: flip(model[4].seen), "broadcast_parameters"),
    "state '4._extra_state.a'":
        (lambda model, optimizer: setattr(model[4], "extra", {"a": 2}), "2 on rank")}


@two
@pytest.mark.parametrize("name", SPOILT)
def test_one_bit_that_differs_is_named(name, comm):
    class Linear(torch.nn.Linear):
        extra = {"a": 1}

        def get_extra_state(self):
            return self.extra

        def set_extra_state(self, state):
            self.extra = state

    model = network()
    model[4] = Linear(24, 40)
    model[4].frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    model[4].register_buffer("seen", torch.zeros(2), persistent=False)
    mpicomp.broadcast_parameters(model, comm)
    model, optimizer, step = training(comm, model=model)
    step(0)
    optimizer.reducer.check_replicas(model)
    spoil, word = SPOILT[name]
    if last_rank(comm):
        spoil(model, optimizer)
    text = same_error(comm, MismatchError, lambda: optimizer.reducer.check_replicas(model))
    assert name in text and word in text and f"rank {comm.size - 1}" in text, text


@two
def test_other_objects(comm):
    """A GradScaler's scale, a second optimizer, plain dictionaries; what raises on one rank."""
    model, optimizer, step = training(comm)
    check = optimizer.reducer.check_replicas
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (10 + last_rank(comm)))
    scaler.scale(torch.ones(1))
    assert "scaler 'scale'" in same_error(comm, MismatchError, lambda: check(scaler=scaler))
    mine = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], 0.1 * (comm.rank + 1))
    text = same_error(comm, MismatchError, lambda: check(other=mine))
    assert "'lr of group 0 of Adam 1'" in text
    text = same_error(comm, MismatchError, lambda: check(epoch={"now": comm.rank}))
    assert "epoch 'now'" in text and text.endswith("give every rank the same epoch")

    class Broken:
        def state_dict(self):
            if last_rank(comm):
                raise KeyError("oh")
            return {}

    text = same_error(comm, MismatchError, lambda: check(broken=Broken()))
    assert f"rank {comm.size - 1}: KeyError: 'oh'" in text
    everywhere = Broken()
    everywhere.state_dict = lambda: 1 / 0
    assert "ZeroDivision" in same_error(comm, SpecError, lambda: check(broken=everywhere))


@two
def test_who_is_with_whom(comm):
    """Ranks that agree are named together."""
    named = parameters(w=3)
    reducer = mpicomp.Reducer(named, "dense", comm)
    named[0][1].data.fill_(comm.rank // 2)
    if comm.size == 2:
        return reducer.check_replicas()
    text = same_error(comm, MismatchError, reducer.check_replicas)
    assert "on ranks 0, 1; " in text


@two
@pytest.mark.parametrize("exchange", ["peers", "server"])
def test_asynchronous_exchanges(exchange, comm):
    """On the way replicas differ; after deliver those of a server are equal, the optimizer's not"""
    method = f"strom:tau=0.5,exchange={exchange}"
    text = same_error(comm, SpecError, lambda: training(comm, method, check_replicas_every=2))
    assert "check_replicas_every=2" in text and "deliver()" in text
    model, optimizer, step = training(comm, method)
    reducer = optimizer.reducer
    step(0)
    with pytest.raises(MismatchError, match=r"check_replicas\(\) while.*deliver\(\)"):
        reducer.check_replicas()
    reducer.deliver()
    if exchange == "peers":
        with torch.no_grad():
            model[6].bias[0] += 1e-3 * last_rank(comm)
        assert "up to rounding" in same_error(comm, MismatchError, reducer.check_replicas)
        mpicomp.broadcast_parameters(model, comm)
    reducer.check_replicas(model)


@pytest.mark.mpi
@pytest.mark.parametrize("every", [0, -1, 1.5, "2", True])
def test_a_wrong_number_of_steps(every, comm):
    text = same_error(comm, SpecError, lambda: mpicomp.Reducer(
        parameters(w=3), "dense", comm, check_replicas_every=every))
    assert f"check_replicas_every={every!r} found" in text


@two
def test_ranks_that_would_check_in_other_steps(comm):
    text = same_error(comm, MismatchError, lambda: mpicomp.Reducer(
        parameters(w=3), "dense", comm, check_replicas_every=5 if last_rank(comm) else None))
    assert "check_replicas_every" in text


@two
def test_a_rank_that_does_not_come_is_no_hang(comm):
    reducer = mpicomp.Reducer(parameters(w=3), "dense", comm, stall_timeout=0.3)
    if comm.rank:
        with pytest.raises(StallError, match="comparing replicas"):
            reducer.check_replicas()
    comm.Barrier()


@two
def test_a_hook_of_ddp(comm):
    named = parameters(w=3)
    state = mpicomp.ddp.HookState("onebit", comm, named_parameters=named)
    optimizer = torch.optim.SGD([p for _, p in named], 0.1)
    state.check_replicas(optimizer=optimizer)
    optimizer.param_groups[0]["lr"] += last_rank(comm)
    text = same_error(comm, MismatchError, lambda: state.check_replicas(optimizer=optimizer))
    assert "'lr of group 0 of SGD'" in text
    with pytest.raises(SpecError, match="named_parameters=net"):
        mpicomp.ddp.HookState("onebit", comm).check_replicas()


@two
def test_between_backward_and_step(comm):
    """Also where a rank has no examples, and in the step that makes buckets anew."""
    model, optimizer, step = training(comm, "onebit", bucket_bytes=2000)
    for number in range(3):
        optimizer.zero_grad()
        if not last_rank(comm):
            x, y = examples(comm, number)
            torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.reducer.check_replicas(model)
        optimizer.step()
        optimizer.reducer.check_replicas(model)


@two
def test_gradients_without_an_optimizer(comm):
    named = parameters(w=(4, 3))
    reducer = mpicomp.Reducer(named, "onebit", comm, check_replicas_every=1)
    give(named, [whole_numbers(comm.rank, 0, 12)])
    reducer.finish()
    reducer.check_replicas(torch.nn.ParameterDict(dict(named)))


# ---- values as text


def test_a_text_tells_every_bit():
    numbers = [0, 0.0, -0.0, True, None, "0", math.inf, math.nan, 0.1, 0.1 + 2e-17, 1j, b"0",
               torch.tensor(0.0), torch.tensor(-0.0), torch.tensor(0), torch.zeros(1),
               torch.zeros(1, dtype=torch.float64), torch.zeros(0), torch.zeros(0, 1),
               torch.zeros(1, 1, device="meta"), np.ones(1), np.ones(1, np.float32), {1}, {1, 2},
               torch.eye(2).to_sparse(), 2 * torch.eye(2).to_sparse(), torch.eye(2),
               torch.nn.UninitializedParameter()]
    texts = list(map(fingerprint, numbers))
    assert len(set(texts)) == len(texts), sorted(texts)
    assert fingerprint(0.1) == fingerprint(np.float64(0.1)) and fingerprint(object()) == "object"


@pytest.mark.parametrize("tensor", [
    torch.arange(12.0).view(3, 4).t(), torch.ones(1, 3).expand(4, 3), torch.arange(9.0)[::3],
    torch.ones(2, dtype=torch.complex64).conj(), torch.ones(2, 3, 4, 4).to(
        memory_format=torch.channels_last), torch.ones(3, dtype=torch.bfloat16),
    torch.ones(3) > 0, torch.ones(1).as_strided((1,), (0,))])
def test_values_count_not_where_they_lie(tensor):
    fresh = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    if 0 in tensor.stride() and tensor.numel() > 1:  # expanded: a model that is built otherwise
        assert fingerprint(tensor) != fingerprint(fresh)
    else:
        assert fingerprint(tensor) == fingerprint(fresh)


def test_leaves_have_names():
    value = {"a": [1, {"b": 2}], 3: (4,), "c": deque([5]), "d": {}}
    assert list(leaves(value)) == [("a.0", 1), ("a.1.b", 2), ("3.0", 4), ("c.0", 5)]
