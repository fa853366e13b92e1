"""What train.py is told to train: options, data, recipe, and the model and optimizer of these."""
from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch

import mpicomp
import mpicomp.optim
from trainer import datasets, options
from trainer.models import MODELS
from trainer.ranks import Ranks
from trainer.recipes import ADAMW, recipe_of


class Setup:
    """One training, as the command line describes it. What does not fit ends all ranks.

    args, ranks     the options, and the Ranks of this job
    device          the torch.device of model and batches
    method          the mpicomp.Method
    data            a datasets.Data; `kept` holds the numbers of the rows that are trained on
    scored          (Split, row numbers) that are evaluated on; `what` is "test" or "validation"
    config          what decides the result to the bit, besides the number of ranks and torch;
                    `digest` is a hash of it
    batch           examples in a step, over all ranks
    steps           of the optimizer in all; `epoch_steps` in an epoch, `save_every` to a checkpoint
    out             the folder for results
    noise           the torch.Generator of the gradients inside a dorefa network
    squares         {parameter's name: sum of its squared gradients}, with --local-adagrad
    """

    def __init__(self, about):
        """`about` is the docstring that --help shows."""
        self.device, problem = options.take_device(sys.argv)  # before MPI starts
        self.ranks = ranks = Ranks()
        self.args = args = options.parse(about, ranks.refuse, ranks.rank)
        if problem:
            ranks.refuse(problem)
        self.method = ranks.agreed(lambda: mpicomp.method(args.method))
        self.data = ranks.agreed(lambda: datasets.load(args.data))
        self._choose_rows()
        recipe = self._recipe()
        self._set_lengths(recipe)
        self.config = dict(
            data=args.data, source=self.data.source[:16], method=repr(self.method), **recipe,
            momentum=args.momentum, seed=args.seed, nonfinite=args.nonfinite,
            local_adagrad=args.local_adagrad, flush_epochs=args.flush_epochs,
            validate=args.validate)
        if args.local:
            self.config |= dict(local=args.local, outer=args.outer)
        text = json.dumps(self.config, sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.out = args.out or Path("runs", re.sub(r"[^\w.=]+", "-", "-".join(
            filter(None, (args.data, args.model, args.method, args.local and f"local{args.local}"))
        )))
        self.noise, self.squares = torch.Generator(self.device), {}
        ranks.share_cores()

    def _choose_rows(self):
        """With --validate a tenth of the training set is held back, and stands for the test set."""
        train, test = self.data.train, self.data.test
        self.what = "validation" if self.args.validate else "test"
        if self.args.validate:
            # blocks of 40: whole ones in each class of mnist5k, two utterances of fsdd
            held = np.arange(len(train)) // 40 % 10 == 9
            self.kept, self.scored = np.flatnonzero(~held), (train, np.flatnonzero(held))
        else:
            self.kept, self.scored = np.arange(len(train)), (test, np.arange(len(test)))

    def _recipe(self):
        """The recipe of the data set, with what the options change in it."""
        args, recipe = self.args, recipe_of(self.args.data, self.args.model)
        if args.model not in (None, recipe["model"]):
            self.ranks.refuse(f"--model {args.model} does not fit --data {args.data}; leave it out")
        if args.bits and "bits" not in recipe:
            self.ranks.refuse(f"--bits is for --model dorefa, found --model {recipe['model']}")
        chosen = {key: getattr(args, key, None) for key in recipe}
        return recipe | {key: value for key, value in chosen.items() if value is not None}

    def _set_lengths(self, recipe):
        """Batch and steps; `recipe` is told how many steps --epochs are."""
        args, examples = self.args, len(self.kept)
        self.batch = recipe["batch"]
        if not self.ranks.size <= self.batch <= examples:
            self.ranks.refuse(f"--batch {self.batch}: expected {self.ranks.size} (an example for "
                              f"each rank) to {examples}")
        self.epoch_steps = examples // self.batch
        if args.epochs:
            recipe["steps"] = args.epochs * self.epoch_steps
        self.steps = recipe["steps"]
        self.save_every = (min(self.epoch_steps, 200) if args.save_every is None
                           else args.save_every or self.steps)

    def model(self):
        """The network, its weights drawn from torch's random numbers."""
        low_bit = [self.config["bits"], self.noise] if "bits" in self.config else []
        return self.ranks.agreed(lambda: MODELS[self.config["model"]](
            self.data.classes, *low_bit).to(self.device))

    def optimizer(self, model):
        """The optimizer of a model, and with --local-adagrad the hooks on its parameters."""
        if self.args.local_adagrad:
            for name, parameter in model.named_parameters():
                parameter.register_hook(self._local_adagrad(name))
        kind, rate = self.config["optimizer"], self.config["lr"]
        if kind == "adam":
            return torch.optim.Adam(model.parameters(), lr=rate)
        if kind == "adamw":
            return torch.optim.AdamW(model.parameters(), lr=rate, **ADAMW)
        if kind == "onebitadam":  # v is frozen when the rate has risen, or after a fifth of steps
            rising = self.steps // self.config.get("rise", 20)
            return mpicomp.optim.OneBitAdam(model.parameters(), lr=rate, **ADAMW,
                                            freeze_from=rising, freeze_by=self.steps // 5)
        if kind == "adagrad":
            return torch.optim.Adagrad(model.parameters(), lr=rate, eps=1e-8)
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=self.args.momentum)

    def clip(self, model, optimizer):
        """Clip gradients where the recipe says so: their mean, with --local this rank's own."""
        norm = self.config.get("clip")
        if norm and self.args.local:
            torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
        elif norm:
            mpicomp.clip_grad_norm_(optimizer, norm)

    def _local_adagrad(self, name):
        """A hook that divides a gradient by the root of the sum of its squares so far.

        Table 3 of the 1-bit SGD paper compares places for AdaGrad: before the exchange (here),
        between its two quantisations (--method onebit:exchange=sharded,adagrad=yes), after it
        (--optimizer).
        """
        def divide(gradient):
            self.squares[name] = self.squares.get(name, 0) + gradient**2
            return gradient / (self.squares[name].sqrt() + 1e-8)
        return divide

    def learning_rate(self, step):
        """Up over the first twentieth of all steps, and half a cosine down to zero.

        It suits error feedback: what is still owed when training ends would have moved little.
        A recipe's `rise` is in place of twenty, its `floor` times the peak in place of zero.
        """
        part, floor = self.config.get("rise", 20), self.config.get("floor", 0.0)
        rise = min(1.0, (step + 1) / (self.steps / part + 1))
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.config["lr"] * rise * (floor + (1 - floor) * fall)
