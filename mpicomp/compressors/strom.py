"""Strom: elements whose residual passed a threshold tau are sent as +-tau, 32 bits each."""

from dataclasses import dataclass

import numpy as np

from mpicomp import kernels
from mpicomp.compressors.base import Compressor, State
from mpicomp.compressors.options import check_options, option
from mpicomp.compressors.registry import register
from mpicomp.errors import PacketError, SpecError

MOST_ELEMENTS = 2**31


@register
@dataclass(frozen=True, repr=False)
class Strom(Compressor):
    """A word index << 1 | positive for every element beyond +-tau; at most one tau a step.

    tau has the unit of the gradient that is handed in (the local mean over the rank's examples,
    if the loss is a mean). The length depends on the data: that is the point.

    density=d adapts tau: in every step it is what a fraction d of the elements owed reaches (in a
    sample of 100,000, see `strom_tau`), the largest such value over all ranks, so that there is
    one tau as in the paper. It then travels, and the option tau has no say. The rule remembers
    nothing: there is no state to save, and a step that is taken back leaves no trace.

    coding=rice writes the distances from one index to the next, about log2(n / k) + 2.5 bits each
    where k of n are sent: within 0.2 bit of the entropy of random positions and signs for k up to
    n / 10. coding=2bit is the dense form of MXNet: two bits an element, whatever is sent.

    Made to be wrapped by Residual. Source: Strom, Interspeech 2015 (algorithm and 32-bit words);
    `strict` sends |r| > tau, as in the pseudo-code, else |r| >= tau as in LBANN and MXNet. A tau
    that follows the data is not the paper's; DL4J steers one in each node.
    """

    name = "strom"
    source = "Strom, Interspeech 2015"
    feedback = True
    coarse = True

    tau: float = option(0.01, "the threshold and the quantum, in units of the gradient",
                        least=1e-30, most=1e30)
    strict: bool = option(True, "send beyond tau only, not at tau itself")
    coding: str = option("words", "32-bit words, gaps between indices in Golomb-Rice code, or two "
                                  "bits for every element", choices=("words", "rice", "2bit"))
    remainder: str = option("auto", "rice: bits of a remainder (LBANN took 4, later 7), or auto: "
                                    "what suits the gaps of the packet")
    density: float = option(0.0, "set tau in each step so that about this fraction is sent; 0: "
                                 "tau is fixed", least=0, most=1)

    def __post_init__(self):
        check_options(self)
        if self.remainder != "auto" and not (self.remainder.isdecimal()
                                             and int(self.remainder) <= 31):
            raise SpecError(f"strom: remainder={self.remainder} found, remainder must be auto or "
                            "a whole number from 0 to 31")

    fixed = property(lambda self: self.coding == "2bit")

    def capacity(self, layout):
        """At most 4 * n bytes: uint32 words index << 1 | sign, ascending; index within the bucket.

        31 bits of index allow 2**31 elements in a bucket. rice: nothing, or uint32 parameter and
        a stream of bits in uint32 words (kernels/reference/rice.py says which), at most 4 bits an
        element because dense messages have short gaps; with a remainder of k bits at most
        1 + k + 3 / 2**k. 2bit: always 4 bytes for every 16 elements begun. density: float32 tau
        before that.
        """
        n = layout.size
        if n > MOST_ELEMENTS:
            raise ValueError(f"strom: {n} elements found in one bucket, an index has 31 bits: "
                             f"make bucket_bytes less than {4 * MOST_ELEMENTS}")
        if self.coding == "2bit":
            return self._head + 4 * -(-n // 16)
        if self.coding == "rice":
            k = 0 if self.remainder == "auto" else int(self.remainder)
            return self._head + (4 + 4 * -(-(n * (1 + k) + (3 * n >> k)) // 32) if n else 0)
        return self._head + 4 * n

    @property
    def _head(self):
        """The bytes of tau in a payload."""
        return 4 if self.density else 0

    def shared_bytes(self, layout):
        return self._head

    def init(self, layout, like):
        return State(tau=kernels.of(like).zeros(1))

    def measure(self, x, layout, state):
        """float32[1]: the tau that suits this rank; None where tau is fixed."""
        if not self.density:
            return None
        state.tau[0] = kernels.of(x).strom_tau(x, self.density)
        return state.tau

    def _begin(self, packet, state):
        """(tau, where the codes go); nothing is beyond an infinite tau."""
        if not self.density:
            return self.tau, packet
        packet[:4].view("float32")[:] = state.tau
        return float(state.tau[0]) or float("inf"), packet[4:]

    def encode(self, x, packet, layout, key, state):
        tau, room = self._begin(packet, state)
        k = kernels.of(x)
        if self.coding == "rice" and self.remainder != "auto":
            used = k.strom_rice_encode(x, tau, self.strict, room, int(self.remainder))
        else:
            encode = {"words": k.strom_encode, "rice": k.strom_rice_encode,
                      "2bit": k.strom_2bit_encode}[self.coding]
            used = encode(x, tau, self.strict, room[:self.capacity(layout) - self._head])
        return self._head + used

    def encode_owed(self, grad, owed, packet, layout, key, state, out=None):
        if self.coding != "words":
            return super().encode_owed(grad, owed, packet, layout, key, state, out)
        tau, room = self._begin(packet, state)
        return self._head + kernels.of(grad).strom_encode_owed(
            grad, owed, owed if out is None else out, tau, self.strict, room)

    def _read(self, packet, layout):
        """(tau, codes) of a payload."""
        tau, codes = self.tau, packet
        if self.density:
            if len(packet) < 4:
                raise PacketError(f"strom: tau in 4 bytes expected, found {len(packet)} bytes")
            tau, codes = np.float32(float(packet[:4].view("float32")[0])), packet[4:]
            if not 0 <= tau < float("inf"):
                raise PacketError(f"strom: tau = {tau} found in the payload, tau must be finite")
        if self.fixed:
            self.expect(packet, self.capacity(layout))
        elif len(codes) % 4:
            raise PacketError(f"strom: a payload of whole 32-bit words expected, "
                              f"found {len(packet)} bytes")
        return tau, codes

    can_split = property(lambda self: self.coding == "words")

    def split(self, packet, layout, borders):
        words, head, parts = packet.view("uint32"), self._head // 4, []
        ends = head + (words[head:] >> 1).searchsorted(borders)
        for border, a, b in zip(borders, ends, ends[1:]):
            part = kernels.of(packet).zeros(head + b - a, "uint32")
            part[:head] = words[:head]
            part[head:] = words[a:b] - (border << 1)
            parts.append(part.view("uint8"))
        return parts

    def decode_sum(self, payloads, out, layout, keys, weight=1.0):
        if self.coding == "words":
            read = [self._read(packet, layout) for packet in payloads]
            if len({float(tau) for tau, _ in read}) == 1:
                return kernels.of(out).strom_decode_sum([codes for _, codes in read], read[0][0],
                                                        weight, out)
        return super().decode_sum(payloads, out, layout, keys, weight)

    def decode_add(self, packet, out, layout, key, weight=1.0):
        tau, codes = self._read(packet, layout)
        k = kernels.of(out)
        decode_add = {"words": k.strom_decode_add, "rice": k.strom_rice_decode_add,
                      "2bit": k.strom_2bit_decode_add}[self.coding]
        decode_add(codes, tau, weight, out)
