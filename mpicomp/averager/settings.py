"""The options of an averager: what each means, and which values it takes."""

import os
from dataclasses import dataclass
from numbers import Integral, Real

from mpicomp import kernels
from mpicomp.errors import SpecError
from mpicomp.transport.pipeline import WAYS


@dataclass(frozen=True)
class Settings:
    """Of one averager; the same on all ranks, but for `progress`."""

    average: bool = True
    bucket_bytes: int = 25 << 20
    seed: int = 0
    nonfinite: str = "raise"
    stall_timeout: float = 600.0
    require_ratio: float | None = None
    ratio_window: int = 100
    progress: str = "auto"

    @property
    def facts(self) -> dict:
        """What all ranks must agree on."""
        return {"seed": self.seed, "average": self.average, "nonfinite": self.nonfinite,
                "bucket_bytes": self.bucket_bytes, "stall_timeout": self.stall_timeout,
                "require_ratio": self.require_ratio, "ratio_window": self.ratio_window}

    def problem(self, **more) -> SpecError | None:
        """What is wrong with a value or a variable of the environment, or None."""
        ratio = 1.0 if self.require_ratio is None else self.require_ratio
        for name, value, kind, fits, expected in (
                ("nonfinite", self.nonfinite, str, lambda v: v in ("raise", "skip"),
                 "'raise' or 'skip'"),
                ("seed", self.seed, Integral, lambda v: 0 <= v < 2**64,
                 "a whole number below 2**64"),
                ("bucket_bytes", self.bucket_bytes, Integral, lambda v: v > 0, ABOVE_0),
                ("stall_timeout", self.stall_timeout, Real, lambda v: v > 0,
                 "seconds, more than 0"),
                ("require_ratio", ratio, Real, lambda v: v > 0, "a number above 0"),
                ("progress", self.progress, str, lambda v: v in WAYS,
                 "'auto', 'poll' or 'thread'"),
                ("ratio_window", self.ratio_window, Integral, lambda v: v > 0, ABOVE_0),
                *((name, 1 if value is None else value, Integral, lambda v: v > 0, ABOVE_0)
                  for name, value in more.items())):
            if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
                return SpecError(f"{name}={value!r} found, expected {expected}")
        return self._bad_variable()

    def _bad_variable(self):
        for name, known in (("MPICOMP_RING", ("never",)), ("MPICOMP_PROGRESS", WAYS)):
            found = os.environ.get(name)
            if found and found not in known and (self.progress == "auto"
                                                 or name != "MPICOMP_PROGRESS"):
                return SpecError(f"{name}={found} found, expected {' or '.join(known)}: type  "
                                 f"unset {name}  if you did not mean to set it")
        try:
            kernels.for_numpy()
        except SpecError as error:  # MPICOMP_KERNELS
            return error


ABOVE_0 = "a whole number above 0"
