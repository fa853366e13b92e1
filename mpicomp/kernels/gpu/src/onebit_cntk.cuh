// CNTK's forms of 1-bit SGD: its wire, the threshold at the mean, and 2, 4 or 8 bits an element.
#pragma once

constexpr float CLOSE = 1e-36f;  // a range that is smaller than this is a single value

// Where a packet has what, in words of 32 bits that hold 32 / bits codes each, the first lowest.
// means: float pairs[2][columns], words[count][columns], row i in word i / (32 / bits). cntk: per
// column a pair of floats and words[count], row i in word i % count.
struct Columns {
    i64 rows, columns, count;
    int each;
    bool cntk;

    __device__ Columns(i64 rows, i64 columns, int bits, int cntk)
        : rows(rows), columns(columns), count(ceil_div(rows * bits, 32)), each(32 / bits),
          cntk(cntk) {}

    __device__ i64 pair(int which, i64 column) const {
        return cntk ? column * (2 + count) + which : which * columns + column;
    }

    __device__ i64 word(i64 w, i64 column) const {
        return cntk ? column * (2 + count) + 2 + w : (2 + w) * columns + column;
    }

    __device__ i64 row(i64 w, int k) const { return cntk ? w + k * count : w * each + k; }

    __device__ void keep(u32* packet, i64 column, float first, float second) const {
        packet[pair(0, column)] = bits_of(first);
        packet[pair(1, column)] = bits_of(second);
    }
};

// ---- encoding -----------------------------------------------------------------------------------

// The first level of the folds of each column of x, or of |x - means|: sums[blocks][columns]. A
// thread takes 32 rows of one column.
KERNEL onebit_column_sums(const float* x, const float* means, i64 rows, i64 columns, float* sums) {
    const i64 t = thread_number(), first = t / columns * 32, column = t % columns;
    if (first >= rows) return;
    float sum = 0;
    for (i64 row = first; row < first + 32 && row < rows; row++) {
        const float v = x[row * columns + column];
        sum += means ? fabsf(v - means[column]) : v;
    }
    sums[t] = sum;
}

// The same of the squares, in double.
KERNEL onebit_column_squares(const float* x, i64 rows, i64 columns, double* sums) {
    const i64 t = thread_number(), first = t / columns * 32, column = t % columns;
    if (first >= rows) return;
    double sum = 0;
    for (i64 row = first; row < first + 32 && row < rows; row++) {
        const double v = x[row * columns + column];
        sum += v * v;
    }
    sums[t] = sum;
}

KERNEL onebit_column_means(const float* sums, i64 rows, i64 columns, float* means) {
    const i64 column = thread_number();
    if (column < columns) means[column] = sums[column] / float(rows);
}

// The bounds that CNTK sends for means[2][columns] of the negative and of the others.
KERNEL onebit_bounds_about_zero(const float* means, i64 rows, i64 columns, u32* packet) {
    const i64 column = thread_number();
    if (column >= columns) return;
    const float upper = means[columns + column], centre = (means[column] + upper) * 0.5f;
    const float radius = (upper - centre) * 2.0f;
    Columns(rows, columns, 1, true).keep(packet, column, centre - radius, centre + radius);
}

// mean -+ the mean distance from it, whose folded sums are `sums`; -+ twice that for cntk.
KERNEL onebit_bounds_about_mean(const float* means, const float* sums, i64 rows, i64 columns,
                                int cntk, u32* packet) {
    const i64 column = thread_number();
    if (column >= columns) return;
    const float mean = means[column], reach = sums[column] / float(rows) * (cntk ? 2.0f : 1.0f);
    Columns(rows, columns, 1, cntk).keep(packet, column, mean - reach, mean + reach);
}

// -+ 4 standard deviations about 0, from the folded sums of squares.
KERNEL onebit_bounds_of_squares(const double* sums, i64 rows, i64 columns, int bits, int cntk,
                                u32* packet) {
    const i64 column = thread_number();
    if (column >= columns) return;
    const float upper = float(4 * sqrt(sums[column] / double(rows)));
    Columns(rows, columns, bits, cntk).keep(packet, column, -upper, upper);
}

// A thread writes one word of codes, behind the pairs of a packet. bits = 1: v >= means[column],
// or >= 0 where that is null. More: the step between the column's bounds that v is in.
KERNEL onebit_code_bits(const float* x, const float* means, i64 rows, i64 columns, int bits,
                        int cntk, u32* packet) {
    const Columns in(rows, columns, bits, cntk);
    const i64 t = thread_number(), w = t / columns, column = t % columns;
    if (w >= in.count) return;
    const float cut = means ? means[column] : 0.0f;
    const float lower = float_of(packet[in.pair(0, column)]);
    const float upper = float_of(packet[in.pair(1, column)]), width = upper - lower;
    const u32 steps = (1u << bits) - 1;
    const float factor = width < CLOSE ? 0.0f : float(steps) / width;
    u32 word = 0;
    for (int k = 0; k < in.each && in.row(w, k) < rows; k++) {
        const float v = x[in.row(w, k) * columns + column];
        u32 code;
        if (bits == 1) {
            code = v >= cut;
        } else if (v <= lower) {
            code = 0;
        } else if (v >= upper) {
            code = steps;
        } else {
            const float scaled = (v - lower) * factor;
            code = scaled > 0 ? u32(scaled) : 0;  // NaN where the width is infinite
        }
        word |= code << k * bits;
    }
    packet[in.word(w, column)] = word;
}

// ---- decoding -----------------------------------------------------------------------------------

// weight * (code + 0.5 steps above `lower`). Of one bit CNTK takes half of the width for a step.
template <int BITS> struct Levels {
    float lower, step, weight;
    bool single;

    __device__ Levels(float lower, float upper, float weight) : lower(lower), weight(weight) {
        const float width = upper - lower;
        single = width < CLOSE;
        step = BITS == 1 ? width * 0.5f : single ? 0.0f : width / float((1u << BITS) - 1);
    }

    __device__ float of(u32 code) const {
        return (BITS == 1 && single ? lower : (float(code) + 0.5f) * step + lower) * weight;
    }
};

template <int BITS>
__device__ void decode_columns(const u64* packets, int count, const Columns& in, float weight,
                               float* out, bool fresh, u32* fault) {
    constexpr int EACH = 32 / BITS;
    const i64 t = thread_number(), w = t / in.columns, column = t % in.columns;
    if (w >= in.count) return;
    float sum[EACH];
#pragma unroll
    for (int k = 0; k < EACH; k++)
        sum[k] = fresh || in.row(w, k) >= in.rows ? 0.0f : out[in.row(w, k) * in.columns + column];
    for (int p = 0; p < count; p++) {
        const u32* packet = reinterpret_cast<const u32*>(packets[p]);
        const float lower = float_of(packet[in.pair(0, column)]);
        const float upper = float_of(packet[in.pair(1, column)]);
        const u32 word = packet[in.word(w, column)];
        const Levels<BITS> levels(lower, upper, weight);
        if (BITS == 1)
            say(fault, !finite(lower) || !finite(upper) || !finite(levels.of(0)) ||
                           !finite(levels.of(1)));
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const float v = levels.of(word >> k * BITS & ((1u << BITS) - 1));
            say(fault, in.row(w, k) < in.rows && !finite(v));
            sum[k] += v;
        }
    }
#pragma unroll
    for (int k = 0; k < EACH; k++)
        if (in.row(w, k) < in.rows) out[in.row(w, k) * in.columns + column] = sum[k];
}

// out = (fresh) or += the sum over packets of weight * what the codes stand for. A thread takes the
// codes of one word.
KERNEL onebit_decode_bits(const u64* packets, int count, i64 rows, i64 columns, int bits, int cntk,
                          float weight, float* out, int fresh, u32* fault) {
    const Columns in(rows, columns, bits, cntk);
    if (bits == 1) decode_columns<1>(packets, count, in, weight, out, fresh, fault);
    if (bits == 2) decode_columns<2>(packets, count, in, weight, out, fresh, fault);
    if (bits == 4) decode_columns<4>(packets, count, in, weight, out, fresh, fault);
    if (bits == 8) decode_columns<8>(packets, count, in, weight, out, fresh, fault);
}
