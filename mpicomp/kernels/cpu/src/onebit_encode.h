// 1-bit SGD, encoding: two means a column and a bit an element.
//
// A matrix is cut into strips of columns, so narrow that a strip stays in cache between the pass
// that adds up its columns and the one that subtracts the means. The second pass over a strip takes
// turns with the first pass over the next one, block of 32 rows by block: while one computes, the
// other's memory is on its way, because rows of a strip lie far apart and are fetched a block ahead
// by hand. v = owed + grad is computed in both, which takes less time than to keep it.
#pragma once

#include "onebit_column.h"
#include "onebit_rows.h"

namespace {

constexpr i64 STRIP = 1 << 15;  // elements of a strip that stays in cache
constexpr i64 NARROWEST = 256;  // columns of a strip: in narrower ones far memory is too slow
constexpr i64 LINE = 16;        // elements in a line of the cache

// One thread's strips, of columns begin ... end - 1.
class OneBit {
  public:
    OneBit(const Matrix& m, i64 begin, i64 end, u8* data)
        : m_(m), begin_(begin), end_(end), data_(data) {}

    // The first pass over columns first ... stop - 1, and the second one over those before them;
    // `next` is where the next call begins. False if a mean that is needed is not finite.
    bool add(i64 first, i64 stop, i64 next) {
        const i64 width = stop - first;
        Fold<float> positive(memory_, width), negative(memory_ + LEVELS * WIDEST, width);
        std::fill(count_, count_ + width, 0);
        for (i64 row = 0; row < m_.rows; row += 32) {
            const int rows = int(std::min<i64>(32, m_.rows - row));
            const i64 at = row * m_.columns + first;
            const i64 ahead = row + 32 < m_.rows ? at + 32 * m_.columns : next;
            settle(row, rows, ahead);
            onebit_rows(m_, at, rows, width, ahead, block_);
            positive.add(block_.positive);
            negative.add(block_.negative);
            count_bits(block_.word, width, count_);
            std::memcpy(data_ + 4 * (m_.columns * (2 + row / 32) + first), block_.word, 4 * width);
        }
        // the last columns before these stay in front of them
        std::copy(lower_ + width_, lower_ + width_ + LINE, lower_);
        std::copy(upper_ + width_, upper_ + width_ + LINE, upper_);
        float *const lower = lower_ + LINE, *const upper = upper_ + LINE;
        onebit_means(positive.result(), negative.result(), count_, m_.rows, width, lower, upper);
        std::memcpy(data_ + 4 * first, lower, 4 * width);
        std::memcpy(data_ + 4 * (m_.columns + first), upper, 4 * width);
        if (!m_.owed) return true;
        for (i64 c = 0; c < width; c++) lower[c] *= -1.0f, upper[c] *= -1.0f;
        first_ = first, width_ = width;
        return finite(lower, width) && finite(upper, width);
    }

    // The second pass over the last columns.
    void finish() {
        settle(0, m_.rows, first_);
#if HAVE_AVX2
        if (m_.stream) _mm_sfence();
#endif
    }

  private:
    static constexpr int LEVELS = Fold<float>::LEVELS;

    // The second pass over some rows, from one cache line of `out` to another: what is left of a
    // row waits for the next columns. From `ahead` on is what is read in the next block.
    void settle(i64 row, i64 rows, i64 ahead) {
        for (i64 r = row; r < row + rows && width_; r++, ahead += m_.columns) {
            const i64 from = edge(r, first_), to = edge(r, first_ + width_);
            const i64 c = from - first_ + LINE;
            if (to > from)
                onebit_settle(m_, r * m_.columns + from, to - from, lower_ + c, upper_ + c,
                              m_.grad + ahead);
        }
    }

    // Where the line of `out` begins that column c of a row lies in.
    i64 edge(i64 row, i64 c) const {
        if (c == begin_ || c == end_) return c;
        const float* at = m_.out + row * m_.columns + c;
        return std::max<i64>(begin_, c - reinterpret_cast<uintptr_t>(at) / 4 % LINE);
    }

    const Matrix m_;
    const i64 begin_, end_;
    u8* data_;
    i64 first_ = 0, width_ = 0;  // of the last call
    alignas(64) float lower_[LINE + WIDEST], upper_[LINE + WIDEST];
    Block block_;
    i64 count_[WIDEST];
    float memory_[2 * LEVELS * WIDEST];
};

}  // namespace

// `owed` and `out` null: encodes `grad`. INVALID if there is `owed` and a mean is not finite.
API i64 mp_onebit_encode(const float* grad, const float* owed, float* out, i64 rows, i64 columns,
                         u8* data) {
    if (columns == 1) return onebit_column(grad, owed, out, rows, data);
    const bool stream = owed && out != owed && rows * columns >= stream_from;
    const Matrix m{grad, owed, out, rows, columns, stream};
    i64 width = WIDEST;
    if (owed && rows) width = std::min(WIDEST, std::max(NARROWEST, STRIP / rows / LINE * LINE));
    std::atomic<bool> bad{false};
    split(columns, LINE, grain / std::max<i64>(rows, 1), [&](int, i64 begin, i64 end) {
        OneBit one(m, begin, end, data);
        for (i64 first = begin, stop; first < end; first = stop) {
            stop = std::min(end, first + width);
            if (!one.add(first, stop, std::min(stop, end - 1))) bad = true;
        }
        one.finish();
    });
    return bad ? INVALID : 0;
}
