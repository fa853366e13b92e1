"""Checkpoints: one folder for all ranks, renamed into place once all of it is on disk.

    FOLDER/step-N/shared.pt        what all ranks have in common: model, optimizer
                  rank-R.pt        rank R's own: its residuals
                  manifest.json    step, ranks, sha256 of each file, and what the caller adds
    FOLDER/lock.json               which job saves here (folder_lock.py)

A checkpoint is written under another name and renamed last, so the newest one is always complete.
With ranks on several hosts, FOLDER must be on a file system that all of them share.
docs/checkpoints.md shows a training loop.
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

Where = str | os.PathLike[str]

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["RESUME", "Signals", "each_rank", "folders", "load", "newest", "objection",
           "repartition", "save", "write"]

SLOWEST = 1e6  # bytes per second; slower writing is a StallError
_said = []  # not empty: this process has printed that folders cannot be flushed


def save(folder: Where, comm: "MPI.Comm | None", step: int, shared: Mapping[str, Any],
         mine: Mapping[str, Any], about: Mapping[str, Any] | None = None, keep: int = 2,
         stall_timeout: float | None = None) -> None:
    """Write rank 0's `shared` and each rank's `mine` to folder/step-N. Collective.

    Both are dictionaries of tensors, numbers and plain containers, as state_dict() gives them;
    `about`, for JSON, goes into the manifest. The newest `keep` checkpoints stay: this one and
    those of the steps before it. Those of later steps, left by an earlier run, are deleted first.
    Raises CheckpointError on all ranks if any could not write, or if another job saves into this
    folder; earlier checkpoints are then unchanged. StallError if a rank does not come within
    `stall_timeout` seconds, by default those of MPICOMP_STALL_TIMEOUT, or 600; while files are
    written, a second more for each megabyte of the largest part.
    """
    folder, comm = Path(folder), mpi.intracommunicator(comm)
    mpi.end_all_on_exception(comm)
    about, timeout = about or {}, mpi.stall_limit(stall_timeout)
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
        _together(comm, lambda: folder_lock.held(folder), timeout)  # raises if another job came
        if comm.rank == 0:      # no rank writes any more; on a full disk the next save needs space
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _checked(step, about, keep, ranks):
    """(step as an int, the manifest without files); CheckpointError for unusable arguments."""
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
    """Rank 0: lock the folder, delete what a killed run left unfinished, and make `aside`.

    `ours`: a rank holds the lock already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not ours:
        folder_lock.take(folder)
    for name in os.listdir(folder):
        if re.fullmatch(r"step-[0-9]+\.part", name):
            shutil.rmtree(folder / name, ignore_errors=True)
    aside.mkdir(exist_ok=True)


def _publish(folder, aside, final, manifest, keep):
    """Rank 0: write the manifest, rename the checkpoint into place, then delete older ones."""
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
    """Delete a checkpoint that is not needed any more; if that fails, the next save tries again."""
    aside = path.with_name(f"step-{_step(path)}.part")  # half deleted it would look damaged
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
    except Exception as error:      # of any kind, since the others wait for the result
        mine, cause = (None, f"{type(error).__name__}: {error}"), error
    everyone = mpi.allgather(comm, mine, "saving a checkpoint (all ranks must call "
                             "checkpoint.save, not rank 0 alone)", timeout)
    for rank, (_, problem) in enumerate(everyone):
        if problem:
            raise CheckpointError(f"rank {rank} could not write its part of the checkpoint "
                                  f"({problem}); earlier checkpoints are untouched") from cause
    return [result for result, _ in everyone]


def newest(folder: Where) -> tuple[Path, dict[str, Any]] | None:
    """(path, manifest) of the newest checkpoint whose files match its manifest, or None.

    None, too, if there are `folders` and all are damaged. CheckpointError if a file exists and
    cannot be read, since it may be undamaged.
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
    """The manifest of a checkpoint; ValueError if `save` did not write it."""
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
    """Why a run with this configuration cannot resume from a checkpoint, or None if it can.

    `config` is compared after a round trip through JSON, which makes lists of tuples and strings
    of keys.
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

    `ranks` is the number of ranks now: CheckpointError if another number wrote the checkpoint,
    since residuals would be lost or counted twice. `each_rank` and `repartition` divide them.
    """
    before = _read_manifest(path)["ranks"]
    if not 0 <= rank < before or ranks not in (None, before):
        raise CheckpointError(
            f"{path} was written by {before} rank(s), and this is rank {rank}"
            f"{f' of {ranks}' if ranks else ''}: divide what they owe anew, repartition([mine"
            "['reducer'] for mine in each_rank(path)], ranks) (docs/checkpoints.md)")
    return _read(path, "shared.pt"), _read(path, f"rank-{rank}.pt")


def each_rank(path: Where) -> list[Any]:
    """What every rank gave as `mine`, in rank order: for resuming on another number of ranks."""
    return [_read(path, f"rank-{rank}.pt") for rank in range(_read_manifest(path)["ranks"])]


def _read_manifest(path):
    try:
        return _manifest(path)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _read(path, name):
    return torch.load(Path(path) / name, map_location="cpu", weights_only=True)


def write(path: Where, content: bytes) -> str:
    """Write bytes to a file and flush it to disk; returns their sha256."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _content(name, state):
    """The bytes of `state` as a file; CheckpointError if `load` would refuse them."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    _readable(buffer, name)
    return buffer.getvalue()


def _readable(buffer, name):
    """CheckpointError if `load` would refuse these bytes: now, while the caller can mend them."""
    for device in "meta", "cpu":    # meta copies no tensor, so it costs next to nothing
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
    """Flush a folder to disk, and with it new names; print once if its file system cannot."""
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
    """The folders of checkpoints in `folder`, damaged or not, highest step first.

    An old checkpoint that was being replaced by one of the same step counts if the new one is
    missing.
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
