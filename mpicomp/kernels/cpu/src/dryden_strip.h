// Dryden (version 2016): what is done with one strip of columns, which lies in cache.
#pragma once

#include <memory>

#include "dryden_columns.h"

namespace {

// v = base + grad is encoded, and what is still owed goes to `out`.
struct Owing {
    const float *base, *grad;
    float* out;
    i64 rows, columns, proportion, sample, start;
    Philox key;
    bool stream;  // is `out` written past the caches
};

#if HAVE_AVX2
constexpr i64 WIDE = 128;       // columns of a strip: column << 1 | positive has a byte
constexpr i64 EDGE = 16;        // elements in a line of the cache
constexpr i64 ROWS_AHEAD = 32;  // between what is read and what is asked for

struct Strip {
    i64 first, width = 0;
    float* v;  // a row: the last EDGE elements of the strip before this one, then its own

    // What is sent, row after row: row << 8 | column << 1 | positive. `end` says where each block
    // of 32 rows ends, after a 0.
    std::unique_ptr<u32[]> sent;
    std::vector<i64> end;
    float mean[2 * WIDE];  // column << 1 | positive
};

// Elements begin ... begin + n - 1 of base + grad; those from `ahead` on are asked for.
AVX2 void strip_read(const Owing& m, i64 begin, i64 n, i64 ahead, float* to) {
    const float *base = m.base + begin, *grad = m.grad + begin;
    i64 i = 0;
    for (; i + 16 <= n; i += 16) {
        _mm_prefetch(m.base + ahead + i, _MM_HINT_T1);
        _mm_prefetch(m.grad + ahead + i, _MM_HINT_T1);
        for (i64 k = i; k < i + 16; k += 8)
            _mm256_store_ps(to + k, _mm256_add_ps(_mm256_loadu_ps(base + k),
                                                  _mm256_loadu_ps(grad + k)));
    }
    _mm_prefetch(m.base + ahead + n - 1, _MM_HINT_T1);  // a row seldom begins where a line does
    _mm_prefetch(m.grad + ahead + n - 1, _MM_HINT_T1);
    for (; i < n; i++) to[i] = base[i] + grad[i];
}

AVX2 void strip_write(const float* from, i64 n, float* out, bool stream) {
    i64 i = stream ? until_line(out, n) : 0;
    std::copy(from, from + i, out);
    for (; i + 16 <= n; i += 16)
        for (i64 k = i; k < i + 16; k += 8) store(out + k, _mm256_loadu_ps(from + k), stream);
    std::copy(from + i, from + n, out + i);
}

// Of the values at `count` draws from the rows of a column, what `Extremes` finds.
AVX2 Extremes strip_draws(const float* v, i64 pitch, i64 rows, const u32* words, i64 count) {
    const __m256i all = _mm256_set1_epi64x(rows), step = _mm256_set1_epi32(int(pitch));
    __m256 low = _mm256_set1_ps(INFINITY), high = _mm256_set1_ps(-INFINITY);
    __m256i below = _mm256_setzero_si256();
    i64 k = 0;
    for (; k + 8 <= count; k += 8) {
        const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + k));
        const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(word, all), 32);
        const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(word, 32), all);
        const __m256i row = _mm256_blend_epi32(even, odd, 0xAA);
        const __m256 x = _mm256_i32gather_ps(v, _mm256_mullo_epi32(row, step), 4);
        low = _mm256_min_ps(low, x);
        high = _mm256_max_ps(high, x);
        const __m256 negative = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ);
        below = _mm256_sub_epi32(below, _mm256_castps_si256(negative));
    }
    const auto half = [](__m256 x) AVX2 { return _mm256_extractf128_ps(x, 1); };
    __m128 l = _mm_min_ps(_mm256_castps256_ps128(low), half(low));
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(high), half(high));
    __m128i b = _mm_add_epi32(_mm256_castsi256_si128(below), _mm256_extracti128_si256(below, 1));
    l = _mm_min_ps(l, _mm_movehl_ps(l, l));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    b = _mm_add_epi32(b, _mm_shuffle_epi32(b, 0x4E));
    Extremes found(nullptr, nullptr, nullptr, 0);
    found.lowest = _mm_cvtss_f32(_mm_min_ss(l, _mm_shuffle_ps(l, l, 1)));
    found.highest = _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
    found.below = _mm_cvtsi128_si32(_mm_add_epi32(b, _mm_shuffle_epi32(b, 0xB1)));
    for (; k < count; k++) {
        const u32 element = u32((u64(words[k]) * u64(rows) >> 32) * u64(pitch));
        found.plain(v, nullptr, &element, 1);
    }
    return found;
}

// Of 16 elements, which are beyond thresholds: two bits each, negative and positive, as in a word.
AVX2 inline u32 beyond(const float* v, const float* lower, const float* upper) {
    __m256i both[2];
    for (int k = 0; k < 2; k++) {
        const __m256 x = _mm256_load_ps(v + 8 * k);
        const __m256 below = _mm256_cmp_ps(x, _mm256_load_ps(lower + 8 * k), _CMP_LE_OQ);
        const __m256 above = _mm256_cmp_ps(x, _mm256_load_ps(upper + 8 * k), _CMP_GE_OQ);
        both[k] = _mm256_blend_epi16(_mm256_castps_si256(below), _mm256_castps_si256(above), 0xAA);
    }
    const __m256i bytes = _mm256_packs_epi16(both[0], both[1]);
    return u32(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xD8)));
}

// Writes what rows row ... stop - 1 send and how many each of them; returns the end. Of 32 elements
// seldom more than two are sent: two are written in any case, so nobody waits for a wrong guess.
AVX2 u32* strip_find(const float* v, i64 pitch, i64 row, i64 stop, i64 width, const float* lower,
                     const float* upper, u32* to, u8* count) {
    for (v += row * pitch; row < stop; row++, v += pitch) {
        u32* const before = to;
        u32 code = u32(row << 8);
        for (i64 c = 0; c < width; c += 32, code += 64) {
            u64 mask = beyond(v + c, lower + c, upper + c);
            mask |= u64(beyond(v + c + 16, lower + c + 16, upper + c + 16)) << 32;
            const int n = __builtin_popcountll(mask);
            for (int k = 0; k < 2; k++, mask &= mask - 1)
                to[k] = code + u32(__builtin_ctzll(mask | u64(1) << 63));
            for (int k = 2; __builtin_expect(k < n, 0); k++, mask &= mask - 1)
                to[k] = code + u32(__builtin_ctzll(mask));
            to += n;
        }
        *count++ = u8(to - before);
    }
    return to;
}
#endif

}  // namespace
