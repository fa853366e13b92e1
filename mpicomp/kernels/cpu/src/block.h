// Codes with a scale for each block of elements: whole numbers of 2 to 8 bits, or e4m3 floats.
#pragma once

#include <type_traits>

#include "cast.h"
#include "dorefa.h"
#include "terngrad.h"

namespace {

enum Form { WHOLE, E4M3 };

constexpr u32 BLOCK_LEAST = 0x0080, BLOCK_INFINITE = 0x7F80;  // scales, as bfloat16
constexpr i64 BLOCK_UNIT = 2048;  // elements, in whole blocks, that are encoded together

// What the numbers of a tensor become. `levels` is the largest code, or the largest e4m3 number.
struct Grid {
    i64 size;
    int form, levels, width;
    bool l2;

    Grid(i64 size_, int form_, int levels_, bool l2_)
        : size(size_), form(form_), levels(levels_), width(8), l2(l2_) {
        if (form == WHOLE)
            for (width = 1; levels_; levels_ /= 2) width++;
    }

    u32 most() const { return bits_of(3.4028234663852886e38f / float(levels)) >> 16; }

    // The scale of a block, as bfloat16, from its largest magnitude (its bits).
    u32 scale(u32 largest, const float* v, i64 n) const {
        if (!largest) return 0;
        if (largest >= 0x7F800000) return BLOCK_INFINITE;
        float wide = float_of(largest) / float(levels);
        if (l2) {
            double sums[64], squares = 0;
            terngrad_branch(v, n, sums);
            for (int lane = 32; lane < 64; lane++) squares += sums[lane];
            wide = float(std::sqrt(squares) / double(levels));
        }
        return std::min(std::max((bits_of(wide) + 0xFFFF) >> 16, BLOCK_LEAST), most());
    }
};

// The numbers of one block. A code is that of x * inverse.
struct Rounding {
    float scale, inverse, most;
    int mask;  // the bits of a code
    bool random;

    // The nearest whole number (half to even), or one of the two neighbours.
    float whole(float y, u32 word) const {
        if (!random) return (y + 12582912.0f) - 12582912.0f;  // 1.5 * 2**23; |y| < 2**22
        const float below = std::floor(y);
        return below + float(float(word >> 8) * TINY < y - below);
    }

    float held(float x) const { return std::min(std::max(x * inverse, -most), most); }
};

// Two kinds of code: what y = x / scale becomes, and what a code is worth in scales.
struct Whole {
    static u8 code(float x, u32 word, const Rounding& r, float* worth) {
        const int code = int(r.whole(r.held(x), word));
        *worth = float(code);
        return u8(code & r.mask);
    }
};

struct Small {
    static u8 code(float x, u32 word, const Rounding& r, float* worth) {
        const float y = r.held(x);
        const u32 bits = bits_of(y), sign = bits & 0x80000000;
        const u32 exponent = std::max(bits >> 23 & 0xFF, u32(121));
        // multiples of 2**(exponent - 130): float_of makes the two powers of two
        const float steps = r.whole(std::fabs(y) * float_of((257 - exponent) << 23), word);
        *worth = float_of(bits_of(steps * float_of((exponent - 3) << 23)) | sign);
        return u8(((exponent - 120) << 3) + u32(steps) - 8 + (sign >> 24));
    }
};

template <class Kind>
void block_codes_plain(float* v, i64 n, const Rounding& r, const u32* words, u8* codes, bool owed) {
    for (i64 i = 0; i < n; i++) {
        float worth;
        codes[i] = Kind::code(v[i], words ? words[i] : 0, r, &worth);
        if (owed) v[i] -= worth * r.scale;
    }
}

// The largest magnitude, as bits: a NaN is larger than infinity. v = owed + grad where there is v.
u32 block_largest_plain(const float* grad, const float* owed, i64 n, float* v, u32 most) {
    for (i64 i = 0; i < n; i++) {
        const float x = owed ? owed[i] + grad[i] : grad[i];
        if (v) v[i] = x;
        most = std::max(most, bits_of(x) & 0x7FFFFFFF);
    }
    return most;
}

#if HAVE_AVX2
template <bool OWED>
AVX2 u32 block_largest_avx2(const float* grad, const float* owed, i64 n, float* v) {
    const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i most[4] = {};
    i64 i = 0;
    for (; i + 32 <= n; i += 32) {
        next_page(grad + i);
        if (OWED) next_page(owed + i);
        for (int k = 0; k < 4; k++) {
            __m256 x = _mm256_loadu_ps(grad + i + 8 * k);
            if (OWED) {
                x = _mm256_add_ps(_mm256_loadu_ps(owed + i + 8 * k), x);
                _mm256_store_ps(v + i + 8 * k, x);
            }
            const __m256i size = _mm256_and_si256(_mm256_castps_si256(x), mask);
            most[k] = _mm256_max_epi32(most[k], size);
        }
    }
    const __m256i both = _mm256_max_epi32(_mm256_max_epi32(most[0], most[1]),
                                          _mm256_max_epi32(most[2], most[3]));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1));
    return block_largest_plain(grad + i, OWED ? owed + i : nullptr, n - i, OWED ? v + i : nullptr,
                               u32(_mm_cvtsi128_si32(four)));
}

template <bool RANDOM> AVX2 inline __m256 block_whole_avx2(__m256 y, const u32* words) {
    if (!RANDOM) return _mm256_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    const __m256 draw = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(word, 8)),
                                      _mm256_set1_ps(TINY));
    const __m256 below = _mm256_floor_ps(y);
    const __m256 above = _mm256_cmp_ps(draw, _mm256_sub_ps(y, below), _CMP_LT_OQ);
    return _mm256_add_ps(below, _mm256_and_ps(above, _mm256_set1_ps(1.0f)));
}

// Codes of whole groups of 32; what remains goes to v if OWED.
template <class Kind, bool RANDOM, bool OWED>
AVX2 void block_codes_avx2(float* v, i64 n, const Rounding& r, const u32* words, u8* codes) {
    const __m256 scale = _mm256_set1_ps(r.scale), inverse = _mm256_set1_ps(r.inverse);
    const __m256 most = _mm256_set1_ps(r.most), least = _mm256_set1_ps(-r.most);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i mask = _mm256_set1_epi8(char(r.mask));
    for (i64 i = 0; i < n; i += 32) {
        __m256i code[4];
        for (int k = 0; k < 4; k++) {
            const __m256 x = _mm256_loadu_ps(v + i + 8 * k);
            const __m256 y = _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(x, inverse), least), most);
            const u32* word = RANDOM ? words + i + 8 * k : nullptr;
            __m256 worth;
            if constexpr (std::is_same<Kind, Whole>::value) {
                code[k] = _mm256_cvtps_epi32(block_whole_avx2<RANDOM>(y, word));
                worth = _mm256_cvtepi32_ps(code[k]);
            } else {
                const __m256 signs = _mm256_set1_ps(-0.0f), sign = _mm256_and_ps(y, signs);
                const __m256 size = _mm256_andnot_ps(signs, y);
                const __m256i exponent = _mm256_max_epi32(
                    _mm256_srli_epi32(_mm256_castps_si256(size), 23), _mm256_set1_epi32(121));
                const __m256i finer = _mm256_sub_epi32(_mm256_set1_epi32(257), exponent);
                const __m256i step = _mm256_sub_epi32(exponent, _mm256_set1_epi32(3));
                const __m256 steps = block_whole_avx2<RANDOM>(
                    _mm256_mul_ps(size, _mm256_castsi256_ps(_mm256_slli_epi32(finer, 23))), word);
                worth = _mm256_or_ps(sign, _mm256_mul_ps(
                    steps, _mm256_castsi256_ps(_mm256_slli_epi32(step, 23))));
                const __m256i begin = _mm256_slli_epi32(
                    _mm256_sub_epi32(exponent, _mm256_set1_epi32(121)), 3);
                code[k] = _mm256_or_si256(
                    _mm256_add_epi32(begin, _mm256_cvtps_epi32(steps)),
                    _mm256_srli_epi32(_mm256_castps_si256(sign), 24));
            }
            if (OWED)
                _mm256_storeu_ps(v + i + 8 * k, _mm256_sub_ps(x, _mm256_mul_ps(worth, scale)));
        }
        const __m256i low = _mm256_packs_epi32(code[0], code[1]);
        const __m256i high = _mm256_packs_epi32(code[2], code[3]);
        const bool whole = std::is_same<Kind, Whole>::value;
        const __m256i bytes = whole ? _mm256_packs_epi16(low, high)
                                    : _mm256_packus_epi16(low, high);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i),
                            _mm256_and_si256(_mm256_permutevar8x32_epi32(bytes, order), mask));
    }
}
#endif

// A byte for each code of n elements of one block; if `owed`, what remains goes to v.
template <class Kind>
void block_codes(float* v, i64 n, const Rounding& r, const u32* words, u8* codes, bool owed) {
    i64 i = 0;
#if HAVE_AVX2
    if (avx2) {
        i = n / 32 * 32;
        const auto code = r.random ? owed ? block_codes_avx2<Kind, true, true>
                                          : block_codes_avx2<Kind, true, false>
                                   : owed ? block_codes_avx2<Kind, false, true>
                                          : block_codes_avx2<Kind, false, false>;
        code(v, i, r, words, codes);
    }
#endif
    block_codes_plain<Kind>(v + i, n - i, r, words ? words + i : nullptr, codes + i, owed);
}

// v = owed + grad (or only its largest magnitude, where nothing is owed).
u32 block_largest(const float* grad, const float* owed, i64 n, float* v) {
#if HAVE_AVX2
    const auto largest = owed ? block_largest_avx2<true> : block_largest_avx2<false>;
    if (avx2) return largest(grad, owed, n, v);
#endif
    return block_largest_plain(grad, owed, n, owed ? v : nullptr, 0);
}

// ---- decoding ----

struct SmallValues {  // of e4m3 bytes
    float value[256];

    SmallValues() {
        for (int c = 0; c < 128; c++) {
            value[c] = std::ldexp(float(8 * (c > 7) + c % 8), std::max(c / 8, 1) - 10);
            value[c + 128] = -value[c];
        }
    }
};
const SmallValues SMALL;

// out += code * scale * weight. False if a code (but for its sign) is larger than `most`.
bool block_add_plain(const u8* codes, i64 n, int form, u8 most, float scale, float weight,
                     float* out) {
    bool fine = true;
    for (i64 i = 0; i < n; i++) {
        const int code = int8_t(codes[i]);
        fine &= u8(form == WHOLE ? std::abs(code) : code & 0x7F) <= most;
        out[i] += (form == WHOLE ? float(code) : SMALL.value[codes[i]]) * scale * weight;
    }
    return fine;
}

#if HAVE_AVX2
template <bool WHOLES>
AVX2 bool block_add_avx2(const u8* codes, i64 n, u8 most, float scale, float weight, float* out) {
    const __m256 s = _mm256_set1_ps(WHOLES ? scale : 256 * scale), w = _mm256_set1_ps(weight);
    const __m256i allowed = _mm256_set1_epi8(char(most));
    __m256i beyond = _mm256_setzero_si256();
    for (i64 i = 0; i < n; i += 32) {
        const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
        const __m256i size = WHOLES ? _mm256_abs_epi8(all)
                                    : _mm256_and_si256(all, _mm256_set1_epi8(0x7F));
        beyond = _mm256_or_si256(beyond, _mm256_subs_epu8(size, allowed));
        for (int k = 0; k < 32; k += 8) {
            const __m128i eight =
                _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i + k));
            __m256 value;
            if (WHOLES) {
                value = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
            } else {  // as a half, whose exponent is 8 larger: 256 times as small
                const __m128i wide = _mm_cvtepi8_epi16(eight);
                const __m128i size = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x7F)), 7);
                value = _mm256_cvtph_ps(_mm_or_si128(
                    size, _mm_and_si128(wide, _mm_set1_epi16(int16_t(0x8000)))));
            }
            add_eight(_mm256_mul_ps(value, s), w, out + i + k);
        }
    }
    return _mm256_testz_si256(beyond, beyond);
}

// Codes of 4 bits to bytes, whole groups of 32.
AVX2 i64 block_unpack4_avx2(const u8* data, i64 n, u8* codes) {
    const __m128i low = _mm_set1_epi8(0x0F), half = _mm_set1_epi8(8);
    i64 i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + i / 2));
        __m128i even = _mm_and_si128(pairs, low);
        __m128i odd = _mm_and_si128(_mm_srli_epi16(pairs, 4), low);
        even = _mm_sub_epi8(_mm_xor_si128(even, half), half);
        odd = _mm_sub_epi8(_mm_xor_si128(odd, half), half);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm_unpacklo_epi8(even, odd));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i + 16), _mm_unpackhi_epi8(even, odd));
    }
    return i;
}
#endif

// Codes of `width` bits to bytes, with their signs.
void block_unpack(const u8* data, i64 n, int width, u8* codes) {
    i64 i = 0;
#if HAVE_AVX2
    if (avx2 && width == 4) i = block_unpack4_avx2(data, n, codes);
#endif
    DOREFA_UNPACK[width](data + i / 8 * width, n - i, codes + i);
    const u8 half = u8(1 << (width - 1));
    for (; i < n; i++) codes[i] = u8((codes[i] ^ half) - half);
}

bool block_add(const u8* codes, i64 n, int form, u8 most, float scale, float weight, float* out) {
    i64 i = 0;
    bool fine = true;
#if HAVE_AVX2
    if (avx2) {
        const auto add = form == WHOLE ? block_add_avx2<true> : block_add_avx2<false>;
        i = n / 32 * 32;
        fine = add(codes, i, most, scale, weight, out);
    }
#endif
    return block_add_plain(codes + i, n - i, form, most, scale, weight, out + i) && fine;
}

}  // namespace

// `owed` and `out` null: encodes `grad`; else owed + grad, and what is still owed goes to `out`.
// INVALID if there is `owed` and a number is not finite.
API i64 mp_block_encode(const float* grad, const float* owed, float* out, i64 n, i64 size, int form,
                        int levels, int l2, int random, u64 seed, u32 rank, u32 step, u32 bucket,
                        i64 start, u8* data) {
    const Grid grid(size, form, levels, l2);
    const Philox key{bucket, step, rank, u32(seed), u32(seed >> 32)};
    const bool stream = owed && out != owed && n >= stream_from;
    const i64 unit = std::max(size, BLOCK_UNIT / size * size);
    u8* const packed = data + 2 * ((n + size - 1) / size);
    std::atomic<bool> bad{false};
    split(n, size, grain / (random ? 4 : 1), [&](int, i64 begin, i64 end) {
        constexpr i64 STEP = 1024;  // random words at a time
        alignas(32) u32 room[STEP + 8];
        u32 scales[BLOCK_UNIT / 32];
        std::vector<float> memory(unit + 8);
        std::vector<u8> bytes(unit);
        float* const v = memory.data() + until_aligned(memory.data(), 8);
        for (i64 at = begin; at < end; at += unit) {
            const i64 count = std::min(unit, end - at);
            float* const all = owed ? v : const_cast<float*>(grad) + at;  // the latter is only read
            for (i64 b = 0; b < count; b += size)
                scales[b / size] = block_largest(grad + at + b, owed ? owed + at + b : nullptr,
                                                 std::min(size, count - b), v + b);
            for (i64 b = 0; b < count; b += size) {
                u32& scale = scales[b / size];
                scale = grid.scale(scale, all + b, std::min(size, count - b));
                put(data + 2 * ((at + b) / size), u16(scale));
            }
            for (i64 b = 0; b < count; b += size) {
                const i64 length = std::min(size, count - b);
                const u32 scale = scales[b / size];
                float* const x = all + b;
                if (scale == 0 || scale == BLOCK_INFINITE) {
                    if (scale) bad = true;
                    std::fill_n(bytes.begin() + b, length, u8(0));
                    continue;
                }
                const float wide = float_of(scale << 16);
                const Rounding r{wide, 1.0f / wide, float(levels), (1 << grid.width) - 1,
                                 random != 0};
                for (i64 i = 0; i < length; i += STEP) {
                    const i64 few = std::min(STEP, length - i);
                    const u32* words = nullptr;
                    if (random) words = philox_words(key, start + at + b + i, few, room);
                    (form == WHOLE ? block_codes<Whole> : block_codes<Small>)(
                        x + i, few, r, words, &bytes[b + i], owed);
                }
            }
            DOREFA_PACK[grid.width](bytes.data(), count, packed + at / 8 * grid.width);
            if (owed) copy(v, out + at, count, stream);
        }
    });
    return bad && owed ? INVALID : 0;
}

// out += or, if fresh, = the sum over packets of weight * (scale * code). INVALID for a scale or a
// code that no encoder writes, or if bits behind the last code are set.
API i64 mp_block_decode(const u8* const* data, i64 packets, i64 size, int form, int levels,
                        float weight, float* out, i64 n, int fresh) {
    const Grid grid(size, form, levels, false);
    const i64 blocks = (n + size - 1) / size, width = grid.width;
    const u32 most = grid.most();
    const u8 largest = form == WHOLE ? u8(levels) : 0x7E;
    for (i64 p = 0; p < packets; p++) {
        if (n * width % 8 && data[p][2 * blocks + n * width / 8] >> n * width % 8) return INVALID;
        for (i64 b = 0; b < blocks; b++) {
            const u32 scale = get<u16>(data[p] + 2 * b);
            if (scale && (scale < BLOCK_LEAST || scale > most)) return INVALID;
        }
    }
    std::atomic<bool> bad{false};
    add_packets(packets, out, n, fresh, [&](i64 p, i64 at, i64 count, float* to) {
        u8 room[CHUNK];
        const u8* codes = data[p] + 2 * blocks + at / 8 * width;
        if (width < 8) {
            block_unpack(codes, count, int(width), room);
            codes = room;
        }
        for (i64 i = 0; i < count;) {
            const i64 b = (at + i) / size, length = std::min(count - i, (b + 1) * size - at - i);
            const float scale = float_of(u32(get<u16>(data[p] + 2 * b)) << 16);
            if (!block_add(codes + i, length, form, largest, scale, weight, to + i)) bad = true;
            i += length;
        }
    });
    return bad ? INVALID : 0;
}
