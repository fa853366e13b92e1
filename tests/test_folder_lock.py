"""Where checkpoints are saved: by one job, on any file system, by all ranks or with an error."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mpi4py import MPI
from training import same_error

from mpicomp import CheckpointError, StallError, checkpoint
from mpicomp.checkpoint import folder_lock


def save(folder, step=1, comm=MPI.COMM_SELF):
    checkpoint.save(folder, comm, step, {"a": step}, {"owed": comm.rank})


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture(autouse=True)
def forget():
    """Every test is a process of its own, as far as folders are concerned."""
    folder_lock._give_all_back()
    checkpoint._said.clear()


# ---- folders that cannot be flushed ---------------------------------------------------------


def not_for_folders(number):
    """os.fsync of a file system that refuses it for folders."""
    whole = os.fsync

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        whole(handle)
    return fsync


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_where_folders_cannot_be_flushed_checkpoints_are_saved(number, tmp_path, monkeypatch,
                                                               capsys):
    """EINVAL on CIFS and some of FUSE. Said once."""
    monkeypatch.setattr(os, "fsync", not_for_folders(number))
    for step in 1, 2, 3:
        save(tmp_path, step)
    assert checkpoint.newest(tmp_path)[1]["step"] == 3
    said = capsys.readouterr().out
    assert said.count("does not flush folders") == 1 and os.strerror(number) in said


def test_a_folder_that_fails_to_be_flushed_is_an_error_and_no_descriptor_leaks(tmp_path,
                                                                               monkeypatch):
    save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", not_for_folders(errno.EIO))
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(CheckpointError, match=os.strerror(errno.EIO)):
                save(tmp_path, 2)
        assert len(os.listdir("/proc/self/fd")) == before
    assert checkpoint.newest(tmp_path)[1]["step"] == 1


# ---- one job a folder -----------------------------------------------------------------------


OTHER = {"host": "node7", "pid": 12345, "born": "9", "job": "SLURM_JOB_ID=42",
         "since": "2026-01-02 03:04:05", "token": "theirs"}


def no_flock(*_):
    raise OSError(errno.ENOTSUP, "Operation not supported")


def other_job(folder, lives=True, **changes):
    """Leave in the folder what another process writes that saves there; its lock, if it lives."""
    folder.mkdir(exist_ok=True)
    handle = os.open(folder / folder_lock.NAME, os.O_RDWR | os.O_CREAT)
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(OTHER | changes).encode(), 0)
    if lives:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    os.close(handle)


def test_a_folder_in_use_by_another_job_is_refused_and_says_by_whom(tmp_path):
    other = other_job(tmp_path)
    for _ in range(2):
        with pytest.raises(CheckpointError) as raised:
            save(tmp_path)
        for word in ("process 12345", "on node7", "SLURM_JOB_ID=42", "2026-01-02 03:04:05",
                     "a folder of its own"):
            assert word in str(raised.value)
    assert names(tmp_path) == [folder_lock.NAME]
    os.close(other)  # that process has ended
    save(tmp_path)
    assert names(tmp_path) == [folder_lock.NAME, "step-1"]


def test_what_a_killed_job_has_left_is_no_hindrance(tmp_path, capsys):
    other_job(tmp_path, lives=False)
    save(tmp_path)
    assert "was in use by process 12345 on node7" in capsys.readouterr().out
    other_job(tmp_path / "here", lives=False, host=folder_lock.socket.gethostname())
    save(tmp_path / "here")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / folder_lock.NAME).write_text('{"host": "no')
    save(tmp_path / "half")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("fails", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK])
def test_without_flock_a_living_process_of_this_host_is_believed(fails, tmp_path, monkeypatch):
    def no_flock(*_):
        raise OSError(fails, os.strerror(fails))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    here = {"host": folder_lock.socket.gethostname(), "pid": os.getppid(),
            "born": folder_lock._born(os.getppid())}
    other_job(tmp_path, lives=False, **here)
    with pytest.raises(CheckpointError, match=f"in use by process {os.getppid()} on"):
        save(tmp_path)
    for changes in ({"born": "0"},                  # its number is another's by now
                    {"pid": os.getpid()},           # of another container, or before a restart
                    {"pid": 2**22 + 1}):            # there are no such numbers
        folder_lock._give_all_back()
        other_job(tmp_path, lives=False, **here | changes)
        save(tmp_path)


def test_without_flock_a_job_of_another_host_takes_over_and_the_first_one_says_so(
        tmp_path, monkeypatch, capsys):
    """Nobody can tell whether that process lives; both are told, and nothing is lost."""
    monkeypatch.setattr(fcntl, "flock", no_flock)
    save(tmp_path)
    mine = dict(folder_lock._held)
    folder_lock._held.clear()  # the other job, which takes us for one of another host
    with monkeypatch.context() as patch:
        patch.setattr(folder_lock.socket, "gethostname", lambda: "node8")
        save(tmp_path, 2)
        assert "is taken over" in capsys.readouterr().out
        theirs = dict(folder_lock._held)
    folder_lock._held.clear()
    folder_lock._held.update(mine)
    with pytest.raises(CheckpointError, match="taken over by process .* on node8"):
        save(tmp_path, 3)
    folder_lock._held.update(theirs)
    save(tmp_path, 4)
    assert names(tmp_path) == [folder_lock.NAME, "step-2", "step-4"]


def test_a_job_that_comes_while_files_are_written_is_named(tmp_path, monkeypatch):
    """Not only the file that it has deleted."""
    save(tmp_path)

    def write(path, content):
        monkeypatch.undo()
        other_job(tmp_path, lives=False)
        raise FileNotFoundError(path)

    monkeypatch.setattr(checkpoint, "write", write)
    with pytest.raises(CheckpointError, match="taken over by process 12345 on node7"):
        save(tmp_path, 2)


def test_a_folder_that_was_deleted_is_taken_again(tmp_path):
    for _ in range(2):
        save(tmp_path / "x")
        assert names(tmp_path / "x") == [folder_lock.NAME, "step-1"]
        checkpoint.shutil.rmtree(tmp_path / "x")


def test_many_folders_take_few_descriptors(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for run in range(2 * folder_lock.MOST):
        save(tmp_path / str(run))
    assert len(os.listdir("/proc/self/fd")) <= before + folder_lock.MOST
    assert names(tmp_path / "0") == ["step-1"] and folder_lock.NAME in names(tmp_path / str(run))


def test_a_real_process_that_lives_one_that_ends_and_its_child(tmp_path):
    """A forked child deletes nothing when it ends, and holds nothing where it lives on."""
    code = """
import os, signal, sys
from mpicomp.checkpoint import folder_lock
folder_lock.take(sys.argv[1])
if not (first := os.fork()):
    sys.exit()
os.waitpid(first, 0)
if not (second := os.fork()):
    signal.pause()
os.write(1, f"{second}\\n".encode())
sys.stdin.readline()
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        try:
            with pytest.raises(CheckpointError, match=f"in use by process {process.pid} on"):
                save(tmp_path)
            process.stdin.close()
            process.wait(50)
            assert names(tmp_path) == []
            save(tmp_path)
        finally:
            os.kill(child, signal.SIGKILL)


# ---- all ranks ------------------------------------------------------------------------------


@pytest.mark.mpi(min_size=2)
def test_a_checkpoint_of_rank_0_alone_is_no_hang(comm, tmp_path, monkeypatch):
    """As after the last step, where somebody wrote `if comm.rank == 0:` before it."""
    folder = comm.bcast(str(tmp_path))
    monkeypatch.setenv("MPICOMP_STALL_TIMEOUT", "0.3")
    part = comm.Dup()
    if comm.rank == 0:
        with pytest.raises(StallError, match="all ranks must call checkpoint.save, not rank 0"):
            save(folder, comm=part)
        assert names(folder) == []
    comm.Barrier()


@pytest.mark.mpi(min_size=2)
def test_the_rank_that_holds_the_folder_need_not_stay_rank_0(comm, tmp_path):
    """As where ranks are counted anew: it is the same job."""
    folder = comm.bcast(str(tmp_path))
    save(folder, 1, comm)
    turned = comm.Split(0, -comm.rank)
    save(folder, 2, turned)
    if comm.rank == 0:
        assert names(folder) == [folder_lock.NAME, "step-1", "step-2"]
    comm.Barrier()


@pytest.mark.mpi(min_size=2)
def test_ranks_that_save_each_by_itself_into_one_folder(comm, tmp_path):
    folder = comm.bcast(str(tmp_path))
    if comm.rank == 0:
        save(folder)
    comm.Barrier()
    if comm.rank:
        with pytest.raises(CheckpointError, match="in use by process"):
            save(folder)
    comm.Barrier()
    other = comm.bcast(os.getpid())
    part = comm.Split(comm.rank > 0)
    if comm.rank:
        text = same_error(part, CheckpointError, lambda: save(folder, 2, part))
        assert f"process {other} on" in text
    comm.Barrier()
