// 1-bit SGD, encoding: two means a column and a bit an element.
//
// A matrix is cut into strips of columns, so narrow that a strip stays in cache between the pass
// that adds up its columns and the one that subtracts the means. The second pass over a strip takes
// turns with the first pass over the next one, block of 32 rows by block: while one computes, the
// other's memory is on its way, because rows of a strip lie far apart and are fetched ahead by
// hand.
#pragma once

#include "onebit_column.h"
#include "onebit_rows.h"

namespace {

constexpr i64 SCRATCH = 1 << 19;       // floats of a strip that should stay in cache
constexpr i64 MOST_SCRATCH = 1 << 21;  // of a strip that is worth it

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
    const bool stream = roomy && rows * columns >= stream_from;
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
