// Philox4x32-10: random words as a function of a key and the number of the element.
#pragma once

#include "common.h"

namespace {

constexpr u32 M0 = 0xD2511F53, M1 = 0xCD9E8D57, W0 = 0x9E3779B9, W1 = 0xBB67AE85;

struct Philox {
    u32 bucket, step, rank, key0, key1;
};

// The words of `blocks` blocks from block `first` on, four each.
void philox_plain(const Philox& key, u64 first, i64 blocks, u32* words) {
    for (i64 b = 0; b < blocks; b++) {
        u32 c0 = u32(first + b), c1 = key.bucket, c2 = key.step, c3 = key.rank;
        u32 k0 = key.key0, k1 = key.key1;
        for (int round = 0; round < 10; round++, k0 += W0, k1 += W1) {
            const u64 p0 = u64(M0) * c0, p1 = u64(M1) * c2;
            c0 = u32(p1 >> 32) ^ c1 ^ k0, c1 = u32(p1);
            c2 = u32(p0 >> 32) ^ c3 ^ k1, c3 = u32(p0);
        }
        words[4 * b] = c0, words[4 * b + 1] = c1, words[4 * b + 2] = c2, words[4 * b + 3] = c3;
    }
}

#if HAVE_AVX2
#ifndef PVX
#define PVX 4
#endif
// Four blocks a vector, a word in the lower half of each 64-bit lane: mul_epu32 reads only these,
// so nobody clears the upper halves. The lanes hold blocks 0, 2, 1, 3, as unpack wants them. The
// rounds are unrolled: what is the same for all blocks in the first two is computed before
// the loop.
AVX2 void philox_avx2(const Philox& key, u64 first, i64 blocks, u32* words) {
    constexpr int VECTORS = PVX;
    const __m256i m0 = _mm256_set1_epi64x(M0), m1 = _mm256_set1_epi64x(M1);
    const __m256i order = _mm256_setr_epi64x(0, 2, 1, 3), step = _mm256_set1_epi64x(4);
    const __m256i bucket = _mm256_set1_epi64x(key.bucket);
    const __m256i second = _mm256_set1_epi64x(key.step), third = _mm256_set1_epi64x(key.rank);
    __m256i key0[10], key1[10];
    for (u32 round = 0; round < 10; round++) {
        key0[round] = _mm256_set1_epi64x(u32(key.key0 + round * W0));
        key1[round] = _mm256_set1_epi64x(u32(key.key1 + round * W1));
    }
    __m256i block = _mm256_add_epi64(_mm256_set1_epi64x(i64(first)), order);
    i64 b = 0;
    for (; b + 4 * VECTORS <= blocks; b += 4 * VECTORS) {
        __m256i c0[VECTORS], c1[VECTORS], c2[VECTORS], c3[VECTORS];
        for (int v = 0; v < VECTORS; v++, block = _mm256_add_epi64(block, step)) {
            c0[v] = block;
            c1[v] = bucket;
            c2[v] = second;
            c3[v] = third;
        }
#pragma GCC unroll 10
        for (int round = 0; round < 10; round++) {
            for (int v = 0; v < VECTORS; v++) {
                const __m256i p0 = _mm256_mul_epu32(c0[v], m0), p1 = _mm256_mul_epu32(c2[v], m1);
                c0[v] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32),
                                         _mm256_xor_si256(c1[v], key0[round]));
                c2[v] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32),
                                         _mm256_xor_si256(c3[v], key1[round]));
                c1[v] = p1, c3[v] = p0;
            }
        }
        for (int v = 0; v < VECTORS; v++) {
            const __m256i low = _mm256_blend_epi32(c0[v], _mm256_slli_epi64(c1[v], 32), 0xAA);
            const __m256i high = _mm256_blend_epi32(c2[v], _mm256_slli_epi64(c3[v], 32), 0xAA);
            __m256i* to = reinterpret_cast<__m256i*>(words + 4 * (b + 4 * v));
            _mm256_storeu_si256(to, _mm256_unpacklo_epi64(low, high));
            _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(low, high));
        }
    }
    philox_plain(key, first + u64(b), blocks - b, words + 4 * b);
}
#endif

// The words of elements start ... start + count - 1, somewhere in `room` for count + 6.
const u32* philox_words(const Philox& key, i64 start, i64 count, u32* room) {
    const i64 first = start / 4, blocks = (start + count + 3) / 4 - first;
#if HAVE_AVX2
    if (avx2) philox_avx2(key, u64(first), blocks, room);
    else philox_plain(key, u64(first), blocks, room);
#else
    philox_plain(key, u64(first), blocks, room);
#endif
    return room + start % 4;
}

}  // namespace
