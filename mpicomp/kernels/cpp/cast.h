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

#if HAVE_AVX2
AVX2 void half_encode_avx2(const float* x, i64 n, u8* data) {
    const __m256 most = _mm256_set1_ps(65504), least = _mm256_set1_ps(-65504);
    i64 i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 v = _mm256_max_ps(least, _mm256_min_ps(most, _mm256_loadu_ps(x + i)));
        const __m128i half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(data + 2 * i), half);
    }
    half_encode_plain(x + i, n - i, data + 2 * i);
}

AVX2 void half_add_avx2(const u8* data, i64 n, float weight, float* out) {
    const __m256 w = _mm256_set1_ps(weight);
    i64 i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + 2 * i));
        const __m256 v = _mm256_mul_ps(_mm256_cvtph_ps(half), w);
        _mm256_storeu_ps(out + i, _mm256_add_ps(_mm256_loadu_ps(out + i), v));
    }
    half_add_plain(data + 2 * i, n - i, weight, out + i);
}
#endif

void bfloat_add(const u8* data, i64 n, float weight, float* out) {
    for (i64 i = 0; i < n; i++)
        out[i] += float_of(u32(get<u16>(data + 2 * i)) << 16) * weight;
}

void half_add(const u8* data, i64 n, float weight, float* out) {
#if HAVE_AVX2
    if (avx2) return half_add_avx2(data, n, weight, out);
#endif
    half_add_plain(data, n, weight, out);
}

// Does no exponent consist of ones? `top` is the exponent's mask, `step` its lowest bit.
bool finite16(const u8* data, i64 n, u16 top, u16 step) {
    u16 seen = 0;
    for (i64 i = 0; i < n; i++) seen |= u16((get<u16>(data + 2 * i) & top) + step);
    return !(seen >> 15);
}

}  // namespace

API void mp_cast_encode(const float* x, i64 n, int kind, u8* data) {
    split(n, 1, grain, [&](int, i64 begin, i64 end) {
        if (kind == BFLOAT16) {
            for (i64 i = begin; i < end; i++) put(data + 2 * i, bfloat_of(x[i]));
            return;
        }
#if HAVE_AVX2
        if (avx2) return half_encode_avx2(x + begin, end - begin, data + 2 * begin);
#endif
        half_encode_plain(x + begin, end - begin, data + 2 * begin);
    });
}

// out += or, if fresh, = the sum over packets of weight * the floats; INVALID if one is not finite.
API i64 mp_float_decode(const u8* const* data, i64 packets, int kind, float weight, float* out,
                        i64 n, int fresh) {
    std::atomic<bool> bad{false};
    add_packets(packets, out, n, fresh, [&](i64 p, i64 at, i64 count, float* to) {
        const u8* from = data[p] + (kind == FLOAT32 ? 4 : 2) * at;
        if (kind == FLOAT32) {
            if (!finite_bytes(from, count)) bad = true;
            for (i64 i = 0; i < count; i++) to[i] += get<float>(from + 4 * i) * weight;
        } else if (kind == FLOAT16) {
            if (!finite16(from, count, 0x7C00, 0x0400)) bad = true;
            half_add(from, count, weight, to);
        } else {
            if (!finite16(from, count, 0x7F80, 0x0080)) bad = true;
            bfloat_add(from, count, weight, to);
        }
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
