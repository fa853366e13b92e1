"""Products of a matrix with few columns, and their orthonormalisation, compiled."""

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.cpu.library import (
    at,
    floats,
    lib,
    or_reference,
    payload,
    philox_key,
    refused,
)


def _described(parts):
    """(int64[tensors, 4], how many tensors, how many elements they have)."""
    table = np.array(parts, np.int64).reshape(-1, 4)
    return table, len(parts), int((table[:, 1] * table[:, 2]).sum())


def _payload(data, parts, write=False):
    return payload(data, 4 * sum(reference.powersgd_sizes(parts)), write)


@or_reference(reference.powersgd_project)
def powersgd_project(x, parts, basis, product):
    table, count, n = _described(parts)
    lib.mp_powersgd_project(floats(x, n), table.ctypes.data, count, floats(basis, n),
                            floats(product, reference.powersgd_sizes(parts)[0], True))


@or_reference(reference.powersgd_encode)
def powersgd_encode(x, parts, product, data):
    table, count, n = _described(parts)
    common, rest = reference.powersgd_sizes(parts)
    result = lib.mp_powersgd_encode(floats(x, n), table.ctypes.data, count, floats(product, common),
                                    at(data, np.uint8, 4 * (common + rest), True))
    refused(result, reference.powersgd_encode, x, parts, product, data)


@or_reference(reference.powersgd_decode_add)
def powersgd_decode_add(data, parts, weight, out):
    table, count, n = _described(parts)
    result = lib.mp_powersgd_decode(_payload(data, parts), table.ctypes.data, count, weight,
                                    floats(out, n, True))
    refused(result, reference.powersgd_decode_add, data, parts, weight, out)


@or_reference(reference.powersgd_learn)
def powersgd_learn(data, parts, key, basis):
    table, count, n = _described(parts)
    result = lib.mp_powersgd_learn(_payload(data, parts), table.ctypes.data, count,
                                   *philox_key(key), floats(basis, n, True))
    refused(result, reference.powersgd_learn, data, parts, key, basis)
