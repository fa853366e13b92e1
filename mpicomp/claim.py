"""Which job saves into a folder: two in one would delete each other's checkpoints.

    FOLDER/lock.json    host, process and job of who saves there, and since when

The file is locked (flock) while the process lives and deleted when it ends. Where the file system
has no flock, a living process of this host is believed. Whether one of another host lives nobody
can tell, and a job that was killed must be able to go on: so the newcomer takes the folder over,
says so, and whoever was there reads it in its next save, which fails.
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
MOST = 8  # folders that a process holds: one descriptor each
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID", "JOB_ID", "PMIX_NAMESPACE")

_held = {}  # folder: (descriptor, token)


def held(folder) -> bool:
    """Does this process hold the folder? CheckpointError, once, if another has taken it over."""
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
    """Hold the folder until this process ends. CheckpointError that says who holds it."""
    if held(folder):
        return
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()),
            "job": next((f"{key}={os.environ[key]}" for key in JOBS if key in os.environ), None),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"), "token": uuid.uuid4().hex}
    for _ in range(3):  # who holds it may delete the file just now
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
    """True: it is ours now. False: another process has it. None: not on this file system."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _lives(there):
    """Is it a process of this host that has not ended?"""
    if not there or there.get("host") != socket.gethostname() or there["pid"] == os.getpid():
        return False
    try:
        os.kill(there["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return there.get("born") == _born(there["pid"])  # its number may be another's by now


def _born(pid):
    """When a process was started, in the system's own count; None where that cannot be read."""
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
    """What the file says; {} where it says nothing, None where there is none."""
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
    """Others may save there."""
    handle, token = _held.pop(key)
    try:
        if (_read(key) or {}).get("token") == token:
            (Path(key) / NAME).unlink()
    except OSError:  # it says who saved there last
        pass
    os.close(handle)


@atexit.register
def _give_all_back():
    for key in list(_held):
        _give_back(key)


def _forget():
    """A forked child holds nothing; the lock stays its parent's."""
    for handle, _ in _held.values():
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
