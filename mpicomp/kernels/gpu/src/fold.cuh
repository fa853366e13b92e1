// Sums in the one order that all backends follow, and the largest magnitude.
#pragma once

// One level of `fold` (reference/sums.py): each block of 32 consecutive rows, summed one row after
// the other from zero. in[planes][rows][columns], out[planes][ceil(rows / 32)][columns]; a thread
// makes one sum, neighbours read neighbouring columns.
template <class T>
__device__ void fold_level(const T* in, i64 planes, i64 rows, i64 columns, T* out) {
    const i64 blocks = ceil_div(rows, 32), t = thread_number();
    if (t >= planes * blocks * columns) return;
    const i64 column = t % columns, block = t / columns % blocks, plane = t / columns / blocks;
    const i64 end = block * 32 + 32 < rows ? block * 32 + 32 : rows;
    T sum = 0;
    for (i64 row = block * 32; row < end; row++) sum += in[(plane * rows + row) * columns + column];
    out[t] = sum;
}

KERNEL fold_floats(const float* in, i64 planes, i64 rows, i64 columns, float* out) {
    fold_level(in, planes, rows, columns, out);
}

KERNEL fold_doubles(const double* in, i64 planes, i64 rows, i64 columns, double* out) {
    fold_level(in, planes, rows, columns, out);
}

KERNEL fold_counts(const u32* in, i64 planes, i64 rows, i64 columns, u32* out) {
    fold_level(in, planes, rows, columns, out);
}

// `total` of the reference: 32 lanes, element i in lane i % 32. The first level of each lane's
// fold; missing elements are zeros, which change no sum that began with +0.
KERNEL total_floats(const float* in, i64 n, float* out) {
    const i64 t = thread_number(), begin = t / 32 * 1024 + t % 32;
    if (t / 32 * 1024 >= n) return;
    float sum = 0;
    for (i64 i = begin; i < begin + 1024 && i < n; i += 32) sum += in[i];
    out[t] = sum;
}

// The largest |x| as bits, which are ordered as the magnitudes are. *largest starts at 0.
KERNEL largest_magnitude(const float* x, i64 n, u32* largest) {
    u32 most = 0;
    for (i64 i = thread_number(); i < n; i += i64(gridDim.x) * THREADS) {
        const u32 bits = bits_of(x[i]) & 0x7FFFFFFFu;
        if (bits > most) most = bits;
    }
    for (int reach = 16; reach; reach /= 2) {
        const u32 other = __shfl_xor_sync(FULL, most, reach);
        if (other > most) most = other;
    }
    if (lane() == 0) atomicMax(largest, most);
}

KERNEL all_finite(const float* x, i64 n, u32* fault) {
    for (i64 i = thread_number(); i < n; i += i64(gridDim.x) * THREADS) say(fault, !finite(x[i]));
}

KERNEL all_within(const float* x, i64 n, float least, float most, u32* fault) {
    for (i64 i = thread_number(); i < n; i += i64(gridDim.x) * THREADS)
        say(fault, !(least <= x[i] && x[i] <= most));
}

// ahead = history + x * x; x /= sqrt(ahead) + 1e-8.
KERNEL adagrad(float* x, i64 n, const float* history, float* ahead) {
    const i64 i = thread_number();
    if (i >= n) return;
    const float sum = history[i] + x[i] * x[i];
    ahead[i] = sum;
    x[i] = x[i] / (sqrtf(sum) + 1e-8f);
}
