"""Which tensors, of which shapes, lie where in a flat bucket of gradients.

The papers work per layer, per column or per bin, so a compressor is told where each tensor begins
and what shape it has. A layout is data: equal layouts have equal digests on every rank.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from math import prod


@dataclass(frozen=True)
class Segment:
    """One tensor of a bucket: `size` elements from element `start` on, in row-major order."""

    name: str
    shape: tuple[int, ...]
    start: int = 0

    @cached_property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.size

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def matrix(self) -> tuple[int, int]:
        """The tensor as (rows, columns) = (out, everything else).

        A column is a fixed input over all outputs (the convention of CNTK's 1-bit SGD, which
        stores weights as [out, in] like torch). A vector or scalar is one single column.
        """
        if len(self.shape) < 2:
            return self.size, 1
        return self.shape[0], prod(self.shape[1:])


@dataclass(frozen=True)
class Layout:
    """The segments of a bucket, in order and without gaps. `size` counts elements."""

    segments: tuple[Segment, ...]
    size: int = field(init=False)

    def __post_init__(self):
        end = 0
        for segment in self.segments:
            if segment.start != end:
                raise ValueError(
                    f"segment {segment.name!r} starts at element {segment.start}, not at {end}"
                )
            end = segment.stop
        object.__setattr__(self, "size", end)

    @classmethod
    def of(cls, named_shapes: Iterable[tuple[str, Sequence[int]]]) -> "Layout":
        """The layout of (name, shape) pairs laid side by side in the given order."""
        segments, start = [], 0
        for name, shape in named_shapes:
            segments.append(Segment(name, tuple(int(n) for n in shape), start))
            start = segments[-1].stop
        return cls(tuple(segments))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first element of each segment."""
        return tuple(segment.start for segment in self.segments)

    def describe(self) -> str:
        """One line a tensor, for comparing the layouts of two ranks by eye."""
        return "\n".join(f"{s.name} {list(s.shape)}" for s in self.segments)

    @cached_property
    def digest(self) -> int:
        """64 bits that differ where names, shapes or order differ."""
        return int.from_bytes(blake2b(self.describe().encode(), digest_size=8).digest(), "little")
