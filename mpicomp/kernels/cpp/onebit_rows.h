// 1-bit SGD: what is summed over the rows of a matrix; what remains once the means are known.
#pragma once

#include "sums.h"

namespace {

constexpr i64 WIDEST = 1024;           // columns of a strip

// A strip of columns: v = owed + grad of its rows is kept, in scratch or in `out`. `grad`, `owed`,
// `v` point at row 0. `owed` may be null: then v = grad, and nothing is kept.
struct Strip {
    const float *grad, *owed;
    float* v;
    i64 pitch, v_pitch, first, width;  // from row to row, of grad and owed and of v; columns
};

// What is summed over a block of 32 rows: one word of bits a column, and the two sums. (The gaps
// keep the same column of all three out of each other's way in the cache.)
struct Block {
    alignas(64) float positive[WIDEST + 16], negative[WIDEST + 16];
    alignas(64) u32 word[WIDEST];
};

// `rows` rows from `row` on, the first of which is bit `first` of the block; columns from `from`
// on.
void onebit_rows_plain(const Strip& s, i64 row, int rows, i64 from, Block& b) {
    for (int r = 0; r < rows; r++) {
        const i64 at = (row + r) * s.pitch;
        for (i64 c = from; c < s.width; c++) {
            const float v = s.owed ? s.owed[at + c] + s.grad[at + c] : s.grad[at + c];
            if (s.owed) s.v[(row + r) * s.v_pitch + c] = v;
            const bool bit = v >= 0;
            b.word[c] |= u32(bit) << r;
            b.positive[c] += bit ? v : 0.0f;
            b.negative[c] += bit ? 0.0f : v;
        }
    }
}

// out = v + (v >= 0 ? upper : lower) for one row.
void onebit_settle_plain(const float* v, const float* lower, const float* upper, i64 width,
                         float* out) {
    for (i64 c = 0; c < width; c++) out[c] = v[c] + (v[c] >= 0 ? upper[c] : lower[c]);
}

#if HAVE_AVX2
constexpr int AHEAD = 8;  // rows to fetch in advance
constexpr int ROWS = 4;   // rows to add up in registers

// COUNT rows, 8 columns after 8 columns; the sums stay in registers from row to row.
template <bool OWED, int COUNT>
AVX2 inline void onebit_few_rows(const Strip& s, i64 row, int first, i64 width, Block& b) {
    const __m256 zero = _mm256_setzero_ps();
    const i64 pitch = s.pitch, v_pitch = s.v_pitch;
    const float *grad = s.grad + row * pitch, *owed = OWED ? s.owed + row * pitch : nullptr;
    float* keep = OWED ? s.v + row * v_pitch : nullptr;
    for (i64 c = 0; c < width; c += 8) {
        __m256 up = _mm256_load_ps(b.positive + c), low = _mm256_load_ps(b.negative + c);
        __m256i bits = _mm256_load_si256(reinterpret_cast<__m256i*>(b.word + c));
        __m256i place = _mm256_set1_epi32(int(1u << first));
        for (int r = 0; r < COUNT; r++) {
            __m256 v = _mm256_loadu_ps(grad + r * pitch + c);
            if (OWED) {
                if (c % 16 == 0) {
                    _mm_prefetch(grad + (r + AHEAD) * pitch + c, _MM_HINT_T1);
                    _mm_prefetch(owed + (r + AHEAD) * pitch + c, _MM_HINT_T1);
                }
                v = _mm256_add_ps(_mm256_loadu_ps(owed + r * pitch + c), v);
                _mm256_storeu_ps(keep + r * v_pitch + c, v);
            }
            const __m256 bit = _mm256_cmp_ps(v, zero, _CMP_GE_OQ);
            up = _mm256_add_ps(up, _mm256_and_ps(bit, v));
            low = _mm256_add_ps(low, _mm256_andnot_ps(bit, v));
            bits = _mm256_or_si256(bits, _mm256_and_si256(_mm256_castps_si256(bit), place));
            place = _mm256_add_epi32(place, place);
        }
        _mm256_store_ps(b.positive + c, up);
        _mm256_store_ps(b.negative + c, low);
        _mm256_store_si256(reinterpret_cast<__m256i*>(b.word + c), bits);
    }
}

template <bool OWED> AVX2 void onebit_rows_avx2(const Strip& s, i64 row, int rows, Block& b) {
    const i64 width = s.width / 8 * 8;
    int r = 0;
    for (; r + ROWS <= rows; r += ROWS) onebit_few_rows<OWED, ROWS>(s, row + r, r, width, b);
    for (; r < rows; r++) onebit_few_rows<OWED, 1>(s, row + r, r, width, b);
    if (width < s.width) onebit_rows_plain(s, row, rows, width, b);
}

AVX2 void onebit_settle_avx2(const float* v, const float* lower, const float* upper, i64 width,
                             float* out, bool stream, const float* ahead, const float* ahead2) {
    i64 c = stream ? until_aligned(out, width) : 0;
    onebit_settle_plain(v, lower, upper, c, out);
    for (; c + 8 <= width; c += 8) {
        if (ahead) _mm_prefetch((c & 8 ? ahead : ahead2) + c, _MM_HINT_T1);
        const __m256 x = _mm256_loadu_ps(v + c);
        const __m256 bit = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GE_OQ);
        const __m256 mean = _mm256_blendv_ps(_mm256_loadu_ps(lower + c),
                                             _mm256_loadu_ps(upper + c), bit);
        store(out + c, _mm256_add_ps(x, mean), stream);
    }
    onebit_settle_plain(v + c, lower + c, upper + c, width - c, out + c);
}
#endif

void onebit_rows(const Strip& s, i64 row, int rows, Block& b) {
#if HAVE_AVX2
    if (avx2) return (s.owed ? onebit_rows_avx2<true> : onebit_rows_avx2<false>)(s, row, rows, b);
#endif
    onebit_rows_plain(s, row, rows, 0, b);
}

// `ahead`, `ahead2`: memory of as many floats that is wanted next, or null.
void onebit_settle(const float* v, const float* lower, const float* upper, i64 width, float* out,
                   bool stream, const float* ahead, const float* ahead2) {
#if HAVE_AVX2
    if (avx2) return onebit_settle_avx2(v, lower, upper, width, out, stream, ahead, ahead2);
#endif
    onebit_settle_plain(v, lower, upper, width, out);
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
