"""The kernels for device arrays: gpu.cu, compiled by NVRTC through CuPy when the first one comes.

See `reference` for what each function does; the bytes and floats are the same. Arguments `x`,
`out` and `data` lie on the device, numbers (a scale, a cut) may lie there as well, and those that
are returned do, so that nothing is waited for; lengths are read back. The functions called
`*_owed` and `*_sum` are several steps of a compressor in one pass. What is missing here is done by
the CPU kernels on copies in host memory; docs/gpu.md says what that is.

Importing this imports neither CuPy nor anything of CUDA.
"""

from types import FunctionType

from mpicomp.kernels import reference
from mpicomp.kernels.gpu.adacomp import *  # noqa: F403
from mpicomp.kernels.gpu.arguments import deferred, on_host  # noqa: F401
from mpicomp.kernels.gpu.cast import *  # noqa: F403
from mpicomp.kernels.gpu.dorefa import *  # noqa: F403
from mpicomp.kernels.gpu.dropping import *  # noqa: F403
from mpicomp.kernels.gpu.dryden import *  # noqa: F403
from mpicomp.kernels.gpu.onebit import *  # noqa: F403
from mpicomp.kernels.gpu.strom import *  # noqa: F403
from mpicomp.kernels.gpu.sums import *  # noqa: F403
from mpicomp.kernels.gpu.ternary import *  # noqa: F403


def __getattr__(name):
    if not name.startswith("_") and isinstance(getattr(reference, name, None), FunctionType):
        return on_host(name)
    raise AttributeError(f"there is no kernel {name!r}")
