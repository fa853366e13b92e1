#!/usr/bin/env python3
"""One table and one picture of several runs of launch/train.py, dense first.

    python launch/claims/plot.py runs/demo/dense runs/demo/onebit --picture demo.png
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# Okabe and Ito's colours, told apart by colour-blind readers; dense, the yardstick, is grey
COLOURS = ["#555555", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]


def read(folder):
    """A run: the dictionary of result.json, with its name and its rows of metrics.jsonl."""
    try:
        run = json.loads((folder / "result.json").read_text())
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as problem:
        sys.exit(f"plot.py: {folder} holds no finished run of launch/train.py ({problem})")
    return {**run, "name": run["config"]["method"].split(":")[0],
            "rows": [row for row in rows if row["kind"] == "train"]}


def table(runs):
    """The lines of the table; bytes are those that one rank handed to MPI in one step."""
    line = "{:10}{:>15}{:>15}{:>10}{:>15}".format
    yield line("method", "test accuracy", "bytes/step", "ratio", "seconds/step")
    for run in runs:
        yield line(run["name"], f"{run['accuracy']:.1%}", f"{run['bytes_per_step']:,.0f}",
                   f"{run['ratio']:.1f}", f"{run['seconds_per_step']:.3f}")


def size(count):
    """A number of bytes in words: 5.1 kB, 320 MB."""
    for unit in "B", "kB", "MB", "GB":
        if count < 1000 or unit == "GB":
            return f"{count:.2g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1000


def spread(values, gap):
    """The same values moved apart so that neighbours are at least `gap` apart, order kept."""
    order = sorted(range(len(values)), key=values.__getitem__)
    placed = dict.fromkeys(order)
    floor = float("-inf")
    for i in order:
        floor = placed[i] = max(values[i], floor + gap)
    shift = sum(placed[i] - values[i] for i in order) / len(values)
    return [placed[i] - shift for i in range(len(values))]


def draw(runs, path):
    """Loss against epoch, and loss against bytes sent, with the names at the curves' ends."""
    import matplotlib

    matplotlib.use("Agg")
    from math import log10

    from matplotlib import pyplot, ticker

    pyplot.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
                            "axes.edgecolor": "#999999", "axes.titlelocation": "left"})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.7, 4.6), dpi=150, sharey=True,
                                            facecolor="white", width_ratios=[1, 1.15])
    ends = [run["rows"][-1] for run in runs]
    floor = min(end["loss"] for end in ends)
    heights = spread([log10(end["loss"]) for end in ends], 0.2)
    places = spread([log10(end["bytes_sent"]) for end in ends], 0.7)
    for run, end, height, place, colour in zip(runs, ends, heights, places, COLOURS):
        losses = [row["loss"] for row in run["rows"]]
        line = dict(color=colour, linewidth=2, solid_capstyle="round", clip_on=False)
        text = dict(color=colour, weight="bold", annotation_clip=False)
        leader = dict(arrowstyle="-", color=colour, linewidth=0.8, shrinkB=3)
        left.plot([row["epoch"] for row in run["rows"]], losses, **line)
        left.annotate(run["name"], (end["epoch"], end["loss"]), (end["epoch"] * 1.05, 10**height),
                      va="center", arrowprops=leader, **text)
        right.plot([row["bytes_sent"] for row in run["rows"]], losses, **line)
        right.plot(end["bytes_sent"], end["loss"], "o", color=colour, markersize=6)
        right.annotate(f"{run['name']}\n{run['accuracy']:.1%}\n{size(end['bytes_sent'])}",
                       (end["bytes_sent"], end["loss"]), (10**place, floor / 1.7),
                       ha="center", va="top", arrowprops=leader, **text)
    left.set(yscale="log", xlabel="epoch", ylabel="training loss", xlim=(0, ends[0]["epoch"]))
    right.set(xscale="log", xlabel="bytes sent by each rank", ylim=(floor / 6, None))
    config = runs[0]["config"]
    left.set_title(f"Loss against epoch: {config['data']}, {runs[0]['ranks']} ranks", pad=12)
    right.set_title("Loss against bytes; test accuracy and total", pad=12)
    right.xaxis.set_major_formatter(ticker.FuncFormatter(lambda count, _: size(count)))
    left.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    for axes in left, right:
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.tick_params(colors="#444444", which="both", length=0)
    figure.tight_layout(w_pad=5)
    figure.savefig(path)


def main():
    """Print the table; draw the picture where --picture and matplotlib are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders that train.py wrote")
    parser.add_argument("--picture", type=Path, help="draw this PNG file, too")
    args = parser.parse_args()
    runs = [read(folder) for folder in args.runs]
    print("\n" + "\n".join(table(runs)))
    if args.picture:
        try:
            draw(runs, args.picture)
            print(f"\npicture: {args.picture}")
        except ImportError:
            print("\nno picture: matplotlib is missing; type: pip install matplotlib")


if __name__ == "__main__":
    main()
