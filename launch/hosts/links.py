"""Measures the links between the ranks: launch/cluster run -- launch/hosts/links.py --mb 25 100

One rank a host. First latency and bandwidth between ranks 0 and 1, then the time of a dense sum
over all ranks, in three ways that take turns: MPI's blocking call, its nonblocking call with Test
and sleep, and gloo. With S bytes, P ranks and links of rate R no sum around a ring can be faster
than 2 (P - 1) / P * S / R; that is the bound. Medians; in brackets the slowest.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # launch/
from hosts.cluster import bits  # noqa: E402

world = MPI.COMM_WORLD
SIZES = [4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20]


def say(text):
    if world.rank == 0:
        print(text, flush=True)


def arrived(request, pause=2e-4):
    """Wait for a request, asleep between tests: ranks that spin starve those that work."""
    while not request.Test():
        time.sleep(pause)


def seconds(work, meet=lambda: None):
    """Seconds of `work` on the slowest rank; `meet` runs before it, to start ranks together."""
    arrived(world.Ibarrier(), 2e-3)
    time.sleep(0.1)  # what is still under way arrives, and the shapers have their credit again
    meet()
    start = time.perf_counter()
    work()
    taken = time.perf_counter() - start
    arrived(world.Ibarrier(), 2e-3)
    return world.allreduce(taken, MPI.MAX)


def round_trips(message, answer, times=1):
    """Rank 0 to rank 1 and back; the others do nothing."""
    for _ in range(times):
        if world.rank == 0:
            world.Send(message, 1)
            world.Recv(answer, 1)
        elif world.rank == 1:
            world.Recv(message, 0)
            world.Send(answer, 0)


def both_ways(message, other):
    if world.rank < 2:
        world.Sendrecv(message, 1 - world.rank, recvbuf=other)


def point_to_point(byte_rate, repeats):
    byte = np.zeros(1, np.uint8)

    def between_two(work):
        return [seconds(work, lambda: round_trips(byte, byte, 3)) for _ in range(repeats)]

    latency = statistics.median(between_two(lambda: round_trips(byte, byte, 100))) / 200
    say(f"latency of one byte: {latency * 1e6:.0f} us\n"
        "       KB     one way, MB/s    both ways, MB/s each")
    for size in SIZES:
        message, other = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        ways = [lambda m=message: round_trips(m, byte), lambda m=message, o=other: both_ways(m, o)]
        speeds = [[size / taken / 1e6 for taken in between_two(way)] for way in ways]
        line = "".join(f"{statistics.median(s):12.1f} ({min(s):5.1f})" for s in speeds)
        share = statistics.median(speeds[0]) * 1e6 / byte_rate if byte_rate else 0
        say(f"{size >> 10:9}{line}" + (f"{share:8.0%} of the rate" if share else ""))


def sums(megabytes, byte_rate, repeats):
    import torch
    import torch.distributed as gloo

    gloo.init_process_group("gloo")
    for size in megabytes:
        given = np.ones(size * 250_000, np.float32)
        total = np.zeros_like(given)
        tensor = torch.zeros(given.size)
        ways = {"blocking": lambda g=given, t=total: world.Allreduce(g, t),
                "Test and sleep": lambda g=given, t=total: arrived(world.Iallreduce(g, t)),
                "gloo": lambda t=tensor: gloo.all_reduce(t)}
        rounds = [{name: seconds(way) for name, way in ways.items()} for _ in range(repeats + 1)]
        bound = byte_rate and 2 * (world.size - 1) / world.size * size * 1e6 / byte_rate
        say(f"sum of {size} MB" + (f", bound {bound:.3f} s" if bound else ""))
        for name in ways:
            taken = [one[name] for one in rounds[1:]]  # the first was for warmth
            share = f"{bound / statistics.median(taken):8.0%} of the bound" if bound else ""
            say(f"    {name:15}{statistics.median(taken):7.3f} s ({max(taken):.3f}){share}")
    gloo.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, nargs="*", default=[25], help="megabytes to sum")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if world.size < 2:
        raise SystemExit("one rank has no links; type: launch/cluster run -- launch/hosts/links.py")
    rate = os.environ.get("MPICOMP_LINKS", "none")
    byte_rate = bits(rate) / 8 if rate != "none" else None
    load, cores = os.getloadavg()[0], os.cpu_count()
    say(f"{world.size} ranks, links of {rate}; load {load:.1f} on {cores} cores")
    point_to_point(byte_rate, options.repeats)
    sums(options.mb, byte_rate, options.repeats)


if __name__ == "__main__":
    main()
