"""Lock a checkpoint folder, so that two jobs do not delete each other's checkpoints.

    FOLDER/lock.json    host, process id and job of the process that saves there, and since when

The process that saves holds an flock on the file until it ends, and then deletes the file. On a
file system without flock, the lock counts if its process runs on this host. If it ran on another
host, nobody can tell whether it still runs, and a job that was killed and requeued must be able to
go on: the newcomer takes the lock over and prints so, and the other process, if it still runs, gets
a CheckpointError in its next save.
"""

import atexit
import fcntl
import json
import os
import socket
import time
import uuid
from pathlib import Path

from mpicomp.errors import CheckpointError

NAME = "lock.json"
MOST = 8  # folders that a process keeps locked: each takes a file descriptor
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID", "JOB_ID", "PMIX_NAMESPACE")

_held = {}  # folder: (descriptor, token)


def held(folder) -> bool:
    """Does this process hold the lock? CheckpointError, once, if another one took it over."""
    key = _key(folder)
    if key not in _held:
        return False
    there = _read(folder)
    if there is not None and there.get("token") == _held[key][1]:
        return True
    os.close(_held.pop(key)[0])
    if there is None:  # the folder is gone, and a new one may be made
        return False
    raise CheckpointError(f"{folder} was taken over by {_who(there)}: give every job a folder of "
                          "its own")


def take(folder) -> None:
    """Lock the folder until this process ends; CheckpointError names any other holder."""
    if held(folder):
        return
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()),
            "job": next((f"{key}={os.environ[key]}" for key in JOBS if key in os.environ), None),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"), "token": uuid.uuid4().hex}
    for _ in range(3):  # its holder may be deleting the file right now
        there = _read(folder)
        handle = os.open(Path(folder) / NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            free = _flock(handle)
            if free is False or free is None and _lives(there):
                raise CheckpointError(
                    f"{folder} is in use by {_who(there)}: give every job a folder of its own, or "
                    "end that one")
            if there and there.get("host") != mine["host"]:
                print(f"checkpoint folder {folder} was in use by {_who(there)}, which has not said "
                      "that it ended, and is taken over", flush=True)
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(mine).encode(), 0)
            if (_read(folder) or {}).get("token") == mine["token"]:
                _held[_key(folder)], handle = (handle, mine["token"]), None
                break
        finally:
            if handle is not None:
                os.close(handle)
    else:
        raise CheckpointError(f"{Path(folder) / NAME} is deleted or overwritten all the time: does "
                              "another job save into this folder?")
    while len(_held) > MOST:
        _give_back(next(iter(_held)))


def _flock(handle):
    """True: locked. False: another process holds it. None: this file system has no flock."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _lives(there):
    """Does this process run, and on this host?"""
    if not there or there.get("host") != socket.gethostname() or there["pid"] == os.getpid():
        return False
    try:
        os.kill(there["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return there.get("born") == _born(there["pid"])  # process ids are reused


def _born(pid):
    """The start time of a process, in clock ticks since boot; None if it cannot be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _who(there):
    if not there:
        return "another process"
    job = f", {there['job']}" if there.get("job") else ""
    return f"process {there.get('pid')} on {there.get('host')}{job}, since {there.get('since')}"


def _read(folder):
    """The contents of the lock file; {} if it has none that can be used, None without a file."""
    try:
        there = json.loads((Path(folder) / NAME).read_bytes())
        return there if isinstance(there, dict) and isinstance(there.get("pid"), int) else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _key(folder):
    return os.path.realpath(folder)


def _give_back(key):
    """Delete the lock file if it is still ours, and unlock."""
    handle, token = _held.pop(key)
    try:
        if (_read(key) or {}).get("token") == token:
            (Path(key) / NAME).unlink()
    except OSError:  # the file stays, and names who saved there last
        pass
    os.close(handle)


@atexit.register
def _give_all_back():
    for key in list(_held):
        _give_back(key)


def _forget():
    """In a forked child: the lock belongs to the parent."""
    for handle, _ in _held.values():
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
