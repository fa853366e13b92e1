"""A cache with every tenth example of two data sets: training on them takes a tenth to evaluate."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "launch"))
from trainer import datasets  # noqa: E402


def small_data(cache, *names):
    """Fill `cache`, a folder for MPICOMP_DATA, with a tenth of these data sets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPICOMP_DATA", str(cache))
        _fill(cache, names)


def _fill(cache, names):
    for name in names:
        data = datasets.load(name)
        (folder,) = cache.glob(f"{name}-*[0-9]")
        for part, split in ("train", data.train), ("test", data.test):
            for kind, array in ("x", split.x), ("y", split.y):
                few = np.array(array[::10])  # the file is mapped: another one takes its place
                np.save(folder / "few.npy", few)
                (folder / "few.npy").replace(folder / f"{part}_{kind}.npy")
