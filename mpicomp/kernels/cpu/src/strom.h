// Strom: elements beyond a threshold, as words index << 1 | positive.
#pragma once

#include "words.h"

namespace {

struct Threshold {
    float tau;
    bool strict;
    bool passes(float v) const { return strict ? std::fabs(v) > tau : std::fabs(v) >= tau; }
};

// The words of elements begin ... end - 1 of owed + grad (of grad, if `owed` is null) go to
// `words`, what is still owed goes to `out`. Returns the end of the words.
u8* strom_plain(const float* grad, const float* owed, float* out, i64 begin, i64 end, Threshold t,
                u8* words) {
    const float minus = -1.0f * t.tau;
    for (i64 i = begin; i < end; i++) {
        float v = owed ? owed[i] + grad[i] : grad[i];
        if (t.passes(v)) {
            put(words, u32(i) << 1 | (v > 0));
            words += 4;
            v += v > 0 ? minus : -minus;
        }
        if (owed) out[i] = v;
    }
    return words;
}

#if HAVE_AVX2
// 32 elements at a time; so few pass that one branch for all 32 pays.
template <bool OWED, bool STRICT>
AVX2 u8* strom_avx2(const float* grad, const float* owed, float* out, i64 begin, i64 end,
                    Threshold t, bool stream, u8* words) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    const __m256 tau = _mm256_set1_ps(t.tau);
    const float minus = -1.0f * t.tau, level[2] = {-minus, minus};
    i64 i = begin + (stream ? until_aligned(out + begin, end - begin) : 0);
    words = strom_plain(grad, owed, out, begin, i, t, words);
    for (; i + 32 <= end; i += 32) {
        __m256 v[4], hit[4];
        next_page(grad + i);
        if (OWED) next_page(owed + i);
        for (int k = 0; k < 4; k++) {
            v[k] = _mm256_loadu_ps(grad + i + 8 * k);
            if (OWED) v[k] = _mm256_add_ps(_mm256_loadu_ps(owed + i + 8 * k), v[k]);
            hit[k] = _mm256_cmp_ps(_mm256_and_ps(v[k], magnitude), tau,
                                   STRICT ? _CMP_GT_OQ : _CMP_GE_OQ);
        }
        const __m256 any = _mm256_or_ps(_mm256_or_ps(hit[0], hit[1]),
                                        _mm256_or_ps(hit[2], hit[3]));
        if (_mm256_movemask_ps(any)) {
            alignas(32) float group[32];
            u32 mask = 0;
            for (int k = 0; k < 4; k++) {
                _mm256_store_ps(group + 8 * k, v[k]);
                mask |= u32(_mm256_movemask_ps(hit[k])) << 8 * k;
            }
            for (; mask; mask &= mask - 1, words += 4) {
                const int at = __builtin_ctz(mask);
                const bool positive = group[at] > 0;
                put(words, u32(i + at) << 1 | positive);
                group[at] += level[positive];
            }
            for (int k = 0; k < 4; k++) v[k] = _mm256_load_ps(group + 8 * k);
        }
        for (int k = 0; OWED && k < 4; k++) store(out + i + 8 * k, v[k], stream);
    }
    if (stream) _mm_sfence();
    return strom_plain(grad, owed, out, i, end, t, words);
}
#endif

u8* strom_scan(const float* grad, const float* owed, float* out, i64 begin, i64 end, Threshold t,
               bool stream, u8* words) {
#if HAVE_AVX2
    if (avx2) {
        const auto scan = owed ? t.strict ? strom_avx2<true, true> : strom_avx2<true, false>
                               : t.strict ? strom_avx2<false, true> : strom_avx2<false, false>;
        return scan(grad, owed, out, begin, end, t, stream, words);
    }
#endif
    return strom_plain(grad, owed, out, begin, end, t, words);
}

}  // namespace

// `owed` and `out` null: encodes `grad`. Room for 4 * n bytes in `data`. Returns the bytes used.
API i64 mp_strom_encode(const float* grad, const float* owed, float* out, i64 n, float tau,
                        int strict, u8* data) {
    const bool stream = owed && out != owed && n >= stream_from;
    Pieces pieces;
    split(n, 32, grain, [&](int part, i64 begin, i64 end) {
        u8* words = data + 4 * begin;
        const Threshold t{tau, strict != 0};
        u8* stop = strom_scan(grad, owed, out, begin, end, t, stream, words);
        pieces.piece[part] = {4 * begin, stop - words};
    });
    return pieces.join(data);
}

// out += or, if fresh, = the sum over packets of +-(weight * tau) at the indices named. `sizes` in
// bytes. INVALID unless indices ascend and stay below n; `out` is then as it was.
API i64 mp_strom_decode(const u8* const* data, const i64* sizes, i64 packets, float tau,
                        float weight, float* out, i64 n, int fresh) {
    struct Value {
        float level[2];
        float operator()(i64, u32 word) const { return level[word & 1]; }
    };
    const float quantum = weight * tau;
    return add_words(data, sizes, packets, out, n, fresh,
                     [&](i64, i64) { return Value{{-quantum, quantum}}; });
}
