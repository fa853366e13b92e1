"""Float16 and BFloat16: every element rounded to 16 bits."""

from dataclasses import dataclass

from mpicomp import kernels
from mpicomp.compressors.base import Compressor
from mpicomp.compressors.registry import register


class _Cast(Compressor):
    """16 bits an element, rounded to nearest even; finite values stay finite (they saturate)."""

    feedback = True

    def capacity(self, layout):
        """2 * n bytes: one 16-bit float an element, little endian."""
        return 2 * layout.size

    def encode(self, x, packet, layout, key, state):
        used = self.capacity(layout)
        kernels.of(x).cast_encode(x, self.summable, packet[:used])
        return used

    def decode_sum(self, payloads, out, layout, keys, weight=1.0):
        for packet in payloads:
            self.expect(packet, self.capacity(layout))
        kernels.of(out).cast_decode_sum(payloads, self.summable, weight, out)

    def decode_add(self, packet, out, layout, key, weight=1.0):
        self.expect(packet, self.capacity(layout))
        kernels.of(out).cast_decode_add(packet, self.summable, weight, out)


@register
@dataclass(frozen=True, repr=False)
class Float16(_Cast):
    """IEEE half precision: 11 significant bits, saturating at +-65504, subnormal below 6e-5."""

    name = "fp16"
    summable = "float16"


@register
@dataclass(frozen=True, repr=False)
class BFloat16(_Cast):
    """The upper half of a float32: its range, 8 significant bits."""

    name = "bf16"
    summable = "bfloat16"
