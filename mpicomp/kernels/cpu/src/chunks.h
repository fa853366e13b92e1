// The largest of every block of up to 4096 neighbours: offsets of 12 bits, values of 2, 8, 32 bits.
#pragma once

#include <functional>

#include "common.h"

namespace {

constexpr i64 MOST_BLOCK = 4096;
constexpr i64 MOST_GROUPS = 1024;
constexpr double MOST_COUNT = 2147483648.0;  // the largest magnitude, counted in whole numbers
constexpr float MOST_STEP = 0x1.fffffep+120f;  // 127 of it are finite

struct Chunk {
    i64 start, size, first, keep, tensor;  // `first`: how many are kept before it
};

// What chunks_plan of the reference says: plan[tensors + 1][3].
struct Plan {
    std::vector<Chunk> blocks;
    i64 n, kept, tensors;

    Plan(const i64* plan, i64 tensors_, i64 block, i64 k)
        : n(plan[3 * tensors_]), kept(plan[3 * tensors_ + 1]), tensors(tensors_) {
        blocks.reserve(plan[3 * tensors + 2]);
        for (i64 t = 0; t < tensors; t++, plan += 3)
            for (i64 at = plan[0], first = plan[1]; at < plan[3]; at += block, first += k)
                blocks.push_back({at, std::min(block, plan[3] - at), first,
                                  std::min(k, plan[4] - first), t});
    }
};

// ---- selection ----

inline int32_t size_of(float x) { return int32_t(bits_of(x) & 0x7FFFFFFFu); }

// The largest magnitude of each of `groups` groups, element i in group i % groups.
void group_maxima_plain(const float* x, i64 n, i64 groups, int32_t* most) {
    std::fill(most, most + groups, 0);
    for (i64 at = 0; at + groups <= n; at += groups)
        for (i64 g = 0; g < groups; g++) most[g] = std::max(most[g], size_of(x[at + g]));
}

// The elements from `i` on whose magnitude is at least `bound`; returns where `to` ends.
u16* candidates_plain(const float* x, i64 i, i64 n, int32_t bound, u16* to) {
    for (; i < n; i++) {
        *to = u16(i);
        to += size_of(x[i]) >= bound;
    }
    return to;
}

// How many of these numbers are at least `bound`.
int reaching_plain(const int32_t* size, i64 i, i64 n, int32_t bound) {
    int count = 0;
    for (; i < n; i++) count += size[i] >= bound;
    return count;
}

#if HAVE_AVX2
AVX2 int reaching_avx2(const int32_t* size, i64 n, int32_t bound) {
    const __m256i less = _mm256_set1_epi32(bound - 1);
    __m256i count = _mm256_setzero_si256();
    i64 i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(size + i));
        count = _mm256_sub_epi32(count, _mm256_cmpgt_epi32(v, less));
    }
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(count), _mm256_extracti128_si256(count, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1));
    return _mm_cvtsi128_si32(four) + reaching_plain(size, i, n, bound);
}

AVX2 void group_maxima_avx2(const float* x, i64 n, i64 groups, int32_t* most) {
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    for (i64 g = 0; g < groups; g += 32) {
        __m256i largest[4] = {};
        for (i64 at = g; at + 32 <= n; at += groups)
            for (int k = 0; k < 4; k++) {
                const __m256 v = _mm256_loadu_ps(x + at + 8 * k);
                largest[k] = _mm256_max_epi32(
                    largest[k], _mm256_and_si256(_mm256_castps_si256(v), magnitude));
            }
        for (int k = 0; k < 4; k++)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(most + g + 8 * k), largest[k]);
    }
}

AVX2 u16* candidates_avx2(const float* x, i64 n, int32_t bound, u16* to) {
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF), less = _mm256_set1_epi32(bound - 1);
    i64 i = 0;
    for (; i + 64 <= n; i += 64) {
        u64 mask = 0;
        for (int k = 0; k < 8; k++) {
            const __m256i v = _mm256_castps_si256(_mm256_loadu_ps(x + i + 8 * k));
            const __m256i hit = _mm256_cmpgt_epi32(_mm256_and_si256(v, magnitude), less);
            mask |= u64(_mm256_movemask_ps(_mm256_castsi256_ps(hit))) << 8 * k;
        }
        for (; mask; mask &= mask - 1) *to++ = u16(i + __builtin_ctzll(mask));
    }
    return candidates_plain(x, i, n, bound, to);
}
#endif

// The largest number that at least `keep` of n magnitudes reach, of those whose `rough` lowest bits
// are 0. Bit by bit: that has no branch that a CPU guesses wrongly. Long arrays are partitioned.
int32_t kth_largest(int32_t* size, i64 n, i64 keep, int rough) {
    if (n > 1024) {
        std::nth_element(size, size + keep - 1, size + n, std::greater<int32_t>());
        return size[keep - 1];
    }
    int32_t found = 0;
    for (int bit = 30; bit >= rough; bit--) {
        const int32_t next = found | 1 << bit;
#if HAVE_AVX2
        const int count = avx2 ? reaching_avx2(size, n, next) : reaching_plain(size, 0, n, next);
#else
        const int count = reaching_plain(size, 0, n, next);
#endif
        found = count >= keep ? next : found;
    }
    return found;
}

// The offsets, ascending, of the `keep` largest magnitudes among n <= MOST_BLOCK; of equal ones
// those of lower offset. Of the maxima of `groups` groups the one in place `keep` is a bound that
// at least `keep` elements reach, and with twice as many groups few more do.
void chunks_select(const float* x, i64 n, i64 keep, u16* to) {
    alignas(32) int32_t most[MOST_GROUPS], size[MOST_BLOCK];
    u16 offset[MOST_BLOCK + 1];
    int32_t bound = 0;
    i64 groups = 32;
    while (groups < 2 * keep) groups *= 2;
    if (groups <= std::min(MOST_GROUPS, n / 4)) {
        auto maxima = group_maxima_plain;
#if HAVE_AVX2
        if (avx2) maxima = group_maxima_avx2;
#endif
        maxima(x, n - n % groups, groups, most);
        bound = kth_largest(most, groups, keep, 16);
    }
    u16* end;
#if HAVE_AVX2
    if (avx2) end = candidates_avx2(x, n, bound, offset);
    else
#endif
        end = candidates_plain(x, 0, n, bound, offset);
    const i64 count = end - offset;
    for (i64 c = 0; c < count; c++) size[c] = size_of(x[offset[c]]);
    const int32_t least = kth_largest(size, count, keep, 0);
    int ties = int(keep);
    for (i64 c = 0; c < count; c++) ties -= size[c] > least;
    const u16* const stop = to + keep;
    for (const u16* from = offset; to < stop; from++) {  // without branches, as above
        const int32_t own = size_of(x[*from]);
        const int tie = (own == least) & (ties > 0);
        ties -= tie;
        *to = *from;
        to += (own > least) | tie;
    }
}

// ---- floats, offsets and codes ----

struct Parts {
    u8 *floats, *offsets, *codes;

    Parts(u8* data, i64 tensors, i64 kept, int bits)
        : floats(data), offsets(data + 4 * (bits == 32 ? kept : bits == 8 ? tensors : 2 * tensors)),
          codes(offsets + (3 * kept + 1) / 2) {}
};

void put_offsets(const std::vector<u16>& offset, u8* data) {
    const i64 n = i64(offset.size());
    for (i64 i = 0; i < n; i += 2, data += 3) {
        const u32 word = offset[i] | u32(i + 1 < n ? offset[i + 1] : 0) << 12;
        data[0] = u8(word);
        data[1] = u8(word >> 8);
        if (i + 1 < n) data[2] = u8(word >> 16);
    }
}

inline i64 get_offset(const u8* data, i64 i) {
    data += 3 * (i / 2);
    return i % 2 ? data[1] >> 4 | data[2] << 4 : data[0] | (data[1] & 15) << 8;
}

// Rounded to a whole number, a half to the even one, for 0 <= x < 2^51: inline on any CPU.
inline double nearest(double x) { return x + 0x1p52 - 0x1p52; }

float largest_of(const float* value, i64 n) {
    float most = 0;
    for (i64 i = 0; i < n; i++) most = std::max(most, std::fabs(value[i]));
    return most;
}

// The two levels of one tensor, and codes for its values number `first` and on, which were 0; each
// value becomes what is said of it.
void encode_2bit(float* value, i64 first, i64 n, u8* level, u8* codes) {
    const float largest = largest_of(value, n);
    const double scale = largest ? MOST_COUNT / double(largest) : 0.0;
    std::vector<u32> whole(n);
    u64 sum = 0, upper = 0, count = 0;
    bool zero = false;
    for (i64 i = 0; i < n; i++) {
        whole[i] = u32(nearest(double(std::fabs(value[i])) * scale));
        sum += whole[i];
        zero |= !whole[i];
    }
    for (i64 i = 0; i < n; i++)
        if (u64(whole[i]) * u64(n) > sum) upper += whole[i], count++;
    const auto mean = [&](u64 part, u64 of) {
        const double unit = double(largest) * (1 / MOST_COUNT);
        return float(double(part) / double(std::max<u64>(of, 1)) * unit);
    };
    const float size[2] = {zero ? 0.0f : mean(sum - upper, u64(n) - count), mean(upper, count)};
    put(level, size[0]);
    put(level + 4, size[1]);
    for (i64 i = 0; i < n; i++) {
        const int above = u64(whole[i]) * u64(n) > sum, positive = value[i] > 0;
        codes[(first + i) / 4] |= u8((above << 1 | positive) << 2 * ((first + i) % 4));
        value[i] = positive ? size[above] : -size[above];
    }
}

// The same with 8 bits.
void encode_8bit(float* value, i64 n, u8* step, u8* codes) {
    const float unit = std::min(largest_of(value, n) / 127.0f, MOST_STEP);
    put(step, unit);
    for (i64 i = 0; i < n; i++) {
        const double size = unit ? std::min(nearest(std::fabs(value[i] / unit)), 127.0) : 0.0;
        const int code = value[i] < 0 ? -int(size) : int(size);
        codes[i] = u8(code);
        value[i] = float(code) * unit;
    }
}

// weight * what a payload says of one kept element after the other of a tensor.
struct Said {
    const u8 *floats, *codes;
    int bits;
    float level[4];

    Said(const Parts& from, i64 tensor, int bits_, float weight)
        : floats(from.floats), codes(from.codes), bits(bits_), level{weight} {
        if (bits == 8) level[1] = get<float>(floats + 4 * tensor);
        if (bits != 2) return;
        for (int code = 0; code < 4; code++) {
            const float size = get<float>(floats + 8 * tensor + 4 * (code >> 1));
            level[code] = weight * (code & 1 ? size : -size);
        }
    }

    float operator()(i64 i) const {
        if (bits == 2) return level[codes[i / 4] >> 2 * (i % 4) & 3];
        if (bits == 8) return level[0] * (float(int8_t(codes[i])) * level[1]);
        return level[0] * get<float>(floats + 4 * i);
    }
};

// Are floats and codes such as an encoder writes?
bool chunks_in_range(const Parts& from, const Plan& plan, int bits) {
    if (bits == 32) return finite_bytes(from.floats, plan.kept);
    const float most = bits == 8 ? MOST_STEP : 0x1.fffffep+127f;
    for (i64 i = 0; i < (bits == 8 ? 1 : 2) * plan.tensors; i++) {
        const float scale = get<float>(from.floats + 4 * i);
        if (!(scale >= 0 && scale <= most)) return false;
    }
    return bits == 2 || !std::memchr(from.codes, 0x80, size_t(plan.kept));
}

}  // namespace

// `owed` and `out` null: of `grad`; else of owed + grad, and what is still owed goes to `out`.
// INVALID where an element to be sent is not finite; `out` is then undefined.
API i64 mp_chunks_encode(const float* grad, const float* owed, float* out, const i64* rows,
                         i64 tensors, i64 block, i64 k, int bits, u8* data) {
    const Plan plan(rows, tensors, block, k);
    const bool stream = owed && out != owed && plan.n >= stream_from;
    std::vector<u16> offset(plan.kept);
    std::vector<float> value(plan.kept);
    split(i64(plan.blocks.size()), 1, std::max<i64>(grain / block, 1), [&](int, i64 b, i64 end) {
        alignas(32) float sum[MOST_BLOCK];
        for (; b < end; b++) {
            const Chunk& own = plan.blocks[b];
            const float* x = grad + own.start;
            if (owed) {
                for (i64 i = 0; i < own.size; i++) sum[i] = owed[own.start + i] + x[i];
                copy(sum, out + own.start, own.size, stream);
                x = sum;
            }
            chunks_select(x, own.size, own.keep, &offset[own.first]);
            for (i64 i = own.first; i < own.first + own.keep; i++) value[i] = x[offset[i]];
        }
    });
    if (!finite(value.data(), plan.kept)) return INVALID;
    const Parts to(data, tensors, plan.kept, bits);
    put_offsets(offset, to.offsets);
    if (bits == 32) std::memcpy(to.floats, value.data(), 4 * size_t(plan.kept));
    if (bits == 2) std::memset(to.codes, 0, size_t(plan.kept + 3) / 4);
    for (i64 t = 0; t < tensors; t++) {
        const i64 first = rows[3 * t + 1], n = rows[3 * t + 4] - first;
        if (bits == 2) encode_2bit(&value[first], first, n, to.floats + 8 * t, to.codes);
        if (bits == 8) encode_8bit(&value[first], n, to.floats + 4 * t, to.codes + first);
    }
    if (!owed) return 0;
    for (const Chunk& own : plan.blocks)
        for (i64 i = own.first; i < own.first + own.keep; i++)
            out[own.start + offset[i]] += -1.0f * value[i];
    return 0;
}

// out += or, if fresh, = the sum over packets of weight * what each says. INVALID for one that no
// encoder wrote; `out` is then undefined.
API i64 mp_chunks_decode(const u8* const* data, i64 packets, const i64* rows, i64 tensors,
                         i64 block, i64 k, int bits, float weight, float* out, int fresh) {
    const Plan plan(rows, tensors, block, k);
    std::vector<Parts> from;
    for (i64 p = 0; p < packets; p++) {
        from.emplace_back(const_cast<u8*>(data[p]), tensors, plan.kept, bits);
        if (!chunks_in_range(from[p], plan, bits)) return INVALID;
    }
    std::atomic<bool> bad{false};
    split(i64(plan.blocks.size()), 1, std::max<i64>(grain / block, 1), [&](int, i64 b, i64 end) {
        alignas(64) float chunk[MOST_BLOCK];
        for (; b < end; b++) {
            const Chunk& own = plan.blocks[b];
            float* to = fresh ? chunk : out + own.start;
            if (fresh) std::fill(chunk, chunk + own.size, 0.0f);
            for (i64 p = 0; p < packets; p++) {
                const Said said(from[p], own.tensor, bits, weight);
                i64 last = -1;
                for (i64 i = own.first; i < own.first + own.keep; i++) {
                    const i64 at = get_offset(from[p].offsets, i);
                    if (at <= last || at >= own.size) {
                        bad = true;
                        break;
                    }
                    to[at] += said(i);
                    last = at;
                }
            }
            if (fresh) copy(chunk, out + own.start, own.size, plan.n >= stream_from);
        }
    });
    return bad ? INVALID : 0;
}
