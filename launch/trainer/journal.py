"""What rank 0 says and writes on the way: a bar or lines on the terminal, rows in metrics.jsonl."""
from __future__ import annotations

import json
import os
import shutil
import sys

from mpicomp import checkpoint

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class Journal:
    """Only rank 0 has an open one; of the others every method does nothing.

    out    the folder of metrics.jsonl
    alone  is this the only rank? Under mpirun isatty() says nothing about the user's terminal;
           launch/run tells us instead
    """

    def __init__(self, out, alone):
        self.out, self.metrics, self.bar = out, None, None
        self.on_terminal = os.environ.get(
            "MPICOMP_TTY", str(int(alone and sys.stdout.isatty()))) == "1"

    def open(self, step):
        """Go on after `step`: rows of later ones go, and one that was being written, too."""
        file, kept = self.out / "metrics.jsonl", []
        for line in file.read_text().splitlines() if step and file.exists() else ():
            try:
                kept += [line] if json.loads(line)["step"] <= step else []
            except ValueError:
                break
        checkpoint.write(file, "".join(line + "\n" for line in kept).encode())
        self.metrics = open(file, "a", buffering=1)

    def show(self, step, steps):
        """A bar, where there is a terminal to draw it on."""
        if self.metrics and tqdm and self.on_terminal:
            # mpirun's own terminal has no size, and tqdm would draw nothing on it
            self.bar = tqdm(total=steps, initial=step, file=sys.stdout, nrows=24,
                            ncols=shutil.get_terminal_size((100, 24)).columns - 1,
                            bar_format="{n}/{total} {bar} {remaining}{postfix}")

    def advance(self):
        """One step more."""
        if self.bar:
            self.bar.update()

    def write(self, row):
        """A row of metrics.jsonl."""
        self.metrics.write(json.dumps(row) + "\n")

    def numbers(self, place, text):
        """What changes: behind the bar, or a line of its own with its place in front."""
        if self.bar:
            self.bar.set_postfix_str(text)
        elif self.metrics:
            print(f"{place}  {text}", flush=True)

    def say(self, text):
        """A line that stays."""
        if self.bar:
            self.bar.write(text)
        elif self.metrics:
            print(text, flush=True)

    def close(self):
        """Nothing more is said."""
        if self.bar:
            self.bar.close()
        if self.metrics:
            self.metrics.close()
        self.bar = self.metrics = None
