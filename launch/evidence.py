"""Runs the experiments of launch/reproduce, and keeps what came out as data."""

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import sources
from experiments import GRID, SEARCH_SEED, SYSTEMS
from recipes import DOREFA, RECIPES

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "reproduce"
RESULTS = ROOT / "jobs" / "results"
# Two-sided 95 % points of Student's t for 1 .. 9 degrees of freedom (NIST handbook, 1.3.6.7.2)
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def words_of(experiment, line, *more):
    """The arguments of train.py for one run, without --out."""
    return ["--data", experiment.data, "--method", line.method, *experiment.words, *line.words,
            *map(str, more), "--nonfinite", "skip", "--save-every", "0", "--log-every", "50"]


def folder_of(words, ranks):
    """Where a run lies: the name is a digest of all that it was told."""
    told = json.dumps([words, ranks])
    return RUNS / hashlib.sha256(told.encode()).hexdigest()[:16]


def perform(runs):
    """Make those of the runs (words, ranks) that are not there yet: one MPI job for each P."""
    for ranks in sorted({ranks for _, ranks in runs}):
        todo = [words for words, r in runs if r == ranks
                and not (folder_of(words, r) / "result.json").exists()]
        if not todo:
            continue
        began = time.monotonic()
        print(f"  {len(todo)} runs on {ranks} ranks ...", end=" ", flush=True)
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump([[*words, "--out", str(folder_of(words, ranks)), "--resume"]
                       for words in todo], file)
            file.flush()
            log = RUNS / f"job-{ranks}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "w") as out:
                job = subprocess.run(
                    [sys.executable, "launch/run", "-n", str(ranks), "launch/sweep.py", file.name],
                    cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        print(f"{time.monotonic() - began:.0f} s")
        if job.returncode:
            sys.exit(f"launch/reproduce: a run failed; the end of {log}:\n"
                     + "".join(log.read_text().splitlines(keepends=True)[-15:]))


def read(words, ranks):
    """What train.py wrote about a run: result.json with the rows of metrics.jsonl."""
    folder = folder_of(words, ranks)
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    return {**json.loads((folder / "result.json").read_text()), "rows": rows}


def base_rate(experiment, line):
    """The middle of the grid: --lr of the line, or the recipe's."""
    words = [*experiment.words, *line.words]
    if "--lr" in words:
        return float(words[words.index("--lr") + 1])
    return (DOREFA if "dorefa" in words else RECIPES[experiment.data])["lr"]


def search(experiment):
    """{label: learning rate}: the best of the grid on the validation split, by loss."""
    searched = [line for line in experiment.lines if not line.like]
    runs = {(line.label, g * base_rate(experiment, line)): words_of(
        experiment, line, "--lr", g * base_rate(experiment, line), "--seed", SEARCH_SEED,
        "--validate") for line in searched for g in GRID}
    perform([(words, 4) for words in runs.values()])
    found, losses = {}, {}
    for line in searched:
        losses[line.label] = {rate: read(words, 4)["loss"]
                              for (label, rate), words in runs.items() if label == line.label}
        # a run that diverged has a loss of NaN, which is below nothing
        found[line.label] = min(losses[line.label],
                                key=lambda r: (losses[line.label][r] != losses[line.label][r],
                                               losses[line.label][r]))
    for line in experiment.lines:
        if line.like:
            found[line.label] = found[line.like] * line.times
    return found, losses


def interval(values):
    """(mean, half the width of its 95 % interval by Student's t)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("nan")
    return mean, STUDENT[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5


def carry_out(experiment, seeds):
    """Search, run, and write jobs/results/reproduce-NAME.json; returns what it holds."""
    print(f"{experiment.name}: {experiment.claim}", flush=True)
    try:
        sources.raw_files(experiment.data)
    except sources.DataError as problem:
        if experiment.data != "fashion":
            sys.exit(f"launch/reproduce: {problem}")
        sources.fetch_fashion()
    if experiment.searched:
        rates, losses = search(experiment)
    else:
        rates, losses = {line.label: base_rate(experiment, line) for line in experiment.lines}, {}
    seeds = range(seeds or experiment.seeds)
    runs = {(line.label, seed): words_of(experiment, line, "--lr", rates[line.label],
                                         "--seed", seed)
            for line in experiment.lines for seed in seeds}
    perform([(runs[line.label, seed], line.ranks) for line in experiment.lines for seed in seeds])
    lines = []
    for line in experiment.lines:
        results = [read(runs[line.label, seed], line.ranks) for seed in seeds]
        lines.append(describe(line, rates[line.label], losses.get(line.label), results))
    kept = {**about(experiment, len(seeds)), "lines": lines}
    path = RESULTS / f"reproduce-{experiment.name}.json"
    kept = without_nan(kept)
    path.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n")
    return kept


def without_nan(found):
    """The same with None for NaN and Inf, which JSON does not have: a loss that diverged."""
    if isinstance(found, dict):
        return {key: without_nan(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [without_nan(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def describe(line, rate, losses, results):
    """One line's results as data; loss and accuracy are those of the test set."""
    mean, half = interval([100 * r["accuracy"] for r in results])
    first = results[0]
    kept = dict(
        label=line.label, method=first["config"]["method"], words=list(line.words),
        ranks=line.ranks, learning_rate=rate, searched=losses,
        accuracy=[round(100 * r["accuracy"], 3) for r in results],
        accuracy_mean=mean, accuracy_half_width=half,
        loss=[r["loss"] for r in results], loss_mean=statistics.fmean(r["loss"] for r in results),
        bytes_per_step=statistics.fmean(r["bytes_per_step"] for r in results),
        ratio=statistics.fmean(r["ratio"] for r in results), steps=first["steps"],
        curve=[(row["step"], row["loss"]) for row in first["rows"] if row["kind"] == "train"],
        sent=[(row["step"], row["bytes_per_step"]) for row in first["rows"]
              if row["kind"] == "train"])
    if "layers" in first["rows"][0]:
        kept["shapes"] = first["shapes"]
        kept["layers"] = [(row["step"], row["layers"]) for row in first["rows"]
                          if "layers" in row]
    return kept


def about(experiment, seeds):
    """Which experiment this was, and `environment`."""
    return dict(experiment=experiment.name, claim=experiment.claim, data=experiment.data,
                seeds=seeds, grid=GRID,
                **environment(f"launch/reproduce {experiment.name} --seeds {seeds}"))


def environment(command):
    """Where, when and with what this was run, and the command that does it again."""
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    if git("status", "--porcelain", "launch", "mpicomp"):
        commit += " with changes"
    return dict(
        command=command, date=time.strftime("%Y-%m-%d"), commit=commit,
        machine=f"{os.cpu_count()} cores, {processor()}, no GPU",
        versions={name: metadata.version(name) for name in ("torch", "numpy", "mpi4py")}
        | {"python": platform.python_version()})


def git(*words):
    """What git says about this checkout, or nothing where there is none."""
    return subprocess.run(["git", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL).stdout.strip()


def processor():
    """The CPU's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")),
                platform.machine())


def chosen(names):
    """The experiments that the words on the command line stand for."""
    every = [e for group in SYSTEMS.values() for e in group]
    picked = []
    for name in names:
        if name == "all":
            picked += every
        elif name in SYSTEMS:
            picked += SYSTEMS[name]
        elif any(e.name == name for e in every):
            picked += [e for e in every if e.name == name]
        else:
            sys.exit(f"launch/reproduce: no system or experiment is called {name!r}; there are: "
                     + ", ".join([*SYSTEMS, *(e.name for e in every), "all", "speed", "slice",
                                  "report"]))
    return picked


def main():
    parser = argparse.ArgumentParser(prog="launch/reproduce")
    parser.add_argument("what", nargs="+")
    parser.add_argument("--seeds", type=int)
    args = parser.parse_args()
    import report

    if args.what == ["slice"]:
        import bands

        sys.exit(bands.check(args.seeds or 1))
    if args.what == ["speed"]:
        import speedrun

        speedrun.run(args.seeds)
    elif args.what != ["report"]:
        for experiment in chosen(args.what):
            kept = carry_out(experiment, args.seeds)
            print("\n".join(report.table(kept)) + "\n", flush=True)
    report.write()


if __name__ == "__main__":
    main()
