"""Tables and pictures of what launch/reproduce measured, put into docs/results.md."""

import json
import re
from math import nan, prod
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Okabe and Ito's colours, told apart by colour-blind readers; the first, of dense, is grey
COLOURS = ["#555555", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6D1F",
           "#333399", "#999999"]


def table(kept):
    """The lines of one experiment's table, in Markdown."""
    yield (f"| {kept['data']}, {kept['seeds']} seeds | ranks | rate | accuracy, % | loss "
           "| bytes/step | ratio |")
    yield "|---|---|---|---|---|---|---|"
    for line in kept["lines"]:
        lost = line["loss"].count(None)
        loss = f"{lost} of {len(line['loss'])} diverged" if lost else f"{line['loss_mean']:.3f}"
        yield (f"| {line['label']} | {line['ranks']} | {line['learning_rate']:g} "
               f"| {line['accuracy_mean']:.2f} ± {line['accuracy_half_width']:.2f} "
               f"| {loss} | {line['bytes_per_step']:,.0f} | {line['ratio']:.1f} |")


def style():
    """matplotlib's pyplot, without a screen and without ornament."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": "#999999", "axes.titlelocation": "left", "axes.grid": True,
        "grid.color": "#e6e6e6", "xtick.color": "#444444", "ytick.color": "#222222"})
    return pyplot


def draw(kept, path):
    """Accuracy of every line with its interval beside the training loss of the first seed."""
    pyplot = style()
    layers = [line for line in kept["lines"] if "layers" in line and line["label"] != "dense"]
    panels = 3 if layers else 2
    lines = kept["lines"]
    figure, axes = pyplot.subplots(
        1, panels, figsize=(4.9 * panels, max(3.4, 0.42 * len(lines) + 1.6)), dpi=120,
        facecolor="white")
    accuracies(axes[0], lines)
    losses(axes[1], lines)
    if layers:
        rates(axes[2], layers[0])
    figure.tight_layout(w_pad=2)
    figure.savefig(path)
    pyplot.close(figure)


def accuracies(axes, lines):
    """A dot and an interval for each line, its ratio at the margin; dense as a band.

    Lines more than ten points below dense are written at the edge, not drawn to scale.
    """
    mean, half = lines[0]["accuracy_mean"], lines[0]["accuracy_half_width"]
    axes.axvspan(mean - half, mean + half, color="#dddddd", linewidth=0)
    for i, line in enumerate(lines):
        y, middle = len(lines) - 1 - i, line["accuracy_mean"]
        axes.annotate(f"{line['ratio']:.0f}x", (1.01, y), xycoords=("axes fraction", "data"),
                      va="center", fontsize=9, color="#444444")
        if middle < mean - 10:
            where = f"{middle:.1f} ± {line['accuracy_half_width']:.1f}, off scale"
            axes.annotate(where, (0.01, y), xycoords=("axes fraction", "data"), va="center",
                          fontsize=9, color=COLOURS[i % len(COLOURS)], weight="bold")
            continue
        axes.errorbar(middle, y, xerr=line["accuracy_half_width"], fmt="o",
                      color=COLOURS[i % len(COLOURS)], capsize=3, markersize=6)
        axes.plot(line["accuracy"], [y] * len(line["accuracy"]), "|", color="#888888",
                  markersize=6)
    axes.set_yticks(range(len(lines)), [line["label"] for line in reversed(lines)])
    axes.set(xlabel="test accuracy, % (mean, 95 % interval)", ylim=(-0.6, len(lines) - 0.4))
    axes.set_title("Accuracy, and fewer bytes than dense by", pad=10)


def losses(axes, lines):
    """Training loss against the step, lines on 4 ranks only."""
    for i, line in enumerate(lines):
        if line["ranks"] == 4:
            steps, values = zip(*((step, nan if loss is None else loss)
                                  for step, loss in line["curve"]))
            axes.plot(steps, values, color=COLOURS[i % len(COLOURS)], linewidth=1.5,
                      label=line["label"])
    axes.set(yscale="log", xlabel="step")
    plain_numbers(axes.yaxis)
    axes.set_title("Training loss, first seed", pad=10)
    axes.legend(fontsize=8, framealpha=0.8, edgecolor="none")


def plain_numbers(axis):
    """1, 2, 5, 10 ... at the ticks of a logarithmic axis, not powers of ten."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(
        lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))


def rates(axes, line):
    """The rate of each weight against the step: 32 bits an element over the bits sent."""
    shapes = {name: shape for name, shape in line["shapes"].items() if len(shape) > 1}
    for i, (name, shape) in enumerate(shapes.items()):
        bits = 8 if len(shape) > 2 else 16  # adacomp:bin=auto: 50 for convolutions, else 500
        points = [(step, 32 * prod(shape) / (bits * max(1, counts[name])))
                  for step, counts in line["layers"]]
        axes.plot(*zip(*points), linewidth=1.5, label=name, color=COLOURS[i % len(COLOURS)])
    axes.set(yscale="log", xlabel="step")
    plain_numbers(axes.yaxis)
    axes.set_title("Rate by layer, rank 0's packets", pad=10)
    axes.legend(fontsize=8, framealpha=0.8, edgecolor="none")


def drawn(name, draw, kept, path) -> bool:
    """Draw a picture; where matplotlib is missing, print what to type. Returns whether it did."""
    try:
        draw(kept, path)
    except ImportError:
        print(f"no picture of {name}: matplotlib is missing; type: pip install matplotlib")
        return False
    return True


def put(name, lines):
    """Replace what is between the marks of `name` in docs/results.md, or append it."""
    page = DOCS / "results.md"
    text = page.read_text()
    begin, end = f"<!-- {name}: made by launch/reproduce -->", f"<!-- end of {name} -->"
    block = "\n".join([begin, "", *lines, "", end])
    if begin in text:
        text = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: block, text, flags=re.S)
    else:
        text = text.rstrip() + "\n\n" + block + "\n"
    page.write_text(text)


def write():
    """Make the tables in docs/results.md and the pictures anew from the files in jobs/results/."""
    for path in sorted((ROOT / "jobs" / "results").glob("reproduce-*.json")):
        kept = json.loads(path.read_text())
        name = kept["experiment"]
        picture = f"reproduce-{name}.png"
        drawn(name, draw, kept, DOCS / picture)
        put(name, [*table(kept), "", f"![{name}]({picture})", "",
                   f"`{kept['command']}`, {kept['date']}"])
