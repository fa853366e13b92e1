"""What optimizers may step on, and when a step begins and ends where none is attached."""

import gc
import threading

import numpy as np
import pytest
import torch
from training import (
    examples,
    give,
    network,
    outcome,
    parameters,
    replicas_are_identical,
    same_error,
)

import mpicomp
from mpicomp import MismatchError, NonFiniteError, SpecError

pytestmark = pytest.mark.mpi


def make(comm, spec="dense", **keywords):
    """(named parameters, their Reducer): a of 6 elements, b of 4."""
    named = parameters(a=(2, 3), b=4)
    return named, mpicomp.Reducer(named, spec, comm, **keywords)


def mean(comm, values):
    """Of values(rank) over ranks."""
    return sum(map(values, range(comm.size))) / comm.size


# ---- parameters that nobody exchanges -------------------------------------------------------


def test_an_optimizer_with_a_parameter_that_the_reducer_does_not_know(comm):
    named, reducer = make(comm)
    stranger = torch.nn.Parameter(torch.ones(5, 2))
    optimizer = torch.optim.SGD([*(p for _, p in named), stranger], lr=1.0)
    reducer.attach(optimizer)
    give(named, [np.ones((2, 3)), np.ones(4)])
    optimizer.step()  # it has no gradient
    stranger.grad = torch.ones(5, 2)
    give(named, [np.ones((2, 3)), np.ones(4)])
    with pytest.raises(SpecError, match=r"1 parameters.*\[5, 2\].*named_parameters\(\)"):
        optimizer.step()
    assert stranger.tolist() == [[1.0] * 2] * 5


@pytest.mark.parametrize("how", ["unfrozen", "add_param_group"])
def test_a_parameter_that_comes_later(how, comm):
    named, other = parameters(a=(2, 3)), torch.nn.Parameter(torch.zeros(2))
    other.requires_grad_(how != "unfrozen")
    known = [p for _, p in named] + [other] * (how == "unfrozen")
    optimizer = torch.optim.SGD(known, lr=1.0)
    mpicomp.DistributedOptimizer(optimizer, [*named, ("b", other)][:1 + (how == "unfrozen")],
                                 comm=comm)
    give(named, [np.ones((2, 3))])
    optimizer.step()
    if how == "unfrozen":
        other.requires_grad_()
    else:
        optimizer.add_param_group({"params": [other]})
    other.sum().backward()
    with pytest.raises(SpecError, match="unfreezing a layer"):
        optimizer.step()


def test_two_reducers_may_share_an_optimizer(comm):
    named = parameters(a=(2, 3), b=4)
    optimizer = torch.optim.SGD([p for _, p in named], lr=1.0)
    for pair in named:
        mpicomp.Reducer([pair], "dense", comm).attach(optimizer)
    give(named, [np.full((2, 3), comm.rank), np.full(4, comm.rank)])
    optimizer.step()
    expected = -mean(comm, float)
    assert all((p == expected).all() for _, p in named)


# ---- a closure's loss -----------------------------------------------------------------------


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_the_loss_of_a_closure_is_that_of_all_ranks(as_tensor, average, comm):
    named, reducer = make(comm, average=average)
    optimizer = torch.optim.SGD([p for _, p in named], lr=0.0)
    reducer.attach(optimizer)
    loss = optimizer.step(lambda: torch.tensor(comm.rank + 1.0) if as_tensor else comm.rank + 1.0)
    assert float(loss) == mean(comm, lambda r: r + 1.0) * (1 if average else comm.size)
    assert isinstance(loss, torch.Tensor) == as_tensor


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_decides_alike_on_ranks_with_other_examples(search, comm):
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=6, line_search_fn=search)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), comm=comm)
    x, y = examples(comm, 0)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x + comm.rank), y)
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    replicas_are_identical(comm, model)


# ---- without an optimizer -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["by hand", "zeroed", "backward"])
def test_finish_without_an_optimizer_is_one_step_after_the_other(how, comm):
    """Of gradients in every way; one rank has none in the second step."""
    named, reducer = make(comm)
    idle = comm.size - 1 or None
    for step in range(3):
        for _, p in named:
            p.grad = p.grad.zero_() if how == "zeroed" and step else None
        if step == 1 and comm.rank == idle:
            pass  # no examples
        elif how == "backward" or how == "zeroed":
            give(named, [np.full(p.shape, comm.rank + step) for _, p in named])
        else:
            for _, p in named:
                p.grad = torch.full_like(p, comm.rank + step)
        reducer.finish()
        rest = [r + step for r in range(comm.size) if step != 1 or r != idle]
        assert all((p.grad - sum(rest) / comm.size).abs().max() < 1e-6 for _, p in named), step
        reducer.finish()  # once more changes nothing
        assert reducer.step == step + 1


def test_clipping_is_not_the_beginning_of_a_step(comm):
    named, reducer = make(comm)
    give(named, [np.ones((2, 3)), np.ones(4)])
    reducer.finish()
    torch.nn.utils.clip_grad_norm_([p for _, p in named], 0.1)
    reducer.finish()
    assert reducer.step == 1 and float(named[0][1].grad[0, 0]) < 0.1


# ---- steps that went wrong ------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["dense", "onebit", "strom:tau=0.5"])
def test_after_a_refused_step_nothing_local_is_left_to_step_on(spec, comm):
    named, reducer = make(comm, spec)
    optimizer = torch.optim.SGD([p for _, p in named], lr=1.0)
    reducer.attach(optimizer)
    odd = comm.size - 1
    give(named, [np.full((2, 3), comm.rank + (np.nan if comm.rank == odd else 0)), np.ones(4)])
    with pytest.raises(NonFiniteError):
        optimizer.step()
    optimizer.step()
    assert all((p == 0).all() for _, p in named)
    if comm.rank != odd:  # one rank has no examples after it
        give(named, [np.ones((2, 3)), np.ones(4)])
    optimizer.step()
    replicas_are_identical(comm, torch.nn.ParameterList([p for _, p in named]))
    assert comm.size == 1 or not (named[0][1] == 0).all()


@pytest.mark.parametrize("spec", ["dense", "onebit"])
def test_no_sync_after_the_exchange_has_begun(spec, comm):
    """What it would add to is under way already."""
    named, reducer = make(comm, spec)
    give(named, [np.ones((2, 3)), np.ones(4)])
    with pytest.raises(MismatchError, match="last one, and only those"):
        with reducer.no_sync():
            give(named, [np.ones((2, 3)), np.ones(4)])
    reducer.finish()


def test_a_state_is_not_loaded_in_the_middle_of_a_step(comm):
    """What is under way would replace the residual that was loaded."""
    named, reducer = make(comm, "onebit")
    state = reducer.state_dict()
    give(named, [np.ones((2, 3)), np.ones(4)])
    with pytest.raises(MismatchError, match="load_state_dict.. in the middle of a step"):
        reducer.load_state_dict(state)
    reducer.finish()
    reducer.load_state_dict(state)
    assert reducer.step == 0


def test_close_takes_the_optimizers_hooks_off_as_well(comm):
    named, reducer = make(comm)
    optimizer = torch.optim.SGD([p for _, p in named], lr=1.0)
    reducer.attach(optimizer)
    give(named, [np.ones((2, 3)), np.ones(4)])
    optimizer.step()
    sent = reducer.stats.sent
    reducer.close()
    second = mpicomp.Reducer(named, "onebit", comm).attach(optimizer)
    give(named, [np.ones((2, 3)), np.ones(4)])
    optimizer.step()
    assert (reducer.step, reducer.stats.sent, second.step) == (1, sent, 1)


@pytest.mark.parametrize("spec", ["dense", "onebit", "bf16:exchange=allgather"])
def test_a_reducer_that_is_dropped_in_the_middle_of_a_step(spec, comm):
    """MPI may still write to its arrays, which must stay where they are."""
    for _ in range(3):
        named = parameters(a=(200, 30), b=(4000,))
        reducer = mpicomp.Reducer(named, spec, comm, bucket_bytes=4096)
        for step in range(2):
            give(named, [np.ones((200, 30)), np.ones(4000)])
            if step == 0:
                reducer.finish()
        reducer.close()
        del reducer, named
        gc.collect()
        junk = [np.full(5000, 7.0) for _ in range(50)]
        comm.barrier()
        assert all((array == 7).all() for array in junk)


# ---- gradients and parameters of other shapes in memory -------------------------------------


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_a_fused_optimizer_with_a_parameter_that_is_not_contiguous(kind, comm):
    torch.manual_seed(0)
    initial = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    gradient = torch.randn(3, 4, 5, 6)
    results = []
    for distributed in (False, True):
        p = torch.nn.Parameter(initial.clone(memory_format=torch.preserve_format))
        optimizer = getattr(torch.optim, kind)([p], lr=0.1, fused=True)
        if distributed:
            mpicomp.DistributedOptimizer(optimizer, [("p", p)], comm=comm)
        for _ in range(3):
            optimizer.zero_grad()
            (p * gradient).sum().backward()
            optimizer.step()
        results.append(p.detach())
    assert not p.is_contiguous() and p.grad.stride() == p.stride()
    assert torch.allclose(*results, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_gradients_with_a_graph_do_not_grow_one_in_the_bucket(comm):
    named, reducer = make(comm)
    a = named[0][1]
    for _ in range(3):
        (a.t().reshape(-1) ** 2).sum().backward(create_graph=True)
        reducer.finish()
        assert all(slot.view.grad_fn is None for b in reducer.averager.buckets for slot in b.slots)
        a.grad = None


@pytest.mark.mpi(min_size=2)
def test_two_reducers_where_one_rank_has_no_examples_in_the_first_step(comm):
    """Its steps come in another order than the gradients of the others."""
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)
    models = torch.nn.ModuleList([first, second])
    mpicomp.broadcast_parameters(models, comm)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    for optimizer, model in zip(optimizers, models):
        mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), comm=comm)
    if comm.rank == 0:
        second(first(torch.ones(1, 3))).sum().backward()
    assert not any(outcome(comm, lambda: [optimizer.step() for optimizer in optimizers]))
    replicas_are_identical(comm, models)


# ---- optimizers and Reducers that do not belong together --------------------------------------


def test_two_open_reducers_over_the_same_parameters(comm):
    """Seen to fail before: where a parameter was unused on a rank, p.grad was a mean of means."""
    named, first = make(comm)
    second = mpicomp.Reducer(named, "dense", comm)
    if comm.rank == 0:
        give(named, [np.full((2, 3), comm.size), np.full(4, comm.size)])
    second.finish()
    assert all((p.grad == 1).all() for _, p in named)
    assert "another open Reducer has taken the gradient of 'b'" in same_error(
        comm, SpecError, first.finish)


def test_an_optimizer_that_is_made_anew_must_be_attached(comm):
    """Seen to fail before: it stepped on this rank's own gradients, without a word."""
    named, reducer = make(comm)
    reducer.attach(torch.optim.SGD([p for _, p in named], lr=1.0))
    again = torch.optim.SGD([p for _, p in named], lr=1.0)
    give(named, [np.ones((2, 3)), np.ones(4)])
    with pytest.raises(SpecError, match=r"another SGD than.*reducer.attach\(optimizer\)"):
        again.step()
    reducer.attach(again)
    again.step()
    assert all((p == -1).all() for _, p in named)
    other = torch.nn.Parameter(torch.zeros(3))
    other.grad = torch.ones(3)
    torch.optim.SGD([other], lr=1.0).step()  # of other parameters
    assert (other == -1).all()


def test_what_is_no_optimizer_is_not_attached(comm):
    class Wrapper:
        param_groups = ()

    _, reducer = make(comm)
    with pytest.raises(SpecError, match="Wrapper found, expected a torch.optim.Optimizer"):
        reducer.attach(Wrapper())


@pytest.mark.parametrize("spec", ["onebit:delay=1", "onebit:exchange=peers,staleness=0"])
def test_a_closure_where_its_gradient_would_be_another_calls(spec, comm):
    named, reducer = make(comm, spec)
    optimizer = torch.optim.SGD([p for _, p in named], lr=1.0)
    reducer.attach(optimizer)
    assert "step(closure)" in outcome(comm, lambda: optimizer.step(lambda: 1.0))[comm.rank]


def test_a_closure_that_moves_parameters_by_what_is_a_ranks_own(comm):
    """As SAM does. Seen to fail before: the first comparison of parameters came after it."""
    named, reducer = make(comm)
    optimizer = torch.optim.SGD([p for _, p in named], lr=1.0)
    reducer.attach(optimizer)

    def closure():
        with torch.no_grad():
            for _, p in named:
                p += comm.rank
        give(named, [np.ones((2, 3)), np.ones(4)])
        with torch.no_grad():
            for _, p in named:
                p -= comm.rank

    for step in range(2):
        optimizer.zero_grad()
        optimizer.step(closure)
    assert all((p == -2).all() for _, p in named)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch before 2.10")
@pytest.mark.parametrize("dtype, kind", [(torch.bfloat16, torch.float32),
                                         (torch.float32, torch.bfloat16)])
def test_gradients_of_another_dtype_than_their_parameters(dtype, kind, comm):
    """One rank has no gradient. Seen to fail before: a torch error, on some ranks only."""
    named = [(name, torch.nn.Parameter(p.detach().to(dtype)))
             for name, p in parameters(a=(2, 3), b=4)]
    for _, p in named:
        p.grad_dtype = kind
    reducer = mpicomp.Reducer(named, "dense", comm)
    if comm.rank == 0:
        give(named, [np.full((2, 3), comm.size), np.full(4, comm.size)])
    reducer.finish()
    assert all(p.grad.dtype == kind and (p.grad == 1).all() for _, p in named)


def test_backward_from_several_threads(comm):
    """Seen to fail before: internal errors by timing. torch allows it, DDP has a lock for it."""
    parts = [parameters(**{f"p{i}_{k}": (50, 4) for k in range(4)}) for i in range(3)]
    named = [pair for part in parts for pair in part]
    reducer = mpicomp.Reducer(named, "onebit", comm, bucket_bytes=1000)
    for step in range(4):
        for _, p in named:
            p.grad = None
        ones = [np.ones((50, 4))] * 4
        threads = [threading.Thread(target=give, args=(part, ones)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        reducer.finish()
        assert all((p.grad == 1).all() for _, p in named)
