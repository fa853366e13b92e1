"""The kernels for device arrays: src/gpu.cu, compiled by NVRTC through CuPy at the first launch.

`reference` says what each function does; the bytes and floats are the same. Arguments `x`, `out`
and `data` are device arrays. Numbers (a scale, a cut) may be on the device too, and those that are
returned are, so that the host does not wait for them; lengths are read back. What has no CUDA
kernel is done by the reference on copies in host memory: docs/gpu.md lists it.

Importing this imports neither CuPy nor anything of CUDA.
"""

# ruff: noqa: F401 - what this backend offers

from mpicomp.kernels.gpu.adacomp import (
    adacomp_decode_add,
    adacomp_decode_layers,
    adacomp_decode_sum,
    adacomp_encode,
    adacomp_encode_layers,
    adacomp_heads,
)
from mpicomp.kernels.gpu.arguments import deferred
from mpicomp.kernels.gpu.block import (
    block_decode_add,
    block_decode_sum,
    block_encode,
    block_encode_owed,
)
from mpicomp.kernels.gpu.cast import (
    cast_decode_add,
    cast_decode_sum,
    cast_encode,
    dense_decode_add,
    dense_decode_sum,
    dense_scale,
)
from mpicomp.kernels.gpu.chunks import (
    chunks_decode_add,
    chunks_decode_sum,
    chunks_encode,
    chunks_encode_owed,
)
from mpicomp.kernels.gpu.dorefa import (
    dorefa_decode_add,
    dorefa_decode_sum,
    dorefa_encode,
    dorefa_encode_owed,
    dorefa_scale,
)
from mpicomp.kernels.gpu.dropping import (
    dropping_cut,
    dropping_decode_add,
    dropping_decode_sum,
    dropping_encode_owed,
    dropping_select,
    dropping_signs,
    dropping_signs_decode_add,
    dropping_signs_encode,
    dropping_values,
)
from mpicomp.kernels.gpu.dryden import (
    dryden_columns,
    dryden_decode_add_2016,
    dryden_decode_add_2017,
    dryden_decode_sum_2016,
    dryden_encode_2016,
    dryden_encode_2017,
    dryden_encode_owed_2016,
    dryden_matrix,
)
from mpicomp.kernels.gpu.onebit import (
    onebit_decode_add,
    onebit_decode_add_bits,
    onebit_decode_add_cntk,
    onebit_decode_sum,
    onebit_decode_sum_bits,
    onebit_decode_sum_cntk,
    onebit_encode,
    onebit_encode_bits,
    onebit_encode_cntk,
    onebit_encode_mean,
    onebit_encode_owed,
)
from mpicomp.kernels.gpu.powersgd import (
    powersgd_decode_add,
    powersgd_encode,
    powersgd_learn,
    powersgd_project,
)
from mpicomp.kernels.gpu.randomk import randomk_decode_add, randomk_encode
from mpicomp.kernels.gpu.sign import (
    sign_decode_add,
    sign_decode_sum,
    sign_encode,
    sign_encode_owed,
)
from mpicomp.kernels.gpu.strom import (
    strom_2bit_decode_add,
    strom_2bit_encode,
    strom_decode_add,
    strom_decode_sum,
    strom_encode,
    strom_encode_owed,
    strom_rice_decode_add,
    strom_rice_encode,
    strom_tau,
)
from mpicomp.kernels.gpu.sums import adagrad, copy_finite, finite, within, zeros
from mpicomp.kernels.gpu.terngrad import (
    terngrad_decode_add,
    terngrad_decode_add_5trit,
    terngrad_decode_sum,
    terngrad_encode,
    terngrad_encode_5trit,
    terngrad_scale,
    terngrad_scale_code,
)
from mpicomp.kernels.gpu.topk import topk_select
