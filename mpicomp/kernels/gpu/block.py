"""Codes with a scale for each block, on the device."""

from mpicomp.kernels import reference
from mpicomp.kernels.gpu import device
from mpicomp.kernels.gpu.arguments import (
    checked,
    floats,
    new_fault,
    or_host,
    payload,
    philox_key,
    refusal,
    refusals,
    room,
    table,
)
from mpicomp.kernels.unfit import Unfit
from mpicomp.philox import Key

_FORMS = {"int": 0, "fp8": 1}


def _block_encode(x, more, out, size, form, levels, norm, key, start, data, fault):
    n = floats(x).size
    if size % 32 or norm == "l2" and size > 2**15:
        raise Unfit()
    with room(data, 1, reference.block_bytes(n, size, form, levels)) as packet:
        device.current().launch("block_encode", 32 * -(-n // size), x, more, out, n, size,
                                _FORMS[form], levels, norm == "l2", key is not None,
                                *philox_key(key or Key()), start, packet, fault)


@or_host(reference.block_encode)
def block_encode(x, size, form, levels, norm, key, start, data):
    _block_encode(x, None, None, size, form, levels, norm, key, start, data, None)


def block_encode_owed(grad, owed, out, size, form, levels, norm, key, start, data):
    """`block_encode` of owed + grad; what is then still owed goes to `out`."""
    n, fault = grad.size, new_fault()
    _block_encode(floats(owed, n), floats(grad), floats(out, n), size, form, levels, norm, key,
                  start, data, fault)
    checked(fault, refusal(reference.block_decode_add, data, size, form, levels, -1.0, out))


def _block_decode(payloads, size, form, levels, weight, out, fresh):
    n, fault = floats(out).size, new_fault()
    packets = [payload(data, 1, reference.block_bytes(n, size, form, levels)) for data in payloads]
    device.current().launch("block_decode", n, table(packets), len(packets), size, _FORMS[form],
                            levels, weight, out, n, fresh, fault)

    def decode_add(_, data, out):
        reference.block_decode_add(data, size, form, levels, weight, out)

    checked(fault, refusals(decode_add, payloads, out))


@or_host(reference.block_decode_add)
def block_decode_add(data, size, form, levels, weight, out):
    _block_decode([data], size, form, levels, weight, out, False)


def block_decode_sum(payloads, size, form, levels, weight, out):
    """out = the sum of weight * (scale * code) over the payloads, in their order."""
    _block_decode(payloads, size, form, levels, weight, out, True)
