"""Slots: where the arrays of an averager lie in its buckets, and how they come in and go out."""

import numpy as np

from mpicomp import kernels
from mpicomp.errors import NonFiniteError, SpecError
from mpicomp.transport import staging


class Slot:
    """One array's place in a bucket.

    flat    float32[n], the segment of the bucket's memory
    ready   is what this rank gives in place?
    fine    is all of it finite? None on a GPU, where one look at a bucket costs less than many
    frozen  nothing is handed out
    """

    def __init__(self, name, flat):
        self.name, self.flat = name, flat
        self.ready, self.fine, self.frozen = False, True, False

    def follow(self, old):
        """Take over what the slot of the same array had in older buckets."""

    def give_back(self, scaled=True):
        """Hand out what now stands in the bucket; `scaled`: as the user's own units are."""
        raise NotImplementedError

    def clear(self):
        """Nothing is handed out."""
        raise NotImplementedError


class ArraySlot(Slot):
    """Of a torch tensor, or an array of NumPy or CuPy, that is given anew in each step."""

    def __init__(self, name, array, bucket, segment):
        super().__init__(name, bucket.grad[segment.slice])
        self.shape, self.kind = segment.shape, kind(array)
        self._view = bucket.view(segment) if is_tensor(array) else self.flat.reshape(self.shape)
        self._on_host = bucket.tensor is None and isinstance(bucket.grad, np.ndarray)
        self._given = None

    def check(self, array):
        """SpecError unless `array` is of the kind and shape that the averager was made with."""
        if not hasattr(array, "dtype"):
            raise SpecError(f"{self.name!r} is {type(array).__name__}, expected "
                            f"{in_words(self.kind, self.shape)}")
        if tuple(array.shape) != self.shape or kind(array) != self.kind:
            raise SpecError(f"{self.name!r} is {in_words(kind(array), array.shape)}, expected "
                            f"{in_words(self.kind, self.shape)}, as when the Averager was made")

    def fill(self, array, factor):
        """Copy `array` in, times `factor`; it is what `give_back` writes to."""
        if factor:
            self._copy(array, self._view)
        else:  # also where it holds NaN: this rank gives nothing
            self.flat[...] = 0
        if factor not in (0.0, 1.0):
            self.flat *= np.float32(factor)
        self.fine = kernels.of(self.flat).finite(self.flat) if self._on_host else None
        self._given = array

    @staticmethod
    def _copy(source, target):
        if is_tensor(source):
            target.detach().copy_(source.detach())
        elif isinstance(target, np.ndarray):
            target[...] = staging.fetched(source)
        else:
            target[...] = staging.fitting(source, target)

    def absent(self):
        """This rank gives nothing in this step, which counts as zero."""
        self.flat[...] = 0
        self.fine, self._given = True, None

    def give_back(self, scaled=True):
        if self._given is not None:
            self._copy(self._view, self._given)
        self._given = None

    def clear(self):
        self._given = None

    def refuse_overflow(self, step):
        """NonFiniteError unless the array's dtype can hold what stands in the bucket."""
        refuse_overflow(self, step, LARGEST[self.kind[1]], self.kind[1])


LARGEST = {"float32": 2.0**128 - 2.0**104, "float16": 65504.0,
           "bfloat16": 2.0**128 - 2.0**120}


def refuse_overflow(slot, step, most, dtype):
    """NonFiniteError where a sum in a slot is beyond the largest number of a dtype."""
    def complain(_):
        raise NonFiniteError(
            f"step {step}: every rank's gradient is finite, but their sum for {slot.name!r} is "
            f"beyond {dtype}: take average=True, or make the loss smaller")

    kernels.of(slot.flat).within(slot.flat, -most, most, complain)


def is_tensor(array) -> bool:
    """Is it torch's? Asked without importing torch."""
    return type(array).__module__.partition(".")[0] == "torch"


def kind(array):
    """(library, dtype, device) of an array: what must be the same in every step."""
    library = type(array).__module__.partition(".")[0]
    return library, str(array.dtype).removeprefix("torch."), str(getattr(array, "device", "cpu"))


def in_words(kind, shape):
    """A kind and a shape for an error text."""
    library, dtype, device = kind
    return f"a {library} array of {dtype} on {device}, shape {list(shape)}"
