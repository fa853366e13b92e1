#!/usr/bin/env python3
"""Train one of a few small networks on several MPI ranks, with compressed gradients.

    launch/run -n 4 launch/train.py --data mnist5k --method onebit
    launch/run -n 4 launch/train.py --data fsdd --method strom:tau=0.01 --out runs/fsdd
    launch/run -n 4 launch/train.py --data fsdd --method strom:tau=0.01 --out runs/fsdd --resume
    launch/run -n 4 launch/train.py --model dorefa --bits 1,2,6 --method dorefa:bits=6
    launch/run -n 4 launch/train.py --data fsdd --local 20 --outer nesterov --method onebit
    launch/run -n 4 launch/train.py --data shakespeare --model gpt --method dense
    python launch/train.py --data mnist5k                      alone, without mpirun: one rank

SIGTERM and SIGUSR1 to any rank make all of them save after the same step and end with status 75.
With launch/run --with-ft and --survive the others go on where a rank has died.

Here are the model, the lines that make its training distributed, and the loop. Options, data,
checkpoints, evaluation and logs are in launch/trainer. All that it writes is in the folder --out:

    config.json     what was run              metrics.jsonl   a row per log line and evaluation
    result.json     how it ended              checkpoint/     the last two, for --resume
"""
from __future__ import annotations

import torch
from torch.nn import functional
from trainer.datasets import PADDING
from trainer.scores import count
from trainer.setup import Setup
from trainer.training import Training

import mpicomp


def main():
    """Train as the command line says."""
    setup = Setup(__doc__)
    args, ranks = setup.args, setup.ranks
    torch.manual_seed(args.seed)  # the same on every rank: replicas start equal
    model = setup.model()
    optimizer = setup.optimizer(model)
    mpicomp.broadcast_parameters(model)

    # Here it becomes distributed: from now on step() first makes every p.grad the mean over all
    # ranks, and then does what it always did. With --local ranks exchange after every few steps.
    def distributed():
        options = dict(method=setup.method, seed=args.seed, nonfinite=args.nonfinite,
                       stall_timeout=args.stall_timeout)
        if args.local:
            return mpicomp.LocalUpdates(model, optimizer, args.local, outer=args.outer, **options)
        return mpicomp.DistributedOptimizer(optimizer, model.named_parameters(),
                                            require_ratio=args.require_ratio, **options).reducer

    reducer = ranks.agreed(distributed)
    training = Training(setup, model, optimizer, reducer)

    def train(step):
        """One step: this rank's loss, its number of targets, and a signal to end or 0."""
        x, y = training.batch(step)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="sum",
                                        ignore_index=PADDING)
        # Slices of a batch can differ by one example. With this scale the mean over ranks, which
        # the reducer takes, is exactly the mean over the global batch (padding counts as 0).
        (loss * (ranks.size / (setup.batch * y[0].numel()))).backward()
        heard = training.signal()
        setup.clip(model, optimizer)
        (reducer if args.local else optimizer).step()
        return loss.item(), count(y), heard

    for step in training.steps():
        training.after(step, *training.piece(train, step))
    training.finish()


if __name__ == "__main__":
    main()
