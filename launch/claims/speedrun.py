"""launch/reproduce speed: runs speed.py on four emulated hosts, and makes a table and a picture."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from trainer import sources

from claims import report
from claims.runs import ROOT, environment

HOSTS = 4
SEEDS = {"1gbit": 2, "100mbit": 1}  # as many as take about half an hour in all
METHODS = ("onebit", "terngrad", "strom:tau=0.02", "dropping:rate=0.99", "adacomp")
# dense runs only at the rate at which its time differs from DDP's
MORE = {"1gbit": ("dense",), "100mbit": ()}
RESULT = Path("jobs", "results", "speed.json")
PICTURE = "speed.png"
BASE = "ddp gloo"
RATES = {"1gbit": "1 Gbit/s", "100mbit": "100 Mbit/s"}


def cluster(*words):
    """Run launch/cluster with these arguments; a failure ends the program."""
    if subprocess.call([sys.executable, ROOT / "launch" / "cluster", *words], cwd=ROOT):
        sys.exit("launch/reproduce: launch/cluster " + " ".join(words[:3]) + " failed")


def run(seeds=None):
    """All contenders at both rates; writes jobs/results/speed.json. `seeds`: as many at each."""
    try:
        sources.raw_files("fashion")
    except sources.DataError:
        sources.fetch_fashion()
    runs = []
    try:
        for rate, count in SEEDS.items():
            numbers = [str(seed) for seed in range(seeds or count)]
            cluster("up", "-n", str(HOSTS), "--rate", rate)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "runs.jsonl")
                cluster("run", "--", "launch/claims/speed.py", "--seeds", *numbers,
                        "--out", str(file), "--methods", *MORE[rate], *METHODS)
                runs += [json.loads(line) for line in file.read_text().splitlines()]
    finally:
        cluster("down")
    command = "launch/reproduce speed" + (f" --seeds {seeds}" if seeds else "")
    (ROOT / RESULT).write_text(json.dumps({**environment(command), "runs": runs}) + "\n")


def by_contender(runs):
    """{links: {name: [run, ...]}}, in the order in which they ran."""
    found = {}
    for one in runs:
        found.setdefault(one["links"], {}).setdefault(one["name"], []).append(one)
    return found


def table(kept):
    """The lines of the table, in Markdown."""
    for links, contenders in by_contender(kept["runs"]).items():
        seeds = len(next(iter(contenders.values())))
        yield (f"| {RATES.get(links, links)}, {seeds} seed{'s' * (seeds > 1)} | steps | seconds "
               "| gain | ratio |")
        yield "|---|---|---|---|---|"
        base = {one["seed"]: one["seconds"] for one in contenders[BASE]}
        for name, all_runs in contenders.items():
            seconds = [one["seconds"] for one in all_runs]
            missed = sum(not one["reached"] for one in all_runs)
            gains = [base[one["seed"]] / one["seconds"] for one in all_runs]
            spread = f" ({min(seconds):.1f} .. {max(seconds):.1f})" if seeds > 1 else ""
            ratio = all_runs[0]["ratio"]
            yield (f"| {name} | {median(one['steps'] for one in all_runs):.0f} "
                   f"| {median(seconds):.1f}{spread} "
                   + (f"| {missed} of {seeds} did not get there " if missed else
                      f"| {median(gains):.1f}x ")
                   + f"| {f'{ratio:.0f}' if ratio else ''} |")
        yield ""


def draw(kept, path):
    """Accuracy against seconds of the first seed, a panel for each rate; logarithmic in time."""
    pyplot = report.style()
    found = by_contender(kept["runs"])
    names = list(dict.fromkeys(one["name"] for one in kept["runs"]))
    colours = dict(zip(names, report.COLOURS))
    figure, axes = pyplot.subplots(1, len(found), figsize=(11, 4.6), sharey=True, dpi=120,
                                   facecolor="white")
    for axis, (links, contenders) in zip(axes, found.items()):
        for name, all_runs in contenders.items():
            _, seconds, accuracy = zip(*all_runs[0]["curve"][1:])
            theirs = name.startswith("ddp")
            axis.plot(seconds, [100 * a for a in accuracy], linewidth=1.6, label=name,
                      linestyle="--" if theirs else "-", color=colours[name])
            axis.plot(seconds[-1], 100 * accuracy[-1], "o", markersize=5, color=colours[name])
        axis.set(xscale="log", xlabel="seconds of training")
        report.plain_numbers(axis.xaxis)
        axis.set_title(RATES.get(links, links), pad=10)
    axes[0].set(ylabel="accuracy on the test set, %", ylim=(60, None))
    figure.tight_layout(w_pad=2, rect=(0, 0, 0.86, 1))
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=9, edgecolor="none",
                  loc="center right")
    figure.savefig(path)
    pyplot.close(figure)


def write():
    """Make table and picture in docs/ anew from jobs/results/speed.json, if that exists."""
    if not (report.ROOT / RESULT).exists():
        return
    kept = json.loads((report.ROOT / RESULT).read_text())
    report.drawn("speed", draw, kept, report.DOCS / PICTURE)
    report.put("speed", [*table(kept), f"![accuracy against seconds]({PICTURE})", "",
                         f"`{kept['command']}`, {kept['date']}"])
