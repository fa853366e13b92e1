#!/usr/bin/env python3
"""Times a step with mpicomp.Recovery against one without, in turn, where no rank dies.

    launch/run --with-ft -n 4 jobs/recovery_cost.py --out jobs/results/recovery-DATE.json
    launch/run --with-ft -n 4 jobs/recovery_cost.py --method strom:tau=0.01 --width 1024

A step is forward, backward and optimizer.step() of a perceptron of three layers of `--width`; both
trainings live in one job, which MPI has started with ULFM. A round times `--steps` of each.
"""

import argparse
from pathlib import Path

import torch

import mpicomp
from mpicomp import mpi
from mpicomp.bench.timing import in_turn, ratios, summary, surroundings, table, write_json


def training(options, comm, method, survive):
    """A contender: `options.steps` steps of a training of its own."""
    torch.manual_seed(0)
    width = options.width
    model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(),
                                torch.nn.Linear(width, width), torch.nn.ReLU(),
                                torch.nn.Linear(width, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    reducer = mpicomp.Reducer(model.named_parameters(), method, comm).attach(optimizer)
    recovery = mpicomp.Recovery(reducer, model, comm) if survive else None
    if survive and not recovery.active:
        raise SystemExit(f"there is nothing to time: {recovery.why}")
    x, y = torch.randn(8, width), torch.arange(8) % 10

    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    def work():
        for _ in range(options.steps):
            recovery.run(step) if survive else step()

    return work


def main():
    parser = argparse.ArgumentParser(prog="jobs/recovery_cost.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", default=["dense", "onebit", "strom:tau=0.01"])
    parser.add_argument("--width", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--steps", type=int, default=20, help="in a round")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, help="the figures, as JSON")
    options = parser.parse_args()
    comm, rows, figures = mpi.communicator(), [], []
    torch.set_num_threads(1)
    widths = options.width
    for options.width in widths:
        for method in options.method:
            contenders = {"without": training(options, comm, method, False),
                          "with": training(options, comm, method, True)}
            in_turn(contenders, 2, comm)
            seconds = in_turn(contenders, options.rounds, comm)
            ms = {name: summary([1e3 * s / options.steps for s in values])
                  for name, values in seconds.items()}
            ratio = ratios(seconds["with"], seconds["without"])
            size = 2 * options.width ** 2 + 12 * options.width + 10
            figures.append(dict(method=method, parameters=size, milliseconds=ms, ratio=ratio))
            rows.append((method, f"{size:,}", f"{ms['without']['median']:.2f}",
                         f"{ms['with']['median']:.2f}", f"{ratio['median']:.2f}",
                         f"{ratio['low']:.2f} .. {ratio['high']:.2f}"))
    if comm.rank == 0:
        print(f"{comm.size} ranks, {options.rounds} rounds of {options.steps} steps each, in turn")
        print(table(("", "parameters", "ms without", "ms with", "ratio", "quartiles"), rows))
        if options.out:
            write_json(options.out, surroundings() | dict(
                command="launch/run --with-ft jobs/recovery_cost.py", ranks=comm.size,
                rounds=options.rounds, steps=options.steps, rows=figures))


if __name__ == "__main__":
    main()
