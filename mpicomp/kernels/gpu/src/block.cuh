// Codes with a scale for each block of elements: whole numbers of 2 to 8 bits, or e4m3 floats.
#pragma once

constexpr u32 BLOCK_LEAST = 0x0080, BLOCK_INFINITE = 0x7F80;  // scales, as bfloat16

__device__ inline int block_width(int form, int levels) {
    int width = 1;
    for (; levels; levels /= 2) width++;
    return form == 0 ? width : 8;
}

// The largest scale, as bfloat16.
__device__ inline u32 block_most(int levels) {
    return bits_of(3.4028234663852886e38f / float(levels)) >> 16;
}

__device__ inline u32 block_scale(const u8* data, i64 block) {
    return data[2 * block] | u32(data[2 * block + 1]) << 8;
}

// The nearest whole number (half to even), or one of the two neighbours.
__device__ inline float block_whole(float y, bool random, float draw) {
    if (!random) return rintf(y);
    const float below = floorf(y);
    return below + float(draw < y - below);
}

// What e4m3 byte or whole number `code` is worth, in scales.
__device__ inline float block_worth(u32 code, int form, int width) {
    if (form == 0) {
        const int half = 1 << (width - 1);
        return float((int(code) ^ half) - half);
    }
    const u32 exponent = code >> 3 & 15, steps = (code & 7) + (exponent ? 8 : 0);
    const float size = float(steps) * float_of((117 + (exponent ? exponent : 1)) << 23);
    return float_of(bits_of(size) | (code & 0x80) << 24);
}

__device__ inline u32 block_code(float y, int form, int width, bool random, float draw) {
    if (form == 0)
        return u32(int(block_whole(y, random, draw))) & ((1u << width) - 1);
    const u32 bits = bits_of(y), found = bits >> 23 & 0xFF, exponent = found > 121 ? found : 121;
    const float steps = block_whole(fabsf(y) * float_of((257 - exponent) << 23), random, draw);
    return ((exponent - 120) << 3) + u32(steps) - 8 + (bits >> 31 << 7);
}

// The sum of squares of a warp's block: lanes as in `total`, each folded in blocks of 32 rows. At
// most 32 * 32 rows. `lanes` is shared memory.
__device__ inline double block_squares(const float* x, const float* more, i64 first, i64 end,
                                       double* lanes) {
    double outer = 0, inner = 0, total = 0;
    int row = 0;
    for (i64 i = first + lane(); i < end; i += 32) {
        const double v = value(x, more, i);
        inner += v * v;
        if (++row % 32 == 0) outer += inner, inner = 0;
    }
    lanes[threadIdx.x] = outer + inner;
    __syncwarp();
    for (u32 k = 0; k < 32; k++) total += lanes[threadIdx.x / 32 * 32 + k];
    return total;
}

// A warp takes a block of x, or of x + more, whose remainder goes to `out`; a lane takes eight
// elements at a time, whose codes are whole bytes.
KERNEL block_encode(const float* x, const float* more, float* out, i64 n, i64 size, int form,
                    int levels, int l2, int random, u32 bucket, u32 step, u32 rank, u32 key0,
                    u32 key1, i64 start, u8* data, u32* fault) {
    __shared__ double lanes[THREADS];
    const i64 block = thread_number() / 32, blocks = ceil_div(n, size), first = block * size;
    if (block >= blocks) return;
    const i64 end = first + size < n ? first + size : n;
    u32 largest = 0;
    for (i64 i = first + lane(); i < end; i += 32) {
        const u32 bits = bits_of(value(x, more, i)) & 0x7FFFFFFFu;
        if (bits > largest) largest = bits;
    }
    for (int reach = 16; reach; reach /= 2) {
        const u32 other = __shfl_xor_sync(FULL, largest, reach);
        if (other > largest) largest = other;
    }
    float wide = float_of(largest) / float(levels);
    if (l2) wide = float(sqrt(block_squares(x, more, first, end, lanes)) / double(levels));
    u32 scale = (bits_of(wide) + 0xFFFF) >> 16;
    scale = scale < BLOCK_LEAST ? BLOCK_LEAST : scale;
    scale = scale > block_most(levels) ? block_most(levels) : scale;
    if (largest == 0) scale = 0;
    if (largest >= 0x7F800000u) scale = BLOCK_INFINITE;
    if (lane() == 0) data[2 * block] = u8(scale), data[2 * block + 1] = u8(scale >> 8);
    const bool spoken = scale != 0 && scale != BLOCK_INFINITE;
    if (out) say(fault, scale == BLOCK_INFINITE);
    const float s = float_of(scale << 16), inverse = spoken ? 1.0f / s : 0.0f;
    const float most = float(levels);
    const int width = block_width(form, levels);
    Draws draws(Key{bucket, step, rank, key0, key1});
    for (i64 at = first + 8 * lane(); at < end; at += 256) {
        u64 packed = 0;
        for (int k = 0; k < 8 && at + k < end; k++) {
            const i64 i = at + k;
            const float v = value(x, more, i), y = spoken ? v * inverse : 0.0f;
            const float held = y < -most ? -most : y > most ? most : y;
            const float draw = random ? draws.uniform(u64(start + i)) : 0.0f;
            const u32 code = spoken ? block_code(held, form, width, random, draw) : 0;
            packed |= u64(code) << k * width;
            if (out) out[i] = v - (spoken ? s * block_worth(code, form, width) : 0.0f);
        }
        const i64 bytes = ceil_div(n * width, 8), to = at / 8 * width;
        for (int k = 0; k < width && to + k < bytes; k++)
            data[2 * blocks + to + k] = u8(packed >> 8 * k);
    }
}

// out = (fresh) or += the sum over packets of weight * (scale * code), in the packets' order.
KERNEL block_decode(const u64* packets, int count, i64 size, int form, int levels, float weight,
                    float* out, i64 n, int fresh, u32* fault) {
    const i64 i = thread_number(), blocks = ceil_div(n, size);
    if (i >= n) return;
    const int width = block_width(form, levels), shift = int(i * width % 8);
    const i64 at = i * width / 8, bytes = ceil_div(n * width, 8);
    float sum = fresh ? 0.0f : out[i];
    for (int p = 0; p < count; p++) {
        const u8* data = reinterpret_cast<const u8*>(packets[p]);
        const u8* codes = data + 2 * blocks;
        const u32 scale = block_scale(data, i / size);
        say(fault, scale && (scale < BLOCK_LEAST || scale > block_most(levels)));
        u32 word = codes[at];
        if (at + 1 < bytes) word |= u32(codes[at + 1]) << 8;
        if (i == n - 1) say(fault, word >> (shift + width) != 0);  // what is left of the last byte
        const u32 code = word >> shift & ((1u << width) - 1);
        const float worth = block_worth(code, form, width);
        say(fault, fabsf(worth) > float(levels));
        sum += float_of(scale << 16) * worth * weight;
    }
    out[i] = sum;
}
