"""Carries out an experiment of launch/reproduce and keeps the results as JSON."""

import json
import math
import statistics
import sys

from trainer import sources
from trainer.recipes import LETTERS, recipe_of

from claims.experiments import GRID, SEARCH_SEED
from claims.runs import ROOT, environment, perform, read

RESULTS = ROOT / "jobs" / "results"
# Two-sided 95 % points of Student's t for 1 .. 9 degrees of freedom (NIST handbook, 1.3.6.7.2)
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def words_of(experiment, line, *more):
    """The arguments of train.py for one run, without --out."""
    return ["--data", experiment.data, "--method", line.method, *experiment.words, *line.words,
            *map(str, more), "--nonfinite", "skip", "--save-every", "0", "--log-every", "50"]


def base_rate(experiment, line):
    """The learning rate in the middle of the grid: --lr of the line, or the recipe's."""
    words = [*experiment.words, *line.words]
    if "--lr" in words:
        return float(words[words.index("--lr") + 1])
    model = words[words.index("--model") + 1] if "--model" in words else None
    return recipe_of(experiment.data, model)["lr"]


def search(experiment):
    """({label: best rate of the grid on the validation split}, {label: {rate: loss there}})."""
    searched = [line for line in experiment.lines if not line.like]
    runs = {(line.label, g * base_rate(experiment, line)): words_of(
        experiment, line, "--lr", g * base_rate(experiment, line), "--seed", SEARCH_SEED,
        "--validate") for line in searched for g in GRID}
    ranks = {line.label: line.ranks for line in searched}
    perform([(words, ranks[label]) for (label, _), words in runs.items()])
    found, losses = {}, {}
    for line in searched:
        losses[line.label] = {rate: read(words, line.ranks)["loss"]
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
    """(mean, half the width of its 95 % interval by Student's t); NaN where there is none."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
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
    kept |= dict(judged=experiment.judged) if experiment.judged != "accuracy" else {}
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
    if line.within is not None:
        kept |= dict(within=line.within, above=line.above)
    if first["config"].get("data") == "shakespeare":
        letters = LETTERS * first["config"]["batch"] / line.ranks  # of a rank in a step
        kept |= dict(loss_half_width=interval(kept["loss"])[1],
                     bytes_per_letter=kept["bytes_per_step"] / letters)
    if "layers" in first["rows"][0]:
        kept["shapes"] = first["shapes"]
        kept["layers"] = [(row["step"], row["layers"]) for row in first["rows"]
                          if "layers" in row]
    return kept


def about(experiment, seeds):
    """The experiment as data, with its `environment`."""
    return dict(experiment=experiment.name, claim=experiment.claim, data=experiment.data,
                seeds=seeds, grid=GRID,
                **environment(f"launch/reproduce {experiment.name} --seeds {seeds}"))
