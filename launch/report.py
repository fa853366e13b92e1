"""Tables of what launch/reproduce measured, and pictures of it."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def table(kept):
    """The lines of one experiment's table, in Markdown."""
    yield f"| {kept['data']}, {kept['seeds']} seeds | P | rate | accuracy, % | loss | bytes/step | ratio |"
    yield "|---|---|---|---|---|---|---|"
    for line in kept["lines"]:
        yield (f"| {line['label']} | {line['ranks']} | {line['learning_rate']:g} "
               f"| {line['accuracy_mean']:.2f} ± {line['accuracy_half_width']:.2f} "
               f"| {line['loss_mean']:.4f} | {line['bytes_per_step']:,.0f} "
               f"| {line['ratio']:.1f} |")


def write():
    pass
