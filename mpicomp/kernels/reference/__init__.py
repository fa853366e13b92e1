"""The reference kernels in NumPy: the specification of every byte and every float.

A kernel in another backend has the same name and arguments and must give the same bits. So the
arithmetic is written out: all floats are IEEE float32 (float64 where it is said), no operation is
fused with another, and sums follow `sums.fold`. Buffers belong to the caller. NumPy allocates
temporaries inside of these functions; compiled backends do not.

Arguments throughout: `x` float32[n], the input, never written; `out` float32[n], added to;
`data` uint8[...], payload bytes; `weight` a Python float, rounded to float32 before use.
"""

from mpicomp.kernels.reference.adacomp import *  # noqa: F403
from mpicomp.kernels.reference.cast import *  # noqa: F403
from mpicomp.kernels.reference.columns import *  # noqa: F403
from mpicomp.kernels.reference.dorefa import *  # noqa: F403
from mpicomp.kernels.reference.dropping import *  # noqa: F403
from mpicomp.kernels.reference.dryden import *  # noqa: F403
from mpicomp.kernels.reference.onebit import *  # noqa: F403
from mpicomp.kernels.reference.rice import *  # noqa: F403
from mpicomp.kernels.reference.strom import *  # noqa: F403
from mpicomp.kernels.reference.sums import *  # noqa: F403
from mpicomp.kernels.reference.ternary import *  # noqa: F403
