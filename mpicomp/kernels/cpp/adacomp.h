// AdaComp: in each bin the elements that grew to its maximum, as entries of 8 or 16 bits.
#pragma once

#include "sums.h"
#include "words.h"

namespace {

// Writes entries field << 2 | last << 1 | positive of one layer; see reference/adacomp.py.
template <class T> struct Entries {
    u8* at;
    i64 size;  // of a bin
    i64 empty = 0;

    void put_entry(i64 field, bool last, bool positive) {
        put(at, T(field << 2 | last << 1 | positive));
        at += sizeof(T);
    }

    void skip_empty() {  // in as many runs as it takes, filled from the first on
        const i64 most = (i64(1) << (8 * sizeof(T) - 2)) - (size - 1);
        for (; empty > 0; empty -= std::min(empty, most))
            put_entry(size - 2 + std::min(empty, most), false, false);
    }
};

constexpr i64 MOST_BIN = 1 << 14;

// One bin: g = base + grad if `add`, else base; h = ahead * grad + g. g is written to `g`.
struct Bin {
    const float *base, *grad;
    bool add;
    float ahead;
    i64 n;
    float* g;
    u32* sent;  // a bit an element
};

// Returns the largest |g|.
float adacomp_largest_plain(const Bin& b, i64 from, float largest) {
    for (i64 i = from; i < b.n; i++) {
        b.g[i] = b.add ? b.base[i] + b.grad[i] : b.base[i];
        largest = std::max(largest, std::fabs(b.g[i]));
    }
    return largest;
}

// Sets the bits of the elements that are sent, which were 0 before; returns how many.
i64 adacomp_sent_plain(const Bin& b, i64 from, float largest) {
    i64 count = 0;
    for (i64 i = from; i < b.n; i++) {
        const float h = b.ahead * b.grad[i] + b.g[i];
        const bool sent = std::fabs(h) >= largest && b.g[i] != 0;
        b.sent[i / 32] |= u32(sent) << i % 32;
        count += sent;
    }
    return count;
}

#if HAVE_AVX2
AVX2 float adacomp_largest_avx2(const Bin& b) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    __m256 most = _mm256_setzero_ps();
    i64 i = 0;
    for (; i + 8 <= b.n; i += 8) {
        __m256 g = _mm256_loadu_ps(b.base + i);
        if (b.add) g = _mm256_add_ps(g, _mm256_loadu_ps(b.grad + i));
        _mm256_storeu_ps(b.g + i, g);
        most = _mm256_max_ps(most, _mm256_and_ps(g, magnitude));
    }
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, most);
    return adacomp_largest_plain(b, i, *std::max_element(lanes, lanes + 8));
}

AVX2 i64 adacomp_sent_avx2(const Bin& b, float largest) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    const __m256 limit = _mm256_set1_ps(largest), ahead = _mm256_set1_ps(b.ahead);
    i64 i = 0, count = 0;
    for (; i + 8 <= b.n; i += 8) {
        const __m256 g = _mm256_loadu_ps(b.g + i);
        const __m256 h = _mm256_add_ps(_mm256_mul_ps(ahead, _mm256_loadu_ps(b.grad + i)), g);
        const __m256 grew = _mm256_cmp_ps(_mm256_and_ps(h, magnitude), limit, _CMP_GE_OQ);
        const __m256 some = _mm256_cmp_ps(g, _mm256_setzero_ps(), _CMP_NEQ_UQ);
        const u32 bits = u32(_mm256_movemask_ps(_mm256_and_ps(grew, some)));
        b.sent[i / 32] |= bits << i % 32;
        count += __builtin_popcount(bits);
    }
    return count + adacomp_sent_plain(b, i, largest);
}
#endif

float adacomp_largest(const Bin& b) {
#if HAVE_AVX2
    if (avx2) return adacomp_largest_avx2(b);
#endif
    return adacomp_largest_plain(b, 0, 0.0f);
}

i64 adacomp_sent(const Bin& b, float largest) {
    std::fill(b.sent, b.sent + (b.n + 31) / 32, 0);
    if (!(largest > 0)) return 0;  // a bin of zeros says nothing
#if HAVE_AVX2
    if (avx2) return adacomp_sent_avx2(b, largest);
#endif
    return adacomp_sent_plain(b, 0, largest);
}

// Reads the entries of one packet; `next` and `bin` say where it has come to.
template <class T> struct Reader {
    const u8* data;
    i64 count, size, next = 0, bin = 0;

    // The next element's index and sign, or -1 at the end. The entries are known to be right.
    i64 peek(bool& positive) {
        for (; next < count; next++) {
            const T entry = get<T>(data + next * i64(sizeof(T)));
            const i64 field = entry >> 2;
            if (!(entry & 2) && field >= size - 1) {
                bin += field - size + 2;
                continue;
            }
            positive = entry & 1;
            return bin * size + field;
        }
        return -1;
    }

    void pass() {
        bin += get<T>(data + next * i64(sizeof(T))) >> 1 & 1;
        next++;
    }

    bool valid(i64 n) const {
        i64 last_index = -1, at = 0;
        bool last = true;
        for (i64 i = 0; i < count; i++) {
            const T entry = get<T>(data + i * i64(sizeof(T)));
            const i64 field = entry >> 2;
            last = entry & 2;
            if (!last && field >= size - 1) {
                if (entry & 1) return false;
                at += field - size + 2;
                continue;
            }
            if (field >= size || at * size + field <= last_index) return false;
            last_index = at * size + field;
            at += last;
        }
        return last && last_index < n;
    }
};

// One layer; see mp_adacomp_encode.
template <class T>
i64 adacomp_encode(const float* base, const float* grad, float* out, i64 n, float ahead, i64 size,
                   float* scale, u8* data) {
    const i64 bins = (n + size - 1) / size, group = std::max<i64>(1, CHUNK / size);
    thread_local std::vector<float> largest;
    largest.resize(std::max<size_t>(largest.size(), bins));
    float g[std::max(CHUNK, MOST_BIN)];
    u32 sent[MOST_BIN / 32];
    Entries<T> entries{data, size};
    for (i64 first = 0; first < bins; first += group) {  // bins whose g goes to `out` in one go
        const i64 start = first * size, stop = std::min(n, (first + group) * size);
        for (i64 at = start; at < stop; at += size) {
            const Bin b{base + at, grad + at, out != nullptr, ahead, std::min(size, n - at),
                        g + (at - start), sent};
            const float most = largest[at / size] = adacomp_largest(b);
            i64 left = adacomp_sent(b, most);
            if (!left) {
                entries.empty++;
                continue;
            }
            entries.skip_empty();
            for (i64 w = 0; left; w++)
                for (u32 bits = sent[w]; bits; bits &= bits - 1) {
                    const i64 i = 32 * w + __builtin_ctz(bits);
                    entries.put_entry(i, --left == 0, b.g[i] > 0);
                }
        }
        if (out) copy(g, out + start, stop - start, n >= stream_from);
    }
    *scale = total(largest.data(), bins) / float(bins);
    return (entries.at - data) / i64(sizeof(T));
}

template <class T>
i64 adacomp_decode(const u8* const* data, const i64* counts, const float* scales, i64 packets,
                   i64 size, float weight, float* out, i64 n, bool fresh) {
    for (i64 p = 0; p < packets; p++) {
        const float quantum = weight * scales[p];
        if (!Reader<T>{data[p], counts[p], size}.valid(n)) return INVALID;
        if (counts[p] && !finite(&quantum, 1)) return INVALID;
    }
    split(n, CHUNK, grain, [&](int, i64 begin, i64 end) {
        std::vector<Reader<T>> all;
        for (i64 p = 0; p < packets; p++) all.push_back({data[p], counts[p], size});
        for (i64 at = begin; at < end; at += CHUNK) {
            const i64 stop = std::min(end, at + CHUNK);
            if (fresh) std::fill(out + at, out + stop, 0.0f);
            for (i64 p = 0; p < packets; p++) {
                const float quantum = weight * scales[p];
                bool positive = false;
                for (i64 i; (i = all[p].peek(positive)) >= 0 && i < stop; all[p].pass())
                    if (i >= begin) out[i] += positive ? quantum : -quantum;
            }
        }
    });
    return 0;
}

}  // namespace

// Entries of one layer, `width` bytes each, in bins of `size`; h = ahead * grad + g. `out` null:
// g = base; else g = base + grad goes to `out`. Returns how many entries.
API i64 mp_adacomp_encode(const float* base, const float* grad, float* out, i64 n, float ahead,
                          i64 size, int width, float* scale, u8* data) {
    const auto encode = width == 1 ? adacomp_encode<u8> : adacomp_encode<u16>;
    return encode(base, grad, out, n, ahead, size, scale, data);
}

// out += or, if fresh, = the sum over packets of +-(weight * scale) at the elements named; `counts`
// in entries. INVALID for entries that no encoder wrote; `out` is then as it was.
API i64 mp_adacomp_decode(const u8* const* data, const i64* counts, const float* scales,
                          i64 packets, i64 size, int width, float weight, float* out, i64 n,
                          int fresh) {
    const auto decode = width == 1 ? adacomp_decode<u8> : adacomp_decode<u16>;
    return decode(data, counts, scales, packets, size, weight, out, n, fresh);
}
