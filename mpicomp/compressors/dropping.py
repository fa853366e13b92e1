"""Dropping: only the largest elements are sent, in full; the sparse exchange of Aji & Heafield."""

from dataclasses import dataclass

import numpy as np

from mpicomp import kernels
from mpicomp.compressors.base import Compressor
from mpicomp.compressors.options import check_options, option
from mpicomp.compressors.registry import register
from mpicomp.errors import PacketError, SpecError

MOST_ELEMENTS = 2**31


@register
@dataclass(frozen=True, repr=False)
class Dropping(Compressor):
    """(index, value) of every |v| > cut, where a fraction `rate` of the magnitudes is <= cut.

    One cut for both signs, and one for the whole bucket: with one bucket (bucket_bytes larger than
    the model) that is the paper's global threshold. scope=layer gives each tensor its own. The
    cut comes from `sample` elements spread over all, or from all of them.

    The test is strict, so of equal magnitudes at the cut none is sent; where all magnitudes are
    equal nothing is sent at all, and error feedback brings them up later. A value that was sent
    leaves a residual of exactly 0. survivors=onebit sends signs, with the means of the negative
    and of the positive survivors of each scope.

    Made to be wrapped by Residual. Source: Aji, Heafield, EMNLP 2017 (arXiv 1704.05021); the
    index of the cut and the sample are those of the first author's code (Marian).
    """

    name = "dropping"
    source = "Aji & Heafield, EMNLP 2017"
    fixed = False
    feedback = True
    coarse = True

    rate: float = option(0.99, "the fraction that is dropped", least=0)
    scope: str = option("bucket", "what has one threshold", choices=("bucket", "layer"))
    sample: str = option("100000", "how many magnitudes the threshold is taken from, or exact, or "
                                   "marian: 100,000 at the stride that Marian takes")
    cut: str = option("marian", "which of the sorted magnitudes is the cut: the last one dropped, "
                                "or the next one (Marian from February to June 2017)",
                      choices=("marian", "marian-feb2017"))
    survivors: str = option("value", "how survivors are sent: float32, or a sign and two means",
                            choices=("value", "onebit"))

    def __post_init__(self):
        check_options(self)
        if not np.float32(self.rate) < 1:
            raise SpecError(f"dropping: rate={self.rate} found, rate must be less than 1 (at 1 "
                            "nothing is ever sent)")
        if self.sample not in ("exact", "marian") and not (self.sample.isdecimal()
                                                           and int(self.sample) > 0):
            raise SpecError(f"dropping: sample={self.sample} found, sample must be exact, marian "
                            "or a whole number above 0")

    def _scopes(self, layout):
        """(start, stop) of everything that has a threshold of its own."""
        if self.scope == "bucket":
            return [(0, layout.size)]
        return [(s.start, s.stop) for s in layout.segments]

    def capacity(self, layout):
        """At most 8 * n bytes: int32 index[count], then float32 value[count]; index in the bucket.

        survivors=onebit: float32 mean[scopes][2], of the negative and of the positive survivors,
        then uint32 words index << 1 | positive: at most 8 * scopes + 4 * n bytes. Indices ascend.
        """
        if layout.size > MOST_ELEMENTS:
            raise ValueError(f"dropping: {layout.size} elements found in one bucket, an index has "
                             f"31 bits: make bucket_bytes less than {4 * MOST_ELEMENTS}")
        if self.survivors == "value":
            return 8 * layout.size
        return 8 * len(self._scopes(layout)) + 4 * layout.size

    def _sample(self):
        named = {"exact": 0, "marian": kernels.reference.MARIAN}
        return named[self.sample] if self.sample in named else int(self.sample)

    def encode(self, x, packet, layout, key, state):
        k, scopes, first_version = kernels.of(x), self._scopes(layout), self.cut == "marian-feb2017"
        if self.survivors == "onebit":
            return k.dropping_signs_encode(x, scopes, self.rate, self._sample(), first_version,
                                           packet)
        count, room = 0, self.capacity(layout)
        for start, stop in scopes:
            part = x[start:stop]
            cut = k.dropping_cut(part, self.rate, self._sample(), first_version)
            count += k.dropping_select(part, cut, start, packet[4 * count:room])
        k.dropping_values(x, count, packet)
        return 8 * count

    def encode_owed(self, grad, owed, packet, layout, key, state, out=None):
        if (self.survivors, self.cut) != ("value", "marian"):
            return super().encode_owed(grad, owed, packet, layout, key, state, out)
        return kernels.of(grad).dropping_encode_owed(
            grad, owed, owed if out is None else out, self._scopes(layout), self.rate,
            self._sample(), packet)

    can_split = property(lambda self: self.survivors == "value")

    def split(self, packet, layout, borders):
        count, parts = len(packet) // 8, []
        index, value = packet[:4 * count].view("int32"), packet[4 * count:].view("int32")
        ends = index.searchsorted(borders)
        for border, a, b in zip(borders, ends, ends[1:]):
            part = kernels.of(packet).zeros(2 * (b - a), "int32")
            part[:b - a] = index[a:b] - border
            part[b - a:] = value[a:b]
            parts.append(part.view("uint8"))
        return parts

    def decode_sum(self, payloads, out, layout, keys, weight=1.0):
        if self.survivors != "value":
            return super().decode_sum(payloads, out, layout, keys, weight)
        for packet in payloads:
            self._expect_pairs(packet)
        kernels.of(out).dropping_decode_sum(payloads, weight, out)

    def _expect_pairs(self, packet):
        if len(packet) % 8:
            raise PacketError("dropping: a payload of whole (index, value) pairs of 8 bytes "
                              f"expected, found {len(packet)} bytes")

    def decode_add(self, packet, out, layout, key, weight=1.0):
        k = kernels.of(out)
        if self.survivors == "value":
            self._expect_pairs(packet)
            return k.dropping_decode_add(packet, weight, out)
        starts = [start for start, stop in self._scopes(layout)]
        head = 8 * len(starts)
        if len(packet) < head or len(packet) % 4:
            raise PacketError(f"dropping: {head} bytes of means and whole 32-bit words expected, "
                              f"found {len(packet)} bytes")
        k.dropping_signs_decode_add(packet[head:], packet[:head].view("float32"), starts, weight,
                                    out)
