"""The levels of vector instructions that this process has, and how compiled kernels are set."""

from mpicomp import kernels

cpu = kernels.backends().get("cpu")
NAMES = cpu.LEVELS[:cpu.library.MOST_VECTORS + 1] if cpu else ()  # what this machine has
MOST = len(NAMES) - 1  # its best level; -1 without compiled kernels
_BEFORE = (cpu.vectors(), cpu.threads()) if cpu else None


def run_with(level, threads=1, grain=1 << 17, stream=1 << 20):
    """Sets level, threads, elements for a thread, elements from which on stores are streamed."""
    assert cpu.vectors(level) == level, f"this machine has no {cpu.LEVELS[level]}"
    cpu.threads(threads)
    cpu.limits(grain, stream)


def reset():
    """As the process began."""
    if cpu:
        run_with(*_BEFORE)
