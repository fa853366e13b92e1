// Dryden (version 2016): indices and signs of what is beyond a column's thresholds, two means a
// column.
#pragma once

#include "dryden_columns.h"
#include "sums.h"
#include "words.h"

namespace {

// The means of what is sent, fed only what is not zero: adding zeros changes no sum of `fold`.
// Level k holds the sum so far of that block of 32**(k + 1) rows which was last added to.
class SparseFold {
  public:
    SparseFold(i64 rows, i64 columns) : heads_(columns) {
        for (i64 blocks = rows; blocks > 32; blocks = (blocks + 31) / 32) levels_++;
        sums_.resize(columns * levels_);
    }

    void add(i64 row, i64 column, float v) {
        Head& head = heads_[column];
        float* sum = &sums_[column * levels_];
        u32 block = u32(row >> 5), before = head.block;
        head.block = block;
        for (; block != before; block >>= 5, before >>= 5, sum++) sum[1] += sum[0], sum[0] = 0;
        sums_[column * levels_] += v;
        head.count++;
    }

    float mean(i64 column) {
        float* sum = &sums_[column * levels_];
        for (i64 level = 0; level + 1 < levels_; level++) sum[level + 1] += sum[level];
        return sum[levels_ - 1] / float(std::max<u32>(heads_[column].count, 1));
    }

  private:
    struct Head {
        u32 block = 0, count = 0;
    };

    i64 levels_ = 1;
    std::vector<Head> heads_;
    std::vector<float> sums_;  // the levels of a column stand together
};

// What one scan reads and writes: v = base + grad, written to `out`, or v = base where it is null.
struct Scan {
    const float *base, *grad;
    float* out;
    bool stream;
};

struct Found {
    u8* words;
    i64 columns;
    SparseFold& sums;  // of each column's negative values, then of its positive ones

    void add(i64 index, i64 row, i64 column, float v) {
        const bool positive = v > 0;
        put(words, u32(index) << 1 | positive);
        words += 4;
        sums.add(row, positive * columns + column, v);
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
AVX2 void dryden_avx2(const Scan& scan, i64 row, i64 first, i64 begin, i64 end, const float* lower,
                      const float* upper, Found& found) {
    const Scan s = scan;
    __m256 low = _mm256_set1_ps(lower[0]), up = _mm256_set1_ps(upper[0]);
    i64 i = begin + (s.stream ? until_aligned(s.out + begin, end - begin) : 0);
    dryden_plain<COLUMNS>(s, row, first, begin, i, lower, upper, found);
    for (; i + 32 <= end; i += 32) {
        __m256 v[4];
        u32 mask = 0;
        next_page(s.base + i);
        if (s.out) next_page(s.grad + i);
        for (int k = 0; k < 4; k++) {
            const i64 at = i + 8 * k;
            v[k] = _mm256_loadu_ps(s.base + at);
            if (s.out) v[k] = _mm256_add_ps(v[k], _mm256_loadu_ps(s.grad + at));
            if (COLUMNS) {
                low = _mm256_loadu_ps(lower + at - first);
                up = _mm256_loadu_ps(upper + at - first);
            }
            const __m256 sent = _mm256_or_ps(_mm256_cmp_ps(v[k], low, _CMP_LE_OQ),
                                             _mm256_cmp_ps(v[k], up, _CMP_GE_OQ));
            mask |= u32(_mm256_movemask_ps(sent)) << 8 * k;
        }
        for (int k = 0; s.out && k < 4; k++) store(s.out + i + 8 * k, v[k], s.stream);
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

// Finds the mean of a word's sign and column. Words ascend, so most lie in the row of the one
// before, which spares the division.
struct Means {
    const float* means;  // of negative values, then of positive ones
    i64 columns, row = 0;  // the first element of the row

    float operator()(i64, u32 word) {
        const i64 index = word >> 1;
        if (index - row >= columns || index < row) row = index / columns * columns;
        return means[i64(word & 1) * columns + index - row];
    }
};

}  // namespace

// uint32 count, float32 means[2][columns], uint32 words index << 1 | positive of base (`out` null),
// or of base + grad, of which what is still owed goes to `out`. Returns the bytes; INVALID if there
// is `out` and a mean is not finite.
API i64 mp_dryden_encode(const float* base, const float* grad, float* out, i64 rows, i64 columns,
                         const float* lower, const float* upper, u8* data) {
    std::vector<float> low(columns), up(columns);
    for (i64 c = 0; c < columns; c++) {
        low[c] = std::min(lower[c], -LEAST);
        up[c] = std::max(upper[c], LEAST);
    }
    const i64 n = rows * columns, head = 4 + 8 * columns;
    const Scan scan{base, grad, out, out && out != base && n >= stream_from};
    SparseFold sums(rows, 2 * columns);
    Found found{data + head, columns, sums};
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
    for (i64 k = 0; k < 2 * columns; k++) means[k] = sums.mean(k);
    std::memcpy(data + 4, means.data(), 8 * columns);
    if (!out) return found.words - data;
    if (!finite(means.data(), 2 * columns)) return INVALID;
    for (float& mean : means) mean *= -1.0f;
    Means mean{means.data(), columns};
    for (const u8* at = data + head; at < found.words; at += 4) {
        const u32 word = get<u32>(at);
        if (at + 256 < found.words) __builtin_prefetch(out + (get<u32>(at + 256) >> 1), 1);
        out[word >> 1] += mean(0, word);
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
                     [&](i64 p, i64 begin) {
                         return Means{&means[2 * columns * p], columns, begin / columns * columns};
                     });
}
