// Gradient dropping: the cut from a sample, indices and values of what exceeds it.
#pragma once

#include "sums.h"
#include "words.h"

namespace {

// Where a scan writes: int32 indices and float32 values, both at any byte.
struct Survivors {
    u8 *index, *value;

    void add(i64 at, float v) {
        put(index, u32(at));
        if (value) put(value, v), value += 4;
        index += 4;
    }
};

// Elements begin ... end - 1 of owed + grad (of grad, if `owed` is null) with a magnitude beyond
// `cut`, counted from `start`; what is still owed goes to `out`. `s.value` null: indices only.
Survivors dropping_plain(const float* grad, const float* owed, float* out, i64 begin, i64 end,
                         float cut, i64 start, Survivors s) {
    for (i64 i = begin; i < end; i++) {
        float v = owed ? owed[i] + grad[i] : grad[i];
        if (std::fabs(v) > cut) {
            s.add(start + i, v);
            v += -1.0f * v;
        }
        if (owed) out[i] = v;
    }
    return s;
}

#if HAVE_AVX2
// 32 elements at a time, as in strom.h.
template <bool OWED>
AVX2 Survivors dropping_avx2(const float* grad, const float* owed, float* out, i64 begin, i64 end,
                             float cut, i64 start, bool stream, Survivors s) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    const __m256 limit = _mm256_set1_ps(cut);
    i64 i = begin + (stream ? until_aligned(out + begin, end - begin) : 0);
    s = dropping_plain(grad, owed, out, begin, i, cut, start, s);
    for (; i + 32 <= end; i += 32) {
        __m256 v[4], hit[4];
        next_page(grad + i);
        if (OWED) next_page(owed + i);
        for (int k = 0; k < 4; k++) {
            v[k] = _mm256_loadu_ps(grad + i + 8 * k);
            if (OWED) v[k] = _mm256_add_ps(_mm256_loadu_ps(owed + i + 8 * k), v[k]);
            hit[k] = _mm256_cmp_ps(_mm256_and_ps(v[k], magnitude), limit, _CMP_GT_OQ);
        }
        const __m256 any = _mm256_or_ps(_mm256_or_ps(hit[0], hit[1]),
                                        _mm256_or_ps(hit[2], hit[3]));
        if (_mm256_movemask_ps(any)) {
            alignas(32) float group[32];
            u32 mask = 0;
            for (int k = 0; k < 4; k++) {
                _mm256_store_ps(group + 8 * k, v[k]);
                mask |= u32(_mm256_movemask_ps(hit[k])) << 8 * k;
            }
            for (; mask; mask &= mask - 1) {
                const int at = __builtin_ctz(mask);
                s.add(start + i + at, group[at]);
                group[at] += -1.0f * group[at];
            }
            for (int k = 0; k < 4; k++) v[k] = _mm256_load_ps(group + 8 * k);
        }
        for (int k = 0; OWED && k < 4; k++) store(out + i + 8 * k, v[k], stream);
    }
    if (stream) _mm_sfence();
    return dropping_plain(grad, owed, out, i, end, cut, start, s);
}
#endif

}  // namespace

// Number `number` in ascending order of `size` magnitudes of owed + grad (of grad, if `owed` is
// null), of elements k * span / size rounded down. Magnitudes are ordered like their bits: a
// histogram of the upper bits leaves few to sort.
API float mp_dropping_cut(const float* grad, const float* owed, i64 span, i64 size, i64 number) {
    constexpr int SHIFT = 19;
    thread_local std::vector<u32> magnitudes, rest;
    magnitudes.resize(size);
    i64 bins[1 << (31 - SHIFT)] = {};
    // k * (span % size) / size without a division: exact while size * size < 2**62
    using Wide = unsigned __int128;
    const u64 stride = u64(span / size), part = u64((Wide(span % size) << 62) / Wide(size)) + 1;
    for (i64 k = 0; k < size; k++) {  // no more than this: then many reads are on their way
        const u64 i = u64(k) * stride + u64(Wide(k) * part >> 62);
        magnitudes[k] = bits_of(std::fabs(owed ? owed[i] + grad[i] : grad[i]));
    }
    for (u32 m : magnitudes) bins[m >> SHIFT]++;
    u32 bin = 0;
    for (; number >= bins[bin]; bin++) number -= bins[bin];
    rest.clear();
    for (u32 m : magnitudes)
        if (m >> SHIFT == bin) rest.push_back(m);
    std::nth_element(rest.begin(), rest.begin() + number, rest.end());
    return float_of(rest[number]);
}

// Writes indices to `index` and, unless it is null, values to `value`; there is room for 4 * n
// bytes in each. `owed` and `out` null: of `grad`; else of owed + grad, and what is still owed goes
// to `out`. Returns how many.
API i64 mp_dropping_encode(const float* grad, const float* owed, float* out, i64 n, float cut,
                           i64 start, u8* index, u8* value) {
    const bool stream = owed && out != owed && n >= stream_from;
    Pieces indices, values;
    split(n, 32, grain, [&](int part, i64 begin, i64 end) {
        const Survivors from{index + 4 * begin, value ? value + 4 * begin : nullptr};
        Survivors to = from;
#if HAVE_AVX2
        if (avx2)
            to = (owed ? dropping_avx2<true> : dropping_avx2<false>)(
                grad, owed, out, begin, end, cut, start, stream, from);
        else
#endif
            to = dropping_plain(grad, owed, out, begin, end, cut, start, from);
        indices.piece[part] = values.piece[part] = {4 * begin, to.index - from.index};
    });
    if (value) values.join(value);
    return indices.join(index) / 4;
}

// float32 x[index] behind the `count` indices at the front of `data`; INVALID for one that is not
// from 0 to n - 1.
API i64 mp_dropping_values(const float* x, i64 n, i64 count, u8* data) {
    for (i64 k = 0; k < count; k++) {
        const u32 i = get<u32>(data + 4 * k);
        if (i >= n) return INVALID;
        put(data + 4 * (count + k), x[i]);
    }
    return 0;
}

// out += or, if fresh, = the sum over packets of weight * value at the indices named. `sizes` in
// bytes, multiples of 8. INVALID unless indices ascend from 0 to n - 1 and values are finite.
API i64 mp_dropping_decode(const u8* const* data, const i64* sizes, i64 packets, float weight,
                           float* out, i64 n, int fresh) {
    std::vector<i64> halves(sizes, sizes + packets);
    for (i64 p = 0; p < packets; p++) {
        halves[p] = sizes[p] / 2;
        if (!finite_bytes(data[p] + halves[p], halves[p] / 4)) return INVALID;
    }
    struct Value {
        const u8* values;
        float weight;
        float operator()(i64 k, u32) const { return weight * get<float>(values + 4 * k); }
    };
    return add_words<0>(data, halves.data(), packets, out, n, fresh,
                        [&](i64 p, i64) { return Value{data[p] + halves[p], weight}; });
}
