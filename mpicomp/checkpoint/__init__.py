"""Checkpoints of all ranks in one folder, which appears by a rename when all of it is on disk.

    FOLDER/step-N/shared.pt        what the ranks have in common: model, optimizer
                  rank-R.pt        what only rank R knows: what it still owes
                  manifest.json    step, ranks, sha256 of each file, and what the caller adds
    FOLDER/lock.json               which job saves here (folder_lock.py)

A folder is written aside and renamed last, so the newest one is whole whatever happens while the
next is written. With ranks on several hosts it must lie on a file system that all of them share.
docs/checkpoints.md shows a training loop with all of this.
"""

import errno
import hashlib
import io
import json
import operator
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mpicomp import mpi
from mpicomp.checkpoint import folder_lock
from mpicomp.checkpoint.repartition import repartition
from mpicomp.checkpoint.signals import RESUME, Signals
from mpicomp.errors import CheckpointError
from mpicomp.reducer.startup import stall_limit

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["RESUME", "Signals", "each_rank", "folders", "load", "newest", "objection",
           "repartition", "save", "write"]

Where = str | os.PathLike[str]
SLOWEST = 1e6  # bytes a second: time is given to write at this speed before it is a StallError
_said = []  # not empty: this process has said that folders cannot be flushed


def save(folder: Where, comm: "MPI.Comm | None", step: int, shared: Mapping[str, Any],
         mine: Mapping[str, Any], about: Mapping[str, Any] | None = None, keep: int = 2,
         stall_timeout: float | None = None) -> None:
    """All ranks together: `shared` of rank 0 and `mine` of each rank, to folder/step-N.

    Both are dictionaries of tensors, numbers and plain containers, as state_dict() gives them;
    `about`, for JSON, goes into the manifest. The newest `keep` checkpoints stay: this one and
    those of the steps before it; those of later steps are of an older history and go first. Raises
    CheckpointError on all ranks if any could not write, or if another job saves into this folder;
    the checkpoints before are then as before. StallError where a rank does not come within
    `stall_timeout` seconds, by default those of MPICOMP_STALL_TIMEOUT, or 600; while files are
    written, a second more for each megabyte of the largest part.
    """
    folder, comm = Path(folder), mpi.intracommunicator(comm)
    mpi.end_all_on_exception(comm)
    about, timeout = about or {}, stall_limit(stall_timeout)
    first = _together(comm, lambda: (*_checked(step, about, keep, comm.size),
                                     folder_lock.held(folder)), timeout)
    step, manifest, _ = first[0]
    final, aside = folder / f"step-{step}", folder / f"step-{step}.part"
    try:
        def prepare():
            if comm.rank == 0:
                _clear(folder, aside, any(ours for _, _, ours in first))
            parts = {f"rank-{comm.rank}.pt": mine} | ({} if comm.rank else {"shared.pt": shared})
            content.update({name: _content(name, state) for name, state in parts.items()})
            return sum(map(len, content.values()))

        content = {}
        longer = timeout + max(_together(comm, prepare, timeout)) / SLOWEST
        written = _together(comm, lambda: {name: write(aside / name, data)
                                           for name, data in content.items()}, longer)
        manifest["files"] = {name: sha for part in written for name, sha in part.items()}
        _together(comm, lambda: _publish(folder, aside, final, manifest, keep)
                  if comm.rank == 0 else None, timeout)
    except CheckpointError:
        _together(comm, lambda: folder_lock.held(folder), timeout)  # says so where another job came
        if comm.rank == 0:      # no rank writes any more; on a full disk the next save needs this
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _checked(step, about, keep, ranks):
    """(step as an int, the manifest but for its files), or an error before anything is written."""
    step = operator.index(step)
    if step < 0 or operator.index(keep) < 1:
        raise CheckpointError(f"step={step}, keep={keep}: expected a step of 0 or more, and at "
                              "least one checkpoint to keep")
    manifest = {"step": step, "ranks": ranks, "files": {}}
    if own := [key for key in manifest if about.get(key, manifest[key]) != manifest[key]]:
        raise CheckpointError(f"about has {', '.join(map(repr, own))}, which the manifest says "
                              "itself; choose another name")
    return step, json.loads(json.dumps({**about, **manifest}))


def _clear(folder, aside, ours):
    """Rank 0: what a run that was killed had not finished goes, then there is room for this one.

    `ours`: a rank holds the folder already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not ours:
        folder_lock.take(folder)
    for name in os.listdir(folder):
        if re.fullmatch(r"step-[0-9]+\.part", name):
            shutil.rmtree(folder / name, ignore_errors=True)
    aside.mkdir(exist_ok=True)


def _publish(folder, aside, final, manifest, keep):
    """Rank 0: the manifest, then the rename that makes it a checkpoint, then older ones go."""
    write(aside / "manifest.json", json.dumps(manifest, indent=1).encode())
    _sync(aside)
    if final.exists():      # the same step again: the old one stays until the new one is in place
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    aside.rename(final)
    _sync(folder)
    for name in os.listdir(folder):
        if re.fullmatch(r"step-[0-9]+\.old", name) and (folder / name[:-4]).exists():
            _drop(folder / name)
    before = [path for path in folders(folder) if path != final]
    for path in sorted(before, key=lambda path: _step(path) > manifest["step"])[keep - 1:]:
        _drop(path)


def _drop(path):
    """Delete a checkpoint that is not needed any more; where that fails, the next save tries."""
    aside = path.with_name(f"step-{_step(path)}.part")  # at once, or its half would look damaged
    try:
        path.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        print(f"checkpoint {path} is not needed any more but could not be deleted ({error})",
              flush=True)


def _together(comm, work, timeout):
    """Every rank's result of work(); CheckpointError on all ranks if it fails on any."""
    cause = None
    try:
        mine = work(), None
    except CheckpointError as error:
        mine, cause = (None, str(error)), error
    except Exception as error:      # whatever it is, the others wait to hear of it
        mine, cause = (None, f"{type(error).__name__}: {error}"), error
    everyone = mpi.allgather(comm, mine, "saving a checkpoint (all ranks must call "
                             "checkpoint.save, not rank 0 alone)", timeout)
    for rank, (_, problem) in enumerate(everyone):
        if problem:
            raise CheckpointError(f"rank {rank} could not write its part of the checkpoint "
                                  f"({problem}); earlier checkpoints are untouched") from cause
    return [result for result, _ in everyone]


def newest(folder: Where) -> tuple[Path, dict[str, Any]] | None:
    """(path, manifest) of the newest checkpoint whose files are as its manifest says, or None.

    None also where there are `folders` and all are damaged. CheckpointError where a file is there
    and cannot be read, for it may be whole.
    """
    for path in folders(folder):
        try:
            manifest = _manifest(path)
            if all(_sha256(path / name) == sha for name, sha in manifest["files"].items()):
                return path, manifest
        except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
            pass
        except OSError as error:
            raise CheckpointError(
                f"cannot tell whether {path} is whole: {error}. Start again where its files can be "
                "read, or move it away to go on from the one before") from error
        print(f"checkpoint {path} is damaged and was passed over", flush=True)
    return None


def _manifest(path):
    """The manifest of a checkpoint; ValueError if it is none that `save` wrote."""
    manifest = json.loads((Path(path) / "manifest.json").read_bytes())
    files, ranks, step = (manifest.get(key) if isinstance(manifest, dict) else None
                          for key in ("files", "ranks", "step"))
    if not (isinstance(files, dict) and isinstance(ranks, int) and isinstance(step, int)
            and len(files) == ranks + 1
            and files.keys() == {"shared.pt", *(f"rank-{rank}.pt" for rank in range(ranks))}):
        raise ValueError(f"{path}: not the manifest of a checkpoint")
    return manifest


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def objection(manifest: Mapping[str, Any], config: Any) -> str | None:
    """Why a run with this configuration cannot go on from that checkpoint, or None.

    `config` is compared as JSON gives it back: with lists for tuples, and names for numbers.
    """
    there, here = manifest.get("config"), json.loads(json.dumps(config))
    if not isinstance(there, dict):
        return "written without about=dict(config=...), so what it was written with is not known"
    other = [f"{key}={there.get(key)} there, {key}={here.get(key)} here"
             for key in {**here, **there} if there.get(key) != here.get(key)]
    if other:
        return f"written with another configuration ({'; '.join(other)}); give the same options"
    return None


def load(path: Where, rank: int, ranks: int | None = None) -> tuple[Any, Any]:
    """(shared, mine) as they were given to save. Nothing in the files is executed.

    With `ranks`, how many there are now, CheckpointError if it was written by another number: what
    the others owe would be dropped, or be owed twice. `each_rank` and `repartition` divide it.
    """
    before = _read_manifest(path)["ranks"]
    if not 0 <= rank < before or ranks not in (None, before):
        raise CheckpointError(
            f"{path} was written by {before} rank(s), and this is rank {rank}"
            f"{f' of {ranks}' if ranks else ''}: divide what they owe anew, repartition([mine"
            "['reducer'] for mine in each_rank(path)], ranks) (docs/checkpoints.md)")
    return _read(path, "shared.pt"), _read(path, f"rank-{rank}.pt")


def each_rank(path: Where) -> list[Any]:
    """What every rank gave as `mine`, in the order of the ranks: for another number of them."""
    return [_read(path, f"rank-{rank}.pt") for rank in range(_read_manifest(path)["ranks"])]


def _read_manifest(path):
    try:
        return _manifest(path)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _read(path, name):
    return torch.load(Path(path) / name, map_location="cpu", weights_only=True)


def write(path: Where, content: bytes) -> str:
    """Bytes to a file, on disk when it returns; gives back their sha256."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _content(name, state):
    """The bytes of a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    _readable(buffer, name)
    return buffer.getvalue()


def _readable(buffer, name):
    """CheckpointError if `load` would refuse it: now its owner can still be asked for another."""
    for device in "meta", "cpu":    # meta: no tensor is copied, which is all but free
        try:
            buffer.seek(0)
            torch.load(buffer, map_location=device, weights_only=True)
            return
        except Exception as error:
            problem = error
    found = re.search(r"GLOBAL ([\w.]+)", str(problem))
    raise CheckpointError(
        f"{name} would hold {found[1] if found else repr(problem)[:200]}, which is not read back; "
        "expected tensors, Python's own numbers and plain containers") from problem


def _sync(folder):
    """A new name in a folder is on disk only when the folder is, if its file system can say so."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:    # CIFS, and some that are made with FUSE
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        if not _said:
            _said.append(folder)
            print(f"checkpoint folder {folder}: its file system does not flush folders ({error}), "
                  "so after a loss of power the newest checkpoint may be missing", flush=True)
    finally:
        os.close(handle)


def folders(folder: Where) -> list[Path]:
    """The folders of checkpoints in `folder`, whole or not, that of the highest step first.

    One that a new one of the same step was to replace counts where the new one is missing.
    """
    folder = Path(folder)
    try:
        names = set(os.listdir(folder))
    except FileNotFoundError:
        return []
    found = [folder / name for name in names if re.fullmatch(r"step-[0-9]+(\.old)?", name)
             and name.removesuffix(".old") not in names - {name}]
    return sorted(filter(Path.is_dir, found), reverse=True,
                  key=lambda path: (_step(path), path.suffix != ".old", path.name))


def _step(path):
    return int(re.match("step-([0-9]+)", path.name)[1])
