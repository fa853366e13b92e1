// Dense float32 and the two 16-bit floats. The conversions are written out in integers, as the
// reference rounds: to nearest even, and finite values stay finite.
#pragma once

enum FloatKind { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

__device__ inline u32 bfloat16_of(float x) {
    const u32 bits = bits_of(x);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return bits >> 16 | 0x40;  // NaN
    const u32 rounded = u32((u64(bits) + 0x7FFF + (bits >> 16 & 1)) >> 16);
    const bool overflow = finite(x) && (rounded & 0x7FFF) >= 0x7F80;
    return overflow ? rounded - 1 : rounded;
}

__device__ inline u32 float16_of(float x) {
    const u32 bits = bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFFu;
    if (size > 0x7F800000u) return sign | 0x7E00;  // NaN
    if (size >= 0x477FE000u) return sign | 0x7BFF;  // 65504 and beyond
    const int exponent = int(size >> 23) - 127;
    if (exponent < -25) return sign;  // less than half of the smallest
    u32 kept, rest, half;  // the bits that remain, those cut off, and half a unit of the last place
    if (exponent < -14) {  // subnormal: units of 2**-24
        const u32 mantissa = (size & 0x7FFFFFu) | 0x800000u, cut = u32(-exponent - 1);
        kept = mantissa >> cut, rest = mantissa & ((1u << cut) - 1), half = 1u << (cut - 1);
    } else {
        kept = (size >> 13) - (112u << 10), rest = size & 0x1FFF, half = 0x1000;
    }
    if (rest > half || (rest == half && (kept & 1))) kept++;
    return sign | kept;
}

__device__ inline float float_of_float16(u32 bits) {
    const u32 sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3FF;
    if (exponent == 31) return float_of(sign | 0x7F800000u | mantissa << 13);
    if (exponent) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
    const float size = float(mantissa) * 5.9604644775390625e-8f;
    return sign ? -size : size;
}

__device__ inline float read_float(const u8* data, int kind, i64 i) {
    if (kind == FLOAT32) return reinterpret_cast<const float*>(data)[i];
    const u32 bits = reinterpret_cast<const u16*>(data)[i];
    return kind == FLOAT16 ? float_of_float16(bits) : float_of(bits << 16);
}

KERNEL cast_encode(const float* x, i64 n, int kind, u16* data) {
    const i64 i = thread_number();
    if (i < n) data[i] = u16(kind == FLOAT16 ? float16_of(x[i]) : bfloat16_of(x[i]));
}

// out = (fresh) or += the sum over packets of weight * value, in the packets' order.
KERNEL float_decode(const u64* packets, int count, int kind, float weight, float* out, i64 n,
                    int fresh, u32* fault) {
    const i64 i = thread_number();
    if (i >= n) return;
    float sum = fresh ? 0.0f : out[i];
    for (int p = 0; p < count; p++) {
        const float v = read_float(reinterpret_cast<const u8*>(packets[p]), kind, i);
        say(fault, !finite(v));
        sum += v * weight;
    }
    out[i] = sum;
}

KERNEL dense_scale(const float* values, float weight, float* out, i64 n, u32* fault) {
    const i64 i = thread_number();
    if (i >= n) return;
    const float scaled = values[i] * weight;
    say(fault, !finite(scaled));
    out[i] = scaled;
}
