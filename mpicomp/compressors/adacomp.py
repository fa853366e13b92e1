"""AdaComp: each bin of a layer sends the elements that grew to its maximum, as +-one scale."""

from dataclasses import dataclass

from mpicomp import kernels
from mpicomp.compressors.base import Compressor
from mpicomp.compressors.options import check_options, option
from mpicomp.compressors.registry import register
from mpicomp.errors import PacketError, SpecError

MOST = 2**14  # elements in a bin: the index in a 16-bit entry has 14 bits


@register
@dataclass(frozen=True, repr=False)
class AdaComp(Compressor):
    """Sends sgn(G) * scale where |H| >= the largest |G| of the bin; the rest stays owed.

    G = residue + dW is what is owed with the newest gradient, H = G + (factor - 1) * dW looks
    ahead ("soft threshold": factor 2 counts the newest gradient twice), scale is the mean over
    the layer's bins of max |G|. Quiet bins send nothing, busy ones more: the rate adapts. Nothing
    is sent from a bin of zeros, nor where G = 0.

    The selection needs dW beside G, which only `encode_owed` sees. `encode` alone takes what it is
    given for a fresh gradient with nothing owed: G = x, H = factor * x.

    Made to be wrapped by Residual. Source: Chen, Choi, Brand, Agrawal, Zhang, Gopalakrishnan,
    AAAI 2018 (arXiv 1712.02679); bins of 50 for convolutions and 500 for everything else.
    """

    name = "adacomp"
    source = "Chen et al., AAAI 2018"
    fixed = False
    feedback = True
    coarse = True

    bin: str = option("auto", "elements in a bin: a number, or auto: 50 for convolutions (more "
                              "than 2 dimensions), 500 for others")
    factor: float = option(2.0, "how much the newest gradient counts in the selection", least=1)

    def __post_init__(self):
        check_options(self)
        if self.bin != "auto" and not (self.bin.isdecimal() and 0 < int(self.bin) <= MOST):
            raise SpecError(f"adacomp: bin={self.bin} found, bin must be auto or a whole number "
                            f"from 1 to {MOST}")

    def bin_size(self, segment) -> int:
        """The elements in a bin of this tensor."""
        if self.bin == "auto":
            return 50 if len(segment.shape) > 2 else 500
        return int(self.bin)

    def _layers(self, layout):
        """(number, segment, bin, bytes of an entry): 16-bit entries first, so that they align."""
        layers = [(i, s, self.bin_size(s)) for i, s in enumerate(layout.segments)]
        layers = [(*layer, kernels.reference.adacomp_width(layer[2])) for layer in layers]
        return sorted(layers, key=lambda layer: -layer[3])

    def capacity(self, layout):
        """float32 scale[layers], uint32 entries[layers], then each layer's entries.

        An entry takes 1 byte in bins of up to 64 elements, else 2; layers with 2-byte entries come
        first. It is field << 2 | last << 1 | positive: the place in the bin, whether it is the
        last one sent from this bin, and the sign. last = 0 and field >= bin - 1, where nothing
        could follow, mean field - bin + 2 bins without any. A layer has as many entries as elements
        sent and runs of empty bins (before the last entry; an entry holds runs of up to
        64 - (bin - 1) or 16384 - (bin - 1)), at most as many as elements.
        """
        return 8 * len(layout.segments) + sum(segment.size * width
                                              for _, segment, _, width in self._layers(layout))

    def encode(self, x, packet, layout, key, state):
        return kernels.of(x).adacomp_encode_layers(x, None, None, self.factor,
                                                   self._layers(layout), packet)

    def encode_owed(self, grad, owed, packet, layout, key, state, out=None):
        return kernels.of(grad).adacomp_encode_layers(grad, owed, owed if out is None else out,
                                                      self.factor, self._layers(layout), packet)

    def _read(self, payloads, layout, k):
        """(slice, bin, entries in each payload, scale in each payload) of every layer, in order.

        The entries stay where they are; heads on a device are read back with one copy for all.
        """
        layers, head = self._layers(layout), 8 * len(layout.segments)
        heads = k.adacomp_heads(payloads, head)
        read = [(segment.slice, size, [], []) for _, segment, size, _ in layers]
        for packet, front in zip(payloads, heads):
            if len(packet) < head:
                raise PacketError(f"adacomp: {head} bytes of scales and counts expected, found "
                                  f"{len(packet)}")
            own, counts = front[:head // 2].view("float32"), front[head // 2:].view("uint32")
            self.expect_finite(own)
            used = head
            for (i, _, _, width), (_, _, entries, scales) in zip(layers, read):
                stop = used + width * int(counts[i])
                entries.append(packet[used:stop])
                scales.append(own[i])
                used = stop
            self.expect(packet, used)
        return read

    def decode_add(self, packet, out, layout, key, weight=1.0):
        k = kernels.of(out)
        k.adacomp_decode_layers(self._read([packet], layout, k), weight, out)

    def decode_sum(self, payloads, out, layout, keys, weight=1.0):
        k = kernels.of(out)
        k.adacomp_decode_sum(self._read(payloads, layout, k), weight, out)
