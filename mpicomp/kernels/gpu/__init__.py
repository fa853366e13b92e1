"""The kernels for device arrays: gpu.cu, compiled by NVRTC through CuPy when the first one comes.

See `reference` for what each function does; the bytes and floats are the same. Arguments `x`,
`out` and `data` lie on the device, numbers (a scale, a cut) may lie there as well, and those that
are returned do, so that nothing is waited for; lengths are read back. The functions called
`*_owed` and `*_sum` are several steps of a compressor in one pass. What is missing here is done by
the CPU kernels on copies in host memory: `on_the_host` names it.

Importing this imports neither CuPy nor anything of CUDA.
"""

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

on_the_host = ("strom_rice_encode", "strom_rice_decode_add", "drop_signs", "drop_signs_decode_add",
               "onebit_encode_cntk", "onebit_decode_add_cntk", "onebit_encode_mean",
               "columns_encode", "columns_decode_add", "dryden_matrix", "dryden_encode_2017",
               "dryden_decode_add_2017")


def __getattr__(name):
    if name in on_the_host:
        return on_host(name)
    raise AttributeError(f"there is no kernel {name!r}")
