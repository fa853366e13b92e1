// DoReFa: random codes of 1 to 8 bits.
#pragma once

#include "philox.h"
#include "sums.h"

namespace {

// The codes 0 ... steps of one tensor; `scale` is its largest magnitude.
struct Quantiser {
    float scale, half, steps;

    u8 code(float x, u32 word) const {
        const float draw = float(word >> 8) * TINY - 0.5f;
        const float y = x / scale * half + half + draw;
        const float held = std::min(std::max(y, 0.0f), steps);  // whole bounds: hold, then round
        return u8((held + 12582912.0f) - 12582912.0f);  // 1.5 * 2**23: to nearest, half to even
    }
};

void dorefa_codes_plain(const float* x, i64 n, Quantiser q, const u32* words, u8* codes) {
    for (i64 i = 0; i < n; i++) codes[i] = q.code(x[i], words[i]);
}

#if HAVE_AVX2
AVX2 void dorefa_codes_avx2(const float* x, i64 n, Quantiser q, const u32* words, u8* codes) {
    const __m256 scale = _mm256_set1_ps(q.scale), half = _mm256_set1_ps(q.half);
    const __m256 steps = _mm256_set1_ps(q.steps), zero = _mm256_setzero_ps();
    const __m256 unit = _mm256_set1_ps(TINY), middle = _mm256_set1_ps(0.5f);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    i64 i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i code[4];
        for (int k = 0; k < 4; k++) {
            const __m256i word =
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + i + 8 * k));
            const __m256 draw = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(word, 8)), unit);
            const __m256 t = _mm256_div_ps(_mm256_loadu_ps(x + i + 8 * k), scale);
            const __m256 level = _mm256_add_ps(_mm256_mul_ps(t, half), half);
            const __m256 y = _mm256_add_ps(level, _mm256_sub_ps(draw, middle));
            const __m256 held = _mm256_min_ps(_mm256_max_ps(y, zero), steps);
            code[k] = _mm256_cvtps_epi32(held);
        }
        const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(code[0], code[1]),
                                                  _mm256_packs_epi32(code[2], code[3]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i),
                            _mm256_permutevar8x32_epi32(bytes, order));
    }
    dorefa_codes_plain(x + i, n - i, q, words + i, codes + i);
}
#endif

void dorefa_codes(const float* x, i64 n, Quantiser q, const u32* words, u8* codes) {
#if HAVE_AVX2
    if (avx2) return dorefa_codes_avx2(x, n, q, words, codes);
#endif
    dorefa_codes_plain(x, n, q, words, codes);
}

// Eight codes of B bits, a byte each, moved together, and apart again: bytes to pairs, quads,
// eights.
template <int B> inline u64 together(u64 w) {
    w = (w & 0x00FF00FF00FF00FF) | (w & 0xFF00FF00FF00FF00) >> (8 - B);
    w = (w & 0x0000FFFF0000FFFF) | (w & 0xFFFF0000FFFF0000) >> (16 - 2 * B);
    return (w & 0x00000000FFFFFFFF) | (w & 0xFFFFFFFF00000000) >> (32 - 4 * B);
}

template <int B> inline u64 apart(u64 w) {
    constexpr u64 ones = ~u64(0), quad = ones >> (64 - 4 * B), pair = ones >> (64 - 2 * B);
    constexpr u64 one = ones >> (64 - B);
    w = (w & quad) | (w >> 4 * B & quad) << 32;
    w = (w & (pair | pair << 32)) | (w >> 2 * B & (pair | pair << 32)) << 16;
    constexpr u64 every = one | one << 16 | one << 32 | one << 48;
    return (w & every) | (w >> B & every) << 8;
}

#if HAVE_AVX2
AVX2 i64 dorefa_pack4_avx2(const u8* codes, i64 n, u8* data) {
    i64 i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
        const __m256i pairs = _mm256_maddubs_epi16(c, _mm256_set1_epi16(0x1001));
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(data + i / 2), _mm256_castsi256_si128(bytes));
    }
    return i;
}
#endif

template <int B> void dorefa_pack(const u8* codes, i64 n, u8* data) {
#if HAVE_AVX2
    if (B == 4 && avx2) {
        const i64 done = dorefa_pack4_avx2(codes, n, data);
        codes += done, n -= done, data += done / 2;
    }
#endif
    for (; n >= 8; n -= 8, codes += 8, data += B) {
        const u64 w = together<B>(get<u64>(codes));
        std::memcpy(data, &w, B);
    }
    u64 w = 0;
    for (i64 i = 0; i < n; i++) w |= u64(codes[i]) << B * i;
    std::memcpy(data, &w, (n * B + 7) / 8);
}

template <int B> void dorefa_unpack(const u8* data, i64 n, u8* codes) {
    for (; n >= 8; n -= 8, codes += 8, data += B) {
        u64 w = 0;
        std::memcpy(&w, data, B);
        put(codes, apart<B>(w));
    }
    u64 w = 0;
    std::memcpy(&w, data, (n * B + 7) / 8);
    for (i64 i = 0; i < n; i++) codes[i] = u8(w >> B * i & ((1 << B) - 1));
}

using Pack = void (*)(const u8*, i64, u8*);
constexpr Pack DOREFA_PACK[] = {nullptr,        dorefa_pack<1>, dorefa_pack<2>,
                                dorefa_pack<3>, dorefa_pack<4>, dorefa_pack<5>,
                                dorefa_pack<6>, dorefa_pack<7>, dorefa_pack<8>};
constexpr Pack DOREFA_UNPACK[] = {nullptr,          dorefa_unpack<1>, dorefa_unpack<2>,
                                  dorefa_unpack<3>, dorefa_unpack<4>, dorefa_unpack<5>,
                                  dorefa_unpack<6>, dorefa_unpack<7>, dorefa_unpack<8>};

#if HAVE_AVX2
// out += level[code] for whole groups of 8 codes of B <= 4 bits, 32 bits of data in reach.
template <int B> AVX2 i64 dorefa_add_avx2(const u8* data, i64 n, const float* level, float* out) {
    const __m256 low = _mm256_loadu_ps(level), high = _mm256_loadu_ps(level + 8);
    const __m256i shift = _mm256_setr_epi32(0, B, 2 * B, 3 * B, 4 * B, 5 * B, 6 * B, 7 * B);
    const __m256i mask = _mm256_set1_epi32((1 << B) - 1);
    i64 i = 0;
    for (; i + 32 <= n; i += 8) {
        const __m256i word = _mm256_set1_epi32(get<int>(data + i / 8 * B));
        const __m256i code = _mm256_and_si256(_mm256_srlv_epi32(word, shift), mask);
        __m256 v = _mm256_permutevar8x32_ps(low, code);
        if (B == 4) {
            const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
            v = _mm256_blendv_ps(v, _mm256_permutevar8x32_ps(high, code), upper);
        }
        _mm256_storeu_ps(out + i, _mm256_add_ps(_mm256_loadu_ps(out + i), v));
    }
    return i;
}
#endif

// out += level[code] for n codes.
void dorefa_add(const u8* data, i64 n, int bits, const float* level, float* out) {
    i64 i = 0;
#if HAVE_AVX2
    if (avx2 && bits <= 4) {
        const auto add = bits == 1   ? dorefa_add_avx2<1>
                         : bits == 2 ? dorefa_add_avx2<2>
                         : bits == 3 ? dorefa_add_avx2<3>
                                     : dorefa_add_avx2<4>;
        i = add(data, n, level, out);
    }
#endif
    u8 codes[CHUNK];
    for (; i < n; i += CHUNK) {
        const i64 count = std::min(CHUNK, n - i);
        DOREFA_UNPACK[bits](data + i / 8 * bits, count, codes);
        for (i64 k = 0; k < count; k++) out[i + k] += level[codes[k]];
    }
}

// weight * (((2 q - n) / n) * scale) for each code q; false if one is not finite.
bool dorefa_levels(int bits, float scale, float weight, float* level) {
    const int steps = (1 << bits) - 1;
    for (int q = 0; q <= steps; q++)
        level[q] = float(2 * q - steps) / float(steps) * scale * weight;
    return finite(level, steps + 1);
}

}  // namespace

API float mp_largest(const float* x, i64 n) {
    std::atomic<u32> largest{0};  // magnitudes are ordered like their bits
    split(n, 1, grain, [&](int, i64 begin, i64 end) {
        const u32 most = bits_of(magnitude(x + begin, end - begin));
        for (u32 known = largest; most > known && !largest.compare_exchange_weak(known, most);)
            ;
    });
    return float_of(largest);
}

// `owed` and `out` null: encodes `grad`; else owed + grad, and what is still owed goes to `out`.
// `width`: bytes an element of the integers 2 q - n, or 0 for packed codes. INVALID: see decode.
API i64 mp_dorefa_encode(const float* grad, const float* owed, float* out, i64 n, float scale,
                         int bits, u64 seed, u32 rank, u32 step, u32 bucket, i64 start, int width,
                         u8* data) {
    const Philox key{bucket, step, rank, u32(seed), u32(seed >> 32)};
    const int steps = (1 << bits) - 1;
    const Quantiser quantiser{scale, float(steps) / 2, float(steps)};
    const bool stream = owed && out != owed && n >= stream_from;
    float level[256];
    if (!dorefa_levels(bits, scale, -1.0f, level) && owed) return INVALID;
    split(n, 1024, grain / 4, [&](int, i64 begin, i64 end) {
        constexpr i64 STEP = 1024;
        alignas(32) u32 room[STEP + 8];
        alignas(32) float v[STEP];
        alignas(32) u8 codes[STEP];
        for (i64 at = begin; at < end; at += STEP) {
            const i64 count = std::min(STEP, end - at);
            fetch(grad + at, count);  // while random words are made
            const u32* words = philox_words(key, start + at, count, room);
            const float* x = grad + at;
            if (owed) {
                for (i64 i = 0; i < count; i++) v[i] = owed[at + i] + grad[at + i];
                x = v;
            }
            dorefa_codes(x, count, quantiser, words, codes);
            if (width == 0) DOREFA_PACK[bits](codes, count, data + at / 8 * bits);
            for (i64 i = 0; width == 1 && i < count; i++) data[at + i] = u8(2 * codes[i] - steps);
            for (i64 i = 0; width == 2 && i < count; i++)
                put(data + 2 * (at + i), int16_t(2 * codes[i] - steps));
            for (i64 i = 0; width == 4 && i < count; i++)
                put(data + 4 * (at + i), int32_t(2 * codes[i] - steps));
            if (!owed) continue;
            if (width == 0) dorefa_add(data + at / 8 * bits, count, bits, level, v);
            for (i64 i = 0; width && i < count; i++) v[i] += level[codes[i]];
            copy(v, out + at, count, stream);
        }
    });
    return 0;
}

// out += or, if fresh, = the sum over packets of weight * what their codes mean. INVALID if a value
// may not be finite or if bits behind the last code are set.
API i64 mp_dorefa_decode(const u8* const* data, const float* scales, i64 packets, int bits,
                         int width, float weight, float* out, i64 n, int fresh) {
    std::vector<float> memory(256 * packets);
    const float steps = float((1 << bits) - 1);
    for (i64 p = 0; p < packets; p++) {
        if (width == 0 && n * bits % 8 && data[p][n * bits / 8] >> n * bits % 8) return INVALID;
        if (!dorefa_levels(bits, scales[p], weight, &memory[256 * p]) && width == 0) return INVALID;
    }
    std::atomic<bool> bad{false};
    add_packets(packets, out, n, fresh, [&](i64 p, i64 at, i64 count, float* to) {
        const u8* from = data[p] + (width ? width * at : at / 8 * bits);
        if (width == 0) return dorefa_add(from, count, bits, &memory[256 * p], to);
        float v[CHUNK];
        for (i64 i = 0; i < count; i++) {
            const float whole = width == 1   ? float(int8_t(from[i]))
                                : width == 2 ? float(get<int16_t>(from + 2 * i))
                                             : float(get<int32_t>(from + 4 * i));
            v[i] = whole / steps * scales[p] * weight;
            to[i] += v[i];
        }
        if (!finite(v, count)) bad = true;
    });
    return bad ? INVALID : 0;
}
