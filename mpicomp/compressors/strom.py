"""Strom: elements whose residual passed a threshold tau are sent as +-tau, 32 bits each."""

from dataclasses import dataclass

from mpicomp import kernels
from mpicomp.compressor import Compressor, check_options, option
from mpicomp.errors import PacketError

MOST_ELEMENTS = 2**31


@dataclass(frozen=True, repr=False)
class Strom(Compressor):
    """A word index << 1 | positive for every element beyond +-tau; at most one tau a step.

    tau has the unit of the gradient that is handed in (the local mean over the rank's examples,
    if the loss is a mean). The length depends on the data: that is the point.

    Made to be wrapped by Residual. Source: Strom, Interspeech 2015 (algorithm and 32-bit words);
    `strict` sends |r| > tau, as in the pseudo-code, else |r| >= tau as in LBANN and MXNet.
    coding=rice writes the distances from one index to the next, about log2(n / k) + 2.5 bits each
    where k of n are sent: within 0.2 bit of the entropy of random positions and signs for k up to
    n / 10.
    """

    name = "strom"
    source = "Strom, Interspeech 2015"
    fixed = False
    feedback = True

    tau: float = option(0.01, "the threshold and the quantum, in units of the gradient",
                        least=1e-30, most=1e30)
    strict: bool = option(True, "send beyond tau only, not at tau itself")
    coding: str = option("words", "32-bit words, or gaps between indices in Golomb-Rice code",
                         choices=("words", "rice"))

    def __post_init__(self):
        check_options(self)

    def capacity(self, layout):
        """At most 4 * n bytes: uint32 words index << 1 | sign, ascending; index within the bucket.

        31 bits of index allow 2**31 elements in a bucket. rice: nothing, or uint32 parameter and
        a stream of bits in uint32 words (kernels/reference/rice.py says which), at most 4 bits an
        element because dense messages have short gaps.
        """
        if layout.size > MOST_ELEMENTS:
            raise ValueError(f"strom: {layout.size} elements found in one bucket, an index has 31 "
                             f"bits: make bucket_bytes less than {4 * MOST_ELEMENTS}")
        if self.coding == "rice":
            return 4 + 4 * -(-layout.size // 8) if layout.size else 0
        return 4 * layout.size

    def encode(self, x, packet, layout, key, state):
        k = kernels.of(x)
        encode = k.strom_rice_encode if self.coding == "rice" else k.strom_encode
        return encode(x, self.tau, self.strict, packet)

    def encode_owed(self, grad, owed, packet, layout, key, state, out=None):
        fused = getattr(kernels.of(grad), "strom_encode_owed", None)
        if fused is None or self.coding == "rice":
            return super().encode_owed(grad, owed, packet, layout, key, state, out)
        return fused(grad, owed, owed if out is None else out, self.tau, self.strict, packet)

    def decode_sum(self, payloads, out, layout, keys, weight=1.0):
        fused = getattr(kernels.of(out), "strom_decode_sum", None)
        if fused is None or self.coding == "rice" or any(len(p) % 4 for p in payloads):
            return super().decode_sum(payloads, out, layout, keys, weight)
        fused(payloads, self.tau, weight, out)

    def decode_add(self, packet, out, layout, key, weight=1.0):
        if len(packet) % 4:
            raise PacketError(f"strom: a payload of whole 32-bit words expected, "
                              f"found {len(packet)} bytes")
        k = kernels.of(out)
        decode_add = k.strom_rice_decode_add if self.coding == "rice" else k.strom_decode_add
        decode_add(packet, self.tau, weight, out)
