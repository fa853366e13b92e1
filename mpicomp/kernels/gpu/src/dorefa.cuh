// DoReFa: codes of 1 to 8 bits at random between -m and m, and what remains owed.
#pragma once

// q in 0 ... steps, for an element that is not all of a tensor of zeros.
__device__ inline int dorefa_code(float x, float scale, float steps, float draw) {
    const float half = steps / 2;
    const float y = rintf(x / scale * half + half + draw);
    return int(y < 0 ? 0.0f : y > steps ? steps : y);
}

// What the integer 2 q - n means: 2 m (q / n - 1/2).
__device__ inline float dorefa_value(float integer, float steps, float scale, float weight) {
    return integer / steps * scale * weight;
}

// A thread takes eight elements of x, or of x + more, whose remainder goes to `out`; with packed
// codes these are `bits` whole bytes. width: 0 for packed codes, else the bytes of an integer.
KERNEL dorefa_encode(const float* x, const float* more, float* out, i64 n, const float* scale,
                     int bits, u32 bucket, u32 step, u32 rank, u32 key0, u32 key1, i64 start,
                     int width, u8* data, u32* fault) {
    const i64 first = 8 * thread_number();
    if (first >= n) return;
    Draws draws(Key{bucket, step, rank, key0, key1});
    const float m = *scale, steps = float((1 << bits) - 1);
    u64 packed = 0;
    for (int k = 0; k < 8 && first + k < n; k++) {
        const i64 i = first + k;
        const float v = value(x, more, i);
        int integer = width ? 0 : -int(steps);  // all bytes are 0 where the tensor is
        if (m > 0) {
            const int q = dorefa_code(v, m, steps, draws.uniform(u64(start + i)) - 0.5f);
            packed |= u64(q) << k * bits;
            integer = 2 * q - int(steps);
        }
        if (width == 1) reinterpret_cast<s8*>(data)[i] = s8(integer);
        if (width == 2) reinterpret_cast<s16*>(data)[i] = s16(integer);
        if (width == 4) reinterpret_cast<int*>(data)[i] = integer;
        if (out) {
            const float said = dorefa_value(float(integer), steps, m, -1.0f);
            say(fault, !finite(said));
            out[i] = v + said;
        }
    }
    const i64 bytes = ceil_div(n * bits, 8), at = first / 8 * bits;
    for (int k = 0; !width && k < bits && at + k < bytes; k++) data[at + k] = u8(packed >> 8 * k);
}

__device__ inline int dorefa_read(const u8* data, int bits, int width, i64 n, i64 i, u32* fault) {
    if (width == 1) return reinterpret_cast<const s8*>(data)[i];
    if (width == 2) return reinterpret_cast<const s16*>(data)[i];
    if (width == 4) return reinterpret_cast<const int*>(data)[i];
    const i64 at = i * bits / 8, end = ceil_div(n * bits, 8);
    const int shift = int(i * bits % 8);
    u32 word = data[at];
    if (at + 1 < end) word |= u32(data[at + 1]) << 8;
    if (i == n - 1) say(fault, word >> (shift + bits) != 0);  // what is left of the last byte
    return 2 * int(word >> shift & ((1 << bits) - 1)) - ((1 << bits) - 1);
}

// out = (fresh) or += the sum over packets of weight * what the codes mean, in the packets' order.
KERNEL dorefa_decode(const u64* packets, const u64* scales, int count, int bits, int width,
                     float weight, float* out, i64 n, int fresh, u32* fault) {
    const i64 i = thread_number();
    if (i >= n) return;
    const float steps = float((1 << bits) - 1);
    float sum = fresh ? 0.0f : out[i];
    for (int p = 0; p < count; p++) {
        const float scale = *reinterpret_cast<const float*>(scales[p]);
        const u8* data = reinterpret_cast<const u8*>(packets[p]);
        const int integer = dorefa_read(data, bits, width, n, i, fault);
        const float v = dorefa_value(float(integer), steps, scale, weight);
        say(fault, !finite(v));
        sum += v;
    }
    out[i] = sum;
}
