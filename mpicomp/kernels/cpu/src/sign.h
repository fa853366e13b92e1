// Signs with one mean magnitude for each group of elements: a tensor, its rows or its blocks.
#pragma once

#include "onebit_decode.h"
#include "terngrad.h"

namespace {

// `length` elements are a group, the last one may be shorter; each begins with a byte of its own.
struct Groups {
    i64 n, length;

    i64 count() const { return (n + length - 1) / length; }
    i64 bytes() const { return (length + 7) / 8; }
    i64 size(i64 g) const { return std::min(length, n - g * length); }
    u8* bits(u8* data, i64 g) const { return data + 4 * count() + g * bytes(); }
    const u8* bits(const u8* data, i64 g) const { return data + 4 * count() + g * bytes(); }
};

// Lane by lane (element i is in lane i % 32) the sums of |owed + grad|, added to `lanes`.
void sign_sums_plain(const float* grad, const float* owed, i64 n, float* lanes) {
    for (i64 i = 0; i < n; i++)
        lanes[i % 32] += std::fabs(owed ? owed[i] + grad[i] : grad[i]);
}

// out = v - scale * its sign, and the bits of v = owed + grad. `out` may be null.
void sign_bits_plain(const float* grad, const float* owed, i64 n, float scale, u8* bits,
                     float* out) {
    for (i64 i = 0; i < n; i++) {
        const float v = owed ? owed[i] + grad[i] : grad[i];
        const bool bit = v >= 0;
        bits[i / 8] = u8((i % 8 ? bits[i / 8] : 0) | bit << i % 8);
        if (out) out[i] = v + (bit ? -scale : scale);
    }
}

#if HAVE_AVX2
template <bool OWED>
AVX2 void sign_sums_avx2(const float* grad, const float* owed, i64 n, float* lanes) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    __m256 sum[4];
    for (int k = 0; k < 4; k++) sum[k] = _mm256_loadu_ps(lanes + 8 * k);
    i64 i = 0;
    for (; i + 32 <= n; i += 32)
        for (int k = 0; k < 4; k++) {
            __m256 v = _mm256_loadu_ps(grad + i + 8 * k);
            if (OWED) v = _mm256_add_ps(_mm256_loadu_ps(owed + i + 8 * k), v);
            sum[k] = _mm256_add_ps(sum[k], _mm256_and_ps(v, magnitude));
        }
    for (int k = 0; k < 4; k++) _mm256_storeu_ps(lanes + 8 * k, sum[k]);
    sign_sums_plain(grad + i, OWED ? owed + i : nullptr, n - i, lanes);
}

template <bool OWED>
AVX2 void sign_bits_avx2(const float* grad, const float* owed, i64 n, float scale, u8* bits,
                         float* out) {
    const __m256 zero = _mm256_setzero_ps(), upper = _mm256_set1_ps(-scale);
    const __m256 lower = _mm256_set1_ps(scale);
    i64 i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_loadu_ps(grad + i);
        if (OWED) v = _mm256_add_ps(_mm256_loadu_ps(owed + i), v);
        const __m256 bit = _mm256_cmp_ps(v, zero, _CMP_GE_OQ);
        bits[i / 8] = u8(_mm256_movemask_ps(bit));
        if (OWED) _mm256_storeu_ps(out + i, _mm256_add_ps(v, _mm256_blendv_ps(lower, upper, bit)));
    }
    sign_bits_plain(grad + i, OWED ? owed + i : nullptr, n - i, scale, bits + i / 8,
                    OWED ? out + i : nullptr);
}
#endif

void sign_sums(const float* grad, const float* owed, i64 n, float* lanes) {
#if HAVE_AVX2
    if (avx2) return (owed ? sign_sums_avx2<true> : sign_sums_avx2<false>)(grad, owed, n, lanes);
#endif
    sign_sums_plain(grad, owed, n, lanes);
}

// The folded lanes of up to BRANCH elements.
void sign_branch(const float* grad, const float* owed, i64 n, float* lanes) {
    std::fill(lanes, lanes + 32, 0.0f);
    if (n <= 1024) return sign_sums(grad, owed, n, lanes);
    float memory[32 * Fold<float>::LEVELS], block[32];
    Fold<float> fold(memory, 32);
    for (i64 at = 0; at < n; at += 1024) {
        std::fill(block, block + 32, 0.0f);
        sign_sums(grad + at, owed ? owed + at : nullptr, std::min<i64>(1024, n - at), block);
        fold.add(block);
    }
    std::copy(fold.result(), fold.result() + 32, lanes);
}

// The mean magnitude of a group of n from the lanes of its branches.
float sign_mean(const float* rows, i64 n) {
    float memory[32 * Fold<float>::LEVELS], block[32], sum = 0;
    const i64 branches = (n + BRANCH - 1) / BRANCH;
    const float* lanes = rows;
    Fold<float> fold(memory, 32);
    if (branches > 1) {
        for (i64 b = 0; b < branches; b += 32) {
            std::fill(block, block + 32, 0.0f);
            for (i64 k = b; k < std::min(b + 32, branches); k++)
                for (int lane = 0; lane < 32; lane++) block[lane] += rows[32 * k + lane];
            fold.add(block);
        }
        lanes = fold.result();
    }
    for (int lane = 0; lane < 32; lane++) sum += lanes[lane];
    return sum / float(n);
}

// The second pass over n elements of a group, whose bits begin with a whole byte.
void sign_bits(const float* grad, const float* owed, i64 n, float scale, u8* bits, float* out) {
#if HAVE_AVX2
    const auto some = owed ? sign_bits_avx2<true> : sign_bits_avx2<false>;
    if (avx2) return some(grad, owed, n, scale, bits, out);
#endif
    sign_bits_plain(grad, owed, n, scale, bits, out);
}

// out += scale or -scale, times weight, for elements at ... at + n - 1 of a group.
void sign_add(const u8* bits, i64 at, i64 n, float scale, float weight, float* out) {
    const float level[2] = {-scale * weight, scale * weight};
    const auto add = [&](i64 begin, i64 end) {
        for (i64 i = begin; i < end; i++) out[i] += level[bits[(at + i) / 8] >> (at + i) % 8 & 1];
    };
    i64 i = std::min(n, (8 - at % 8) % 8);
    add(0, i);
#if HAVE_AVX2
    if (avx2) {
        onebit_column_avx2(bits + (at + i) / 8, (n - i) / 32, level, out + i);
        i += (n - i) / 32 * 32;
    }
#endif
    add(i, n);
}

}  // namespace

// `owed` and `out` null: encodes `grad`; else owed + grad, and what is still owed goes to `out`.
// INVALID if there is `owed` and a mean is not finite.
API i64 mp_sign_encode(const float* grad, const float* owed, float* out, i64 n, i64 length,
                       u8* data) {
    const Groups groups{n, length};
    std::atomic<bool> bad{false};
    const auto settle = [&](i64 g, i64 from, i64 n, float* to) {  // within group g
        const i64 at = g * length + from;
        sign_bits(grad + at, owed ? owed + at : nullptr, n, get<float>(data + 4 * g),
                  groups.bits(data, g) + from / 8, to);
    };
    const auto mean = [&](const float* rows, i64 g) {
        const float scale = sign_mean(rows, groups.size(g));
        put(data + 4 * g, scale);
        if (bits_of(scale) >= 0x7F800000) bad = true;
    };
    if (length <= BRANCH) {  // a group is in some cache between its two passes
        split(groups.count(), 1, std::max<i64>(1, grain / length), [&](int, i64 begin, i64 end) {
            float lanes[32];
            for (i64 g = begin; g < end; g++) {
                const i64 at = g * length;
                sign_branch(grad + at, owed ? owed + at : nullptr, groups.size(g), lanes);
                mean(lanes, g);
                settle(g, 0, groups.size(g), owed ? out + at : nullptr);
            }
        });
        return bad && owed ? INVALID : 0;
    }
    for (i64 g = 0; g < groups.count(); g++) {
        const i64 size = groups.size(g), branches = (size + BRANCH - 1) / BRANCH;
        const bool stream = owed && out != owed && size >= stream_from;
        std::vector<float> rows(32 * branches);
        split(branches, 1, 1, [&](int, i64 begin, i64 end) {
            for (i64 b = begin; b < end; b++) {
                const i64 at = g * length + b * BRANCH;
                sign_branch(grad + at, owed ? owed + at : nullptr,
                            std::min(BRANCH, size - b * BRANCH), &rows[32 * b]);
            }
        });
        mean(rows.data(), g);
        split(size, 1024, grain, [&](int, i64 begin, i64 end) {
            float v[1024];
            for (i64 at = begin; at < end; at += 1024) {
                const i64 count = std::min<i64>(1024, end - at);
                settle(g, at, count, v);
                if (owed) copy(v, out + g * length + at, count, stream);
            }
        });
    }
    return bad && owed ? INVALID : 0;
}

// out += or, if fresh, = the sum over packets of weight * what each bit stands for. INVALID for a
// scale that no encoder writes, or if bits behind the last of a group are set.
API i64 mp_sign_decode(const u8* const* data, i64 packets, i64 length, float weight, float* out,
                       i64 n, int fresh) {
    const Groups groups{n, length};
    for (i64 p = 0; p < packets; p++)
        for (i64 g = 0; g < groups.count(); g++) {
            const i64 size = groups.size(g);
            if (get<u32>(data[p] + 4 * g) >= 0x7F800000) return INVALID;
            if (size % 8 && groups.bits(data[p], g)[size / 8] >> size % 8) return INVALID;
        }
    add_packets(packets, out, n, fresh, [&](i64 p, i64 at, i64 count, float* to) {
        for (i64 i = 0; i < count;) {
            const i64 g = (at + i) / length, from = at + i - g * length;
            const i64 few = std::min(count - i, length - from);
            sign_add(groups.bits(data[p], g), from, few, get<float>(data[p] + 4 * g), weight,
                     to + i);
            i += few;
        }
    });
    return 0;
}
