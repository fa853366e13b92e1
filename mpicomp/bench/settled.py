"""Residuals as many steps of training leave them, for timing codecs in their usual state.

A residual of zeros makes some methods look too good and others too bad: AdaComp sends nine times
more in its first step than after fifty, and Strom's method sends one element in a thousand of those
near its threshold. So a few columns take STEPS steps on normal gradients, and their residual is
repeated over the whole array. Without compiled kernels they take SLOW steps only.
"""

import numpy as np

from mpicomp import kernels
from mpicomp.layout import Layout
from mpicomp.philox import Key

STEPS, SLOW = 2000, 100
PART = 2**16  # elements that take these steps
POOL = 2**22               # normal numbers, of which each step takes PART from another place on


def settle(compressor, layout, state, rng):
    """Fill the residuals in `state`, of a layout of one layer, as STEPS steps leave them.

    Gradients are independent and normal with variance 1. Methods without a residual stay as they
    are.
    """
    owed = _owed(compressor, state)
    if not owed:
        return
    shape = layout.segments[0].shape
    rows, columns = shape if len(shape) == 2 else (1, shape[0])
    few = min(columns, max(1, PART // rows))
    part = Layout.of([("gradient", (rows, few) if len(shape) == 2 else (few,))])
    for array, learnt in zip(owed, train(compressor, part, rng)):
        target, source = array.reshape(rows, columns), learnt.reshape(rows, few)
        for first in range(0, columns, few):
            width = min(few, columns - first)
            target[:, first:first + width] = source[:, :width]


def train(compressor, layout, rng):
    """The residuals of `compressor` on `layout` after STEPS steps, as flat arrays."""
    pool = rng.standard_normal(layout.size + POOL, np.float32)
    grad = pool[:layout.size].copy()
    state = compressor.init(layout, grad)
    packet = np.zeros(compressor.capacity(layout), np.uint8)
    for step in range(STEPS if "cpu" in kernels.backends() else SLOW):
        start = rng.integers(POOL)
        grad[...] = pool[start:start + layout.size]
        compressor.measure(grad, layout, state)
        compressor.encode(grad, packet, layout, Key(1, step=step), state)
        compressor.commit(state)
    return _owed(compressor, state)


def _owed(compressor, state):
    """The residuals in this state."""
    return [array for kind, array in compressor.persistent(state).items()
            if kind.startswith("error")]
