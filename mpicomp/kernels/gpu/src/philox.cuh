// Philox4x32-10: the random word of an element as a function of a key and the element's number.
#pragma once

struct Key {
    u32 bucket, step, rank, key0, key1;
};

// The words of elements that one thread asks for in ascending order, four from each block.
struct Draws {
    Key key;
    u64 block;
    u32 w0, w1, w2, w3;

    __device__ explicit Draws(const Key& k) : key(k), block(~0ull), w0(0), w1(0), w2(0), w3(0) {}

    __device__ u32 word(u64 element) {
        if (element / 4 != block) fill(element / 4);
        const u32 low = element & 1 ? w1 : w0, high = element & 1 ? w3 : w2;
        return element & 2 ? high : low;
    }

    // In [0, 1): the top 24 bits.
    __device__ float uniform(u64 element) {
        return float(word(element) >> 8) * 5.9604644775390625e-8f;
    }

    __device__ void fill(u64 number) {
        block = number;
        u32 c0 = u32(number), c1 = key.bucket, c2 = key.step, c3 = key.rank;
        u32 k0 = key.key0, k1 = key.key1;
        for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
            const u64 p0 = u64(0xD2511F53u) * c0, p1 = u64(0xCD9E8D57u) * c2;
            c0 = u32(p1 >> 32) ^ c1 ^ k0;
            c1 = u32(p1);
            c2 = u32(p0 >> 32) ^ c3 ^ k1;
            c3 = u32(p0);
        }
        w0 = c0, w1 = c1, w2 = c2, w3 = c3;
    }
};
