"""Checkpoints: whole whatever happens while one is written."""

import errno
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI
from test_repartition import total
from training import give, parameters, same_error, whole_numbers

import mpicomp
from mpicomp import CheckpointError, checkpoint


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
    assert names(tmp_path) == ["step-10", "step-9"]
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
    return sorted(path.name for path in Path(folder).iterdir() if path.name != "lock.json")


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
        assert not comm.bcast(names(folder))
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
        def full(path, content):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(checkpoint, "write", full)
    text = same_error(comm, CheckpointError,
                      lambda: checkpoint.save(folder, comm, 2, state, {"owed": 0}))
    assert f"rank {comm.size - 1}" in text and "No space left" in text
    path, manifest = checkpoint.newest(folder)
    assert (manifest["step"], manifest["ranks"]) == (1, comm.size)
    assert [mine["owed"] for mine in checkpoint.each_rank(path)] == list(range(comm.size))
    comm.Barrier()
