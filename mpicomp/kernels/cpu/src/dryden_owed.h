// Dryden (version 2016) with a residual: thresholds, words, and what is still owed.
//
// The matrix is read once, in strips of columns that stay in cache: thresholds are drawn from a
// strip, it is searched, and its means are known before it is written. Block of 32 rows by block,
// one strip is searched, the one before it is written, and the one after it is read into its place.
// Words ascend over the whole matrix: each strip keeps a byte a word, and in the end these are
// merged row by row.
#pragma once

#include "dryden.h"
#include "dryden_strip.h"

namespace {

#if HAVE_AVX2
constexpr i64 STRIP_ELEMENTS = 1 << 17;  // two strips of so many, and more, stay in cache

// One thread's strips, of columns begin ... end - 1.
class DrydenStrips {
  public:
    bool bad = false;  // is a mean not finite

    DrydenStrips(const Owing& m, i64 begin, i64 end, i64 most, u8* means)
        : m_(m), begin_(begin), end_(end), most_(most), pitch_(most + EDGE), means_(means),
          room_(2 * m.rows * pitch_ + EDGE), draw_(EDGE * m.sample + 8) {
        float* at = room_.data() + until_line(room_.data(), EDGE);
        for (Strip& strip : strip_) {
            strip.v = at;
            strip.sent.reset(new u32[m.rows * most + 2]);
            strip.end.resize((m.rows + 31) / 32 + 1);
            at += m.rows * pitch_;
        }
    }

    AVX2 void run() {
        Strip *now = &strip_[0], *other = &strip_[1];  // the latter: before `now`, then after it
        now->first = begin_, now->width = width(begin_);
        for (i64 row = 0; row < m_.rows; row++) read(*now, row, begin_);
        for (;; std::swap(now, other)) {
            const i64 next = now->first + now->width;
            Fold<float> fold(memory_, 2 * WIDE);
            if (now->width) begin(*now);
            for (i64 row = 0; row < m_.rows; row += 32) {
                const i64 stop = std::min(m_.rows, row + 32);
                if (now->width) find(*now, row, stop, fold);
                if (other->width) settle(*other, row / 32);
                for (i64 r = row; r < stop && other->width; r++) write(*other, r, now->v);
                for (i64 r = row; r < stop && next < end_; r++) read(*other, r, next);
            }
            if (!now->width) break;
            finish(*now, fold.result());
            other->first = next, other->width = width(next);
        }
        if (m_.stream) _mm_sfence();
    }

    // Appends the words of one row to `to`; rows are asked for in their order. There is `room` for
    // more words than that.
    AVX2 u8* words(i64 row, bool room, u8* to) {
        for (Found& strip : found_) {
            const i64 count = strip.count[row];
            const u32 first = u32(row * m_.columns + strip.first) << 1;
            const u8* code = code_.data() + strip.next;
            strip.next += count;
            for (i64 k = 0; !room && k < count; k++) put(to + 4 * k, first + code[k]);
            for (i64 k = 0; room && k < count; k += 8) {
                const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(code + k));
                const __m256i word = _mm256_add_epi32(_mm256_set1_epi32(int(first)),
                                                      _mm256_cvtepu8_epi32(eight));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 4 * k), word);
            }
            to += 4 * count;
        }
        return to;
    }

  private:
    struct Found {
        i64 first, next;        // the first column; where in `code_` the next row begins
        std::vector<u8> count;  // of each row
    };

    i64 width(i64 first) const { return std::max<i64>(0, std::min(most_, end_ - first)); }

    float* place(const Strip& strip, u32 sent) const {
        return strip.v + i64(sent >> 8) * pitch_ + EDGE + ((sent & 255) >> 1);
    }

    // A row of the strip from column `first` on, while one further down, or at the top of the next
    // strip, is asked for.
    AVX2 void read(Strip& strip, i64 row, i64 first) {
        i64 later = row + ROWS_AHEAD, from = first;
        if (later >= m_.rows) later %= m_.rows, from += most_;
        const i64 ahead = later * m_.columns + (width(from) == width(first) ? from : first);
        float* to = strip.v + row * pitch_ + EDGE;
        strip_read(m_, row * m_.columns + first, width(first), ahead, to);
    }

    // The thresholds of a strip.
    void begin(const Strip& strip) {
        std::fill(lower_, lower_ + WIDE, NAN);  // beyond the last column nothing is found
        std::fill(upper_, upper_ + WIDE, NAN);
        const u32* word = nullptr;
        for (i64 c = 0; c < strip.width; c++, word += m_.sample) {
            const i64 start = m_.start + (strip.first + c) * m_.sample;
            const i64 some = std::min(EDGE, strip.width - c);
            if (c % EDGE == 0) word = philox_words(m_.key, start, some * m_.sample, draw_.data());
            const float* v = strip.v + EDGE + c;
            const Extremes found = strip_draws(v, pitch_, m_.rows, word, m_.sample);
            threshold(found, v, word, lower_ + c, upper_ + c);
        }
        sent_ = strip.sent.get();
        std::fill(number_, number_ + 2 * WIDE, 0);
        found_.push_back({strip.first, i64(code_.size()) - 8, std::vector<u8>(m_.rows)});
    }

    void threshold(const Extremes& found, const float* v, const u32* word, float* lower,
                   float* upper) {
        const i64 below = found.below, above = m_.sample - below;
        *lower = below ? found.lowest : -INFINITY;
        *upper = above ? found.highest : INFINITY;
        if (std::max(below, above) >= 2 * m_.proportion) {
            std::vector<float> values(m_.sample);
            for (i64 k = 0; k < m_.sample; k++)
                values[k] = v[(u64(word[k]) * u64(m_.rows) >> 32) * pitch_];
            float* zero = std::partition(values.data(), values.data() + m_.sample,
                                         [](float x) { return x < 0; });
            *lower = dryden_cut(values.data(), below, m_.proportion, true);
            *upper = dryden_cut(zero, above, m_.proportion, false);
        }
        *lower = std::min(*lower, -LEAST);
        *upper = std::max(*upper, LEAST);
    }

    // What rows row ... stop - 1, a block, send, and its sums.
    void find(Strip& strip, i64 row, i64 stop, Fold<float>& fold) {
        u32* const before = sent_;
        sent_ = strip_find(strip.v + EDGE, pitch_, row, stop, strip.width, lower_, upper_, sent_,
                           &found_.back().count[row]);
        strip.end[row / 32 + 1] = sent_ - strip.sent.get();
        float sum[2 * WIDE] = {};
        for (const u32* at = before; at < sent_; at++) {
            sum[*at & 255] += *place(strip, *at);
            number_[*at & 255]++;
        }
        fold.add(sum);
    }

    // The means of a strip, and its words.
    void finish(Strip& strip, const float* sums) {
        for (i64 k = 0; k < 2 * strip.width; k++) {
            strip.mean[k] = sums[k] / float(std::max<u32>(number_[k], 1));
            put(means_ + 4 * (k % 2 * m_.columns + strip.first + k / 2), strip.mean[k]);
        }
        bad |= !finite(strip.mean, 2 * strip.width);
        const i64 count = sent_ - strip.sent.get(), used = code_.size() - 8;
        code_.resize(used + count + 8);  // `words` looks at eight at once
        for (i64 k = 0; k < count; k++) code_[used + k] = u8(strip.sent[k]);
    }

    // What is still owed in a block of rows.
    void settle(const Strip& strip, i64 block) {
        for (i64 k = strip.end[block]; k < strip.end[block + 1]; k++)
            *place(strip, strip.sent[k]) -= strip.mean[strip.sent[k] & 255];
    }

    // From one cache line of `out` to another; what is left of a row waits for the `next` strip.
    void write(const Strip& strip, i64 row, float* next) {
        const float* v = strip.v + row * pitch_;
        const i64 from = edge(row, strip.first), to = edge(row, strip.first + strip.width);
        strip_write(v + EDGE + from - strip.first, to - from, m_.out + row * m_.columns + from,
                    m_.stream);
        std::memcpy(next + row * pitch_, v + strip.width, 4 * EDGE);
    }

    // Where the line of `out` begins that column c of a row lies in.
    i64 edge(i64 row, i64 c) const {
        if (c == begin_ || c == end_) return c;
        const float* at = m_.out + row * m_.columns + c;
        return std::max<i64>(begin_, c - reinterpret_cast<uintptr_t>(at) / 4 % EDGE);
    }

    const Owing m_;
    const i64 begin_, end_, most_, pitch_;
    u8* const means_;
    std::vector<float> room_;
    std::vector<u32> draw_;
    Strip strip_[2];
    u32* sent_ = nullptr;      // the end of what is sent of the strip that is searched
    u32 number_[2 * WIDE];     // of what it sends
    std::vector<Found> found_;
    std::vector<u8> code_ = std::vector<u8>(8);
    alignas(64) float lower_[WIDE], upper_[WIDE];
    float memory_[Fold<float>::LEVELS * 2 * WIDE];
};

// How wide strips are; 0 where they do not pay: what fits a cache is not read from memory twice,
// and of a long column the draws see only a small part.
i64 strip_width(i64 rows, i64 columns, i64 sample) {
    const i64 width = std::min(WIDE, STRIP_ELEMENTS / std::max<i64>(rows, 1) / 32 * 32);
    const bool large = rows * columns >= stream_from;
    return avx2 && sample && large && columns >= 64 && width >= 64 ? width : 0;
}
#endif

}  // namespace

// What mp_dryden_columns and mp_dryden_encode make of base + grad.
API i64 mp_dryden_encode_owed(const float* base, const float* grad, float* out, i64 rows,
                              i64 columns, i64 proportion, i64 sample, u64 seed, u32 rank,
                              u32 step, u32 bucket, i64 start, u8* data) {
#if HAVE_AVX2
    if (const i64 most = strip_width(rows, columns, sample)) {
        const i64 head = 4 + 8 * columns;
        const Owing m{base, grad, out, rows, columns, proportion, sample, start,
                      Philox{bucket, step, rank, u32(seed), u32(seed >> 32)},
                      out != base && rows * columns >= stream_from};
        std::unique_ptr<DrydenStrips> team[MOST_THREADS];
        split(columns, 32, grain / rows, [&](int part, i64 begin, i64 end) {
            team[part].reset(new DrydenStrips(m, begin, end, most, data + 4));
            team[part]->run();
        });
        u8* to = data + head;
        bool bad = false;
        for (i64 row = 0; row < rows; row++)
            for (auto& strips : team)
                if (strips) to = strips->words(row, row + 1 < rows, to);
        for (auto& strips : team) bad |= strips && strips->bad;
        put(data, u32((to - data - head) / 4));
        return bad ? INVALID : to - data;
    }
#endif
    std::vector<float> lower(columns), upper(columns);
    mp_dryden_columns(base, grad, rows, columns, proportion, sample, seed, rank, step, bucket,
                      start, lower.data(), upper.data());
    return mp_dryden_encode(base, grad, out, rows, columns, lower.data(), upper.data(), data);
}
