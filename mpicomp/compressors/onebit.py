"""OneBit: one sign bit an element and two means a column, the 1-bit SGD of Seide et al."""

from dataclasses import dataclass

from mpicomp import kernels
from mpicomp.compressor import Compressor, check_options, option


@dataclass(frozen=True, repr=False)
class OneBit(Compressor):
    """Each column of a weight keeps its signs and the means of its two halves.

    A column is a fixed input over all outputs: column j of weight [out, in], and a convolution is
    viewed as [out, rest]. A vector is one column. A matrix with fewer rows than `min_rows` would
    spend more on means than on bits; it is taken as one single column.

    Biased: made to be wrapped by Residual, without which training diverges (section 3).
    Source: Seide, Fu, Droppo, Li, Yu, Interspeech 2014, section 3, threshold 0.
    """

    name = "onebit"
    source = "Seide et al., Interspeech 2014"
    feedback = True

    wire: str = option("means", "what a column begins with, and where its bits lie",
                       choices=("means", "cntk"))
    min_rows: int = option(32, "a matrix with fewer rows is one single column", least=1)

    def __post_init__(self):
        check_options(self)

    def matrix(self, segment) -> tuple[int, int]:
        """(rows, columns) in which this compressor sees a tensor."""
        rows, columns = segment.matrix
        return (rows, columns) if rows >= self.min_rows else (segment.size, 1)

    def capacity(self, layout):
        """Each column takes 8 bytes and 4 for every 32 rows begun.

        means: per tensor float32 lower[columns], upper[columns], uint32 bits[words][columns], row
        i in bit i % 32 of word i // 32. cntk: per column float32 lower, upper, uint32
        bits[words], row i in bit i // words of word i % words.
        """
        return sum(part.stop - part.start for *_, part in self._parts(layout))

    def _parts(self, layout):
        """(segment, rows, columns, slice of the payload) of each tensor that has elements."""
        at = 0
        for segment in layout.segments:
            if segment.size:
                rows, columns = self.matrix(segment)
                size = columns * (8 + 4 * kernels.reference.onebit_words(rows))
                yield segment, rows, columns, slice(at, at + size)
                at += size

    def encode(self, x, packet, layout, key, state):
        k = kernels.of(x)
        encode = k.onebit_encode_cntk if self.wire == "cntk" else k.onebit_encode
        used = 0
        for segment, rows, columns, part in self._parts(layout):
            encode(x[segment.slice], rows, columns, packet[part])
            used = part.stop
        return used

    def encode_owed(self, grad, owed, packet, layout, key, state, out=None):
        fused = getattr(kernels.of(grad), "onebit_encode_owed", None)
        if fused is None or self.wire == "cntk":
            return super().encode_owed(grad, owed, packet, layout, key, state, out)
        out, used = owed if out is None else out, 0
        for segment, rows, columns, part in self._parts(layout):
            fused(grad[segment.slice], owed[segment.slice], out[segment.slice], rows, columns,
                  packet[part])
            used = part.stop
        return used

    def decode_add(self, packet, out, layout, key, weight=1.0):
        self.expect(packet, self.capacity(layout))
        k = kernels.of(out)
        decode_add = k.onebit_decode_add_cntk if self.wire == "cntk" else k.onebit_decode_add
        for segment, rows, columns, part in self._parts(layout):
            decode_add(packet[part], rows, columns, weight, out[segment.slice])
