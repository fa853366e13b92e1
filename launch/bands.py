"""The small, fixed part of the evidence that CI runs: every method in its band, or the run fails.

Bands are what five seeds gave on two cores with torch 2.13 (`launch/reproduce slice --seeds 5`
prints them anew): the mean less four standard deviations, and less one point at least. Ratios are
exact for methods of fixed length; those of sparse methods may move by a tenth.
"""

import statistics
from dataclasses import dataclass

RANKS = 4
FIXED, SPARSE = 0.001, 0.1  # how far a ratio may be from what was found, as a fraction


@dataclass(frozen=True)
class Band:
    """A method on a data set for so many steps: accuracies in %, ratio of dense to sent bytes."""

    data: str
    steps: int
    method: str
    least: float
    ratio: float
    spread: float = FIXED
    most: float = 100.0  # less than that where it must fail to learn as well

    @property
    def words(self):
        """For launch/train.py."""
        return ["--data", self.data, "--method", self.method, "--steps", str(self.steps),
                "--save-every", "0", "--log-every", "1000", "--nonfinite", "skip"]


BANDS = (
    Band("mnist5k", 124, "dense", 0, 1),
    Band("mnist5k", 124, "terngrad", 0, 16),
    Band("mnist5k", 124, "onebit", 0, 20.2),
    Band("mnist5k", 124, "dorefa:bits=6", 0, 5.3),
    Band("mnist5k", 124, "strom:tau=0.05", 0, 100, SPARSE),
    Band("mnist5k", 124, "dryden", 0, 33, SPARSE),
    Band("mnist5k", 124, "dropping", 0, 40, SPARSE),
    Band("mnist5k", 124, "adacomp", 0, 200, SPARSE),
    Band("fsdd", 504, "dense", 0, 1),
    Band("fsdd", 504, "onebit", 0, 25.8),
    Band("fsdd", 504, "onebit:feedback=no", 0, 25.8),
    Band("fsdd", 504, "onebit:exchange=sharded", 0, 25.8),
)


def check(seeds=1):
    """Run the slice, say of each line where it lies; the number of lines outside of their band."""
    from evidence import perform, read

    runs = {(band, seed): [*band.words, "--seed", str(seed)]
            for band in BANDS for seed in range(seeds)}
    perform([(words, RANKS) for words in runs.values()])
    failed = 0
    print(f"{'data':8} {'method':24} {'accuracy':>9} {'band':>14} {'ratio':>7} {'expected':>9}")
    for band in BANDS:
        found = [read(runs[band, seed], RANKS) for seed in range(seeds)]
        accuracy = statistics.fmean(100 * run["accuracy"] for run in found)
        ratio = statistics.fmean(run["ratio"] for run in found)
        fits = (band.least <= accuracy <= band.most
                and abs(ratio / band.ratio - 1) <= band.spread)
        failed += not fits
        print(f"{band.data:8} {band.method:24} {accuracy:8.2f}% "
              f"{band.least:6.1f} ..{band.most:5.1f} {ratio:7.1f} {band.ratio:9.1f}"
              + ("" if fits else "  outside of its band")
              + (f"  sd {statistics.stdev(100 * r['accuracy'] for r in found):.2f}"
                 if seeds > 1 else ""))
    print(f"slice: {len(BANDS) - failed} passed, {failed} failed")
    return failed
