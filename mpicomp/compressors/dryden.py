"""Dryden: one in p elements of each column is sent, as the mean of its sign; thresholds adapt."""

from dataclasses import dataclass

from mpicomp import kernels
from mpicomp.compressors.base import Compressor
from mpicomp.compressors.options import check_options, option
from mpicomp.compressors.registry import register
from mpicomp.errors import PacketError, SpecError

_SAMPLE = {"2016": 128, "2017": 1024}  # draws from a column, and from a matrix
MOST_ELEMENTS = 2**31


@register
@dataclass(frozen=True, repr=False)
class Dryden(Compressor):
    """Index and sign of the largest elements, and two means a column that stand for them.

    version=2016: in each column the largest max(1, n // proportion) of its n non-negative values,
    and of its negative ones, set a threshold for their sign. version=2017: the largest magnitudes
    of the whole matrix set the thresholds of all its columns. A threshold is taken from `sample`
    random draws where there are more elements than that. Everything at or beyond a threshold is
    sent; its value becomes the mean of what the column sends of this sign. Zeros are not sent, and
    a sign that is absent from the sample sends nothing.

    A column is that of 1-bit SGD (Segment.matrix); a matrix with fewer rows than `min_rows` is one
    single column: means, and at least one element of each sign, would cost more than `proportion`
    saves.

    Made to be wrapped by Residual. Source: Dryden, Moon, Jacobs, Van Essen, MLHPC 2016, in the
    form of the authors' code (LBANN) of August 2016 and of January and February 2017; the means are
    those of all elements sent, where that code averages the sample's.
    """

    name = "dryden"
    source = "Dryden et al., MLHPC 2016"
    fixed = False
    feedback = True
    coarse = True

    proportion: int = option(64, "one in so many elements is sent", least=1)
    version: str = option("2016", "thresholds per column and sign, or per matrix",
                          choices=("2016", "2017"))
    sample: str = option("auto", "draws that set a threshold: a number, exact, or auto: 128 a "
                                 "column (2016), 1024 a matrix (2017)")
    min_rows: int = option(128, "a matrix with fewer rows is one single column", least=1)

    def __post_init__(self):
        check_options(self)
        if self.sample not in ("auto", "exact") and not (self.sample.isdecimal()
                                                         and int(self.sample) > 0):
            raise SpecError(f"dryden: sample={self.sample} found, sample must be auto, exact or a "
                            "whole number above 0")

    def matrix(self, segment) -> tuple[int, int]:
        """(rows, columns) in which this compressor sees a tensor."""
        rows, columns = segment.matrix
        return (rows, columns) if rows >= self.min_rows else (segment.size, 1)

    def _matrices(self, layout):
        """(start, rows, columns) of every tensor that has elements."""
        return [(segment.start, *self.matrix(segment)) for segment in layout.segments
                if segment.size]

    def capacity(self, layout):
        """One tensor after the other, in c columns; k elements are sent, at most all.

        2016: uint32 k, float32 lower[c], upper[c], uint32 words[k]: index << 1 | positive, the
        index row * c + column in the tensor, ascending: 4 + 8 c + 4 k bytes. 2017: float32
        lower[c], upper[c], counts[c], words[k]: row << 1 | positive, column after column; counts
        and words are uint16 up to 32768 rows, else uint32; filled up with 0 to a multiple of 4:
        8 c + 2 (c + k) or 8 c + 4 (c + k) bytes.
        """
        return sum(self._most(segment, *self.matrix(segment))
                   for segment in layout.segments if segment.size)

    def _most(self, segment, rows, columns):
        if segment.size > MOST_ELEMENTS:
            raise ValueError(f"dryden: {segment.name!r} has {segment.size} elements, an index has "
                             "31 bits")
        if self.version == "2016":
            return 4 + 8 * columns + 4 * segment.size
        word = kernels.reference.dryden_word(rows).itemsize
        size = 8 * columns + word * (columns + segment.size)
        return size + -size % 4

    def _sample(self):
        if self.sample == "auto":
            return _SAMPLE[self.version]
        return 0 if self.sample == "exact" else int(self.sample)

    def encode(self, x, packet, layout, key, state):
        k, sample, used = kernels.of(x), self._sample(), 0
        for segment in filter(lambda s: s.size, layout.segments):
            rows, columns = self.matrix(segment)
            part = x[segment.slice]
            room = packet[used:used + self._most(segment, rows, columns)]
            if self.version == "2016":
                lower, upper = k.dryden_columns(part, rows, columns, self.proportion, sample, key,
                                                segment.start)
                used += k.dryden_encode_2016(part, rows, columns, lower, upper, room)
            else:
                lower, upper = k.dryden_matrix(part, columns, self.proportion, sample, key,
                                               segment.start)
                used += k.dryden_encode_2017(part, rows, columns, lower, upper, room)
        return used

    def encode_owed(self, grad, owed, packet, layout, key, state, out=None):
        if self.version != "2016":
            return super().encode_owed(grad, owed, packet, layout, key, state, out)
        return kernels.of(grad).dryden_encode_owed_2016(
            grad, owed, owed if out is None else out, self._matrices(layout), self.proportion,
            self._sample(), key, packet[:self.capacity(layout)])

    def decode_sum(self, payloads, out, layout, keys, weight=1.0):
        if self.version != "2016":
            return super().decode_sum(payloads, out, layout, keys, weight)
        used = kernels.of(out).dryden_decode_sum_2016(payloads, self._matrices(layout), weight, out)
        for packet, size in zip(payloads, used):
            self._expect_end(packet, size)

    def decode_add(self, packet, out, layout, key, weight=1.0):
        k, used = kernels.of(out), 0
        if self.version == "2016":
            used, = k.dryden_decode_sum_2016([packet], self._matrices(layout), weight, out, False)
            return self._expect_end(packet, used)
        for start, rows, columns in self._matrices(layout):
            used += k.dryden_decode_add_2017(packet[used:], rows, columns, weight,
                                             out[start:start + rows * columns])
        self._expect_end(packet, used)

    def _expect_end(self, packet, used):
        if used != len(packet):
            raise PacketError(f"dryden: {used} bytes expected, {len(packet)} found")
