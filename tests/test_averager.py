"""mpicomp.Averager: arrays in, their mean out, with error feedback, and no hooks."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from training import parameters, same_error

import mpicomp
from mpicomp.errors import MismatchError, NonFiniteError, SpecError

pytestmark = pytest.mark.mpi
SPECS = ["dense", "onebit", "strom:tau=0.5", "terngrad", "dropping:rate=0.5", "dorefa:feedback=yes",
         "onebit:exchange=sharded", "dryden:proportion=8,exchange=hierarchical",
         "dorefa:exchange=allreduce", "rule(b:dense; onebit)"]
SHAPES = {"w": (7, 5), "b": (3,), "scalar": ()}


def arrays(rank, step=0, dtype=np.float32):
    draw = np.random.default_rng([7, rank, step])
    return {name: draw.standard_normal(shape).astype(dtype).reshape(shape)
            for name, shape in SHAPES.items()}


def owed(averager):
    """{name: the sum of all that this rank owes of an array}."""
    found = {}
    for key, value in averager.state_dict().items():
        if key.startswith("error"):
            name = key.partition("/")[2]
            found[name] = found.get(name, 0) + value.astype(np.float64)
    return found


# ---- the mean


@pytest.mark.parametrize("kind", ["numpy", "float16", "torch", "torch.bfloat16"])
def test_dense_is_the_mean_in_place(kind, comm):
    given = [arrays(rank) for rank in range(comm.size)]
    if kind == "float16":
        given = [{name: a.astype(np.float16) for name, a in each.items()} for each in given]
    if kind.startswith("torch"):
        dtype = torch.bfloat16 if kind.endswith("16") else torch.float32
        given = [{name: torch.tensor(a, dtype=dtype) for name, a in each.items()}
                 for each in given]
    mine = given[comm.rank]
    averager = mpicomp.Averager(mine.items(), "dense", comm)
    before = {name: id(array) for name, array in mine.items()}
    whole = [{name: np.asarray(torch.as_tensor(a).float(), np.float64) for name, a in each.items()}
             for each in given]  # before they are replaced
    assert averager.average(mine) is True
    for name, array in mine.items():
        assert id(array) == before[name] and tuple(array.shape) == SHAPES[name]
        mean = sum(each[name] for each in whole) / comm.size
        found = np.asarray(torch.as_tensor(array).float(), np.float64)
        assert np.allclose(found, mean, rtol=1e-2 if "16" in kind else 1e-5, atol=1e-6)
        assert len({bytes(b) for b in comm.allgather(found.tobytes())}) == 1
    averager.close()


def test_a_sum_and_arrays_that_are_no_block_of_memory(comm):
    whole = np.arange(24, dtype=np.float32).reshape(4, 6) * (comm.rank + 1)
    part, rest = whole[::2, 1:4], whole[1::2].copy()
    averager = mpicomp.Averager({"part": part}, "dense", comm, average=False)
    expected = part / (comm.rank + 1) * sum(range(1, comm.size + 1))
    averager.average({"part": part})
    assert np.array_equal(part, expected) and np.array_equal(whole[1::2], rest)


@pytest.mark.parametrize("spec", SPECS)
def test_it_is_a_reducer_without_hooks(spec, comm):
    """The same bits and the same residuals as a Reducer's gradients, over three steps."""
    named = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in SHAPES.items()]
    reducer = mpicomp.Reducer(named, spec, comm)
    averager = mpicomp.Averager(arrays(0), spec, comm)
    for step in range(3):
        mine = arrays(comm.rank, step)
        for name, p in named:
            p.grad = torch.tensor(mine[name])
        reducer.finish()
        averager.average(mine)
        for name, p in named:
            assert p.grad.numpy().tobytes() == mine[name].tobytes()
            p.grad = None
    ours, theirs = averager.state_dict(), reducer.state_dict()
    assert ours.keys() == theirs.keys() and ours["step"] == 3
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert averager.stats.sent == reducer.stats.sent
    reducer.close()
    averager.close()


def test_one_array_at_a_time_in_any_order(comm):
    together, apart = (mpicomp.Averager(arrays(0), "onebit", comm, bucket_bytes=16)
                       for _ in range(2))
    for step in range(3):
        a, b = arrays(comm.rank, step), arrays(comm.rank, step)
        together.average(a)
        for name in ("b", "scalar", "w")[::1 - 2 * (comm.rank % 2)]:
            apart.start(name, b[name])
        apart.finish()
        assert all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_two_on_two_communicators_do_not_disturb_each_other(comm):
    first = mpicomp.Averager(arrays(0), "onebit", comm)
    second = mpicomp.Averager(arrays(0), "strom:tau=0.5", comm.Dup())
    a, b = arrays(comm.rank, 1), arrays(comm.rank, 2)
    order = [(first, a), (second, b)][::1 - 2 * (comm.rank % 2)]
    for averager, given in order:  # crossed
        for name, array in given.items():
            averager.start(name, array)
    for averager, given in ((first, a), (second, b)):
        averager.finish()
        for array in given.values():
            assert len(set(comm.allgather(array.tobytes()))) == 1


def test_what_nobody_gives_is_left_alone_and_what_some_give_counts_as_zero_elsewhere(comm):
    averager = mpicomp.Averager(arrays(0), "dense", comm, bucket_bytes=1)
    for _ in range(2):  # a rank that gave nothing in a later step left the others waiting
        mine, untouched = arrays(comm.rank), np.full(3, 5, np.float32)
        given = {"w": mine["w"]} if comm.rank == 0 else {}
        expected = mine["w"] / np.float32(comm.size)
        averager.average(given)
        assert np.allclose(mine["w"], expected if comm.rank == 0 else arrays(comm.rank)["w"])
        assert (untouched == 5).all()


# ---- error feedback


@pytest.mark.parametrize("spec", [
    "onebit", "strom:tau=0.5", "dropping:rate=0.5", "dorefa:feedback=yes", "adacomp:bin=4",
    "onebit:exchange=sharded", "strom:tau=0.5,exchange=hierarchical"])
@pytest.mark.parametrize("weighted", [False, True])
def test_handed_out_and_owed_is_given(spec, weighted, comm):
    averager = mpicomp.Averager(arrays(0), spec, comm, average=False)
    total = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(6):
        given = [arrays(rank, step) for rank in range(comm.size)]
        weights = [(rank + step) % 3 / 2 for rank in range(comm.size)] if weighted else [1.0]
        if not sum(weights):
            continue
        mine = given[comm.rank]
        for name in total:
            total[name] += sum(w * each[name].astype(np.float64) for w, each in
                               zip(weights if weighted else [1.0] * comm.size, given))
        averager.average(mine, weights[comm.rank] if weighted else None)
        for name in total:
            total[name] -= mine[name]
    mine = owed(averager)
    for name, rest in total.items():
        assert np.allclose(rest, sum(comm.allgather(mine.get(name, 0))), atol=1e-4)
    left = averager.flush()
    assert all(np.allclose(left[name], total[name], atol=1e-4) for name in total)
    assert all(not value.any() for value in owed(averager).values())


# ---- weights


@pytest.mark.parametrize("spec", ["dense", "dense:exchange=sharded", "fp16", "onebit:feedback=no"])
def test_a_weighted_mean(spec, comm):
    averager = mpicomp.Averager({"x": np.zeros(8, np.float32)}, spec, comm)
    weights = [2.0 * rank + 1 for rank in range(comm.size)]
    x = np.full(8, comm.rank + 1, np.float32)
    averager.average({"x": x}, weights[comm.rank])
    mean = sum(w * (rank + 1) for rank, w in enumerate(weights)) / sum(weights)
    assert np.allclose(x, mean, rtol=1e-3)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("spec", ["onebit", "strom:tau=0.5", "dropping:rate=0.5",
                                  "onebit:exchange=sharded", "strom:tau=0.1,exchange=peers",
                                  "onebit:delay=1"])
def test_a_rank_of_weight_0_gives_nothing_and_what_it_owes_waits(spec, comm):
    averager = mpicomp.Averager(arrays(0), spec, comm)
    averager.average(arrays(comm.rank))
    if averager.mode.late:
        averager.deliver()
    before = averager.state_dict()
    given = arrays(comm.rank, 1)
    if comm.rank == 0:
        given["w"][0, 0] = np.nan  # is not looked at
    averager.average(given, weight=float(comm.rank > 0))
    if averager.mode.late:
        averager.deliver()
    after = averager.state_dict()
    if comm.rank == 0:
        assert all(np.array_equal(before[key], after[key]) for key in before
                   if key.startswith("error/"))
    else:
        assert any(not np.array_equal(before[key], after[key]) for key in before
                   if key.startswith("error/"))


def test_where_all_weights_are_0_nothing_happens(comm):
    averager = mpicomp.Averager(arrays(0), "onebit", comm)
    mine, before = arrays(comm.rank), averager.state_dict()
    assert averager.average(mine, weight=0) is False
    assert all(mine[name].tobytes() == a.tobytes() for name, a in arrays(comm.rank).items())
    assert averager.step == before["step"] == 0 and not any(
        value.any() for value in owed(averager).values())


def test_a_weight_that_is_none_is_the_same_error_on_all(comm):
    averager = mpicomp.Averager(arrays(0), "dense", comm)
    for bad in (-1.0, float("nan"), float("inf"), "1"):
        weight = bad if comm.rank == comm.size - 1 else 1.0
        text = same_error(comm, SpecError, lambda: averager.average(arrays(comm.rank), weight))
        assert f"rank {comm.size - 1}: weight={bad!r} found" in text


# ---- what goes wrong


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("spec", ["dense", "onebit", "strom:tau=0.5", "terngrad"])
def test_nan_on_one_rank(spec, nonfinite, comm):
    averager = mpicomp.Averager(arrays(0), spec, comm, nonfinite=nonfinite)
    averager.average(arrays(comm.rank))
    before, mine = averager.state_dict(), arrays(comm.rank, 1)
    if comm.rank == comm.size - 1:
        mine["w"][2, 2] = np.nan
    kept = {name: array.copy() for name, array in mine.items()}
    if nonfinite == "raise":
        text = same_error(comm, NonFiniteError, lambda: averager.average(mine))
        assert f"rank {comm.size - 1}: w" in text
    else:
        assert averager.average(mine) is False and averager.stats.skipped == 1
    assert all(mine[name].tobytes() == kept[name].tobytes() for name in mine)
    after = averager.state_dict()
    assert all(np.array_equal(before[key], after[key]) for key in before if key != "step")
    assert averager.average(arrays(comm.rank, 2)) is True


@pytest.mark.mpi(min_size=2)
def test_ranks_that_differ(comm):
    shapes = {"w": np.zeros(3 + comm.rank, np.float32)}
    assert "w [3]" in same_error(comm, MismatchError,
                                 lambda: mpicomp.Averager(shapes, "dense", comm))
    assert "seed" in same_error(comm, MismatchError, lambda: mpicomp.Averager(
        arrays(0), "dense", comm, seed=comm.rank))
    spec = "onebit" if comm.rank else "dense"
    assert "onebit" in same_error(comm, MismatchError,
                                  lambda: mpicomp.Averager(arrays(0), spec, comm))


def test_what_does_not_fit_is_named(comm):
    for given, words in ((3, "pairs"), ({}, "at least one"), ({"a": [1.0]}, "'a' is list"),
                         ({"a": np.zeros(3)}, "float64"), ({"a": np.zeros(3, np.int32)}, "int32")):
        assert words in same_error(comm, SpecError,
                                   lambda given=given: mpicomp.Averager(given, "dense", comm))
    assert "server" in same_error(comm, SpecError, lambda: mpicomp.Averager(
        arrays(0), "onebit:exchange=server", comm))
    assert "no method" in same_error(comm, SpecError,
                                     lambda: mpicomp.Averager(arrays(0), "twobit", comm))
    averager = mpicomp.Averager(arrays(0), "dense", comm)
    for given in 3, [np.zeros(3, np.float32)]:
        with pytest.raises(SpecError, match=r"expected \{name: array\}"):
            averager.average(given)
    assert averager.average(arrays(comm.rank).items())
    with pytest.raises(SpecError, match=r"'v' found, expected .* w, b, scalar|'v' found"):
        averager.start("v", np.zeros(3, np.float32))
    with pytest.raises(SpecError, match=r"'b' is a numpy array of float32 on cpu, shape \[4\]"):
        averager.start("b", np.zeros(4, np.float32))
    with pytest.raises(SpecError, match="a torch array of float32"):
        averager.start("b", torch.zeros(3))
    averager.start("b", np.zeros(3, np.float32))
    with pytest.raises(MismatchError, match="'b' was given twice in step 1"):
        averager.start("b", np.zeros(3, np.float32))
    with pytest.raises(MismatchError, match="in the middle of a step"):
        averager.flush()
    averager.finish()


# ---- modes, state


@pytest.mark.parametrize("spec", ["dense:delay=1", "onebit:delay=1",
                                  "strom:tau=0.5,exchange=peers"])
def test_what_is_late_is_delivered(spec, comm):
    averager = mpicomp.Averager(arrays(0), spec, comm, average=False)
    total = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(4):
        mine = arrays(comm.rank, step)
        for name, array in mine.items():
            total[name] += sum(comm.allgather(array.astype(np.float64)))
        if averager.average(mine):
            for name, array in mine.items():
                total[name] -= array
    with pytest.raises(MismatchError, match="deliver"):
        averager.state_dict()
    for late in (averager.deliver(), averager.flush()):
        for name, array in late.items():
            total[name] -= array
    assert averager.deliver() == {}
    assert all(np.abs(rest).max(initial=0) < 1e-4 for rest in total.values())


@pytest.mark.parametrize("spec", ["onebit", "strom:tau=0.5", "terngrad", "onebit:exchange=sharded"])
def test_saved_and_loaded_it_goes_on_to_the_bit(spec, comm):
    def steps(averager, numbers):
        found = []
        for step in numbers:
            mine = arrays(comm.rank, step)
            averager.average(mine)
            found.append([mine[name].tobytes() for name in mine])
        return found

    whole = mpicomp.Averager(arrays(0), spec, comm, bucket_bytes=32)
    expected = steps(whole, range(6))[3:]
    first = mpicomp.Averager(arrays(0), spec, comm, bucket_bytes=32)
    steps(first, range(3))
    state = first.state_dict()
    second = mpicomp.Averager(arrays(0), spec, comm, bucket_bytes=32)
    second.load_state_dict(state)
    assert steps(second, range(3, 6)) == expected
    odd = {key: value for key, value in state.items() if key != "step"}
    with pytest.raises(MismatchError, match="the saved state has 'x'"):
        second.load_state_dict(odd | {"step": 1, "x": 1})


def test_a_ratio_that_is_not_kept(comm):
    averager = mpicomp.Averager(arrays(0), "dense", comm, require_ratio=4)
    assert "require_ratio=4" in same_error(comm, mpicomp.RatioError,
                                           lambda: averager.average(arrays(comm.rank)))


def test_closed_it_leaves_its_communicator_to_the_next(comm):
    for _ in range(3):
        averager = mpicomp.Averager(arrays(0), "onebit", comm)
        averager.average(arrays(comm.rank))
        averager.close()
        averager.close()
    assert averager.finish() is False


@pytest.mark.mpi(sizes=(1,))
def test_numpy_arrays_need_no_torch(tmp_path):
    code = ("import sys, numpy as np, mpicomp\n"
            "x = np.ones(8, np.float32)\n"
            "averager = mpicomp.Averager({'x': x}, 'onebit')\n"
            "averager.average({'x': x})\n"
            "assert x.tolist() == [1.0] * 8 and 'torch' not in sys.modules\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent, timeout=ranks.JOB)
    assert done.returncode == 0, done.stderr


def test_gradients_and_an_averager_share_a_communicator(comm):
    reducer = mpicomp.Reducer(parameters(w=5), "onebit", comm)
    averager = mpicomp.Averager(arrays(0), "onebit", comm)
    averager.average(arrays(comm.rank))
    reducer.close()
    averager.close()


# ---- after an error, and beside what is late


def test_what_is_wrong_is_found_before_anything_is_done(comm):
    """Also with weight 0: what this rank owes is not lost, and the right call goes on."""
    averager = mpicomp.Averager(arrays(0), "onebit", comm)
    averager.average(arrays(comm.rank))
    before = averager.state_dict()
    for wrong in ({"typo": arrays(0)["b"]}, {"w": arrays(0)["w"], "b": np.zeros(4, np.float32)},
                  {"w": arrays(0)["w"], "b": [0.0]}):
        for weight in 0.0, 1.0:
            with pytest.raises(SpecError):
                averager.average(wrong, weight)
    after = averager.state_dict()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert averager.average(arrays(comm.rank, 1), 1.0) is True


@pytest.mark.mpi(min_size=2)
def test_what_is_held_back_in_a_step_that_fails_is_owed_again(comm, monkeypatch):
    averager = mpicomp.Averager(arrays(0), "onebit", comm)
    averager.average(arrays(comm.rank))
    before = averager.state_dict()

    def fails(*_):
        raise RuntimeError("on all ranks")

    with monkeypatch.context() as patch:
        patch.setattr(averager, "prepare", fails)
        for step in range(2):
            with pytest.raises(RuntimeError):
                averager.average(arrays(comm.rank, 1), float(comm.rank > 0))
            for bucket in averager.buckets:
                bucket.reset()
    after = averager.state_dict()
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_skipped_step_is_not_delivered_again(comm):
    averager = mpicomp.Averager(arrays(0), "dense:delay=1", comm, nonfinite="skip")
    averager.average(arrays(comm.rank))
    bad = arrays(comm.rank, 1)
    bad["w"][0, 0] = np.nan
    averager.average(bad)  # hands out the first
    assert averager.deliver() == {}


@pytest.mark.parametrize("spec", ["dense:delay=1", "strom:tau=0.5,exchange=peers"])
def test_where_means_come_late_every_array_is_given(spec, comm):
    averager = mpicomp.Averager(arrays(0), spec, comm)
    given = {"w": arrays(comm.rank)["w"]}
    text = same_error(comm, SpecError, lambda: averager.average(given))
    assert "every array must be given in every step" in text


@pytest.mark.mpi(min_size=2)
def test_with_peers_a_rank_that_skips_still_gets_what_others_have_sent(comm):
    averager = mpicomp.Averager({"x": np.zeros(4, np.float32)},
                                "dense:exchange=peers,staleness=0", comm, nonfinite="skip")
    x = np.full(4, np.nan if comm.rank == 0 else 1, np.float32)
    averager.average({"x": x})
    assert np.allclose(x, (comm.size - 1) / comm.size)
    averager.deliver()


def test_closed_it_sends_nothing(comm):
    averager = mpicomp.Averager(arrays(0), "dense", comm)
    averager.close()
    for call in (lambda: averager.average(arrays(0)),
                 lambda: averager.start("w", arrays(0)["w"])):
        with pytest.raises(SpecError, match="closed"):
            call()


def test_it_cannot_be_copied(comm):
    with pytest.raises(SpecError, match="cannot be copied"):
        copy.deepcopy(mpicomp.Averager(arrays(0), "dense", comm))


def test_names_are_text(comm):
    averager = mpicomp.Averager({0: np.zeros(3, np.float32)}, "dense", comm)
    assert averager.average({0: np.full(3, comm.rank, np.float32)})
    assert "error/0" not in averager.state_dict()


def test_compiled_code_may_call_it(comm):
    tensor = torch.zeros(6)
    averager = mpicomp.Averager({"w": tensor}, "dense", comm)

    def step(x):
        y = 2 * x
        averager.average({"w": y})
        return y

    x = torch.full((6,), float(comm.rank))
    mean = torch.full((6,), float(comm.size - 1))
    assert torch.equal(torch.compile(step, backend="eager")(x), mean)
    assert averager.step == 1


def test_a_state_saved_while_a_step_is_under_way_loses_nothing(comm):
    """A rank with weight 0 keeps what it owes out of the step, and owes it all the same."""
    x = np.zeros(6, np.float32)
    averager = mpicomp.Averager({"x": x}, "onebit", comm)
    for step in range(2):
        x[:] = np.arange(6) * (comm.rank + 1) - 1.5 * step
        averager.average({"x": x}, 1.0)
    owed = averager.state_dict()["error/x"]
    assert owed.any()
    x[:] = 7
    averager.send({"x": x}, float(comm.rank == 0))
    between = averager.state_dict()["error/x"]
    averager.finish()
    after = averager.state_dict()["error/x"]
    assert np.array_equal(between, owed)
    assert comm.rank == 0 or np.array_equal(after, owed)
