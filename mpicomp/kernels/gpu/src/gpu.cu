// The CUDA kernels, one translation unit: NVRTC compiles it when the first device array comes.
//
// Everything is written so that the bytes do not depend on how a launch is scheduled: an element's
// random word is a function of its number, sums follow `fold` of the reference, atomics only take
// a maximum or count (both exact in any order), and what is selected keeps its order by counting.
// Options: --fmad=false (no multiply-add that rounds once) and no fast math.
#include "common.cuh"
#include "philox.cuh"
#include "fold.cuh"
#include "tiles.cuh"
#include "select.cuh"
#include "floats.cuh"
#include "words.cuh"
#include "strom.cuh"
#include "dropping.cuh"
#include "chunks.cuh"
#include "randomk.cuh"
#include "onebit.cuh"
#include "onebit_cntk.cuh"
#include "terngrad.cuh"
#include "dorefa.cuh"
#include "block.cuh"
#include "sign.cuh"
#include "dryden.cuh"
#include "adacomp.cuh"
