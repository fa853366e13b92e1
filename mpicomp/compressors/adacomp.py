"""AdaComp: each bin of a layer sends the elements that grew to its maximum, as +-one scale."""

from dataclasses import dataclass

from mpicomp import kernels
from mpicomp.compressors.base import Compressor
from mpicomp.compressors.options import check_options, option
from mpicomp.errors import PacketError, SpecError

MOST = 2**14  # elements in a bin: the index in a 16-bit entry has 14 bits


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
        k = kernels.of(x)
        whole = getattr(k, "adacomp_encode_layers", None)
        if whole is not None:
            return whole(x, None, None, self.factor, self._layers(layout), packet)
        return self._encode(packet, layout, lambda at, size, room: k.adacomp_encode(
            x[at], x[at], self.factor, size, room))

    def encode_owed(self, grad, owed, packet, layout, key, state, out=None):
        out, k = owed if out is None else out, kernels.of(grad)
        whole = getattr(k, "adacomp_encode_layers", None)
        if whole is not None:
            return whole(grad, owed, out, self.factor, self._layers(layout), packet)
        fused = getattr(k, "adacomp_encode_owed", None)
        if fused is not None:
            used = self._encode(packet, layout, lambda at, size, room: fused(
                grad[at], owed[at], out[at], self.factor, size, room))
            self.expect_finite(packet[:4 * len(layout.segments)].view("float32"))
            return used
        if out is not owed:
            out[...] = owed
        out += grad
        used = self._encode(packet, layout, lambda at, size, room: k.adacomp_encode(
            out[at], grad[at], self.factor, size, room))
        self.decode_add(packet[:used], out, layout, key, -1.0)  # residue = G - Gq
        return used

    def _encode(self, packet, layout, encode):
        """Fill the packet with what encode(slice, bin, room) writes of each layer."""
        head, used = 4 * len(layout.segments), 8 * len(layout.segments)
        scales = packet[:head].view("float32")
        counts = packet[head:used].view("uint32")
        for i, segment, size, width in self._layers(layout):
            room = packet[used:used + width * segment.size]
            counts[i], scales[i] = encode(segment.slice, size, room)
            used += width * int(counts[i])
        return used

    def _read(self, payloads, layout, k):
        """(slice, bin, entries in each payload, scale in each payload) of every layer, in order.

        The entries stay where they are; heads on a device are read back with one copy for all.
        """
        layers, head = self._layers(layout), 8 * len(layout.segments)
        fetch = getattr(k, "adacomp_heads", None)
        heads = fetch(payloads, head) if fetch else [packet[:head] for packet in payloads]
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
        whole = getattr(k, "adacomp_decode_layers", None)
        read = self._read([packet], layout, k)
        if whole is not None:
            whole(read, weight, out)
            return
        for at, size, (entries,), (scale,) in read:
            k.adacomp_decode_add(entries, scale, size, weight, out[at])

    def decode_sum(self, payloads, out, layout, keys, weight=1.0):
        k = kernels.of(out)
        fused = getattr(k, "adacomp_decode_sum", None)
        if fused is None:
            return super().decode_sum(payloads, out, layout, keys, weight)
        fused(self._read(payloads, layout, k), weight, out)
