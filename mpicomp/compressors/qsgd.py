"""QSGD: levels at random between 0 and the norm of a bucket, and a sign, unbiased."""

from dataclasses import dataclass

from mpicomp.compressors.block import MOST_SIZE, BlockScaled, check_size
from mpicomp.compressors.options import check_options, option
from mpicomp.compressors.registry import register


@register
@dataclass(frozen=True, repr=False)
class QSGD(BlockScaled):
    """sgn(x) ||x|| l / `levels`, l one of the two whole numbers next to |x| `levels` / ||x||.

    ||x|| is the norm of a `bucket` of neighbours in one tensor: the largest magnitude, or the l2
    norm of the paper's analysis. Zero is a level, so what is zero stays zero. Codes have a fixed
    width (4 bits for 7 levels and a sign); the paper's Elias code has not been built. The payload
    and the kernels are those of `block`, whose scale is ||x|| / levels here.

    Source: Alistarh, Grubic, Li, Tomioka, Vojnovic, NIPS 2017 (arXiv 1610.02132), section 3.1; the
    buckets and the max norm are of its section on practice.
    """

    name = "qsgd"
    source = "Alistarh et al., NIPS 2017"

    levels: int = option(7, "levels above zero", least=1, most=127)
    bucket: int = option(512, "elements that share a norm, a multiple of 32", least=32,
                         most=MOST_SIZE)
    norm: str = option("max", "of a bucket: its largest magnitude, or the root of its sum of "
                              "squares", choices=("max", "l2"))
    random = True

    def __post_init__(self):
        check_options(self)
        check_size(self.name, "bucket", self.bucket)

    @property
    def grid(self):
        return self.bucket, "int", self.levels

    @property
    def feedback(self):
        """Where the expected error is a contraction: buckets up to 7 levels^2 (l2: 3 levels^2)."""
        return self.contracts
