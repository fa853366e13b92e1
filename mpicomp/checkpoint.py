"""Checkpoints of all ranks in one folder, which appears by a rename when all of it is on disk.

    FOLDER/step-N/shared.pt        what the ranks have in common: model, optimizer
                  rank-R.pt        what only rank R knows: what it still owes
                  manifest.json    step, ranks, sha256 of each file, and what the caller adds

A folder is written aside and renamed last, so the newest one is whole whatever happens while the
next is written. With ranks on several hosts it must lie on a file system that all of them share.
docs/checkpoints.md shows a training loop with all of this.
"""

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import torch

from mpicomp.errors import CheckpointError
from mpicomp.repartition import repartition
from mpicomp.signals import RESUME, Signals

__all__ = ["RESUME", "Signals", "each_rank", "load", "newest", "objection", "repartition", "save",
           "write"]


def save(folder, comm, step, shared, mine, about=None, keep=2):
    """All ranks together: `shared` of rank 0 and `mine` of each rank, to folder/step-N.

    Both are dictionaries of tensors, numbers and plain containers, as state_dict() gives them;
    `about`, for JSON, goes into the manifest. The newest `keep` checkpoints stay. Raises
    CheckpointError on all ranks if any could not write; the checkpoints before are then as before.
    """
    folder = Path(folder)
    final, aside = folder / f"step-{step}", folder / f"step-{step}.part"
    _together(comm, lambda: _clear(aside) if comm.rank == 0 else None)
    parts = {f"rank-{comm.rank}.pt": mine}
    if comm.rank == 0:
        parts["shared.pt"] = shared
    written = _together(comm, lambda: {name: _write_state(aside / name, state)
                                       for name, state in parts.items()})
    files = {name: sha for part in written for name, sha in part.items()}
    manifest = {"step": step, "ranks": comm.size, "files": files, **(about or {})}
    _together(comm, lambda: _publish(folder, aside, final, manifest, keep)
              if comm.rank == 0 else None)


def _clear(aside):
    shutil.rmtree(aside, ignore_errors=True)        # left over from a run that was killed
    aside.mkdir(parents=True)


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
    for leftover in folder.glob("step-*.old"):
        shutil.rmtree(leftover)
    for old in _folders(folder)[keep:]:
        shutil.rmtree(old)


def _together(comm, work):
    """Every rank's result of work(); CheckpointError on all ranks if it fails on any."""
    try:
        mine = work(), None
    except OSError as error:
        mine = None, f"{type(error).__name__}: {error}"
    everyone = comm.allgather(mine)
    for rank, (_, problem) in enumerate(everyone):
        if problem:
            raise CheckpointError(f"rank {rank} could not write its part of the checkpoint "
                                  f"({problem}); earlier checkpoints are untouched")
    return [result for result, _ in everyone]


def newest(folder):
    """(path, manifest) of the newest checkpoint whose files are as its manifest says, or None."""
    for path in _folders(Path(folder)):
        try:
            manifest = json.loads((path / "manifest.json").read_bytes())
            if all(hashlib.sha256((path / name).read_bytes()).hexdigest() == sha
                   for name, sha in manifest["files"].items()):
                return path, manifest
        except (OSError, ValueError, KeyError):
            pass
        print(f"checkpoint {path} is damaged and was passed over", flush=True)
    return None


def objection(manifest, config):
    """Why a run with this configuration cannot go on from that checkpoint, or None."""
    other = [f"{key}={manifest['config'].get(key)} there, {key}={value} here"
             for key, value in config.items() if manifest["config"].get(key) != value]
    if other:
        return f"written with another configuration ({'; '.join(other)}); give the same options"
    return None


def load(path, rank):
    """(shared, mine) as they were given to save. Nothing in the files is executed."""
    return _read(path, "shared.pt"), _read(path, f"rank-{rank}.pt")


def each_rank(path):
    """What every rank gave as `mine`, in the order of the ranks: for another number of them."""
    ranks = json.loads((Path(path) / "manifest.json").read_bytes())["ranks"]
    return [_read(path, f"rank-{rank}.pt") for rank in range(ranks)]


def _read(path, name):
    return torch.load(Path(path) / name, map_location="cpu", weights_only=True)


def write(path, content):
    """Bytes to a file, on disk when it returns; gives back their sha256."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _write_state(path, state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return write(path, buffer.getvalue())


def _sync(folder):
    """A new name in a folder is on disk only when the folder is."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _folders(folder):
    """Checkpoints, the newest first; one that a new one of the same step was to replace, last."""
    found = [(int(p.name[5:].partition(".")[0]), not p.name.endswith(".old"), p)
             for p in folder.glob("step-*[0-9]")]
    found += [(int(p.name[5:-4]), False, p) for p in folder.glob("step-*[0-9].old")
              if not p.with_name(p.name[:-4]).exists()]
    return [path for *_, path in sorted(found, reverse=True)]
