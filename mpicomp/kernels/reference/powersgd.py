"""Products of a matrix with few columns, and their orthonormalisation, in one fixed order.

`parts` describes a bucket: (start, rows, columns, rank) of each tensor, in order; rank 0 is one
that is sent as it is. Factors lie column by column: `rank` runs of `rows` (or `columns`) floats.
"""

import numpy as np

from mpicomp import philox
from mpicomp.errors import PacketError
from mpicomp.kernels.reference.sums import FOLD, finite, within

MOST_FACTOR = 2.0**122  # 32 products of a float up to 1 and one up to this have a finite sum
LEAST_NORM = 1e-9  # of what a column adds to those before it, as a fraction of its own


def powersgd_sizes(parts):
    """(floats of the common factors, floats of all that follows) of a payload."""
    return (sum(rank * rows for _, rows, _, rank in parts),
            sum(rank * columns if rank else rows * columns for _, rows, columns, rank in parts))


def powersgd_dot(a, b):
    """The sums of a * b over the last axis, of equal lengths; of the type of a and b.

    Lane l of 32 adds the elements l, l + 32 ... one after the other, from zero on. Then the upper
    half of the lanes is added to the lower one, five times.
    """
    n = a.shape[-1]
    lanes = np.zeros((*np.broadcast_shapes(a.shape, b.shape)[:-1], FOLD), a.dtype)
    for at in range(0, n, FOLD):
        width = min(FOLD, n - at)
        lanes[..., :width] += a[..., at:at + width] * b[..., at:at + width]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def powersgd_orthonormal(columns):
    """float32[r, n]: the rows of `columns`, float32[r, n], made orthonormal one after the other.

    Modified Gram-Schmidt, twice, in float64. What adds less than a billionth of its length to those
    before it becomes zeros: so do zeros.
    """
    made = columns.astype(np.float64)
    for k, v in enumerate(made):
        length = np.sqrt(powersgd_dot(v, v))
        for _ in range(2):
            for before in made[:k]:
                v -= powersgd_dot(before, v) * before
        norm = np.sqrt(powersgd_dot(v, v))
        if norm > LEAST_NORM * length:
            v /= norm
        else:
            v[:] = 0
    return made.astype(np.float32)


def powersgd_project(x, parts, basis, product):
    """product = M Q of each matrix of x; Q stands in `basis` where its matrix stands in x."""
    at = 0
    for start, rows, columns, rank in parts:
        matrix = x[start:start + rows * columns].reshape(rows, columns)
        q = basis[start:start + rank * columns].reshape(rank, columns)
        product[at:at + rank * rows] = powersgd_dot(matrix, q[:, None]).ravel()
        at += rank * rows


def powersgd_encode(x, parts, product, data):
    """The payload: orth(P) of each matrix, of `product`; then M^T orth(P), or the tensor itself."""
    if not finite(product):
        raise PacketError("powersgd: the sum over ranks of M Q is not finite: gradients are beyond "
                          "float32")
    common, rest = powersgd_sizes(parts)
    values = np.zeros(common + rest, np.float32)
    at, to = 0, common
    for start, rows, columns, rank in parts:
        matrix = x[start:start + rows * columns].reshape(rows, columns)
        if rank == 0:
            values[to:to + matrix.size] = matrix.ravel()
            to += matrix.size
            continue
        p = powersgd_orthonormal(product[at:at + rank * rows].reshape(rank, rows))
        values[at:at + rank * rows] = p.ravel()
        q = values[to:to + rank * columns].reshape(rank, columns)
        for i in range(rows):
            q += p[:, i, None] * matrix[i]
        at, to = at + rank * rows, to + rank * columns
    data[:4 * values.size] = values.view(np.uint8)


def powersgd_decode_add(data, parts, weight, out):
    """out += weight * (P Q^T, products added in the order of the columns; or the tensor itself)."""
    values = _checked(data, parts)
    at, to = 0, powersgd_sizes(parts)[0]
    for start, rows, columns, rank in parts:
        if rank == 0:
            said = values[to:to + rows * columns]
            to += rows * columns
        else:
            p = values[at:at + rank * rows].reshape(rank, rows)
            q = values[to:to + rank * columns].reshape(rank, columns)
            said = p[0, :, None] * q[0]
            for k in range(1, rank):
                said += p[k, :, None] * q[k]
            at, to = at + rank * rows, to + rank * columns
        out[start:start + rows * columns] += np.float32(weight) * said.ravel()


def powersgd_learn(data, parts, key, basis):
    """basis = orth(Q) of each matrix, for the next step; drawn from -1 to 1 where that is zero.

    Element i of the basis is drawn by word i of the key. Other elements of the basis stay.
    """
    values = _checked(data, parts)
    to = powersgd_sizes(parts)[0]
    for start, rows, columns, rank in parts:
        if rank == 0:
            to += rows * columns
            continue
        q = powersgd_orthonormal(values[to:to + rank * columns].reshape(rank, columns))
        for k in range(rank):
            if not q[k].any():
                drawn = philox.uniform(key, start + k * columns, columns)
                q[k] = drawn * np.float32(2) - np.float32(1)
        basis[start:start + q.size] = q.ravel()
        to += q.size


def _checked(data, parts):
    """The floats of a payload; PacketError where `encode` cannot have written them."""
    values, common = data.view(np.float32), powersgd_sizes(parts)[0]

    def complain(found):
        raise PacketError("powersgd: an orthonormal factor from -1 to 1 expected, found "
                          f"{found.min()} to {found.max()}")

    within(values[:common], -1.0, 1.0, complain)
    for what, part in _rest(values, parts):
        if not finite(part):
            raise PacketError("powersgd: a number in the payload is not finite")
        if what and np.abs(part).max(initial=0) > MOST_FACTOR:
            raise PacketError(f"powersgd: a factor beyond {MOST_FACTOR:.3g} in the payload")
    return values


def _rest(values, parts):
    """(is it a factor?, its floats) of each tensor, behind the common factors."""
    to = powersgd_sizes(parts)[0]
    for _, rows, columns, rank in parts:
        size = rank * columns if rank else rows * columns
        yield rank > 0, values[to:to + size]
        to += size
