"""When OneBitAdam freezes v: at a given step, or when v has become steady."""

from dataclasses import dataclass
from numbers import Integral

from mpicomp.errors import SpecError

STEADY = 0.96  # of the automatic rule: v is no smaller than this part of what it was


@dataclass(frozen=True)
class Freeze:
    """The rule; the arguments are those of OneBitAdam."""

    freeze: int | str = "auto"
    freeze_from: int = 0
    freeze_by: int | None = None

    def __post_init__(self):
        if self.freeze != "auto":
            _check("freeze", self.freeze, "'auto' or a step, at least 0")
            if self.freeze_from or self.freeze_by is not None:
                raise SpecError(f"freeze={self.freeze} found with freeze_from or freeze_by, which "
                                "bound freeze='auto': leave them out")
        _check("freeze_from", self.freeze_from, "a step, at least 0")
        if self.freeze_by is not None:
            _check("freeze_by", self.freeze_by, "a step, at least 1, or None", 1)
            if self.freeze_by < self.freeze_from:
                raise SpecError(f"freeze_by={self.freeze_by} found, expected at least "
                                f"freeze_from={self.freeze_from}")

    def __str__(self):
        if self.freeze != "auto":
            return f"freeze={self.freeze}"
        return f"freeze=auto, freeze_from={self.freeze_from}, freeze_by={self.freeze_by}"

    def at_once(self, steps) -> bool:
        """Is v to be frozen after so many steps, however it looks?"""
        last = self.freeze_by if self.freeze == "auto" else self.freeze
        return last is not None and steps >= last

    def steady(self, steps, before, now) -> bool:
        """Is v frozen after so many steps, of which it had these sums of its elements?"""
        return (self.freeze == "auto" and steps >= self.freeze_from and bool(before)
                and now / before >= STEADY)


def _check(name, value, expected, least=0):
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise SpecError(f"{name}={value!r} found, expected {expected}")
