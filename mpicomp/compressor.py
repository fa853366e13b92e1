"""The names that a compressor of one's own is written with: see docs/adding-a-compressor.md."""

from mpicomp.compressors.base import LARGEST, Compressor, State
from mpicomp.compressors.options import check_options, option
from mpicomp.compressors.registry import find, from_spec, register, registry
from mpicomp.errors import PacketError, SpecError

__all__ = ["LARGEST", "Compressor", "PacketError", "SpecError", "State", "check_options", "find",
           "from_spec", "option", "register", "registry"]
