#!/usr/bin/env python3
"""Time to accuracy over slow links: one job of `launch/reproduce speed`, started on every rank.

    launch/cluster up -n 4 --rate 1gbit
    launch/cluster run -- launch/claims/speed.py --seeds 1 --out FILE

Trains one network on Fashion-MNIST from scratch with each contender in turn, until its accuracy on
the whole test set is what was asked for: torch's DistributedDataParallel on gloo, without a hook
and with its fp16 and PowerSGD hooks, and this package's methods. The clock stands still while
accuracy is measured. Rank 0 writes a line of JSON for each run: {"name", "seed", "links", "steps",
"seconds", "reached", "curve": [[step, seconds, accuracy], ...]}.
"""
from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import mpicomp
from mpicomp import mpi
from mpicomp.bench.step import PEERS, distribute, join_gloo
from mpicomp.bench.timing import quiet_barrier

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # launch/
from trainer import datasets, models, scores  # noqa: E402
from trainer.sources import DataError  # noqa: E402

BATCH, RATE = 256, 0.2


def network():
    """Bytes [n, 28, 28] -> logits [n, 10]; 3.25 million parameters, 13 MB of gradient."""
    return nn.Sequential(
        models.Centred(),
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 2048), nn.ReLU(), nn.Linear(2048, 10))


class Race:
    """The data and the rules: the same batches, start and learning rate for every contender."""

    def __init__(self, comm, options):
        self.comm, self.options = comm, options
        self.data = datasets.load("fashion")

    def batch(self, step, seed):
        """This rank's part of global batch `step`."""
        split = self.data.train
        rows = datasets.my_rows(len(split), BATCH, seed, step, self.comm.rank, self.comm.size)
        return scores.rows_of(split, rows)

    def accuracy(self, model):
        """Of the whole test set; each rank takes a share."""
        test = self.data.test
        return scores.evaluate(model, test, np.arange(len(test)), self.comm)[1]

    def run(self, name, seed):
        """One run from the start until the wanted accuracy; what main writes about it."""
        gc.collect()
        torch.manual_seed(seed)
        model = network()
        net, optimizer, reducer = distribute(name, model, torch.optim.SGD(model.parameters(),
                                                                          lr=RATE))
        seconds, curve = 0.0, [[0, 0.0, self.accuracy(model)]]
        for step in range(self.options.steps):
            quiet_barrier(self.comm)
            start = perf_counter()
            x, y = self.batch(step, seed)
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
            seconds += perf_counter() - start
            if (step + 1) % self.options.every == 0:
                curve.append([step + 1, max(self.comm.allgather(seconds)), self.accuracy(model)])
                if curve[-1][2] >= self.options.accuracy:
                    break
        ratio = reducer.stats.ratio if reducer else None
        if reducer:
            reducer.deliver()
            reducer.close()
        return dict(name=name, seed=seed, links=os.environ.get("MPICOMP_LINKS"), ratio=ratio,
                    ranks=self.comm.size, steps=curve[-1][0], seconds=curve[-1][1],
                    reached=curve[-1][2] >= self.options.accuracy, curve=curve)


def arguments():
    parser = argparse.ArgumentParser(prog="launch/claims/speed.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["dense", "onebit"],
                        metavar="SPEC")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--accuracy", type=float, default=0.84, help="at which a run ends")
    parser.add_argument("--steps", type=int, default=450, help="after which it ends anyway")
    parser.add_argument("--every", type=int, default=15, help="steps between two looks")
    parser.add_argument("--out", required=True, help="file that lines are added to")
    return parser.parse_args()


def main():
    options = arguments()
    comm = mpi.communicator()
    race = Race(comm, options)
    join_gloo(comm)
    for seed in options.seeds:
        for name in (*PEERS, *options.methods):
            found = race.run(name, seed)
            if comm.rank == 0:
                print(f"{name:24} seed {seed}: {100 * found['curve'][-1][2]:.2f} % after "
                      f"{found['steps']} steps, {found['seconds']:.1f} s", flush=True)
                with open(options.out, "a") as file:
                    file.write(json.dumps(found) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (DataError, mpicomp.MpicompError) as problem:
        sys.exit(f"speed.py: {problem}")
