// Dense float32 and the two 16-bit floats.
#pragma once

#include "sums.h"

namespace {

enum Kind { FLOAT32, FLOAT16, BFLOAT16 };

constexpr float TINY = 5.9604644775390625e-8f;  // 2**-24

u16 half_of(float x) {
    const u32 sign = bits_of(x) >> 16 & 0x8000;
    u32 a = std::min<u32>(bits_of(x) & 0x7FFFFFFF, 0x477FE000);  // 65504
    if (a < 0x38800000)  // below 2**-14 halves lie 2**-24 apart, like floats from 0.5 on
        return u16(sign | (bits_of(float_of(a) + 0.5f) - 0x3F000000));
    a += 0xFFF + (a >> 13 & 1);
    return u16(sign | (a - 0x38000000) >> 13);
}

float widen_half(u16 half) {
    const u32 sign = u32(half & 0x8000) << 16, a = half & 0x7FFF;
    if (a < 0x400) return float_of(bits_of(float(a) * TINY) | sign);
    return float_of(sign | ((a << 13) + (a < 0x7C00 ? 0x38000000 : 0x70000000)));
}

u16 bfloat_of(float x) {
    const u32 bits = bits_of(x), size = bits & 0x7FFFFFFF;
    const u32 rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const bool overflow = size < 0x7F800000 && (rounded & 0x7FFF) >= 0x7F80;
    return u16(size > 0x7F800000 ? bits >> 16 | 0x40 : rounded - overflow);  // NaN stays NaN
}

void half_encode_plain(const float* x, i64 n, u8* data) {
    for (i64 i = 0; i < n; i++) put(data + 2 * i, half_of(x[i]));
}

void half_add_plain(const u8* data, i64 n, float weight, float* out) {
    for (i64 i = 0; i < n; i++) out[i] += widen_half(get<u16>(data + 2 * i)) * weight;
}

void bfloat_encode_plain(const float* x, i64 n, u8* data) {
    for (i64 i = 0; i < n; i++) put(data + 2 * i, bfloat_of(x[i]));
}

void bfloat_add_plain(const u8* data, i64 n, float weight, float* out) {
    for (i64 i = 0; i < n; i++)
        out[i] += float_of(u32(get<u16>(data + 2 * i)) << 16) * weight;
}

#if HAVE_AVX2
AVX2 inline void put_eight(u8* to, __m128i eight) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), eight);
}

AVX2 inline __m128i get_eight(const u8* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

AVX2 inline void add_eight(__m256 values, __m256 weight, float* out) {
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), _mm256_mul_ps(values, weight)));
}

AVX2 void half_encode_avx2(const float* x, i64 n, u8* data) {
    const __m256 most = _mm256_set1_ps(65504), least = _mm256_set1_ps(-65504);
    i64 i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 v = _mm256_max_ps(least, _mm256_min_ps(most, _mm256_loadu_ps(x + i)));
        put_eight(data + 2 * i, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    half_encode_plain(x + i, n - i, data + 2 * i);
}

AVX2 void half_add_avx2(const u8* data, i64 n, float weight, float* out) {
    const __m256 w = _mm256_set1_ps(weight);
    i64 i = 0;
    for (; i + 8 <= n; i += 8)
        add_eight(_mm256_cvtph_ps(get_eight(data + 2 * i)), w, out + i);
    half_add_plain(data + 2 * i, n - i, weight, out + i);
}

AVX2 void bfloat_encode_avx2(const float* x, i64 n, u8* data) {
    const __m256i inf = _mm256_set1_epi32(0x7F800000), size_mask = _mm256_set1_epi32(0x7FFFFFFF);
    const __m256i one = _mm256_set1_epi32(1), half = _mm256_set1_epi32(0x7FFF);
    const __m256i last = _mm256_set1_epi32(0x7F7F), quiet = _mm256_set1_epi32(0x40);
    i64 i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + i));
        const __m256i size = _mm256_and_si256(bits, size_mask), high = _mm256_srli_epi32(bits, 16);
        const __m256i even = _mm256_add_epi32(half, _mm256_and_si256(high, one));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, even), 16);
        const __m256i over = _mm256_and_si256(  // -1 where a finite number would become infinite
            _mm256_cmpgt_epi32(_mm256_and_si256(rounded, half), last),
            _mm256_cmpgt_epi32(inf, size));
        const __m256i words = _mm256_blendv_epi8(_mm256_add_epi32(rounded, over),
                                                 _mm256_or_si256(high, quiet),
                                                 _mm256_cmpgt_epi32(size, inf));
        const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
        put_eight(data + 2 * i, _mm256_castsi256_si128(pairs));
    }
    bfloat_encode_plain(x + i, n - i, data + 2 * i);
}

AVX2 void bfloat_add_avx2(const u8* data, i64 n, float weight, float* out) {
    const __m256 w = _mm256_set1_ps(weight);
    i64 i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(get_eight(data + 2 * i)), 16);
        add_eight(_mm256_castsi256_ps(wide), w, out + i);
    }
    bfloat_add_plain(data + 2 * i, n - i, weight, out + i);
}
#endif

void cast_encode(const float* x, i64 n, int kind, u8* data) {
#if HAVE_AVX2
    if (avx2) return (kind == FLOAT16 ? half_encode_avx2 : bfloat_encode_avx2)(x, n, data);
#endif
    (kind == FLOAT16 ? half_encode_plain : bfloat_encode_plain)(x, n, data);
}

void cast_add(const u8* data, i64 n, int kind, float weight, float* out) {
#if HAVE_AVX2
    if (avx2) return (kind == FLOAT16 ? half_add_avx2 : bfloat_add_avx2)(data, n, weight, out);
#endif
    (kind == FLOAT16 ? half_add_plain : bfloat_add_plain)(data, n, weight, out);
}

// Does no exponent consist of ones? `top` is the exponent's mask, `step` its lowest bit.
bool finite16(const u8* data, i64 n, u16 top, u16 step) {
    u16 seen = 0;
    for (i64 i = 0; i < n; i++) seen |= u16((get<u16>(data + 2 * i) & top) + step);
    return !(seen >> 15);
}

}  // namespace

API void mp_cast_encode(const float* x, i64 n, int kind, u8* data) {
    split(n, 8, grain, [&](int, i64 begin, i64 end) {
        cast_encode(x + begin, end - begin, kind, data + 2 * begin);
    });
}

// out += or, if fresh, = the sum over packets of weight * the floats; INVALID if one is not finite.
API i64 mp_float_decode(const u8* const* data, i64 packets, int kind, float weight, float* out,
                        i64 n, int fresh) {
    std::atomic<bool> bad{false};
    add_packets(packets, out, n, fresh, [&](i64 p, i64 at, i64 count, float* to) {
        if (kind == FLOAT32) {
            const u8* from = data[p] + 4 * at;
            if (!finite_bytes(from, count)) bad = true;
            for (i64 i = 0; i < count; i++) to[i] += get<float>(from + 4 * i) * weight;
            return;
        }
        const u8* from = data[p] + 2 * at;
        const u16 top = kind == FLOAT16 ? 0x7C00 : 0x7F80, step = kind == FLOAT16 ? 0x400 : 0x80;
        if (!finite16(from, count, top, step)) bad = true;
        cast_add(from, count, kind, weight, to);
    });
    return bad ? INVALID : 0;
}

// out = weight * the floats; INVALID if a product is not finite.
API i64 mp_dense_scale(const u8* data, i64 n, float weight, float* out) {
    std::atomic<bool> bad{false};
    split(n, CHUNK, grain, [&](int, i64 begin, i64 end) {
        for (i64 at = begin; at < end; at += CHUNK) {
            const i64 stop = std::min(end, at + CHUNK);
            for (i64 i = at; i < stop; i++) out[i] = get<float>(data + 4 * i) * weight;
            if (!finite(out + at, stop - at)) bad = true;
        }
    });
    return bad ? INVALID : 0;
}
