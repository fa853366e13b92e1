// 1-bit SGD, decoding: the mean that each bit stands for, of one packet or summed over several.
#pragma once

#include "onebit_rows.h"

namespace {

constexpr i64 PADDED = WIDEST + 16;  // else the same column of all packets has one place in cache

// One row of a strip: of packet p the words of its block of rows stand at words[p], and the
// weighted means of its negative and non-negative values at levels[2 p] and levels[2 p + 1].
struct Levels {
    const u8* const* words;
    const float (*level)[PADDED];
    i64 packets, from;  // the first column within `level`
};

// out (from zero if `fresh`) += level[bit] for columns from ... to - 1, packet after packet.
void onebit_row_plain(const Levels& l, int bit, i64 from, i64 to, float* out, bool fresh) {
    for (i64 c = from; c < to; c++) {
        float sum = fresh ? 0.0f : out[c];
        for (i64 p = 0; p < l.packets; p++)
            sum += l.level[2 * p + (get<u32>(l.words[p] + 4 * c) >> bit & 1)][l.from + c];
        out[c] = sum;
    }
}

#if HAVE_AVX2
// 8 * VECTORS columns. The bit is shifted to the sign, which is what blendv looks at.
template <int VECTORS>
AVX2 inline void onebit_columns_avx2(const Levels& l, __m128i shift, i64 c, float* out, bool fresh,
                                     bool stream) {
    __m256 sum[VECTORS];
    for (int k = 0; k < VECTORS; k++)
        sum[k] = fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(out + c + 8 * k);
    for (i64 p = 0; p < l.packets; p++) {
        const u8* words = l.words[p] + 4 * c;
        const float *lower = l.level[2 * p] + l.from + c;
        const float *upper = l.level[2 * p + 1] + l.from + c;
        for (int k = 0; k < VECTORS; k++) {
            const __m256i word =
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + 32 * k));
            const __m256 bit = _mm256_castsi256_ps(_mm256_sll_epi32(word, shift));
            const __m256 level = _mm256_blendv_ps(_mm256_loadu_ps(lower + 8 * k),
                                                  _mm256_loadu_ps(upper + 8 * k), bit);
            sum[k] = _mm256_add_ps(sum[k], level);
        }
    }
    for (int k = 0; k < VECTORS; k++) store(out + c + 8 * k, sum[k], stream);
}

AVX2 void onebit_row_avx2(const Levels& l, int bit, i64 width, float* out, bool fresh,
                          bool stream) {
    const __m128i shift = _mm_cvtsi32_si128(31 - bit);
    i64 c = stream ? until_aligned(out, width) : 0;
    onebit_row_plain(l, bit, 0, c, out, fresh);
    for (; c + 32 <= width; c += 32) onebit_columns_avx2<4>(l, shift, c, out, fresh, stream);
    for (; c + 8 <= width; c += 8) onebit_columns_avx2<1>(l, shift, c, out, fresh, stream);
    onebit_row_plain(l, bit, c, width, out, fresh);
}

// `count` whole words of a single column, 32 elements each.
AVX2 void onebit_column_avx2(const u8* words, i64 count, const float* level, float* out) {
    const __m256 lower = _mm256_set1_ps(level[0]), upper = _mm256_set1_ps(level[1]);
    const __m256i shift = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    for (i64 w = 0; w < count; w++, out += 32) {
        const u32 word = get<u32>(words + 4 * w);
        for (int k = 0; k < 32; k += 8) {
            const __m256i bits = _mm256_sllv_epi32(_mm256_set1_epi32(int(word >> k)), shift);
            const __m256 v = _mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(bits));
            _mm256_storeu_ps(out + k, _mm256_add_ps(_mm256_loadu_ps(out + k), v));
        }
    }
}
#endif

void onebit_row(const Levels& l, int bit, i64 width, float* out, bool fresh, bool stream) {
#if HAVE_AVX2
    if (avx2) return onebit_row_avx2(l, bit, width, out, fresh, stream);
#endif
    onebit_row_plain(l, bit, 0, width, out, fresh);
}

// Elements `at` ... at + count - 1 of a single column; `at` is a multiple of 32.
void onebit_column_add(const u8* data, i64 at, i64 count, float weight, float* out) {
    const float level[2] = {get<float>(data) * weight, get<float>(data + 4) * weight};
    const u8* words = data + 8 + at / 8;
    i64 i = 0;
#if HAVE_AVX2
    if (avx2) {
        onebit_column_avx2(words, count / 32, level, out);
        i = count / 32 * 32;
    }
#endif
    for (; i < count; i++) out[i] += level[get<u32>(words + i / 32 * 4) >> i % 32 & 1];
}

}  // namespace

// out += or, if fresh, = the sum over packets of weight * the mean that each bit stands for.
// INVALID if a mean is not finite; `out` is then as it was.
API i64 mp_onebit_decode(const u8* const* data, i64 packets, i64 rows, i64 columns, float weight,
                         float* out, int fresh) {
    for (i64 p = 0; p < packets; p++)
        if (!finite_bytes(data[p], 2 * columns)) return INVALID;
    if (columns == 1) {
        add_packets(packets, out, rows, fresh, [&](i64 p, i64 at, i64 count, float* to) {
            onebit_column_add(data[p], at, count, weight, to);
        });
        return 0;
    }
    // A strip's levels and words of all packets should stay in the nearest cache. Its left and
    // right ends are moved, row by row, to the next cache line of `out`.
    const i64 width = std::max<i64>(64, WIDEST / packets / 16 * 16);
    const bool stream = fresh && rows * columns >= stream_from;
    const i64 offset = reinterpret_cast<uintptr_t>(out) / 4;
    split(columns, 16, grain / std::max<i64>(rows, 1), [&](int, i64 begin, i64 end) {
        std::vector<float> memory(2 * packets * PADDED);
        const auto level = reinterpret_cast<float(*)[PADDED]>(memory.data());
        std::vector<const u8*> words(packets);
        for (i64 first = begin; first < end; first += width) {
            const i64 stop = std::min(end, first + width), most = std::min(columns, stop + 16);
            for (i64 p = 0; p < packets; p++)
                for (i64 k = 0; k < 2; k++)
                    for (i64 c = first; c < most; c++)
                        level[2 * p + k][c - first] =
                            get<float>(data[p] + 4 * (k * columns + c)) * weight;
            for (i64 row = 0; row < rows; row++) {
                const i64 at = offset + row * columns;
                const i64 from = first ? std::min(columns, up_to(at + first, 16) - at) : 0;
                const i64 to = stop < columns ? std::min(columns, up_to(at + stop, 16) - at)
                                              : columns;
                for (i64 p = 0; p < packets; p++)
                    words[p] = data[p] + 4 * (columns * (2 + row / 32) + from);
                onebit_row({words.data(), level, packets, from - first}, row % 32, to - from,
                           out + row * columns + from, fresh, stream);
            }
        }
#if HAVE_AVX2
        if (stream) _mm_sfence();
#endif
    });
    return 0;
}
