"""DoReFa: each element becomes one of 2**k levels between -m and m at random, unbiased."""

from dataclasses import dataclass

from mpicomp import kernels
from mpicomp.compressors.base import Compressor, State
from mpicomp.compressors.options import check_options, option
from mpicomp.compressors.registry import register
from mpicomp.errors import SpecError

PACKINGS = ("bits", "int8", "int16", "int32")
_LARGEST_CODE = {"int8": 2**7 - 1, "int16": 2**15 - 1, "int32": 2**31 - 1}


@register
@dataclass(frozen=True, repr=False)
class DoReFa(Compressor):
    """Codes q = round(n (g / 2m + 1/2) + u), u uniform in +-1/2; they mean 2m (q / n - 1/2).

    n = 2**bits - 1 steps of 2m / n, m the largest magnitude of the tensor. n is odd, so zero is
    not a level: a gradient of zero is said as +-m / n. With scale=shared, m is the largest over
    all ranks and MPI may add the codes as integers (packing=int8, int16, int32).

    The paper quantises what flows back through the layers of one network, a scale for each
    sample, and exchanges nothing. A parameter's gradient has no samples, so the scale is that of
    the tensor; to send it between ranks is this package's use of f_gamma.
    Source: Zhou, Wu, Ni, Zhou, Wen, Zou, arXiv 1606.06160, the quantiser f_gamma of gradients.
    """

    name = "dorefa"
    source = "Zhou et al., arXiv 1606.06160"
    unbiased = True

    bits: int = option(4, "bits an element", least=1, most=8)
    scale: str = option("shared", "whose largest magnitude: of all ranks, or this rank's own",
                        choices=("shared", "own"))
    packing: str = option("bits", "how codes lie in bytes", choices=PACKINGS)

    def __post_init__(self):
        check_options(self)
        if self.packing == "int8" and self.bits == 8:
            raise SpecError("dorefa: bits=8 has codes from -255 to 255, packing=int8 ends at 127: "
                            "use packing=int16")

    @property
    def feedback(self):
        """An error is less than a step 2m / n: a contraction from 2 bits (n = 3) on."""
        return self.bits >= 2

    @property
    def summable(self):
        return self.packing if self.packing != "bits" and self.scale == "shared" else None

    @property
    def most_ranks(self):
        return _LARGEST_CODE[self.packing] // (2**self.bits - 1) if self.summable else None

    def shared_bytes(self, layout):
        return 4 * len(layout.segments) if self.scale == "shared" else 0

    def capacity(self, layout):
        """float32 m[tensors], then each tensor's codes, every tensor from a whole byte on.

        bits: ceil(n * bits / 8) bytes a tensor, code after code, lowest bit first. int8, int16,
        int32: 2 q - n in 1, 2, 4 bytes an element.
        """
        return 4 * len(layout.segments) + sum(
            kernels.reference.dorefa_size(s.size, self.bits, self.packing) for s in layout.segments)

    def init(self, layout, like):
        return State(scale=kernels.of(like).zeros(len(layout.segments)))

    def measure(self, x, layout, state):
        """float32[tensors]: the largest magnitude of each; None with scale=own."""
        if self.scale == "own":
            return None
        self._scales(x, layout, state.scale)
        return state.scale

    def _scales(self, x, layout, scales):
        scale_of = kernels.of(x).dorefa_scale
        for i, segment in enumerate(layout.segments):
            scales[i] = scale_of(x[segment.slice])

    def _parts(self, layout):
        """(number, segment, slice of the payload) of each tensor."""
        at = 4 * len(layout.segments)
        for i, segment in enumerate(layout.segments):
            size = kernels.reference.dorefa_size(segment.size, self.bits, self.packing)
            yield i, segment, slice(at, at + size)
            at += size

    def encode(self, x, packet, layout, key, state):
        scales = packet[:4 * len(layout.segments)].view("float32")
        if self.scale == "own":
            self._scales(x, layout, scales)
        else:
            scales[:] = state.scale
        encode = kernels.of(x).dorefa_encode
        for i, segment, part in self._parts(layout):
            encode(x[segment.slice], scales[i], self.bits, self.packing, key, segment.start,
                   packet[part])
        return self.capacity(layout)

    def encode_owed(self, grad, owed, packet, layout, key, state, out=None):
        if self.scale == "own":
            return super().encode_owed(grad, owed, packet, layout, key, state, out)
        encode_owed, out = kernels.of(grad).dorefa_encode_owed, owed if out is None else out
        packet[:self.shared_bytes(layout)].view("float32")[:] = state.scale
        for i, segment, part in self._parts(layout):
            encode_owed(grad[segment.slice], owed[segment.slice], out[segment.slice],
                        state.scale[i], self.bits, self.packing, key, segment.start, packet[part])
        return self.capacity(layout)

    def _magnitudes(self, packet, layout):
        """The scale of each tensor from a payload."""
        self.expect(packet, self.capacity(layout))
        scales = packet[:4 * len(layout.segments)].view("float32")
        self.expect_finite(scales)
        return scales

    def decode_sum(self, payloads, out, layout, keys, weight=1.0):
        decode_sum = kernels.of(out).dorefa_decode_sum
        scales = [self._magnitudes(packet, layout) for packet in payloads]
        for i, segment, part in self._parts(layout):
            decode_sum([packet[part] for packet in payloads], [scale[i] for scale in scales],
                       self.bits, self.packing, weight, out[segment.slice])

    def decode_add(self, packet, out, layout, key, weight=1.0):
        decode_add, scales = kernels.of(out).dorefa_decode_add, self._magnitudes(packet, layout)
        for i, segment, part in self._parts(layout):
            decode_add(packet[part], scales[i], self.bits, self.packing, weight,
                       out[segment.slice])
