"""What can go wrong, by name: every error of this package derives from MpicompError."""


class MpicompError(Exception):
    """Any error that this package raises on purpose."""


class SpecError(MpicompError, ValueError):
    """A method or compressor specification that cannot be understood."""


class CheckpointError(MpicompError, OSError):
    """A checkpoint that a rank could not write (raised on every rank), or cannot read."""


class LaunchError(MpicompError, RuntimeError):
    """The job was not started the way MPI needs it, or MPI itself is missing."""


class MismatchError(MpicompError, RuntimeError):
    """The ranks disagree: another model, method, seed, dtype or step. Raised on every rank."""


class NonFiniteError(MpicompError, ArithmeticError):
    """A gradient holds NaN or Inf on some rank. Raised on every rank, in the same step."""


class PacketError(MpicompError, ValueError):
    """Bytes that are not a packet of this compressor and layout."""


class RatioError(MpicompError, RuntimeError):
    """More was sent than `require_ratio` allows. Raised on every rank, in the same step."""


class StallError(MpicompError, TimeoutError):
    """A collective waited longer than `stall_timeout` for the other ranks."""


class DeadRankError(MpicompError, RuntimeError):
    """A rank has died and the others cannot go on without it; the newest checkpoint can.

    `status`, 69, is what a program ends with that nobody catches it in (docs/exit-codes.md).
    """

    status = 69


class DeviceError(MpicompError, RuntimeError):
    """A GPU, its driver or CuPy is missing, does not fit, or has no memory left."""
