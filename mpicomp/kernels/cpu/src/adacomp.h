// AdaComp, encoding: in each bin the elements that grew to its maximum, as entries of 8 or 16 bits.
#pragma once

#include "sums.h"
#include "words.h"

namespace {

constexpr i64 MOST_BIN = 1 << 14;
constexpr i64 AHEAD_OF_BIN = 4096;  // elements between what is worked on and what is fetched

// Writes the entries field << 2 | last << 1 | positive of one layer; see reference/adacomp.py.
template <class T> struct Entries {
    u8* at;
    i64 size;  // of a bin
    i64 empty = 0;

    // One bin: `count` entries without the mark on the last.
    void add(const u16* list, i64 count) {
        if (!count) {
            empty++;
            return;
        }
        const i64 most = (i64(1) << (8 * sizeof(T) - 2)) - (size - 1);
        for (; empty > 0; empty -= std::min(empty, most))  // runs, filled from the first on
            write(T((size - 2 + std::min(empty, most)) << 2));
        for (i64 k = 0; k + 1 < count; k++) put(at + k * sizeof(T), T(list[k]));
        at += (count - 1) * sizeof(T);
        write(T(list[count - 1] | 2));
    }

    void write(T entry) {
        put(at, entry);
        at += sizeof(T);
    }
};

// One bin: g = base + grad if `add`, else base, is written to `g`; h = ahead * grad + g.
struct Bin {
    const float *base, *grad;
    bool add;
    float ahead;
    i64 n;
    float* g;
    u32* sent;  // a bit an element, 0 before
    u16* list;  // place << 2 | positive of what is sent; room for n + 8
};

// The largest |g|.
float adacomp_largest_plain(const Bin& b, i64 from, float largest) {
    for (i64 i = from; i < b.n; i++) {
        b.g[i] = b.add ? b.base[i] + b.grad[i] : b.base[i];
        largest = std::max(largest, std::fabs(b.g[i]));
    }
    return largest;
}

// Lists what is sent of elements from ... n - 1 behind the `count` that were listed before.
i64 adacomp_sent_plain(const Bin& b, i64 from, float largest, i64 count) {
    for (i64 i = from; i < b.n; i++) {
        const float h = b.ahead * b.grad[i] + b.g[i];
        const bool sent = std::fabs(h) >= largest && b.g[i] != 0;
        b.sent[i / 32] |= u32(sent) << i % 32;
        b.list[count] = u16(i << 2 | (b.g[i] > 0));
        count += sent;
    }
    return count;
}

#if HAVE_AVX2
// For each set of eight 16-bit lanes the shuffle that moves these lanes to the front.
struct Compress {
    alignas(16) u8 shuffle[256][16];

    constexpr Compress() : shuffle() {
        for (int set = 0; set < 256; set++)
            for (int lane = 0, to = 0; lane < 8; lane++)
                if (set >> lane & 1) {
                    shuffle[set][2 * to] = u8(2 * lane);
                    shuffle[set][2 * to + 1] = u8(2 * lane + 1);
                    to++;
                }
    }
};
constexpr Compress COMPRESS;

AVX2 float adacomp_largest_avx2(const Bin& b) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    __m256 most = _mm256_setzero_ps();
    i64 i = 0;
    for (; i + 8 <= b.n; i += 8) {
        __m256 g = _mm256_loadu_ps(b.base + i);
        if (b.add) g = _mm256_add_ps(g, _mm256_loadu_ps(b.grad + i));
        _mm256_storeu_ps(b.g + i, g);
        most = _mm256_max_ps(most, _mm256_and_ps(g, mask));
    }
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, most);
    return adacomp_largest_plain(b, i, *std::max_element(lanes, lanes + 8));
}

// What is the same for a whole bin.
struct Test {
    __m256 limit, ahead;
};

// Lists what is sent of elements i ... i + 7 at b.list[count] and returns a bit for each.
AVX2 inline u32 adacomp_eight(const Bin& b, const Test& t, i64 i, i64 count) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    const __m256 zero = _mm256_setzero_ps(), g = _mm256_loadu_ps(b.g + i);
    const __m256 h = _mm256_add_ps(_mm256_mul_ps(t.ahead, _mm256_loadu_ps(b.grad + i)), g);
    const __m256 grew = _mm256_cmp_ps(_mm256_and_ps(h, mask), t.limit, _CMP_GE_OQ);
    const __m256 some = _mm256_cmp_ps(g, zero, _CMP_NEQ_UQ);
    const u32 bits = u32(_mm256_movemask_ps(_mm256_and_ps(grew, some)));
    const __m256i up = _mm256_castps_si256(_mm256_cmp_ps(g, zero, _CMP_GT_OQ));  // -1 or 0
    const __m128i sign = _mm_packs_epi32(_mm256_castsi256_si128(up),
                                         _mm256_extracti128_si256(up, 1));
    const __m128i place = _mm_add_epi16(_mm_set1_epi16(int16_t(i << 2)),
                                        _mm_setr_epi16(0, 4, 8, 12, 16, 20, 24, 28));
    const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(COMPRESS.shuffle[bits]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(b.list + count),
                     _mm_shuffle_epi8(_mm_sub_epi16(place, sign), order));
    return bits;
}

AVX2 i64 adacomp_sent_avx2(const Bin& b, float largest) {
    const Test t{_mm256_set1_ps(largest), _mm256_set1_ps(b.ahead)};
    i64 i = 0, count = 0;
    for (; i + 32 <= b.n; i += 32) {
        u32 word = 0;
        for (int k = 0; k < 32; k += 16) {
            _mm_prefetch(b.base + i + k + AHEAD_OF_BIN, _MM_HINT_T0);
            if (b.add) _mm_prefetch(b.grad + i + k + AHEAD_OF_BIN, _MM_HINT_T0);
        }
        for (int k = 0; k < 32; k += 8) {
            const u32 bits = adacomp_eight(b, t, i + k, count);
            word |= bits << k;
            count += __builtin_popcount(bits);
        }
        b.sent[i / 32] = word;
    }
    for (; i + 8 <= b.n; i += 8) {
        const u32 bits = adacomp_eight(b, t, i, count);
        b.sent[i / 32] |= bits << i % 32;
        count += __builtin_popcount(bits);
    }
    return adacomp_sent_plain(b, i, largest, count);
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
    return adacomp_sent_plain(b, 0, largest, 0);
}

// out -+= scale where a bit is set: what was sent with its sign is no longer owed. n <= 32.
void adacomp_settle_plain(u32 bits, float scale, i64 n, float* out) {
    const float quantum = -1.0f * scale;
    for (i64 i = 0; i < n; i++)
        if (bits >> i & 1) out[i] += out[i] > 0 ? quantum : -quantum;
}

#if HAVE_AVX2
AVX2 void adacomp_settle_avx2(u32 bits, float scale, float* out) {  // 32 elements
    const __m256 quantum = _mm256_set1_ps(-1.0f * scale), back = _mm256_set1_ps(-(-1.0f * scale));
    const __m256i shift = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    for (int i = 0; i < 32; i += 8) {
        const __m256 g = _mm256_loadu_ps(out + i);
        const __m256 positive = _mm256_cmp_ps(g, _mm256_setzero_ps(), _CMP_GT_OQ);
        const __m256 less = _mm256_add_ps(g, _mm256_blendv_ps(back, quantum, positive));
        const __m256i sent = _mm256_sllv_epi32(_mm256_set1_epi32(int(bits >> i)), shift);
        _mm256_storeu_ps(out + i, _mm256_blendv_ps(g, less, _mm256_castsi256_ps(sent)));
    }
}
#endif

void adacomp_settle(const u32* sent, i64 n, float scale, float* out) {
    for (i64 i = 0; i < n; i += 32) {
        const u32 bits = sent[i / 32];
        if (!bits) continue;
#if HAVE_AVX2
        if (avx2 && n - i >= 32) {
            adacomp_settle_avx2(bits, scale, out + i);
            continue;
        }
#endif
        adacomp_settle_plain(bits, scale, std::min<i64>(32, n - i), out + i);
    }
}

// One layer; see mp_adacomp_encode.
template <class T>
i64 adacomp_encode(const float* base, const float* grad, float* out, i64 n, float ahead, i64 size,
                   float* scale, u8* data) {
    const i64 bins = (n + size - 1) / size, group = std::max<i64>(1, 2048 / size);
    const i64 words = (size + 31) / 32;  // of bits, for each bin
    thread_local std::vector<float> largest;
    thread_local std::vector<u32> sent;
    largest.resize(std::max<size_t>(largest.size(), bins));
    sent.resize(std::max<size_t>(sent.size(), bins * words));
    float g[MOST_BIN];
    u16 list[MOST_BIN + 8];
    Entries<T> entries{data, size};
    for (i64 first = 0; first < bins; first += group) {  // bins whose g goes to `out` in one go
        const i64 start = first * size, stop = std::min(n, (first + group) * size);
        for (i64 at = start, bin = first; at < stop; at += size, bin++) {
            const Bin b{base + at, grad + at, out != nullptr, ahead, std::min(size, n - at),
                        g + (at - start), &sent[bin * words], list};
            largest[bin] = adacomp_largest(b);
            entries.add(list, adacomp_sent(b, largest[bin]));
        }
        if (out) copy(g, out + start, stop - start, n >= stream_from);
    }
    *scale = total(largest.data(), bins) / float(bins);
    const i64 count = (entries.at - data) / i64(sizeof(T));
    if (!out || !count) return count;
    if (!finite(scale, 1)) return INVALID;
    for (i64 bin = 0; bin < bins; bin++) {
        const i64 at = bin * size;
        adacomp_settle(&sent[bin * words], std::min(size, n - at), *scale, out + at);
    }
    return count;
}

}  // namespace

// Entries of one layer, `width` bytes each, in bins of `size`; h = ahead * grad + g. `out` null:
// g = base; else g = base + grad, and what is still owed goes to `out`. Returns how many entries;
// INVALID if there is `out` and the scale is not finite.
API i64 mp_adacomp_encode(const float* base, const float* grad, float* out, i64 n, float ahead,
                          i64 size, int width, float* scale, u8* data) {
    const auto encode = width == 1 ? adacomp_encode<u8> : adacomp_encode<u16>;
    return encode(base, grad, out, n, ahead, size, scale, data);
}
