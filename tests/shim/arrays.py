"""Arrays that behave as CuPy's do: they never turn into NumPy's by themselves, nor mix with them.

Their memory is the host's, and guarded: `check` finds what was written outside of it.
"""

import numpy as np

GUARD = 64
LIVE = []  # memory whose guards are watched


class DeviceArray:
    """A NumPy array behind glass. `get` is the way out, `set` the way in."""

    copies = 0  # from the device, so far

    def __init__(self, inner):
        self._inner = inner

    @classmethod
    def new(cls, size, dtype, fill=0xA5, odd=0):
        """Memory of its own, beginning `odd` bytes off, every byte being `fill`."""
        dtype = np.dtype(dtype)
        whole = np.full(int(size) * dtype.itemsize + 2 * GUARD + odd + 64, 0xE7, np.uint8)
        begin = GUARD + odd + -whole.ctypes.data % 64
        inner = whole[begin:begin + int(size) * dtype.itemsize]
        inner[:] = fill
        LIVE.append((whole, begin, begin + inner.size))
        return cls(inner.view(dtype))

    @classmethod
    def of(cls, values, odd=0):
        """A copy of a NumPy array on the device."""
        values = np.ascontiguousarray(values)
        out = cls.new(values.size, values.dtype, odd=odd)
        out._inner[:] = values.reshape(-1)
        return cls(out._inner.reshape(values.shape))

    dtype = property(lambda self: self._inner.dtype)
    size = property(lambda self: self._inner.size)
    nbytes = property(lambda self: self._inner.nbytes)
    shape = property(lambda self: self._inner.shape)
    flags = property(lambda self: self._inner.flags)

    @property
    def __cuda_array_interface__(self):
        return {"data": (self._inner.ctypes.data, False), "shape": self.shape, "version": 3,
                "typestr": self.dtype.str, "strides": None}

    def __dlpack__(self, **keywords):
        return self._inner.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self._inner.__dlpack_device__()

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    __array_ufunc__ = None

    def get(self):
        """The content as a NumPy array."""
        DeviceArray.copies += 1
        return self._inner.copy()

    def set(self, values):
        """The content from a NumPy array."""
        self._inner[...] = values

    def __len__(self):
        return len(self._inner)

    def _own(self, index):
        return self._inner[index if index is Ellipsis or isinstance(index, (slice, tuple))
                           else slice(index, index + 1)]

    def __getitem__(self, index):
        part = self._own(index)
        single = isinstance(index, (int, np.integer))
        return DeviceArray(part.reshape(()) if single else part)

    def __setitem__(self, index, value):
        if isinstance(value, np.ndarray):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        part = self._own(index)
        part[...] = self._other(value)
        self._even()

    def _even(self):
        """A device reads and writes numbers at multiples of their size only."""
        assert not self.size or self._inner.ctypes.data % self.dtype.itemsize == 0, \
            f"{self.dtype} at an odd address"

    def _other(self, other):
        self._even()
        if isinstance(other, np.ndarray):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        if isinstance(other, DeviceArray):
            other._even()
        return other._inner if isinstance(other, DeviceArray) else other

    def __iadd__(self, other):
        self._inner += self._other(other)
        return self

    def __imul__(self, other):
        self._inner *= self._other(other)
        return self

    def __le__(self, other):
        return DeviceArray(np.asarray(self._inner <= self._other(other)))

    def __ge__(self, other):
        return DeviceArray(np.asarray(self._inner >= self._other(other)))

    def __bool__(self):
        return bool(self.get())

    def __float__(self):
        return float(self.get().reshape(()))

    def __int__(self):
        return int(self.get().reshape(()))

    def __str__(self):
        return str(self.get())

    __repr__ = __format__ = lambda self, *_: str(self)

    def min(self):
        return DeviceArray(np.asarray(self._inner.min()))

    def max(self):
        return DeviceArray(np.asarray(self._inner.max()))

    def view(self, dtype):
        return DeviceArray(self._inner.view(dtype))

    def reshape(self, *shape):
        return DeviceArray(self._inner.reshape(*shape))

    def copy(self):
        return DeviceArray.of(self._inner)


def check():
    """Raise AssertionError where a guard was written to; then watch none of them any more."""
    for whole, begin, end in LIVE:
        assert (whole[:begin] == 0xE7).all() and (whole[end:] == 0xE7).all(), \
            f"written outside of an array of {end - begin} bytes"
    LIVE.clear()
