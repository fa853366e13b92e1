"""The compiled kernels for NumPy arrays: cpu.cpp, called through ctypes.

See `reference` for what each function does. A call that does not fit (another dtype, gaps between
elements, too small a buffer) and a function that is missing here go to the reference, which
serves it or says what is wrong. The functions called `*_owed` and `*_sum` exist here only: several
steps of a compressor in one pass over memory; `out` of an `*_owed` may be `owed`.

Importing this raises OSError where the extension was not compiled, or from other sources, and
SpecError where MPICOMP_VECTORS asks for instructions that are not there. MPICOMP_VECTORS=none|avx2|
avx512 is the most that a process uses; unset, it is what the CPU has. The bytes are the same with
all. Threads: as many as OMP_NUM_THREADS says, else one, because the ranks of a node already share
its cores.
"""

from mpicomp.kernels import reference
from mpicomp.kernels.cpu.adacomp import *  # noqa: F403
from mpicomp.kernels.cpu.cast import *  # noqa: F403
from mpicomp.kernels.cpu.dorefa import *  # noqa: F403
from mpicomp.kernels.cpu.dropping import *  # noqa: F403
from mpicomp.kernels.cpu.dryden import *  # noqa: F403
from mpicomp.kernels.cpu.library import LEVELS, limits, threads, vectors  # noqa: F401
from mpicomp.kernels.cpu.onebit import *  # noqa: F403
from mpicomp.kernels.cpu.strom import *  # noqa: F403
from mpicomp.kernels.cpu.sums import *  # noqa: F403
from mpicomp.kernels.cpu.ternary import *  # noqa: F403


def __getattr__(name):
    return getattr(reference, name)
