// One element of every run, drawn at random.
#pragma once

#include "philox.h"
#include "sums.h"

namespace {

// f(j, element, length) for each of `keep` runs of n elements.
template <class F> void each_run(const Philox& key, i64 n, i64 keep, const F& f) {
    constexpr i64 STEP = 1024;
    split(keep, STEP, grain, [&](int, i64 begin, i64 end) {
        alignas(32) u32 room[STEP + 8];
        i64 start = keep ? begin * n / keep : 0;
        for (i64 at = begin; at < end; at += STEP) {
            const i64 count = std::min(STEP, end - at);
            const u32* words = philox_words(key, at, count, room);
            for (i64 j = 0; j < count; j++) {
                const i64 stop = (at + j + 1) * n / keep, length = stop - start;
                f(at + j, start + i64(u64(words[j]) * u64(length) >> 32), length);
                start = stop;
            }
        }
    });
}

}  // namespace

// float32 value of the element drawn from each run; if `scale`, times the length of the run.
API void mp_randomk_encode(const float* x, i64 n, i64 keep, int scale, u64 seed, u32 rank, u32 step,
                           u32 bucket, u8* data) {
    each_run({bucket, step, rank, u32(seed), u32(seed >> 32)}, n, keep,
             [&](i64 j, i64 element, i64 length) {
                 put(data + 4 * j, scale ? x[element] * float(length) : x[element]);
             });
}

// out += weight * value at the elements drawn; INVALID unless all are finite.
API i64 mp_randomk_decode(const u8* data, i64 keep, u64 seed, u32 rank, u32 step, u32 bucket,
                          float weight, float* out, i64 n) {
    if (!finite_bytes(data, keep)) return INVALID;
    each_run({bucket, step, rank, u32(seed), u32(seed >> 32)}, n, keep,
             [&](i64 j, i64 element, i64) { out[element] += weight * get<float>(data + 4 * j); });
    return 0;
}
