"""The contract of a compressor: gradients in, bytes out, and back.

A compressor turns the gradients of one bucket (a flat float32 array) into bytes and back. It is
frozen data: its options are its fields, `repr` is its specification, and `from_spec(repr(c)) == c`.
A compressor decodes what any other with the same specification encoded. Arrays and state belong to
the caller, so one object serves every bucket and every thread.

The rest of the package relies on three things:

  * the capacity follows from the layout alone, and `encode` writes into the caller's buffer;
  * decoding adds to an array, with a weight: the mean of P packets is decode_add(packet, mean, 1/P)
    in rank order, and error feedback is the same call with weight -1;
  * a compressor declares whether MPI may add its payloads (`summable`), whether error feedback may
    wrap it (`feedback`) and whether it is unbiased; the conformance tests check what it declares.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, ClassVar

from mpicomp import kernels
from mpicomp.compressors.spec import spec_text
from mpicomp.errors import PacketError
from mpicomp.layout import Layout
from mpicomp.philox import Key

Array = Any  # a NumPy or CuPy array

LARGEST = 2.0**128 - 2.0**104  # the largest float32


class State(SimpleNamespace):
    """The arrays that a compressor keeps for one bucket; each class chooses its own."""


@dataclass(frozen=True, repr=False)
class Compressor(ABC):
    """Encodes floats as bytes. Subclass it, write its three abstract methods, `register` it."""

    name: ClassVar[str]
    source: ClassVar[str] = ""  # the paper
    fixed: ClassVar[bool] = True  # every payload fills its capacity
    feedback: ClassVar[bool] = False  # may Residual wrap it? Its residual must stay bounded
    unbiased: ClassVar[bool] = False  # E[decode(encode(x))] = x
    coarse: ClassVar[bool] = False  # one of two values, or an element rarely: not to be squared
    # what `measure` returns becomes the "max" or the "sum" over ranks. With "sum" the class also
    # hears the sum of all payloads (`learn`): only an exchange in which MPI adds can carry it
    agreed_by: ClassVar[str] = "max"

    @abstractmethod
    def capacity(self, layout: Layout) -> int:
        """The most bytes that a payload of this layout can take; depends on the layout only."""

    def init(self, layout: Layout, like: Array) -> State:
        """State and scratch for one bucket, in arrays like `like` (NumPy's or a device's).

        All memory for the bucket is allocated here; later calls need no more.
        """
        return State()

    def measure(self, x: Array, layout: Layout, state: State) -> Array | None:
        """The numbers that ranks must agree on before `encode`, or None.

        Returns an array of `state`; the exchange replaces each of its elements by the maximum over
        all ranks, or by the sum (`agreed_by`), and `encode` reads it there.
        """
        return None

    @abstractmethod
    def encode(self, x: Array, packet: Array, layout: Layout, key: Key, state: State) -> int:
        """Write the payload for `x` (float32, layout.size elements) to `packet`; returns the bytes.

        `packet` is uint8, contiguous, at any address and at least as long as the capacity. Bytes
        between those used and the capacity may serve as scratch, those beyond may not. A pure
        function of (self, x, layout, key, state): it changes neither `x` nor `state`, and random
        numbers depend on `key` and the element alone.
        """

    @abstractmethod
    def decode_add(self, packet: Array, out: Array, layout: Layout, key: Key,
                   weight: float = 1.0) -> None:
        """Add weight * (the decoded payload) to `out` (float32, layout.size elements).

        `packet` holds exactly the bytes that `encode` used, `key` is the sender's. Raises
        PacketError for bytes that say nothing in this layout, or a number that is not finite; `out`
        is then undefined. Bits that fill up the last byte may be ignored.
        """

    def decode_sum(self, payloads: Sequence[Array], out: Array, layout: Layout,
                   keys: Sequence[Key], weight: float = 1.0) -> None:
        """out = weight * the sum of the decoded payloads, added to zero in their order.

        keys[i] is that of the sender of payloads[i]. No payloads make zeros: an asynchronous rank
        may have received none. A class may override this with a kernel that passes over `out` once;
        tests compare it with these lines.
        """
        out[...] = 0
        for packet, key in zip(payloads, keys):
            self.decode_add(packet, out, layout, key, weight)

    def encode_owed(self, grad: Array, owed: Array, packet: Array, layout: Layout, key: Key,
                    state: State, out: Array | None = None) -> int:
        """Encode owed + grad and keep the rest: all there is to error feedback. Returns the bytes.

        `owed` is the residual, what was not sent so far; what is still not sent goes to `out`, by
        default `owed` itself. With another array for `out` the step can be undone. A class may
        override this with a fused kernel; tests compare it with these lines.
        """
        out = owed if out is None else out
        _add(owed, grad, out)
        used = self.encode(out, packet, layout, key, state)
        self.decode_add(packet[:used], out, layout, key, -1.0)
        return used

    @property
    def summable(self) -> str | None:
        """The dtype ("float32", "int8", "float16" ...) in which MPI may add payloads, or None."""
        return None

    @property
    def most_ranks(self) -> int | None:
        """The largest number of ranks over which the sum of payloads is exact, or None."""
        return None

    def alias(self, x: Array) -> Array | None:
        """The memory of `x` as uint8, if that is the payload for `x`; else None."""
        return None

    def shared_bytes(self, layout: Layout) -> int:
        """Bytes at the front of a payload that are the same on all ranks; MPI adds the others."""
        return 0

    def by_case(self, payload: Array, layout: Layout) -> dict[str, int]:
        """Bytes of a payload by the case of a `rule`, for `Reducer.stats`; {} if there is one."""
        return {}

    @property
    def core(self) -> "Compressor":
        """The compressor that writes the payloads: what Residual wraps, or this one."""
        return self

    @property
    def can_split(self) -> bool:
        """Does `split` know how to cut a payload of this configuration?"""
        return False

    def split(self, packet: Array, layout: Layout, borders: Sequence[int]) -> list[Array]:
        """The payload cut at these elements: a part for every pair of neighbours in `borders`.

        Each part is a payload of its own, whose elements count from 0. Only if `can_split`.
        """
        raise NotImplementedError(f"{self.name} has no split")

    def persistent(self, state: State) -> dict[str, Array]:
        """{name: float32[layout.size]} that a checkpoint must hold, such as {"error": owed}.

        Names that begin with "error" are of what is owed, in units of the gradient.
        """
        return {}

    def learn(self, payload: Array, layout: Layout, key: Key, state: State) -> None:
        """Hear what was sent by all ranks together: the sum of their payloads, the same everywhere.

        Called before `commit` where MPI adds payloads; until then the step may still be given up.
        """

    def commit(self, state: State) -> None:
        """The step of the last encoded packet was applied on all ranks: make its state final."""

    @classmethod
    def from_inner(cls, text: str, read: Callable[[str], "Compressor"]) -> Any:
        """The field `inner` from the text in a specification's brackets.

        `read` turns a specification into a compressor.
        """
        return read(text)

    def expect(self, packet: Array, size: int) -> None:
        """Raise PacketError unless the payload has `size` bytes."""
        if len(packet) != size:
            raise PacketError(f"{self.name}: a payload of {len(packet)} bytes found, "
                              f"{size} expected for this layout")

    def expect_finite(self, values: Array) -> None:
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
