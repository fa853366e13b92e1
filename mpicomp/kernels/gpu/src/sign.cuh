// Signs with one mean magnitude for each group of `length` elements; the last may be shorter.
#pragma once

__device__ inline i64 group_size(i64 n, i64 length, i64 group) {
    return n - group * length < length ? n - group * length : length;
}

// The bits of the group's scale.
__device__ inline u32 sign_scale(const u8* data, i64 group) {
    const u8* at = data + 4 * group;
    return at[0] | u32(at[1]) << 8 | u32(at[2]) << 16 | u32(at[3]) << 24;
}

// The first level of the fold of each lane of |x|, or of |x + more|: sums[groups][blocks][32],
// blocks of 1024 elements.
KERNEL sign_sums(const float* x, const float* more, i64 n, i64 length, float* sums) {
    const i64 t = thread_number(), blocks = ceil_div(length, 1024);
    const i64 group = t / 32 / blocks, block = t / 32 % blocks;
    if (group >= ceil_div(n, length)) return;
    const i64 size = group_size(n, length, group), begin = block * 1024 + t % 32;
    float sum = 0;
    for (i64 i = begin; i < begin + 1024 && i < size; i += 32)
        sum += fabsf(value(x, more, group * length + i));
    sums[t] = sum;
}

// The mean magnitudes from the folded lanes, to the front of the payload.
KERNEL sign_means(const float* lanes, i64 n, i64 length, u8* data, u32* fault) {
    const i64 group = thread_number();
    if (group >= ceil_div(n, length)) return;
    float sum = 0;
    for (int k = 0; k < 32; k++) sum += lanes[32 * group + k];
    const u32 bits = bits_of(sum / float(group_size(n, length, group)));
    for (int k = 0; k < 4; k++) data[4 * group + k] = u8(bits >> 8 * k);
    say(fault, bits >= 0x7F800000u);
}

// A thread makes a byte of bits, and what remains of its elements.
KERNEL sign_bits(const float* x, const float* more, float* out, i64 n, i64 length, u8* data) {
    const i64 t = thread_number(), each = ceil_div(length, 8), group = t / each, byte = t % each;
    const i64 groups = ceil_div(n, length);
    if (group >= groups || 8 * byte >= group_size(n, length, group)) return;
    const float scale = float_of(sign_scale(data, group));
    u32 bits = 0;
    for (i64 k = 0; k < 8 && 8 * byte + k < group_size(n, length, group); k++) {
        const i64 i = group * length + 8 * byte + k;
        const float v = value(x, more, i);
        bits |= u32(v >= 0) << k;
        if (out) out[i] = v + (v >= 0 ? -scale : scale);
    }
    data[4 * groups + t] = u8(bits);
}

// out = (fresh) or += the sum over packets of weight * what the bits stand for, in their order.
KERNEL sign_decode(const u64* packets, int count, i64 length, float weight, float* out, i64 n,
                   int fresh, u32* fault) {
    const i64 i = thread_number(), group = i / length, place = i % length;
    if (i >= n) return;
    const i64 at = 4 * ceil_div(n, length) + group * ceil_div(length, 8) + place / 8;
    float sum = fresh ? 0.0f : out[i];
    for (int p = 0; p < count; p++) {
        const u8* data = reinterpret_cast<const u8*>(packets[p]);
        const u32 scale = sign_scale(data, group), bits = data[at] >> place % 8;
        say(fault, scale >= 0x7F800000u);
        if (place == group_size(n, length, group) - 1) say(fault, bits > 1);
        sum += (bits & 1 ? float_of(scale) : -float_of(scale)) * weight;
    }
    out[i] = sum;
}
