"""The checkpoints of a training: how it goes on from the newest one, also on other ranks."""
from __future__ import annotations

import torch

from mpicomp import checkpoint


class Checkpoints:
    """Saves a training in the folder checkpoint/ of --out, and goes on from what lies there.

    A checkpoint has a part that all ranks share (step, seconds, model, optimizer) and one of each
    rank (reducer, random numbers, bytes, tally, squares).
    """

    def __init__(self, setup, model, optimizer, reducer, account):
        self.setup, self.ranks, self.account = setup, setup.ranks, account
        self.model, self.optimizer, self.reducer = model, optimizer, reducer
        self.folder = setup.out / "checkpoint"

    def restore(self):
        """Go on from the newest checkpoint, where --resume asks for it; returns the first step."""
        args, ranks = self.setup.args, self.ranks
        finished, found, folders = ranks.comm.bcast(ranks.agreed(lambda: None if ranks.rank else (
            (self.setup.out / "result.json").exists(), checkpoint.newest(self.folder),
            checkpoint.folders(self.folder))))
        if found and not finished and not args.resume:
            ranks.refuse(f"{self.setup.out} holds an unfinished run; add --resume to go on with "
                         "it, or delete the folder")
        if folders and not found and (args.resume or not finished):
            ranks.refuse(f"{self.folder} holds {len(folders)} checkpoint(s), all of them damaged; "
                         "to start over, move that folder away or choose another --out")
        return self._load(*found) if found and args.resume else 0

    def _load(self, path, manifest):
        """Take over the state in this checkpoint; returns its step."""
        ranks = self.ranks
        if problem := checkpoint.objection(manifest, self.setup.config):
            ranks.refuse(f"{path}: {problem}, or choose another --out")
        shared, mine = ranks.agreed(lambda: checkpoint.load(path, ranks.rank % manifest["ranks"]))
        if manifest["ranks"] != ranks.size:
            ranks.say(f"written by {manifest['ranks']} ranks, now {ranks.size}: what they owe is "
                      "shared out anew and nothing of it is lost, but the run is not "
                      "bit-identical to an undisturbed one")
            mine = ranks.agreed(lambda: self._divided(checkpoint.each_rank(path), mine))
        self.model.load_state_dict(shared["model"])
        self.optimizer.load_state_dict(shared["optimizer"])
        self.reducer.load_state_dict(mine["reducer"])
        torch.set_rng_state(mine["rng"])
        self.account.resume(shared["seconds"], mine["bytes"], mine["tally"])
        self.setup.squares.update({name: value.to(self.setup.device)
                                   for name, value in mine["squares"].items()})
        if manifest["threads"] != torch.get_num_threads():
            ranks.say(f"it had {manifest['threads']} threads a rank, now "
                      f"{torch.get_num_threads()}: the last bits will differ")
        return shared["step"]

    def _divided(self, everyone, mine):
        """This rank's part of the state of another number of ranks.

        The reducer takes the mean over ranks, and slices of the batch are scaled to suit, so it is
        the mean of the residuals that says what the parameters will still get.
        """
        rank, size = self.ranks.rank, self.ranks.size
        owes = any(key.startswith("error") for key in self.reducer.state_dict())
        holders = [r for r, there in enumerate(self.ranks.comm.allgather(owes)) if there]
        states = checkpoint.repartition([other["reducer"] for other in everyone], size,
                                        keep="mean", holders=holders or range(size))
        added = {key: sum(other["tally"][key] for other in everyone) * (rank == 0)
                 for key in ("loss", "targets")}
        squares = {key: sum(other["squares"][key] for other in everyone) / len(everyone)
                   for key in mine["squares"]}
        return mine | dict(reducer=states[rank], tally=mine["tally"] | added, squares=squares)

    def save(self, step):
        """Write a checkpoint after this step. Collective."""
        checkpoint.save(
            self.folder, self.ranks.comm, step + 1,
            shared=dict(step=step + 1, seconds=self.account.seconds,
                        model=self.model.state_dict(), optimizer=self.optimizer.state_dict()),
            mine=dict(reducer=self.reducer.state_dict(), rng=torch.get_rng_state(),
                      bytes=self.account.bytes(), tally=self.account.tally,
                      squares=self.setup.squares),
            about=dict(config=self.setup.config, digest=self.setup.digest,
                       threads=torch.get_num_threads()))
