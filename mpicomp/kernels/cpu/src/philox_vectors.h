// Philox for four blocks a vector, compiled once for AVX2 and once for AVX-512; see philox.h.
//
// A word stands in the lower half of each 64-bit lane: mul_epu32 reads only these, so nobody clears
// the upper halves. Lanes hold blocks 0, 2, 1, 3, as unpack wants them. The rounds are unrolled, so
// that what is the same for all blocks in the first two is computed before the loop.
TARGET void PHILOX(const Philox& key, u64 first, i64 blocks, u32* words) {
    const __m256i m0 = _mm256_set1_epi64x(M0), m1 = _mm256_set1_epi64x(M1);
    const __m256i four = _mm256_set1_epi64x(4), bucket = _mm256_set1_epi64x(key.bucket);
    const __m256i step = _mm256_set1_epi64x(key.step), rank = _mm256_set1_epi64x(key.rank);
    __m256i key0[10], key1[10];
    for (u32 round = 0; round < 10; round++) {
        key0[round] = _mm256_set1_epi64x(u32(key.key0 + round * W0));
        key1[round] = _mm256_set1_epi64x(u32(key.key1 + round * W1));
    }
    const __m256i order = _mm256_setr_epi64x(0, 2, 1, 3);
    __m256i block = _mm256_add_epi64(_mm256_set1_epi64x(i64(first)), order);
    i64 b = 0;
    for (; b + 4 * VECTORS <= blocks; b += 4 * VECTORS, words += 16 * VECTORS) {
        __m256i c0[VECTORS], c1[VECTORS], c2[VECTORS], c3[VECTORS];
        for (int v = 0; v < VECTORS; v++, block = _mm256_add_epi64(block, four))
            c0[v] = block, c1[v] = bucket, c2[v] = step, c3[v] = rank;
#pragma GCC unroll 10
        for (int round = 0; round < 10; round++)
            for (int v = 0; v < VECTORS; v++) {
                const __m256i p0 = _mm256_mul_epu32(c0[v], m0), p1 = _mm256_mul_epu32(c2[v], m1);
                c0[v] = XOR(_mm256_srli_epi64(p1, 32), c1[v], key0[round]);
                c2[v] = XOR(_mm256_srli_epi64(p0, 32), c3[v], key1[round]);
                c1[v] = p1, c3[v] = p0;
            }
        for (int v = 0; v < VECTORS; v++) {
            const __m256i low = _mm256_blend_epi32(c0[v], _mm256_slli_epi64(c1[v], 32), 0xAA);
            const __m256i high = _mm256_blend_epi32(c2[v], _mm256_slli_epi64(c3[v], 32), 0xAA);
            __m256i* to = reinterpret_cast<__m256i*>(words + 16 * v);
            _mm256_storeu_si256(to, _mm256_unpacklo_epi64(low, high));
            _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(low, high));
        }
    }
    philox_plain(key, first + u64(b), blocks - b, words);
}

#undef PHILOX
#undef TARGET
#undef VECTORS
#undef XOR
