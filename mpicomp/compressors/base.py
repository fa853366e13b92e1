"""The contract of a compressor: gradients in, bytes out, and back.

A compressor turns the gradients of one bucket (a flat float32 array) into bytes and back. It is
frozen data: everything it may be told stands in its fields, `repr` is its specification, and
`from_spec(repr(c)) == c`. Two compressors with the same specification decode what the other wrote.
Arrays and state belong to the caller, so the same object serves every bucket and every thread.

Three decisions carry the rest of the package:

  * capacity is known from the layout alone, and encode writes into the caller's buffer;
  * decode *accumulates* with a weight: averaging P packets is decode_add(packet, mean, 1/P) in
    rank order, and error feedback is the same call with weight -1;
  * what MPI may add (`summable`), what error feedback may wrap (`feedback`) and what is unbiased
    are declared here and held by the conformance tests.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import ClassVar

from mpicomp import kernels
from mpicomp.compressors.spec import spec_text
from mpicomp.errors import PacketError

LARGEST = 2.0**128 - 2.0**104  # the largest float32


class State(SimpleNamespace):
    """The arrays that a compressor keeps for one bucket; which ones is its own business."""


@dataclass(frozen=True, repr=False)
class Compressor(ABC):
    """Which bytes stand for these floats. Subclass, write four methods, `register` the class."""

    name: ClassVar[str]
    source: ClassVar[str] = ""  # the paper
    fixed: ClassVar[bool] = True  # every payload fills its capacity
    feedback: ClassVar[bool] = False  # may Residual wrap it? Its residual must stay bounded
    unbiased: ClassVar[bool] = False  # E[decode(encode(x))] = x

    @abstractmethod
    def capacity(self, layout) -> int:
        """The most bytes that a payload of this layout can take; depends on the layout only."""

    def init(self, layout, like) -> State:
        """State and scratch for one bucket, in the kind of array that `like` is.

        All the memory that this compressor will ever need for the bucket is taken here.
        """
        return State()

    def measure(self, x, layout, state):
        """What the ranks must agree on before `encode`, or None.

        Returns an array that lives in `state`; the exchange replaces its content by the maximum
        over all ranks, and `encode` then reads it there.
        """
        return None

    @abstractmethod
    def encode(self, x, packet, layout, key, state) -> int:
        """Write the payload for `x` (float32, layout.size elements) to `packet` (uint8).

        Returns the bytes used; what lies behind them, up to the capacity, may serve as scratch.
        A pure function of (self, x, layout, key, state): `x` and `state` stay as they are, and
        random numbers come from `key` and the element alone.
        """

    @abstractmethod
    def decode_add(self, packet, out, layout, key, weight=1.0) -> None:
        """Add weight * (what the payload `packet` says) to `out` (float32, layout.size elements).

        `packet` holds exactly the bytes used, `key` is the sender's. Raises PacketError for
        bytes that `encode` cannot have written; `out` is then not to be used.
        """

    def decode_sum(self, payloads, out, layout, keys, weight=1.0) -> None:
        """out = weight * the sum of what the payloads say, added in their order to zero.

        keys[i] is that of the sender of payloads[i]; none at all make zeros, for an asynchronous
        rank may have heard of nobody. What `out` held before is lost. A kernel may do this in one
        pass over `out`; a test proves it equal.
        """
        out[...] = 0
        for packet, key in zip(payloads, keys):
            self.decode_add(packet, out, layout, key, weight)

    def encode_owed(self, grad, owed, packet, layout, key, state, out=None) -> int:
        """Encode owed + grad and keep what remains unsaid: all there is to error feedback.

        `owed` is what the world was not told so far; what it has still not been told is written
        to `out`, by default `owed` itself. With another array for `out` the step can be taken
        back. A fused kernel may replace these lines; a test proves it equal.
        """
        out = owed if out is None else out
        _add(owed, grad, out)
        used = self.encode(out, packet, layout, key, state)
        self.decode_add(packet[:used], out, layout, key, -1.0)
        return used

    @property
    def summable(self):
        """The dtype ("float32", "int8", "float16" ...) in which MPI may add payloads, or None."""
        return None

    @property
    def most_ranks(self):
        """The largest number of ranks over which the sum of payloads is exact, or None."""
        return None

    def alias(self, x):
        """The payload for `x` where it is the memory of `x` itself, as uint8, or None."""
        return None

    def shared_bytes(self, layout) -> int:
        """Bytes at the front of a payload that all ranks agreed on; MPI adds what follows them."""
        return 0

    def by_case(self, payload, layout) -> dict:
        """{case: bytes} of a payload whose parts have other reasons than the method itself."""
        return {}

    @property
    def core(self):
        """The compressor that writes the payloads: what Residual wraps, or this one."""
        return self

    @property
    def can_split(self) -> bool:
        """Does `split` know how to cut a payload of this configuration?"""
        return False

    def split(self, packet, layout, borders) -> list:
        """The payload cut at these elements: one for every pair of neighbours in `borders`.

        Each part is a payload by itself, of the elements from its border on, which count from 0.
        Only where `can_split`.
        """
        raise NotImplementedError(f"{self.name} has no split")

    def persistent(self, state) -> dict:
        """The arrays (one element a gradient) that a checkpoint must hold: {"error": owed} ..."""
        return {}

    def commit(self, state) -> None:
        """The step with the last encoded packet was applied on all ranks: it is now the past."""

    @classmethod
    def from_inner(cls, text, read):
        """The field `inner` from the text in a specification's bracket; `read` makes a compressor.
        """
        return read(text)

    def expect(self, packet, size) -> None:
        """Raise PacketError unless the payload has `size` bytes."""
        if len(packet) != size:
            raise PacketError(f"{self.name}: a payload of {len(packet)} bytes found, "
                              f"{size} expected for this layout")

    def expect_finite(self, values) -> None:
        """Raise PacketError unless all of these floats from a payload are finite."""
        def complain(values):
            raise PacketError(f"{self.name}: a number in the payload is not finite")

        kernels.of(values).within(values, -LARGEST, LARGEST, complain)

    def __repr__(self):
        return spec_text(self.name, {f.name: getattr(self, f.name) for f in fields(self)})


def _add(a, b, out):
    """out = a + b in the arrays' own library."""
    if out is not a:
        out[...] = a
    out += b
