"""TernGrad: each element becomes -s, 0 or +s at random, unbiased, with one scaler s a layer."""

from dataclasses import dataclass

from mpicomp import kernels
from mpicomp.compressors.base import Compressor, State
from mpicomp.compressors.options import check_options, option
from mpicomp.compressors.registry import register
from mpicomp.errors import PacketError

MOST_SCALE = 3.4e38  # close to the largest float32
PACKINGS = ("2bit", "planar", "5trit", "int8", "int16")


@register
@dataclass(frozen=True, repr=False)
class TernGrad(Compressor):
    """Ternary codes s * sgn(g) * b, P(b = 1) = |g| / s, after clipping at `clip` sigma.

    Layer-wise: each tensor has its own clip level (from its own rank's gradient) and one scaler
    s = max over ranks of max |clipped g|. With one scaler for all, codes may be added as integers
    (packing=int8 up to 127 ranks, int16 up to 32767), which is what exchange=allreduce does.

    scaler=code is what the authors' code does: a rank's scaler is clip * sigma, whatever its
    largest magnitude, and clipping happens at the scaler that is shared. share=no leaves each rank
    its own scaler, as GRACE does: one round less, and codes that nobody can add.

    Source: Wen, Xu, Yan, Wu, Wang, Chen, Li, NIPS 2017 (arXiv 1705.07878), equations 1-4,
    Algorithm 1; the packing "planar" is that of the authors' code.
    """

    name = "terngrad"
    source = "Wen et al., NIPS 2017"

    clip: float = option(2.5, "clip at this many standard deviations of the layer; 0 = never",
                         least=0)
    packing: str = option("2bit", "how codes lie in bytes", choices=PACKINGS)
    scaler: str = option("paper", "a rank's scaler: its largest magnitude after clipping, or "
                                  "clip * sigma", choices=("paper", "code"))
    share: bool = option(True, "one scaler for all ranks, the largest of theirs")

    def __post_init__(self):
        check_options(self)

    @property
    def unbiased(self):
        return self.clip == 0

    @property
    def summable(self):
        return self.packing if self.packing in ("int8", "int16") and self.share else None

    @property
    def most_ranks(self):
        return {"int8": 127, "int16": 32767}.get(self.packing) if self.share else None

    def shared_bytes(self, layout):
        return 4 * len(layout.segments) if self.share else 0

    def capacity(self, layout):
        """float32 scale[layers], then each layer's codes, every layer from a whole byte on.

        2bit: ceil(n/4) bytes a layer; planar: n//4 + 1 (nothing if n = 0); 5trit: ceil(n/5), 1.6
        bits an element; int8: n; int16: 2n.
        """
        return 4 * len(layout.segments) + sum(
            kernels.reference.terngrad_size(s.size, self.packing) for s in layout.segments)

    def init(self, layout, like):
        zeros = kernels.of(like).zeros
        return State(level=zeros(len(layout.segments)), scale=zeros(len(layout.segments)))

    def measure(self, x, layout, state):
        """float32[layers]: the scaler of each layer; None with share=no."""
        if not self.share:
            return None
        self._scale(x, layout, state.level, state.scale)
        return state.scale

    def _scale(self, x, layout, level, scale):
        k = kernels.of(x)
        scale_of = k.terngrad_scale if self.scaler == "paper" else k.terngrad_scale_code
        for i, segment in enumerate(layout.segments):
            level[i], scale[i] = scale_of(x[segment.slice], self.clip)

    def _parts(self, layout):
        """(number, segment, slice of the payload) of each layer."""
        at = 4 * len(layout.segments)
        for i, segment in enumerate(layout.segments):
            size = kernels.reference.terngrad_size(segment.size, self.packing)
            yield i, segment, slice(at, at + size)
            at += size

    def encode(self, x, packet, layout, key, state):
        k, level = kernels.of(x), state.level
        scale = packet[:4 * len(layout.segments)].view("float32")
        if self.share:
            scale[:] = state.scale
        else:
            level = k.zeros(scale.size)
            self._scale(x, layout, level, scale)
        for i, segment, part in self._parts(layout):
            values = x[segment.slice]
            if self.packing == "5trit":
                k.terngrad_encode_5trit(values, level[i], scale[i], key, segment.start,
                                        packet[part])
            else:
                k.terngrad_encode(values, level[i], scale[i], key, segment.start, self.packing,
                                  packet[part])
        return self.capacity(layout)

    def _scalers(self, packet, layout):
        """The scalers of all layers from a payload; PacketError where they cannot be right."""
        self.expect(packet, self.capacity(layout))
        scale = packet[:4 * len(layout.segments)].view("float32")
        most = MOST_SCALE / (self.most_ranks or 1)  # a sum of codes must stay finite

        def complain(scale):
            raise PacketError(f"{self.name}: scales from 0 to {most:.3g} expected, "
                              f"found {scale.min()} to {scale.max()}")

        kernels.of(scale).within(scale, 0.0, most, complain)
        return scale

    def decode_sum(self, payloads, out, layout, keys, weight=1.0):
        if self.packing == "5trit":
            return super().decode_sum(payloads, out, layout, keys, weight)
        decode_sum = kernels.of(out).terngrad_decode_sum
        scales = [self._scalers(packet, layout) for packet in payloads]
        for i, segment, part in self._parts(layout):
            decode_sum([packet[part] for packet in payloads], [scale[i] for scale in scales],
                       self.packing, weight, out[segment.slice])

    def decode_add(self, packet, out, layout, key, weight=1.0):
        k, scale = kernels.of(out), self._scalers(packet, layout)
        for i, segment, part in self._parts(layout):
            if self.packing == "5trit":
                k.terngrad_decode_add_5trit(packet[part], scale[i], weight, out[segment.slice])
            else:
                k.terngrad_decode_add(packet[part], scale[i], self.packing, weight,
                                      out[segment.slice])
