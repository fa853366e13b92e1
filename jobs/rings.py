#!/usr/bin/env python3
"""Times rings of our own against MPI's calls and gloo's, in turn: docs/results.md has the tables.

    launch/cluster up -n 4 --rate 1gbit
    launch/cluster run -- jobs/rings.py sums --elements 6.5e6 --rounds 7
    launch/cluster run -- jobs/rings.py gathers --bytes 1e5 3e5 1e6 3e6 6e6 --rounds 7
    launch/run -n 4 jobs/rings.py sums                               in shared memory

sums: one exchange of `dense` in one bucket, with its copies, against gloo's bare all_reduce.
gathers: packets from all ranks to all, against MPI's Iallgather.
"""

import argparse
import statistics
from time import perf_counter

import numpy as np
import torch

import mpicomp
from mpicomp import mpi
from mpicomp.bench.step import join_gloo
from mpicomp.bench.timing import in_turn, ratios, table
from mpicomp.transport import ring
from mpicomp.transport.calls import Calls
from mpicomp.transport.meter import Meter

LANES = (1, 2, 4, 8)


def exchange(elements, ranks, lanes, comm):
    """A contender: one dense exchange of so many elements with these settings of `ring`."""
    ring.RANKS, ring.LANES, ring.LEAST = ranks, lanes, 0
    gradient = torch.randn(elements)
    averager = mpicomp.Averager({"w": gradient}, "dense", comm)

    def work():
        start = perf_counter()
        averager.average({"w": gradient})
        return perf_counter() - start

    return work


def sums(elements, comm):
    """{name: contender}, gloo first."""
    join_gloo(comm)
    numbers = torch.randn(elements)

    def gloo():
        start = perf_counter()
        torch.distributed.all_reduce(numbers)
        taken = perf_counter() - start
        numbers.mul_(1 / comm.size)
        return taken

    return {"gloo": gloo, "Iallreduce": exchange(elements, (), 1, comm),
            **{f"ring, {n} lanes": exchange(elements, (comm.size,), n, comm) for n in LANES}}


def gathers(size, comm):
    """{name: contender}, MPI first."""
    wire = Calls(comm, Meter())
    wire.open(1)
    wire.spread, ring.GATHER = True, 0
    send, receive = np.full(size, comm.rank, np.uint8), np.zeros(size * comm.size, np.uint8)

    def drained(postings):
        for requests in postings:
            for request in requests:
                mpi.wait(comm, request, 600.0, "gathering")

    def way(lanes):
        def work():
            ring.LANES, ring.GATHER_LANE = lanes, 1
            drained(ring.gather(wire, 0, 0, send, receive, [size] * comm.size))
        return work

    return {"Iallgather": lambda: drained([[comm.Iallgather(send, receive)]]),
            **{f"ring, {n} lanes": way(n) for n in LANES}}


def main():
    parser = argparse.ArgumentParser(prog="jobs/rings.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sums", "gathers"))
    parser.add_argument("--elements", type=float, default=6.5e6, help="float32 of a sum")
    parser.add_argument("--bytes", type=float, nargs="+", default=[1e5, 3e5, 1e6, 3e6, 6e6])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    comm = mpi.communicator()
    for size in [options.elements] if options.what == "sums" else options.bytes:
        contenders = (sums if options.what == "sums" else gathers)(int(size), comm)
        in_turn(contenders, 1, comm)
        seconds = in_turn(contenders, options.rounds, comm)
        base, rows = next(iter(contenders)), []
        for name, values in seconds.items():
            over = ratios(seconds[base], values)
            rows.append((name, f"{1e3 * statistics.median(values):.1f}", f"{over['median']:.2f}",
                         f"{over['low']:.2f} .. {over['high']:.2f}"))
        if comm.rank == 0:
            unit = "elements" if options.what == "sums" else "bytes"
            print(f"\n{int(size):,} {unit}, {comm.size} ranks, {base} / each, in turn")
            print(table(("", "ms", "ratio", "quartiles"), rows), flush=True)


if __name__ == "__main__":
    main()
