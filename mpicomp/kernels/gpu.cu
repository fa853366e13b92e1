// The CUDA kernels, one translation unit: NVRTC compiles it when the first device array comes.
//
// Everything is written so that the bytes do not depend on how a launch is scheduled: an element's
// random word is a function of its number, sums follow `fold` of the reference, atomics only take
// a maximum or count (both exact in any order), and what is selected keeps its order by counting.
// Options: --fmad=false (no multiply-add that rounds once) and no fast math.
#include "cuda/common.cuh"
#include "cuda/philox.cuh"
#include "cuda/fold.cuh"
#include "cuda/tiles.cuh"
#include "cuda/select.cuh"
#include "cuda/floats.cuh"
#include "cuda/words.cuh"
#include "cuda/strom.cuh"
#include "cuda/dropping.cuh"
#include "cuda/onebit.cuh"
#include "cuda/columns.cuh"
#include "cuda/ternary.cuh"
#include "cuda/dorefa.cuh"
#include "cuda/dryden.cuh"
#include "cuda/adacomp.cuh"
