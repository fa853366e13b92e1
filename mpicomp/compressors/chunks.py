"""Chunks: the k largest of every block, with offsets of 12 bits and values of 2, 8 or 32."""

from dataclasses import dataclass

from mpicomp import kernels
from mpicomp.compressors.base import Compressor
from mpicomp.compressors.options import check_options, option
from mpicomp.compressors.registry import register
from mpicomp.errors import SpecError

MOST_BLOCK = kernels.reference.MOST_BLOCK


@register
@dataclass(frozen=True, repr=False)
class Chunks(Compressor):
    """The k elements of largest magnitude of every `block` neighbours, of each tensor by itself.

    Every layer is served, at the same rate; there is no threshold to search for, and a payload
    always has the same length. The last block of a tensor, of n elements, keeps
    max(1, round(k n / block)). Of equal magnitudes those of lower index are taken.

    bits=2: a sign and one of two magnitudes a tensor, the means of those above and of those not
    above the mean of what is kept. (Where a zero is kept, the lower is 0.) bits=8: whole multiples,
    -127 to 127, of a 127th of the tensor's largest. bits=32: float32.

    Made to be wrapped by Residual, for SparseLoCo with decay=0.95. Source: SparseLoCo
    (arXiv 2508.15706) and its code (tplr-ai/templar), which takes 64 of every tile of 64 x 64 and
    has four levels for its 2 bits; DeMo (arXiv 2411.19870) takes the largest of blocks, too.
    """

    name = "chunks"
    source = "SparseLoCo, arXiv 2508.15706"
    feedback = True
    coarse = True

    k: int = option(64, "how many elements of a block are sent", least=1)
    block: int = option(4096, "how many neighbours are a block", least=1, most=MOST_BLOCK)
    bits: int = option(2, "bits of a value", choices=(2, 8, 32))

    def __post_init__(self):
        check_options(self)
        if self.k > self.block:
            raise SpecError(f"chunks: k={self.k} found, k must be at most block={self.block}")

    def _format(self, layout):
        """What kernels take: the sizes of the tensors, and the options."""
        return tuple(s.size for s in layout.segments), self.block, self.k, self.bits

    def capacity(self, layout):
        """Floats, then ceil(3 K / 2) bytes of offsets, then codes; K elements are kept.

        Floats and codes are float32 low, high of each tensor that has elements and ceil(K / 4)
        bytes with 2 bits; float32 step of each and int8 [K] with 8; float32 value[K] and none
        with 32.
        """
        return kernels.reference.chunks_size(*self._format(layout))

    def encode(self, x, packet, layout, key, state):
        kernels.of(x).chunks_encode(x, *self._format(layout), packet)
        return self.capacity(layout)

    def encode_owed(self, grad, owed, packet, layout, key, state, out=None):
        kernels.of(grad).chunks_encode_owed(grad, owed, owed if out is None else out,
                                            *self._format(layout), packet)
        return self.capacity(layout)

    def decode_sum(self, payloads, out, layout, keys, weight=1.0):
        for packet in payloads:
            self.expect(packet, self.capacity(layout))
        kernels.of(out).chunks_decode_sum(payloads, *self._format(layout), weight, out)

    def decode_add(self, packet, out, layout, key, weight=1.0):
        self.expect(packet, self.capacity(layout))
        kernels.of(out).chunks_decode_add(packet, *self._format(layout), weight, out)
