"""broadcast_parameters gives everything: what a state_dict leaves out, and what torch cannot write.

Where a rank has what cannot be given, the same error on all ranks names it.
"""

import pytest
import torch
from training import same_error

import mpicomp
from mpicomp import MismatchError, MpicompError, SpecError
from mpicomp.reducer.replicas import facts_of_module

pytestmark = pytest.mark.mpi
two = pytest.mark.mpi(min_size=2)


def equal(comm, model):
    """Nothing that `facts_of_module` sees of this model differs between ranks."""
    facts = comm.allgather(list(facts_of_module(model)))
    return all(other == facts[0] for other in facts)


class Plain(torch.nn.Module):
    """All kinds of buffers, filled with what differs by rank."""

    def __init__(self, value):
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((2, 2), float(value)))
        self.register_buffer("cache", torch.full((3,), float(value)), persistent=False)
        self.register_buffer("nothing", None)
        self.register_buffer("wide", torch.full((1, 3, 1), float(value)).expand(4, 3, 2))
        self.register_buffer("one", torch.tensor(float(value)).expand(5), persistent=False)
        self.register_buffer("turned", torch.full((2, 3), value + 1j).conj())


def test_buffers_that_no_state_dict_has_and_views_of_few_elements(comm):
    model = Plain(comm.rank)
    mpicomp.broadcast_parameters(model, comm, comm.size - 1)
    last = comm.size - 1
    assert model.w.eq(last).all() and model.cache.eq(last).all() and model.nothing is None
    assert model.wide.eq(last).all() and model.wide.stride() == (0, 1, 0)
    assert model.one.eq(last).all() and model.turned.eq(last - 1j).all()
    assert equal(comm, model)


def test_sparse_buffers(comm):
    """Also with another number of elements on each rank."""
    model = torch.nn.Linear(2, 2)
    dense = torch.zeros(4, 4)
    dense[:comm.rank + 1, comm.rank] = comm.rank + 1.0
    model.register_buffer("graph", dense.to_sparse())
    mpicomp.broadcast_parameters(model, comm)
    expected = torch.zeros(4, 4)
    expected[0, 0] = 1.0
    assert equal(comm, model) and torch.equal(model.graph.to_dense(), expected)


class Adapter(torch.nn.Module):
    """Saves its small part only, and one thing that is no parameter, as adapters (LoRA) do."""

    def __init__(self, value):
        super().__init__()
        self.frozen = torch.nn.Linear(3, 3)
        self.small = torch.nn.Parameter(torch.full((2,), float(value)))
        self.scale = torch.full((2,), float(value))

    def state_dict(self, *others, **named):
        return {"small": self.small.detach(), "more": {"scale": [self.scale]}}


def test_modules_with_a_state_dict_of_their_own(comm):
    torch.manual_seed(comm.rank)
    model = torch.nn.Sequential(Adapter(comm.rank))
    model = model if comm.size % 2 else model[0]  # the whole model, or a part of it
    mpicomp.broadcast_parameters(model, comm)
    adapter = model if isinstance(model, Adapter) else model[0]
    assert len(set(map(str, comm.allgather(adapter.frozen.weight.tolist())))) == 1
    assert adapter.small.eq(0).all()
    assert adapter is not model or adapter.scale.eq(0).all()


class Counter(torch.nn.Linear):
    """Keeps what is no tensor."""

    def __init__(self, value):
        super().__init__(2, 2)
        self.seen = {"steps": value, "history": torch.full((value + 1,), float(value))}

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


def test_extra_state(comm):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Counter(comm.rank + 5))
    mpicomp.broadcast_parameters(model, comm)
    assert model[1].seen["steps"] == 5 and model[1].seen["history"].tolist() == [5.0] * 6
    assert equal(comm, model)


class Deaf(Counter):
    def set_extra_state(self, state):
        raise KeyError("no such thing")


class Secret(Counter):
    def get_extra_state(self):
        return lambda: None


class Copies(torch.nn.Linear):
    """What its state_dict gives is not what it has."""

    count = 0

    def state_dict(self, *others, **named):
        return {**super().state_dict(*others, **named), "count": self.count}


def lazy(comm):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LazyLinear(2))
    if comm.rank == 0:
        model(torch.ones(1, 3))
    return model


def counted(comm):
    model = Copies(2, 2)
    model.count = comm.rank
    return model


def with_buffer(tensor):
    model = torch.nn.Linear(2, 2)
    model.register_buffer("odd", tensor)
    return model


@two
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("build, words", [
    (lazy, ["rank 1", "'1.weight' has no shape yet"]),
    (lambda comm: torch.nn.LazyLinear(2), ["'weight' has no shape yet", "on every rank"]),
    (lambda comm: torch.nn.Linear(2, 2, device="meta" if comm.rank else None),
     ["rank 1", "'weight'", "to_empty"]),
    (lambda comm: with_buffer(torch.eye(3).to_sparse_csr()), ["'odd'", "sparse_csr"]),
    (lambda comm: with_buffer(torch.ones(3) if comm.rank else None), ["odd"]),
    (lambda comm: with_buffer(torch.ones(3, 1).expand(3, 2) if comm.rank
                              else torch.ones(3, 2)), ["odd", "expanded"]),
    (lambda comm: Counter(1) if comm.rank else torch.nn.Linear(2, 2), ["extra state"]),
    (lambda comm: Deaf(comm.rank), ["rank 1", "set_extra_state", "no such thing"]),
    (lambda comm: Secret(1), ["extra state", "lambda"]),
    (counted, ["'count'", "0 on rank 0", "load_state_dict"])],
    ids=["lazy on one rank", "lazy", "meta", "csr", "none", "expanded", "no extra state", "deaf",
         "unpicklable", "copies"])
def test_what_cannot_be_given_is_named_on_all_ranks(build, words, comm):
    model = build(comm)
    text = same_text(comm, lambda: mpicomp.broadcast_parameters(model, comm))
    assert all(word in text for word in words), text


def same_text(comm, function):
    """The text of the error of this package that `function()` raises, the same on every rank."""
    with pytest.raises(MpicompError) as raised:
        function()
    texts = comm.allgather(str(raised.value))
    assert len(set(texts)) == 1, texts
    return texts[0]


def test_inference_tensors(comm):
    with torch.inference_mode():
        model = with_buffer(torch.full((2,), float(comm.rank)))
    mpicomp.broadcast_parameters(model, comm, comm.size - 1)
    assert model.odd.eq(comm.size - 1).all()


# ---- what may be given in place of a module


def test_a_list_of_parameters(comm):
    """A matrix of two rows is no (name, tensor) pair."""
    given = [torch.full(shape, float(comm.rank)) for shape in ((2, 3), (2, 1), (4,), ())]
    mpicomp.broadcast_parameters(given, comm, comm.size - 1)
    assert all(tensor.eq(comm.size - 1).all() for tensor in given)
    model = torch.nn.Linear(3, 2)
    model.weight.data.fill_(comm.rank)
    mpicomp.broadcast_parameters(model.parameters(), comm)
    assert model.weight.eq(0).all()


def test_pairs_of_one_name_are_refused_and_none_is_nothing(comm):
    pairs = [("w", torch.ones(1)), ("w", torch.ones(1))]
    text = same_error(comm, SpecError, lambda: mpicomp.broadcast_parameters(pairs, comm))
    assert "two tensors are called 'w'" in text
    tensors = {"a": None, "b": {"deep": [torch.tensor(float(comm.rank))]}, "c": 3}
    mpicomp.broadcast_parameters(tensors, comm, comm.size - 1)
    assert tensors["b"]["deep"][0] == comm.size - 1


@two
def test_what_is_no_tensor_and_differs_is_named(comm):
    text = same_error(comm, MismatchError, lambda: mpicomp.broadcast_parameters(
        {"w": torch.ones(2), "epoch": comm.rank}, comm))
    assert "'epoch'" in text and "0 on rank 0" in text


@pytest.mark.parametrize("given, words", [
    (lambda: torch.optim.SGD([torch.ones(1)], 0.1), ["SGD", "broadcast_optimizer_state"]),
    (lambda: 3, ["int", "model"]), (lambda: torch.ones(2, 2), ["Tensor"]),
    (lambda: [torch.nn.Linear(1, 1)], ["Linear", "ModuleList"]),
    (lambda: [("a", torch.ones(1)), torch.ones(1)], ["Tensor"])],
    ids=["optimizer", "number", "tensor", "modules", "mixed"])
def test_what_else_is_given_is_refused_with_the_line_to_type(given, words, comm):
    text = same_error(comm, SpecError, lambda: mpicomp.broadcast_parameters(given(), comm))
    assert all(word in text for word in words), text


def test_a_root_that_is_none(comm):
    for root in -1, comm.size:
        text = same_error(comm, SpecError, lambda: mpicomp.broadcast_parameters(
            torch.nn.Linear(1, 1), comm, root))
        assert f"root={root}" in text


@two
def test_ranks_that_mean_another_root(comm):
    model = torch.nn.Linear(1, 1)
    assert "root" in same_error(comm, MismatchError, lambda: mpicomp.broadcast_parameters(
        model, comm, comm.rank % 2))


# ---- optimizers


@two
@pytest.mark.parametrize("build, words", [
    (lambda p, odd: torch.optim.SGD([{"params": [q]} for q in p] if odd else p, 0.1), ["group"]),
    (lambda p, odd: torch.optim.SGD(p[:1] if odd else p, 0.1), ["group 0", "[2, 3]"]),
    (lambda p, odd: (torch.optim.Adam if odd else torch.optim.SGD)(p, 0.1), ["Adam", "SGD"])],
    ids=["groups", "parameters", "class"])
@pytest.mark.parametrize("at", ["root", "elsewhere"])
def test_another_optimizer_is_an_error_on_all_ranks(build, words, at, comm):
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, 3))]
    optimizer = build(parameters, (comm.rank == 0) == (at == "root"))
    text = same_error(comm, MismatchError,
                      lambda: mpicomp.broadcast_optimizer_state(optimizer, comm))
    assert all(word in text for word in words), text


@two
def test_a_state_that_one_rank_cannot_load_is_named_on_all(comm):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1)
    if comm.rank == comm.size - 1:
        def refuses(_):
            raise ValueError("no")
        optimizer.register_load_state_dict_pre_hook(lambda *_: refuses(_))
    text = same_error(comm, MismatchError,
                      lambda: mpicomp.broadcast_optimizer_state(optimizer, comm))
    assert f"rank {comm.size - 1}" in text and "ValueError: no" in text


# ---- a rank that never comes


@pytest.mark.parametrize("told", ["soon", "0", "-1", "nan"])
def test_a_limit_that_is_none_is_named(told, comm, monkeypatch):
    monkeypatch.setenv("MPICOMP_STALL_TIMEOUT", told)
    for call in (lambda: mpicomp.broadcast_parameters({"w": torch.ones(1)}, comm),
                 lambda: mpicomp.checkpoint.save("nowhere", comm, 1, {}, {})):
        text = same_error(comm, SpecError, call)
        assert "MPICOMP_STALL_TIMEOUT" in text and "expected seconds" in text
