"""The header in front of every payload: 32 bytes, little endian.

    offset  size  field
    0       4     magic "MPIC"
    4       2     format version, 1
    6       2     flags: 1 = a gradient was not finite, 2 = this rank had no gradient at all,
                  4 = this rank has sent everything (asynchronous exchanges),
                  8 = the ranks of this node disagree (hierarchical),
                  16 = this rank is out of examples and does not count in the mean (DDP.join)
    8       4     step, modulo 2**32
    12      4     bucket
    16      8     plan digest: of the layout, the method and all else that ranks must agree on
    24      8     length of the payload in bytes

The plan digest covers the compressor, so a packet is only decoded by the configuration that wrote
it. Headers are compared before anything is decoded.
"""

import struct
from dataclasses import dataclass
from typing import Any

from mpicomp.errors import PacketError

MAGIC = b"MPIC"
VERSION = 1
NONFINITE = 1
EMPTY = 2
LAST = 4
DISAGREE = 8
JOINED = 16
Buffer = Any  # bytes-like, such as an array of uint8
_FORMAT = struct.Struct("<4sHHIIQQ")
SIZE = _FORMAT.size


@dataclass(frozen=True)
class Header:
    """The fields of the table above. `length` is that of the payload alone."""

    step: int
    bucket: int
    plan: int
    length: int
    flags: int = 0

    def write(self, buffer: Buffer) -> None:
        """Write the 32 bytes to the front of `buffer`, any writable bytes-like object."""
        _FORMAT.pack_into(buffer, 0, MAGIC, VERSION, self.flags, self.step & 0xFFFFFFFF,
                          self.bucket, self.plan, self.length)

    @classmethod
    def read(cls, buffer: Buffer) -> "Header":
        """The header at the front of `buffer`. Raises PacketError if there is none."""
        if len(buffer) < SIZE:
            raise PacketError(f"a packet begins with {SIZE} bytes of header, found {len(buffer)}")
        magic, version, flags, step, bucket, plan, length = _FORMAT.unpack_from(buffer)
        if magic != MAGIC:
            raise PacketError(f"not a packet: found magic {magic!r}, expected {MAGIC!r}")
        if version != VERSION:
            raise PacketError(f"packet format {version} found, this mpicomp reads {VERSION}: "
                              "install the same mpicomp on every rank")
        return cls(step, bucket, plan, length, flags)
