"""Save, load and go on: as if nobody had stopped, to the bit; and what a step allocates."""

import io
import tracemalloc

import numpy as np
import pytest
import torch
from training import digest, examples, give, network, parameters, same_error, train

import mpicomp
from mpicomp import MismatchError, kernels

SPECS = ["dense", "fp16:feedback=yes", "terngrad", "onebit", "strom:tau=0.02", "onebit:warmup=4",
         "terngrad:exchange=allreduce", "onebit:exchange=sharded", "strom:tau=.02,exchange=sharded",
         "onebit:exchange=sharded,adagrad=yes", "onebit:exchange=hierarchical"]


class Run:
    """A training that can be saved and loaded."""

    def __init__(self, spec, comm):
        self.model, self.comm = network(), comm
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.reducer = mpicomp.Reducer(self.model.named_parameters(), spec, comm, seed=7,
                                       bucket_bytes=2000).attach(self.optimizer)

    def steps(self, *numbers):
        for step in numbers:
            self.optimizer.zero_grad()
            x, y = examples(self.comm, step)
            torch.nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()

    @property
    def parts(self):
        return self.model, self.optimizer, self.reducer


@pytest.mark.mpi
@pytest.mark.parametrize("spec", SPECS)
def test_saved_and_loaded_is_not_having_stopped(spec, comm):
    straight = Run(spec, comm)
    straight.steps(*range(6))
    before = Run(spec, comm)
    before.steps(0, 1, 2)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in before.parts], file)
    before.steps(3)  # what was saved does not follow
    after = Run(spec, comm)
    file.seek(0)
    for part, state in zip(after.parts, torch.load(file)):
        part.load_state_dict(state)
    assert after.reducer.step == 3
    after.steps(3, 4, 5)
    assert digest(after.model.parameters()) == digest(straight.model.parameters())
    owed, expected = after.reducer.state_dict(), straight.reducer.state_dict()
    assert owed.pop("step") == expected.pop("step") == 6 and owed.keys() == expected.keys()
    assert all(torch.equal(owed[key], expected[key]) for key in owed)


@pytest.mark.mpi
def test_state_holds_residuals_in_the_shape_of_the_parameters(comm):
    named = parameters(w=(40, 3), b=())
    reducer = mpicomp.Reducer(named, "strom:tau=1", comm)
    give(named, [np.full((40, 3), 1.25), -3.5])
    reducer.finish()
    state = reducer.state_dict()
    assert set(state) == {"step", "error/w", "error/b"} and state["step"] == 1
    assert state["error/w"].tolist() == [[0.25] * 3] * 40 and state["error/b"].item() == -2.5
    state["error/w"].zero_()  # a copy
    assert reducer.state_dict()["error/w"].sum() == 30
    assert set(mpicomp.Reducer(named, "terngrad", comm).state_dict()) == {"step"}


@pytest.mark.mpi
@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("error/w"), ["lacks", "'error/w'", "onebit"]),
    (lambda s: s.pop("step"), ["lacks", "'step'"]),
    (lambda s: s.update({"error/x": torch.zeros(3)}), ["has", "'error/x'", "does not know"]),
    (lambda s: s.update({"error/w": torch.zeros(3, 40)}), ["'error/w'", "[3, 40]", "[40, 3]"])])
def test_a_state_that_does_not_fit_changes_nothing(change, words, comm):
    named = parameters(w=(40, 3), b=4)
    reducer = mpicomp.Reducer(named, "onebit", comm)
    give(named, [np.linspace(-1, 1, 120), [1, 2, -3, -8]])
    reducer.finish()
    state = reducer.state_dict()
    before = digest(v for key, v in state.items() if key != "step")
    change(state)
    state["error/b"] = torch.ones(4)
    with pytest.raises(MismatchError, match=f"rank {comm.rank}: ") as caught:
        reducer.load_state_dict(state)
    assert all(word in str(caught.value) for word in words)
    after = reducer.state_dict()
    assert after.pop("step") == 1 and digest(after.values()) == before


@pytest.mark.mpi(min_size=2)
def test_states_of_different_steps_are_noticed(comm):
    """One rank loads an older checkpoint: the next exchange says so on all ranks."""
    named = parameters(w=4)
    reducer = mpicomp.Reducer(named, "dense", comm)
    reducer.load_state_dict({"step": 5 if comm.rank == comm.size - 1 else 7})

    def step():
        give(named, [np.ones(4)])
        reducer.finish()

    text = same_error(comm, MismatchError, step)
    assert f"; 5 on rank {comm.size - 1}. load the states of one step" in text


@pytest.mark.mpi
def test_the_same_seed_gives_the_same_run_another_seed_another(comm):
    models = [train("terngrad", comm, steps=5, seed=seed)[0] for seed in (1, 1, 2)]
    runs = [digest(model.parameters()) for model in models]
    assert runs[0] == runs[1] != runs[2]


# ---- nothing is allocated -------------------------------------------------------------------


@pytest.mark.mpi
@pytest.mark.parametrize("spec", ["dense", "dense:exchange=allgather", "dense:exchange=sharded"])
def test_after_the_third_step_nothing_of_the_gradients_size_is_allocated(spec, comm, monkeypatch):
    """NumPy's memory in Reducer and exchange. The kernels for it are made to need no temporary."""
    n = 250_000
    named, scratch = parameters(w=n), np.empty(n, np.float32)

    def decode_add(data, weight, out):
        part = scratch[:out.size]
        np.multiply(data.view(np.float32), np.float32(weight), out=part)
        out += part

    def decode_sum(payloads, weight, out):
        out[...] = 0
        for data in payloads:
            decode_add(data, weight, out)

    monkeypatch.setattr(kernels.of(scratch), "dense_decode_add", decode_add)
    monkeypatch.setattr(kernels.of(scratch), "dense_decode_sum", decode_sum)
    reducer = mpicomp.Reducer(named, spec, comm)
    gradient = torch.ones(n)
    peaks = []
    for step in range(6):
        named[0][1].grad = None
        (named[0][1] * gradient).sum().backward()  # torch's memory is not NumPy's
        reducer.finish()
        if step == 2:
            tracemalloc.start()
        elif step > 2:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.reset_peak()
    tracemalloc.stop()
    assert torch.allclose(named[0][1].grad, gradient)
    assert max(peaks) < 4 * n / 4, peaks


def test_the_meter_of_allocations_sees_one():
    """The test of the test: an array of a quarter of the gradient would be seen."""
    tracemalloc.start()
    array = np.zeros(250_000, np.float32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak >= array.nbytes
