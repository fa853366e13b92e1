// 1-bit SGD: a matrix of one column, that is a vector.
#pragma once

#include "onebit_rows.h"

namespace {

#if HAVE_AVX2
AVX2 inline void transpose(__m256 a[8]) {
    __m256 b[8];
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_unpacklo_ps(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm256_unpackhi_ps(a[i + j], a[i + j + 2]);
        }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm256_unpacklo_ps(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm256_unpackhi_ps(b[i + j], b[i + j + 2]);
        }
    for (int j = 0; j < 4; j++) {
        const __m256 top = a[j], bottom = a[j + 4];
        a[j] = _mm256_permute2f128_ps(top, bottom, 0x20);
        a[j + 4] = _mm256_permute2f128_ps(top, bottom, 0x31);
    }
}

// Eight blocks of 32 consecutive elements of a single column; lane k of the sums is block k.
template <bool OWED>
AVX2 void onebit_blocks_avx2(const Matrix& m, i64 first, Block& b) {
    const __m256 zero = _mm256_setzero_ps();
    __m256 up = zero, low = zero;
    std::fill(b.word, b.word + 8, 0);
    for (int k = 0; k < 32; k += 8) {
        __m256 a[8];
        for (int i = 0; i < 8; i++) {
            const i64 at = first + 32 * i + k;
            a[i] = _mm256_loadu_ps(m.grad + at);
            if (OWED) a[i] = _mm256_add_ps(_mm256_loadu_ps(m.owed + at), a[i]);
            const int bits = _mm256_movemask_ps(_mm256_cmp_ps(a[i], zero, _CMP_GE_OQ));
            b.word[i] |= u32(bits) << k;
        }
        transpose(a);
        for (int j = 0; j < 8; j++) {
            const __m256 bit = _mm256_cmp_ps(a[j], zero, _CMP_GE_OQ);
            up = _mm256_add_ps(up, _mm256_and_ps(bit, a[j]));
            low = _mm256_add_ps(low, _mm256_andnot_ps(bit, a[j]));
        }
    }
    _mm256_store_ps(b.positive, up);
    _mm256_store_ps(b.negative, low);
}
#endif

// `fold` of a vector, in place.
float fold_vector(std::vector<float>& v) {
    for (size_t n = v.size(); n > 1; n = (n + 31) / 32)
        for (size_t i = 0; i < n; i += 32) {
            float sum = 0;
            for (size_t k = i; k < std::min(n, i + 32); k++) sum += v[k];
            v[i / 32] = sum;
        }
    return v.empty() ? 0.0f : v[0];
}

i64 onebit_column(const float* grad, const float* owed, float* out, i64 rows, u8* data) {
    thread_local std::vector<float> positive, negative;  // the sums of blocks of 32
    positive.resize((rows + 31) / 32);
    negative.resize((rows + 31) / 32);
    const Matrix m{grad, owed, out, rows, 1, owed && out != owed && rows >= stream_from};
    Block b;
    i64 count = 0;
    for (i64 row = 0; row < rows;) {
        const i64 left = std::min<i64>(256, rows - row);
        int blocks = 1;
#if HAVE_AVX2
        if (avx2 && left == 256) {
            blocks = 8;
            (owed ? onebit_blocks_avx2<true> : onebit_blocks_avx2<false>)(m, row, b);
        }
#endif
        if (blocks == 1)
            onebit_rows_plain(m, row, int(std::min<i64>(32, left)), 0, 1, b);
        i64 bits[8] = {};
        count_bits(b.word, blocks, bits);
        for (int k = 0; k < blocks; k++) count += bits[k];
        std::copy(b.positive, b.positive + blocks, &positive[row / 32]);
        std::copy(b.negative, b.negative + blocks, &negative[row / 32]);
        std::memcpy(data + 8 + row / 8, b.word, 4 * blocks);
        row += 32 * blocks;
    }
    const float upper_sum = fold_vector(positive), lower_sum = fold_vector(negative);
    float lower[WIDEST], upper[WIDEST];  // the means, for as long a row as `onebit_settle` takes
    onebit_means(&upper_sum, &lower_sum, &count, rows, 1, lower, upper);
    put(data, lower[0]);
    put(data + 4, upper[0]);
    if (!owed) return 0;
    if (!finite(lower, 1) || !finite(upper, 1)) return INVALID;
    std::fill(lower, lower + WIDEST, -1.0f * float(lower[0]));
    std::fill(upper, upper + WIDEST, -1.0f * float(upper[0]));
    for (i64 at = 0; at < rows; at += WIDEST)
        onebit_settle(m, at, std::min(WIDEST, rows - at), lower, upper, grad + at);
    return 0;
}

}  // namespace
