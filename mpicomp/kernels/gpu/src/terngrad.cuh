// TernGrad: the clip level and the scaler of a layer, its codes, and their packings.
#pragma once

enum TernaryPacking { TWO_BITS = 0, PLANAR = 1, INT8 = 2, INT16 = 3, FIVE_TRITS = 4 };

// The first level of the lanes' folds (as total_floats) of x and of x * x in float64:
// sums[2][blocks of 1024][32].
KERNEL terngrad_sums(const float* x, i64 n, double* sums) {
    const i64 t = thread_number(), blocks = ceil_div(n, 1024), begin = t / 32 * 1024 + t % 32;
    if (t >= 32 * blocks) return;
    double sum = 0, squares = 0;
    for (i64 i = begin; i < begin + 1024 && i < n; i += 32) {
        const double wide = x[i];
        sum += wide;
        squares += wide * wide;
    }
    sums[t] = sum;
    sums[32 * blocks + t] = squares;
}

// result = {level, scale} from the folded lanes lanes[2][32] and the largest magnitude: _level and
// terngrad_scale of the reference or, if `code`, terngrad_scale_code. One thread works.
KERNEL terngrad_level(const double* lanes, i64 n, double clip, int code, const u32* largest,
                      float* result) {
    if (thread_number() > 0) return;
    const float none = float_of(0x7F800000u), most = float_of(*largest);
    float level = none;
    if (lanes) {
        double sum = 0, squares = 0;
        for (int lane = 0; lane < 32; lane++) sum += lanes[lane], squares += lanes[32 + lane];
        const double mean = sum / double(n), variance = squares / double(n) - mean * mean;
        level = float(clip * sqrt(variance > 0 ? variance : 0.0));
        if (!(level > 0) || most * 1e-6f > level) level = none;
    }
    result[0] = code ? none : level;
    result[1] = code ? (level < none ? level : most) : (level < most ? level : most);
}

// -1, 0, 1: the sign of x where draw * scale < min(|x|, level).
__device__ inline int terngrad_code(float x, float level, float scale, float draw) {
    const float size = fabsf(x), least = size < level ? size : level;
    return draw * scale < least ? (x > 0) - (x < 0) : 0;
}

struct TernaryInput {
    const float* x;
    i64 n;
    float level, scale;
    i64 start;

    __device__ int code(i64 i, Draws& draws) const {
        return terngrad_code(x[i], level, scale, draws.uniform(u64(start + i)));
    }
    __device__ u32 digit(i64 i, Draws& draws) const { return u32(code(i, draws) + 1); }
};

// A thread takes four consecutive elements of each byte's place: one Philox block serves them.
KERNEL terngrad_encode(const float* x, i64 n, const float* level, const float* scale, u32 bucket,
                       u32 step, u32 rank, u32 key0, u32 key1, i64 start, int packing, u8* data) {
    const TernaryInput in{x, n, *level, *scale, start};
    Draws draws(Key{bucket, step, rank, key0, key1});
    const i64 t = thread_number();
    if (packing == TWO_BITS) {
        u32 byte = 0;
        for (int k = 0; k < 4 && 4 * t + k < n; k++) byte |= in.digit(4 * t + k, draws) << 2 * k;
        if (4 * t < n) data[t] = u8(byte);
    } else if (packing == PLANAR) {  // four bytes j, each of elements j, j + q, j + 2 q, j + 3 q
        const i64 q = n / 4 + 1;
        u32 bytes[4] = {0, 0, 0, 0};
        for (int quarter = 0; quarter < 4; quarter++)
            for (int k = 0; k < 4 && 4 * t + k < q; k++) {
                const i64 i = quarter * q + 4 * t + k;
                const u32 digit = i < n ? in.digit(i, draws) : u32(i - n);
                bytes[k] |= digit << 2 * quarter;
            }
        for (int k = 0; k < 4 && 4 * t + k < q; k++) data[4 * t + k] = u8(bytes[k]);
    } else if (packing == FIVE_TRITS) {
        u32 byte = 0, power = 1;
        for (int k = 0; k < 5 && 5 * t + k < n; k++, power *= 3)
            byte += in.digit(5 * t + k, draws) * power;
        if (5 * t < n) data[t] = u8(byte);
    } else {
        for (i64 i = 4 * t; i < 4 * t + 4 && i < n; i++) {
            if (packing == INT8) reinterpret_cast<s8*>(data)[i] = s8(in.code(i, draws));
            else reinterpret_cast<s16*>(data)[i] = s16(in.code(i, draws));
        }
    }
}

// The code of element i, or a sum of codes; a digit that is none is a fault.
__device__ inline int terngrad_read(const u8* data, int packing, i64 n, i64 i, u32* fault) {
    if (packing == INT8) return reinterpret_cast<const s8*>(data)[i];
    if (packing == INT16) return reinterpret_cast<const s16*>(data)[i];
    if (packing == FIVE_TRITS) {
        const u32 byte = data[i / 5], powers[5] = {1, 3, 9, 27, 81}, k = u32(i % 5);
        say(fault, byte > 242);
        for (u32 rest = k + 1; i == n - 1 && rest < 5; rest++)  // what is missing at the end
            say(fault, byte / powers[rest] % 3 != 0);
        return int(byte / powers[k] % 3) - 1;
    }
    const i64 q = n / 4 + 1;
    const u32 digit = packing == TWO_BITS ? data[i / 4] >> 2 * (i % 4) & 3
                                          : data[i % q] >> 2 * (i / q) & 3;
    say(fault, digit == 3);
    return int(digit) - 1;
}

// out = (fresh) or += the sum over packets of code * (weight * scale), in the packets' order.
KERNEL terngrad_decode(const u64* packets, const u64* scales, int count, int packing, float weight,
                       float* out, i64 n, int fresh, u32* fault) {
    const i64 i = thread_number();
    if (i >= n) return;
    float sum = fresh ? 0.0f : out[i];
    for (int p = 0; p < count; p++) {
        const float scale = *reinterpret_cast<const float*>(scales[p]);
        const u8* data = reinterpret_cast<const u8*>(packets[p]);
        sum += float(terngrad_read(data, packing, n, i, fault)) * (weight * scale);
    }
    out[i] = sum;
}
