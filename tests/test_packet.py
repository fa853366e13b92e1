"""The header in front of every payload, and the layout that it stands for: to the byte."""

from dataclasses import replace

import numpy as np
import pytest

from mpicomp import MismatchError, PacketError
from mpicomp.exchange.allgather import Allgather
from mpicomp.layout import Layout, Segment
from mpicomp.transport.packet import EMPTY, MAGIC, NONFINITE, SIZE, VERSION, Header

HEADER = Header(step=7, bucket=3, plan=0x0123456789ABCDEF, length=0x1122334455, flags=NONFINITE)
# magic, version 1, flags 1, step, bucket, plan, length; all of them little endian
BYTES = (b"MPIC" b"\x01\x00" b"\x01\x00" b"\x07\x00\x00\x00" b"\x03\x00\x00\x00"
         b"\xef\xcd\xab\x89\x67\x45\x23\x01" b"\x55\x44\x33\x22\x11\x00\x00\x00")


def test_header_is_32_bytes_as_documented():
    buffer = bytearray(b"\xa5" * 40)
    HEADER.write(buffer)
    assert SIZE == 32 == len(BYTES) and (MAGIC, VERSION) == (b"MPIC", 1)
    assert bytes(buffer) == BYTES + b"\xa5" * 8
    assert (NONFINITE, EMPTY) == (1, 2)


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview,
                                  lambda data: np.frombuffer(data, np.uint8)])
def test_header_round_trips_from_any_buffer(make):
    assert Header.read(make(BYTES)) == HEADER
    assert Header.read(make(BYTES + b"the payload")) == HEADER


@pytest.mark.parametrize("header", [
    Header(0, 0, 0, 0), Header(2**32 - 1, 2**32 - 1, 2**64 - 1, 2**64 - 1, 2**16 - 1)])
def test_header_extremes(header):
    buffer = np.zeros(SIZE, np.uint8)
    header.write(buffer)
    assert Header.read(buffer) == header


def test_step_counts_modulo_two_to_the_32():
    buffer = bytearray(SIZE)
    Header(2**32 + 5, 0, 0, 0).write(buffer)
    assert Header.read(buffer).step == 5


@pytest.mark.parametrize("length", range(0, SIZE))
def test_short_header_is_refused(length):
    with pytest.raises(PacketError, match=f"{SIZE} bytes.*found {length}"):
        Header.read(BYTES[:length])


def test_other_magic_or_version_is_refused():
    for at in range(6):
        for bit in range(8):
            wrong = bytearray(BYTES)
            wrong[at] ^= 1 << bit
            with pytest.raises(PacketError, match="magic" if at < 4 else "format .* same mpicomp"):
                Header.read(wrong)


# ---- layouts --------------------------------------------------------------------------------


def test_layout_lays_tensors_side_by_side():
    layout = Layout.of([("a", (2, 3)), ("b", ()), ("c", (0, 4)), ("d", (5,))])
    assert layout.size == 12 and layout.starts == (0, 6, 7, 7)
    assert [s.slice for s in layout.segments] == [slice(0, 6), slice(6, 7), slice(7, 7),
                                                  slice(7, 12)]
    assert Layout.of([]).size == 0


@pytest.mark.parametrize("start", [5, 7])
def test_layout_has_no_gaps_and_no_overlaps(start):
    with pytest.raises(ValueError, match=f"'b' starts at element {start}, not at 6"):
        Layout((Segment("a", (2, 3)), Segment("b", (1,), start)))


@pytest.mark.parametrize("shape, matrix", [
    ((), (1, 1)), ((7,), (7, 1)), ((3, 4), (3, 4)), ((8, 3, 2, 2), (8, 12)), ((0, 5), (0, 5)),
    ((5, 0), (5, 0)), ((1, 9), (1, 9))])
def test_a_column_is_an_input_over_all_outputs(shape, matrix):
    assert Segment("w", shape).matrix == matrix


def test_digest_tells_names_shapes_and_order_apart():
    layouts = [[("a", (2, 3)), ("b", (6,))], [("b", (6,)), ("a", (2, 3))], [("a", (2, 3))],
               [("a", (3, 2)), ("b", (6,))], [("a", (6,)), ("b", (6,))], [("a", (12,))],
               [("a", (2, 3)), ("c", (6,))], []]
    digests = [Layout.of(shapes).digest for shapes in layouts]
    assert len(set(digests)) == len(layouts) and all(0 <= d < 2**64 for d in digests)
    assert Layout.of(layouts[0]).digest == digests[0]
    assert Layout.of(layouts[0]) == Layout.of(layouts[0])


# ---- the headers of all ranks ---------------------------------------------------------------


@pytest.mark.parametrize("odd, words", [
    (dict(step=8), "rank 2 is at step 8, rank 0 at 7"),
    (dict(bucket=1), "rank 2 is at bucket 1, rank 0 at 3"),
    (dict(plan=5), "rank 2 is at plan digest 5"), (dict(), None), (dict(length=1, flags=3), None)])
def test_headers_that_differ_are_a_mismatch(odd, words):
    buffer = bytearray(4 * SIZE)
    for rank in range(4):
        replace(HEADER, **(odd if rank == 2 else {})).write(memoryview(buffer)[rank * SIZE:])
    exchange = object.__new__(Allgather)
    if words is None:
        assert len(exchange.read_headers(buffer, range(0, 4 * SIZE, SIZE))) == 4
        return
    with pytest.raises(MismatchError, match=words):
        exchange.read_headers(buffer, range(0, 4 * SIZE, SIZE))


def test_a_length_beyond_capacity_is_refused():
    exchange = object.__new__(Allgather)
    headers = [replace(HEADER, length=n) for n in (8, 0, 9)]
    assert exchange.lengths(headers, [8, 8, 9]) == [8, 0, 9]
    with pytest.raises(PacketError, match="rank 2 announces 9 bytes for bucket 3.*at most 8"):
        exchange.lengths(headers, [8, 8, 8])
