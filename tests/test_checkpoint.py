"""Checkpoints: whole whatever happens while one is written; residuals for any number of ranks."""

import errno
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI
from training import give, parameters, replicas_are_identical, same_error, whole_numbers

import mpicomp
from mpicomp import CheckpointError, MismatchError, checkpoint

SHAPES = dict(w=(12, 5), b=(12,), k=(3, 2, 2), s=())


# ---- files ----------------------------------------------------------------------------------


def save(folder, step, value=None, **config):
    checkpoint.save(folder, MPI.COMM_SELF, step, mine={"owed": step},
                    shared={"w": torch.full((3,), float(step if value is None else value))},
                    about={"config": config})


def newest(folder):
    """(step, the value that was saved) of the newest checkpoint."""
    path, manifest = checkpoint.newest(folder)
    shared, mine = checkpoint.load(path, 0)
    assert mine["owed"] == manifest["step"]
    return manifest["step"], shared["w"][0].item()


def test_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path, capsys):
    assert checkpoint.newest(tmp_path) is None
    for step in 8, 9, 10:
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-9"]
    assert newest(tmp_path) == (10, 10.0)
    with open(tmp_path / "step-10" / "shared.pt", "r+b") as file:
        file.truncate(100)
    assert newest(tmp_path)[0] == 9
    assert "step-10 is damaged" in capsys.readouterr().out


def test_an_objection_names_every_difference(tmp_path):
    save(tmp_path, 1, lr=0.1, seed=0)
    manifest = checkpoint.newest(tmp_path)[1]
    assert checkpoint.objection(manifest, dict(lr=0.1, seed=0)) is None
    assert "lr=0.1 there, lr=0.2 here" in checkpoint.objection(manifest, dict(lr=0.2, seed=0))


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def damage(folder, *steps):
    for step in steps:
        (folder / f"step-{step}" / "shared.pt").write_bytes(b"x")


def test_what_is_written_stays_where_later_steps_are_there(tmp_path):
    """A run that started over: nothing of the older history, damaged or not, is in its way."""
    for step in 900, 1000:
        save(tmp_path, step)
    damage(tmp_path, 900, 1000)
    assert checkpoint.newest(tmp_path) is None
    save(tmp_path, 100)
    assert newest(tmp_path)[0] == 100
    save(tmp_path, 200)
    assert newest(tmp_path)[0] == 200 and names(tmp_path) == ["step-100", "step-200"]
    assert [path.name for path in checkpoint.folders(tmp_path)] == ["step-200", "step-100"]


@pytest.mark.parametrize("changes, said", [
    (dict(keep=0), "keep=0: expected"), (dict(step=-1), "step=-1"), (dict(step=1.5), "float"),
    (dict(about={"path": Path("x")}), "not JSON serializable"),
    (dict(about={"files": {"a": "b"}}), "about has 'files'"),
    (dict(about={"step": 3}), "about has 'step'"),
    (dict(shared={"a": np.float64(3)}), r"shared.pt would hold numpy\S*scalar, which is not read"),
    (dict(mine={"a": Path("x")}), r"rank-0.pt would hold pathlib\.\w*Path"),
    (dict(mine={"a": lambda: 1}), "pickle")])
def test_what_could_not_be_read_back_is_refused_before_anything_is_lost(changes, said, tmp_path):
    for step in 1, 2:
        save(tmp_path, step)
    good = dict(step=10, shared={}, mine={})
    with pytest.raises(CheckpointError, match=said):
        checkpoint.save(tmp_path, MPI.COMM_SELF, **good | changes)
    assert names(tmp_path) == ["step-1", "step-2"]
    checkpoint.save(tmp_path, MPI.COMM_SELF, **good | {"step": np.int64(10)})
    assert checkpoint.newest(tmp_path)[1]["step"] == 10


@pytest.mark.parametrize("other", ["step-10-copy1", "step-10.bak1", "step-x", "step-3.partial",
                                   "step-", "mine"])
def test_folders_of_the_user_are_left_alone(other, tmp_path):
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "step-10", tmp_path / other)
    (tmp_path / "step-99").touch()  # no folder
    for step in 20, 30, 40:
        save(tmp_path, step)
        assert newest(tmp_path)[0] == step
    assert names(tmp_path) == sorted(["step-30", "step-40", "step-99", other])


@pytest.mark.parametrize("content", [
    "null", "[]", "3", "", "{", "{}", '{"files": []}', '{"files": {}, "ranks": 0, "step": 1}',
    '{"files": {}, "ranks": -1, "step": 1}', '{"files": {"shared.pt": "x"}}', "[" * 100_000,
    '{"files": {"shared.pt": 1, "../x": 2}, "ranks": 1, "step": 10}', "\udcff"])
def test_a_malformed_manifest_is_damage(content, tmp_path, capsys):
    for step in 9, 10:
        save(tmp_path, step)
    (tmp_path / "step-10" / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    assert newest(tmp_path)[0] == 9
    assert "step-10 is damaged" in capsys.readouterr().out
    save(tmp_path, 11)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_what_cannot_be_read_just_now_is_not_called_damaged(number, tmp_path, monkeypatch):
    save(tmp_path, 9)
    save(tmp_path, 10)

    def fails(path, *others):
        raise OSError(number, os.strerror(number), str(path))

    for place, name in (checkpoint, "_sha256"), (checkpoint, "_manifest"), (os, "listdir"):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fails)
            with pytest.raises(OSError, match=re.escape(os.strerror(number))):
                checkpoint.newest(tmp_path)
    (tmp_path / "step-10" / "rank-0.pt").unlink()   # that is damage
    assert newest(tmp_path)[0] == 9


def test_what_a_killed_run_left_half_written_goes(tmp_path):
    for step in 15, 16:
        (tmp_path / f"step-{step}.part").mkdir()
        (tmp_path / f"step-{step}.part" / "rank-0.pt").write_bytes(b"x")
    save(tmp_path, 20)
    assert names(tmp_path) == ["step-20"]


def test_a_full_disk_is_not_kept_full(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(path, content):
        Path(path).write_bytes(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", full)
        with pytest.raises(CheckpointError, match="No space left"):
            save(tmp_path, 2)
    assert names(tmp_path) == ["step-1"] and newest(tmp_path)[0] == 1


def test_an_old_one_that_cannot_be_deleted_is_no_failure(tmp_path, monkeypatch, capsys):
    for step in 10, 20:
        save(tmp_path, step)
    whole = shutil.rmtree

    def busy(path, *others, **named):
        if Path(path).name.startswith("step-10"):
            if named.get("ignore_errors"):
                return
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        whole(path, *others, **named)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        save(tmp_path, 30)
        assert "step-10 is not needed any more" in capsys.readouterr().out
        save(tmp_path, 40)
        assert newest(tmp_path)[0] == 40
    save(tmp_path, 50)
    assert names(tmp_path) == ["step-40", "step-50"]


def test_an_objection_compares_what_json_keeps(tmp_path):
    config = dict(betas=(0.9, 0.99), lr={1: 2}, none=None)
    save(tmp_path, 1, **config)
    manifest = checkpoint.newest(tmp_path)[1]
    assert checkpoint.objection(manifest, config) is None
    said = checkpoint.objection(manifest, dict(lr={1: 2}, seed=3))
    assert "betas=[0.9, 0.99] there, betas=None here" in said and "seed=None there" in said
    assert "without about=dict(config=...)" in checkpoint.objection({}, config)


@pytest.mark.mpi(min_size=2)
def test_a_checkpoint_of_another_number_of_ranks_is_refused(comm, tmp_path):
    folder = Path(comm.bcast(str(tmp_path)))
    checkpoint.save(folder, comm, 1, {"a": 1}, {"owed": comm.rank})
    path, _ = checkpoint.newest(folder)
    assert checkpoint.load(path, comm.rank, comm.size) == ({"a": 1}, {"owed": comm.rank})
    for rank, ranks in (0, 1), (0, comm.size + 1), (comm.size, None), (comm.size, comm.size + 1):
        with pytest.raises(CheckpointError, match=f"by {comm.size} rank.*rank {rank}.*repartition"):
            checkpoint.load(path, rank, ranks)
    comm.Barrier()


DOCS = Path(__file__).resolve().parent.parent / "docs" / "checkpoints.md"


@pytest.mark.mpi(min_size=2)
@pytest.mark.limit(150)
@pytest.mark.parametrize("first, second", [(1, 2), (2, 1), (2, 2)])
def test_the_loop_of_the_docs_goes_on_with_any_number_of_ranks(first, second, comm, tmp_path,
                                                               monkeypatch):
    """Its own text, run by `first` ranks and then by `second`: nothing that is owed is lost."""
    code = re.search("```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]
    code = code.replace("from mpi4py import MPI\n", "").replace("MPI.COMM_WORLD", "WORLD")
    loading = code.replace("MPI.Finalize()", "pass")
    monkeypatch.chdir(comm.bcast(str(tmp_path)))

    def owed(steps, size):
        """What the ranks that take part owe, over their number, before and after; None elsewhere"""
        part = comm.Split(0 if comm.rank < size else MPI.UNDEFINED)
        if part == MPI.COMM_NULL:
            return None
        named = parameters(w=(40, 3))
        optimizer = torch.optim.SGD([p for _, p in named], 0.1)
        reducer = mpicomp.Reducer(named, "strom:tau=2.5", part)
        model = torch.nn.ParameterDict(dict(named))
        seen = []

        class Signals(checkpoint.Signals):
            def post(self):
                if not seen:
                    seen.append(total(part.allgather(reducer.state_dict()))["w"] / size)
                give(named, [whole_numbers(part.rank, 7, 120).reshape(40, 3)])
                reducer.finish()

            def agreed(self):
                self.close()
                return 1

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(checkpoint, "Signals", Signals)
            exec(loading, dict(WORLD=part, MPI=MPI, sys=sys, torch=torch, steps=steps, model=model,
                               optimizer=optimizer, reducer=reducer))
        assert ended.value.code == 75
        return seen[0], total(part.allgather(reducer.state_dict()))["w"] / size

    before = comm.bcast(owed(1, first))
    comm.Barrier()
    after = owed(2, second)
    assert before[1].abs().sum() > 0
    if after is not None:
        assert torch.allclose(after[0], before[1], atol=1e-6)
    comm.Barrier()


@pytest.mark.mpi(min_size=2)
def test_any_error_of_one_rank_is_an_error_of_all(comm, tmp_path):
    """Also one that is no OSError: the others would wait for ever."""
    folder = Path(comm.bcast(str(tmp_path)))
    last = comm.rank == comm.size - 1
    for named, said in ((dict(mine={"a": (lambda: 1) if last else 1}), f"rank {comm.size - 1}"),
                        (dict(mine={}, about={"a": Path("x")} if not comm.rank else {}), "rank 0"),
                        (dict(mine={}, step="x" if not comm.rank else 1), "rank 0")):
        text = same_error(comm, CheckpointError, lambda: checkpoint.save(
            folder, comm, **dict(step=1, shared={}) | named))
        assert said in text
        assert not comm.bcast(list(folder.glob("*")))
    checkpoint.save(folder, comm, 1, {}, {})
    comm.Barrier()


class Killed(BaseException):
    """Nothing of the program runs after this."""


def killing(monkeypatch, at):
    """The `at`-th of these calls does not come to pass; returns how often they were made."""
    calls = []

    def watched(inner):
        def call(*args, **keywords):
            calls.append(inner)
            if len(calls) == at:
                raise Killed
            return inner(*args, **keywords)
        return call

    for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree"),
                        (torch, "save")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    return calls


@pytest.mark.parametrize("again", [False, True])
def test_killed_anywhere_while_writing_leaves_a_whole_checkpoint(again, tmp_path, monkeypatch):
    """Between any two file operations; `again`: when a checkpoint of that step is there already."""
    moment = 0
    while True:
        moment += 1
        folder = tmp_path / str(moment)
        for step in (6, 7, 8) if again else (6, 7):
            save(folder, step, value=1)
        with monkeypatch.context() as patch:
            calls = killing(patch, moment)
            try:
                save(folder, 8, value=2)
            except Killed:
                pass
        assert newest(folder) in [(8, 2.0), (8, 1.0) if again else (7, 1.0)], moment
        save(folder, 9)  # what was left over is no hindrance
        assert newest(folder) == (9, 9.0)
        if len(calls) < moment:
            break
    assert moment > 10, "no operations were watched: this test shows nothing"


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_cannot_write_is_named_on_all(comm, tmp_path, monkeypatch):
    folder = Path(comm.bcast(str(tmp_path)))
    state = {"w": torch.ones(3)}
    checkpoint.save(folder, comm, 1, state, {"owed": comm.rank})
    if comm.rank == comm.size - 1:
        def full(path, state):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(checkpoint, "_write_state", full)
    text = same_error(comm, CheckpointError,
                      lambda: checkpoint.save(folder, comm, 2, state, {"owed": 0}))
    assert f"rank {comm.size - 1}" in text and "No space left" in text
    path, manifest = checkpoint.newest(folder)
    assert (manifest["step"], manifest["ranks"]) == (1, comm.size)
    assert [mine["owed"] for mine in checkpoint.each_rank(path)] == list(range(comm.size))
    comm.Barrier()


# ---- another number of ranks ----------------------------------------------------------------


def total(states, kinds=("error", "error2")):
    """{name: sum of what all states owe, in float64}."""
    sums = {}
    for state in states:
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind in kinds:
                sums[name] = sums.get(name, 0) + value.double()
    return sums


def states_of(ranks, kinds=("error", "error2"), step=5):
    """States of random numbers, as Reducer gives them, in two buckets."""
    generator = torch.Generator().manual_seed(ranks)
    return [{"step": step} | {f"{kind}/{name}": torch.randn(SHAPES[name], generator=generator)
                              for bucket in (("s", "k"), ("b", "w"))
                              for kind in kinds for name in bucket} for _ in range(ranks)]


@pytest.mark.parametrize("before", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("kinds", [("error",), ("error", "error2")])
def test_what_all_ranks_owe_is_what_they_owed(before, after, kinds):
    """Less than one unit in the last place of a share for "error"; one rounding for "error2"."""
    old = states_of(before, kinds)
    copy = [{key: torch.as_tensor(v).clone() for key, v in state.items()} for state in old]
    new = checkpoint.repartition(old, after)
    assert all(torch.equal(torch.as_tensor(v), copy[r][k])
               for r, state in enumerate(old) for k, v in state.items()), "states were changed"
    assert len(new) == after and all(list(state) == list(old[0]) for state in new)
    for name, expected in total(old).items():
        most = torch.stack([state["error/" + name].abs() for state in new]).max() + expected.abs()
        error = (total(new)[name] - expected).abs()
        assert (error <= 2.0**-23 * most * len(kinds)).all(), (name, error.max())
    if "error2" in kinds:  # each element has one owner
        for name in SHAPES:
            held = sum((state[f"error2/{name}"] != 0).int() for state in new)
            assert (held <= 1).all() and (held == 1).any()
    mean = checkpoint.repartition(old, after, keep="mean")
    for name, expected in total(old).items():
        assert torch.allclose(total(mean)[name] / after, expected / before, atol=1e-6)


def test_only_leaders_hold_residuals():
    leader, other = states_of(1, ("error",))[0], {"step": 5}
    new = checkpoint.repartition([leader, other, leader, other], 3, holders=[0, 2])
    assert new[1] == {"step": 5} and set(new[0]) == set(new[2]) == set(leader)
    for name, expected in total([leader, leader]).items():
        assert torch.allclose(total(new)[name], expected)


def test_states_that_do_not_belong_together_are_refused():
    a, b = states_of(2)
    with pytest.raises(ValueError, match="keep='average': expected 'sum' or 'mean'"):
        checkpoint.repartition([a, b], 3, keep="average")
    with pytest.raises(MismatchError, match="rank 1 is of step 6.*rank 0 of step 5"):
        checkpoint.repartition([a, b | {"step": 6}], 3)
    with pytest.raises(MismatchError, match=r"rank 1 has 'error/w' of shape \[5, 12\]"):
        checkpoint.repartition([a, b | {"error/w": torch.zeros(5, 12)}], 3)
    with pytest.raises(MismatchError, match="exchange=server .* go on with 2 ranks"):
        checkpoint.repartition([a, b | {"shard": {}}], 3)


SPECS = ["onebit", "strom:tau=2", "dryden:proportion=8", "adacomp", "onebit:exchange=sharded",
         "dryden:proportion=8,exchange=sharded", "onebit:exchange=sharded,own=raw",
         "onebit:exchange=hierarchical"]


def steps(reducer, named, numbers):
    """{name: P times the mean} and {name: given} of this rank, summed over the steps."""
    size, rank = reducer.comm.size, reducer.comm.rank
    said, given = ({name: np.zeros(p.shape) for name, p in named} for _ in range(2))
    for step in numbers:
        for _, p in named:
            p.grad = None
        gradients = [whole_numbers(rank, step + i, p.numel()).reshape(p.shape)
                     for i, (_, p) in enumerate(named)]
        give(named, gradients)
        reducer.finish()
        for (name, p), gradient in zip(named, gradients):
            said[name] += size * p.grad.double().numpy()
            given[name] += gradient
    return said, given


@pytest.mark.mpi
@pytest.mark.parametrize("bucket_bytes", [200, 100])
@pytest.mark.parametrize("spec", SPECS)
def test_said_and_owed_is_given_from_some_ranks_to_others(spec, bucket_bytes, comm):
    """P ranks, then 1 rank, then P; and the last with other buckets. Nothing owed is lost."""
    named = parameters(**SHAPES)

    def reducer(comm, bucket_bytes, states=None):
        made = mpicomp.Reducer(named, spec, comm, bucket_bytes=bucket_bytes)
        if states is not None:
            held = [r for r, keys in enumerate(made.comm.allgather(len(made.state_dict())))
                    if keys > 1]
            made.load_state_dict(checkpoint.repartition(
                states, comm.size, holders=held)[comm.rank])
        return made

    def go(reducer, *numbers):
        said, given = steps(reducer, named, numbers)
        reducer.close()
        spoken.append(said)
        for name in given:
            received[name] = received.get(name, 0) + given[name]

    spoken, received = [], {}
    first = reducer(comm, 200)
    go(first, 0, 1, 2)
    states = comm.gather(first.state_dict())
    if comm.rank == 0:
        second = reducer(MPI.COMM_SELF, 200, states)
        go(second, 3, 4, 5)
        states = [second.state_dict()]
    states = comm.bcast(states)
    third = reducer(comm, bucket_bytes, states)
    before = total(comm.allgather(third.state_dict()))
    for name, expected in total(states).items():
        assert torch.allclose(before[name], expected, atol=1e-4), name
    go(third, 6, 7, 8)
    owed = total(comm.allgather(third.state_dict()))
    for name, _ in named:
        everything = comm.allreduce(received[name])
        said = comm.bcast(sum(part[name] for part in spoken))  # rank 0 was there all the time
        assert np.allclose(said + owed[name].numpy(), everything, atol=1e-3), name
    replicas_are_identical(comm, torch.nn.ParameterList(p for _, p in named))


# ---- signals --------------------------------------------------------------------------------


@pytest.mark.mpi
def test_a_signal_to_one_rank_is_heard_by_all_in_the_same_step(comm):
    before = signal.getsignal(signal.SIGUSR1)
    signals = checkpoint.Signals(comm, [signal.SIGUSR1])
    heard = []
    for step in range(5):
        signals.post()
        if step == 2 and comm.rank == comm.size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        heard.append(signals.agreed())
    assert heard == [0, 0, 0, signal.SIGUSR1, signal.SIGUSR1]
    signals.close()
    assert signal.getsignal(signal.SIGUSR1) == before


def sleep():
    time.sleep(100)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])  # SIGTERM is ranks.py's
def test_a_forked_child_is_ended_by_the_signal_as_before(number):
    before = signal.signal(number, signal.SIG_DFL)
    signals = checkpoint.Signals(MPI.COMM_SELF, [number])
    child = multiprocessing.get_context("fork").Process(target=sleep)
    child.start()
    try:
        time.sleep(0.2)
        os.kill(child.pid, number)
        child.join(20)
        assert child.exitcode == -number
        signals.post()
        assert signals.agreed() == 0    # it was not meant for this process
    finally:
        child.kill()
        signals.close()
        signal.signal(number, before)


def test_agreed_needs_post():
    signals = checkpoint.Signals(MPI.COMM_SELF, [])
    with pytest.raises(RuntimeError, match=r"call signals.post\(\) before it"):
        signals.agreed()


def test_a_handler_that_is_not_pythons_is_no_hindrance(monkeypatch):
    before = signal.getsignal(signal.SIGUSR1)
    with monkeypatch.context() as patch:
        patch.setattr(signal, "signal", lambda number, handler: None)   # as where C set one
        signals = checkpoint.Signals(MPI.COMM_SELF, [signal.SIGUSR1])
    try:
        signals.close()
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_repeated_signal_says_nothing_new_at_first_and_later_ends_the_process(monkeypatch):
    """Slurm sends two SIGTERM to ranks whose job it ends, one through srun."""
    clock, ended = [100.0], []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: ended.append(clock[0]))
    try:
        monkeypatch.setattr("mpicomp.signals.time.monotonic", lambda: clock[0])
        checkpoint.Signals(MPI.COMM_SELF, [signal.SIGUSR1])
        for seconds in (0, 1, 4.9, 5.1):
            clock[0] = 100.0 + seconds
            signal.raise_signal(signal.SIGUSR1)
        assert ended == [105.1]
    finally:
        signal.signal(signal.SIGUSR1, before)
