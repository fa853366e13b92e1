"""Top-k: the elements of largest magnitude, exactly so many of each tensor, in full."""

from dataclasses import dataclass

from mpicomp import kernels
from mpicomp.compressors.base import Compressor
from mpicomp.compressors.dropping import MOST_ELEMENTS
from mpicomp.compressors.options import check_options, option
from mpicomp.compressors.registry import register


@register
@dataclass(frozen=True, repr=False)
class TopK(Compressor):
    """(index, value) of the max(1, round(density * n)) largest of the n elements of each tensor.

    Of equal magnitudes those of lower index are taken, so a payload always has the same length.
    scope=bucket takes them from the whole bucket instead. `dropping` is the cheaper form of this:
    its cut comes from a sample, so that how many are sent varies, and none at the cut itself is.

    Made to be wrapped by Residual. Source: Stich, Cordonnier, Jaggi, NeurIPS 2018
    (arXiv 1809.07599), top_k.
    """

    name = "topk"
    source = "Stich et al., NeurIPS 2018"
    feedback = True
    coarse = True

    density: float = option(0.01, "the fraction of elements that is sent", above=0, most=1)
    scope: str = option("layer", "of what it is the fraction", choices=("layer", "bucket"))

    def __post_init__(self):
        check_options(self)

    def _scopes(self, layout):
        """(start, stop, how many are sent) of each scope that has elements."""
        ends = [(0, layout.size)]
        if self.scope == "layer":
            ends = [(s.start, s.stop) for s in layout.segments]
        return [(start, stop, kernels.reference.topk_keeps(stop - start, self.density))
                for start, stop in ends if start < stop]

    def _count(self, layout):
        """How many elements are sent."""
        return sum(keep for *_, keep in self._scopes(layout))

    def capacity(self, layout):
        """8 * K bytes: int32 index[K] in the bucket, ascending, then float32 value[K]."""
        if layout.size > MOST_ELEMENTS:
            raise ValueError(f"topk: {layout.size} elements found in one bucket, an index has 31 "
                             f"bits: make bucket_bytes less than {4 * MOST_ELEMENTS}")
        return 8 * self._count(layout)

    def encode(self, x, packet, layout, key, state):
        k, count = kernels.of(x), 0
        for start, stop, keep in self._scopes(layout):
            k.topk_select(x[start:stop], keep, start, packet[4 * count:])
            count += keep
        k.dropping_values(x, count, packet)
        return 8 * count

    def decode_sum(self, payloads, out, layout, keys, weight=1.0):
        for packet in payloads:
            self.expect(packet, self.capacity(layout))
        kernels.of(out).dropping_decode_sum(payloads, weight, out)

    def decode_add(self, packet, out, layout, key, weight=1.0):
        self.expect(packet, self.capacity(layout))
        kernels.of(out).dropping_decode_add(packet, weight, out)
