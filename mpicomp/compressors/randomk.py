"""Random-k: elements drawn alike on all ranks, so that no index travels and MPI adds values."""

from dataclasses import dataclass

from mpicomp import kernels, philox
from mpicomp.compressors.base import Compressor
from mpicomp.compressors.options import check_options, option
from mpicomp.compressors.registry import register


@register
@dataclass(frozen=True, repr=False)
class RandomK(Compressor):
    """The values of K = max(1, round(density * n)) of the n elements of a bucket.

    The bucket is cut into K runs of n / K neighbours, rounded, and one element of each is drawn, by
    the seed, the step and the bucket: not by the rank, so all ranks draw the same.

    scale=no sends values as they are, for error feedback: a step leaves 1 - K/n of the residual's
    squared length. scale=yes multiplies each by the length of its run, which makes the expectation
    the gradient. Error feedback is then refused: what is left of an element that was sent is
    1 - n/K times it, so that the residual's squared length would grow by n/K - 1 in a step.

    Source: Stich, Cordonnier, Jaggi, NeurIPS 2018 (arXiv 1809.07599), rand_k; a draw from each run
    in place of one without replacement from all is this package's.
    """

    name = "randomk"
    source = "Stich et al., NeurIPS 2018"
    coarse = True
    summable = "float32"

    density: float = option(0.01, "the fraction of elements that is sent", above=0, most=1)
    scale: bool = option(False, "multiply values by n/K, which makes them unbiased and excludes "
                                "error feedback")

    def __post_init__(self):
        check_options(self)

    feedback = property(lambda self: not self.scale)
    unbiased = property(lambda self: self.scale)

    def capacity(self, layout):
        """4 * K bytes: float32 value[K]."""
        return 4 * kernels.reference.topk_keeps(layout.size, self.density)

    def encode(self, x, packet, layout, key, state):
        used = self.capacity(layout)
        kernels.of(x).randomk_encode(x, used // 4, self.scale, philox.common(key), packet)
        return used

    def decode_add(self, packet, out, layout, key, weight=1.0):
        self.expect(packet, self.capacity(layout))
        kernels.of(out).randomk_decode_add(packet, philox.common(key), weight, out)
