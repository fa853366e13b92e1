"""Block: a scale for every few elements, and codes of 8 or 4 bits, or 8-bit floats."""

from abc import abstractmethod
from dataclasses import dataclass

from mpicomp import kernels
from mpicomp.compressors.base import Compressor
from mpicomp.compressors.options import check_options, option
from mpicomp.compressors.registry import register
from mpicomp.errors import SpecError

MOST_SIZE = 2**15  # elements of a block


class BlockScaled(Compressor):
    """What `block` and `qsgd` share: their payload and the calls of its kernels."""

    norm: str = "max"  # what is divided by the number of levels: the largest magnitude, or "l2"

    @property
    @abstractmethod
    def grid(self) -> tuple[int, str, int]:
        """(elements of a block, "int" or "fp8", the largest code)."""

    @property
    @abstractmethod
    def random(self) -> bool:
        """Is a number rounded up or down at random?"""

    @property
    def unbiased(self):
        return self.random

    @property
    def contracts(self) -> bool:
        """Is the expected error of random rounding less than what is encoded, whatever that is?

        Of a block of B with the largest magnitude m, codes to L: an element x = (k + f) m / L
        costs (m / L)^2 f (1 - f), at most (m / L)^2 / 8 more than x^2, and the largest one costs
        nothing: less than the sum of x^2 where (B - 1) / 8 < L^2. With the l2 norm it is B < 4 L^2
        (B f (1 - f) where B f^2 = L^2). 7 and 3 allow for the rounding of the scale. An e4m3
        number is as near as the steps of L = 448 * 512 near zero, and within 1/8 elsewhere.
        """
        size, form, levels = self.grid
        return form == "fp8" or size <= (7 if self.norm == "max" else 3) * levels**2

    def capacity(self, layout):
        """For each tensor bfloat16 scale[ceil(n / size)], then n codes, from a whole byte on."""
        return sum(kernels.reference.block_bytes(s.size, *self.grid) for s in layout.segments)

    def _parts(self, layout):
        """(segment, slice of the payload) of each tensor that has elements."""
        at = 0
        for segment in layout.segments:
            if segment.size:
                size = kernels.reference.block_bytes(segment.size, *self.grid)
                yield segment, slice(at, at + size)
                at += size

    def encode(self, x, packet, layout, key, state):
        encode, key = kernels.of(x).block_encode, key if self.random else None
        for segment, part in self._parts(layout):
            encode(x[segment.slice], *self.grid, self.norm, key, segment.start, packet[part])
        return self.capacity(layout)

    def encode_owed(self, grad, owed, packet, layout, key, state, out=None):
        encode, key = kernels.of(grad).block_encode_owed, key if self.random else None
        out = owed if out is None else out
        for segment, part in self._parts(layout):
            encode(grad[segment.slice], owed[segment.slice], out[segment.slice], *self.grid,
                   self.norm, key, segment.start, packet[part])
        return self.capacity(layout)

    def decode_sum(self, payloads, out, layout, keys, weight=1.0):
        for packet in payloads:
            self.expect(packet, self.capacity(layout))
        decode_sum = kernels.of(out).block_decode_sum
        for segment, part in self._parts(layout):
            decode_sum([packet[part] for packet in payloads], *self.grid, weight,
                       out[segment.slice])

    def decode_add(self, packet, out, layout, key, weight=1.0):
        self.expect(packet, self.capacity(layout))
        decode_add = kernels.of(out).block_decode_add
        for segment, part in self._parts(layout):
            decode_add(packet[part], *self.grid, weight, out[segment.slice])


@register
@dataclass(frozen=True, repr=False)
class Block(BlockScaled):
    """Codes round(x / s) with a scale s = max |x| / L for each block of `size` elements.

    A block is that many neighbours of one tensor, the last one of a tensor may be shorter. L = 127
    with bits=8 and 7 with bits=4; zero is a level. form=fp8: s = max |x| / 448, and x / s as the
    8-bit float e4m3, half to even. The scale is bfloat16, rounded up: 16 / size bits an element,
    and no code exceeds L.

    round=nearest: no element is further from its code than from 0, so that a residual stays
    bounded. round=random: the two nearest codes at random, unbiased.

    Source: block-scaled integers as in the qgZ of ZeRO++ (Wang et al., arXiv 2306.10209); e4m3 of
    Micikevicius et al., arXiv 2209.05433. A bfloat16 scale that is rounded up is this package's.
    """

    name = "block"
    source = "Wang et al., arXiv 2306.10209; Micikevicius et al., arXiv 2209.05433"

    bits: int = option(8, "bits an element", choices=(8, 4))
    size: int = option(128, "elements that share a scale, a multiple of 32", least=32,
                       most=MOST_SIZE)
    form: str = option("int", "whole numbers, or 8-bit floats e4m3", choices=("int", "fp8"))
    round: str = option("nearest", "to the nearest code, or at random, unbiased",
                        choices=("nearest", "random"))

    def __post_init__(self):
        check_options(self)
        check_size(self.name, "size", self.size)
        if self.form == "fp8" and self.bits != 8:
            raise SpecError(f"block: bits={self.bits} found, form=fp8 has 8 bits: leave out bits, "
                            "or type form=int")

    @property
    def grid(self):
        levels = kernels.reference.BLOCK_E4M3 if self.form == "fp8" else 2**(self.bits - 1) - 1
        return self.size, self.form, levels

    @property
    def random(self):
        return self.round == "random"

    @property
    def feedback(self):
        """Nearest always; at random where the expected error is a contraction."""
        return not self.random or self.contracts


def check_size(owner, name, size) -> None:
    """SpecError unless `size` is a multiple of 32: vector instructions take 32 codes at a time."""
    if size % 32:
        raise SpecError(f"{owner}: {name}={size} found, {name} must be a multiple of 32, such as "
                        f"{max(32, size // 32 * 32)}")
