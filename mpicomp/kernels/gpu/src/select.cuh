// Number k of n magnitudes in ascending order, by radix selection: a digit of 8 bits at a time.
#pragma once

// How often each digit occurs at `shift` among the magnitudes of elements k * span / count, rounded
// down, whose higher bits are those already found (state[0]). histogram[256] starts at 0.
KERNEL select_count(const float* x, const float* more, i64 count, i64 span, const i64* state,
                    u32 shift, u32* histogram) {
    __shared__ u32 own[256];
    own[threadIdx.x] = 0;
    __syncthreads();
    const u64 found = u64(state[0]) >> shift >> 8;
    const i64 stride = span / count, rest = span % count;
    for (i64 k = thread_number(); k < count; k += i64(gridDim.x) * THREADS) {
        const i64 i = k * stride + (rest ? k * rest / count : 0);
        const u64 bits = bits_of(value(x, more, i)) & 0x7FFFFFFFu;
        if (bits >> shift >> 8 == found) atomicAdd(&own[bits >> shift & 255], 1u);
    }
    __syncthreads();
    if (own[threadIdx.x]) atomicAdd(&histogram[threadIdx.x], own[threadIdx.x]);
}

// Fixes that digit: state = {bits found so far, number k among those that begin with them}. Clears
// the histogram; after the last digit the magnitude is written to `result`. One block.
KERNEL select_digit(i64* state, u32 shift, u32* histogram, float* result) {
    __shared__ i64 cells[WARPS];
    const i64 own = histogram[threadIdx.x], number = state[1];
    i64 all;
    const i64 before = scan<Sum>(own, 0, cells, &all);  // its barriers: all have read state
    histogram[threadIdx.x] = 0;
    if (before <= number && number < before + own) {
        state[0] |= i64(threadIdx.x) << shift;
        state[1] = number - before;
        if (shift == 0) *result = float_of(u32(state[0]));
    }
}
