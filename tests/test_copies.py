"""Copies by copy, pickle and torch.save: of models they work, of optimizers they refuse to step."""

import copy
import io
import pickle

import pytest
import torch
from training import digest, examples, network, outcome, replicas_are_identical, same_error

import mpicomp
from mpicomp.errors import SpecError


def unpickled(thing):
    return pickle.loads(pickle.dumps(thing))


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = pytest.mark.parametrize("way", [copy.deepcopy, unpickled, saved], ids=lambda w: w.__name__)


class Whole(torch.optim.SGD):
    """Somebody's own, which copies all that it has."""

    def __getstate__(self):
        return self.__dict__.copy()


def trained(comm, kind=torch.optim.SGD, method="onebit"):
    """A model and an optimizer with a Reducer, after a step."""
    model = network()
    optimizer = mpicomp.DistributedOptimizer(kind(model.parameters(), lr=0.1, momentum=0.9),
                                             model.named_parameters(), method, comm)
    step(comm, model, optimizer, 0)
    return model, optimizer


def step(comm, model, optimizer, number):
    optimizer.zero_grad()
    x, y = examples(comm, number)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.mpi
@WAYS
@pytest.mark.parametrize("kind", [torch.optim.SGD, Whole])
def test_a_copied_optimizer_refuses_to_step_and_says_what_to_type(comm, kind, way):
    pair = trained(comm, kind)
    model, optimizer = way(pair)
    before = digest(model.parameters())
    text = same_error(comm, SpecError, lambda: step(comm, model, optimizer, 1))
    assert "mpicomp.DistributedOptimizer(" in text and "optimizer.reducer = None" in text
    assert digest(model.parameters()) == before
    step(comm, *pair, 1)  # the original goes on
    replicas_are_identical(comm, pair[0])


@pytest.mark.mpi
@pytest.mark.parametrize("kind", [torch.optim.SGD, Whole])
def test_a_copy_that_gets_a_reducer_goes_on_as_the_original(comm, kind):
    pair = trained(comm, kind)
    model, optimizer = copy.deepcopy(pair)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), "onebit", comm)
    optimizer.reducer.load_state_dict(pair[1].reducer.state_dict())
    for number in (1, 2):
        step(comm, *pair, number)
        step(comm, model, optimizer, number)
    assert digest(model.parameters()) == digest(pair[0].parameters())


@pytest.mark.mpi
@pytest.mark.parametrize("kind", [torch.optim.SGD, Whole])
def test_a_copy_that_is_told_so_steps_alone(comm, kind):
    model, optimizer = copy.deepcopy(trained(comm, kind))
    optimizer.reducer = None
    if comm.rank == 0:
        step(comm, model, optimizer, 1)


@pytest.mark.parametrize("close", [True, False])
def test_after_close_copies_are_plain_ones(comm, close):
    model, optimizer = trained(comm)
    if close:
        optimizer.reducer.close()
    errors = outcome(comm, copy.deepcopy(optimizer).step)
    assert (errors == [None]) == close


@WAYS
def test_copies_of_a_model_train_without_a_reducer(comm, way):
    model, optimizer = trained(comm)
    twin = way(model)
    own = torch.optim.SGD(twin.parameters(), lr=0.1)
    step(comm, twin, own, 1)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert digest(average.module.parameters()) == digest(model.parameters())


@WAYS
def test_whatever_holds_a_reducer_can_be_copied_and_the_copy_says_what_it_lacks(comm, way):
    _, optimizer = trained(comm)
    held = way({"reducer": optimizer.reducer, "scheduler":
                torch.optim.lr_scheduler.StepLR(optimizer, 1)})
    with pytest.raises(SpecError, match="finish is asked of a copy of a Reducer.*type  mpicomp"):
        held["reducer"].finish()
    with pytest.raises(SpecError, match="copy of an optimizer"):
        held["scheduler"].optimizer.step()


@WAYS
def test_a_copied_scaler_is_one_of_its_own(comm, way):
    model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mpicomp.Reducer(model.named_parameters(), "dense", comm, nonfinite="skip").attach(optimizer,
                                                                                      scaler)
    twin = way(scaler)
    own = torch.optim.SGD(network().parameters(), lr=0.1)
    twin.scale(sum(p.sum() for p in own.param_groups[0]["params"])).backward()
    twin.unscale_(own)
    twin.step(own)
    twin.update(16.0)
    assert (twin.get_scale(), scaler.get_scale()) == (16.0, 8.0)
