// 1-bit SGD, encoding: two means a column and a bit an element.
//
// A matrix is cut into strips of columns, so narrow that a strip stays in cache between the pass
// that adds up its columns and the one that subtracts the means. The second pass over a strip takes
// turns with the first pass over the next one, block of 32 rows by block: while one computes, the
// other's memory is on its way, because rows of a strip lie far apart and are fetched ahead by
// hand.
#pragma once

#include "sums.h"

namespace {

#ifndef PH
#define PH _MM_HINT_T1
#endif
#ifndef SCX
#define SCX (1 << 18)
#endif
#ifndef PDX
#define PDX 8
#endif
#ifndef NRX
#define NRX 8
#endif
constexpr i64 WIDEST = 1024;           // columns of a strip
constexpr i64 SCRATCH = SCX;       // floats of a strip that should stay in cache
constexpr i64 MOST_SCRATCH = 1 << 21;  // of a strip that is worth it

// A strip of columns: v = owed + grad of its rows is kept, in scratch or in `out`. `grad`, `owed`,
// `v` point at row 0. `owed` may be null: then v = grad, and nothing is kept.
struct Strip {
    const float *grad, *owed;
    float* v;
    i64 pitch, v_pitch, first, width;  // from row to row, of grad and owed and of v; columns
};

// What is summed over a block of 32 rows: one word of bits a column, and the two sums.
struct Block {
    alignas(64) float positive[WIDEST], negative[WIDEST];
    alignas(64) u32 word[WIDEST];
};

// `rows` rows from `row` on, the first of which is bit `first` of the block; columns from `from`
// on.
void onebit_rows_plain(const Strip& s, i64 row, int rows, i64 from, Block& b) {
    for (int r = 0; r < rows; r++) {
        const i64 at = (row + r) * s.pitch;
        for (i64 c = from; c < s.width; c++) {
            const float v = s.owed ? s.owed[at + c] + s.grad[at + c] : s.grad[at + c];
            if (s.owed) s.v[(row + r) * s.v_pitch + c] = v;
            const bool bit = v >= 0;
            b.word[c] |= u32(bit) << r;
            b.positive[c] += bit ? v : 0.0f;
            b.negative[c] += bit ? 0.0f : v;
        }
    }
}

// out = v + (v >= 0 ? upper : lower) for one row.
void onebit_settle_plain(const float* v, const float* lower, const float* upper, i64 width,
                         float* out) {
    for (i64 c = 0; c < width; c++) out[c] = v[c] + (v[c] >= 0 ? upper[c] : lower[c]);
}

#if HAVE_AVX2
constexpr int AHEAD = PDX;  // rows

// ROWS rows of 8 columns after 8 columns; the sums stay in registers from row to row.
template <bool OWED, int ROWS>
AVX2 inline void onebit_few_rows(const Strip& s, i64 row, int first, i64 width, Block& b) {
    const __m256 zero = _mm256_setzero_ps();
    const i64 pitch = s.pitch, v_pitch = s.v_pitch;
    const float *grad = s.grad + row * pitch, *owed = OWED ? s.owed + row * pitch : nullptr;
    float* keep = OWED ? s.v + row * v_pitch : nullptr;
    for (i64 c = 0; c < width; c += 8) {
        __m256 up = _mm256_load_ps(b.positive + c), low = _mm256_load_ps(b.negative + c);
        __m256i bits = _mm256_load_si256(reinterpret_cast<__m256i*>(b.word + c));
        __m256i place = _mm256_set1_epi32(int(1u << first));
        for (int r = 0; r < ROWS; r++) {
            __m256 v = _mm256_loadu_ps(grad + r * pitch + c);
            if (OWED) {
                if (c % 16 == 0) {
                    _mm_prefetch(grad + (r + AHEAD) * pitch + c, PH);
                    _mm_prefetch(owed + (r + AHEAD) * pitch + c, PH);
                }
                v = _mm256_add_ps(_mm256_loadu_ps(owed + r * pitch + c), v);
                _mm256_storeu_ps(keep + r * v_pitch + c, v);
            }
            const __m256 bit = _mm256_cmp_ps(v, zero, _CMP_GE_OQ);
            up = _mm256_add_ps(up, _mm256_and_ps(bit, v));
            low = _mm256_add_ps(low, _mm256_andnot_ps(bit, v));
            bits = _mm256_or_si256(bits, _mm256_and_si256(_mm256_castps_si256(bit), place));
            place = _mm256_add_epi32(place, place);
        }
        _mm256_store_ps(b.positive + c, up);
        _mm256_store_ps(b.negative + c, low);
        _mm256_store_si256(reinterpret_cast<__m256i*>(b.word + c), bits);
    }
}

template <bool OWED> AVX2 void onebit_rows_avx2(const Strip& s, i64 row, int rows, Block& b) {
    const i64 width = s.width / 8 * 8;
    int r = 0;
    for (; r + NRX <= rows; r += NRX) onebit_few_rows<OWED, NRX>(s, row + r, r, width, b);
    for (; r < rows; r++) onebit_few_rows<OWED, 1>(s, row + r, r, width, b);
    if (width < s.width) onebit_rows_plain(s, row, rows, width, b);
}

AVX2 void onebit_settle_avx2(const float* v, const float* lower, const float* upper, i64 width,
                             float* out, bool stream, const float* ahead, const float* ahead2) {
    i64 c = stream ? until_aligned(out, width) : 0;
    onebit_settle_plain(v, lower, upper, c, out);
    for (; c + 8 <= width; c += 8) {
        if (ahead) _mm_prefetch((c & 8 ? ahead : ahead2) + c, PH);
        const __m256 x = _mm256_loadu_ps(v + c);
        const __m256 bit = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GE_OQ);
        const __m256 mean = _mm256_blendv_ps(_mm256_loadu_ps(lower + c),
                                             _mm256_loadu_ps(upper + c), bit);
        store(out + c, _mm256_add_ps(x, mean), stream);
    }
    onebit_settle_plain(v + c, lower + c, upper + c, width - c, out + c);
}
#endif

void onebit_rows(const Strip& s, i64 row, int rows, Block& b) {
#if HAVE_AVX2
    if (avx2) return (s.owed ? onebit_rows_avx2<true> : onebit_rows_avx2<false>)(s, row, rows, b);
#endif
    onebit_rows_plain(s, row, rows, 0, b);
}

// `ahead`, `ahead2`: memory of as many floats that is wanted next, or null.
void onebit_settle(const float* v, const float* lower, const float* upper, i64 width, float* out,
                   bool stream, const float* ahead, const float* ahead2) {
#if HAVE_AVX2
    if (avx2) return onebit_settle_avx2(v, lower, upper, width, out, stream, ahead, ahead2);
#endif
    onebit_settle_plain(v, lower, upper, width, out);
}

void count_bits(const u32* word, i64 width, i64* count) {
    for (i64 c = 0; c < width; c++) {
        u32 w = word[c] - (word[c] >> 1 & 0x55555555);
        w = (w & 0x33333333) + (w >> 2 & 0x33333333);
        w = (w + (w >> 4)) & 0x0F0F0F0F;
        w += w >> 8;
        count[c] += (w + (w >> 16)) & 63;
    }
}

// The means from the sums of the non-negative and the negative values, where `count` are the
// former.
void onebit_means(const float* positive, const float* negative, const i64* count, i64 rows,
                  i64 width, float* lower, float* upper) {
    for (i64 c = 0; c < width; c++) {
        upper[c] = positive[c] / float(std::max<i64>(count[c], 1));
        lower[c] = negative[c] / float(std::max<i64>(rows - count[c], 1));
    }
}

// One thread's strips.
class OneBit {
  public:
    OneBit(i64 rows, i64 columns, float* out, bool stream, u8* data)
        : rows_(rows), columns_(columns), out_(out), stream_(stream), data_(data) {}

    // The first pass over a strip and the second one over the strip before it. False if there is
    // `owed` and a mean is not finite.
    bool add(const Strip& s) {
        const i64 width = s.width;
        Fold<float> positive(memory_, width), negative(memory_ + LEVELS * WIDEST, width);
        std::fill(count_, count_ + width, 0);
        for (i64 row = 0; row < rows_; row += 32) {
            const int rows = int(std::min<i64>(32, rows_ - row));
            settle(row, rows, &s);
            std::fill(block_.positive, block_.positive + width, 0.0f);
            std::fill(block_.negative, block_.negative + width, 0.0f);
            std::fill(block_.word, block_.word + width, 0);
            onebit_rows(s, row, rows, block_);
            positive.add(block_.positive);
            negative.add(block_.negative);
            count_bits(block_.word, width, count_);
            std::memcpy(data_ + 4 * (columns_ * (2 + row / 32) + s.first), block_.word, 4 * width);
        }
        onebit_means(positive.result(), negative.result(), count_, rows_, width, lower_, upper_);
        std::memcpy(data_ + 4 * s.first, lower_, 4 * width);
        std::memcpy(data_ + 4 * (columns_ + s.first), upper_, 4 * width);
        if (!s.owed) return true;
        for (i64 c = 0; c < width; c++) lower_[c] *= -1.0f, upper_[c] *= -1.0f;
        before_ = s;
        return finite(lower_, width) && finite(upper_, width);
    }

    // The second pass over the last strip.
    void finish() {
        settle(0, rows_, nullptr);
#if HAVE_AVX2
        if (stream_) _mm_sfence();
#endif
    }

  private:
    static constexpr int LEVELS = Fold<float>::LEVELS;

    // out = v + mean in some rows of the strip before, while the same rows of `next` are fetched.
    void settle(i64 row, i64 rows, const Strip* next) {
        for (i64 r = row; r < row + rows && before_.width; r++) {
            const i64 at = next ? r * next->pitch : 0;
            onebit_settle(before_.v + r * before_.v_pitch, lower_, upper_, before_.width,
                          out_ + r * columns_ + before_.first, stream_,
                          next ? next->grad + at : nullptr, next ? next->owed + at : nullptr);
        }
    }

    i64 rows_, columns_;
    float* out_;
    bool stream_;
    u8* data_;
    Strip before_ = {};
    alignas(64) float lower_[WIDEST], upper_[WIDEST];
    Block block_;
    i64 count_[WIDEST];
    float memory_[2 * LEVELS * WIDEST];
};

#if HAVE_AVX2
AVX2 inline void transpose(__m256 a[8]) {
    __m256 b[8];
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_unpacklo_ps(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm256_unpackhi_ps(a[i + j], a[i + j + 2]);
        }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm256_unpacklo_ps(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm256_unpackhi_ps(b[i + j], b[i + j + 2]);
        }
    for (int j = 0; j < 4; j++) {
        const __m256 top = a[j], bottom = a[j + 4];
        a[j] = _mm256_permute2f128_ps(top, bottom, 0x20);
        a[j + 4] = _mm256_permute2f128_ps(top, bottom, 0x31);
    }
}

// Eight blocks of 32 consecutive elements of a single column; lane k of the sums is block k.
template <bool OWED>
AVX2 void onebit_blocks_avx2(const float* grad, const float* owed, float* v, Block& b) {
    const __m256 zero = _mm256_setzero_ps();
    __m256 up = zero, low = zero;
    std::fill(b.word, b.word + 8, 0);
    for (int k = 0; k < 32; k += 8) {
        __m256 a[8];
        for (int i = 0; i < 8; i++) {
            const i64 at = 32 * i + k;
            a[i] = _mm256_loadu_ps(grad + at);
            if (OWED) {
                a[i] = _mm256_add_ps(_mm256_loadu_ps(owed + at), a[i]);
                _mm256_storeu_ps(v + at, a[i]);
            }
            const int bits = _mm256_movemask_ps(_mm256_cmp_ps(a[i], zero, _CMP_GE_OQ));
            b.word[i] |= u32(bits) << k;
        }
        transpose(a);
        for (int j = 0; j < 8; j++) {
            const __m256 bit = _mm256_cmp_ps(a[j], zero, _CMP_GE_OQ);
            up = _mm256_add_ps(up, _mm256_and_ps(bit, a[j]));
            low = _mm256_add_ps(low, _mm256_andnot_ps(bit, a[j]));
        }
    }
    _mm256_store_ps(b.positive, up);
    _mm256_store_ps(b.negative, low);
}
#endif

// A matrix of one column, that is a vector. v = owed + grad is kept in `out`.
i64 onebit_column(const float* grad, const float* owed, float* out, i64 rows, u8* data) {
    float memory[2 * Fold<float>::LEVELS];
    Block b;
    i64 count = 0;
    Fold<float> fold(memory, 2);
    for (i64 row = 0; row < rows;) {
        const float* more = owed ? owed + row : nullptr;
        float* v = owed ? out + row : nullptr;
        int blocks = 1;
#if HAVE_AVX2
        if (avx2 && rows - row >= 256) {
            blocks = 8;
            (owed ? onebit_blocks_avx2<true> : onebit_blocks_avx2<false>)(grad + row, more, v, b);
        }
#endif
        if (blocks == 1) {
            b.word[0] = 0, b.positive[0] = b.negative[0] = 0;
            onebit_rows_plain({grad + row, more, v, 1, 1, 0, 1}, 0,
                              int(std::min<i64>(32, rows - row)), 0, b);
        }
        for (int k = 0; k < blocks; k++, row += 32) {
            const float block[2] = {b.positive[k], b.negative[k]};
            fold.add(block);
            count_bits(b.word + k, 1, &count);
            put(data + 8 + row / 8, b.word[k]);
        }
    }
    float *lower = b.negative, *upper = b.positive;  // the means, for as long a row as there is
    const float* sum = fold.result();
    onebit_means(sum, sum + 1, &count, rows, 1, lower, upper);
    put(data, lower[0]);
    put(data + 4, upper[0]);
    if (!owed) return 0;
    if (!finite(lower, 1) || !finite(upper, 1)) return INVALID;
    std::fill(lower, lower + WIDEST, -1.0f * float(lower[0]));
    std::fill(upper, upper + WIDEST, -1.0f * float(upper[0]));
    for (i64 at = 0; at < rows; at += WIDEST)
        onebit_settle(out + at, lower, upper, std::min(WIDEST, rows - at), out + at, false, nullptr,
                      nullptr);
    return 0;
}

}  // namespace

// `owed` and `out` null: encodes `grad`. INVALID if there is `owed` and a mean is not finite.
API i64 mp_onebit_encode(const float* grad, const float* owed, float* out, i64 rows, i64 columns,
                         u8* data) {
    if (columns == 1) return onebit_column(grad, owed, out, rows, data);
    i64 width = WIDEST;
    if (owed && rows) width = std::min(WIDEST, std::max<i64>(64, SCRATCH / rows / 16 * 16));
    const bool roomy = owed && rows * width <= MOST_SCRATCH;
    if (owed && !roomy) width = WIDEST;
    // strips end between cache lines of `out`
    const i64 offset = reinterpret_cast<uintptr_t>(out) / 4 % 16;
    const bool stream = roomy && columns % 16 == 0 && rows * columns >= stream_from;
    thread_local std::vector<float> scratch;
    if (roomy) scratch.resize(std::max<size_t>(scratch.size(), threads * rows * width + 16));
    float* const memory = scratch.data();
    std::atomic<bool> bad{false};
    split(columns, 16, grain / std::max<i64>(rows, 1), [&](int part, i64 begin, i64 end) {
        OneBit one(rows, columns, out, stream, data);
        for (i64 first = begin, stop; first < end; first = stop) {
            stop = std::min(end, (first + offset + width) / 16 * 16 - offset);
            Strip s{grad + first, owed ? owed + first : nullptr, memory + part * rows * width,
                    columns, width, first, stop - first};
            if (owed && !roomy) s.v = out + first, s.v_pitch = columns;
            if (!one.add(s)) bad = true;
        }
        one.finish();
    });
    return bad ? INVALID : 0;
}
