"""Dense: the gradient itself, 32 bits an element; the baseline of every comparison."""

from dataclasses import dataclass

from mpicomp import kernels
from mpicomp.compressors.base import Compressor
from mpicomp.compressors.registry import register


@register
@dataclass(frozen=True, repr=False)
class Dense(Compressor):
    """The identity. MPI may add its payloads, which are float32."""

    name = "dense"
    feedback = True
    unbiased = True
    summable = "float32"

    def capacity(self, layout):
        """4 * n bytes: float32[n], little endian."""
        return 4 * layout.size

    def alias(self, x):
        return x.view("uint8")

    def encode(self, x, packet, layout, key, state):
        used = self.capacity(layout)
        packet[:used] = x.view(packet.dtype)
        return used

    def decode_sum(self, payloads, out, layout, keys, weight=1.0):
        for packet in payloads:
            self.expect(packet, self.capacity(layout))
        kernels.of(out).dense_decode_sum(payloads, weight, out)

    def decode_add(self, packet, out, layout, key, weight=1.0):
        self.expect(packet, self.capacity(layout))
        kernels.of(out).dense_decode_add(packet, weight, out)
