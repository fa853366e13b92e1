// TernGrad: clipping level, random ternary codes, and their packings.
#pragma once

#include "cast.h"
#include "philox.h"

namespace {

enum Packing { TWOBIT, PLANAR, INT8, INT16 };

constexpr i64 BRANCH = 1 << 20;  // elements whose folded sums are one row of the next fold

// ---- the level ----

// max |x|, and lane by lane (element i is in lane i % 32) the sums of x and of x * x, in float64.
float terngrad_sums_plain(const float* x, i64 n, float largest, double* sum, double* square) {
    for (i64 i = 0; i < n; i++) {
        const double wide = x[i];
        sum[i % 32] += wide;
        square[i % 32] += wide * wide;
        largest = std::max(largest, std::fabs(x[i]));
    }
    return largest;
}

#if HAVE_AVX2
// The same for up to 32 rows of 32 elements; the sums begin with zero.
AVX2 float terngrad_sums_avx2(const float* x, i64 rows, float largest, double* sum,
                              double* square) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    __m256 most = _mm256_set1_ps(largest);
    for (int lane = 0; lane < 32; lane += 16) {
        __m256d s[4], q[4];
        for (int k = 0; k < 4; k++) s[k] = q[k] = _mm256_setzero_pd();
        for (i64 row = 0; row < rows; row++)
            for (int k = 0; k < 4; k += 2) {
                const __m256 v = _mm256_loadu_ps(x + 32 * row + lane + 4 * k);
                const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
                const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
                most = _mm256_max_ps(most, _mm256_and_ps(v, magnitude));
                s[k] = _mm256_add_pd(s[k], low);
                s[k + 1] = _mm256_add_pd(s[k + 1], high);
                q[k] = _mm256_add_pd(q[k], _mm256_mul_pd(low, low));
                q[k + 1] = _mm256_add_pd(q[k + 1], _mm256_mul_pd(high, high));
            }
        for (int k = 0; k < 4; k++) {
            _mm256_storeu_pd(sum + lane + 4 * k, s[k]);
            _mm256_storeu_pd(square + lane + 4 * k, q[k]);
        }
    }
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, most);
    return *std::max_element(lanes, lanes + 8);
}
#endif

// The folded lanes of up to BRANCH elements to `sums` (32 of x, 32 of x * x); returns max |x|.
float terngrad_branch(const float* x, i64 n, double* sums) {
    double memory[64 * Fold<double>::LEVELS], block[64];
    Fold<double> fold(memory, 64);
    float largest = 0;
    for (i64 at = 0; at < n; at += 1024) {
        const i64 count = std::min<i64>(1024, n - at);
        std::fill(block, block + 64, 0.0);
#if HAVE_AVX2
        if (avx2 && count % 32 == 0)
            largest = terngrad_sums_avx2(x + at, count / 32, largest, block, block + 32);
        else
#endif
            largest = terngrad_sums_plain(x + at, count, largest, block, block + 32);
        fold.add(block);
    }
    std::copy(fold.result(), fold.result() + 64, sums);
    return largest;
}

// The sums of x and of x * x from the branches' folded lanes.
void terngrad_totals(const double* rows, i64 branches, double* total) {
    double memory[64 * Fold<double>::LEVELS], block[64];
    Fold<double> fold(memory, 64);
    for (i64 b = 0; b < branches; b += 32) {
        std::fill(block, block + 64, 0.0);
        for (i64 k = b; k < std::min(b + 32, branches); k++)
            for (int lane = 0; lane < 64; lane++) block[lane] += rows[64 * k + lane];
        fold.add(block);
    }
    const double* lanes = fold.result();
    total[0] = total[1] = 0;
    for (int lane = 0; lane < 32; lane++) total[0] += lanes[lane], total[1] += lanes[32 + lane];
}

// ---- codes ----

struct Ternary {
    float level, scale;

    u8 digit(float x, u32 word) const {  // code + 1
        const bool hit = float(word >> 8) * TINY * scale < std::min(std::fabs(x), level);
        return u8(1 + hit * ((x > 0) - (x < 0)));
    }
};

#if HAVE_AVX2
AVX2 i64 terngrad_digits_avx2(const float* x, i64 n, Ternary t, const u32* words, u8* digits) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    const __m256 level = _mm256_set1_ps(t.level), scale = _mm256_set1_ps(t.scale);
    const __m256 unit = _mm256_set1_ps(TINY), zero = _mm256_setzero_ps();
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    i64 i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i code[4];
        for (int k = 0; k < 4; k++) {
            const __m256 v = _mm256_loadu_ps(x + i + 8 * k);
            const __m256i word =
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + i + 8 * k));
            const __m256 draw = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(word, 8)), unit);
            const __m256 size = _mm256_min_ps(_mm256_and_ps(v, magnitude), level);
            const __m256 hit = _mm256_cmp_ps(_mm256_mul_ps(draw, scale), size, _CMP_LT_OQ);
            const __m256i positive = _mm256_castps_si256(_mm256_cmp_ps(v, zero, _CMP_GT_OQ));
            const __m256i negative = _mm256_castps_si256(_mm256_cmp_ps(v, zero, _CMP_LT_OQ));
            code[k] = _mm256_and_si256(_mm256_castps_si256(hit),
                                       _mm256_sub_epi32(negative, positive));
        }
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(code[0], code[1]),
                                                 _mm256_packs_epi32(code[2], code[3]));
        const __m256i digit = _mm256_add_epi8(_mm256_permutevar8x32_epi32(bytes, order),
                                              _mm256_set1_epi8(1));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(digits + i), digit);
    }
    return i;
}

AVX2 i64 terngrad_pack_avx2(const u8* digits, i64 n, u8* data) {
    const __m256i pair = _mm256_set1_epi16(0x0401), quad = _mm256_set1_epi32(0x00100001);
    const __m256i first = _mm256_set1_epi64x(0x0C080400);  // of each four bytes
    i64 i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m256i d = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(digits + i));
        const __m256i bytes = _mm256_madd_epi16(_mm256_maddubs_epi16(d, pair), quad);
        const __m256i packed = _mm256_shuffle_epi8(bytes, first);
        put(data + i / 4, _mm256_extract_epi32(packed, 0));
        put(data + i / 4 + 4, _mm256_extract_epi32(packed, 4));
    }
    return i;
}

// out += level[digit] for whole groups of 32 two-bit digits; *bad collects the threes among them.
AVX2 i64 terngrad_add_avx2(const u8* data, i64 n, const float* level, float* out, u64* bad) {
    const __m256 table = _mm256_setr_ps(level[0], level[1], level[2], level[3], level[0], level[1],
                                        level[2], level[3]);
    const __m256i shift = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
    i64 i = 0;
    for (; i + 32 <= n; i += 32) {
        const u64 word = get<u64>(data + i / 4);
        *bad |= word & word >> 1 & 0x5555555555555555;
        for (int k = 0; k < 4; k++) {  // permutevar reads the two lowest bits of a lane
            const __m256i digit = _mm256_srlv_epi32(_mm256_set1_epi32(int(word >> 16 * k)), shift);
            const __m256 v = _mm256_permutevar_ps(table, digit);
            _mm256_storeu_ps(out + i + 8 * k, _mm256_add_ps(_mm256_loadu_ps(out + i + 8 * k), v));
        }
    }
    return i;
}
#endif

// f(i, byte, quarter) for elements at ... at + count - 1 of n in the planar layout.
template <class F> void planar(i64 at, i64 count, i64 n, const F& f) {
    const i64 quarter = n / 4 + 1;
    for (i64 i = 0; i < count;) {
        const i64 q = (at + i) / quarter, byte = (at + i) % quarter;
        const i64 run = std::min(count - i, quarter - byte);
        for (i64 k = 0; k < run; k++) f(i + k, byte + k, q);
        i += run;
    }
}

// The digits of elements at ... at + count - 1 of n to their places. TWOBIT: `at` is a multiple of
// 4; PLANAR: the bytes were zero before.
void terngrad_pack(const u8* digits, i64 at, i64 count, i64 n, int packing, u8* data) {
    i64 i = 0;
    if (packing == TWOBIT) {
        u8* to = data + at / 4;
#if HAVE_AVX2
        if (avx2) i = terngrad_pack_avx2(digits, count, to);
#endif
        for (; i < count; i += 4) {
            u8 byte = 0;
            for (i64 k = i; k < std::min(i + 4, count); k++)
                byte |= u8(digits[k] << 2 * (k - i));
            to[i / 4] = byte;
        }
    } else if (packing == PLANAR) {
        planar(at, count, n, [&](i64 k, i64 byte, i64 q) { data[byte] |= u8(digits[k] << 2 * q); });
    } else if (packing == INT8) {
        for (; i < count; i++) data[at + i] = u8(digits[i] - 1);
    } else {
        for (; i < count; i++) put(data + 2 * (at + i), int16_t(digits[i] - 1));
    }
}

// out += code * scale for elements at ... at + count - 1 of n; false if a digit is 3.
bool terngrad_add(const u8* data, i64 at, i64 count, i64 n, int packing, float scale, float* out) {
    const float level[4] = {-1.0f * scale, 0.0f * scale, 1.0f * scale, 0.0f};
    u64 bad = 0;
    i64 i = 0;
    if (packing == TWOBIT) {
        const u8* from = data + at / 4;
#if HAVE_AVX2
        if (avx2) i = terngrad_add_avx2(from, count, level, out, &bad);
#endif
        for (; i < count; i++) {
            const int digit = from[i / 4] >> 2 * (i % 4) & 3;
            bad |= digit == 3;
            out[i] += level[digit];
        }
    } else if (packing == PLANAR) {
        planar(at, count, n, [&](i64 k, i64 byte, i64 q) {
            const int digit = data[byte] >> 2 * q & 3;
            bad |= digit == 3;
            out[k] += level[digit];
        });
    } else if (packing == INT8) {
        for (; i < count; i++) out[i] += float(int8_t(data[at + i])) * scale;
    } else {
        for (; i < count; i++) out[i] += float(get<int16_t>(data + 2 * (at + i))) * scale;
    }
    return !bad;
}

}  // namespace

// levels[0] = where x is clipped, levels[1] = the largest magnitude of all.
API void mp_terngrad_level(const float* x, i64 n, double clip, float* levels) {
    const i64 branches = (n + BRANCH - 1) / BRANCH;
    std::vector<double> rows(64 * branches);
    std::vector<float> most(branches + 1, 0.0f);
    split(branches, 1, 1, [&](int, i64 begin, i64 end) {
        for (i64 b = begin; b < end; b++)
            most[b] = terngrad_branch(x + b * BRANCH, std::min(BRANCH, n - b * BRANCH),
                                      &rows[64 * b]);
    });
    levels[0] = INFINITY;
    levels[1] = *std::max_element(most.begin(), most.end());
    double total[2];
    terngrad_totals(rows.data(), branches, total);
    const double mean = total[0] / double(n), variance = total[1] / double(n) - mean * mean;
    const float level = float(clip * std::sqrt(std::max(variance, 0.0)));
    if (level > 0 && !(levels[1] * 1e-6f > level)) levels[0] = level;
}

API void mp_terngrad_encode(const float* x, i64 n, float level, float scale, u64 seed, u32 rank,
                            u32 step, u32 bucket, i64 start, int packing, u8* data) {
    const Philox key{bucket, step, rank, u32(seed), u32(seed >> 32)};
    const Ternary t{level, scale};
    const auto encode = [&](int, i64 begin, i64 end) {
        constexpr i64 STEP = 1024;
        alignas(32) u32 room[STEP + 8];
        alignas(32) u8 digits[STEP];
        for (i64 at = begin; at < end; at += STEP) {
            const i64 count = std::min(STEP, end - at);
            fetch(x + at, count);  // while random words are made
            const u32* words = philox_words(key, start + at, count, room);
            i64 i = 0;
#if HAVE_AVX2
            if (avx2) i = terngrad_digits_avx2(x + at, count, t, words, digits);
#endif
            for (; i < count; i++) digits[i] = t.digit(x[at + i], words[i]);
            terngrad_pack(digits, at, count, n, packing, data);
        }
    };
    if (packing != PLANAR) return split(n, 1024, grain / 4, encode);
    if (!n) return;
    std::memset(data, 0, n / 4 + 1);
    encode(0, 0, n);  // elements far apart share a byte: one thread; then the padding 0, 1, 2, 3
    planar(n, 4 - n % 4, n, [&](i64 k, i64 byte, i64 q) { data[byte] |= u8(k << 2 * q); });
}

// out += or, if fresh, = the sum over packets of code * (weight * scale); INVALID for a digit of 3.
API i64 mp_terngrad_decode(const u8* const* data, const float* scales, i64 packets, int packing,
                           float weight, float* out, i64 n, int fresh) {
    std::atomic<bool> bad{false};
    add_packets(packets, out, n, fresh, [&](i64 p, i64 at, i64 count, float* to) {
        if (!terngrad_add(data[p], at, count, n, packing, weight * scales[p], to)) bad = true;
    });
    return bad ? INVALID : 0;
}
