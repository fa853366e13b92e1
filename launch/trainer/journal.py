"""The progress of a training: a bar or lines on the terminal, and rows in metrics.jsonl."""
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
    """Shows and writes the progress of a training, on rank 0; on other ranks it stays closed.

    out    the folder of metrics.jsonl
    alone  whether this is the only rank. Under mpirun isatty() says nothing about the user's
           terminal; launch/run sets MPICOMP_TTY instead
    """

    def __init__(self, out, alone):
        self.out, self.metrics, self.bar = out, None, None
        self.on_terminal = os.environ.get(
            "MPICOMP_TTY", str(int(alone and sys.stdout.isatty()))) == "1"

    def open(self, step):
        """Open metrics.jsonl, less the rows of steps after `step` and a last row half written."""
        file, kept = self.out / "metrics.jsonl", []
        for line in file.read_text().splitlines() if step and file.exists() else ():
            try:
                kept += [line] if json.loads(line)["step"] <= step else []
            except ValueError:
                break
        checkpoint.write(file, "".join(line + "\n" for line in kept).encode())
        self.metrics = open(file, "a", buffering=1)

    def show(self, step, steps):
        """Draw a bar, if there is a terminal."""
        if self.metrics and tqdm and self.on_terminal:
            # mpirun's own terminal has no size, and tqdm would draw nothing on it
            self.bar = tqdm(total=steps, initial=step, file=sys.stdout, nrows=24,
                            ncols=shutil.get_terminal_size((100, 24)).columns - 1,
                            bar_format="{n}/{total} {bar} {remaining}{postfix}")

    def advance(self):
        """Move the bar by one step."""
        if self.bar:
            self.bar.update()

    def write(self, row):
        """Add a row, a dictionary, to metrics.jsonl. On rank 0 only."""
        self.metrics.write(json.dumps(row) + "\n")

    def numbers(self, place, text):
        """Show current figures: behind the bar, or on a line that begins with `place`."""
        if self.bar:
            self.bar.set_postfix_str(text)
        elif self.metrics:
            print(f"{place}  {text}", flush=True)

    def say(self, text):
        """Print a line, above the bar."""
        if self.bar:
            self.bar.write(text)
        elif self.metrics:
            print(text, flush=True)

    def close(self):
        """Remove the bar and close the file."""
        if self.bar:
            self.bar.close()
        if self.metrics:
            self.metrics.close()
        self.bar = self.metrics = None
