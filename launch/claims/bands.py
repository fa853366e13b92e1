"""The small, fixed part of the claims that CI runs: every method must stay in its band.

A band is for the test loss, which tells methods apart sooner than accuracy does. Bands are what
five seeds gave on two cores with torch 2.13: the mean and four standard deviations up, none down;
`launch/reproduce slice --seeds 5` prints means and deviations anew. One line must be bad: 1-bit
quantisation without error feedback has to lose what error feedback keeps. Ratios are exact for
methods of fixed length; those of sparse methods may move by a fifth.
"""

import statistics
from dataclasses import dataclass

from claims.runs import perform, read

RANKS = 4
FIXED, SPARSE = 0.001, 0.2  # how far a ratio may be from what was found, as a fraction


@dataclass(frozen=True)
class Band:
    """A short run of a method, the test losses it may have, and its ratio to dense in bytes."""

    data: str
    steps: int
    method: str
    most: float
    ratio: float
    spread: float = FIXED
    least: float = 0.0
    more: tuple[str, ...] = ()  # words for launch/train.py

    @property
    def words(self):
        """The arguments of launch/train.py."""
        return ["--data", self.data, "--method", self.method, "--steps", str(self.steps),
                *self.more, "--save-every", "0", "--log-every", "1000", "--nonfinite", "skip"]

    def fits(self, loss, ratio):
        """Are this test loss and this ratio inside the band?"""
        return self.least <= loss <= self.most and abs(ratio / self.ratio - 1) <= self.spread


BANDS = (
    Band("mnist5k", 124, "dense", 0.272, 1),
    Band("mnist5k", 124, "terngrad", 0.20, 15.971),
    Band("mnist5k", 124, "onebit", 0.179, 20.151),
    Band("mnist5k", 124, "dorefa:bits=6", 0.26, 5.330),
    Band("mnist5k", 124, "strom:tau=0.05", 0.193, 100, SPARSE),
    Band("mnist5k", 124, "dryden", 0.25, 33.5, SPARSE),
    Band("mnist5k", 124, "dropping", 0.189, 50.1, SPARSE),
    Band("mnist5k", 124, "adacomp", 0.196, 176, SPARSE),
    Band("fsdd", 504, "dense", 0.587, 1),
    Band("fsdd", 504, "onebit", 0.597, 25.780),
    Band("fsdd", 504, "onebit:exchange=sharded", 0.59, 25.690),
    Band("fsdd", 504, "onebit:feedback=no", 0.667, 25.780, least=0.597),
)


def check(seeds=1):
    """Run the slice and print where each line lies; returns how many are outside their band."""
    runs = {(band, seed): [*band.words, "--seed", str(seed)]
            for band in BANDS for seed in range(seeds)}
    perform([(words, RANKS) for words in runs.values()])
    failed = 0
    row = "{:8} {:24} {:>9} {:>15} {:>8} {:>9} {:>9}".format
    print(row("data", "method", "loss", "band", "ratio", "expected", "accuracy"))
    for band in BANDS:
        found = [read(runs[band, seed], RANKS) for seed in range(seeds)]
        losses = [run["loss"] for run in found]
        loss, ratio, accuracy = (statistics.fmean(run[key] for run in found)
                                 for key in ("loss", "ratio", "accuracy"))
        fits = band.fits(loss, ratio)
        failed += not fits
        print(row(band.data, band.method, f"{loss:.4f}", f"{band.least:.3f} .. {band.most:.3f}",
                  f"{ratio:.3f}", f"{band.ratio:g}", f"{accuracy:.2%}")
              + (f"  sd {statistics.stdev(losses):.4f}" if seeds > 1 else "")
              + ("" if fits else "  outside of its band"))
    print(f"slice: {len(BANDS) - failed} passed, {failed} failed")
    return failed
