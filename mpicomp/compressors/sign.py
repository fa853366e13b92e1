"""Sign: one bit an element, and one mean magnitude for a tensor, a row or a block."""

from dataclasses import dataclass

from mpicomp import kernels
from mpicomp.compressors.base import Compressor
from mpicomp.compressors.block import MOST_SIZE, check_size
from mpicomp.compressors.options import check_options, option
from mpicomp.compressors.registry import register


@register
@dataclass(frozen=True, repr=False)
class Sign(Compressor):
    """sgn(x) mean |x|, the mean over the tensor, over each row, or over each block of `size`.

    A row is what torch's first dimension counts: with scope=row an embedding [vocabulary, width]
    has a scale for each token, and a token without a gradient stays at 0. A vector is one row.
    sgn(0) = +1. `onebit` differs: it has two means, of the negative and of the others, for each
    column (a fixed input over all outputs).

    With mean |x| the error is 1 - ||x||_1^2 / (d ||x||_2^2) of ||x||_2^2, less than 1 always: a
    contraction, which the root of the mean square is not.

    Source: Karimireddy, Rebjock, Stich, Jaggi, ICML 2019 (arXiv 1901.09847), algorithm 1
    (EF-signSGD), a scale for each layer.
    """

    name = "sign"
    source = "Karimireddy et al., ICML 2019"
    feedback = True
    coarse = True

    scope: str = option("tensor", "what shares a scale", choices=("tensor", "row", "block"))
    size: int = option(512, "scope=block: elements of a block, a multiple of 32", least=32,
                       most=MOST_SIZE)

    def __post_init__(self):
        check_options(self)
        check_size(self.name, "size", self.size)

    def length(self, segment) -> int:
        """How many neighbours of this tensor share a scale."""
        if self.scope == "block":
            return self.size
        if self.scope == "row" and len(segment.shape) > 1:
            return segment.size // segment.shape[0]
        return segment.size

    def capacity(self, layout):
        """For each tensor float32 scale[scopes], then each scope's bits, from a whole byte on."""
        return sum(part.stop - part.start for *_, part in self._parts(layout))

    def _parts(self, layout):
        """(segment, elements that share a scale, slice of the payload) of each tensor."""
        at = 0
        for segment in layout.segments:
            if segment.size:
                length = self.length(segment)
                size = kernels.reference.sign_bytes(segment.size, length)
                yield segment, length, slice(at, at + size)
                at += size

    def encode(self, x, packet, layout, key, state):
        encode = kernels.of(x).sign_encode
        for segment, length, part in self._parts(layout):
            encode(x[segment.slice], length, packet[part])
        return self.capacity(layout)

    def encode_owed(self, grad, owed, packet, layout, key, state, out=None):
        encode_owed, out = kernels.of(grad).sign_encode_owed, owed if out is None else out
        for segment, length, part in self._parts(layout):
            encode_owed(grad[segment.slice], owed[segment.slice], out[segment.slice], length,
                        packet[part])
        return self.capacity(layout)

    def decode_sum(self, payloads, out, layout, keys, weight=1.0):
        for packet in payloads:
            self.expect(packet, self.capacity(layout))
        decode_sum = kernels.of(out).sign_decode_sum
        for segment, length, part in self._parts(layout):
            decode_sum([packet[part] for packet in payloads], length, weight, out[segment.slice])

    def decode_add(self, packet, out, layout, key, weight=1.0):
        self.expect(packet, self.capacity(layout))
        decode_add = kernels.of(out).sign_decode_add
        for segment, length, part in self._parts(layout):
            decode_add(packet[part], length, weight, out[segment.slice])
