// What all kernels share: types, the geometry of a launch, and how a fault is told.
#pragma once

typedef signed char s8;
typedef unsigned char u8;
typedef short s16;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int THREADS = 256;  // in every block of every launch
constexpr int WARPS = THREADS / 32;
constexpr u32 FULL = 0xFFFFFFFFu;

// A launch has as many threads as there is work, rounded up to whole blocks; each asks for its
// number, in 64 bits, and returns if that is too large (not so where a barrier follows).
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)

__device__ inline i64 thread_number() { return i64(blockIdx.x) * THREADS + threadIdx.x; }
__device__ inline u32 lane() { return threadIdx.x % 32; }
__device__ inline u32 warp() { return threadIdx.x / 32; }

__device__ inline u32 bits_of(float x) { return __float_as_uint(x); }
__device__ inline float float_of(u32 bits) { return __uint_as_float(bits); }

__device__ inline bool finite(float x) { return (bits_of(x) & 0x7F800000u) != 0x7F800000u; }

__device__ inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// What a compressor is given: x, or what is owed plus the newest gradient. NumPy adds in the same
// order, and an addition rounds alike either way round.
__device__ inline float value(const float* x, const float* more, i64 i) {
    return more ? x[i] + more[i] : x[i];
}

// A kernel that finds what no encoder wrote, or a number that is not finite, says so here; the host
// reads it afterwards. All threads that write it write the same.
__device__ inline void say(u32* fault, bool bad) {
    if (bad) *fault = 1;
}
