"""Parameters keep their names, residuals and rules whatever wraps the model."""

import pytest
import torch
from training import digest, examples, network, replicas_are_identical

import mpicomp
from mpicomp.names import bare, known_as, plain


@pytest.mark.parametrize("given, expected", [
    (["_orig_mod.a", "_orig_mod.b.c"], ["a", "b.c"]),
    (["a._orig_mod.w", "b"], ["a.w", "b"]),
    (["_orig_mod.module.a", "_orig_mod.module.b"], ["a", "b"]),
    (["module._orig_mod.a", "module._orig_mod.module.b"], ["a", "module.b"]),
    (["module.module.a"], ["a"]),
    (["module.a", "b"], ["module.a", "b"]),  # a module of that name
    (["module", "a"], ["module", "a"]),
    (["my_orig_mod.a"], ["my_orig_mod.a"]),
    (["_orig_mod.a", "a"], ["_orig_mod.a", "a"]),  # two models' parameters stay two
    ([], []),
])
def test_wrappers_leave_no_trace_in_names(given, expected):
    assert plain(given) == expected
    assert plain(expected) == expected


def test_a_pattern_may_be_written_for_the_wrapped_model():
    assert bare("*_orig_mod.fc.*") == "*fc.*" and bare("module.fc.*") == "fc.*"
    assert bare("*.bias") == "*.bias"


def test_only_what_differs_by_wrappers_is_called_otherwise():
    assert known_as(["step", "error/module.a", "error/x"], ["step", "error/a", "error/b"]) == \
        ["step", "error/a", "error/x"]
    assert known_as(["error/a", "error/module.a"], ["error/a"]) == ["error/a", "error/module.a"]


def wrapped(model, kind):
    """(name, parameter) pairs as the wrapper gives them; torch.compile's runs nothing here."""
    if kind == "plain":
        return list(model.named_parameters())
    if kind == "compiled":
        return list(torch.compile(model, backend="eager").named_parameters())
    return [(f"{kind}{name}", p) for name, p in model.named_parameters()]


def steps(comm, kind, spec, count, state=None, model=None, **keywords):
    """(model, reducer, digest of the parameters) after some steps from this state."""
    model = model or network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reducer = mpicomp.Reducer(wrapped(model, kind), spec, comm, bucket_bytes=2000, seed=3,
                              **keywords).attach(optimizer)
    if state is not None:
        reducer.load_state_dict(state)
    for _ in range(count):
        x, y = examples(comm, reducer.step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    replicas_are_identical(comm, model)
    reducer.close()
    return model, reducer, digest(model.parameters())


@pytest.mark.mpi
@pytest.mark.parametrize("before, after", [
    ("compiled", "plain"), ("plain", "compiled"), ("module.", "_orig_mod.module.")])
def test_what_is_owed_goes_with_its_parameter_into_another_wrapper(comm, before, after):
    expected = steps(comm, "plain", "onebit", 4)[2]
    model, reducer, _ = steps(comm, before, "onebit", 2)
    assert steps(comm, after, "onebit", 2, reducer.state_dict(), model)[2] == expected


@pytest.mark.mpi
def test_a_state_that_was_saved_with_wrappers_in_its_names_loads(comm):
    """Such states were written before names were made plain."""
    expected = steps(comm, "plain", "onebit", 4)[2]
    model, reducer, _ = steps(comm, "plain", "onebit", 2)
    old = {key.replace("/", "/_orig_mod.module."): value
           for key, value in reducer.state_dict().items()}
    assert steps(comm, "compiled", "onebit", 2, old, model)[2] == expected


@pytest.mark.mpi
@pytest.mark.parametrize("pattern", ["6.*", "_orig_mod.6.*", "module.6.*"])
@pytest.mark.parametrize("kind", ["plain", "compiled", "module."])
def test_a_rule_holds_in_every_wrapper(comm, kind, pattern):
    spec = f"rule({pattern}:dense; strom:tau=100)"
    reducer = steps(comm, kind, spec, 1)[1]
    said = {name for name, count in reducer.named().items() if count}
    assert said == {"6.weight", "6.bias"}


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["plain", "compiled"])
@pytest.mark.parametrize("given", ["emb.weight", "_orig_mod.emb.weight"])
def test_so_does_sparse(comm, kind, given):
    model = torch.nn.ModuleDict({"emb": torch.nn.Embedding(5, 2, sparse=True),
                                 "fc": torch.nn.Linear(2, 2)})
    reducer = mpicomp.Reducer(wrapped(model, kind), "dense", comm, sparse=[given])
    model["fc"](model["emb"](torch.tensor([comm.rank]))).sum().backward()
    reducer.finish()
    assert model["emb"].weight.grad.is_sparse
