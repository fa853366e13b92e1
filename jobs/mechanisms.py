#!/usr/bin/env python3
"""Times steps with and without one mechanism of this package, in turn: does it pay?

    launch/cluster up -n 4 --rate 1gbit
    launch/cluster run -- jobs/mechanisms.py order delay thread --json FILE
    launch/run -n 4 jobs/mechanisms.py thread --rounds 9         in shared memory

order   buckets in the order in which gradients were ready in the first step, against the reverse
        order of registration; for a network that registers its last layers first (for all others
        the two are the same)
delay   delay=1 against none
thread  progress="thread" against "poll"
"""

import argparse
import json
from contextlib import contextmanager, nullcontext
from functools import partial
from time import sleep

import torch
from torch import nn

from mpicomp import mpi
from mpicomp.averager.buckets import Buckets
from mpicomp.bench.models import MODELS
from mpicomp.bench.step import Contender
from mpicomp.bench.timing import in_turn, noise_warning, ratios, summary, table


class Computing(torch.autograd.Function):
    """Takes the time of a layer that another device computes: this core is free meanwhile."""

    @staticmethod
    def forward(ctx, x):
        sleep(FORWARD)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        sleep(2 * FORWARD)
        return gradient


class Layers(nn.Module):
    """Eight layers of 3.1 M parameters that are computed elsewhere, registered in this order."""

    def __init__(self, order):
        super().__init__()
        for number in order:
            self.add_module(f"layer{number}", nn.Linear(1760, 1760))

    def forward(self, x):
        for number in range(8):
            x = Computing.apply(torch.relu(getattr(self, f"layer{number}")(x)))
        return x


def device(order=range(8)):
    """(model, inputs, targets): as the cnn, 25 M parameters."""
    return Layers(order), torch.randn(1, 1760), torch.randint(1760, (1,))


FORWARD = 0.015  # seconds a layer; backward takes twice as long
MODELS["device"] = device
MODELS["device, last layer first"] = partial(device, range(7, -1, -1))


@contextmanager
def changed(where, name, value):
    """An attribute has another value in this context."""
    before = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)


class Within:
    """A contender that runs in a context of its own."""

    def __init__(self, context, contender):
        self.context, self.contender = context, contender

    def __call__(self):
        with self.context():
            return self.contender()


def without_order():
    return changed(Buckets, "agree", lambda self, stays: False)


def pairs(what, steps, comm, methods, models):
    """{(case, variant): contender}: two variants of each case."""
    found = {}

    def add(case, variant, model, method, context=nullcontext, progress="poll"):
        contender = Contender(method, model, steps, comm, progress)
        found[case, variant] = Within(context, contender)

    for method in methods:
        if what == "order":
            model = "device, last layer first"
            add(f"{model}, {method}", "with", model, method)
            add(f"{model}, {method}", "without", model, method, without_order)
        for model in models if what != "order" else ():
            if what == "delay":
                delayed = f"{method}{',' if ':' in method else ':'}delay=1"
                add(f"{model}, {method}", "with", model, delayed)
                add(f"{model}, {method}, thread", "with", model, delayed, progress="thread")
                add(f"{model}, {method}, thread", "without", model, method, progress="thread")
            else:
                add(f"{model}, {method}", "with", model, method, progress="thread")
            add(f"{model}, {method}", "without", model, method)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("order", "delay", "thread"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed in each round")
    parser.add_argument("--methods", nargs="+", default=["dense", "onebit"])
    parser.add_argument("--models", nargs="+", default=["cnn", "device"])
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    comm, figures = mpi.communicator(), {}
    for what in options.what:
        contenders = pairs(what, options.steps, comm, options.methods, options.models)
        seconds = in_turn(contenders, options.rounds, comm)
        rows = []
        for case in dict.fromkeys(case for case, _ in contenders):
            with_, without = seconds[case, "with"], seconds[case, "without"]
            figures[f"{what}: {case}"] = found = {
                "with": summary(with_), "without": summary(without),
                "without / with": ratios(without, with_)}
            rows.append((case, *(f"{1e3 * found[k]['median']:.1f} ({1e3 * found[k]['low']:.1f} .. "
                                 f"{1e3 * found[k]['high']:.1f})" for k in ("with", "without")),
                         f"{found['without / with']['median']:.2f}"))
        if comm.rank == 0:
            print(f"\n{what}: ms per step, medians (quartiles)")
            print(table(("", "with", "without", "without / with"), rows), flush=True)
            if warning := noise_warning(seconds):
                print(warning, flush=True)
    if options.json and comm.rank == 0:
        with open(options.json, "w") as file:
            json.dump({"ranks": comm.size, "figures": figures}, file, indent=1)


main()
