"""The compiled kernels for NumPy arrays: src/cpu.cpp, called through ctypes.

`reference` says what each function does. It also serves every call that does not fit here (another
dtype, gaps between elements, too small a buffer), or says what is wrong with it, and lends the
functions that are not compiled.

Importing this raises OSError where the extension was not compiled, or from other sources, and
SpecError where MPICOMP_VECTORS asks for instructions that are not there. MPICOMP_VECTORS=none|avx2|
avx512 is the most that a process uses; unset, it is what the CPU has. The bytes are the same with
all. Threads: as many as OMP_NUM_THREADS says, else one, because the ranks of a node already share
its cores.
"""

# ruff: noqa: F401 - what this backend offers

from mpicomp.kernels.cpu.adacomp import (
    adacomp_decode_add,
    adacomp_decode_layers,
    adacomp_decode_sum,
    adacomp_encode,
    adacomp_encode_layers,
)
from mpicomp.kernels.cpu.block import (
    block_decode_add,
    block_decode_sum,
    block_encode,
    block_encode_owed,
)
from mpicomp.kernels.cpu.cast import (
    cast_decode_add,
    cast_decode_sum,
    cast_encode,
    dense_decode_add,
    dense_decode_sum,
    dense_scale,
)
from mpicomp.kernels.cpu.chunks import (
    chunks_decode_add,
    chunks_decode_sum,
    chunks_encode,
    chunks_encode_owed,
)
from mpicomp.kernels.cpu.dorefa import (
    dorefa_decode_add,
    dorefa_decode_sum,
    dorefa_encode,
    dorefa_encode_owed,
    dorefa_scale,
)
from mpicomp.kernels.cpu.dropping import (
    dropping_cut,
    dropping_decode_add,
    dropping_decode_sum,
    dropping_encode_owed,
    dropping_select,
    dropping_signs_encode,
    dropping_values,
)
from mpicomp.kernels.cpu.dryden import (
    dryden_columns,
    dryden_decode_add_2016,
    dryden_decode_sum_2016,
    dryden_encode_2016,
    dryden_encode_owed_2016,
)
from mpicomp.kernels.cpu.library import LEVELS, limits, threads, vectors
from mpicomp.kernels.cpu.onebit import (
    onebit_decode_add,
    onebit_decode_sum,
    onebit_encode,
    onebit_encode_owed,
)
from mpicomp.kernels.cpu.powersgd import (
    powersgd_decode_add,
    powersgd_encode,
    powersgd_learn,
    powersgd_project,
)
from mpicomp.kernels.cpu.randomk import randomk_decode_add, randomk_encode
from mpicomp.kernels.cpu.sign import (
    sign_decode_add,
    sign_decode_sum,
    sign_encode,
    sign_encode_owed,
)
from mpicomp.kernels.cpu.strom import (
    strom_decode_add,
    strom_decode_sum,
    strom_encode,
    strom_encode_owed,
)
from mpicomp.kernels.cpu.sums import adagrad, copy_finite, finite
from mpicomp.kernels.cpu.terngrad import (
    terngrad_decode_add,
    terngrad_decode_sum,
    terngrad_encode,
    terngrad_scale,
    terngrad_scale_code,
)
from mpicomp.kernels.cpu.topk import topk_select
from mpicomp.kernels.reference import (
    adacomp_heads,
    dropping_signs,
    dropping_signs_decode_add,
    dryden_decode_add_2017,
    dryden_encode_2017,
    dryden_matrix,
    onebit_decode_add_bits,
    onebit_decode_add_cntk,
    onebit_decode_sum_bits,
    onebit_decode_sum_cntk,
    onebit_encode_bits,
    onebit_encode_cntk,
    onebit_encode_mean,
    strom_2bit_decode_add,
    strom_2bit_encode,
    strom_rice_decode_add,
    strom_rice_encode,
    strom_tau,
    terngrad_decode_add_5trit,
    terngrad_encode_5trit,
    within,
    zeros,
)
