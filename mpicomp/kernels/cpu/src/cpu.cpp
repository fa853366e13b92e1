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

#include "adacomp.h"
#include "adacomp_decode.h"
#include "block.h"
#include "cast.h"
#include "chunks.h"
#include "common.h"
#include "dorefa.h"
#include "dropping.h"
#include "dryden.h"
#include "dryden_columns.h"
#include "dryden_owed.h"
#include "dryden_strip.h"
#include "onebit_column.h"
#include "onebit_decode.h"
#include "onebit_encode.h"
#include "onebit_rows.h"
#include "philox.h"
#include "powersgd.h"
#include "randomk.h"
#include "sign.h"
#include "strom.h"
#include "sums.h"
#include "terngrad.h"
#include "topk.h"
#include "words.h"
