"""The ranks of a training: who prints, and how all of them end with one line."""
from __future__ import annotations

import os
import sys

import torch

import mpicomp.mpi
from trainer.sources import DataError


class Ranks:
    """This process among those of the job: `comm`, a communicator of its own, `rank` and `size`.

    Starts MPI. Where that fails, the process prints one line and ends with status 2.
    """

    def __init__(self):
        try:
            self.mpi = mpicomp.mpi.load()
        except mpicomp.LaunchError as problem:
            print(f"train.py: {problem}", file=sys.stderr)
            sys.exit(2)
        self.move(self.mpi.COMM_WORLD.Dup())  # the reducer makes its own, and the two never mix

    def move(self, comm):
        """Use `comm` from now on: of the ranks that are left where one has died."""
        self.comm, self.rank, self.size = comm, comm.rank, comm.size

    def say(self, text):
        """Print a line, on rank 0 only."""
        if self.rank == 0:
            print(text, flush=True)

    def refuse(self, problem):
        """End with one line and status 2. All ranks must call it together."""
        if self.rank == 0:
            print(f"train.py: {problem}", file=sys.stderr, flush=True)
        self.end(2)

    def end(self, status):
        """End this process with an exit status. All ranks must call it together."""
        self.mpi.Finalize()
        sys.exit(status)

    def agreed(self, work):
        """work() on every rank; if it fails on any, all of them are refused with what it said."""
        result = problem = None
        try:
            result = work()
        except mpicomp.StallError:  # the others are not here to be told
            raise
        except (DataError, mpicomp.MpicompError, OSError) as found:
            problem = " ".join(str(found).split())
        problems = self.comm.allgather(problem)
        for rank, problem in enumerate(problems):
            if problem:
                self.refuse(problem if len(set(problems)) == 1 else f"rank {rank}: {problem}")
        return result

    def share_cores(self):
        """Divide the cores of a node among its ranks; in each, torch would take all of them.

        Does nothing where OMP_NUM_THREADS is set, as launch/run does; a plain mpirun or srun does
        not.
        """
        if "OMP_NUM_THREADS" not in os.environ:
            node = self.comm.Split_type(self.mpi.COMM_TYPE_SHARED)
            cores = set().union(*node.allgather(os.sched_getaffinity(0)))
            torch.set_num_threads(max(1, len(cores) // node.size))
