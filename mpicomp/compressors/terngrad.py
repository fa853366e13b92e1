"""TernGrad: each element becomes -s, 0 or +s at random, unbiased, with one scaler s a layer."""

from dataclasses import dataclass

from mpicomp import kernels
from mpicomp.compressor import Compressor, State, check_options, option
from mpicomp.errors import PacketError

LARGEST = 3.4e38
PACKINGS = ("2bit", "planar", "int8", "int16")


@dataclass(frozen=True, repr=False)
class TernGrad(Compressor):
    """Ternary codes s * sgn(g) * b, P(b = 1) = |g| / s, after clipping at `clip` sigma.

    Layer-wise: each tensor has its own clip level (from its own rank's gradient) and one scaler
    s = max over ranks of max |clipped g|. With one scaler for all, codes may be added as integers
    (packing=int8 up to 127 ranks, int16 up to 32767), which is what exchange=allreduce does.

    Source: Wen, Xu, Yan, Wu, Wang, Chen, Li, NIPS 2017 (arXiv 1705.07878), equations 1-4,
    Algorithm 1; the packing "planar" is that of the authors' code.
    """

    name = "terngrad"
    source = "Wen et al., NIPS 2017"

    clip: float = option(2.5, "clip at this many standard deviations of the layer; 0 = never",
                         least=0)
    packing: str = option("2bit", "how codes lie in bytes", choices=PACKINGS)

    def __post_init__(self):
        check_options(self)

    @property
    def unbiased(self):
        return self.clip == 0

    @property
    def summable(self):
        return self.packing if self.packing in ("int8", "int16") else None

    @property
    def most_ranks(self):
        return {"int8": 127, "int16": 32767}.get(self.packing)

    def shared_bytes(self, layout):
        return 4 * len(layout.segments)

    def capacity(self, layout):
        """float32 scale[layers], then each layer's codes, every layer from a whole byte on.

        2bit: ceil(n/4) bytes a layer; planar: n//4 + 1 (nothing if n = 0); int8: n; int16: 2n.
        """
        return self.shared_bytes(layout) + sum(
            kernels.reference.ternary_size(s.size, self.packing) for s in layout.segments)

    def init(self, layout, like):
        zeros = kernels.of(like).zeros
        return State(level=zeros(len(layout.segments)), scale=zeros(len(layout.segments)))

    def measure(self, x, layout, state):
        """float32[layers]: the largest magnitude of each layer after clipping."""
        scale_of = kernels.of(x).ternary_scale
        for i, segment in enumerate(layout.segments):
            state.level[i], state.scale[i] = scale_of(x[segment.slice], self.clip)
        return state.scale

    def _parts(self, layout):
        """(number, segment, slice of the payload) of each layer."""
        at = self.shared_bytes(layout)
        for i, segment in enumerate(layout.segments):
            size = kernels.reference.ternary_size(segment.size, self.packing)
            yield i, segment, slice(at, at + size)
            at += size

    def encode(self, x, packet, layout, key, state):
        encode = kernels.of(x).ternary_encode
        head = self.shared_bytes(layout)
        packet[:head] = state.scale.view(packet.dtype)
        for i, segment, part in self._parts(layout):
            encode(x[segment.slice], state.level[i], state.scale[i], key, segment.start,
                   self.packing, packet[part])
        return self.capacity(layout)

    def decode_add(self, packet, out, layout, key, weight=1.0):
        self.expect(packet, self.capacity(layout))
        decode_add = kernels.of(out).ternary_decode_add
        scale = packet[:self.shared_bytes(layout)].view("float32")
        most = LARGEST / (self.most_ranks or 1)  # a sum of codes must stay finite
        if scale.size and not (0 <= scale.min() and scale.max() <= most):
            raise PacketError(f"{self.name}: scales from 0 to {most:.3g} expected, "
                              f"found {scale.min()} to {scale.max()}")
        for i, segment, part in self._parts(layout):
            decode_add(packet[part], scale[i], self.packing, weight, out[segment.slice])
