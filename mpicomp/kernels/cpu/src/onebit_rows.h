// 1-bit SGD: what is summed over the rows of a matrix; what remains once the means are known.
#pragma once

#include "sums.h"

namespace {

constexpr i64 WIDEST = 1024;  // columns of a strip
constexpr i64 BELOW = 4;      // rows between the second pass and what it fetches to the first cache

// v = owed + grad is encoded, and what is still owed goes to `out`. `owed` and `out` may be null:
// then v = grad, and nothing is owed.
struct Matrix {
    const float *grad, *owed;
    float* out;
    i64 rows, columns;
    bool stream;  // is `out` written past the caches

    float v(i64 i) const { return owed ? owed[i] + grad[i] : grad[i]; }
};

// What is summed over a block of up to 32 rows: one word of bits a column, and the two sums. (The
// gaps keep the same column of all three out of each other's way in the cache.)
struct Block {
    alignas(64) float positive[WIDEST + 16], negative[WIDEST + 16];
    alignas(64) u32 word[WIDEST];
};

// Columns from ... width - 1 of `rows` rows, the first of which begins at element `at`.
void onebit_rows_plain(const Matrix& m, i64 at, int rows, i64 from, i64 width, Block& b) {
    std::fill(b.positive + from, b.positive + width, 0.0f);
    std::fill(b.negative + from, b.negative + width, 0.0f);
    std::fill(b.word + from, b.word + width, 0);
    for (int r = 0; r < rows; r++, at += m.columns)
        for (i64 c = from; c < width; c++) {
            const float v = m.v(at + c);
            const bool bit = v >= 0;
            b.word[c] |= u32(bit) << r;
            b.positive[c] += bit ? v : 0.0f;
            b.negative[c] += bit ? 0.0f : v;
        }
}

// out = v + (v >= 0 ? upper : lower) for `n` elements of a row.
void onebit_settle_plain(const Matrix& m, i64 at, i64 n, const float* lower, const float* upper) {
    for (i64 i = 0; i < n; i++) {
        const float v = m.v(at + i);
        m.out[at + i] = v + (v >= 0 ? upper[i] : lower[i]);
    }
}

#if HAVE_AVX2
// Bit r in each lane.
struct Places {
    alignas(32) u32 bit[32][8];

    constexpr Places() : bit() {
        for (int r = 0; r < 32; r++)
            for (int lane = 0; lane < 8; lane++) bit[r][lane] = u32(1) << r;
    }
};
constexpr Places PLACES;

// Asks for what a strip will read next, a line at a time, row after row: in any other order the
// memory unit would not see that lines are neighbours.
struct Ahead {
    const float* at;
    i64 width, pitch, column = 0;

    AVX2 inline void line() {
        _mm_prefetch(at + column, _MM_HINT_T1);
        column += 16;
        const bool end = column >= width;
        column = end ? 0 : column;
        at += end ? pitch : 0;
    }
};

// 8 * VECTORS columns from `at` on, all rows of the block; the sums stay in registers. max(v, 0)
// and min(0, v) are what `plain` adds: 0 may have either sign, which no sum notices, and a NaN
// comes through min.
template <bool OWED, int VECTORS>
AVX2 inline void onebit_columns_avx2(const Matrix& m, i64 at, int rows, Ahead& next, i64 c,
                                     Block& b) {
    const __m256 zero = _mm256_setzero_ps();
    const float *grad = m.grad + at, *owed = OWED ? m.owed + at : nullptr;
    const i64 pitch = m.columns;
    Ahead ahead = next;  // in registers
    __m256 up[VECTORS], low[VECTORS];
    __m256i bits[VECTORS];
    for (int k = 0; k < VECTORS; k++) up[k] = low[k] = zero, bits[k] = _mm256_setzero_si256();
    for (int r = 0; r < rows; r++, grad += pitch) {
        const __m256i place = _mm256_load_si256(reinterpret_cast<const __m256i*>(PLACES.bit[r]));
        ahead.line();
        for (int k = 0; k < VECTORS; k++) {
            __m256 v = _mm256_loadu_ps(grad + 8 * k);
            if (OWED) v = _mm256_add_ps(_mm256_loadu_ps(owed + 8 * k), v);
            const __m256i bit = _mm256_castps_si256(_mm256_cmp_ps(v, zero, _CMP_GE_OQ));
            up[k] = _mm256_add_ps(up[k], _mm256_max_ps(v, zero));
            low[k] = _mm256_add_ps(low[k], _mm256_min_ps(zero, v));
            bits[k] = _mm256_or_si256(bits[k], _mm256_and_si256(bit, place));
        }
        if (OWED) owed += pitch;
    }
    next = ahead;
    for (int k = 0; k < VECTORS; k++) {
        _mm256_store_ps(b.positive + c + 8 * k, up[k]);
        _mm256_store_ps(b.negative + c + 8 * k, low[k]);
        _mm256_store_si256(reinterpret_cast<__m256i*>(b.word + c + 8 * k), bits[k]);
    }
}

template <bool OWED>
AVX2 void onebit_rows_avx2(const Matrix& m, i64 at, int rows, i64 width, i64 ahead, Block& b) {
    Ahead next{(OWED ? m.owed : m.grad) + ahead, width, m.columns};  // grad: the second pass
    i64 c = 0;
    for (; c + 16 <= width; c += 16)
        onebit_columns_avx2<OWED, 2>(m, at + c, rows, next, c, b);
    for (; c + 8 <= width; c += 8) onebit_columns_avx2<OWED, 1>(m, at + c, rows, next, c, b);
    if (c < width) onebit_rows_plain(m, at, rows, c, width, b);
}

AVX2 void onebit_settle_avx2(const Matrix& m, i64 at, i64 n, const float* lower,
                             const float* upper, const float* ahead) {
    const __m256 zero = _mm256_setzero_ps();
    const bool stream = m.stream;
    const float *grad = m.grad + at, *owed = m.owed + at;
    float* out = m.out + at;
    i64 i = stream ? until_line(out, n) : 0;
    onebit_settle_plain(m, at, i, lower, upper);
    for (; i + 16 <= n; i += 16) {
        _mm_prefetch(ahead + i, _MM_HINT_T1);
        _mm_prefetch(grad + i + BELOW * m.columns, _MM_HINT_T0);
        _mm_prefetch(owed + i + BELOW * m.columns, _MM_HINT_T0);
        for (i64 k = i; k < i + 16; k += 8) {
            const __m256 v = _mm256_add_ps(_mm256_loadu_ps(owed + k), _mm256_loadu_ps(grad + k));
            const __m256 below = _mm256_cmp_ps(v, zero, _CMP_NGE_UQ);
            const __m256 mean = _mm256_blendv_ps(_mm256_loadu_ps(upper + k),
                                                 _mm256_loadu_ps(lower + k), below);
            store(out + k, _mm256_add_ps(v, mean), stream);
        }
    }
    onebit_settle_plain(m, at + i, n - i, lower + i, upper + i);
}
#endif

void onebit_rows(const Matrix& m, i64 at, int rows, i64 width, i64 ahead, Block& b) {
#if HAVE_AVX2
    if (avx2) {
        const auto add = m.owed ? onebit_rows_avx2<true> : onebit_rows_avx2<false>;
        return add(m, at, rows, width, ahead, b);
    }
#endif
    onebit_rows_plain(m, at, rows, 0, width, b);
}

// As many elements from `ahead` on will be read soon.
void onebit_settle(const Matrix& m, i64 at, i64 n, const float* lower, const float* upper,
                   const float* ahead) {
#if HAVE_AVX2
    if (avx2) return onebit_settle_avx2(m, at, n, lower, upper, ahead);
#endif
    onebit_settle_plain(m, at, n, lower, upper);
}

void count_bits(const u32* word, i64 width, i64* count) {
    for (i64 c = 0; c < width; c++) {
        u32 w = word[c] - (word[c] >> 1 & 0x55555555);
        w = (w & 0x33333333) + (w >> 2 & 0x33333333);
        w = (w + (w >> 4)) & 0x0F0F0F0F;
        w += w >> 8;
        count[c] += (w + (w >> 16)) & 63;
    }
}

// The means from the sums of the non-negative and the negative values, where `count` are the
// former.
void onebit_means(const float* positive, const float* negative, const i64* count, i64 rows,
                  i64 width, float* lower, float* upper) {
    for (i64 c = 0; c < width; c++) {
        upper[c] = positive[c] / float(std::max<i64>(count[c], 1));
        lower[c] = negative[c] / float(std::max<i64>(rows - count[c], 1));
    }
}

}  // namespace
