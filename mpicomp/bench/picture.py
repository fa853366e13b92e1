"""The picture of `mpicomp bench step`: the stages of a step, one bar per contender."""

from pathlib import Path

COLOURS = {"forward": "#bbbbbb", "backward": "#888888", "encode": "#E69F00", "post": "#56B4E9",
           "wait": "#0072B2", "decode": "#D55E00", "optimizer": "#555555"}


def draw(result, path) -> str:
    """Write a PNG, SVG or PDF file of what `step.run` returned.

    Returns a line for the user: what was written, or what to type if matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is missing; type: pip install matplotlib"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(result["contenders"])[::-1]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.42 * len(names)), dpi=150)
    left = [0.0] * len(names)
    for stage, colour in COLOURS.items():
        widths = [result["contenders"][name]["stages"].get(stage, 0.0) for name in names]
        axes.barh(names, widths, left=left, color=colour, label=stage)
        left = [a + b for a, b in zip(left, widths)]
    for at, name in enumerate(names):
        figures = result["contenders"][name]
        axes.text(left[at], at, f"  {figures['gain']['median']:.2f}x", va="center", fontsize=9)
        axes.plot([figures["seconds"]["median"]] * 2, [at - 0.4, at + 0.4], color="black", lw=1.2)
    links = f", links of {result['links']}" if result.get("links") else ""
    axes.set_title(f"{result['model']}, {result['ranks']} ranks{links}; gain over "
                   f"{result['base']}; lines: median step of the slowest rank", fontsize=10,
                   loc="left")
    axes.set_xlabel("seconds per step, mean on rank 0")
    axes.margins(x=0.12)
    figure.tight_layout()
    figure.legend(ncols=len(COLOURS), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0.01),
                  frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
    return f"picture: {path}"
