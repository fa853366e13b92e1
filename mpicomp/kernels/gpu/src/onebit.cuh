// 1-bit SGD: sign bits in words of 32 rows, two means a column, and what remains owed.
#pragma once

// A thread takes 32 rows of one column of x, or of x + more, which it keeps in `out`. It writes
// their bits (1 where v >= 0; unless `bits` is null), the first level of the folds of the negative
// and of the others, sums[2][words][columns], and how many the others are.
KERNEL onebit_signs(const float* x, const float* more, float* out, i64 rows, i64 columns, u32* bits,
                    float* sums, u32* counts) {
    const i64 words = ceil_div(rows, 32), t = thread_number();
    if (t >= words * columns) return;
    const i64 first = t / columns * 32, column = t % columns;
    float lower = 0, upper = 0;
    u32 word = 0;
    for (int k = 0; k < 32 && first + k < rows; k++) {
        const i64 i = (first + k) * columns + column;
        const float v = value(x, more, i);
        if (out) out[i] = v;
        if (v >= 0) word |= 1u << k, upper += v;  // what is left out would add +0
        else lower += v;
    }
    if (bits) bits[t] = word;
    sums[t] = lower;
    sums[words * columns + t] = upper;
    counts[t] = __popc(word);
}

// means[2][columns] from the folded sums and counts.
KERNEL onebit_means(const float* sums, const u32* counts, i64 rows, i64 columns, float* means,
                    u32* fault) {
    const i64 column = thread_number();
    if (column >= columns) return;
    const u32 above = counts[column], below = u32(rows) - above;
    means[column] = sums[column] / float(below ? below : 1u);
    means[columns + column] = sums[columns + column] / float(above ? above : 1u);
    say(fault, !finite(means[column]) || !finite(means[columns + column]));
}

// out = (fresh) or += the sum over packets of weight * the mean that each bit stands for. A packet
// is means[2][columns], bits[words][columns]. A thread takes 32 rows of one column.
KERNEL onebit_decode(const u64* packets, int count, i64 rows, i64 columns, float weight, float* out,
                     int fresh, u32* fault) {
    const i64 words = ceil_div(rows, 32), t = thread_number();
    if (t >= words * columns) return;
    const i64 first = t / columns * 32, column = t % columns;
    const int some = rows - first < 32 ? int(rows - first) : 32;
    float sum[32];
#pragma unroll
    for (int k = 0; k < 32; k++)
        sum[k] = fresh || k >= some ? 0.0f : out[(first + k) * columns + column];
    for (int p = 0; p < count; p++) {
        const float* means = reinterpret_cast<const float*>(packets[p]);
        const u32 word = reinterpret_cast<const u32*>(means + 2 * columns)[t];
        const float lower = means[column], upper = means[columns + column];
        say(fault, !finite(lower) || !finite(upper));
        const float low = lower * weight, up = upper * weight;
#pragma unroll
        for (int k = 0; k < 32; k++) sum[k] += word >> k & 1 ? up : low;
    }
#pragma unroll
    for (int k = 0; k < 32; k++)
        if (k < some) out[(first + k) * columns + column] = sum[k];
}
