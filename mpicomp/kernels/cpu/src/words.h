// Packets that name elements: 32-bit words index << 1 | flag, ascending.
#pragma once

#include "common.h"

namespace {

// What each thread wrote, where it would be if all elements before it had been sent.
struct Pieces {
    struct {
        i64 begin = 0, size = 0;
    } piece[MOST_THREADS];

    // Moves the pieces together; returns their size.
    i64 join(u8* data) const {
        i64 total = 0;
        for (const auto& p : piece) {
            if (p.size && total != p.begin) std::memmove(data + total, data + p.begin, p.size);
            total += p.size;
        }
        return total;
    }
};

// The words of one packet, and which of them is next. SHIFT is 1 where a flag stands below the
// index.
template <int SHIFT> struct Words {
    const u8* data;
    i64 count, next = 0;

    u32 word(i64 i) const { return get<u32>(data + 4 * i); }
    i64 index(i64 i) const { return word(i) >> SHIFT; }

    bool ascend_below(i64 n) const {
        i64 descents = 0, last = -1;
        for (i64 i = 0; i < count; i++) {
            descents += index(i) <= last;
            last = index(i);
        }
        return !descents && last < n;
    }

    void seek(i64 element) {  // the first word at or after this element
        i64 low = 0, high = count;
        while (low < high) {
            const i64 middle = (low + high) / 2;
            if (index(middle) < element) low = middle + 1;
            else high = middle;
        }
        next = low;
    }
};

// out += or, if fresh, = the sum over packets of value(number, word) for each word, where value is
// what reader(packet, element) returns to a thread that begins at this element. Packets are added
// chunk by chunk, so that what is zeroed and added to is in cache.
template <int SHIFT = 1, class R>
i64 add_words(const u8* const* data, const i64* sizes, i64 packets, float* out, i64 n, bool fresh,
              const R& reader) {
    for (i64 p = 0; p < packets; p++)
        if (!Words<SHIFT>{data[p], sizes[p] / 4}.ascend_below(n)) return INVALID;
    split(n, CHUNK, grain, [&](int, i64 begin, i64 end) {
        std::vector<Words<SHIFT>> all;
        std::vector<decltype(reader(i64(0), i64(0)))> values;
        for (i64 p = 0; p < packets; p++) {
            all.push_back({data[p], sizes[p] / 4});
            all.back().seek(begin);
            values.push_back(reader(p, begin));
        }
        sum_chunks(out, begin, end, fresh, n >= stream_from, [&](i64 at, i64 stop, float* to) {
            for (i64 p = 0; p < packets; p++) {
                Words<SHIFT> w = all[p];  // in registers
                auto value = values[p];
                for (i64 i; w.next < w.count && (i = w.index(w.next)) < stop; w.next++)
                    to[i - at] += value(w.next, w.word(w.next));
                all[p] = w;
                values[p] = value;
            }
        });
    });
    return 0;
}

}  // namespace
