// Packets that name elements by ascending indices: what one packet adds to `out`.
//
// Packets are added one launch after the other, so that every element is added to in their order;
// the indices of one packet are distinct, so no two threads meet. A word that is out of order or
// beyond the end is a fault and adds nothing.
#pragma once

__device__ inline bool in_order(i64 before, i64 index, i64 n) {
    return before < index && index < n;
}

// uint32 index << 1 | positive: out += +-quantum.
KERNEL words_add(const u32* words, i64 count, float quantum, float* out, i64 n, u32* fault) {
    const i64 k = thread_number();
    if (k >= count) return;
    const i64 index = words[k] >> 1, before = k ? i64(words[k - 1] >> 1) : -1;
    const bool fits = in_order(before, index, n);
    say(fault, !fits);
    if (fits) out[index] += words[k] & 1 ? quantum : -quantum;
}

// The same with the weighted means of each column: means[2][columns] of negatives and positives.
KERNEL words_add_means(const u32* words, i64 count, const float* means, i64 columns, float weight,
                       float* out, i64 n, u32* fault) {
    const i64 k = thread_number();
    if (k >= count) return;
    const i64 index = words[k] >> 1, before = k ? i64(words[k - 1] >> 1) : -1;
    const bool fits = in_order(before, index, n);
    say(fault, !fits);
    if (fits) out[index] += means[(words[k] & 1) * columns + index % columns] * weight;
}

// The same with the means of the scope that the element lies in: means[scopes][2]. Scope s begins
// at starts[s]; where several begin at one element it lies in the last.
KERNEL words_add_scopes(const u32* words, i64 count, const float* means, const i64* starts,
                        i64 scopes, float weight, float* out, i64 n, u32* fault) {
    const i64 k = thread_number();
    if (k >= count) return;
    const i64 index = words[k] >> 1, before = k ? i64(words[k - 1] >> 1) : -1;
    const bool fits = in_order(before, index, n);
    say(fault, !fits);
    if (!fits) return;
    i64 scope = 0, end = scopes;  // scope + 1 < end: starts[scope] <= index < starts[end]
    while (scope + 1 < end) {
        const i64 middle = scope + (end - scope) / 2;
        if (starts[middle] <= index) scope = middle;
        else end = middle;
    }
    out[index] += means[2 * scope + (words[k] & 1)] * weight;
}

// int32 index[count] and float32 values[count]: out += weight * value.
KERNEL values_add(const int* indices, const float* values, i64 count, float weight, float* out,
                  i64 n, u32* fault) {
    const i64 k = thread_number();
    if (k >= count) return;
    const i64 index = indices[k], before = k ? i64(indices[k - 1]) : -1;
    const bool fits = index >= 0 && in_order(before, index, n) && finite(values[k]);
    say(fault, !fits);
    if (fits) out[index] += weight * values[k];
}
