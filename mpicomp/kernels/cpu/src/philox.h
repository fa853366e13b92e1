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
#define PHILOX philox_avx2
#define TARGET AVX2
#define VECTORS 2
#define XOR(a, b, c) _mm256_xor_si256(a, _mm256_xor_si256(b, c))
#include "philox_vectors.h"
// AVX-512 has twice the registers and both xors in one: a third faster.
#define PHILOX philox_avx512
#define TARGET AVX512
#define VECTORS 4
#define XOR(a, b, c) _mm256_ternarylogic_epi64(a, b, c, 0x96)
#include "philox_vectors.h"
#endif

// The words of elements start ... start + count - 1, somewhere in `room` for count + 6.
const u32* philox_words(const Philox& key, i64 start, i64 count, u32* room) {
    const i64 first = start / 4, blocks = (start + count + 3) / 4 - first;
    auto philox = philox_plain;
#if HAVE_AVX2
    if (avx2) philox = avx512 ? philox_avx512 : philox_avx2;
#endif
    philox(key, u64(first), blocks, room);
    return room + start % 4;
}

}  // namespace
