"""OneBit: one sign bit an element and two means a column, the 1-bit SGD of Seide et al."""

from dataclasses import dataclass

from mpicomp import kernels
from mpicomp.compressors.base import Compressor
from mpicomp.compressors.options import check_options, option
from mpicomp.compressors.registry import register
from mpicomp.errors import SpecError


@register
@dataclass(frozen=True, repr=False)
class OneBit(Compressor):
    """Each column of a weight keeps its signs and the means of its two halves.

    A column is a fixed input over all outputs: column j of weight [out, in], and a convolution is
    viewed as [out, rest]. A vector is one column. A matrix with fewer rows than `min_rows` would
    spend more on means than on bits; it is taken as one single column.

    Of CNTK's code are wire=cntk, threshold=mean (levels at the same distance from the column's
    mean) and bits=2, 4, 8 (equal steps between -+ 4 standard deviations).

    Biased: made to be wrapped by Residual, without which training diverges (section 3).
    Source: Seide, Fu, Droppo, Li, Yu, Interspeech 2014, section 3, threshold 0.
    """

    name = "onebit"
    source = "Seide et al., Interspeech 2014"
    feedback = True

    wire: str = option("means", "what a column begins with, and where its bits lie",
                       choices=("means", "cntk"))
    min_rows: int = option(32, "a matrix with fewer rows is one single column", least=1)
    threshold: str = option("zero", "where the two halves of a column meet",
                            choices=("zero", "mean"))
    bits: int = option(1, "bits an element: 1, 2, 4 or 8", least=1, most=8)

    coarse = property(lambda self: self.bits == 1)

    def __post_init__(self):
        check_options(self)
        if self.bits not in (1, 2, 4, 8):
            raise SpecError(f"onebit: bits={self.bits} found, bits must be 1, 2, 4 or 8")
        if self.bits > 1 and self.threshold == "mean":
            raise SpecError(f"onebit: threshold=mean belongs to bits=1, found bits={self.bits}")

    def matrix(self, segment) -> tuple[int, int]:
        """(rows, columns) in which this compressor sees a tensor."""
        rows, columns = segment.matrix
        return (rows, columns) if rows >= self.min_rows else (segment.size, 1)

    def capacity(self, layout):
        """Each column takes 8 bytes and 4 for every 32 rows begun (every 32 / bits rows).

        means: per tensor float32 lower[columns], upper[columns], uint32 bits[words][columns], row
        i in bit i % 32 of word i // 32. cntk: per column float32 lower, upper, uint32
        bits[words], row i in bit i // words of word i % words. With more bits an element a word
        holds 32 / bits of them, in the same order, the first in the lowest bits.
        """
        return sum(part.stop - part.start for *_, part in self._parts(layout))

    def _parts(self, layout):
        """(segment, rows, columns, slice of the payload) of each tensor that has elements."""
        at = 0
        for segment in layout.segments:
            if segment.size:
                rows, columns = self.matrix(segment)
                size = columns * (8 + 4 * kernels.reference.onebit_words(rows, self.bits))
                yield segment, rows, columns, slice(at, at + size)
                at += size

    def encode(self, x, packet, layout, key, state):
        k, used = kernels.of(x), 0
        for segment, rows, columns, part in self._parts(layout):
            values, room = x[segment.slice], packet[part]
            if self.bits > 1:
                k.onebit_encode_bits(values, rows, columns, self.bits, self.wire, room)
            elif self.threshold == "mean":
                k.onebit_encode_mean(values, rows, columns, self.wire, room)
            elif self.wire == "cntk":
                k.onebit_encode_cntk(values, rows, columns, room)
            else:
                k.onebit_encode(values, rows, columns, room)
            used = part.stop
        return used

    def encode_owed(self, grad, owed, packet, layout, key, state, out=None):
        if (self.wire, self.threshold, self.bits) != ("means", "zero", 1):
            return super().encode_owed(grad, owed, packet, layout, key, state, out)
        k, out, used = kernels.of(grad), owed if out is None else out, 0
        for segment, rows, columns, part in self._parts(layout):
            k.onebit_encode_owed(grad[segment.slice], owed[segment.slice], out[segment.slice], rows,
                                 columns, packet[part])
            used = part.stop
        return used

    def decode_sum(self, payloads, out, layout, keys, weight=1.0):
        for packet in payloads:
            self.expect(packet, self.capacity(layout))
        k = kernels.of(out)
        for segment, rows, columns, part in self._parts(layout):
            parts, to = [packet[part] for packet in payloads], out[segment.slice]
            if self.bits > 1:
                k.onebit_decode_sum_bits(parts, rows, columns, self.bits, self.wire, weight, to)
            elif self.wire == "cntk":
                k.onebit_decode_sum_cntk(parts, rows, columns, weight, to)
            else:
                k.onebit_decode_sum(parts, rows, columns, weight, to)

    def decode_add(self, packet, out, layout, key, weight=1.0):
        self.expect(packet, self.capacity(layout))
        k = kernels.of(out)
        for segment, rows, columns, part in self._parts(layout):
            codes, to = packet[part], out[segment.slice]
            if self.bits > 1:
                k.onebit_decode_add_bits(codes, rows, columns, self.bits, self.wire, weight, to)
            elif self.wire == "cntk":
                k.onebit_decode_add_cntk(codes, rows, columns, weight, to)
            else:
                k.onebit_decode_add(codes, rows, columns, weight, to)
