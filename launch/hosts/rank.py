"""Each rank of launch/run starts this: `python -m mpi4py`, with tracebacks that name their rank.

mpi4py ends the whole job when one rank raises. That kills the others in the middle of their own
tracebacks, so here each one is written in one piece, and the others get a second to write theirs.
"""

import ctypes
import os
import signal
import socket
import sys
import time
import traceback

from mpi4py.run import main

GRACE = 1.0  # seconds between a rank's traceback and the end of all ranks
LAUNCHERS = (__file__, sys.modules[main.__module__].__file__, "<frozen runpy>")


def placed(*names):
    """The number in the first of these environment variables that is set, or 0."""
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


RANK = placed("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
SIZE = placed("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def tell(text):
    """Write `text` to stderr in one piece, each line tagged, and give the others their turn."""
    tag = f"[rank {RANK} of {SIZE} on {socket.gethostname()}] "
    if os.environ.get("MPICOMP_TAG") == "0":
        tag = ""
    time.sleep(min(0.05 * RANK, GRACE / 2))  # mpirun passes on 4 kB at a time: take turns
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, "".join(f"{tag}{line}\n" for line in text.splitlines()).encode())
    time.sleep(GRACE)


def tell_traceback(kind, error, tb):
    """sys.excepthook: the traceback, from the script's own first line on."""
    inner = tb
    while inner and inner.tb_frame.f_code.co_filename in LAUNCHERS:
        inner = inner.tb_next
    tell("".join(traceback.format_exception(kind, error, inner or tb)))


if __name__ == "__main__":
    # mpirun leaves ranks alive that handle SIGTERM, or whose mpirun was killed: follow it instead.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.environ.get("MPICOMP_TTY") == "0":  # Open MPI gives every rank a terminal of its own
        sys.stdout.isatty = lambda: False
    sys.excepthook = tell_traceback
    sys.path[0] = os.getcwd()  # as for `python -m`; main() sets it anew for a script
    try:
        main()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            tell(stop.code)
            sys.exit(1)
        if stop.code:
            time.sleep(GRACE)
        raise
