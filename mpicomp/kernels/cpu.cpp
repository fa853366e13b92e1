// The compiled kernels for the CPU: the bytes and floats of kernels/reference, in fewer passes.
//
// Plain C functions that kernels/cpu calls by ctypes, which lets go of the interpreter's lock.
// Buffers belong to the caller; `data` is payload and may begin at any byte. In each file a plain
// loop says what is meant and AVX2 beside it does the same faster: additions in the same order and
// no fused multiply-add (-ffp-contract=off), so both give the same bits, with any number of
// threads.
//
// Arrays that are only written and too large for a cache are written past it (`stream`): fetching
// their old content first would be a third of the memory traffic of v = a + b.

#include "cpp/adacomp.h"
#include "cpp/adacomp_decode.h"
#include "cpp/cast.h"
#include "cpp/common.h"
#include "cpp/dorefa.h"
#include "cpp/dropping.h"
#include "cpp/dryden.h"
#include "cpp/dryden_columns.h"
#include "cpp/dryden_owed.h"
#include "cpp/dryden_strip.h"
#include "cpp/onebit_column.h"
#include "cpp/onebit_decode.h"
#include "cpp/onebit_encode.h"
#include "cpp/onebit_rows.h"
#include "cpp/philox.h"
#include "cpp/strom.h"
#include "cpp/sums.h"
#include "cpp/ternary.h"
#include "cpp/words.h"
