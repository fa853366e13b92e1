// Dryden (version 2016): the thresholds of each column, from a sample of its rows.
#pragma once

#include <functional>

#include "philox.h"

namespace {

constexpr float LEAST = 1.40129846e-45f;  // of all thresholds: a zero is never sent

// Number `keep` from the outside of `count` negative (or non-negative) values, where `keep` is one
// in `proportion` of them and at least one; infinite where there are none.
float dryden_cut(float* values, i64 count, i64 proportion, bool negative) {
    if (!count) return negative ? -INFINITY : INFINITY;
    float* const place = values + std::max<i64>(1, count / proportion) - 1;
    float* const end = values + count;
    if (place == values) return negative ? *std::min_element(values, end)
                                         : *std::max_element(values, end);
    if (negative) std::nth_element(values, place, end);
    else std::nth_element(values, place, end, std::greater<float>());
    return *place;
}

// The extremes of `count` elements of base + grad (base, if `grad` is null), and how many of them
// are negative.
struct Extremes {
    float lowest = INFINITY, highest = -INFINITY;
    i64 below = 0;

    void plain(const float* base, const float* grad, const u32* element, i64 count) {
        for (i64 k = 0; k < count; k++) {
            const float v = grad ? base[element[k]] + grad[element[k]] : base[element[k]];
            lowest = std::min(lowest, v);
            highest = std::max(highest, v);
            below += v < 0;
        }
    }

#if HAVE_AVX2
    AVX2 void wide(const float* base, const float* grad, const u32* element, i64 count) {
        __m256 low = _mm256_set1_ps(INFINITY), high = _mm256_set1_ps(-INFINITY);
        i64 k = 0;
        for (; k + 8 <= count; k += 8) {
            const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(element + k));
            __m256 v = _mm256_i32gather_ps(base, at, 4);
            if (grad) v = _mm256_add_ps(v, _mm256_i32gather_ps(grad, at, 4));
            low = _mm256_min_ps(low, v);
            high = _mm256_max_ps(high, v);
            const __m256 negative = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_LT_OQ);
            below += __builtin_popcount(u32(_mm256_movemask_ps(negative)));
        }
        alignas(32) float lows[8], highs[8];
        _mm256_store_ps(lows, low);
        _mm256_store_ps(highs, high);
        lowest = *std::min_element(lows, lows + 8);
        highest = *std::max_element(highs, highs + 8);
        plain(base, grad, element + k, count - k);
    }
#endif

    Extremes(const float* base, const float* grad, const u32* element, i64 count) {
#if HAVE_AVX2
        if (avx2) {
            wide(base, grad, element, count);
            return;
        }
#endif
        plain(base, grad, element, count);
    }
};

// The rows that are looked at in `columns` columns from `first` on, and their memory on its way.
void dryden_draw(const float* base, const float* grad, i64 rows, i64 pitch, i64 first, i64 columns,
                 i64 count, const u32* words, u32* element) {
    for (i64 c = 0; c < columns; c++)
        for (i64 k = 0; k < count; k++, element++) {
            const i64 row = words ? i64(u64(words[c * count + k]) * u64(rows) >> 32) : k;
            *element = u32(row * pitch + first + c);
            __builtin_prefetch(base + *element, 0, 2);
            if (grad) __builtin_prefetch(grad + *element, 0, 2);
        }
}

}  // namespace

// Thresholds of each column of base + grad (base, if `grad` is null), from `sample` draws a column
// or, if that is 0, from all its rows. Cache line after cache line of columns: while one is looked
// at, the next is fetched.
API void mp_dryden_columns(const float* base, const float* grad, i64 rows, i64 columns,
                           i64 proportion, i64 sample, u64 seed, u32 rank, u32 step, u32 bucket,
                           i64 start, float* lower, float* upper) {
    constexpr i64 LINE = 16;
    const Philox key{bucket, step, rank, u32(seed), u32(seed >> 32)};
    const i64 count = sample ? sample : rows;
    split(columns, LINE, grain / count, [&](int, i64 begin, i64 end) {
        std::vector<u32> room(sample * LINE + 8);
        std::vector<u32> elements(LINE * count), next(LINE * count);
        std::vector<float> negative(count + 1), positive(count + 1);
        const auto draw = [&](i64 c) {
            const i64 some = std::min(LINE, end - c);
            const u32* words = nullptr;
            if (sample) words = philox_words(key, start + c * sample, some * sample, room.data());
            dryden_draw(base, grad, rows, columns, c, some, count, words, next.data());
        };
        if (begin < end) draw(begin);
        for (i64 first = begin; first < end; first += LINE) {
            elements.swap(next);
            if (first + LINE < end) draw(first + LINE);
            const u32* element = elements.data();
            for (i64 c = first; c < std::min(end, first + LINE); c++, element += count) {
                const Extremes found(base, grad, element, count);
                if (found.below < 2 * proportion && count - found.below < 2 * proportion) {
                    lower[c] = found.below ? found.lowest : -INFINITY;
                    upper[c] = found.below < count ? found.highest : INFINITY;
                    continue;
                }
                i64 below = 0, above = 0;
                for (i64 k = 0; k < count; k++) {
                    const i64 i = element[k];
                    const float v = grad ? base[i] + grad[i] : base[i];
                    negative[below] = positive[above] = v;
                    below += v < 0;
                    above += !(v < 0);
                }
                lower[c] = dryden_cut(negative.data(), below, proportion, true);
                upper[c] = dryden_cut(positive.data(), above, proportion, false);
            }
        }
    });
}
