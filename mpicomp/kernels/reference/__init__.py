"""The reference kernels in NumPy: the specification of every byte and every float.

A kernel in another backend has the same name and arguments and must give the same bits. So the
arithmetic is written out: all floats are IEEE float32 (float64 where it is said), no operation is
fused with another, and sums follow `sums.fold`. Buffers belong to the caller. NumPy allocates
temporaries inside of these functions; compiled backends do not.

Arguments throughout: `x` float32[n], the input, never written; `out` float32[n], added to;
`data` uint8[...], payload bytes; `weight` a Python float, rounded to float32 before use.
"""

# ruff: noqa: F401 - what this backend offers

from mpicomp.kernels.reference.adacomp import (
    adacomp_decode_add,
    adacomp_decode_layers,
    adacomp_decode_sum,
    adacomp_encode,
    adacomp_encode_layers,
    adacomp_heads,
    adacomp_packet,
    adacomp_select,
    adacomp_width,
)
from mpicomp.kernels.reference.block import (
    BLOCK_E4M3,
    BLOCK_LEAST,
    block_bytes,
    block_codes,
    block_decode_add,
    block_decode_sum,
    block_encode,
    block_encode_owed,
    block_most,
    block_rounded,
    block_scales,
    block_width,
)
from mpicomp.kernels.reference.cast import (
    cast_decode_add,
    cast_decode_sum,
    cast_encode,
    cast_widen,
    dense_decode_add,
    dense_decode_sum,
    dense_scale,
)
from mpicomp.kernels.reference.chunks import (
    MOST_BLOCK,
    chunks_decode_add,
    chunks_decode_sum,
    chunks_encode,
    chunks_encode_owed,
    chunks_expect_finite,
    chunks_levels,
    chunks_pack,
    chunks_plan,
    chunks_select,
    chunks_size,
    chunks_sizes,
    chunks_step,
    chunks_unpack,
)
from mpicomp.kernels.reference.dorefa import (
    DOREFA_INTEGERS,
    dorefa_codes,
    dorefa_decode_add,
    dorefa_decode_sum,
    dorefa_encode,
    dorefa_encode_owed,
    dorefa_pack,
    dorefa_scale,
    dorefa_size,
    dorefa_unpack,
)
from mpicomp.kernels.reference.dropping import (
    MARIAN,
    dropping_cut,
    dropping_decode_add,
    dropping_decode_sum,
    dropping_encode_owed,
    dropping_sample,
    dropping_select,
    dropping_signs,
    dropping_signs_decode_add,
    dropping_signs_encode,
    dropping_values,
)
from mpicomp.kernels.reference.dryden import (
    dryden_columns,
    dryden_decode_add_2016,
    dryden_decode_add_2017,
    dryden_decode_sum_2016,
    dryden_draws,
    dryden_encode_2016,
    dryden_encode_2017,
    dryden_encode_owed_2016,
    dryden_kept,
    dryden_matrix,
    dryden_means,
    dryden_word,
)
from mpicomp.kernels.reference.onebit import (
    onebit_decode_add,
    onebit_decode_sum,
    onebit_encode,
    onebit_encode_owed,
    onebit_means,
    onebit_words,
)
from mpicomp.kernels.reference.onebit_cntk import (
    onebit_codes,
    onebit_decode_add_bits,
    onebit_decode_add_cntk,
    onebit_decode_sum_bits,
    onebit_decode_sum_cntk,
    onebit_encode_bits,
    onebit_encode_cntk,
    onebit_encode_mean,
    onebit_mean_bits,
    onebit_pack,
    onebit_unpack,
)
from mpicomp.kernels.reference.powersgd import (
    powersgd_decode_add,
    powersgd_dot,
    powersgd_encode,
    powersgd_learn,
    powersgd_orthonormal,
    powersgd_project,
    powersgd_sizes,
)
from mpicomp.kernels.reference.randomk import (
    randomk_decode_add,
    randomk_encode,
    randomk_places,
)
from mpicomp.kernels.reference.rice import (
    rice_pack,
    rice_parameter,
    rice_unpack,
    strom_rice_decode_add,
    strom_rice_encode,
)
from mpicomp.kernels.reference.sign import (
    sign_bytes,
    sign_decode_add,
    sign_decode_sum,
    sign_encode,
    sign_encode_owed,
    sign_groups,
    sign_scales,
)
from mpicomp.kernels.reference.strom import (
    strom_2bit_decode_add,
    strom_2bit_encode,
    strom_decode_add,
    strom_decode_sum,
    strom_encode,
    strom_encode_owed,
    strom_sent,
    strom_tau,
)
from mpicomp.kernels.reference.sums import (
    adagrad,
    copy_finite,
    finite,
    fold,
    sample,
    total,
    within,
    zeros,
)
from mpicomp.kernels.reference.terngrad import (
    terngrad_codes,
    terngrad_decode_add,
    terngrad_decode_add_5trit,
    terngrad_decode_sum,
    terngrad_encode,
    terngrad_encode_5trit,
    terngrad_pack,
    terngrad_scale,
    terngrad_scale_code,
    terngrad_size,
    terngrad_unpack,
)
from mpicomp.kernels.reference.topk import topk_keeps, topk_select
