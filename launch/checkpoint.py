"""Checkpoints of all ranks in one folder, which appears by a rename when all of it is on disk.

    DIR/checkpoint/step-N/shared.pt        what the ranks have in common: model, optimizer
                          rank-R.pt        what only rank R knows: what it still owes
                          manifest.json    step, ranks, configuration, sha256 of each file

The newest folder is whole whatever happens while the next one is written; the last two are kept.
With ranks on several hosts the folder must lie on a file system that all of them share.
"""
from __future__ import annotations

import hashlib
import io
import json
import os
import shutil

import torch


def save(folder, comm, step, shared, mine, about):
    """All ranks together: `shared` from rank 0, `mine` from each, to folder/step-N.

    Both are dictionaries of tensors, numbers and plain containers; `about` goes into the manifest.
    """
    final = folder / f"step-{step}"
    aside = folder / f"step-{step}.part"
    if comm.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)        # left over from a run that was killed
        aside.mkdir(parents=True)
    comm.Barrier()
    parts = {f"rank-{comm.rank}.pt": mine}
    if comm.rank == 0:
        parts["shared.pt"] = shared
    written = comm.gather({name: _write_state(aside / name, parts[name]) for name in parts})
    if comm.rank == 0:
        files = {name: sha for part in written for name, sha in part.items()}
        manifest = {"step": step, "ranks": comm.size, "files": files, **about}
        write(aside / "manifest.json", json.dumps(manifest, indent=1).encode())
        _sync(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _sync(folder)
        for old in _folders(folder)[2:]:
            shutil.rmtree(old)
    comm.Barrier()


def newest(folder):
    """(path, manifest) of the newest checkpoint whose files are as its manifest says, or None."""
    for path in _folders(folder):
        try:
            manifest = json.loads((path / "manifest.json").read_bytes())
            if all(hashlib.sha256((path / name).read_bytes()).hexdigest() == sha
                   for name, sha in manifest["files"].items()):
                return path, manifest
        except (OSError, ValueError, KeyError):
            pass
        print(f"checkpoint {path} is damaged and was passed over", flush=True)
    return None


def objection(manifest, ranks, config):
    """Why this run cannot go on from that checkpoint, or None."""
    if manifest["ranks"] != ranks:
        return (f"written by {manifest['ranks']} ranks, found {ranks}; "
                f"type: launch/run -n {manifest['ranks']} ...")
    other = [f"{key}={manifest['config'].get(key)} there, {key}={value} here"
             for key, value in config.items() if manifest["config"].get(key) != value]
    if other:
        return f"written with another configuration ({'; '.join(other)}); give the same options"
    return None


def load(path, rank):
    """(shared, mine) as they were given to save."""
    return [torch.load(path / name, weights_only=True) for name in ("shared.pt", f"rank-{rank}.pt")]


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
    return sorted(folder.glob("step-*[0-9]"), key=lambda path: int(path.name[5:]), reverse=True)
