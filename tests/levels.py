"""How the compiled kernels run: the levels of vector instructions that this process has, threads."""

from mpicomp import kernels

cpu = kernels.backends().get("cpu")
MOST = cpu.library.MOST_VECTORS if cpu else 0  # a place in cpu.LEVELS: this machine's best
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
