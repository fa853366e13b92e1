#!/usr/bin/env python3
"""Many runs of launch/train.py in one MPI job: only the first pays for imports.

    launch/run -n 4 launch/sweep.py runs.json

runs.json holds a list of argument lists for train.py. Each run is what the same arguments give to
train.py in a job of its own, to the bit; a run that fails ends the job with its traceback.
"""

import gc
import json
import runpy
import sys
from pathlib import Path

TRAIN = Path(__file__).resolve().parent / "train.py"


def main():
    """Run them all."""
    for words in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv = [str(TRAIN), *words]
        runpy.run_path(str(TRAIN), run_name="__main__")
        gc.collect()  # the last run's model and buckets, before the next one's


if __name__ == "__main__":
    main()
