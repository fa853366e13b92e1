// Dryden (version 2016): thresholds of each column from a sample, indices and signs, two means a
// column.
#pragma once

#include <functional>

#include "philox.h"
#include "sums.h"
#include "words.h"

namespace {

// The means of what is sent: count and `fold` of each column and sign, where only what is not zero
// is seen (adding zeros changes no sum). Level k holds one sum of up to 32 sums of level k - 1:
// that of the block of rows which was last added to.
class SparseFold {
  public:
    explicit SparseFold(i64 columns) : sums_(columns), counts_(columns, 0) {}

    void add(i64 row, i64 column, float v) {
        counts_[column]++;
        add_at(sums_[column], 0, row, v);
    }

    float mean(i64 column) {
        Sums& s = sums_[column];
        for (int level = 0; level < LEVELS - 1; level++)
            add_at(s, level + 1, s.block[level], s.sum[level]);
        return s.sum[LEVELS - 1] / float(std::max<i64>(counts_[column], 1));
    }

  private:
    static constexpr int LEVELS = 8;
    struct Sums {
        i64 block[LEVELS] = {};
        float sum[LEVELS] = {};
    };

    static void add_at(Sums& s, int level, i64 number, float v) {
        if (number / 32 != s.block[level] && level < LEVELS - 1) {
            add_at(s, level + 1, s.block[level], s.sum[level]);
            s.block[level] = number / 32;
            s.sum[level] = 0;
        }
        s.sum[level] += v;
    }

    std::vector<Sums> sums_;
    std::vector<i64> counts_;
};

// Number `keep` from the outside of a sample's negative (or non-negative) values, where `keep` is
// one in `proportion` of them and at least one; infinite where there are none.
float dryden_cut(std::vector<float>& values, i64 proportion, bool negative) {
    if (values.empty()) return negative ? -INFINITY : INFINITY;
    const auto place =
        values.begin() + std::max<i64>(1, i64(values.size()) / proportion) - 1;
    if (negative) std::nth_element(values.begin(), place, values.end());
    else std::nth_element(values.begin(), place, values.end(), std::greater<float>());
    return *place;
}

// What one scan reads and writes: v = base + grad, written to `out`, or v = base where it is null.
struct Scan {
    const float *base, *grad;
    float* out;
    bool stream;
};

struct Found {
    u8* words;
    SparseFold &negative, &positive;

    void add(i64 index, i64 row, i64 column, float v) {
        put(words, u32(index) << 1 | (v > 0));
        words += 4;
        (v > 0 ? positive : negative).add(row, column, v);
    }
};

// Elements begin ... end - 1, which are one row if COLUMNS, else part of a single column. What is
// at or below lower[c] or at or above upper[c] is found; these are never zero.
template <bool COLUMNS>
void dryden_plain(const Scan& s, i64 row, i64 first, i64 begin, i64 end, const float* lower,
                  const float* upper, Found& found) {
    for (i64 i = begin; i < end; i++) {
        const i64 c = COLUMNS ? i - first : 0;
        const float v = s.out ? s.base[i] + s.grad[i] : s.base[i];
        if (s.out) s.out[i] = v;
        if (v <= lower[c] || v >= upper[c]) found.add(i, COLUMNS ? row : i, c, v);
    }
}

#if HAVE_AVX2
template <bool COLUMNS>
AVX2 void dryden_avx2(const Scan& s, i64 row, i64 first, i64 begin, i64 end, const float* lower,
                      const float* upper, Found& found) {
    __m256 low = _mm256_set1_ps(lower[0]), up = _mm256_set1_ps(upper[0]);
    i64 i = begin + (s.stream ? until_aligned(s.out + begin, end - begin) : 0);
    dryden_plain<COLUMNS>(s, row, first, begin, i, lower, upper, found);
    for (; i + 32 <= end; i += 32) {
        __m256 v[4];
        u32 mask = 0;
        for (int k = 0; k < 4; k++) {
            const i64 at = i + 8 * k;
            v[k] = _mm256_loadu_ps(s.base + at);
            if (s.out) {
                v[k] = _mm256_add_ps(v[k], _mm256_loadu_ps(s.grad + at));
                store(s.out + at, v[k], s.stream);
            }
            if (COLUMNS) {
                low = _mm256_loadu_ps(lower + at - first);
                up = _mm256_loadu_ps(upper + at - first);
            }
            const __m256 sent = _mm256_or_ps(_mm256_cmp_ps(v[k], low, _CMP_LE_OQ),
                                             _mm256_cmp_ps(v[k], up, _CMP_GE_OQ));
            mask |= u32(_mm256_movemask_ps(sent)) << 8 * k;
        }
        if (!mask) continue;
        alignas(32) float group[32];
        for (int k = 0; k < 4; k++) _mm256_store_ps(group + 8 * k, v[k]);
        for (; mask; mask &= mask - 1) {
            const int at = __builtin_ctz(mask);
            found.add(i + at, COLUMNS ? row : i + at, COLUMNS ? i + at - first : 0, group[at]);
        }
    }
    dryden_plain<COLUMNS>(s, row, first, i, end, lower, upper, found);
}
#endif

template <bool COLUMNS>
void dryden_scan(const Scan& s, i64 row, i64 first, i64 begin, i64 end, const float* lower,
                 const float* upper, Found& found) {
#if HAVE_AVX2
    if (avx2) return dryden_avx2<COLUMNS>(s, row, first, begin, end, lower, upper, found);
#endif
    dryden_plain<COLUMNS>(s, row, first, begin, end, lower, upper, found);
}

// The mean of a word's sign and column; columns = 1 spares the division.
inline i64 dryden_mean(u32 word, u32 columns) {
    return i64(word & 1) * columns + (columns == 1 ? 0 : (word >> 1) % columns);
}

}  // namespace

// Thresholds of each column of base + grad (base, if `grad` is null), from `sample` draws a column
// or, if that is 0, from all its rows.
API void mp_dryden_columns(const float* base, const float* grad, i64 rows, i64 columns,
                           i64 proportion, i64 sample, u64 seed, u32 rank, u32 step, u32 bucket,
                           i64 start, float* lower, float* upper) {
    const Philox key{bucket, step, rank, u32(seed), u32(seed >> 32)};
    const i64 count = sample ? sample : rows;
    split(columns, 16, std::max<i64>(grain / count, 1), [&](int, i64 begin, i64 end) {
        std::vector<u32> room(sample + 8);
        std::vector<float> negative, positive;
        for (i64 c = begin; c < end; c++) {
            const u32* words = sample ? philox_words(key, start + c * sample, sample, room.data())
                                      : nullptr;
            negative.clear();
            positive.clear();
            for (i64 k = 0; k < count; k++) {
                const i64 row = sample ? i64(u64(words[k]) * u64(rows) >> 32) : k;
                const i64 i = row * columns + c;
                const float v = grad ? base[i] + grad[i] : base[i];
                (v < 0 ? negative : positive).push_back(v);
            }
            lower[c] = dryden_cut(negative, proportion, true);
            upper[c] = dryden_cut(positive, proportion, false);
        }
    });
}

// uint32 count, float32 means[2][columns], uint32 words index << 1 | positive of base (`out` null),
// or of base + grad, of which what is still owed goes to `out`. Returns the bytes; INVALID if there
// is `out` and a mean is not finite.
API i64 mp_dryden_encode(const float* base, const float* grad, float* out, i64 rows, i64 columns,
                         const float* lower, const float* upper, u8* data) {
    constexpr float LEAST = 1.40129846e-45f;  // a zero is never sent
    std::vector<float> low(columns), up(columns);
    for (i64 c = 0; c < columns; c++) {
        low[c] = std::min(lower[c], -LEAST);
        up[c] = std::max(upper[c], LEAST);
    }
    const i64 n = rows * columns, head = 4 + 8 * columns;
    const Scan scan{base, grad, out, out && out != base && n >= stream_from};
    SparseFold negative(columns), positive(columns);
    Found found{data + head, negative, positive};
    if (columns == 1) dryden_scan<false>(scan, 0, 0, 0, n, low.data(), up.data(), found);
    for (i64 row = 0; row < rows && columns > 1; row++) {
        const i64 first = row * columns;
        dryden_scan<true>(scan, row, first, first, first + columns, low.data(), up.data(), found);
    }
#if HAVE_AVX2
    if (scan.stream) _mm_sfence();
#endif
    put(data, u32((found.words - data - head) / 4));
    std::vector<float> means(2 * columns);
    for (i64 c = 0; c < columns; c++) {
        means[c] = negative.mean(c);
        means[columns + c] = positive.mean(c);
    }
    std::memcpy(data + 4, means.data(), 8 * columns);
    if (!out) return found.words - data;
    if (!finite(means.data(), 2 * columns)) return INVALID;
    for (float& mean : means) mean *= -1.0f;
    for (const u8* at = data + head; at < found.words; at += 4) {
        const u32 word = get<u32>(at);
        out[word >> 1] += means[dryden_mean(word, u32(columns))];
    }
    return found.words - data;
}

// out += weight * the mean of each word's sign and column. The packet has its right length. INVALID
// unless indices ascend and stay below n and means are finite.
API i64 mp_dryden_decode(const u8* const* data, const i64* sizes, i64 packets, i64 n, i64 columns,
                         float weight, float* out, int fresh) {
    const i64 head = 4 + 8 * columns;
    std::vector<float> means(2 * columns * packets);
    std::vector<const u8*> words(packets);
    std::vector<i64> bytes(packets);
    for (i64 p = 0; p < packets; p++) {
        if (!finite_bytes(data[p] + 4, 2 * columns)) return INVALID;
        words[p] = data[p] + head;
        bytes[p] = sizes[p] - head;
        for (i64 k = 0; k < 2 * columns; k++)
            means[2 * columns * p + k] = get<float>(data[p] + 4 + 4 * k) * weight;
    }
    return add_words(words.data(), bytes.data(), packets, out, n, fresh,
                     [&](i64 p, i64, i64, u32 word) {
                         return means[2 * columns * p + dryden_mean(word, u32(columns))];
                     });
}
