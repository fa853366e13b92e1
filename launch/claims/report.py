"""Tables and pictures of what launch/reproduce measured, put into docs/results.md."""

import itertools
import json
import operator
import re
from math import inf, nan, prod
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Okabe and Ito's colours, told apart by colour-blind readers; the first, of dense, is grey
COLOURS = ["#555555", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6D1F",
           "#333399", "#999999"]


def table(kept):
    """The lines of one experiment's table, in Markdown."""
    if kept.get("judged") == "loss":
        yield from table_of_losses(kept)
        return
    yield (f"| {kept['data']}, {kept['seeds']} seeds | ranks | rate | accuracy, % | loss "
           "| bytes/step | ratio |")
    yield "|---|---|---|---|---|---|---|"
    for line in kept["lines"]:
        lost = line["loss"].count(None)
        loss = f"{lost} of {len(line['loss'])} diverged" if lost else f"{line['loss_mean']:.3f}"
        yield (f"| {line['label']} | {line['ranks']} | {line['learning_rate']:g} "
               f"| {line['accuracy_mean']:.2f} ± {line['accuracy_half_width']:.2f} "
               f"| {loss} | {line['bytes_per_step']:,.0f} | {line['ratio']:.1f} |")


def table_of_losses(kept):
    """The same where the loss counts: nats a letter, and how far that is above another line's."""
    yield (f"| {kept['data']}, {kept['seeds']} seeds | ranks | rate | nats/letter | above dense "
           "| allowed | bytes/letter | ratio | of the second half |")
    yield "|---|---|---|---|---|---|---|---|---|"
    lines = {line["label"]: line for line in kept["lines"]}
    dense = kept["lines"][0]
    for label, line in lines.items():
        lost, half, allowed = line["loss"].count(None), line["loss_half_width"], ""
        loss = (f"{lost} of {len(line['loss'])} diverged | " if lost else
                f"{line['loss_mean']:.3f}" + ("" if half is None else f" ± {half:.3f}")
                + f" | {gap(line, dense):+.3f}")
        if "within" in line:
            held = gap(line, lines.get(line["above"], dense)) <= line["within"]
            allowed = (f"{line['within']:g}" + f" above {line['above']}" * bool(line["above"])
                       + ("" if held else ": missed"))
        sent = (f"{line['bytes_per_letter']:,.4g} | {line['ratio']:,.1f} "
                f"| {late_ratio(line, dense):,.1f}" if line["ranks"] > 1 else "0 | |")
        yield (f"| {label} | {line['ranks']} | {line['learning_rate']:g} | {loss} | {allowed} "
               f"| {sent} |")


def gap(line, base):
    """How far a line's mean loss is above another's; NaN where a run of either diverged."""
    losses = line["loss_mean"], base["loss_mean"]
    return nan if None in losses else losses[0] - losses[1]


def late_ratio(line, dense):
    """How many times fewer bytes than dense in the second half, where a dense start is over."""
    def late(one):
        steps = [step for step, _ in one["sent"]]
        return sum(sent * (step - before) for (step, sent), before in
                   zip(one["sent"], [0, *steps]) if 2 * before >= one["steps"])
    return late(dense) / max(1, late(line))


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
    """What every line reached with its interval, beside the training loss of the first seed."""
    pyplot = style()
    by_loss = kept.get("judged") == "loss"
    layers = [line for line in kept["lines"] if "layers" in line and line["label"] != "dense"]
    panels = 3 if layers else 2
    lines = kept["lines"]
    figure, axes = pyplot.subplots(
        1, panels, figsize=(4.9 * panels, max(3.4, 0.42 * len(lines) + 1.6)), dpi=120,
        facecolor="white")
    reached(axes[0], lines, *(LOSS if by_loss else ACCURACY))
    losses(axes[1], lines, by_loss)
    if layers:
        rates(axes[2], layers[0])
    figure.tight_layout(w_pad=2)
    figure.savefig(path)
    pyplot.close(figure)


# the key in a line, its unit, and how far below dense is too far for the picture
ACCURACY = "accuracy", "test accuracy, %", 10, "Accuracy"
LOSS = "loss", "test loss, nats a letter", inf, "Loss"


def reached(axes, lines, key, unit, scale, title):
    """A dot and an interval for each line, its ratio at the margin; dense as a band.

    Lines more than `scale` below dense are written at the edge, not drawn to scale.
    """
    mean, half = lines[0][f"{key}_mean"], lines[0][f"{key}_half_width"]
    axes.axvspan(mean - half, mean + half, color="#dddddd", linewidth=0)
    for i, line in enumerate(lines):
        y, middle = len(lines) - 1 - i, line[f"{key}_mean"]
        if line["ranks"] > 1:
            axes.annotate(f"{line['ratio']:,.0f}x", (1.01, y), xycoords=("axes fraction", "data"),
                          va="center", fontsize=9, color="#444444")
        if middle is None:
            axes.annotate("diverged", (0.01, y), xycoords=("axes fraction", "data"), va="center",
                          fontsize=9, color=COLOURS[i % len(COLOURS)], weight="bold")
            continue
        if middle < mean - scale:
            where = f"{middle:.1f} ± {line[f'{key}_half_width']:.1f}, off scale"
            axes.annotate(where, (0.01, y), xycoords=("axes fraction", "data"), va="center",
                          fontsize=9, color=COLOURS[i % len(COLOURS)], weight="bold")
            continue
        axes.errorbar(middle, y, xerr=line[f"{key}_half_width"], fmt="o",
                      color=COLOURS[i % len(COLOURS)], capsize=3, markersize=6)
        axes.plot(line[key], [y] * len(line[key]), "|", color="#888888", markersize=6)
    axes.set_yticks(range(len(lines)), [line["label"] for line in reversed(lines)])
    axes.set(xlabel=f"{unit} (mean, 95 % interval)", ylim=(-0.6, len(lines) - 0.4))
    axes.set_title(f"{title}, and fewer bytes than dense by", pad=10)


def losses(axes, lines, by_bytes=False):
    """Training loss against the step, or the bytes that a rank sent; lines on 4 ranks only."""
    for i, line in enumerate(lines):
        if line["ranks"] == 4:
            steps, values = zip(*((step, nan if loss is None else loss)
                                  for step, loss in line["curve"]))
            per_step = [sent for _, sent in line["sent"]]
            widths = [step - before for step, before in zip(steps, [0, *steps])]
            sent = itertools.accumulate(map(operator.mul, per_step, widths))
            axes.plot(list(sent) if by_bytes else steps, values, linewidth=1.5,
                      color=COLOURS[i % len(COLOURS)], label=line["label"])
    axes.set(yscale="log", xlabel="bytes sent by each rank" if by_bytes else "step")
    if by_bytes:
        axes.set_xscale("log")
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
